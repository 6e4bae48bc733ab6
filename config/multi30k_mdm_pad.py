# As multi30k_mdm.py, but PAD is predicted too: the length of the answer is not given.
# parameters: 3,315,072
#     python train.py config/multi30k_mdm_pad.py --init_from=out/multi30k_mdm --max_iters=500
# takes 4 minutes on 2 CPU cores with bfloat16. On 200 sentences BLEU 43.7 in the full window, 44.6
# at predicted lengths, in half of the time (data/RESULTS.md, Length prediction). Time and outcome
# from nothing: not measured.
dataset = 'multi30k'
objective = 'mdm'
predict_pad = True
random_length = 0.8
block_size = 128
batch_size = 64
tied = True
max_iters = 2000
eval_interval = 500
warmup_iters = 100
