# Little text: AR on the first 50,000 characters of Tiny Shakespeare, 37 epochs.
# parameters: 804,480
#     python train.py config/scarce_ar.py              2.5 minutes on 2 CPU cores with bfloat16
# nll 2.4319 +- 0.0137 nats/character at the end, 2.3295 +- 0.0042 at its best, 3 seeds; 2.3172 with
# dropout inside attention, which the code has no more (data/RESULTS.md, Little text).
dataset = 'shakespeare_char'
train_tokens = 50_000
objective = 'ar'
n_head = 4
n_embd = 128
n_conv = 0
block_size = 128
dropout = 0.2
weight_decay = 0.3
max_iters = 900
eval_interval = 75
