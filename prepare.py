"""Text -> data/<name>/{train,val[,test]}.bin and meta.json; and the classes that read them back.

    python prepare.py shakespeare_char       # 1 MB, seconds: Tiny Shakespeare, an id per character
    python prepare.py shakespeare            # 1 MB, seconds: the same in GPT-2's tokens
    python prepare.py wikitext2              # 13 MB, seconds: three splits as published
    python prepare.py wikitext2_bpe          # the same in 4,096 tokens of its own
    python prepare.py wikitext103            # 540 MB, a minute
    python prepare.py text8                  # 100 MB, seconds: 27 characters
    python prepare.py reversal               # made here, seconds: facts told in one direction
    python prepare.py path/to/any.txt --tokenizer=bpe --vocab_size=1024

Those are streams of text. The following are rows of one length, each [prompt SEP answer EOS PAD...]
or [document EOS PAD...], and a model of them learns where to end:

    python prepare.py multi30k               # 4 MB, seconds: captions, from English to French
    python prepare.py opus_books             # 34 MB, a minute: sentences of novels, the same
    python prepare.py NAME --prompts=FILE --answers=FILE      # line by line
    python prepare.py path/to/any.jsonl --fields=question,answer
    python prepare.py path/to/any.txt --documents

A data set is a recipe, data/<name>.py beside this file: data/__init__.py says what stands in one. A
download, kept in data/downloads, comes on top once. Text is read as a stream, and the bins are flat
uint16 ids that are read as memmaps: on either side a corpus may be larger than memory.
"""

import base64
import csv
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import runpy
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from pathlib import Path

import numpy as np
import requests
import tiktoken
import torch
from tqdm import tqdm

from config import UserError, one_of, override, require

name = ''          # of the folder in data/; '' = that of the data set, or of the file without .txt
source = ''        # a local copy of the data set: the text, a zip, or a folder with its files
tokenizer = ''     # char, gpt2, bpe (learned from the train split); '' = the data set's own, which
                   # is char for a file of yours
vocab_size = 0     # of bpe: 256 bytes, merges and special tokens; 0 = the data set's own, which is
                   # 4096 for a file of yours
# rows
prompts = ''       # a file, and another whose line i answers its line i
answers = ''
fields = ''        # of a .csv or .jsonl: the column or key of prompts and that of answers
documents = False  # a row for each text between EOTs; in a file without an EOT, for each line
max_prompt = 128   # tokens; a pair with a longer side is dropped: half an answer is a wrong one
max_answer = 128   # tokens; a longer document is cut

RECIPES = Path(__file__).parent / 'data'

EOT = '<|endoftext|>'
SPECIALS = {'eos_id': EOT, 'sep_id': '<|sep|>', 'pad_id': '<|pad|>'}  # in the order of their ids
SPECIALS_OF = {'stream': ['eos_id'], 'documents': ['eos_id', 'pad_id'], 'pairs': [*SPECIALS]}
# GPT-2's, in possessive form (++), which matches the same but never has to backtrack.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# Where a stream of text may be cut. Both are greedy: they match up to the last such place.
#
# For GPT2_PATTERN it is before a blank that follows a non-blank. No token spans that place: blanks
# stand in tokens of blanks only, or in front. Left of it everything matches as in the whole text:
# what `\s++$` and `\s+(?!\S)` look at behind a run of blanks is there, for the last character is
# none. Right of it too, since nothing in the pattern looks back. And an EOT holds no blank. (\S is
# stricter in Python than in tiktoken, ' ' and '\n' are blanks to both: that is the safe way round.)
BEFORE_BLANK = re.compile(r'(?s).*\S(?=[ \n])')
OUTSIDE_EOT = re.compile(r'(?s).*[^<|endoftx]')

MAX_VOCAB_SIZE = 65_535  # V', so that mask_id = V' fits uint16; and hence the id of no character
MARK = '\ud800'          # in place of an EOT: one character, and in no UTF-8 text (a surrogate)
READ_SIZE = 1 << 18      # bytes or characters at a time
MAX_UNCUT = 32_000_000   # characters in a row without a place to cut
THREADS = os.cpu_count() or 1  # that tokenise a stream at the same time
DOWNLOADS = Path('data', 'downloads')
TOKENIZER_KEYS = {'char': {'chars'}, 'gpt2': set(), 'bpe': {'pattern', 'ranks'}}
META_TYPES = {
    'name': str, 'layout': str, 'row_length': int | None, 'max_answer': int | None,
    'vocab_size': int, 'mask_id': int, 'eos_id': int | None, 'sep_id': int | None,
    'pad_id': int | None, 'tokenizer': dict, 'source': str, 'sha256': str, 'counts': dict}


def recipe_names():
    """The names of the data sets that there is a recipe for."""
    return sorted(path.stem for path in RECIPES.glob('[!_]*.py'))


def load_recipe(name):
    """The names in data/<name>.py, over those of its base, which in the end is data/__init__.py."""
    own = runpy.run_path(str(RECIPES / f'{name}.py'))
    return own if name == '__init__' else load_recipe(own.get('base', '__init__')) | own


