# Masked diffusion on Tiny Shakespeare, for a laptop: about 12 minutes on 2 CPU cores.
# parameters: 1,796,544
dataset = 'shakespeare_char'
objective = 'mdm'
