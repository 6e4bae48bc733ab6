# Masked diffusion on WikiText-2 in 4,096 tokens of its own, one epoch: about 10 minutes on 2 cores.
# parameters: 3,344,448
dataset = 'wikitext2_bpe'
objective = 'mdm'
max_iters = 800
