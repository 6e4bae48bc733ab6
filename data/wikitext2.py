"""WikiText-2: 600 good articles of Wikipedia, 13 MB, in three splits as published. CC BY-SA 3.0.

Merity et al., Pointer Sentinel Mixture Models, 2016 [1609.07843]. Rare words are <unk>.
"""

import re

from prepare import EOT, read_chunks, recut

mirrors = ['https://wikitext.smerity.com/',
           'https://s3.amazonaws.com/research.metamind.io/wikitext/']
files = {'wikitext-2-v1.zip': '92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c'}
text = {split: [f'wiki.{name}.tokens|wiki.{name}.raw|{name}.txt']  # raw: without <unk> and @-@
        for split, name in {'train': 'train', 'val': 'valid', 'test': 'test'}.items()}
tokenizer = 'gpt2'
# The title of an article is a line ' = Title = ' between two empty lines, which in WikiText hold a
# space; titles of sections have more `=`. The empty lines tell it from lines of tables that look
# the same: so found, WikiText-2 has its 600 + 60 + 60 articles.
TITLE = re.compile(r'(?m)^ \n = [^=\n](?:.*[^=\n])? = \n(?= \n)')
# Where the text may be cut: between a line that is no title and an empty line. So no cut parts a
# title from the empty line on either side, and TITLE sees all three.
AFTER_PARAGRAPH = re.compile(r'(?s).*[^=] \n(?= \n)')


def read(file):
    """Yields the text with an end of text between articles: before each title but the first."""
    start = 1  # of the search in a chunk: the title at the very start of the file is left out
    for chunk in recut(read_chunks(file), AFTER_PARAGRAPH):
        yield chunk[:start] + TITLE.sub(EOT + r'\g<0>', chunk[start:])
        start = 0
