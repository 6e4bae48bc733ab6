# A head that reads a bound on the answer's length off the states of multi30k_mdm_pad.
# parameters: 3,381,505
init_from = 'out/multi30k_mdm_pad'
dataset = 'multi30k'
objective = 'mdm'
length_head = 'regress_concat'
predict_pad = True
block_size = 128
batch_size = 64
tied = True
max_iters = 500
learning_rate = 1e-2
eval_interval = 100
