"""Text -> data/<name>/{train,val[,test]}.bin and meta.json; and the classes that read these.

    python prepare.py shakespeare_char       # 1 MB, seconds: Tiny Shakespeare, an id per character
    python prepare.py shakespeare            # 1 MB, seconds: the same in GPT-2's tokens
    python prepare.py wikitext2              # 13 MB, seconds: three splits as published
    python prepare.py wikitext2_bpe          # the same in 4,096 tokens of its own
    python prepare.py wikitext103            # 540 MB, a minute
    python prepare.py text8                  # 100 MB, seconds: 27 characters
    python prepare.py reversal               # made here, seconds: facts in one direction
    python prepare.py path/to/any.txt --tokenizer=bpe --vocab_size=1024

Those are streams of text. The following are rows of one length, each [prompt SEP answer EOS PAD...]
or [document EOS PAD...], and a model of rows learns where an answer or document ends:

    python prepare.py multi30k               # 4 MB, seconds: captions, from English to French
    python prepare.py opus_books             # 34 MB, a minute: sentences of novels, the same
    python prepare.py NAME --prompts=FILE --answers=FILE      # line by line
    python prepare.py path/to/any.jsonl --fields=question,answer
    python prepare.py path/to/any.jsonl --fields=messages     # conversations, a row for each answer
    python prepare.py path/to/any.txt --documents

Either is made from a data set of Hugging Face's hub, or from a folder or file of Parquet and the
like; what is read of it is kept in data/downloads, as JSON lines:

    python prepare.py hf:roneneldan/TinyStories --text_field=text --max_docs=10_000 --tokenizer=bpe
    python prepare.py hf:FOLDER --fields=messages --val_share=0.05

Of a file of yours the last 10% are val; --val_share=0.05 draws 5% of its documents instead. A data
set has a recipe, data/<name>.py beside this file; data/__init__.py lists what a recipe may say.
What is made of it goes to data/<name>/ of the working directory. The times leave out the download,
which happens once (of hf: at each run) and is kept in data/downloads. Text is read in pieces, and
the bins are flat ids (uint16, or uint32 where a vocabulary needs it) that are read as memmaps, so a
stream may be larger than memory, both here and in training.

First half: prepare() and what it calls, from the download to the files. Second half, from
load_meta() on: Stream and Rows, which training and evaluation read.
"""

import base64
import csv
import gzip
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, lru_cache, partial
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import requests
import tiktoken
import torch
from tqdm import tqdm

from config import UserError, as_user_error, one_of, override, read_config, require

name = ''          # the folder in data/; '' = named as the data set, or as the file without its
                   # suffix
source = ''        # a local copy of the data set: the text, a zip, or a folder with its files
tokenizer = ''     # char, gpt2, bpe (learned from the train split), or hf:NAME, that of a model of
                   # the Hugging Face hub, or of a folder; '' = as the recipe says, or char for a
                   # file of yours
vocab_size = 0     # of bpe: 256 bytes, merges and special tokens; 0 = as the recipe says, or 4096
                   # for a file of yours
text_field = ''    # of a .csv or .jsonl: the column or key of a text; EOTs come between the texts
max_docs = 0       # of hf:NAME: only the first so many records; 0 = all
# rows
prompts = ''       # a file with a prompt in each line
answers = ''       # a file whose line i answers line i of prompts
fields = ''        # of a .csv or .jsonl: PROMPT,ANSWER, two names of columns or keys; or one, of
                   # conversations [{"role": "user", "content": ...}, {"role": "assistant", ...}]
documents = False  # a row for each text between EOTs; in a file without an EOT, for each line
max_prompt = 128   # tokens; a pair with a longer side is dropped: half an answer is a wrong one
max_answer = 128   # tokens; the same, but a longer document is cut
truncate = False   # keep these pairs: a prompt loses its beginning, an answer its end (and EOS
                   # follows where it was cut)
# which part is val
val_share = 0.0    # so large a random part of the documents (in a stream without EOTs paragraphs
                   # or, without blank lines, lines); 0 = the splits of the recipe or, of a file of
                   # yours, the last 10%
seed = 0           # of val_share

RECIPES = Path(__file__).parent / 'data'

EOT = '<|endoftext|>'  # in a file: ends a text. It is the text of the token EOS, id eos_id
SURROGATE = '\ud800'   # no UTF-8 text has this character: it stands for an EOT inside this program
SPECIALS = {'eos_id': EOT, 'sep_id': '<|sep|>', 'pad_id': '<|pad|>'}  # in the order of their ids
# by a recipe's layout; meta.json calls documents and pairs both 'rows'
SPECIALS_OF = {'stream': ['eos_id'], 'documents': ['eos_id', 'pad_id'], 'pairs': [*SPECIALS]}
# GPT-2's, in possessive form (++), which matches the same but hardly ever has to backtrack.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# A stream is tokenised in pieces, and has to be cut where no token spans the cut. Each of these
# patterns matches up to the last such place of a text.
#
# Byte pairs: between a non-blank and a blank (' ' or newline). No token of GPT2_PATTERN has a blank
# after a non-blank, so none spans the cut. Left of the cut, tokens are those of the whole text:
# only `\s++$` and `\s+(?!\S)` look ahead, after a run of blanks, and the non-blank before the cut
# ends every run. Right of it, too: nothing in the pattern looks back. An EOT has no blank. (\s has
# more characters in Python than in tiktoken, which is safe: fewer places remain.)
BEFORE_BLANK = re.compile(r'(?s).*\S(?=[ \n])')
# Characters: after one that is not in an EOT, or is '>', with which an EOT ends.
OUTSIDE_EOT = re.compile(r'(?s).*[^<|endoftx]')

READ_SIZE = 1 << 18      # bytes or characters that are read at a time
MAX_UNCUT = 32_000_000   # characters without a place to cut, beyond which recut() gives up
THREADS = os.cpu_count() or 1  # that tokenise a stream at the same time
DOWNLOADS = Path('data', 'downloads')
# {kind of tokenizer: the other keys of meta['tokenizer']}
TOKENIZER_KEYS = {'char': {'chars'}, 'gpt2': set(), 'bpe': {'pattern', 'ranks'}, 'hf': {'json'}}
META_TYPES = {  # vocab_size: V', without the mask; that of ModelConfig is V = V' + 1
    'name': str, 'layout': str, 'row_length': int | None, 'max_answer': int | None,
    'vocab_size': int, 'mask_id': int, 'eos_id': int | None, 'sep_id': int | None,
    'pad_id': int | None, 'tokenizer': dict, 'source': str, 'sha256': str, 'counts': dict}


def recipe_names():
    """The names of the data sets that there is a recipe for."""
    return sorted(path.stem for path in RECIPES.glob('[!_]*.py'))


def load_recipe(name):
    """{name: value} of data/<name>.py and, where it leaves a name out, of its base.

    The base of all recipes is data/__init__.py."""
    own = read_config(str(RECIPES / f'{name}.py'))
    return own if name == '__init__' else load_recipe(own.get('base', '__init__')) | own


