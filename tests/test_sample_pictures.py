"""What sample.py shows and saves of a decoding, against the canvases and predictions themselves."""

import collections
import fcntl
import html.parser
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from test_sample import decoded, noise_source, tiny_model

import sample
from sample import Recorder, decode_ancestral, decode_ar, decode_confidence, decode_uniform

REPOSITORY = Path(__file__).parents[1]
MASK = 8
MODELS = {'ar': tiny_model(causal=True, V=9, T=12), 'mdm': tiny_model(V=9, T=12, pos='learned')}
DECODERS = {
    'ar': partial(decoded, decode_ar, MODELS['ar']),
    'ar-eos': partial(decoded, decode_ar, MODELS['ar'], eos_id=2),
    'ancestral': partial(decoded, decode_ancestral, MODELS['mdm'], steps=6),
    'confidence': partial(decoded, decode_confidence, MODELS['mdm'], steps=5)}


class Words:
    """A tokenizer of whatever words."""

    def __init__(self, *words):
        self.words = words

    def decode(self, ids):
        return ''.join(self.words[i] for i in ids)


NASTY = Words('</script>', '&<b>', '\x1b[31m', '\n', ' word', "'\"\\", '�', '<|endoftext|>')
LETTERS = Words(*'abcdefgh')


def predictions(kind, ids):
    """softmax of the logits for one canvas, (T, V), as each decoder reads it, by a full pass."""
    ids = [MASK, *ids[:-1]] if kind.startswith('ar') else ids
    with torch.no_grad():
        logits = MODELS['ar' if kind.startswith('ar') else 'mdm'](torch.tensor([ids]))
    return logits[0].double().softmax(-1).numpy()


@pytest.mark.parametrize('kind', DECODERS)
def test_a_recorder_keeps_what_the_decoder_did(kind):
    """Two rows with different masks, so that taking the other row's logits would show."""
    x = torch.tensor([[MASK, 3, *[MASK] * 6, 1, *[MASK] * 3], [*[MASK] * 5, 4, *[MASK] * 5, 0]])
    predicted, unpredicted = 0, 0
    for seed in range(12):
        seen, recorder = [], Recorder(x[0].tolist(), LETTERS, MASK)

        def on_step(x, nfe, where, logits):
            assert where.shape == x.shape and where.dtype == torch.bool
            assert logits.shape == (where.sum(), MASK + 1) and (logits[:, MASK] == -torch.inf).all()
            recorder(x, nfe, where, logits)
            seen.append((nfe, x[0].tolist()))

        final, nfe = DECODERS[kind](x, generator=noise_source(seed), on_step=on_step)
        steps = recorder.steps
        assert [(step['nfe'], step['ids']) for step in steps] == [(0, x[0].tolist()), *seen]
        assert [step['step'] for step in steps] == list(range(len(seen) + 1))
        assert seen[-1] == (nfe, final[0].tolist())
        assert recorder.stood[1] == ['d'] and recorder.stood[0] == ['█', 'abcdefgh'[final[0, 0]]]
        for before, step in zip(steps, steps[1:]):
            p, ids = predictions(kind, before['ids']), list(before['ids'])
            for new in step['new']:
                i, id = new['i'], new['id']
                assert ids[i] == MASK and id != MASK and new['text'] == 'abcdefgh'[id]
                ids[i] = id
                if new['p'] is None:  # what follows an end-of-text was not predicted
                    assert kind == 'ar-eos' and id == 2 and new['alternatives'] == []
                    unpredicted += 1
                    continue
                assert new['p'] == pytest.approx(p[i, id], abs=2e-5)
                best = np.sort(p[i])[::-1][:5]
                assert [q for _, q, _ in new['alternatives']] == pytest.approx(best, abs=2e-5)
                assert all(q == pytest.approx(p[i, k], abs=2e-5) and text == 'abcdefgh'[k]
                           for k, q, text in new['alternatives'])
                predicted += 1
            assert ids == step['ids']
    assert predicted > 20 and (unpredicted > 5 if kind == 'ar-eos' else unpredicted == 0)


