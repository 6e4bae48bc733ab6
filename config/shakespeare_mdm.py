# Masked diffusion on Tiny Shakespeare in characters, for a laptop; the defaults of train.py.
# parameters: 1,804,224
#     python train.py config/shakespeare_mdm.py        6 to 12 minutes on 2 CPU cores
# nelbo <= 1.9455 +- 0.0016 nats/character, 3 seeds (data/RESULTS.md, The laptop pair).
dataset = 'shakespeare_char'
objective = 'mdm'
