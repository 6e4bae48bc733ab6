# Masked diffusion on text8 at the size of the published results: 12 layers, 768 wide, context 256.
# parameters: 84,996,864
#     python train.py config/text8_mdm.py              for a GPU
# Time and outcome: not measured. The tests build it and take a step.
dataset = 'text8'
objective = 'mdm'
loss_weight = 'elbo'
mask_range = (0.0, 1.0)
batch_size = 64
gradient_accumulation_steps = 8
n_layer = 12
n_embd = 768
n_conv = 0
optimizer = 'adamw'
learning_rate = 3e-4
lr_schedule = 'cosine'
warmup_iters = 2500
weight_decay = 0.1
max_iters = 100_000
eval_interval = 5000
compile = True
