# The recipe of tutorials on masked diffusion: a GPT-2 with time conditioning by adaLN, and AdamW.
# Still other than there: windows from random places, not each in turn; six modulations of a block,
# not four. Not measured; before cosine, decay, beta2 and tying, 45 updates (--warmup_iters=10,
# 238 s on one core) ended at nelbo <= 3.359 nats/character (data/RESULTS.md, Noises).
# parameters: 7,288,832
#     python train.py config/guide_mdm.py              for a GPU
dataset = 'shakespeare_char'
objective = 'mdm'
loss_weight = 'masked_mean'
mask_range = (0.0, 1.0)
block_size = 128
batch_size = 64
n_layer = 6
n_head = 8
n_embd = 256
n_conv = 0
pos = 'learned'
norm = 'layernorm'
mlp = 'gelu'
qk_norm = False
bias = True
tied = True
embed_scale = 1.0
time_cond = True
dropout = 0.1
attn_dropout = 0.1
optimizer = 'adamw'
learning_rate = 3e-4
lr_schedule = 'cosine'
warmup_iters = 1000
weight_decay = 0.01
beta2 = 0.999
max_iters = 5000