def choose_recipe(what, prompts, answers, fields, documents, text_field, max_docs):
    """The recipe called `what`; if there is none, one for the user's own files or for hf:NAME."""
    known = what in recipe_names()
    names = fields.split(',') if fields else [text_field]  # of text_field even with a comma in it
    ways = known, prompts, fields, documents or text_field
    if sum(map(bool, ways)) > 1 or bool(prompts) != bool(answers):
        raise UserError('rows are made from --prompts=FILE --answers=FILE, or from a file with '
                        '--fields=PROMPT,ANSWER, or from a text or --text_field with --documents; '
                        'a recipe says itself how its data set is read')
    recipe = load_recipe(what if known else '__init__')
    if what.startswith('hf:'):
        require('text_field', text_field, text_field or fields, 'a column, unless fields is set')
        recipe['make'] = partial(save_hub_data, what, names, max_docs)
    if text_field:
        recipe['read'] = partial(read_texts, name=text_field, rows=documents)
    if fields:
        require('fields', fields, len(names) < 3, "two names, as in 'question,answer', or one")
        recipe |= {'layout': 'pairs', 'read': partial(read_fields, names=names),
                   'unfold': unfold_turns if len(names) == 1 else None}
    elif prompts or documents:
        recipe['layout'] = 'pairs' if prompts else 'documents'
    return recipe


def sha256_of(*files):
    """The sha256, in hex, of files one after the other: Paths, or what members() finds."""
    digest = hashlib.sha256()
    for file in files:
        with file.open('rb') as f:
            while piece := f.read(READ_SIZE):
                digest.update(piece)
    return digest.hexdigest()


def append_rest(url, part, timeout):
    """Downloads those bytes of `url` that the file `part` lacks. Raises requests' exceptions."""
    have = part.stat().st_size if part.exists() else 0
    # identity: a range counts bytes as they are sent, so they must not be compressed
    headers = {'Range': f'bytes={have}-', 'Accept-Encoding': 'identity'}
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
        if answer.status_code == 416 and have:
            return  # the file ends here: it is complete, or its checksum is wrong
        answer.raise_for_status()
        # 206: the server sends the range; otherwise it ignores Range and sends the whole file
        with open(part, 'ab' if answer.status_code == 206 else 'wb') as f:
            for piece in tqdm(answer.iter_content(1 << 14), part.stem, unit='B',
                              unit_scale=1 << 14, delay=1):
                f.write(piece)


def download(urls, path, sha256, timeout=(3, 15), tries=4, pause=0.5):
    """Downloads a file to `path` from the first of urls that has it with this sha256.

    sha256=None takes any file. The urls are asked in turn, and after a pause all again. timeout:
    seconds to connect, and to wait for a byte. A broken download stays in path.part and is resumed,
    now or in a later run; path itself appears once the checksum is right. Raises UserError."""
    if path.is_file() and sha256 in (None, sha256_of(path)):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f'{path}.part')
    problems = {}  # {url: the last problem with it}
    for attempt, url in itertools.product(range(tries), urls):
        if problems.get(url) == 'ConnectTimeout':
            continue  # nobody is there, and asking again takes long
        time.sleep(pause * attempt)
        try:
            append_rest(url, part, timeout)
            if sha256 in (None, sha256_of(part)):
                return os.replace(part, path)
            part.unlink()
            problems[url] = 'wrong checksum'
        except requests.HTTPError as e:
            problems[url] = f'HTTP status {e.response.status_code}'
        except requests.RequestException as e:
            problems[url] = type(e).__name__
    listed = '; '.join(f'{url}: {problem}' for url, problem in problems.items())
    raise UserError(f'cannot download {path.name} ({listed}): get it in another way and add '
                    '--source=FILE')


def fetch(recipe):
    """(path, source in words) of a recipe's text, which is downloaded, or else made.

    The path is that of the one file, or of the folder with all of them."""
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    mirrors, files = recipe['mirrors'], recipe['files']
    try:
        require('mirrors', mirrors, mirrors and files, 'some URLs, with files: it makes no text')
        for file, sha256 in files.items():
            download([mirror + file for mirror in mirrors], DOWNLOADS / recipe['folder'] / file,
                     sha256)
    except UserError:
        if recipe['make'] and (made := recipe['make'](DOWNLOADS)):
            return made
        raise
    place = recipe['folder'] or file
    return DOWNLOADS / place, mirrors[0] + place


def save_hub_data(what, columns, max_docs, folder):
    """Writes hf:NAME[:SUBSET[:SPLIT]] as JSON lines: (path, source in words).

    NAME is a data set of Hugging Face's hub, or the path of a folder or file in one of its formats.
    The library `datasets` streams the columns of its first max_docs records (0 = all) to a file in
    folder, so that neither the download nor the file must fit the memory. A stopped run begins
    anew, for `datasets` would read again what it is to skip. Raises UserError."""
    # C:\ is one name
    name, subset, split = (re.split(r':(?![\\/])', what.removeprefix('hf:')) + ['', ''])[:3]
    path = Path(name)
    place, file = (str(path.resolve().parent), path.name) if path.is_file() else (name, None)
    target = folder / f'{path.stem}.hf.jsonl'  # never the file that is read: its name is longer
    part = Path(f'{target}.part')
    # errors are of many kinds, for want of a package, of a network, of a known format
    with as_user_error(Exception, f'{what} cannot be read', ": hf: needs pip install -e '.[hf]', "
                       'and a network or the path of a folder or file of Parquet'):
        from datasets import load_dataset_builder
        builder = load_dataset_builder(place, subset or None, data_files=file)
        records = builder.as_streaming_dataset(split or 'train').select_columns(columns)
        with open(part, 'w', encoding='utf-8') as f:
            for record in tqdm(itertools.islice(records, max_docs or None), path.name, delay=1):
                f.write(json.dumps(record) + '\n')
        os.replace(part, target)
    revision = builder.base_path.partition('@')[2] or 'of a local file'
    return target, f'{what}, revision {revision}, licence {licence_of(builder.base_path)}'


def licence_of(place):
    """The licence that README.md of a folder, or of hf://REPOSITORY, states."""
    with suppress(Exception):  # there is none, or it states none, or there is no network
        with optional('fsspec', extra='hf').open(f'{place}/README.md', 'rt') as f:
            return re.search(r'(?m)^license:\s*(?:- *)?(\S.*)', f.read())[1]
    return 'not stated'


def members(path):
    """[what is read of a path], objects with a name and open() as a Path has them.

    They are the files in a folder or zip, or the file itself; x.gz, outside a zip, is called x, and
    unpacked as it is read."""
    if zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        return [zipfile.Path(archive, file) for file in archive.namelist() if file[-1] != '/']
    files = path.iterdir() if path.is_dir() else [path]
    return [SimpleNamespace(name=file.stem, open=partial(gzip.open, file))
            if file.suffix == '.gz' else file for file in files]


