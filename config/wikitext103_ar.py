# The autoregressive twin of wikitext103_mdm.py: the same network, data and budget.
# parameters: 123,552,000
#     python train.py config/wikitext103_ar.py         for a GPU
# Time and outcome: not measured. The tests build it and take a step.
dataset = 'wikitext103'
objective = 'ar'
batch_size = 4
block_size = 512
n_layer = 12
n_embd = 768
n_conv = 0
tied = True
embed_scale = 1.0
optimizer = 'adamw'
learning_rate = 3e-4
lr_schedule = 'constant'
warmup_iters = 2500
weight_decay = 0.1
max_iters = 200_000
eval_interval = 10_000
compile = True