def choose_recipe(what, prompts, answers, fields, documents):
    """The recipe of that name, or one for the user's own files that the settings describe."""
    known = what in recipe_names()
    if known + bool(prompts) + bool(fields) + documents > 1 or bool(prompts) != bool(answers):
        raise UserError('rows are made from --prompts=FILE --answers=FILE, or from a file with '
                        '--fields=PROMPT,ANSWER, or from a text with --documents')
    recipe = load_recipe(what if known else '__init__')
    if fields:
        names = fields.split(',')
        require('fields', fields, len(names) == 2, "two names, as in 'question,answer'")
        recipe |= {'layout': 'pairs', 'read': partial(read_fields, names=names)}
    elif prompts or documents:
        recipe['layout'] = 'pairs' if prompts else 'documents'
    return recipe


def sha256_of(*files):
    """The sha256 of the bytes of files (paths, also into a zip), one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open('rb') as f:
            while piece := f.read(READ_SIZE):
                digest.update(piece)
    return digest.hexdigest()


def append_rest(url, part, timeout):
    """Appends to the file `part` what it still lacks of `url`. Raises requests' exceptions."""
    have = part.stat().st_size if part.exists() else 0
    headers = {'Range': f'bytes={have}-', 'Accept-Encoding': 'identity'}  # count the bytes as sent
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
        if answer.status_code == 416 and have:
            return  # nothing comes after `have`: it is complete, or the checksum will say
        answer.raise_for_status()
        # 206 is the rest, as asked for; another server ignores Range and starts from zero
        with open(part, 'ab' if answer.status_code == 206 else 'wb') as f:
            for piece in tqdm(answer.iter_content(1 << 14), part.stem, unit='B',
                              unit_scale=1 << 14, delay=1):
                f.write(piece)


def download(urls, path, sha256, timeout=(3, 15), tries=4, pause=0.5):
    """Fetches `path` from the first mirror that has it with this sha256, unless that is None.

    Every mirror is asked in turn, and after a pause all are asked again. timeout: seconds to
    connect, and to wait for a byte. What a broken download left in path.part is resumed, now or in
    a later run; path itself appears once the checksum is right. Raises UserError."""
    if path.is_file() and sha256 in (None, sha256_of(path)):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f'{path}.part')
    problems = dict.fromkeys(urls, '')  # the last of each mirror
    for attempt in range(tries):
        time.sleep(pause * attempt)
        for url in urls:
            if problems[url] == 'ConnectTimeout':
                continue  # nobody is there, and asking again takes long
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
    problems = '; '.join(f'{url}: {problem}' for url, problem in problems.items())
    raise UserError(f'cannot download {path.name} ({problems}): get it in another way and add '
                    '--source=FILE')


def fetch(recipe):
    """(path, source in words) of a recipe's files, which are downloaded or made if need be."""
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    if not recipe['mirrors']:
        return recipe['make'](DOWNLOADS)
    try:
        for file, sha256 in recipe['files'].items():
            target = DOWNLOADS / recipe['folder'] / file
            download([mirror + file for mirror in recipe['mirrors']], target, sha256)
            if target.suffix == '.gz':
                target.with_suffix('').write_bytes(gzip.decompress(target.read_bytes()))
    except UserError:
        if recipe['make'] and (made := recipe['make'](DOWNLOADS)):
            return made
        raise
    place = recipe['folder'] or file
    return DOWNLOADS / place, recipe['mirrors'][0] + place


def members(path):
    """The files in a folder, or in a zip as paths into it; or the one file."""
    if path.is_dir():
        return [*path.iterdir()]
    if zipfile.is_zipfile(path):
        return [zipfile.Path(path, member) for member in zipfile.ZipFile(path).namelist()]
    return [path]


def find_texts(what, recipe, sources):
    """({split: [paths of its text, or of prompts and answers]}, source in words).

    The paths may lead into a zip. '' stands for all splits where the recipe has to cut them.
    sources: the user's own files; none = those of the recipe."""
    paths = [Path(file) for file in sources]
    words = ', '.join(path.name for path in paths)
    if not sources:
        path, words = fetch(recipe)
        paths = [path]
    for path in paths:
        if not path.exists():
            known = ', '.join(recipe_names())
            raise UserError(f'there is no file {str(path)!r} (data sets: {known})')
    files, texts = [file for path in paths for file in members(path)], {}
    named = {file.name: file for file in files}
    for split, names in recipe['text'].items():
        texts[split] = []
        for name in names:
            found = [named[either] for either in name.split('|') if either in named]
            if not found:
                raise UserError(f'{path} is not {what}: it has no {name.replace("|", " or ")}')
            texts[split].append(found[0])
    if not texts:
        if path.is_dir() or len(files) != len(paths):
            raise UserError(f'{path} is not a text')
        texts = {'': files}
    if sources and recipe['title'] and sha256_of(*texts['']) not in recipe['files'].values():
        words += f' (not the published {recipe["title"]})'
    return texts, words