def recorded(tokenizer=LETTERS, n=3):
    """A recording of a token taken back and replaced, one given, and n more steps of one token."""
    recorder = Recorder([MASK, 5, MASK, MASK], tokenizer, MASK)
    logits = torch.full((1, MASK + 1), 0.0)
    logits[0, MASK] = -torch.inf
    canvases = [[0, 5, MASK, MASK], [MASK, 5, 3, MASK], [1, 5, 3, MASK]]
    canvases += [[1, 5, 3, 4 + k % 2] for k in range(n)]
    for nfe, (old, ids) in enumerate(zip([recorder.steps[0]['ids'], *canvases], canvases), 1):
        where = torch.tensor([[a != b for a, b in zip(old, ids)]])
        where[0, 0] &= ids[0] != MASK
        recorder(torch.tensor([ids]), nfe, where, logits.repeat(int(where.sum()), 1))
    return recorder


def test_a_token_may_be_taken_back_and_replaced():
    recorder = recorded(n=2)
    back = recorder.steps[2]['new']
    assert [(new['i'], new['id'], new['text'], new['p']) for new in back] == [
        (0, MASK, '█', None), (2, 3, 'd', 0.125)]
    assert back[0]['alternatives'] == [] and len(back[1]['alternatives']) == 5
    assert recorder.stood == [['█', 'a', '█', 'b'], ['f'], ['█', 'd'], ['█', 'e', 'f']]


def test_the_mask_is_no_alternative_even_where_all_others_have_underflowed():
    recorder = Recorder([MASK] * 2, LETTERS, MASK)
    logits = torch.full((2, MASK + 1), -200.0)
    logits[:, 3], logits[:, MASK] = 200.0, -torch.inf
    recorder(torch.tensor([[3, 3]]), 1, torch.ones(1, 2, dtype=torch.bool), logits)
    for new in recorder.steps[1]['new']:
        assert new['p'] == 1 and new['alternatives'][0] == [3, 1.0, 'd']
        assert MASK not in [k for k, _, _ in new['alternatives']]


def test_a_recording_of_uniform_noise(tmp_path):
    """All come at the first step, most are replaced later, and none is a mask again."""
    x, canvases = torch.tensor([[MASK, 3, *[MASK] * 6]]), []
    recorder = Recorder(x[0].tolist(), LETTERS, MASK)

    def on_step(x, *rest):
        canvases.append(x[0].tolist())
        recorder(x, *rest)

    decoded(decode_uniform, MODELS['mdm'], x, steps=5, generator=noise_source(), on_step=on_step)
    assert [step['ids'] for step in recorder.steps[1:]] == canvases
    changes = [[a != b for a, b in zip(*pair)]
               for pair in zip([x[0].tolist(), *canvases], canvases)]
    assert [len(step['new']) for step in recorder.steps[1:]] == [sum(row) for row in changes]
    assert all(new['p'] > 0 and len(new['alternatives']) == 5
               for step in recorder.steps[1:] for new in step['new'])
    times = np.sum(changes, 0)
    assert recorder.rewritten() == np.mean(times[times > 0] > 1) > 0 and times[1] == 0
    labels = ['7 masks left', '0 masks left']
    labels += [f'{sum(row)} tokens changed' for row in changes[1:]]
    assert [recorder.progress(k) for k in range(6)] == labels
    for ending, save in sample.SAVERS.items():
        save(recorder, tmp_path / f'x{ending}', {'title': 'a run'})
    data = json.loads(Page((tmp_path / 'x.html').read_text()).scripts[0])
    assert [step['label'].split(', ')[-1] for step in data['steps']] == labels
    now = {}
    for k, step in enumerate(data['steps']):
        now.update({i: (text, color) for i, text, color, _ in step['new']})
        for i, id in enumerate(recorder.steps[k]['ids']):
            assert now[i][0] == ('' if id == MASK else 'abcdefgh'[id])
            assert ImageColor.getrgb(now[i][1] or '#fff') == expected_color(recorder, k, i)
    with Image.open(tmp_path / 'x.gif') as gif:
        assert gif.n_frames == 6


