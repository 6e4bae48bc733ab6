# A head that predicts a bound on the answer's length from the hidden states of multi30k_mdm_pad.
# parameters: 3,389,185
#     python train.py config/length_regress.py         after multi30k_mdm_pad; time not measured
# After 200 updates its canvases fit 100.0% of the answers and save 28.0 of 59 masks; on a model
# trained on windows of random lengths, 99.7% and 27.6 (data/RESULTS.md, Length prediction).
init_from = 'out/multi30k_mdm_pad'
dataset = 'multi30k'
objective = 'mdm'
length_head = 'regress_concat'  # or regress_mean, from the mean of all hidden states
predict_pad = True
block_size = 128
batch_size = 64
tied = True
max_iters = 500
learning_rate = 1e-2
eval_interval = 100
