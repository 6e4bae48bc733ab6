# Masked diffusion on WikiText-2 in 4,096 tokens of its own, 1.6 epochs, for a laptop.
# parameters: 3,344,448
#     python train.py config/wikitext2_mdm.py          0.66 updates/s on one core
# nelbo <= 4.6789 +- 0.0435 nats/token, 3 seeds; with 400 of its updates spent on AR first <= 4.4357
# (data/RESULTS.md, WikiText-2).
dataset = 'wikitext2_bpe'
objective = 'mdm'
n_head = 4
n_conv = 0
max_iters = 1200
