# Diffusion whose noise is random characters (UDLM, Duo), so that it can correct itself.
# parameters: 2,779,968
#     python train.py config/shakespeare_uniform.py
# Time and outcome at this size: not measured. 4 layers x 128, context 128, 1,200 updates: nelbo <=
# 2.9086 bits/character; masked diffusion <= 2.8206 (data/RESULTS.md, Noises).
dataset = 'shakespeare_char'
objective = 'uniform'
mask_range = (0.0, 0.6)  # above, too little is left of the text to learn from
time_cond = True
