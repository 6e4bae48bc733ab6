# The autoregressive twin of text8_mdm.py: the same network, data and budget.
# parameters: 84,996,864
#     python train.py config/text8_ar.py               for a GPU
# Time and outcome: not measured. The tests build it and take a step.
dataset = 'text8'
objective = 'ar'
batch_size = 64
gradient_accumulation_steps = 8
n_layer = 12
n_embd = 768
n_conv = 0
optimizer = 'adamw'
learning_rate = 3e-4
lr_schedule = 'cosine'
warmup_iters = 2500
weight_decay = 0.1
max_iters = 100_000
eval_interval = 5000
compile = True
