# As multi30k_mdm.py, but PAD is predicted too: it is not told how long the answer is to be.
# parameters: 3,307,392
dataset = 'multi30k'
objective = 'mdm'
mask_range = (0.0, 1.0)
predict_pad = True
random_length = 0.8
block_size = 128
batch_size = 64
tied = True
max_iters = 2000
eval_interval = 500
warmup_iters = 100
