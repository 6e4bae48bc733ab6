# Made-up facts, half of them stated in one direction only: the reversal curse, for a laptop.
# parameters: 802,688
#     python train.py config/reversal_mdm.py           37 minutes on one core without bfloat16
# nelbo <= 0.390 nats/character. Of "A is B" it fills in B for 51.5% of the facts, A for 44.0%, and
# 0% in a direction that the text never has (data/RESULTS.md, The reversal curse).
dataset = 'reversal'
objective = 'mdm'
mask_range = (0.0, 1.0)
n_embd = 128
block_size = 128
lr_schedule = 'cosine'
max_iters = 6000
