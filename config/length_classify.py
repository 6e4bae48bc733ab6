# A head that tells for every mask of multi30k_mdm_pad whether the answer has ended there.
# parameters: 3,344,641
init_from = 'out/multi30k_mdm_pad'
dataset = 'multi30k'
objective = 'mdm'
length_head = 'classify'
predict_pad = True
block_size = 128
batch_size = 64
tied = True
max_iters = 500
learning_rate = 3e-3
eval_interval = 100
