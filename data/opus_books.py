"""OPUS Books: 127,000 sentences of novels, from English to French, 34 MB.

Tiedemann, Parallel Data, Tools and Interfaces in OPUS, 2012. No sha256 is published.
"""

mirrors = ['https://object.pouta.csc.fi/OPUS-Books/v1/moses/']
files = {'en-fr.txt.zip': None}
layout = 'pairs'
text = {'': ['Books.en-fr.en', 'Books.en-fr.fr']}
tokenizer = 'bpe'
vocab_size = 19_999  # with the mask 20,000
splits = {'train': 0.98, 'val': 0.99, 'test': 1}
drawn = True  # for the last rows are a few novels, which are like no other