def read_chunks(file):
    """Yields a UTF-8 file piece by piece, line ends untouched."""
    with file.open('r', encoding='utf-8', newline='') as f:
        try:
            while chunk := f.read(READ_SIZE):
                yield chunk
        except UnicodeDecodeError as e:
            offset = f.buffer.tell() - len(e.object) + e.start
            raise UserError(f'{file} is not UTF-8 at byte {offset}: convert it first') from e


def recut(chunks, where):
    """The same text in other pieces, each as long as the pattern `where` allows."""
    rest = ''
    for chunk in chunks:
        rest += chunk
        if piece := where.match(rest):
            yield piece[0]
            rest = rest[piece.end():]
        if len(rest) > MAX_UNCUT:
            raise UserError(f'{MAX_UNCUT:,} characters without a space: use --tokenizer=char')
    yield rest


def read_parts(file, separator='\n'):
    """The parts of a UTF-8 file that end in `separator`, each with it; the last may lack it."""
    rest = ''
    for chunk in read_chunks(file):
        *parts, rest = (rest + chunk).split(separator)
        yield from (part + separator for part in parts)
    if rest:
        yield rest


def read_pairs(prompts, answers):
    """Yields (line i of the one file, line i of the other). Raises UserError if one is longer."""
    sides = [read_parts(file) for file in (prompts, answers)]
    for i, pair in enumerate(itertools.zip_longest(*sides), start=1):
        if None in pair:
            longer, shorter = (answers, prompts) if pair[0] is None else (prompts, answers)
            raise UserError(f'{longer} has a line {i}, but {shorter} ends before it: they must '
                            'correspond line by line')
        yield pair


def read_fields(file, names):
    """Yields (prompt, answer): two named columns of a .csv, two keys of a .jsonl."""
    lines = (line.removeprefix('\ufeff') for line in read_parts(file))
    records = csv.DictReader(lines) if file.suffix == '.csv' else map(
        json.loads, filter(str.strip, lines))
    try:
        for i, record in enumerate(records, start=1):
            if missing := [name for name in names if record.get(name) is None]:
                raise UserError(f'record {i} of {file} has no {missing[0]!r}, only '
                                f'{", ".join(map(str, record))}')
            # JSON can hold half a surrogate pair, which is no text
            yield [str(record[name]).encode('utf-8', 'replace').decode() for name in names]
    except (ValueError, AttributeError, csv.Error) as e:
        raise UserError(f'{file} is not a .csv or .jsonl of records: {e}') from e


def read_documents(file):
    """Yields ('', document): the texts between EOTs, or the lines if there is no EOT at all."""
    has_eot = any(EOT in chunk for chunk in recut(read_chunks(file), OUTSIDE_EOT))
    for part in read_parts(file, EOT if has_eot else '\n'):
        yield '', part.removesuffix(EOT) if has_eot else part


READERS = {'stream': read_chunks, 'pairs': read_pairs, 'documents': read_documents}


def cut_text(chunks, start, stop):
    """Yields characters start to stop of a text."""
    done = 0
    for chunk in chunks:
        yield chunk[max(0, start - done):max(0, stop - done)]
        done += len(chunk)


def cut_splits(read, shares, stream):
    """{split: function that starts its part} of what read() yields: pieces of a stream, or rows."""
    n = sum(len(item) if stream else 1 for item in tqdm(read(), 'counting', delay=1))
    stops = [int(n * share) for share in shares.values()]
    cut = cut_text if stream else itertools.islice
    return {split: lambda start=start, stop=stop: cut(read(), start, stop)
            for split, start, stop in zip(shares, [0, *stops], stops)}


def open_splits(recipe, texts, kind):
    """{split: function that starts its pieces of text, or its (prompt, answer)s}.

    The pieces are as this kind of tokenizer needs them: each can be encoded on its own."""
    read, stream = recipe['read'] or READERS[recipe['layout']], recipe['layout'] == 'stream'
    splits = {split: partial(read, *files) for split, files in texts.items()}
    if '' in splits:
        shares = recipe['splits']
        splits = shares(splits['']) if callable(shares) else cut_splits(splits[''], shares, stream)
    if not stream:
        return splits
    where = OUTSIDE_EOT if kind == 'char' else BEFORE_BLANK
    return {split: lambda read=read: recut(read(), where) for split, read in splits.items()}


class CharTokenizer:
    """One id per character, in the order of `chars`; then those of `specials` {text: id}."""

    def __init__(self, chars, specials):
        self.pieces = [*chars, *specials]
        self.ids = {char: i for i, char in enumerate(chars)}
        if specials.keys() == {EOT}:  # in rows no text has a special token's id
            self.ids[MARK] = specials[EOT]

    def encode(self, text):
        text = text.replace(EOT, MARK) if MARK in self.ids else text
        if lacking := sorted(map(repr, set(text) - self.ids.keys())):
            raise UserError(f'the tokenizer does not know {" ".join(lacking[:9])}')
        return [self.ids[char] for char in text]

    def decode(self, ids):
        return ''.join(self.pieces[i] for i in ids)