def find_texts(what, recipe, sources):
    """({split: [file of its text]}, {'source': in words, 'sha256': of all these files}).

    Of pairs, [file of prompts, file of answers]. A split '' is all the text, still to be cut.
    sources: the user's own files; [] = those of the recipe."""
    if sources:
        paths = [Path(file) for file in sources]
        words = ', '.join(path.name for path in paths)
    else:
        path, words = fetch(recipe)
        paths = [path]
    if missing := [str(path) for path in paths if not path.exists()]:
        raise UserError(f'there is no file {missing[0]!r} (data sets: {", ".join(recipe_names())})')

    def file_called(name):  # 'a|b' is the file a or b
        for option in name.split('|'):
            if option in by_name:
                return by_name[option]
        raise UserError(f'{paths[0]} is not {what}: it has no {name.replace("|", " or ")}')

    damaged = (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, RuntimeError)
    advice = f': delete {paths[0]} and run this again' * (not sources)
    with as_user_error(damaged, f'{words} cannot be read', advice):  # RuntimeError: encrypted
        files = [file for path in paths for file in members(path)]
        by_name = {file.name: file for file in files}
        texts = {split: [*map(file_called, names)] for split, names in recipe['text'].items()}
        if not texts and (paths[0].is_dir() or len(files) != len(paths)):
            raise UserError(f'{paths[0]} is not a text')
        texts = texts or {'': files}
        sha256 = sha256_of(*itertools.chain(*texts.values()))
    if sources and recipe['title'] and sha256 not in recipe['files'].values():
        words += f' (not the published {recipe["title"]})'
    return texts, {'source': words, 'sha256': sha256}


def read_chunks(file):
    """Yields the text of a UTF-8 file in pieces of READ_SIZE, line ends untouched."""
    with file.open('rt', encoding='utf-8-sig', newline='') as f:  # without a byte order mark
        try:
            while chunk := f.read(READ_SIZE):
                yield chunk
        except UnicodeDecodeError as e:
            offset = f.buffer.tell() - len(e.object) + e.start
            raise UserError(f'{file.name} is not UTF-8 at byte {offset}: convert it first') from e


def recut(chunks, where):
    """Yields the same text in pieces that end where the pattern `where` matches, and the rest."""
    rest = ''  # not yet yielded
    for chunk in chunks:
        rest += chunk
        if len(rest) >= READ_SIZE and (piece := where.match(rest)):
            yield piece[0]
            rest = rest[piece.end():]
        if len(rest) > MAX_UNCUT:
            raise UserError(f'{MAX_UNCUT:,} characters without a space: use --tokenizer=char')
    yield rest


def split_at(separator, chunks):
    """Yields the same text in parts that each end in `separator`; the last may lack it."""
    rest = ''  # the beginning of the next part
    for chunk in chunks:
        *parts, rest = (rest + chunk).split(separator)
        yield from (part + separator for part in parts)
    if rest:
        yield rest


def read_pairs(prompts, answers):
    """Yields (line i of the one file, line i of the other). Raises UserError if one is longer."""
    pairs = itertools.zip_longest(*(split_at('\n', read_chunks(f)) for f in (prompts, answers)))
    for i, pair in enumerate(pairs, start=1):
        if None in pair:
            raise UserError(f'{(prompts, answers)[pair.index(None)].name} ends before line {i} of '
                            'the other file: they must correspond line by line')
        yield pair


def read_fields(file, names):
    """Yields [text of each named column of a .csv or key of a .jsonl]; what is no text, as JSON."""
    i, lines = 0, (line.removeprefix('\ufeff') for line in split_at('\n', read_chunks(file)))
    csv.field_size_limit(1 << 30)  # characters of a text
    records = csv.DictReader(lines) if file.name.lower().endswith('.csv') else map(
        json.loads, filter(str.strip, lines))
    try:
        for i, record in enumerate(records, start=1):
            if missing := [name for name in names if record.get(name) is None]:
                raise UserError(f'record {i} of {file.name} has no {missing[0]!r}, only '
                                f'{", ".join(str(k) for k, v in record.items() if v is not None)}')
            texts = (v if isinstance(v := record[name], str) else json.dumps(v, ensure_ascii=False)
                     for name in names)
            # JSON can hold half a surrogate pair, which is no text
            yield [text.encode('utf-8', 'replace').decode() for text in texts]
    except (ValueError, AttributeError, RecursionError, csv.Error) as e:
        raise UserError(f'{file.name} is no .csv or .jsonl of records, after {i}: {e}') from e


def read_texts(file, name, rows):
    """Yields the texts of one column or key, as rows of documents or as a stream with EOTs."""
    for text, in read_fields(file, [name]):
        yield ('', text) if rows else text + EOT


def chat_prompt(messages):
    """The text of a conversation so far, [{'role': ..., 'content': ...}, ...]: a line for each."""
    return '\n'.join(f'{message["role"]}: {message["content"].strip()}' for message in messages)


def unfold_turns(document):
    """[(prompt, answer)] of a document [conversation in JSON]: one for each answer in it."""
    with as_user_error((ValueError, TypeError, KeyError, AttributeError, RecursionError),
                       f'{document[0][:60]} is no list of {{"role": "user" or "assistant", '
                       '"content": TEXT}'):
        messages = json.loads(document[0])
        return [(chat_prompt(messages[:i]), message['content'].strip())
                for i, message in enumerate(messages) if message['role'] == 'assistant']


def cut_documents(read, *otherwise):
    """Yields the documents of a text, each with the EOT that ends it.

    Where there is no EOT they end with the first of `otherwise` that the text has."""
    for separator in (EOT, *otherwise):
        if any(separator in chunk for chunk in recut(read(), OUTSIDE_EOT)):
            break
    yield from split_at(separator, read())


def read_documents(file):
    """Yields ('', document) of each document of a text."""
    for document in cut_documents(partial(read_chunks, file), '\n'):
        yield '', document.removesuffix(EOT)


READERS = {'stream': read_chunks, 'pairs': read_pairs, 'documents': read_documents}


def short_eots(chunks):
    """Yields the text with SURROGATEs as EOTs, single characters that no cut goes through."""
    return (piece.replace(EOT, SURROGATE) for piece in recut(chunks, OUTSIDE_EOT))


def cut_text(chunks, start, stop):
    """Yields characters start to stop of a text, as itertools.islice does with rows."""
    done = 0  # characters before this piece
    for piece in short_eots(chunks):
        yield piece[max(0, start - done):max(0, stop - done)].replace(SURROGATE, EOT)
        done += len(piece)


def cut_splits(read, ends, stream):
    """{split: function that yields its part} of what read() yields: pieces of a stream, or rows.

    ends {split: the share of all characters or rows at which it ends}."""
    items = tqdm(short_eots(read()) if stream else read(), 'counting', delay=1)
    n = sum(len(item) if stream else 1 for item in items)
    stops = [int(n * end) for end in ends.values()]
    cut = cut_text if stream else itertools.islice
    return {split: lambda start=start, stop=stop: cut(read(), start, stop)
            for split, start, stop in zip(ends, [0, *stops], stops)}


def split_of(document, ends, seed):
    """The split of a document, a text or a list of texts: the first whose end is above its hash.

    The hash of seed and text is a number in [0, 1); blanks, line ends and byte order marks do not
    count. So a document, with all its copies, is in the same split in every file, layout and order.
    """
    text = ''.join(''.join(document).replace('\ufeff', '').split()).removesuffix(EOT)
    u = int(hashlib.sha256(f'{seed} {text}'.encode()).hexdigest()[:12], 16) / 2 ** 48
    return next(split for split, end in ends.items() if u < end)


