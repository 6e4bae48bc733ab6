# Masked diffusion in 1000 discrete steps [D3PM 2107.03006] on WikiText-103, with time conditioning
# and a probability left on the mask: wikitext103_mdm.py without what MDLM simplified. For a GPU.
# parameters: 166,862,592
#     python train.py config/wikitext103_d3pm.py       for a GPU
# Time and outcome: not measured. The tests build it and take a step.
dataset = 'wikitext103'
objective = 'd3pm'
mask_range = (0.0, 1.0)
diffusion_steps = 1000
subs = False
time_cond = True
batch_size = 4
block_size = 512
n_layer = 12
n_embd = 768
n_conv = 0
tied = True
embed_scale = 1.0
optimizer = 'adamw'
learning_rate = 3e-4
lr_schedule = 'constant'
warmup_iters = 2500
weight_decay = 0.1
max_iters = 200_000
eval_interval = 10_000
compile = True