def test_what_is_shown_obeys_nobody():
    """No control, format or surrogate character, and every newline a sign."""
    every = ''.join(map(chr, range(0x3000))) + '\ud800\u202e\ufeff\U000e0001'
    shown = sample.visible(every)
    assert shown.isprintable() and len(shown) == len(every)
    assert shown[10] == '⏎' and shown[27] == '�' and shown[0x9b] == '�' and shown[9] == ' '
    assert all(a == b for a, b in zip(every, shown) if a.isprintable())


@pytest.mark.parametrize('columns', [7, 12, 80])
def test_a_layout_never_overlaps(columns):
    rng = np.random.default_rng(0)
    words = ['a', ' the', '⏎', 'x⏎⏎', '語', '█', ' longer']
    stood = [[words[k] for k in rng.integers(0, 7, rng.integers(1, 4))] for _ in range(200)]
    places = sample.layout(stood, columns)
    cells = collections.Counter()
    for texts, (line, column, width) in zip(stood, places):
        assert width == max(len(text) + text.count('語') for text in texts)
        assert column + width <= columns
        cells.update((line, column + k) for k in range(width))
    assert max(cells.values()) == 1
    for texts, here, there in zip(stood, places, places[1:]):
        breaks = texts[-1].count('⏎')
        assert there[0] - here[0] == breaks or breaks == 0 and there[1] == 0
        assert breaks == 0 or there[1] == 0
    assert places == sorted(places)


def pixel(image, line, column, size):
    """The colour of a tile, near its upper left corner, where no letter is."""
    return image.getpixel((size * (column + 1) + 1, size * (2 * line + 3) + 1))


def expected_color(recorder, k, i):
    """Of position i after k steps."""
    born = max(s['step'] for s in recorder.steps[:k + 1] if any(n['i'] == i for n in s['new']))
    if recorder.steps[k]['ids'][i] == MASK:
        return ImageColor.getrgb(sample.MASK_COLOR)
    return ImageColor.getrgb(sample.ramp(len(recorder.steps) - 1)[born - 1]) if born else (255,) * 3


@pytest.mark.parametrize('n, frames', [(3, 7), (400, 120)])
def test_a_gif_shows_the_steps(tmp_path, n, frames):
    recorder = recorded(n=n)
    sample.save_gif(recorder, tmp_path / 'x.gif', {'title': 'a run'})
    shown = np.linspace(0, n + 3, frames).round().astype(int)
    with Image.open(tmp_path / 'x.gif') as gif:
        assert gif.n_frames == frames and gif.size == (820, 60) and gif.info['loop'] == 0
        for frame in (0, 1, 2, 3, frames - 1):
            gif.seek(frame)
            wait = gif.info['duration']
            assert wait == 4000 if frame == frames - 1 else 40 <= wait <= 300
            image = gif.convert('RGB')
            for i in range(4):  # one cell each; a GIF has 256 colours
                found, color = pixel(image, 0, i, 10), expected_color(recorder, shown[frame], i)
                assert np.abs(np.subtract(found, color)).max() <= 16, (frame, i)