class BytePairTokenizer:
    """A tiktoken.Encoding that takes an EOT in the text for one id, but not in rows."""

    def __init__(self, encoding):
        self.encoding = encoding
        self.in_text = {EOT} if encoding.special_tokens_set == {EOT} else set()

    def encode(self, text):
        return self.encoding.encode(text, allowed_special=self.in_text, disallowed_special=())

    def decode(self, ids):
        return self.encoding.decode([int(i) for i in ids])


def load_tokenizer(meta):
    """The tokenizer `meta` describes: encode(text) -> list of ids, decode(ids) -> text."""
    spec = meta['tokenizer']
    specials = {text: meta[key] for key, text in SPECIALS.items() if meta.get(key) is not None}
    if spec['kind'] == 'char':
        return CharTokenizer(spec['chars'], specials)
    if spec['kind'] == 'bpe':
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(spec['ranks'])}
    else:
        try:
            ranks = tiktoken.get_encoding('gpt2')._mergeable_ranks  # downloads them once
        except (requests.RequestException, OSError, ValueError) as e:
            raise UserError("GPT-2's files vocab.bpe and encoder.json cannot be fetched: set "
                            "TIKTOKEN_CACHE_DIR to a copy of tiktoken's cache, or use "
                            '--tokenizer=bpe') from e
    return BytePairTokenizer(tiktoken.Encoding(
        spec['kind'], pat_str=spec.get('pattern', GPT2_PATTERN), mergeable_ranks=ranks,
        special_tokens=specials))


def texts_in(layout, read):
    """The texts of a split, one by one: pieces of a stream with MARK for EOT, or sides of rows."""
    if layout == 'stream':
        return (piece.replace(EOT, MARK) for piece in read())
    return itertools.chain.from_iterable(read())


def make_tokenizer(kind, layout, splits, vocab_size):
    """(description for meta.json, ordinary tokens, names of the special tokens after them).

    Characters are those of all splits; byte pairs are learned from train, and the description
    holds, in base64, the bytes of each token in the order of their ids."""
    specials = SPECIALS_OF[layout]
    if kind == 'gpt2':
        return {'kind': kind}, 50_256, specials
    if kind == 'char':
        chars = set()
        for read in splits.values():
            for text in texts_in(layout, read):
                chars.update(text)
        if layout == 'stream' and MARK not in chars:
            specials = []
        chars = ''.join(sorted(chars - {MARK}))
        if len(chars) + len(specials) > MAX_VOCAB_SIZE:
            raise UserError(f'{len(chars):,} different characters: too many, use --tokenizer=bpe')
        return {'kind': kind, 'chars': chars}, len(chars), specials
    least = 256 + len(specials)
    require('vocab_size', vocab_size, least <= vocab_size <= MAX_VOCAB_SIZE,
            f'{least} to {MAX_VOCAB_SIZE}')
    try:
        import rustbpe  # only here: not everybody installs it
    except ImportError as e:
        raise UserError("--tokenizer=bpe needs rustbpe: pip install -e '.[bpe]'") from e
    trainer = rustbpe.Tokenizer()
    texts = tqdm(texts_in(layout, splits['train']), 'learning byte pairs', delay=1)
    trainer.train_from_iterator((part for text in texts for part in text.split(MARK)),
                                vocab_size - len(specials), buffer_size=16, pattern=GPT2_PATTERN)
    tokens = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    ranks = [base64.b64encode(bytes(token)).decode() for token, _ in tokens]
    return {'kind': kind, 'pattern': GPT2_PATTERN, 'ranks': ranks}, len(ranks), specials


def encode_stream(pieces, encoder, count):
    """Yields the ids of a text in its order, and writes into count how long it is.

    An EOT is not part of the text, so its characters are not counted. Several threads share the
    work: tiktoken is Rust and lets the others run."""
    count |= dict.fromkeys(('tokens', 'characters', 'bytes'), 0)  # tokens: once written
    pieces = iter(pieces)
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := list(itertools.islice(pieces, 4 * THREADS)):  # this much is in memory
            text = ''.join(batch).replace(EOT, '')
            count['characters'] += len(text)
            count['bytes'] += len(text.encode('utf-8'))
            yield from pool.map(encoder.encode, batch)


def encode_rows(pairs, encoder, count, meta, max_prompt, max_answer):
    """Yields the rows (row_length,) of a split, and writes into count what they are.

    Characters and bytes are those of the answers or documents, as are the `scored` tokens. A pair
    with an empty or too long side is dropped, and so is an empty document; a long one is cut.
    Of pairs, `answer_line` is (a, b) of the answer's tokens, EOS among them, on average: a times
    the prompt's, and b; a least-squares fit."""
    is_pair, empty, long, sizes = meta['sep_id'] is not None, 0, 0, []
    for prompt, answer in pairs:
        prompt, answer = encoder.encode(prompt.strip()), encoder.encode(answer.strip())
        if not answer or (is_pair and not prompt):
            empty += 1
            continue
        if len(prompt) > max_prompt or len(answer) > max_answer:
            long += 1
            if is_pair:
                continue
        answer = answer[:max_answer]
        text = encoder.decode(answer)
        sizes.append((len(prompt), len(answer) + 1, len(text), len(text.encode('utf-8'))))
        row = [*prompt, meta['sep_id'], *answer] if is_pair else answer
        row = [*row, meta['eos_id']]
        yield row + [meta['pad_id']] * (meta['row_length'] - len(row))
    sizes = np.array(sizes, int).reshape(-1, 4)  # (N, 4)
    _, scored, characters, n_bytes = sizes.sum(0).tolist()
    longest = int(sizes[:, 1].max(initial=1)) - 1  # without EOS
    count |= {'rows': len(sizes), 'scored': scored, 'longest': longest, 'characters': characters,
              'bytes': n_bytes, 'empty': empty, 'long': long}
    if is_pair and len(sizes):
        prompts = np.column_stack([sizes[:, 0], np.ones(len(sizes))])  # (N, 2)
        count['answer_line'] = np.linalg.lstsq(prompts, sizes[:, 1], rcond=None)[0].tolist()


