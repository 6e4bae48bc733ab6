# Made-up facts, half of them told in one direction only: the reversal curse, for a laptop.
# parameters: 797,568
dataset = 'reversal'
objective = 'mdm'
mask_range = (0.0, 1.0)
n_embd = 128
block_size = 128
lr_schedule = 'cosine'
max_iters = 6000
