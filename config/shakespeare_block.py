# Masked diffusion inside blocks of 16, which follow each other from left to right (BD3-LM).
# parameters: 1,796,544
dataset = 'shakespeare_char'
objective = 'block'
mask_range = (0.0, 1.0)
block_length = 16
