"""WikiText-2: 600 good articles of Wikipedia, 13 MB, in three splits as published. CC BY-SA 3.0.

Merity et al., Pointer Sentinel Mixture Models, 2016 [1609.07843]. Rare words are <unk>.
"""

import re

from prepare import EOT, read_chunks, recut

mirrors = ['https://wikitext.smerity.com/',
           'https://s3.amazonaws.com/research.metamind.io/wikitext/']
files = {'wikitext-2-v1.zip': '92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c'}
text = {'train': ['wiki.train.tokens|train.txt'], 'val': ['wiki.valid.tokens|valid.txt'],
        'test': ['wiki.test.tokens|test.txt']}
tokenizer = 'gpt2'
# A title stands between empty lines, which in WikiText hold a space; sections have more `=`. The
# pattern finds the 600 + 60 + 60 articles of WikiText-2 and skips lines of tables like a title.
TITLE = re.compile(r'(?m)^ \n = [^=\n](?:.*[^=\n])? = \n(?= \n)')
AFTER_PARAGRAPH = re.compile(r'(?s).*[^=] \n(?= \n)')  # a title and what follows stay together


def read(file):
    """The text with an end of text between articles: before each title but the first."""
    first = 1  # character to search from: a title at the very start has nothing before it
    for chunk in recut(read_chunks(file), AFTER_PARAGRAPH):
        yield chunk[:first] + TITLE.sub(EOT + r'\g<0>', chunk[first:])
        first = 0
