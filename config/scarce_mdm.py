# Little text: masked diffusion on the 50,000 characters of scarce_ar.py, 123 epochs of them.
# parameters: 804,480
#     python train.py config/scarce_mdm.py             20 minutes on one core
# nelbo <= 2.2923 +- 0.0045 nats/character, 3 seeds: below the nll of scarce_ar.py, 2.3172
# (data/RESULTS.md, Little text). The learning rates are a quarter of the defaults.
dataset = 'shakespeare_char'
train_tokens = 50_000
objective = 'mdm'
n_head = 4
n_embd = 128
n_conv = 0
block_size = 128
dropout = 0.1
attn_dropout = 0.1
weight_decay = 0.3
learning_rate = 1.5e-3
muon_lr = 0.005
lr_schedule = 'cosine'
max_iters = 3000
eval_interval = 250
