# The autoregressive twin of multi30k_mdm.py: the same network, data and budget.
# parameters: 3,307,392
#     python train.py config/multi30k_ar.py            35 minutes on one core
# After 1,700 of its updates: nll 1.197 nats/token, BLEU 54.37 on test2016 (data/RESULTS.md,
# Translation).
dataset = 'multi30k'
objective = 'ar'
block_size = 128
batch_size = 64
n_head = 4
n_conv = 0
tied = True
max_iters = 2000
eval_interval = 500
warmup_iters = 100
