# Masked diffusion in 1000 discrete steps (D3PM), the network being shown the level.
# parameters: 2,772,288
dataset = 'shakespeare_char'
objective = 'd3pm'
mask_range = (0.0, 1.0)
time_cond = True
