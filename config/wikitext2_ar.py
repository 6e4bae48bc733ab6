# The autoregressive twin of wikitext2_mdm.py: the same network, data and budget.
# parameters: 3,352,128
#     python train.py config/wikitext2_ar.py           1.6 updates/s on one core
# nll 3.6087 +- 0.0037 nats/token, 2 seeds; before embeddings began at 0.25 3.5972 +- 0.0104, 3
# seeds (data/RESULTS.md, WikiText-2).
dataset = 'wikitext2_bpe'
objective = 'ar'
max_iters = 1200
