# The recipe of tutorials on masked diffusion: a GPT-2 with time conditioning by adaLN, and AdamW.
# parameters: 7,305,728
#     python train.py config/guide_mdm.py              for a GPU
# Time and outcome of all updates: not measured. 45 updates, --warmup_iters=10, 238 s on one core:
# nelbo <= 3.359 nats/character, where the frequencies of characters give 3.35 (data/RESULTS.md,
# Noises).
dataset = 'shakespeare_char'
objective = 'mdm'
loss_weight = 'masked_mean'
mask_range = (0.0, 1.0)
block_size = 128
batch_size = 64
n_layer = 6
n_head = 8
n_embd = 256
pos = 'learned'
norm = 'layernorm'
mlp = 'gelu'
qk_norm = False
bias = True
time_cond = True
dropout = 0.1
optimizer = 'adamw'
learning_rate = 3e-4
warmup_iters = 1000
max_iters = 5000
