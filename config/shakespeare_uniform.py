# Diffusion whose noise is random characters (UDLM, Duo), so that it can correct itself.
# parameters: 2,772,288
dataset = 'shakespeare_char'
objective = 'uniform'
time_cond = True
