# Made-up facts, half of them stated in one direction only: the reversal curse, for a laptop.
# parameters: 802,688
#     python train.py config/reversal_ar.py            3.3 minutes on one core without bfloat16
# Fills in 99.5% of the facts in the direction of the training text and 0% in one that the text
# never has (data/RESULTS.md, The reversal curse).
dataset = 'reversal'
objective = 'ar'
n_embd = 128
block_size = 128
max_iters = 600
