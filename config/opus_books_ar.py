# The autoregressive twin of opus_books_mdm.py, for a GPU: the same network, data and budget. It is
# trained on the prompt as well, which masked diffusion cannot be: what is given is never masked.
# parameters: 43,992,576
#     python train.py config/opus_books_ar.py          for a GPU
# Time and outcome: not measured. The tests build it and take a step.
dataset = 'opus_books'
objective = 'ar'
score_prompt = True
block_size = 266
batch_size = 16
gradient_accumulation_steps = 4
n_layer = 8
n_embd = 512
n_conv = 0
mlp = 'swiglu'
n_hidden = 2048
pos = 'learned'
qk_norm = False
bias = True
tied = True
embed_scale = 1.0
dropout = 0.1
attn_dropout = 0.1
schedule = 'cosine'
loss_weight = 'masked_mean'
optimizer = 'adamw'
learning_rate = 1e-4
beta2 = 0.999
weight_decay = 0.01
lr_schedule = 'cosine'
warmup_iters = 1000
max_iters = 98_000
eval_interval = 2000
