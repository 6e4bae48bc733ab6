# A small encoder that tells from the prompt how long the answer of multi30k_mdm_pad will be.
# parameters: 4,758,400
init_from = 'out/multi30k_mdm_pad'
dataset = 'multi30k'
objective = 'mdm'
length_head = 'encoder_classify'
predict_pad = True
block_size = 128
batch_size = 64
tied = True
max_iters = 500
learning_rate = 3e-3
eval_interval = 100
