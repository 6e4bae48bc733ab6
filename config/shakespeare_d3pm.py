# Masked diffusion in 1000 discrete steps (D3PM), with time conditioning.
# parameters: 2,779,968
#     python train.py config/shakespeare_d3pm.py
# Time and outcome at this size: not measured. 4 layers x 128, context 128, noise levels 0.15 to
# 0.99, 1,200 updates: <= 2.8164 bits/character; masked diffusion <= 2.8206 (data/RESULTS.md,
# Noises).
dataset = 'shakespeare_char'
objective = 'd3pm'
mask_range = (0.0, 1.0)
time_cond = True
