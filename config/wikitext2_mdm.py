# Masked diffusion on WikiText-2 in 4,096 tokens of its own, 1.6 epochs, for a laptop.
# parameters: 3,344,448
dataset = 'wikitext2_bpe'
objective = 'mdm'
