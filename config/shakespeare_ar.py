# The autoregressive twin of shakespeare_mdm.py: the same network, data and budget.
# parameters: 1,804,224
#     python train.py config/shakespeare_ar.py         6 to 12 minutes on 2 CPU cores
# nll 1.4853 +- 0.0123 nats/character, 3 seeds (data/RESULTS.md, The laptop pair).
dataset = 'shakespeare_char'
objective = 'ar'
dropout = 0.2
weight_decay = 0.3
lr_schedule = 'cosine'
max_iters = 1600
