"""WikiText-2 in 4,096 tokens of its own, learned from the train split.

With GPT-2's 50,257 tokens, the embedding and the head would be most of a small model.
"""

base = 'wikitext2'
tokenizer = 'bpe'
vocab_size = 4096
