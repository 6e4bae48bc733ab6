"""WikiText-2 in 4,096 tokens of its own, learned from the train split.

The head of a small model is small, too: with GPT-2's 50,257 tokens it would be most of the model.
"""

base = 'wikitext2'
tokenizer = 'bpe'
vocab_size = 4096
