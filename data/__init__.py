"""What a recipe says, and the value of each name that a recipe leaves out.

A recipe is a file data/<name>.py: a docstring (what, size, licence, citation) and a few of the
names below. A recipe data/mybook.py may be as short as

    '''A book of mine, 500 kB, in the public domain.'''
    mirrors = ['https://example.org/books/']
    files = {'mybook.txt': None}
"""

base = '__init__'     # another recipe; names that are left out are taken from there
# where the text comes from
mirrors = []          # addresses that end in /, each of which has the files
files = {}            # {path below a mirror: sha256, or None where none is published}
folder = ''           # of data/downloads, to keep several files together
make = None           # make(data/downloads) -> (path, source in words) of a text that is made here,
                      # or None: used where there is no mirror, or where none can be reached
title = ''            # of a text, to say that a --source is not the published one
# how it is read
text = {}             # {split: [name of its text]}, or of pairs {split: [prompts, answers]}: files
                      # of a zip or folder. The split '' stands for all and is cut as `splits`
                      # says. A name 'a|b' means a or b. {} = the only file there is
splits = {'train': 0.9, 'val': 1}  # the share of the characters or rows at which each ends; or
                      # splits(read) -> {split: function that starts its part}; train and val must
                      # be among them
layout = 'stream'     # stream, pairs, documents
read = None           # read(file) yields pieces of a stream or ('', document)s; of pairs,
                      # read(prompts, answers) yields (prompt, answer)s; None = as prepare.py does
tokenizer = 'char'    # char, gpt2, bpe
vocab_size = 4096     # of bpe
