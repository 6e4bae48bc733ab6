# Masked diffusion on Tiny Shakespeare, for a laptop: about 10 minutes on 2 CPU cores.
# parameters: 3,181,824
dataset = 'shakespeare_char'
objective = 'mdm'
