"""OPUS Books: 127,000 sentences of novels, from English to French, 34 MB.

Tiedemann, Parallel Data, Tools and Interfaces in OPUS, 2012. No sha256 is published.
"""

import itertools

import numpy as np

mirrors = ['https://object.pouta.csc.fi/OPUS-Books/v1/moses/']
files = {'en-fr.txt.zip': None}
layout = 'pairs'
text = {'': ['Books.en-fr.en', 'Books.en-fr.fr']}
tokenizer = 'bpe'
vocab_size = 19_999  # with the mask 20,000


def splits(read):
    """{split: function that yields its pairs}: a random 1% is val, and another 1% is test.

    The last tenth of the rows would be a few novels, which are like no other."""
    n = sum(1 for _ in read())
    sizes = [n - 2 * (n // 100), n // 100, n // 100]
    part = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], sizes))  # (n,), part of a row
    return {split: lambda i=i: itertools.compress(read(), part == i)
            for i, split in enumerate(('train', 'val', 'test'))}
