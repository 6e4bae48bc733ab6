# Made-up facts, half of them told in one direction only: the reversal curse, for a laptop.
# parameters: 797,568
dataset = 'reversal'
objective = 'ar'
n_embd = 128
block_size = 128
max_iters = 600