def write_dataset(target, meta, encoded):
    """Writes data/<name>: encoded {split: its ids in lists, one by one}, and then meta.json.

    All is made in a folder aside and then renamed, so that what was there stays until the new data
    set is complete."""
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.preparing-', dir='data') as folder:
        work = Path(folder, 'new')
        work.mkdir()
        for split, lists in encoded.items():
            with open(work / f'{split}.bin', 'wb') as f:
                for ids in tqdm(lists, f'{target.name} {split}', delay=1):
                    f.write(np.array(ids, '<u2').tobytes())
                meta['counts'][split]['tokens'] = tokens = f.tell() // 2
            if tokens < 2:
                raise UserError(f'{target.name} is too short: its {split} split has {tokens} '
                                'tokens')
        if meta['layout'] == 'rows':
            meta['max_answer'] = max(count['longest'] for count in meta['counts'].values())
        (work / 'meta.json').write_text(json.dumps(meta, indent=1), encoding='utf-8')
        if target.exists():
            os.replace(target, Path(folder, 'old'))
        os.replace(work, target)


def prepare(what, name='', source='', tokenizer='', vocab_size=0, prompts='', answers='',
            fields='', documents=False, max_prompt=128, max_answer=128):
    """Writes data/<name>/{train,val[,test]}.bin and meta.json, and returns what meta.json says.

    what: the name of a recipe, or the path of a text, whose first 90% of characters are train and
    the rest val; with prompts and answers, a name. The others are the settings above. Raises
    UserError."""
    recipe = choose_recipe(what, prompts, answers, fields, documents)
    layout, kind = recipe['layout'], tokenizer or recipe['tokenizer']
    one_of('tokenizer', kind, TOKENIZER_KEYS)
    target = Path('data', name or Path(what).stem)
    taken = target.exists() and not (target / 'meta.json').exists()  # by something else of yours
    if taken or target.parent != Path('data') or target in (DOWNLOADS, Path('data', '..')):
        raise UserError(f'{target} cannot be the folder of a data set: choose another --name')
    own = [prompts, answers] if prompts else [source or what]
    texts, words = find_texts(what, recipe, own if source or not recipe['files'] else [])
    splits = open_splits(recipe, texts, kind)
    spec, n, specials = make_tokenizer(kind, layout, splits, vocab_size or recipe['vocab_size'])
    row_length = (max_prompt + 1) * (layout == 'pairs') + max_answer + 1
    meta = {'name': target.name, 'layout': 'stream' if layout == 'stream' else 'rows',
            'row_length': None if layout == 'stream' else row_length,
            'vocab_size': n + len(specials), 'mask_id': n + len(specials),
            **dict.fromkeys(SPECIALS), **{key: n + i for i, key in enumerate(specials)},
            'tokenizer': spec, 'source': words,
            'sha256': sha256_of(*itertools.chain(*texts.values())),
            'counts': {split: {} for split in splits}}
    encode = encode_stream if layout == 'stream' else partial(
        encode_rows, meta=meta, max_prompt=max_prompt, max_answer=max_answer)
    encoder = load_tokenizer(meta)
    write_dataset(target, meta, {split: encode(read(), encoder, meta['counts'][split])
                                 for split, read in splits.items()})
    return meta


def load_meta(dataset):
    """What data/<dataset>/meta.json says, checked. Raises UserError."""
    path = Path('data', dataset, 'meta.json')
    if not path.is_file():
        hint = f'run python prepare.py {dataset}' if Path(dataset).name == dataset else \
            'prepare.py makes a folder of data/ from a file, and dataset is its name'
        raise UserError(f'there is no {path}: {hint}')
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
        wrong = [key for key, kind in META_TYPES.items() if not isinstance(meta.get(key), kind)]
        if TOKENIZER_KEYS[meta['tokenizer']['kind']] != meta['tokenizer'].keys() - {'kind'}:
            wrong.append('tokenizer')
        wrong += [split for split, count in meta['counts'].items()
                  if [type(count[k]) for k in ('tokens', 'characters', 'bytes')] != [int] * 3]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        wrong = [f'{type(e).__name__}: {e}']
    if wrong:
        raise UserError(f'{path} is damaged ({", ".join(wrong)}): prepare {dataset} again')
    return meta


