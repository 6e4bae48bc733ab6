# The autoregressive twin of wikitext2_mdm.py: the same network, data and budget.
# parameters: 3,344,448
dataset = 'wikitext2_bpe'
objective = 'ar'
