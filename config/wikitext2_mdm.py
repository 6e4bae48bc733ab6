# Masked diffusion on WikiText-2 in 4,096 tokens of its own, 1.6 epochs, for a laptop.
# parameters: 2,565,504
#     python train.py config/wikitext2_mdm.py          0.45 updates/s on one core in float32
# nelbo <= 4.2330 +- 0.0031 nats/token, 2 seeds; with a head of its own <= 4.3649 (data/RESULTS.md,
# WikiText-2).
dataset = 'wikitext2_bpe'
objective = 'mdm'
tied = True
max_iters = 1200
