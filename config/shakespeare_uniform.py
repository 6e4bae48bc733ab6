# Diffusion whose noise is random characters (UDLM, Duo), so that it can correct itself.
# parameters: 2,772,288
dataset = 'shakespeare_char'
objective = 'uniform'
mask_range = (0.0, 0.6)  # above, too little is left of the text to learn from
time_cond = True