def open_splits(recipe, texts, kind, val_share, seed):
    """{split: function that yields its pieces of a stream, or its (prompt, answer)s}.

    The pieces are cut for this kind of tokenizer: each can be encoded on its own (of hf:, a token
    beside a cut may differ). Functions, because a split is read more than once: counted, learned
    from, encoded."""
    read, stream = recipe['read'] or READERS[recipe['layout']], recipe['layout'] == 'stream'
    splits = {split: partial(read, *files) for split, files in texts.items()}
    if val_share or recipe['drawn']:
        require('val_share', val_share, '' in splits, '0 for data that has its own val')
        # a line of a text would be drawn without those that belong to it: paragraphs, if there are
        ends_with = '\n\n', '\r\n\r\n', '\n'
        whole = partial(cut_documents, splits[''], *ends_with) if stream else splits['']
        ends = {'train': 1 - val_share, 'val': 1} if val_share else recipe['splits']
        splits = {split: lambda split=split: (item for item in whole() if split_of(
            item, ends, seed) == split) for split in ends}
    elif '' in splits:
        splits = cut_splits(splits[''], recipe['splits'], stream)

    def items_of(split):
        items = splits[split]()
        if recipe['unfold']:
            items = itertools.chain.from_iterable(map(recipe['unfold'], items))
        if not stream:
            return ([side.removeprefix('\ufeff').strip() for side in row] for row in items)
        return recut(items, OUTSIDE_EOT if kind == 'char' else BEFORE_BLANK)

    return {split: partial(items_of, split) for split in splits}


def optional(module, extra):
    """A module that not everybody installs, only imported where it is needed. Raises UserError."""
    with as_user_error(ImportError, f"{module} is needed: pip install -e '.[{extra}]'"):
        return importlib.import_module(module)


class Tokenizer:
    """encode(text) -> list of ids and decode(ids) -> text.

    An EOT in the text is encoded as eos_id, or, where that is None, as any other text; nothing is
    encoded as another special token. encode_text, decode_ids: the same between EOTs. library: the
    object of tiktoken or tokenizers that does the work."""

    def __init__(self, encode_text, decode_ids, eos_id, library=None):
        self.encode_text, self.decode_ids = encode_text, decode_ids
        self.eos_id, self.library = eos_id, library

    def encode(self, text):
        ids = []
        for part in [text] if self.eos_id is None else text.split(EOT):
            ids += [self.eos_id, *self.encode_text(part)]
        return ids[1:]  # without the first EOS, since EOTs are between the parts

    def decode(self, ids):
        parts = [[]]  # between EOS, whose text may be another than EOT in a tokenizer of the hub
        for i in map(int, ids):
            parts.append([]) if i == self.eos_id else parts[-1].append(i)
        return EOT.join(map(self.decode_ids, parts))


def encode_chars(id_of, text):
    """The ids of the characters of a text, by the dictionary id_of. Raises UserError."""
    if lacking := sorted(map(repr, set(text) - id_of.keys())):
        raise UserError(f'the tokenizer does not know {" ".join(lacking[:9])}')
    return [id_of[char] for char in text]


def load_tokenizer(meta):
    """The Tokenizer that meta describes.

    An EOT in the text is encoded as its id only in a stream, whose one special token it is.
    Of hf: a mask that is an ordinary token, as DiffuGPT's, may occur in the text, and gather() then
    refuses the data: prepare them with --tokenizer=gpt2, which has a mask of its own.
    """
    spec = meta['tokenizer']
    specials = {text: meta[key] for key, text in SPECIALS.items() if meta.get(key) is not None}
    eos_id = specials[EOT] if specials.keys() == {EOT} else None
    if spec['kind'] == 'char':
        pieces = [*spec['chars'], *specials]  # of each id
        return Tokenizer(partial(encode_chars, {char: i for i, char in enumerate(spec['chars'])}),
                         lambda ids: ''.join(pieces[i] for i in ids), eos_id)
    if spec['kind'] == 'hf':
        hub = optional('tokenizers', extra='hf').Tokenizer.from_str(spec['json'])
        hub.no_truncation()  # the file may ask for both, at 512 tokens
        hub.no_padding()
        hub.encode_special_tokens = True  # as ordinary text: '[MASK]' is no mask
        return Tokenizer(lambda text: hub.encode(text, add_special_tokens=False).ids,
                         partial(hub.decode, skip_special_tokens=False), eos_id, hub)
    if spec['kind'] == 'bpe':
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(spec['ranks'])}
    else:
        with as_user_error((OSError, ValueError), "GPT-2's files vocab.bpe and encoder.json cannot "
                           "be fetched: set TIKTOKEN_CACHE_DIR to a copy of tiktoken's cache, or "
                           'use --tokenizer=bpe'):
            ranks = tiktoken.get_encoding('gpt2')._mergeable_ranks  # downloads them once
    encoding = tiktoken.Encoding(
        spec['kind'], pat_str=spec.get('pattern', GPT2_PATTERN), mergeable_ranks=ranks,
        special_tokens=specials)
    return Tokenizer(encoding.encode_ordinary, encoding.decode, eos_id, encoding)


def texts_of(layout, *reads):
    """Yields the texts of splits: sides of rows, or pieces of a stream with EOTs as SURROGATEs."""
    for read in reads:
        for item in read():
            yield from [item.replace(EOT, SURROGATE)] if layout == 'stream' else item


def from_hub(kind, name, **how):
    """transformers.<kind>.from_pretrained(name, **how), name on the hub or a folder."""
    transformers = optional('transformers', extra='hf')
    transformers.logging.set_verbosity_error()  # what is wrong is said below, in one line
    transformers.logging.disable_progress_bar()
    own_code = '; its own code needs --trust_remote_code' * ('trust_remote_code' in how)
    # errors are of many kinds: no network, no such name, a damaged or missing file
    with as_user_error(Exception, f'hf:{name} cannot be loaded',
                       f': without a network write hf:FOLDER{own_code}'):
        return getattr(transformers, kind).from_pretrained(name, **how)


def number_specials(n, specials, own, tokenizer):
    """What meta.json says of ids: vocab_size, those of the special tokens and mask, the tokenizer.

    A special token that is not in `own`, {key: id}, gets a new id: they follow the n ordinary
    tokens in the order of `specials`, and the mask is the last."""
    ids = dict.fromkeys([*own, *SPECIALS])
    for key in [*specials, 'mask_id']:
        lacks = own.get(key) is None or key == 'sep_id' and own[key] == ids['eos_id']
        ids[key], n = (n, n + 1) if lacks else (own[key], n)
    return {'vocab_size': n - 1, **ids, 'dtype': 'uint16' if n <= 1 << 16 else 'uint32',
            'tokenizer': tokenizer}


