# Little text: AR on the first 50,000 characters of Tiny Shakespeare, 37 epochs.
# parameters: 804,480
dataset = 'shakespeare_char'
train_tokens = 50_000
objective = 'ar'
n_embd = 128
block_size = 128
dropout = 0.2
weight_decay = 0.3
max_iters = 900
eval_interval = 75