def load_split(dataset, split):
    """The ids of a split, a read-only uint16 memmap. Raises UserError."""
    path = Path('data', dataset, f'{split}.bin')
    counts = load_meta(dataset)['counts']
    if split not in counts:
        raise UserError(f'{dataset} has no split {split!r}, only {", ".join(counts)}')
    tokens = counts[split]['tokens']
    size = path.stat().st_size if path.is_file() else 0
    if tokens == 0 or size != 2 * tokens:
        raise UserError(f'{path} has {size} bytes for {tokens} tokens: prepare {dataset} again')
    return np.memmap(path, dtype='<u2', mode='r')


def gather(data, starts, length, vocab_size):
    """Windows of a split, (B, length) int64, in one read: row b begins at starts[b].

    Raises UserError for ids outside the vocabulary, of which mask_id is the first.
    """
    positions = np.asarray(starts)[:, None] + np.arange(length)  # (B, length)
    ids = data[positions].astype(np.int64)
    if ids.max() >= vocab_size:
        raise UserError(f'the data hold the id {ids.max()}, but the vocabulary ends at '
                        f'{vocab_size - 1}: prepare them again')
    return ids


def row_lengths(rows, meta):
    """(prompts, ends), (N,) each: the tokens of rows (N, row_length) up to SEP and up to EOS.

    Both included, and 0 for the prompt of a document. No prompt or answer contains an EOS.
    """
    ends = (rows == meta['eos_id']).argmax(1) + 1
    if meta['sep_id'] is None:
        return np.zeros_like(ends), ends
    return (rows == meta['sep_id']).argmax(1) + 1, ends


def row_widths(rows, meta, predict_pad=False):
    """Tokens (N,) of each of rows (N, row_length) that a model sees: it all, and no PAD.

    predict_pad: what is behind the prompt is as wide as the longest answer and its EOS, so that
    nothing but the tokens tells where an answer ends."""
    prompts, ends = row_lengths(rows, meta)
    return prompts + meta['max_answer'] + 1 if predict_pad else ends


def row_batches(widths, batch_size, rng=None):
    """[(B,) numbers of rows of one width]: every row once, B <= batch_size, in random order if rng.

    Of one width, for PAD costs time, and shows a model that sees both ways how long the answer is.
    """
    order = np.arange(len(widths)) if rng is None else rng.permutation(len(widths))
    order = order[widths[order].argsort(kind='stable')]
    groups = np.split(order, np.flatnonzero(np.diff(widths[order])) + 1)
    batches = [group[i:i + batch_size] for group in groups
               for i in range(0, len(group), batch_size)]
    return batches if rng is None else [batches[i] for i in rng.permutation(len(batches))]


def mixed_seed(*numbers):
    """One seed of 32 bits from several numbers, all of which count [numpy's SeedSequence].

    Generators on the CPU take no more than 32 bits, and neighbouring seeds are not independent
    enough: bounds drawn under the seeds 0, 1, 2, ... spread three times wider than they should.
    """
    return int(np.random.SeedSequence([n % 2 ** 64 for n in numbers]).generate_state(1)[0])


def crop_batch(x0, given, pad_id, fraction):
    """Crops a batch to a random width. fraction=0 keeps the longest answer (streams: one token),
    fraction=1 keeps all T.

    x0 (B, T) int64; given (B, T) bool, or None for streams.
    """
    shortest, T = 1, x0.size(1)
    if given is not None:  # columns of nothing but PAD may go
        shortest += (x0 != pad_id).any(0).nonzero().max().item()
    width = shortest + round(fraction * (T - shortest))
    return x0[:, :width], None if given is None else given[:, :width]


def random_fraction(number, random_length):
    """The fraction for crop_batch: uniform in [0, 1) for a share random_length of batches, or 1."""
    draws = np.random.default_rng([number, 1])  # independent of the draws of the windows
    return draws.random() if draws.random() < random_length else 1.0


def evenly(n, limit):
    """Indices of `limit` of n things, evenly spread, or of all n: limit = 0, or n and more."""
    if not 0 < limit < n:
        return np.arange(n)
    return torch.linspace(0, n - 1, limit).long().numpy()


def describe_data(data, meta):
    """The line that streams and rows have in common in what train.py prints."""
    return (f'{data.dataset} ({meta["source"]}): {data.tokens_per_epoch:,} training tokens of '
            f"{meta['vocab_size']:,} kinds, log V' = {math.log(meta['vocab_size']):.4f}")


