# Little text: AR on the first 50,000 characters of Tiny Shakespeare, 9 epochs.
# parameters: 809,600
#     python train.py config/scarce_ar.py              1.5 minutes on one core without bfloat16
# nll 2.2399 +- 0.0049 nats/character, 3 seeds, all of the validation split (data/RESULTS.md,
# Little text): as low as the bound of scarce_mdm.py. After 37 epochs (--max_iters=900): 2.838.
dataset = 'shakespeare_char'
train_tokens = 50_000
objective = 'ar'
n_embd = 128
block_size = 128
dropout = 0.2
attn_dropout = 0.2
weight_decay = 0.3
max_iters = 225
eval_interval = 75
