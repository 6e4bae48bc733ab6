# Little text: AR on the first 50,000 characters of Tiny Shakespeare, 37 epochs.
# parameters: 804,480
#     python train.py config/scarce_ar.py              5 minutes on one core
# nll 2.3172 +- 0.0288 nats/character, 3 seeds, all of the validation split (data/RESULTS.md,
# Little text); after the 12th epoch it gains nothing more. With attn_dropout=0 2.4319 +- 0.0137.
dataset = 'shakespeare_char'
train_tokens = 50_000
objective = 'ar'
n_head = 4
n_embd = 128
n_conv = 0
block_size = 128
dropout = 0.2
attn_dropout = 0.2
weight_decay = 0.3
max_iters = 900
eval_interval = 75