@pytest.mark.parametrize('ending', ['.png', '.gif'])
def test_a_long_title_stays_beside_the_bar(tmp_path, ending):
    """And a PNG of many lines ends where the last one that it shows does."""
    pictures = []
    for title in ('x', 'shakespeare_mdm_10m_block, confidence and much more'):
        recorder = sample.Recorder([0] * 800 + [4], LETTERS, 4)
        where = torch.ones(1, 801, dtype=torch.bool)
        recorder(torch.tensor([[1] * 801]), 1, where, torch.zeros(801, 5))
        sample.SAVERS[ending](recorder, tmp_path / f'x{ending}', {'title': title})
        with Image.open(tmp_path / f'x{ending}') as image:
            image.seek(image.n_frames - 1)
            pictures.append(np.asarray(image.convert('RGB')))
    short, long = pictures
    size = 20 if ending == '.png' else 10
    assert np.array_equal(short[:, size * 41:], long[:, size * 41:]), 'it is in the left half'
    if ending == '.png':
        assert short.shape[0] == 2 * 20 * (2 * 8 + 3) and (short[20 * 19 - 2] == 255).all()


def test_a_png_shows_steps_one_below_the_other(tmp_path):
    recorder = recorded(n=40)
    sample.save_png(recorder, tmp_path / 'x.png', {'title': 'a run'})
    image = Image.open(tmp_path / 'x.png')
    assert image.size == (1640, 9 * 120)
    for row, k in enumerate(np.linspace(0, 43, 9).round().astype(int)):
        part = image.crop((0, row * 120, 1640, row * 120 + 120))
        for i in range(4):
            assert pixel(part, 0, i, 20) == expected_color(recorder, k, i), (k, i)
        assert (np.asarray(part)[:, :400] < 50).any(), 'the title'
        letter = np.asarray(part.crop((41, 60, 59, 100)))  # of the given token
        assert 10 < (letter.max(2) < 80).sum() < 300


class Page(html.parser.HTMLParser):
    """What a browser makes of it: the tags, and the text inside of each script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag == 'script'
        self.scripts += [''] * self.inside

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def test_a_page_holds_the_data_and_nothing_else_runs(tmp_path):
    recorder = recorded(NASTY)
    sample.save_html(recorder, tmp_path / 'x.html', {'title': '<i>&</script>'})
    source = (tmp_path / 'x.html').read_bytes().decode('ascii')
    page = Page(source)
    assert len(page.scripts) == 2 and source.count('</script>') == 2
    assert not re.search(r'https?:|//[a-z]|\bsrc\b|\bhref\b|@import|url\(|fetch|innerHTML', source)
    tags = [tag for tag, _ in page.tags]
    assert 'b' not in tags and 'i' not in tags and tags.count('button') == 1
    assert [a['type'] for tag, a in page.tags if tag == 'input'] == ['range']
    ids = {a['id'] for _, a in page.tags if 'id' in a}
    assert {'head', 'button', 'slider', 'label', 'page', 'ramp', 'card', 'data'} == ids
    data = json.loads(page.scripts[0])
    assert data['title'] == '<i>&</script>' and len(data['places']) == 4
    assert len(data['steps']) == len(recorder.steps) == len(data['colors']) + 1
    now = {}
    for k, step in enumerate(data['steps']):
        for i, text, color, said in step['new']:
            now[i] = text
            found = ImageColor.getrgb(color) if color else (255,) * 3
            assert found == expected_color(recorder, k, i)
        shown = [sample.visible(NASTY.decode([id])) if id != MASK else '' for id in
                 recorder.steps[k]['ids']]
        assert [now[i] for i in range(4)] == shown
        left = recorder.steps[k]['ids'].count(MASK)
        after = f'{left} masks left' if k < 5 else '1 tokens changed'  # none was left before
        assert step['label'].endswith(f', {after}')
    said = {k: dict((entry[0], entry[3]) for entry in step['new'])
            for k, step in enumerate(data['steps'])}
    assert said[0][0] == '“█” at position 0, a mask' and said[0][1].endswith(', given')
    assert said[1][0].splitlines()[0] == '“</script>” at position 0, from step 1 on, ' \
        'probability 0.125'
    assert said[3][0].splitlines()[0].endswith('change 3 here')
    assert len(said[3][0].splitlines()) == 6 and said[3][0].count(' ◂') == 1


def test_a_jsonl_is_the_recording(tmp_path):
    recorder = recorded(NASTY)
    about = {'title': 'x', 'decoder': 'ar', 'seed': 3, 'start': '\x1b</script>'}
    sample.save_jsonl(recorder, tmp_path / 'x.jsonl', about)
    header, *steps = map(json.loads, (tmp_path / 'x.jsonl').read_text().splitlines())
    assert header == about | {'rewritten': 2 / 3} and steps == recorder.steps
    ids = [None] * 4
    for k, step in enumerate(steps):
        for new in step['new']:
            assert ids[new['i']] != new['id']
            ids[new['i']] = new['id']
        assert ids == step['ids'] and step['step'] == k


# The command line

CHARS = '\n\x1b[abAB m语'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run whose vocabulary holds ESC, a newline and a wide character."""
    folder = tmp_path_factory.mktemp('run')
    model = tiny_model(V=len(CHARS) + 1, T=400, pos='rope')
    shape = {k: v for k, v in vars(model.config).items() if k not in ('vocab_size', 'causal')}
    meta = {'tokenizer': {'kind': 'char', 'chars': CHARS}, 'vocab_size': len(CHARS),
            'mask_id': len(CHARS), 'eos_id': None, 'sep_id': None, 'pad_id': None}
    torch.save({'model': model.state_dict(), 'optimizer': [], 'meta': meta, 'iter': 7,
                'config': shape | {'objective': 'mdm'}, 'rng': 0, 'best': 1.5}, folder / 'ckpt.pt')
    return folder


