"""The names that a recipe may set, with their defaults.

A recipe is a file data/<name>.py: a docstring (what, size, licence, citation) and a few of the
names below. A recipe data/mybook.py may be as short as

    '''A book of mine, 500 kB, in the public domain.'''
    mirrors = ['https://example.org/books/']
    files = {'mybook.txt': None}
"""

base = '__init__'     # another recipe, which has the values of the names that this one leaves out
# where the text comes from
mirrors = []          # URLs that end in /, each of a server that has all the files
files = {}            # {path below a mirror: sha256, or None where none is published}
folder = ''           # in data/downloads, to keep several files together, and apart from files that
                      # another recipe calls the same; '' = there is one file
make = None           # function that makes the text where there are no mirrors, or none answers:
                      # make(data/downloads) -> (path, source in words), or None if it fails
title = ''            # name of the text: with it, a --source of another sha256 is reported
# how it is read
text = {}             # the files in a zip or folder: {split: [text]}, or, of pairs, {split:
                      # [prompts, answers]}. 'a|b' is the file a or b; x.gz is called x. The only
                      # key '' means that `splits` cuts the text. {} = the download is that text
splits = {'train': 0.9, 'val': 1}  # {split: share of the characters or rows at which it ends};
                      # train and val must be there
drawn = False         # rather draw the split of each document at random, with these shares
layout = 'stream'     # stream, pairs, documents
read = None           # generator: read(file) of pieces of a stream, or of ('', document) tuples;
                      # read(prompts, answers) of (prompt, answer) tuples. None = READERS[layout]
unfold = None         # function: what `read` yields -> several (prompt, answer)s, all in one split
tokenizer = 'char'    # char, gpt2, bpe, hf:NAME
vocab_size = 4096     # of bpe