def hub_vocabulary(name, layout):
    """As make_vocabulary, for a tokenizer of the hub, which keeps its ids, that of its mask too.

    EOS is its own or, as in BERT, its sep token; SEP is its cls token, unless that is EOS. PAD may
    be EOS, as in LLaDA."""
    hub = from_hub('AutoTokenizer', name)
    has_one = hub.is_fast and len(hub) > len(set(hub.all_special_ids))  # not one made of nothing
    require('tokenizer', f'hf:{name}', has_one, 'one that has a tokenizer.json')
    own = {'eos_id': hub.sep_token_id if hub.eos_token_id is None else hub.eos_token_id,
           'sep_id': hub.cls_token_id, 'pad_id': hub.pad_token_id, 'mask_id': hub.mask_token_id}
    if own['mask_id'] is None:  # LLaDA's is in its config alone
        own['mask_id'] = getattr(from_hub('PretrainedConfig', name), 'mask_token_id', None)
    n = max(*hub.get_vocab().values(), own['mask_id'] or 0) + 1
    return number_specials(n, SPECIALS_OF[layout], own,
                           {'kind': 'hf', 'json': hub.backend_tokenizer.to_str()})


def make_vocabulary(kind, layout, splits, vocab_size):
    """What number_specials() says of a kind of tokenizer. Raises UserError.

    Characters are those of all splits; byte pairs are learned from train."""
    if kind.startswith('hf:'):
        return hub_vocabulary(kind[3:], layout)
    specials, spec = SPECIALS_OF[layout], {'kind': kind}
    if kind == 'gpt2':
        n = 50_256
    elif kind == 'char':
        chars = set(itertools.chain.from_iterable(texts_of(layout, *splits.values())))
        if layout == 'stream' and SURROGATE not in chars:
            specials = []  # no EOT in the text, no id for it
        spec['chars'] = ''.join(sorted(chars - {SURROGATE}))
        n = len(spec['chars'])
    else:
        n = vocab_size - len(specials)
        require('vocab_size', vocab_size, n >= 256, f'{256 + len(specials)} or more')
        texts = tqdm(texts_of(layout, splits['train']), 'learning byte pairs', delay=1)
        parts = (part for text in texts for part in text.split(SURROGATE))  # without EOTs
        trainer = optional('rustbpe', extra='bpe').Tokenizer()
        trainer.train_from_iterator(parts, n, buffer_size=16, pattern=GPT2_PATTERN)
        pairs = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])  # (bytes, id)
        spec |= {'pattern': GPT2_PATTERN,
                 'ranks': [base64.b64encode(bytes(token)).decode() for token, _ in pairs]}
        n = len(pairs)  # fewer, where the text has no more pairs to merge
    return number_specials(n, specials, {'mask_id': None}, spec)


def encode_stream(pieces, encoder, count):
    """Yields the ids of each piece of a stream, and writes into count how long the stream is.

    An EOT is no part of the text, so its characters are not counted. Several threads share the
    work: tiktoken is written in Rust and holds no lock of Python's."""
    count.update(dict.fromkeys(('tokens', 'characters', 'bytes'), 0))  # tokens: by write_dataset
    pieces = iter(pieces)
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := list(itertools.islice(pieces, 4 * THREADS)):  # all that is in memory
            text = ''.join(batch).replace(EOT, '')
            count['characters'] += len(text)
            count['bytes'] += len(text.encode('utf-8'))
            yield from pool.map(encoder.encode, batch)


def encode_rows(pairs, encoder, count, meta, max_prompt, max_answer, truncate):
    """Yields the rows of a split, lists of row_length ids. Afterwards count says what they hold.

    A pair with an empty or too long side is dropped, and so is an empty document; a long document
    is cut, and with truncate so are long pairs. The entries of count:

        rows, empty, long  how many were kept, were empty, were too long
        lengths            {side: mean, median, 90% and 99% quantile and maximum of its tokens}, of
                           all that were not empty, before any was dropped or cut
        scored             tokens of all answers or documents, EOS included
        longest            tokens of the longest of them, without EOS
        characters, bytes  of all of them
        answer_line        of pairs: (a, b) of the least-squares fit
                           tokens of the answer with EOS = a * tokens of the prompt + b
    """
    is_pair, lengths, kept = meta['sep_id'] is not None, [], []
    count.update(dict.fromkeys(
        ('rows', 'scored', 'longest', 'characters', 'bytes', 'empty', 'long'), 0))
    for prompt, text in pairs:
        prompt, answer = encoder.encode(prompt), encoder.encode(text)
        if not answer or (is_pair and not prompt):
            count['empty'] += 1
            continue
        lengths.append((len(prompt), len(answer)))
        is_long = len(prompt) > max_prompt or len(answer) > max_answer
        count['long'] += is_long
        if is_long and is_pair and not truncate:
            continue
        if {meta['eos_id'], meta['sep_id']} & {*prompt, *answer}:  # some of the hub's encode it
            raise UserError('a text holds what ends a prompt or text here: '
                            + encoder.decode(prompt + answer)[:99])
        if len(answer) > max_answer:
            text = encoder.decode(answer[:max_answer])
        prompt, answer = prompt[-max_prompt:], answer[:max_answer]
        count['characters'] += len(text)
        count['bytes'] += len(text.encode('utf-8'))
        kept.append((len(prompt), len(answer) + 1))
        row = [*prompt, *[meta['sep_id']] * is_pair, *answer, meta['eos_id']]
        yield row + [meta['pad_id']] * (meta['row_length'] - len(row))
    n_prompt, n_scored = np.array(kept, int).reshape(-1, 2).T  # (rows,) each
    count.update(rows=len(kept), scored=n_scored.sum().item(),
                 longest=n_scored.max(initial=1).item() - 1)
    sides = zip(('prompt', 'answer' if is_pair else 'document'), np.transpose(lengths))  # (N,) each
    count['lengths'] = {side: [n.mean().item(), *np.quantile(n, (0.5, 0.9, 0.99, 1)).tolist()]
                        for side, n in sides if n.any()}
    if is_pair and kept:
        powers = np.vander(n_prompt, 2)  # (rows, 2): n_prompt, 1
        count['answer_line'] = np.linalg.lstsq(powers, n_scored, rcond=None)[0].tolist()


def write_dataset(target, meta, encoded):
    """Writes the folder target, data/<name>: encoded {split: iterable of lists of ids}, and meta.

    It is made as another folder and then renamed, so that an older data set of this name stays
    until the new one is complete. Adds to meta what is known at the end. Raises UserError."""
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.preparing-', dir='data') as folder:
        work = Path(folder, 'new')
        work.mkdir()
        dtype = np.dtype(meta['dtype'])
        for split, lists in encoded.items():
            with open(work / f'{split}.bin', 'wb') as f:
                for ids in tqdm(lists, f'{target.name} {split}', delay=1):
                    f.write(np.array(ids, dtype).tobytes())
                count = meta['counts'][split]
                count['tokens'] = f.tell() // dtype.itemsize
            if count['tokens'] < 2:
                why = f' ({count["empty"]} rows are empty, {count["long"]} too long)' \
                    if 'empty' in count else ''
                raise UserError(f'{target.name} is too short: its {split} split has '
                                f'{count["tokens"]} tokens{why}')
        if meta['layout'] == 'rows':
            meta['max_answer'] = max(count['longest'] for count in meta['counts'].values())
        (work / 'meta.json').write_text(json.dumps(meta, indent=1), encoding='utf-8')
        if target.exists():
            os.replace(target, Path(folder, 'old'))
        try:
            os.replace(work, target)
        except OSError:
            with suppress(OSError):  # there may be no old one
                os.replace(Path(folder, 'old'), target)
            raise