def command(run, *words):
    return [sys.executable, str(REPOSITORY / 'sample.py'), f'--out_dir={run}', '--steps=12', *words]


def in_terminal(words, rows=24, columns=80):
    """What a program writes to a terminal of that size, and its exit status."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', rows, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ('COLUMNS', 'LINES')}
    process = subprocess.Popen(words, stdout=theirs, stderr=theirs, stdin=theirs, env=env)
    os.close(theirs)
    written = b''
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # nobody holds the other end any more
            part = b''
        if not part:
            break
        written += part
    os.close(ours)
    return written.decode().replace('\r\n', '\n'), process.wait()


@pytest.mark.parametrize('gen_length, start', [(60, 'aba '), (400, '')])
def test_watch_draws_over_itself(run, gen_length, start):
    """24 x 80: no frame is larger, none lets a token move the cursor, each begins at the last."""
    words = ('--watch', f'--gen_length={gen_length}', f'--start={start}')
    written, status = in_terminal(command(run, *words))
    assert status == 0
    before, *frames = written.split('\x1b[?25l')
    assert before == '' and 5 < len(frames) <= 12
    last = None
    for k, frame in enumerate(frames, 1):
        drawn, shown_again, after = frame.partition('\x1b[?25h')
        assert shown_again and (after == '' or k == len(frames))
        up = re.match(r'\x1b\[(\d+)A', drawn)
        assert (up is None) == (last is None) and (up is None or int(up[1]) == last)
        drawn = drawn[up.end() if up else 0:]
        assert drawn.endswith('\n\x1b[J')
        lines = drawn[:-len('\x1b[J')].split('\n')[:-1]
        last = len(lines)
        assert last <= 23 and all(line.startswith('\x1b[2K') for line in lines)
        plain = [re.sub(r'\x1b\[(2K|m|38;5;\d+m)', '', line) for line in lines]
        for text in plain:
            assert text.isprintable(), 'an ESC of the text came through'
            assert len(text) + text.count('语') <= 79
        found = re.fullmatch(rf'step {k}, pass (\d+), (\d+) masks left', plain[-1])
        assert found and lines[-1] == '\x1b[2K' + plain[-1]
        if gen_length == 60:
            assert ''.join(plain[:-1]).count('█') == int(found[2])
            assert lines[0].startswith('\x1b[2Kaba ')  # given: plain
    assert f'\x1b[38;5;{sample.MASK_256}m█\x1b[m' in frames[0]
    colors = re.findall(r'38;5;(\d+)m', frames[-1].partition('\x1b[?25h')[0])
    assert len(set(colors)) > 4 and set(map(int, colors)) <= set(sample.RAMP_256)


def test_watch_in_a_pipe_is_a_line_per_step(run):
    env = os.environ | {'COLUMNS': '50'}
    done = subprocess.run(command(run, '--watch', '--gen_length=30', '--decoder=ancestral'),
                          capture_output=True, env=env, encoding='utf-8')
    lines = [line for line in done.stdout.split('\n') if line.startswith('pass ')]
    assert 5 < len(lines) <= 12 and done.stderr == ''
    left = []
    for k, line in enumerate(lines, 1):
        found = re.fullmatch(rf'pass {k}: (\d+) masks left \| (.*)', line)
        assert found and line.isprintable() and len(line) <= 50
        left.append(int(found[1]))
    assert left == sorted(left, reverse=True) and left[-1] == 0
    assert any('⏎' in line for line in lines) and '█' in lines[0] and '█' not in lines[-1]


@pytest.mark.parametrize('terminal', [False, True])
def test_watch_shows_how_uniform_noise_settles(monkeypatch, capsys, terminal):
    """How many tokens each step changed; those of a step that changed few are the lightest."""
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: terminal)
    monkeypatch.setattr(sample, 'WATCH_DELAY', 0)
    x = torch.tensor([[MASK] * 12])
    recorder = Recorder(x[0].tolist(), LETTERS, MASK, sample.Screen())
    decoded(decode_uniform, MODELS['mdm'], x, steps=12, generator=noise_source(), on_step=recorder)
    out = capsys.readouterr().out
    changed = [12, *(int(n) for n in re.findall(r'(\d+) tokens changed', out))]
    assert changed == [len(step['new']) for step in recorder.steps[1:]]
    if not terminal:
        lines = [f'pass {k}: {recorder.progress(k)} | {"".join("abcdefgh"[i] for i in step["ids"])}'
                 for k, step in enumerate(recorder.steps) if k]
        assert out.splitlines() == lines
        return
    came = [max(k for k, step in enumerate(recorder.steps) if any(n['i'] == i for n in step['new']))
            for i in range(12)]
    colors = [sample.RAMP_256[round(9 * (1 - changed[k - 1] / 12))] for k in came]
    shown = [int(color) for color in re.findall(r'38;5;(\d+)m', out.split('\x1b[?25l')[-1])]
    assert shown == colors and len(set(colors)) > 2


@pytest.mark.parametrize('ending', ['gif', 'png', 'html', 'jsonl'])
def test_save_writes_by_the_extension(run, tmp_path, ending):
    path = tmp_path / f'x.{ending}'
    done = subprocess.run(command(run, '--gen_length=9', f'--save={path}'), capture_output=True)
    assert done.returncode == 0 and done.stderr == b''
    begin = {'gif': b'GIF89a', 'png': b'\x89PNG', 'html': b'<!doctype html>', 'jsonl': b'{"title'}
    assert path.read_bytes().startswith(begin[ending])


@pytest.mark.parametrize('name, says', [
    ('x.mp4', "error: save is '{}', but it must be a file "
     'ending in one of .gif, .png, .html, .jsonl, in a folder that is there'),
    ('no/folder/x.gif', "error: save is '{}', but it must be a file "
     'ending in one of .gif, .png, .html, .jsonl, in a folder that is there')])
def test_what_cannot_be_saved_is_said_in_one_line(run, tmp_path, name, says):
    path = tmp_path / name
    done = subprocess.run(command(run, '--gen_length=9', f'--save={path}'), capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stderr == says.format(path) + '\n'
    assert list(tmp_path.iterdir()) == []
