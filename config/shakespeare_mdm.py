# Masked diffusion on Tiny Shakespeare in characters, for a laptop; the defaults of train.py.
# parameters: 1,804,224
#     python train.py config/shakespeare_mdm.py        12 to 17 minutes on 2 CPU cores with bfloat16
# nelbo <= 1.6968 +- 0.0098 nats/character, 3 seeds (data/RESULTS.md, The laptop pair).
dataset = 'shakespeare_char'
objective = 'mdm'