def prepare(what, name='', source='', tokenizer='', vocab_size=0, prompts='', answers='',
            fields='', documents=False, max_prompt=128, max_answer=128, truncate=False,
            val_share=0.0, seed=0, text_field='', max_docs=0):
    """Writes data/<name>/{train,val[,test]}.bin and meta.json, and returns what meta.json says.

    what: the name of a recipe, or a path, of which the first 90% of characters or rows are train
    and the rest val, unless val_share draws it; with prompts and answers, a name. The other
    arguments are the settings at the top of this file. Raises UserError."""
    recipe = choose_recipe(what, prompts, answers, fields, documents, text_field, max_docs)
    layout, kind = recipe['layout'], tokenizer or recipe['tokenizer']
    one_of('tokenizer', 'hf:NAME' if kind.startswith('hf:') else kind,
           ('char', 'gpt2', 'bpe', 'hf:NAME'))
    require('vocab_size', vocab_size, kind == 'bpe' or not vocab_size, '0 without --tokenizer=bpe')
    require('max_docs', max_docs, what.startswith('hf:') and not source or not max_docs,
            '0 without hf:NAME, and with source')
    require('source', source, not (source and prompts), "'' with prompts and answers")
    known = what in recipe_names() or what.startswith('hf:')
    own = [prompts, answers] if prompts else [source] if source else [] if known else [what]
    path = Path(what.removeprefix('hf:'))
    own_name = path.stem if path.is_file() and not prompts else path.name
    target = Path('data', name or own_name.replace(':', '-'))
    foreign = target.exists() and not (target / 'meta.json').exists()  # not written by prepare()
    # nor may the folder hold what is read: it would be thrown away with the older data set
    foreign |= any(Path(file).resolve().is_relative_to(target.resolve()) for file in (path, *own))
    if foreign or target.parent != Path('data') or target in (DOWNLOADS, Path('data', '..')):
        raise UserError(f'{target} cannot be the folder of a data set: choose another --name')
    texts, origin = find_texts(what, recipe, own)
    splits = open_splits(recipe, texts, kind, val_share, seed)
    vocabulary = make_vocabulary(kind, layout, splits, vocab_size or recipe['vocab_size'])
    row_length = {'stream': None, 'documents': max_answer + 1,  # with EOS
                  'pairs': max_prompt + 1 + max_answer + 1}[layout]
    meta = {'name': target.name, 'layout': 'rows' if row_length else 'stream',
            'row_length': row_length, **vocabulary, **origin,
            'is_chat': recipe['unfold'] is unfold_turns,  # prompts are written by chat_prompt()
            'counts': {split: {} for split in splits}}
    encode = encode_stream if layout == 'stream' else partial(
        encode_rows, meta=meta, max_prompt=max_prompt, max_answer=max_answer, truncate=truncate)
    encoder = load_tokenizer(meta)
    write_dataset(target, meta, {split: encode(read(), encoder, meta['counts'][split])
                                 for split, read in splits.items()})
    return meta


def load_meta(dataset):
    """What data/<dataset>/meta.json says. Raises UserError where it is missing or damaged.

    Its keys are those of META_TYPES; counts has for each split its tokens, characters, bytes and,
    of rows, what encode_rows() lists.
    """
    path = Path('data', dataset, 'meta.json')
    if not path.is_file():
        raise UserError(f'there is no {path}: run python prepare.py {dataset}, or with a file of '
                        'yours; dataset is the name of the folder that it makes')
    with as_user_error((ValueError, KeyError, TypeError, AttributeError), f'{path} is damaged',
                       f': prepare {dataset} again'):
        # data sets of earlier versions have no dtype
        meta = {'dtype': 'uint16'} | json.loads(path.read_text(encoding='utf-8'))
        fine = [isinstance(meta.get(key), kind) for key, kind in META_TYPES.items()]
        fine += [TOKENIZER_KEYS[meta['tokenizer']['kind']] == meta['tokenizer'].keys() - {'kind'}]
        fine += [meta['dtype'] in ('uint16', 'uint32')]
        fine += [isinstance(count[key], int) for count in meta['counts'].values()
                 for key in ('tokens', 'characters', 'bytes')]
        if not all(fine):
            raise ValueError('an entry of another kind')
    return meta


def data_set(meta):
    """What says which data a meta describes: all of it but the words for where they come from."""
    return meta | {'source': ''}


def load_split(dataset, split):
    """The ids of a split (N,), a read-only memmap. Raises UserError."""
    path, meta = Path('data', dataset, f'{split}.bin'), load_meta(dataset)
    one_of('split', split, meta['counts'])
    tokens, dtype = meta['counts'][split]['tokens'], np.dtype(meta['dtype'])
    size = path.stat().st_size if path.is_file() else 0
    if tokens == 0 or size != dtype.itemsize * tokens:
        raise UserError(f'{path} has {size} bytes for {tokens} tokens: prepare {dataset} again')
    return np.memmap(path, dtype, mode='r')


def gather(data, starts, length, meta):
    """Windows (B, length) int64 of data (N,), in one read: window b begins at starts[b].

    Raises UserError for an id that is the mask's, or larger than all of the vocabulary.
    """
    positions = np.asarray(starts)[:, None] + np.arange(length)  # (B, length)
    ids = data[positions].astype(np.int64)
    bad = ids[(ids > meta['vocab_size']) | (ids == meta['mask_id'])]
    if len(bad):
        raise UserError(f'the data hold the id {bad.max()}, which is the mask or above all '
                        f"{meta['vocab_size']:,} tokens: prepare them again")
    return ids


# prompt SEP answer EOS PAD PAD PAD   a row in the file: meta['row_length'] tokens
# ---------> the end of its prompt
# --------------------> its end
# Its width in a batch is its end or, with predict_pad, the end of its prompt + max_answer + 1.


def row_ends(rows, meta):
    """(ends of the prompts, ends) of rows (N, row_length), (N,) each: tokens up to SEP and to EOS.

    SEP and EOS are counted; a document has a prompt of 0 tokens. No text contains an EOS.
    """
    ends = (rows == meta['eos_id']).argmax(1) + 1
    if meta['sep_id'] is None:
        return np.zeros_like(ends), ends
    return (rows == meta['sep_id']).argmax(1) + 1, ends


def row_widths(rows, meta, predict_pad=False):
    """How many tokens of each of rows (N, row_length) a model sees, (N,): all but PAD.

    predict_pad: every answer is filled with PAD to meta['max_answer'] + 1 tokens (the longest of
    the data set, and EOS), so that the width does not tell where an answer ends."""
    prompt_ends, ends = row_ends(rows, meta)
    return prompt_ends + meta['max_answer'] + 1 if predict_pad else ends


