# Little text: masked diffusion on the 50,000 characters of scarce_ar.py, 123 epochs of them.
# parameters: 809,600
#     python train.py config/scarce_mdm.py             24 minutes on one core without bfloat16
# nelbo <= 2.2415 +- 0.0062 nats/character, 3 seeds, all of the validation split (data/RESULTS.md,
# Little text). The learning rates are a quarter of the defaults.
dataset = 'shakespeare_char'
train_tokens = 50_000
objective = 'mdm'
n_embd = 128
block_size = 128
dropout = 0.1
attn_dropout = 0.1
weight_decay = 0.3
learning_rate = 1.5e-3
muon_lr = 0.005
lr_schedule = 'cosine'
max_iters = 3000
eval_interval = 250
