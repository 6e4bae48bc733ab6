# A head that predicts a bound on the answer's length from the hidden states of multi30k_mdm_pad.
# parameters: 3,389,185
#     python train.py config/length_regress.py --max_iters=150   after multi30k_mdm_pad; 15 s
# Its canvases fit 99.5% of the answers and save 23.4 of 59 masks (data/RESULTS.md, Length
# prediction).
init_from = 'out/multi30k_mdm_pad'
dataset = 'multi30k'
objective = 'mdm'
length_head = 'regress_concat'  # or regress_mean, from the mean of all hidden states
predict_pad = True
block_size = 128
batch_size = 64
max_iters = 500
learning_rate = 1e-2
eval_interval = 100