def row_batches(widths, batch_size, rng=None):
    """[(B,) numbers of rows of one width]: every row once, B <= batch_size, in random order if rng.

    Rows of one width need no PAD, which would cost time. widths (N,)."""
    order = np.arange(len(widths)) if rng is None else rng.permutation(len(widths))  # (N,)
    order = order[widths[order].argsort(kind='stable')]
    groups = np.split(order, np.flatnonzero(np.diff(widths[order])) + 1)  # one for each width
    batches = [group[i:i + batch_size] for group in groups
               for i in range(0, len(group), batch_size)]
    return batches if rng is None else [batches[i] for i in rng.permutation(len(batches))]


def mixed_seed(*numbers):
    """One seed of 32 bits, a hash of several numbers [numpy's SeedSequence].

    torch's generators on the CPU use no more than 32 bits. They are not independent under the seeds
    0, 1, 2, ...: bounds estimated with these spread more widely than they should.
    """
    return int(np.random.SeedSequence([n % 2 ** 64 for n in numbers]).generate_state(1)[0])


def crop_batch(x0, given, least, fraction):
    """(x0, given) without their last columns: fraction=1 keeps all T, fraction=0 only `least`.

    x0 (B, T) int64; given (B, T) bool, True in a prompt.
    """
    width = least + round(fraction * (x0.size(1) - least))
    return x0[:, :width], given[:, :width]


def random_fraction(number, random_length):
    """The fraction for crop_batch: uniform in [0, 1) for a share random_length of batches, else 1.

    number: the seed of the batch."""
    rng = np.random.default_rng([number, 1])  # not of `number` alone: that one draws the windows
    return rng.random() if rng.random() < random_length else 1.0


def evenly(n, limit):
    """Indices of n things: `limit` of them, evenly spread; all n if limit is 0, or n or more."""
    return np.linspace(0, n - 1, limit).astype(int) if 0 < limit < n else np.arange(n)


def describe_data(data):
    """What train.py prints about a Stream and, before a line on the rows, about Rows."""
    return (f'{data.dataset} ({data.meta["source"]}): {data.tokens_per_epoch:,} training tokens of '
            f"{data.meta['vocab_size']:,} kinds, log V' = {math.log(data.meta['vocab_size']):.4f}")


