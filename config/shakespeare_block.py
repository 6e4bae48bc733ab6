# Masked diffusion inside blocks of 16, which follow each other from left to right (BD3-LM).
# parameters: 1,804,224
#     python train.py config/shakespeare_block.py
# Time and outcome at this size: not measured. 4 layers x 128, context 128, noise levels 0.15 to
# 0.99, 1,200 updates: <= 2.7888 bits/character; masked diffusion <= 2.8206 (data/RESULTS.md,
# Noises).
dataset = 'shakespeare_char'
objective = 'block'
mask_range = (0.0, 1.0)
block_length = 16
