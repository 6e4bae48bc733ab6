# Masked diffusion on Tiny Shakespeare in characters, for a laptop; the defaults of train.py.
# parameters: 1,804,224
#     python train.py config/shakespeare_mdm.py        10 to 12 minutes on 2 CPU cores with bfloat16
# nelbo <= 1.7288 +- 0.0047 nats/character, 3 seeds; after --max_iters=12000
# <= 1.6071 (data/RESULTS.md, The laptop pair).
dataset = 'shakespeare_char'
objective = 'mdm'
