# The autoregressive twin of multi30k_mdm.py: the same network, data and budget.
# parameters: 3,307,392
dataset = 'multi30k'
objective = 'ar'
block_size = 128
batch_size = 64
tied = True
max_iters = 2000
eval_interval = 500
warmup_iters = 100