class Stream:
    """A data set of one long text per split, read in windows of block_size tokens."""

    def __init__(self, dataset, meta, block_size, batch_size, seed, random_length, train_tokens):
        self.dataset, self.meta, self.seed = dataset, meta, seed
        self.block_size, self.batch_size, self.random_length = block_size, batch_size, random_length
        self.tokens = cache(partial(load_split, dataset))  # tokens(split) -> memmap of ids (N,)
        self.train = self.tokens('train')[:train_tokens or None]
        self.tokens_per_epoch, self.scored_share = len(self.train), 1.0
        self.mean_width = block_size - random_length * (block_size - 1) / 2
        self.tokens_per_batch = batch_size * self.mean_width

    def check(self):
        """Raises UserError where val is missing or the training text is shorter than a window."""
        self.tokens('val')
        require('block_size', self.block_size, self.block_size <= len(self.train),
                f'{len(self.train)} or less: there are no more training tokens')

    def scored(self, split):
        """How many tokens of a split an evaluation scores: all."""
        return self.meta['counts'][split]['tokens']

    describe = describe_data

    def batch(self, update, micro_step=0, micro_steps=1):
        """Windows x0 (B, T) int64 from random places of the training text, and given (B, T) bool.

        An update has micro_steps batches, those of all processes, and this is number micro_step. A
        batch depends on these numbers and the seed alone. So a resumed run sees what the stopped
        one would have seen, and an update reads the same batches, whether one process reads them
        all or many share them. given: False everywhere, since there are no prompts.
        """
        number = mixed_seed(self.seed, update, micro_step)
        places = len(self.train) - self.block_size + 1
        starts = np.random.default_rng(number).integers(0, places, self.batch_size)  # (B,)
        x0, given = self.read(self.train, starts, self.block_size)  # (B, T)
        return crop_batch(x0, given, 1, random_fraction(number, self.random_length))

    def batches(self, split, batch_size, limit=0):
        """[function that reads one batch (x0, given)], for evaluation: each token of a split once.

        The windows lie side by side, and the last may be shorter than T. limit: read only so many
        whole windows, evenly spread; 0 = all.
        """
        data, starts, T = self.whole_windows(split, self.block_size, limit)
        parts = [(starts[i:i + batch_size], T) for i in range(0, len(starts), batch_size)]
        if len(starts) == len(data) // T and len(data) % T:
            parts.append((np.array([len(data) // T * T]), len(data) % T))
        return [partial(self.read, data, *part) for part in parts]

    def windows(self, split, T, n):
        """n windows (n, T) int64 of a split, evenly spread, or all that there are; 0 = all."""
        return self.read(*self.whole_windows(split, T, n))[0]

    def whole_windows(self, split, T, limit):
        """(the ids (N,) of a split; where windows of T tokens begin; T, or N if that is less).

        They lie side by side. limit: only so many of them, evenly spread; 0 = all.
        """
        data = self.train if split == 'train' else self.tokens(split)
        T = min(T, len(data))
        return data, evenly(len(data) // T, limit) * T, T

    def read(self, data, starts, T):
        """Windows x0 (B, T) int64 that begin at starts (B,), and given (B, T) bool, all False."""
        x0 = torch.from_numpy(gather(data, starts, T, self.meta))
        return x0, torch.zeros_like(x0, dtype=torch.bool)


class Rows:
    """A data set of rows: prompts and answers, or documents. A batch holds rows of one width.

    Of the N rows of train it keeps the n shortest: row_share * N, rounded up, and at least one."""

    def __init__(self, dataset, meta, block_size, batch_size, seed, random_length, predict_pad,
                 score_prompt, row_share, pad_curriculum):
        self.dataset, self.meta, self.seed = dataset, meta, seed
        self.block_size, self.batch_size, self.random_length = block_size, batch_size, random_length
        self.predict_pad, self.score_prompt = predict_pad, score_prompt
        self.pad_curriculum = pad_curriculum
        self.tokens = cache(partial(load_split, dataset))  # tokens(split) -> memmap of ids
        rows = self.rows('train')  # (N, row_length)
        prompts, unpadded = row_ends(rows, meta)  # 2 x (N,)
        n = math.ceil(round(row_share * len(rows), 9)) or 1
        self.kept = np.sort(unpadded.argsort(kind='stable')[:n])  # (n,) numbers of rows
        self.widths = row_widths(rows, meta, predict_pad)[self.kept]  # (n,)
        self.epoch = lru_cache(2)(self.shuffled_batches)  # 2: an update may reach into the next
        ends, batches = unpadded[self.kept], self.epoch(0)  # (n,), widths without PAD
        # random_length crops its share of the batches by half, in the mean, of the PAD that all
        # rows of a batch have at their end
        room = sum(len(b) * (self.widths[b[0]] - ends[b].max()) for b in batches)
        self.tokens_per_epoch = round(self.widths.sum() - random_length / 2 * room)
        self.pad_share = 1 - ends.sum() / self.tokens_per_epoch
        given = 0 if score_prompt else prompts[self.kept].sum()
        self.scored_share = 1 - given / self.tokens_per_epoch
        self.batches_per_epoch = len(batches)
        self.tokens_per_batch = self.tokens_per_epoch / self.batches_per_epoch  # a mean
        self.mean_width = round(self.tokens_per_epoch / n)

    def shuffled_batches(self, epoch):
        """The batches of an epoch, [(B,) indices into self.kept], in random order."""
        rng = np.random.default_rng(mixed_seed(self.seed, epoch))
        return row_batches(self.widths, self.batch_size, rng)

    def check(self):
        """Raises UserError where a row is longer than the context."""
        val = row_widths(self.rows('val'), self.meta, self.predict_pad)
        widest = max(self.widths.max(), val.max())
        require('block_size', self.block_size, widest <= self.block_size,
                f'{widest} or more: data/{self.dataset} has rows of so many tokens')

    def rows(self, split):
        """All rows of a split, a memmap (N, row_length)."""
        return self.tokens(split).reshape(-1, self.meta['row_length'])

    def scored(self, split):
        """How many tokens of a split an evaluation scores: answers, EOS, and PAD if predicted."""
        count, width = self.meta['counts'][split], self.meta['max_answer'] + 1  # with EOS
        return count['rows'] * width if self.predict_pad else count['scored']

    def describe(self):
        """What train.py prints about the data."""
        return (f'{describe_data(self)}\n'
                f'{len(self.widths):,} rows of {self.widths.min()} to {self.widths.max()} tokens, '
                f'{self.batches_per_epoch:,} batches an epoch, '
                f'{100 * self.pad_share:.1f}% of what is computed is PAD')

    def batch(self, update, micro_step=0, micro_steps=1):
        """Rows of one width, x0 (B, T) int64, and given (B, T) bool: True in the prompt, up to SEP.

        As in Stream.batch, they depend on the seed and on the arguments alone. With score_prompt
        the prompt is predicted, too, and nothing is given. With predict_pad, of the columns after
        the longest answer, which hold PAD alone, only a fraction is kept: pad_curriculum lets it
        grow from 0 to 1, and random_length keeps a random part of it, in a share of the batches.
        """
        epoch, i = divmod(update * micro_steps + micro_step, self.batches_per_epoch)
        x0, given = self.read('train', self.kept[self.epoch(epoch)[i]])
        fraction = min(1.0, update / self.pad_curriculum) if self.pad_curriculum else 1.0
        fraction *= random_fraction(mixed_seed(self.seed, update, micro_step), self.random_length)
        least = row_ends(x0.numpy(), self.meta)[1].max()  # to the first EOS: PAD may be EOS
        return crop_batch(x0, given & (not self.score_prompt), least, fraction)

    def batches(self, split, batch_size, limit=0):
        """[function that reads one batch (x0, given)], for evaluation: each row of a split once.

        Of train, the kept rows. limit: read only so many rows, evenly spread; 0 = all.
        """
        rows = self.rows(split)
        numbers = self.kept if split == 'train' else np.arange(len(rows))
        numbers = numbers[evenly(len(numbers), limit)]
        batches = row_batches(row_widths(rows[numbers], self.meta, self.predict_pad), batch_size)
        return [partial(self.read, split, numbers[batch]) for batch in batches]

    def read(self, split, numbers):
        """x0 (B, T) int64 and given (B, T) bool of the rows `numbers`; T fits the widest."""
        length = self.meta['row_length']
        x0 = gather(self.tokens(split), np.asarray(numbers) * length, length, self.meta)
        T = row_widths(x0, self.meta, self.predict_pad).max()
        given = np.arange(T) < row_ends(x0, self.meta)[0][:, None]  # (B, T)
        return torch.from_numpy(x0[:, :T]), torch.from_numpy(given)

    def pairs(self, split, n=0):
        """[(ids of the prompt, ids of the answer)] of the first n rows of a split; 0 = of all."""
        return [split_row(row, self.meta) for row in self.rows(split)[:n or None].tolist()]


def split_row(ids, meta):
    """(prompt, answer) of a row, lists of ids: before SEP, and after it up to EOS.

    A row that a model has written may lack the EOS, and have a SEP or PAD in its answer, which are
    left out."""
    middle = -1 if meta['sep_id'] is None else ids.index(meta['sep_id'])  # documents have none
    answer = itertools.takewhile(lambda i: i != meta['eos_id'], ids[middle + 1:])
    return ids[:max(0, middle)], [i for i in answer if i not in (meta['sep_id'], meta['pad_id'])]


def open_data(dataset, block_size, batch_size, seed=0, *, random_length=0.0, train_tokens=0,
              predict_pad=False, score_prompt=False, row_share=1.0, pad_curriculum=0):
    """The Stream or Rows of data/<dataset>; both have the same methods to train and evaluate.

    Both also have tokens_per_epoch, scored_share (the share of these tokens that is not given) and,
    as means, tokens_per_batch and mean_width, the columns of a batch. The other arguments are
    settings of train.py. Raises UserError where one is for the other layout.
    """
    meta = load_meta(dataset)
    common = (dataset, meta, block_size, batch_size, seed, random_length)
    if meta['layout'] == 'rows':
        require('train_tokens', train_tokens, not train_tokens, f'0: data/{dataset} has rows')
        return Rows(*common, predict_pad, score_prompt, row_share, pad_curriculum)
    if predict_pad or score_prompt or row_share != 1.0:
        raise UserError('predict_pad, score_prompt and row_share are for rows, but '
                        f'data/{dataset} is a stream of text')
    return Stream(*common, train_tokens)


def open_run_data(settings):
    """The Stream or Rows on which a run with these settings of train.py is trained."""
    names = signature(open_data).parameters  # each is a setting; an older run may lack some
    return open_data(**{name: settings[name] for name in names if name in settings})


def main():
    what = [word for word in sys.argv[1:] if not word.startswith('-')][:1]  # the data set or file
    words = [word for word in sys.argv[1:] if word not in what] or ['--help'] * (not what)
    settings = override(globals(), words)
    if not what:
        raise UserError('name a data set or a file: python prepare.py WHAT --name=value')
    meta = prepare(*what, **settings)
    for split, count in meta['counts'].items():
        if meta['layout'] == 'rows':
            print(f'{split}: {count["rows"]:,} rows, {count["scored"]:,} tokens to predict; '
                  f'{count["empty"]:,} empty and dropped, {count["long"]:,} too long and '
                  f'{"cut" if truncate or meta["sep_id"] is None else "dropped"}')
            for side, (mean, median, p90, p99, longest) in count['lengths'].items():
                print(f'  tokens of each {side}: mean {mean:.1f}, median {median:.0f}, '
                      f'90% {p90:.0f}, 99% {p99:.0f}, longest {longest:.0f}')
    tokens = ', '.join(f'{split} {count["tokens"]:,}' for split, count in meta['counts'].items())
    print(f"data/{meta['name']}: {tokens} tokens of {meta['vocab_size']:,} kinds. {meta['source']}")


if __name__ == '__main__':
    main()
