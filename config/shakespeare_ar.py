# The autoregressive twin of shakespeare_mdm.py: the same network and data.
# parameters: 1,804,224
#     python train.py config/shakespeare_ar.py         9 minutes on 2 CPU cores with bfloat16
# nll 1.4718 +- 0.0049 nats/character, 3 seeds (data/RESULTS.md, The laptop pair). Without dropout
# and weight decay it overfits.
dataset = 'shakespeare_char'
objective = 'ar'
dropout = 0.2
weight_decay = 0.3
lr_schedule = 'cosine'
max_iters = 1600