class Stream:
    """A data set of one long text per split, read in windows of block_size tokens."""

    def __init__(self, dataset, meta, block_size, batch_size, seed, random_length, train_tokens):
        self.dataset, self.meta, self.seed = dataset, meta, seed
        self.block_size, self.batch_size, self.random_length = block_size, batch_size, random_length
        self.tokens = cache(partial(load_split, dataset))  # of a split: its ids, a memmap
        self.train = self.tokens('train')[:train_tokens or None]
        self.tokens_per_epoch = len(self.train)
        self.tokens_per_batch, self.mean_width = batch_size * block_size, block_size

    def check(self):
        """Raises UserError where there is nothing to validate on, or not one window to train on."""
        self.tokens('val')
        if len(self.train) < self.block_size:
            raise UserError(f'block_size is {self.block_size}, but data/{self.dataset} has only '
                            f'{len(self.train):,} training tokens')

    def size(self, split):
        """The size of a split in words."""
        return f'{self.scored(split):,} tokens'

    def scored(self, split):
        """How many tokens of a split an evaluation scores: all."""
        return self.meta['counts'][split]['tokens']

    def describe(self):
        """What train.py prints about the data."""
        return describe_data(self, self.meta)

    def batch(self, update, part=0, parts=1):
        """Windows x0 (B, T) int64 from random places of the training text, and None: none is given.

        They follow from the seed and the arguments alone: a resumed run sees what the killed one
        would have seen, and a batch is the same whether the parts of an update run one after the
        other or on many processes.
        """
        number = mixed_seed(self.seed, update, part)
        places = len(self.train) - self.block_size + 1
        starts = np.random.default_rng(number).integers(0, places, self.batch_size)  # (B,)
        x0 = self.read(self.train, starts, self.block_size)  # (B, T)
        return crop_batch(x0, None, None, random_fraction(number, self.random_length))

    def batches(self, split, batch_size, limit=0):
        """[function that reads a batch (x0, None) to evaluate on]: each token of a split once.

        The windows lie side by side, and the last is as short as it comes; with a limit, so many
        whole windows, evenly spread.
        """
        data = self.train if split == 'train' else self.tokens(split)
        T = min(self.block_size, len(data))
        starts = np.arange(len(data) // T) * T  # of whole windows
        kept = starts[evenly(len(starts), limit)]
        parts = [(kept[i:i + batch_size], T) for i in range(0, len(kept), batch_size)]
        if len(kept) == len(starts) and len(data) % T:
            parts.append((np.array([len(data) // T * T]), len(data) % T))
        return [lambda part=part: (self.read(data, *part), None) for part in parts]

    def windows(self, split, T, n):
        """n windows (n, T) int64 of a split, evenly spread, or all that there are; 0 = all."""
        data = self.tokens(split)
        T = min(T, len(data))
        starts = np.arange(0, len(data) - T + 1, T)
        if 0 < n < len(starts):
            starts = starts[np.linspace(0, len(starts) - 1, n).astype(int)]
        return self.read(data, starts, T)

    def read(self, data, starts, T):
        """Windows x0 (B, T) int64 that begin at starts (B,)."""
        return torch.from_numpy(gather(data, starts, T, self.meta['vocab_size']))


class Rows:
    """A data set of rows: prompts and answers, or documents. A batch holds rows of one width."""

    def __init__(self, dataset, meta, block_size, batch_size, seed, random_length, predict_pad,
                 score_prompt, row_share, length_curriculum, pad_curriculum):
        self.dataset, self.meta, self.seed = dataset, meta, seed
        self.block_size, self.batch_size, self.random_length = block_size, batch_size, random_length
        self.predict_pad, self.score_prompt = predict_pad, score_prompt
        self.length_curriculum, self.pad_curriculum = length_curriculum, pad_curriculum
        self.tokens = cache(partial(load_split, dataset))  # of a split: its ids, a memmap
        rows = self.rows('train')
        self.lengths = row_lengths(rows, meta)[1]  # (N,) without PAD
        n = math.ceil(row_share * len(rows)) or 1
        self.kept = np.sort(self.lengths.argsort(kind='stable')[:n])  # numbers of the shortest rows
        self.widths = row_widths(rows, meta, predict_pad)[self.kept]  # (n,)
        self.epoch = lru_cache(2)(lambda epoch: row_batches(  # of indices into self.kept
            self.widths, batch_size, np.random.default_rng(mixed_seed(seed, epoch))))
        self.batches_per_epoch = len(self.epoch(0))
        self.tokens_per_epoch = int(self.widths.sum())
        self.tokens_per_batch = self.tokens_per_epoch / self.batches_per_epoch  # a mean
        self.mean_width = round(self.widths.mean())

    def check(self):
        """Raises UserError where a row is longer than the context."""
        val = row_widths(self.rows('val'), self.meta, self.predict_pad)
        if (widest := max(self.widths.max(), val.max())) > self.block_size:
            raise UserError(f'data/{self.dataset} has rows of {widest} tokens: set block_size, '
                            f'which is {self.block_size}, to {widest} or more')

    def rows(self, split):
        """The rows of a split, (N, row_length)."""
        return self.tokens(split).reshape(-1, self.meta['row_length'])

    def size(self, split):
        """The size of a split in words."""
        return f'{self.meta["counts"][split]["rows"]:,} rows'

    def scored(self, split):
        """How many tokens of a split an evaluation scores: answers, EOS, and PAD if predicted."""
        count = self.meta['counts'][split]
        if self.predict_pad:
            return count['rows'] * (self.meta['max_answer'] + 1)
        return count['scored']

    def describe(self):
        """What train.py prints about the data."""
        pad_share = 1 - self.lengths[self.kept].sum() / self.tokens_per_epoch
        return (f'{describe_data(self, self.meta)}\n'
                f'{len(self.widths):,} rows of {self.widths.min()} to {self.widths.max()} tokens, '
                f'{self.batches_per_epoch:,} batches an epoch, '
                f'{100 * pad_share:.1f}% of what is computed is PAD')

    def batch(self, update, part=0, parts=1):
        """Rows of one width, x0 (B, T) int64, and given (B, T) bool: True in the prompt.

        As in Stream.batch, they follow from the seed and the arguments alone. An epoch's batches
        are shuffled; the length curriculum leaves out those whose rows are still too long. given
        is None with score_prompt, under which the prompt is predicted, too.
        """
        number = mixed_seed(self.seed, update, part)
        epoch, i = divmod(update * parts + part, self.batches_per_epoch)
        progress = update / self.length_curriculum if self.length_curriculum else 1.0
        low, high = self.widths.min(), self.widths.max()
        batches = [batch for batch in self.epoch(epoch)
                   if self.widths[batch[0]] <= low + progress * (high - low)]
        x0, given = self.read('train', self.kept[batches[i % len(batches)]])
        fraction = min(1.0, update / self.pad_curriculum) if self.pad_curriculum else 1.0
        fraction *= random_fraction(number, self.random_length)
        x0, given = crop_batch(x0, given, self.meta['pad_id'], fraction)
        return x0, None if self.score_prompt else given

    def batches(self, split, batch_size, limit=0):
        """[function that reads a batch (x0, given) to evaluate on]: each row of a split once.

        With a limit, so many rows, evenly spread.
        """
        rows = self.rows(split)
        numbers = self.kept if split == 'train' else np.arange(len(rows))
        numbers = numbers[evenly(len(numbers), limit)]
        batches = row_batches(row_widths(rows[numbers], self.meta, self.predict_pad), batch_size)
        return [partial(self.read, split, numbers[batch]) for batch in batches]

    def read(self, split, numbers):
        """x0 (B, T) int64 and given (B, T) bool of some rows, T the width of the widest."""
        length = self.meta['row_length']
        x0 = gather(self.tokens(split), np.asarray(numbers) * length, length,
                    self.meta['vocab_size'])
        T = row_widths(x0, self.meta, self.predict_pad).max()
        given = np.arange(T) < row_lengths(x0, self.meta)[0][:, None]  # (B, T)
        return torch.from_numpy(x0[:, :T]), torch.from_numpy(given)

    def pairs(self, split, n=0):
        """[(ids of the prompt, ids of the answer)] of the first n rows; 0 = of all."""
        return [split_row(row, self.meta) for row in self.rows(split)[:n or None].tolist()]


def split_row(ids, meta):
    """(prompt, answer) of a row: the ids before SEP, and those behind it up to EOS, without PAD."""
    middle, special = ids.index(meta['sep_id']), (meta['sep_id'], meta['pad_id'])
    answer = ids[middle + 1:]
    answer = answer[:answer.index(meta['eos_id'])] if meta['eos_id'] in answer else answer
    return ids[:middle], [i for i in answer if i not in special]


def open_data(dataset, block_size, batch_size, seed=0, *, random_length=0.0, train_tokens=0,
              predict_pad=False, score_prompt=False, row_share=1.0, length_curriculum=0,
              pad_curriculum=0, token_weights=(1.0, 1.0, 1.0)):
    """The data set data/<dataset>, opened for reading: Stream or Rows; both answer the same calls.

    The others are settings of train.py. Raises UserError where one is for the other layout.
    """
    meta = load_meta(dataset)
    common = (dataset, meta, block_size, batch_size, seed, random_length)
    if meta['layout'] == 'rows':
        if train_tokens:
            raise UserError(f'train_tokens is for a stream of text, but data/{dataset} has rows')
        return Rows(*common, predict_pad, score_prompt, row_share, length_curriculum,
                    pad_curriculum)
    if predict_pad or score_prompt or length_curriculum or {row_share, *token_weights} != {1.0}:
        raise UserError('predict_pad, score_prompt, row_share, length_curriculum and '
                        f'token_weights are for rows, but data/{dataset} is a stream of text')
    return Stream(*common, train_tokens)


def main():
    what = [word for word in sys.argv[1:] if not word.startswith('-')][:1]
    words = [word for word in sys.argv[1:] if word not in what] if what else ['--help']
    meta = prepare(*what, **override(globals(), words))
    for split, count in meta['counts'].items():
        if meta['layout'] == 'rows':
            print(f'{split}: {count["rows"]:,} rows, {count["scored"]:,} tokens to predict; '
                  f'{count["empty"]:,} empty and dropped, {count["long"]:,} too long and '
                  f'{"cut" if documents else "dropped"}')
    tokens = ', '.join(f'{split} {count["tokens"]:,}' for split, count in meta['counts'].items())
    print(f"data/{meta['name']}: {tokens} tokens of {meta['vocab_size']:,} kinds. {meta['source']}")


if __name__ == '__main__':
    main()
