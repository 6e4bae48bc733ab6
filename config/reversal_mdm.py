# Made-up facts, half of them stated in one direction only: the reversal curse, for a laptop.
# parameters: 797,568
#     python train.py config/reversal_mdm.py           33 minutes on one core
# nelbo <= 0.459 nats/character. Of "A is B" it fills in B for 68.5% of the facts, A for 42.5%, and
# 2% in a direction that the text never has (data/RESULTS.md, The reversal curse).
dataset = 'reversal'
objective = 'mdm'
mask_range = (0.0, 1.0)
n_head = 4
n_embd = 128
n_conv = 0
block_size = 128
lr_schedule = 'cosine'
max_iters = 6000
