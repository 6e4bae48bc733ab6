# A head that predicts for every mask of multi30k_mdm_pad whether the answer has ended there.
# parameters: 3,352,321
#     python train.py config/length_classify.py --max_iters=150   after multi30k_mdm_pad; 15 s
# Its canvases fit 99.0% of the answers and save 31.2 of 59 masks (data/RESULTS.md, Length
# prediction).
init_from = 'out/multi30k_mdm_pad'
dataset = 'multi30k'
objective = 'mdm'
length_head = 'classify'
predict_pad = True
block_size = 128
batch_size = 64
max_iters = 500
learning_rate = 3e-3
eval_interval = 100
