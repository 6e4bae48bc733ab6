"""eval.py: its numbers recomputed by hand, its tables parsed, its refusals."""

import itertools
import json
import math
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run, run_alone
from sacrebleu import corpus_bleu, corpus_chrf
from test_model import enumerated_nelbo, tiny, tokens
from test_sample import BOOK, META, Counting, Phrasebook, encoded, row_run, row_settings

import eval as evaluation
import prepare as data
import sample
from config import UserError
from model import ModelConfig, flops_per_token, load_checkpoint, load_model, make_objective
from prepare import load_meta, load_split, load_tokenizer, prepare

ROOT = Path(__file__).parents[1]
IN_REPORT = ['curves', 'likelihood', 'order', 'generation', 'infill', 'recover', 'speed']
TEXT = '\n'.join(f'The {a} {b} the {c}.' for a in ('cat', 'old king', 'rose') for b in
                 ('sees', 'forgets') for c in ('moon', 'wind', 'song', 'crown', 'owl')) + '\n'
TRAIN = ['--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=16', '--batch_size=8',
         '--max_iters=30', '--eval_interval=30', '--warmup_iters=2', '--dtype=float32']


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A folder with the runs out/ar and out/mdm on one data set, and out/other on another."""
    folder = tmp_path_factory.mktemp('runs')
    for name, text, objectives in (('verse', TEXT, ('ar', 'mdm')), ('abc', 'abc ' * 99, ('ar',))):
        (folder / f'{name}.txt').write_text(text)
        assert run('prepare.py', f'{name}.txt', cwd=folder).returncode == 0
        for objective in objectives:
            out = objective if name == 'verse' else 'other'
            done = run('train.py', *TRAIN, f'--dataset={name}', f'--objective={objective}',
                       f'--out_dir=out/{out}', cwd=folder)
            assert done.returncode == 0, done.stderr
    return folder


def table(text):
    """The rows of a Markdown table as dicts."""
    lines = [[cell.strip() for cell in line.strip('|').split('|')]
             for line in text.splitlines() if line.startswith('|')]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def test_likelihood_of_both_kinds(runs, monkeypatch):
    done = run_alone('eval.py', '--out_dir=out/ar,out/mdm', '--repeats=20', '--target_se=0',
               cwd=runs)
    assert done.returncode == 0, done.stderr
    ar, mdm = table(done.stdout)
    assert (ar['measured'], ar['s.e.'], mdm['measured']) == ('nll', 'exact', 'nelbo')
    assert mdm['bits/token'].startswith('<= ') and not ar['bits/token'].startswith('<')
    assert ar['parameters'] == mdm['parameters']
    assert 'eval.py --out_dir=out/ar,out/mdm' in done.stdout and 'verse.txt' in done.stdout

    monkeypatch.chdir(runs)  # the exact number again, by another path: window after window
    model = load_model(load_checkpoint('out/ar'), 'cpu')
    data, nats = torch.from_numpy(load_split('verse', 'val').astype(np.int64)), 0.0
    with torch.no_grad():
        for x in data.split(16):
            logits = model(torch.cat([torch.tensor([model.mask_id]), x[:-1]])[None])[0]
            nats += F.cross_entropy(logits, x, reduction='sum').item()
    nats /= len(data)
    assert float(ar['nats/token']) == pytest.approx(nats, abs=1e-4)
    assert float(ar['bits/char']) == pytest.approx(nats / math.log(2), abs=1e-4)
    assert float(ar['perplexity']) == pytest.approx(math.exp(nats), abs=1e-2)
    # and the bound by the plain Monte Carlo estimate of its definition, at levels of its own
    model = load_model(load_checkpoint('out/mdm'), 'cpu')
    generator = torch.Generator().manual_seed(7)
    n = len(data) // 16 * 16
    draws = np.zeros(2000)
    with torch.no_grad():
        for x in (data[:n].view(-1, 16), data[n:][None]):
            for i in range(len(draws)):
                t = torch.rand(len(x), 1, generator=generator)
                is_mask = torch.rand(x.shape, generator=generator) < t
                logp = model(torch.where(is_mask, model.mask_id, x)).log_softmax(-1)
                nll = -logp.gather(-1, x[..., None])[..., 0]
                draws[i] += (torch.where(is_mask, nll, 0.0) / t).sum().item() / len(data)
    error = math.hypot(draws.std() / len(draws) ** 0.5, float(mdm['s.e.']))
    assert float(mdm['nats/token'][3:]) == pytest.approx(draws.mean(), abs=4 * error)
    assert error < 0.05


def test_generation_counts_words(runs):
    words = ['--out_dir=out/ar,out/mdm', '--task=generation', '--gen_tokens=100']
    done = run('eval.py', *words, cwd=runs)
    assert done.returncode == 0, done.stderr
    held_out, ar, mdm = table(done.stdout)
    assert (ar['run'], mdm['run'], held_out['run']) == ('ar', 'mdm', 'validation text')
    assert ar['tokens'] == mdm['tokens'] == '112', 'whole texts of 16 tokens'
    assert all(0 < float(row['nll under ar']) < 5 for row in (held_out, ar, mdm))
    assert ar['nfe'] == '16.0' and 1 <= float(mdm['nfe']) <= sample.steps
    again = table(run('eval.py', *words, cwd=runs).stdout)
    for row, same in zip((held_out, ar, mdm), again):
        assert {**row, 'tokens/s': '', 'ms/pass': ''} == {**same, 'tokens/s': '', 'ms/pass': ''}


def test_curves_are_drawn(runs):
    done = run('eval.py', '--out_dir=out/ar,out/mdm', '--task=curves', '--report_dir=r', cwd=runs)
    assert done.returncode == 0, done.stderr
    assert (runs / 'r/curves.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    shutil.copytree(runs / 'out/ar', runs / 'out/ar_2', dirs_exist_ok=True)
    saved = json.loads((runs / 'out/ar/config.json').read_text())
    (runs / 'out/ar_2/config.json').write_text(json.dumps(saved | {'seed': 2}))
    done = run('eval.py', '--out_dir=out/ar,out/ar_2', '--task=curves', '--report_dir=r', cwd=runs)
    assert '| ar (2 seeds) |' in done.stdout


def test_what_is_counted():
    texts, ids = ["The cat's cat, zzz", 'the THE!'], [[1, 1, 2, 3], [1, 2]]
    row = evaluation.text_row('x', texts, ids, {'the', "cat's", 'cat'})
    assert row['known words (%)'] == pytest.approx(500 / 6) and row['tokens'] == 6
    p = np.array([3, 2, 1]) / 6
    assert row['unigram entropy (bits)'] == pytest.approx(-(p * np.log2(p)).sum())
    assert row['distinct-1'] == pytest.approx(4 / 6)
    # the cat's, cat's cat, cat zzz; the the. Nowhere does zzz stand before the
    row = evaluation.text_row('x', texts * 2, ids * 2, set())
    assert row['distinct-2'] == pytest.approx(4 / 8)
    assert row['distinct-3'] == pytest.approx(2 / 4)


def test_tables_are_markdown():
    assert evaluation.markdown([{'a': 'x', 'b': 1}, {'a': 'long', 'b': 22}]) == (
        '| a    |  b |\n|------|---:|\n| x    |  1 |\n| long | 22 |')
    bound = evaluation.Number(1.25, bound=True, spread=0.5)
    assert evaluation.markdown([{'a': bound, 'curve': [1, 2]}]).splitlines()[-1] == \
        '| <= 1.250 +- 0.500 |'


def test_a_picture_shows_names_with_dollar_signs_as_they_are(tmp_path):
    """'a$^$' would be mathematics, and none that matplotlib can read. An axis keeps its own."""
    fig, (ax,) = evaluation.panels(1)
    ax.plot([1e-3, 1e3], [1, 2], label='a$^$')
    ax.set(xscale='log', title='b$^$', ylabel='nll under c$^$')
    evaluation.save_figure(fig, tmp_path / 'x.png')
    assert fig.legends[0].get_texts()[0].get_text() == 'a$^$'
    assert ax.get_xticklabels()[0].get_parse_math(), '10 to the power of -3'


def test_lines_of_a_picture_differ():
    _, (ax,) = evaluation.panels(1)
    lines = [ax.plot([0, 1])[0] for _ in range(80)]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 80
    (ring,) = ax.plot(0, 0, 'o', color=lines[0].get_color())  # what has its own style takes none
    assert ax.plot(0)[0].get_color() == evaluation.COLORS[80 % len(evaluation.COLORS)]


@pytest.mark.parametrize('words, said', [
    (['--out_dir=out/nowhere'], 'is not a run'), (['--task=sing'], 'likelihood, order'),
    (['--out_dir=out/ar,out/ar'], 'of the same name'),
    (['--out_dir=out/ar,out/ar', '--task=curves'], 'of the same name'),
    (['--out_dir=out/nowhere', '--task=curves'], 'is not a run'),
    (['--out_dir=out/ar,out/other', '--task=generation'], 'cannot be compared'),
    (['--split=test'], "split is 'test', not one of train"),
    (['--repeats=1'], 'repeats is 1'),
    (['--judge=out/mdm', '--task=generation'], 'must be an ar run'),
    (['--decoder=ar', '--task=generation', '--gen_tokens=20'], "decoder is 'ar', not one of auto"),
    (['--taks=x'], 'did you mean task'),
    (['--steps=0', '--task=generation', '--gen_tokens=20'], 'steps is 0'),
    (['--max_rows=-1'], 'max_rows is -1'), (['--length_quantile=1.5'], 'length_quantile is 1.5'),
    (['--grid_steps=()', '--task=speed'], 'grid_steps is ()'),
    (['--block_length=8', '--task=speed'], 'block_length is 8, but it must be 0: there are rows'),
    (['--grid_steps=(4.5,)', '--task=speed'], 'grid_steps is (4.5,)'),
    (['--discrete_steps=(4.5,)'], 'discrete_steps is (4.5,)'),
    (['--answer_steps=()', '--task=length'], 'answer_steps is ()'),
    (["--answer_steps=(1, 'x')", '--task=translation'], "answer_steps is (1, 'x')"),
    (['--gen_length=0', '--task=order'], 'gen_length is 0'),
    (['--data=verse.txt', '--task=order'], "data is 'verse.txt', but it must be '' for other"),
    (['--data=nothing'], 'there is no data/nothing/meta.json'),
    (['--data=verse.txt,odd.txt'], "odd.txt has 3 characters that ar does not know, '#' 'é'"),
    (['--data=empty.txt'], "data is 'empty.txt', but it must be a text that is not empty"),
    (['--task=infill', '--decoder=nonsense'], "decoder is 'nonsense', not one of auto, remdm"),
    (['--task=infill', '--save_texts=nowhere/x.jsonl'], 'No such file'),
    (['--task=infill', '--save_texts=out'], 'Is a directory'),
    (['--file=verse.txt'], "file is 'verse.txt', but it must be '' for other"),
    (['--file=verse.txt', '--task=length'], "file is 'verse.txt', but it must be '' for other"),
    (['--report_dir=full'], 'Is a directory'),
    (['--save_texts=x.jsonl'], "save_texts is 'x.jsonl', but it must be '' for other tasks")])
def test_bad_input_is_one_line(runs, words, said):
    (runs / 'odd.txt').write_text('The cat# é#', encoding='utf-8')
    (runs / 'empty.txt').write_text('<|endoftext|>')
    (runs / 'full/report.md').mkdir(parents=True, exist_ok=True)
    done = run('eval.py', '--out_dir=out/ar,out/mdm', *words, cwd=runs)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith('error: ') and said in lines[-1], done.stderr
    assert 'Traceback' not in done.stderr


def test_a_run_on_data_that_have_changed_is_refused(runs):
    path = runs / 'data/verse/meta.json'
    whole = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(whole) | {'sha256': 'another'}))
        done = run('eval.py', '--out_dir=out/ar', cwd=runs)
        assert done.returncode == 2 and re.search('is not what ar was trained on', done.stderr)
        path.write_text(json.dumps(json.loads(whole) | {'source': 'the same, from elsewhere'}))
        done = run('eval.py', '--out_dir=out/ar', '--task=curves', '--report_dir=moved', cwd=runs)
        assert done.returncode == 0, done.stderr
        done = run('train.py', '--out_dir=out/ar', '--resume', '--bench=1', cwd=runs)
        assert done.returncode == 0, done.stderr
    finally:
        path.write_text(whole)


def test_speed_has_a_row_for_every_decoder_and_a_picture(runs):
    done = run('eval.py', '--out_dir=out/ar,out/mdm', '--task=speed', '--gen_tokens=32',
               '--report_dir=out/speed', cwd=runs)
    assert done.returncode == 0, done.stderr
    real, ar, *mdm = table(done.stdout)
    assert real['run'] == 'validation text' and real['nfe'] == ''
    assert (ar['decoder'], ar['nfe']) == ('ar', '16.0'), 'one pass a token'
    assert [row['setting'] for row in mdm if row['decoder'] == 'remask'] == \
        ['steps=4', 'steps=8', 'steps=16']
    for row in mdm:
        value = row['setting'].removeprefix('steps=')
        if row['decoder'] in ('confidence', 'in blocks', 'in blocks, cached'):
            assert row['nfe'] == f'{value}.0'
        assert 1 <= float(row['nfe']) <= 16 and float(row['ms/pass']) > 0
        assert float(row['nll under ar']) > 0 and 'distinct-2' in row
    picture = (runs / 'out/speed/speed.png').read_bytes()
    assert picture[:8] == b'\x89PNG\r\n\x1a\n' and len(picture) > 10_000


def test_speed_leaves_out_the_cache_that_guidance_cannot_have(runs):
    done = run('eval.py', '--out_dir=out/ar,out/mdm', '--task=speed', '--gen_tokens=16',
               '--grid_steps=(8,)', '--guidance=1', cwd=runs)
    assert done.returncode == 0, done.stderr
    decoders = [row['decoder'] for row in table(done.stdout)]
    assert 'in blocks' in decoders and 'in blocks, cached' not in decoders


def test_the_best_weights_of_seeds_are_one_row_after_however_many_updates(runs):
    checkpoint = load_checkpoint(runs / 'out/ar')
    for seed, updates in ((1, 10), (2, 30)):
        folder = runs / f'out/best_{seed}'
        folder.mkdir()
        settings = checkpoint['config'] | {'seed': seed, 'out_dir': str(folder)}
        torch.save(checkpoint | {'config': settings, 'iter': updates}, folder / 'best.pt')
    done = run('eval.py', '--out_dir=out/best_1,out/best_2', '--ckpt=best', cwd=runs)
    (row,) = table(done.stdout)
    assert (row['run'], row['updates']) == ('best_1 (2 seeds)', '20 +- 14')


def test_a_config_file_wins_over_the_defaults_of_a_task(runs):
    (runs / 'more.py').write_text('gen_tokens = 48\n')
    done = run('eval.py', 'more.py', '--out_dir=out/ar', '--task=speed', '--device=cpu', cwd=runs)
    assert done.returncode == 0, done.stderr
    assert 'gen_tokens 48;' in done.stdout


def test_reversal_asks_for_facts_as_stated_and_turned(tmp_path, monkeypatch):
    """The model is one that knows by heart every sentence of its text, and no other."""
    monkeypatch.chdir(tmp_path)
    meta = prepare('reversal')
    tokenizer = load_tokenizer(meta)
    lines = set(Path('data/downloads/reversal.txt').read_text().split('\n'))

    def complete(run, canvases, how):
        assert how['temperature'] == 0 and how['decoder'] == 'confidence' and how['steps'] == 0
        done = []
        for canvas in canvases:
            text = sample.text_of(canvas, tokenizer, meta['mask_id']).strip()
            assert text.count(sample.MASK_SHOWN) > 5
            pattern = re.compile(re.escape(text).replace(sample.MASK_SHOWN, '.'))
            known = [line for line in lines if pattern.fullmatch(line)]
            text = known[0] if known else text.replace(sample.MASK_SHOWN, 'a')
            done.append((tokenizer.encode(f'\n{text}\n'), {}))
        return done, None

    monkeypatch.setattr(sample, 'complete', complete)
    model = SimpleNamespace(mask_id=meta['mask_id'])
    run_ = row_run(model, meta, dataset='reversal', batch_size=1, predict_pad=False)
    (row,), note = evaluation.reversal([run_], {'cleanup': False})
    texts = row.pop('texts')
    assert list(row.values()) == ['run', 100, 100, 100, 0]
    assert [text['score'] for text in texts] == [100] * 500 + [0] * 100
    assert all((text['written'] == text['right']) == bool(text['score']) for text in texts)
    assert note.startswith('200 facts, 100 of them')


def test_reversal_needs_facts(runs):
    done = run('eval.py', '--out_dir=out/ar', '--task=reversal', cwd=runs)
    assert done.returncode == 2 and 'prepare.py reversal' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
# Translation

LEVELS = ROOT / 'data' / 'levels.en-fr.tsv'
WRONG = {'ab': 'ba', 'abc': 'cab d', 'h': '', 'a b a': 'aa aa', 'dd': 'hh hhhh', 'g g g g': 'fe'}
HOW = {'batch_size': 4, 'answer_steps': (2, 20), 'max_rows': 0, 'file': 'book.tsv'}


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A folder with BOOK as book.tsv, two levels of three lines each."""
    monkeypatch.chdir(tmp_path)
    lines = [f'level {1 + i // 3}\t{a}\t{b}\n' for i, (a, b) in enumerate(BOOK.items())]
    Path('book.tsv').write_text(''.join(lines) + '\n')
    return tmp_path


def defaults(**settings):
    """The settings of eval.py, those of decoding among them."""
    names = evaluation.config.names_of(vars(evaluation))
    return sample.defaults() | {name: vars(evaluation)[name] for name in names} | settings


def translated(answers, objective='mdm', **settings):
    return evaluation.translation([row_run(Phrasebook(answers), objective=objective)],
                                  defaults(**HOW | settings))


@pytest.mark.parametrize('objective, settings, ways', [
    ('ar', {'length_candidates': 5}, [('ar', '', '')]),
    ('mdm', {}, [('confidence', 'full', n) for n in (2, 20)]),
    ('mdm', {'length': 'reference, full', 'answer_steps': (3,)},
     [('confidence', name, 3) for name in ('reference (oracle)', 'full')]),
    ('mdm', {'decoder': 'threshold', 'block_length': 2}, [('threshold', 'full', '')])])
def test_who_knows_the_answers_has_full_marks(book, objective, settings, ways):
    rows, note = translated(BOOK, objective, **settings)
    assert [(row['decoder'], row['length'], row['steps']) for row in rows] == ways
    for row in rows:
        assert [row[key] for key in ('chrF', 'ROUGE-1', 'ROUGE-L')] == pytest.approx([100] * 3)
        assert (row['length ratio'], row['no EOS'], row['empty']) == (1, 0, 0)
        references = [*BOOK.values()]
        assert row['BLEU'] == pytest.approx(corpus_bleu(references, [references]).score, abs=5e-3)
    assert '6 prompts' in note and 'nrefs:1|case:mixed' in note


def test_scores_are_those_of_their_definitions(book):
    """BLEU and chrF by sacrebleu's own functions; ROUGE-1 by counting; and all texts are kept."""
    (row,), _ = translated(WRONG, 'ar', save_texts='x.jsonl')
    written, references = list(WRONG.values()), list(BOOK.values())
    assert float(row['BLEU']) == pytest.approx(corpus_bleu(written, [references]).score, abs=5e-3)
    assert float(row['chrF']) == pytest.approx(corpus_chrf(written, [references]).score, abs=5e-3)
    for level, part in (('level 1', slice(0, 3)), ('level 2', slice(3, 6))):
        bleu = corpus_bleu(written[part], [references[part]]).score
        assert float(row[f'BLEU {level}']) == pytest.approx(bleu, abs=5e-3)
    f1 = []
    for a, b in zip(map(str.split, written), map(str.split, references)):
        common = sum((Counter(a) & Counter(b)).values())
        f1.append(2 * common / (len(a) + len(b)))
    assert float(row['ROUGE-1']) == pytest.approx(100 * np.mean(f1), abs=5e-3)
    ratios = [len(a) / len(b) for a, b in zip(written, references)]
    assert float(row['length ratio']) == pytest.approx(np.mean(ratios), abs=5e-4)
    assert row['empty'] == pytest.approx(1 / 6)
    assert [(text['given'], text['right'], text['written']) for text in row['texts']] == [
        (prompt, BOOK[prompt], answer) for prompt, answer in WRONG.items()]
    assert [text['score'] for text in row['texts']] == pytest.approx(
        [corpus_chrf([answer], [[BOOK[prompt]]]).score for prompt, answer in WRONG.items()])


def test_words_that_repeat_the_one_before_are_dropped_before_scoring(book):
    twice = {prompt: f'{answer} {answer}' for prompt, answer in BOOK.items()
             if ' ' not in answer and len(answer) < 4}
    Path('twice.tsv').write_text(''.join(f'{a}\t{BOOK[a]}\n' for a in twice))
    plain, clean = (translated(twice, 'ar', file='twice.tsv', cleanup=cleanup)[0][0]
                    for cleanup in (False, True))
    assert plain['chrF'] < 99 and clean['chrF'] == pytest.approx(100)


def test_answers_of_several_lengths_are_one_row(book):
    (row,), _ = translated(BOOK, length='reference', length_candidates=2, answer_steps=(3,))
    assert row['length'] == 'reference (oracle), best of 2'
    assert row['length ratio'] == pytest.approx(1, abs=0.4)


def test_an_answer_ended_if_there_was_room_behind_it_in_its_own_canvas():
    """The best of several may be wider than the one that fit asked for, by as much as it wrote."""
    meta = META | {'counts': {'train': {'answer_line': [0, 1]}}}  # one mask, whose answer is h EOS
    how = defaults(temperature=0.0, decoder='confidence', length_candidates=3)
    run_ = row_run(Counting({'a': 'h'}), meta, predict_pad=False)
    texts, figures, _ = evaluation.answers_of(run_, [('', 'a', 'h', *map(encoded, 'ah'))], how)
    assert texts == ['h'] and figures['no EOS'] == 0


def test_the_model_is_asked_the_ids_that_the_data_hold(monkeypatch):
    """And not those of their texts, which a tokenizer may write in other tokens."""
    asked, how = [], {'split': 'val', 'max_rows': 0, 'cleanup': False}
    monkeypatch.setattr(sample, 'answer', lambda run, prompts, settings, references: (
        asked.append([*prompts, *references]) or [[]], {}, None))
    monkeypatch.setattr(evaluation, 'data_of', lambda run: SimpleNamespace(
        pairs=lambda split, n: [([1], [2, 3])]))
    run_ = row_run()._replace(tokenizer=SimpleNamespace(decode=lambda ids: '[UNK]', encode=ord))
    evaluation.answers_of(run_, evaluation.row_pairs(run_, how), how)
    assert asked == [[[1], [2, 3]]]


def test_where_pad_is_eos_no_length_is_read_off_the_eos():
    for meta, names in ((META, ['full', 'fit', 'argmax', 'quantile']),
                        (META | {'pad_id': META['eos_id']}, ['full', 'fit'])):
        ways = evaluation.ways_to_know_length(row_run(meta=meta), defaults(length='auto'))
        assert [name for name, _, how in ways if not how['block_length']] == names


def test_french_words_stay_whole():
    score, _ = evaluation.make_score()
    assert score(["L'été à Évry"], ["l'été, À Évry !"])['ROUGE-L'] == pytest.approx(100)
    assert score(['un été'], ['un étang'])['ROUGE-1'] == pytest.approx(50)


def test_answers_that_do_not_end_are_counted(book):
    """12 masks and no EOS in them; and a prompt is not answered better for its reference."""
    endless = dict.fromkeys(BOOK, 'a' * 30)
    (row, _), _ = translated(endless, length='ratio', length_line=(0.0, 4.0))
    assert (row['no EOS'], row['nfe']) == (1, 2)
    assert float(row['length ratio']) == pytest.approx(np.mean([4 / len(b) for b in BOOK.values()]),
                                                       abs=5e-4)
    texts = []
    for answers in (BOOK, dict.fromkeys(BOOK, 'h'), dict.fromkeys(BOOK, 'hhh')):
        pairs = [('', *pair, *map(encoded, pair)) for pair in answers.items()]
        texts.append([evaluation.answers_of(row_run(Phrasebook(WRONG)), pairs, defaults(
            temperature=0.0, length=name, decoder='confidence'))[0]
            for name in ('full', 'ratio', 'reference')])
    assert texts[0][:2] == texts[1][:2] == texts[2][:2] and texts[1][2] != texts[2][2]


def test_files_have_two_columns_or_three(tmp_path):
    path = tmp_path / 'x.tsv'
    path.write_text('\ufeff a b \tc\r\n\nlevel\td\te f\n', 'utf-8', newline='')
    run = SimpleNamespace(tokenizer=SimpleNamespace(encode=str.split))
    assert evaluation.file_pairs(run, path) == [['', 'a b', 'c', ['a', 'b'], ['c']],
                                                ['level', 'd', 'e f', ['d'], ['e', 'f']]]
    levels = Counter(level for level, *_ in evaluation.file_pairs(run, LEVELS))
    assert levels == dict.fromkeys(('basics', 'grammar', 'compound', 'complex', 'literary'), 10)


@pytest.mark.parametrize('settings, said', [
    ({'file': 'nowhere.tsv'}, 'No such file'), ({'file': 'latin.tsv'}, 'not UTF-8 at byte 3'),
    ({'file': 'one.tsv'}, "has the line 'a': write (level TAB) prompt TAB answer"),
    ({'file': 'blank.tsv'}, 'is empty'), ({'file': 'gap.tsv'}, 'prompt TAB answer'),
    ({'length': 'full,long'}, "length is 'long'"),
    ({'length_candidates': 3}, 'length_candidates is 3')])
def test_what_cannot_be_translated(book, settings, said):
    for name, text in (('one', 'a\n'), ('blank', '\n\n'), ('gap', 'a\t \n')):
        Path(f'{name}.tsv').write_text(text)
    Path('latin.tsv').write_text('a\tb\u00e9\n', 'latin-1')
    with pytest.raises((UserError, OSError), match=re.escape(said)):
        translated(BOOK, **settings)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sacrebleu.metrics', None)
    with pytest.raises(UserError, match=r"sacrebleu.* is needed.*'\.\[eval\]'"):
        evaluation.make_score()


def test_a_run_on_rows_is_translated(tmp_path, monkeypatch):
    """From files to scores and their picture."""
    monkeypatch.chdir(tmp_path)
    pairs = [(f'{a} {b}', f'{b} {a}') for a in 'abcdefgh' for b in 'abcdefgh']
    for i, name in enumerate(('questions', 'answers')):
        Path(f'{name}.txt').write_text('\n'.join(pair[i] for pair in pairs) + '\n')
    prepare('turn', prompts='questions.txt', answers='answers.txt', tokenizer='char',
            max_prompt=9, max_answer=9)
    done = run('train.py', *TRAIN, '--dataset=turn', '--out_dir=out/turn', '--predict_pad',
               cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run('eval.py', '--task=translation', '--out_dir=out/turn', '--max_rows=3',
               '--length=full,reference', '--answer_steps=(1, 2)', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table_rows = table(done.stdout)
    assert [(row['length'], row['steps'], row['nfe']) for row in table_rows] == \
        [(name, n, f'{n}.0') for name in ('full', 'reference (oracle)') for n in '12']
    assert ('turn (questions.txt, answers.txt; tokens: char; context 16); 3 prompts of the split'
            in done.stdout)
    assert 'seed 1' in done.stdout and 'greedy True' in done.stdout
    assert Path('out/report/translation.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'


# ------------------------------------------------------------------------ the measurements' oracles


class Knowing(torch.nn.Module):
    """Puts nearly all probability on one text, wherever it is asked; with `sure` 0, on none."""

    def __init__(self, text, V, sure=30.0):
        super().__init__()
        self.config, self.mask_id = ModelConfig(V + 1, len(text)), V
        self.embed, self.device = torch.nn.Embedding(1, 1), torch.device('cpu')
        self.text, self.sure = torch.tensor(text), sure

    def forward(self, x, level=None, *, cache=None, where=None, hidden=False):
        h = F.one_hot(self.text, self.config.vocab_size).float() * self.sure
        h = h[:x.size(1)].expand(*x.shape, -1)  # the cache stays empty: all is read each time
        return h if hidden and where is None else self.logits(h[where])

    def logits(self, h):
        h = h.clone()
        h[..., self.mask_id] = -torch.inf
        return h

    def count_parameters(self):
        return 0


def a_run(model, objective, name='verse', **more):
    """A Run as load_runs has it, in the folder of the fixture `runs`."""
    settings = {'dataset': name, 'block_size': model.config.block_size, 'batch_size': 8,
                'predict_pad': False, 'seed': 1} | more
    return row_run(model, load_meta(name), objective=objective, **settings)._replace(name=objective)


@pytest.fixture
def settings(runs, monkeypatch):
    monkeypatch.chdir(runs)
    return defaults()


def test_a_blind_model_costs_log_v_in_every_unit(settings):
    V = load_meta('verse')['vocab_size']
    blind = Knowing([0] * 16, V, sure=0.0)
    rows, _ = evaluation.likelihood([a_run(blind, 'ar'), a_run(blind, 'mdm')],
                                    settings | {'split': 'train, val', 'discrete_steps': (1, 9)})
    counts = load_meta('verse')['counts']
    for row in rows:
        ratio = counts[row['split']]['tokens'] / counts[row['split']]['bytes']
        assert row['nats/token'] == pytest.approx(math.log(V))
        assert row['bits/token'] == pytest.approx(math.log2(V))
        assert row['bits/byte'] == pytest.approx(math.log2(V) * ratio)
        assert row['perplexity'] == pytest.approx(V, rel=1e-5)
        assert row['s.e.'] == 'exact' if row['run'] == 'ar' else row['s.e.'] < 1e-6
        for curve in {'by share', 'by position'} & set(row):
            assert row[curve] == pytest.approx([math.log(V)] * len(row[curve])) and row[curve]
    nelbos = ['nelbo', 'nelbo in 1 steps', 'nelbo in 9 steps']
    assert [(row['run'], row['split'], row['measured']) for row in rows] == [
        (run, split, measured) for run, of in (('ar', ['nll']), ('mdm', nelbos))
        for split in ('train', 'val') for measured in of]
    assert ['by share' in row for row in rows] == [
        row['split'] == 'val' and 'steps' not in row['measured'] for row in rows]


def test_the_pace_of_training_is_that_of_all_updates_whichever_weights_are_read(monkeypatch):
    log = {'iter': np.array([100.0, 300.0]), 'seconds': np.array([20.0, 60.0])}
    monkeypatch.setattr(evaluation, 'load_log', lambda path: (None, log))
    best = row_run()._replace(updates=100)  # of 300
    best.settings['gradient_accumulation_steps'] = 2
    assert evaluation.training_pace(best) == 2 * 300 / 60


def test_characters_and_bytes_are_counted_apart(runs, settings):
    (runs / 'accents.txt').write_text('h\u00e9 \u20ac!' * 60, encoding='utf-8')
    assert run('prepare.py', 'accents.txt', cwd=runs).returncode == 0
    blind = Knowing([0] * 6, 5, sure=0.0)
    (row,), _ = evaluation.likelihood([a_run(blind, 'ar', 'accents')], settings)
    assert row['bits/char'] == pytest.approx(math.log2(5))
    assert 1.5 * row['bits/byte'] < row['bits/char'] < 1.7 * row['bits/byte'], '5 in 8 bytes'
    assert row['evaluation batches/s'] > 0 and row['training batches/s'] == ''
    both, note = evaluation.likelihood([a_run(blind, 'ar', 'accents'), a_run(
        Knowing([0] * 16, load_meta('verse')['vocab_size'], 0.0), 'mdm')], settings)
    assert 'only bits per character or byte' in note and 'the texts differ' in note
    assert [row['data'] for row in both] == ['accents', 'verse']
    (runs / 'lines.txt').write_text(''.join(f'{i:04b}\n' for i in range(1000)))
    for name, more in (('tenth', []), ('half', ['--val_share=0.5'])):
        run('prepare.py', 'lines.txt', f'--name={name}', *more, cwd=runs)
    _, note = evaluation.likelihood([a_run(Knowing([0] * 16, 3, 0.0), 'ar', name)
                                     for name in ('tenth', 'half')], settings)
    assert 'the texts differ' in note, 'other splits of one file'


@pytest.mark.parametrize('text', ['abc ' * 33 + 'a', 'The cat\r\nsees.'])
def test_any_text_is_scored_in_a_runs_own_tokens(runs, settings, text):
    """Each window of 16 by itself, the last one shorter, against the model's own logits."""
    (runs / 'any.txt').write_text(text, encoding='utf-8', newline='')
    (run_,) = evaluation.load_runs('out/ar', 'cpu')
    kept = [char for char in text if char in TEXT]
    s = settings | {'data': 'any.txt', 'skip_unknown': True, 'split': 'val,train'}
    (row,), _ = evaluation.likelihood([run_], s)
    less = len(text) - len(kept)
    assert row['data'] == 'any.txt' + (f' less {less}' if less else '') and row['split'] == ''
    nats, ids = 0.0, run_.tokenizer.encode(''.join(kept))
    for i in range(0, len(ids), 16):
        x = torch.tensor(ids[i:i + 16])
        with torch.no_grad():
            logits = run_.model(torch.cat([torch.tensor([run_.model.mask_id]), x[:-1]])[None])[0]
        nats += F.cross_entropy(logits, x, reduction='sum').item()
    assert row['nats/token'] == pytest.approx(nats / len(ids), rel=1e-5)
    assert row['bits/byte'] == pytest.approx(nats / math.log(2) / len(''.join(kept).encode()))


def test_curves_by_share_and_by_position(settings, monkeypatch):
    monkeypatch.setattr(evaluation, 'nll_by_place',
                        lambda *args: torch.arange(16.)[:, None].expand(16, 5))
    found = evaluation.likelihood_curves(a_run(Knowing([0] * 16, 12), 'mdm'), 'val', settings)
    assert found == {'by share': [*range(16)], 'by position': [7.5] * 5}


def test_levels_of_the_curve_are_midpoints(settings, monkeypatch):
    levels = []
    monkeypatch.setattr(evaluation, 'token_nll', lambda model, x, is_mask, scored, t: (
        levels.append(t[0, 0].item()), torch.ones(x.shape))[1])
    evaluation.nll_by_place(a_run(Knowing([0] * 16, 12), 'mdm'), tokens(4, 16), 4, 1)
    assert len(levels) == 16 and np.mean(levels) == pytest.approx(0.5)


def test_curves_interpolate_at_the_end_of_the_first(abc):
    paths = [write_log(f'ar_{n}', n * 1e12, 2.0 / n, gradient_accumulation_steps=1) for n in (1, 2)]
    (a, b), _ = evaluation.curves([evaluation.load_log(path)[0] for path in paths], {})
    for row, at, last in ((a, 2.0, 2.0), (b, 1.5, 1.0)):  # the second has then done one half
        assert [v for k, v in row.items() if k.startswith('val at')] == pytest.approx([at, at])
        assert (row['last val'], row['best val']) == pytest.approx((last, last))
    assert (a['minutes'], b['minutes']) == pytest.approx((1e3 / 60, 2e3 / 60))


def test_costs_are_of_all_that_was_written(settings, monkeypatch):
    monkeypatch.setattr(sample, 'complete', lambda *args, **how: (
        [([1, META['sep_id'], 0], {'nfe': 4, 'ended': True})], (120, 6, 3.0)))
    cost = evaluation.write_texts(a_run(Knowing([0] * 16, 12), 'mdm'), settings)[2]
    assert cost == {'nfe': 4, 'tokens/s': 40, 'ms/pass': 500}
    figures = sample.answer(row_run(), [[1]], sample.defaults())[1]
    assert figures['sentences/s'] == pytest.approx(1 / 3)


def test_answers_are_greedy_or_sampled():
    for greedy, wanted in ((True, (0.0, 'confidence')), (False, (0.8, 'remdm'))):
        how = evaluation.ways_to_answer(row_run(), defaults(greedy=greedy, temperature=0.8))[0][2]
        assert (how['temperature'], how['decoder']) == wanted


def test_held_out_text_is_val(settings):
    _, ids, _ = evaluation.held_out(a_run(Knowing([0] * 16, 12), 'mdm'), settings)
    assert ids[0] == evaluation.load_split('verse', 'val')[:16].tolist()


def test_parts_are_weighted_by_their_share_and_so_are_their_errors(settings, monkeypatch):
    monkeypatch.setattr(evaluation, 'nll_or_bound', lambda *args: (8.0, 0.4, 3))
    run_ = a_run(Knowing([0] * 16, 12), 'd3pm', diffusion_steps=4)
    found = {row['part']: row for row in evaluation.parts([run_], settings)[0]}
    for part, share in (('last step', 0.25), ('other steps', 0.75), ('nelbo', 1)):
        assert (found[part]['nats/token'], found[part]['s.e.']) == pytest.approx(
            (8 * share, 0.4 * share))


def test_noise_of_a_part_is_of_tokens_whatever_the_schedule(settings):
    V = evaluation.load_meta('verse')['vocab_size']
    run_ = a_run(Knowing([0] * 16, V, sure=0.0), 'mdm', schedule='cosine')
    rows, _ = evaluation.parts([run_], settings | {'max_windows': 8, 'levels': (0.3,),
                                                   'repeats': 8, 'target_se': 0})
    assert rows[1]['nats/token'] == pytest.approx(math.log(V), abs=5 * rows[1]['s.e.'])


def test_uniform_is_told_the_share_of_wrong_tokens():
    class Spy:
        device, mask_id, config = 'cpu', 9, SimpleNamespace(vocab_size=10)

        def __call__(self, x, level, **how):
            self.level = level
            return torch.zeros(x.numel(), 10)

        def logits(self, h):
            return h

    spy = Spy()
    evaluation.token_by_token(row_run(spy, objective='uniform'), tokens(2, 5, 9), 0.2)
    torch.testing.assert_close(spy.level, torch.full((2, 1), 0.2))


def test_a_judge_reads_all_windows_and_runs_the_shortest(settings):
    V = evaluation.load_meta('verse')['vocab_size']
    long, short = (a_run(Knowing([0] * n, V, sure=0.0), 'ar') for n in (16, 8))
    assert evaluation.judged(long, long, ['x' * 40], [[1] * 40])['nll under ar'] == pytest.approx(
        math.log(V))
    assert evaluation.common_windows([long, short], settings).size(1) == 8


def test_only_networks_of_masked_diffusion_have_steps():
    for subs, objective, n in ((True, 'mdm', 3), (False, 'd3pm', 1), (True, 'block', 1)):
        run_ = row_run(SimpleNamespace(config=SimpleNamespace(subs=subs)), objective=objective)
        assert len(evaluation.objectives_of(run_, (1, 9))) == n


def test_a_text_that_the_tokenizer_rewrites_is_said_to_be(runs, monkeypatch):
    monkeypatch.chdir(runs)
    (run_,) = evaluation.load_runs('out/ar', 'cpu')
    (runs / 'some.txt').write_text('The cat sees the moon.\n' * 4)
    decode = run_.tokenizer.decode
    for lossy in (False, True):
        run_.tokenizer.decode = (lambda ids: decode(ids).lower()) if lossy else decode
        name, *_ = evaluation.foreign_text(run_, 'some.txt', '', {'skip_unknown': False})
        assert name == 'some.txt' + ' rewritten' * lossy


def test_a_text_of_no_tokens_is_refused(tmp_path, monkeypatch):
    """As one of blanks is, to tokenizers that leave them out."""
    monkeypatch.setattr(evaluation, 'data_of', lambda run: SimpleNamespace())
    run_ = SimpleNamespace(name='x', meta={'layout': 'stream', 'eos_id': None, 'tokenizer': {}},
                           tokenizer=SimpleNamespace(encode=lambda text: []))
    (tmp_path / 'blanks.txt').write_text(' \n ')
    with pytest.raises(UserError, match='a text that is not empty'):
        evaluation.foreign_text(run_, str(tmp_path / 'blanks.txt'), '', {'skip_unknown': False})


def test_other_data_are_scored_byte_by_byte_whatever_their_tokens(runs, settings):
    """Prepared as byte pairs, with EOTs; read by a run of characters and one of byte pairs."""
    text = ('The cat sees the moon.\n' + '<|endoftext|>The rose\n') * 40
    (runs / 'told.txt').write_text(text)
    pytest.importorskip('rustbpe')
    assert run('prepare.py', 'told.txt', '--tokenizer=bpe', '--vocab_size=270',
               cwd=runs).returncode == 0
    told = load_meta('told')
    blind = [a_run(Knowing([0] * 16, load_meta(name)['vocab_size'], 0.0), 'ar', name)
             for name in ('verse', 'told')]
    rows, note = evaluation.likelihood(blind, settings | {'data': 'told'})
    assert [row['data'] for row in rows] == ['told'] * 2
    assert 'only bits per character or byte' in note
    count = told['counts']['val']
    assert rows[0]['bits/byte'] == pytest.approx(math.log2(load_meta('verse')['vocab_size']))
    assert rows[1]['bits/byte'] == pytest.approx(
        math.log2(told['vocab_size']) * count['tokens'] / count['bytes'])
    assert count['tokens'] == len(load_split('told', 'val'))
    train, _ = evaluation.likelihood(blind[1:], settings | {'data': 'told', 'split': 'train',
                                                            'max_windows': 2})
    own, _ = evaluation.likelihood(blind[1:], settings | {'split': 'train', 'max_windows': 2})
    assert train[0]['nats/token'] == own[0]['nats/token']


def test_the_mean_of_the_curves_is_the_bound(settings):
    (run_,) = evaluation.load_runs('out/mdm', 'cpu')
    (row,), _ = evaluation.likelihood([run_], settings | {'repeats': 300, 'target_se': 0})
    x0 = evaluation.data_of(run_).windows('val', 16, 0)
    tables = [evaluation.nll_by_place(run_, x0, 16, seed) for seed in range(20)]
    mean = torch.stack(tables).nanmean(0).nanmean().item()
    assert mean == pytest.approx(row['nats/token'], abs=0.06)


def test_the_bound_in_one_step_is_the_cost_of_writing_all_at_once(settings):
    """From masks alone, each token by itself: nothing is drawn."""
    (run_,) = evaluation.load_runs('out/mdm', 'cpu')
    rows, _ = evaluation.likelihood([run_], settings | {'discrete_steps': (1,)})
    model = run_.model
    val, T, nats = load_split('verse', 'val'), model.config.block_size, 0.0
    for i in range(0, len(val), T):
        x0 = torch.tensor(val[i:i + T].astype(np.int64))[None]
        with torch.no_grad():
            logits = model(torch.full_like(x0, model.mask_id), torch.ones(1, 1))
        nats -= logits.double().log_softmax(-1).gather(2, x0[..., None]).sum().item()
    assert rows[1]['measured'] == 'nelbo in 1 steps' and rows[1]['s.e.'] < 1e-6
    assert rows[1]['nats/token'] == pytest.approx(nats / len(val), rel=1e-5)


def test_the_parts_of_a_bound(settings):
    """For a blind model in closed form; for one that has learned, the loss at a level by hand."""
    V = load_meta('verse')['vocab_size']
    s = settings | {'max_windows': 8, 'repeats': 40, 'target_se': 0, 'levels': (0.3, 1.0)}
    blind = [a_run(Knowing([0] * 16, V, sure=0.0), name, diffusion_steps=4)
             for name in ('ar', 'mdm', 'd3pm')]
    rows, _ = evaluation.parts(blind, s)
    wanted = {('d3pm', 'prior'): 0, ('d3pm', 'other steps'): 3 / 4, ('d3pm', 'last step'): 1 / 4}
    wanted |= {(name, part): 1 for name in ('mdm', 'd3pm')
               for part in ('nelbo', 'at 30% noise', 'at 100% noise')}
    found = {(row['run'], row['part']): row for row in rows}
    assert found.keys() == wanted.keys()
    for key, share in wanted.items():
        error = 0 if found[key]['s.e.'] == 'exact' else found[key]['s.e.']
        assert found[key]['nats/token'] == pytest.approx(share * math.log(V), abs=5 * error + 1e-5)
        assert error < 0.05 * math.log(V)
    (run_,) = evaluation.load_runs('out/mdm', 'cpu')
    (_, row, _), _ = evaluation.parts([run_], s)
    x0, rng = evaluation.data_of(run_).windows('val', 16, 8).repeat(200, 1), torch.Generator()
    is_mask = torch.rand(x0.shape, generator=rng.manual_seed(3)) < 0.3
    with torch.no_grad():
        logits = run_.model(torch.where(is_mask, run_.model.mask_id, x0))
    nll = F.cross_entropy(logits[is_mask], x0[is_mask]).item()
    assert row['nats/token'] == pytest.approx(nll, abs=5 * row['s.e.'] + 0.03)
    d3pm = make_objective({'objective': 'd3pm', 'diffusion_steps': 4})
    rows, _ = evaluation.parts([run_._replace(objective=d3pm)], s)
    found = {row['part']: row['nats/token'] for row in rows}
    assert found['other steps'] + found['last step'] == pytest.approx(
        found['nelbo'], abs=5 * max(row['s.e.'] for row in rows[1:]))


def test_noises_stand_beside_ar(runs, settings):
    both = evaluation.load_runs('out/ar,out/mdm', 'cpu')
    both[1].settings['time_cond'] = True
    s = settings | {'out_dir': 'out/ar,out/mdm', 'target_se': 0, 'repeats': 2}
    (ar, mdm), _ = evaluation.noises(both, s)
    found, _ = evaluation.likelihood(both, s)
    assert (ar['objective'], mdm['objective']) == ('ar', 'mdm with t')
    assert ar['over ar (%)'] == 0
    assert mdm['over ar (%)'] == pytest.approx(
        100 * (found[1]['bits/char'] / found[0]['bits/char'] - 1))
    evaluation.plot_noises([ar, mdm], runs / 'noises.png')
    assert (runs / 'noises.png').stat().st_size > 10_000


def test_draws_are_as_many_as_the_error_asks_for_and_it_is_true():
    """One draw spreads by 0.1 around 3."""
    values, found = iter(np.random.default_rng(0).normal(3, 0.1, 10 ** 6)), []
    for _ in range(300):
        drawn = []
        mean, error, n = evaluation.draw_until(0.02, 4, lambda k: drawn.append(next(values))
                                               or drawn[-1])
        assert n == len(drawn) >= 8 and mean == pytest.approx(np.mean(drawn))
        assert error == pytest.approx(np.std(drawn, ddof=1) / n ** 0.5)
        found.append((mean - 3, error, n))
    off, errors, counts = np.array(found).T
    assert 0.8 < np.mean(abs(off) < 2 * errors) < 0.97, 'of 8 draws 0.91 are'
    assert np.mean(off ** 2) ** 0.5 == pytest.approx(np.mean(errors), rel=0.25)
    assert np.mean(counts) == pytest.approx(25, rel=0.15)
    assert evaluation.draw_until(0, 3, lambda n: n)[2] == 3
    assert evaluation.draw_until(1e-9, 3, lambda n: n % 2)[2] == evaluation.MOST_DRAWS


def test_rows_cost_a_blind_model_log_v_for_all_that_it_scores(runs, settings):
    """EOS among it, and PAD with predict_pad: bits/char are of the answers' characters."""
    (runs / 'q.txt').write_text('ab\nabc\nc\n' * 20)
    (runs / 'a.txt').write_text('b\nca\nabcab\n' * 20)
    assert run('prepare.py', 'rows', '--prompts=q.txt', '--answers=a.txt', '--tokenizer=char',
               cwd=runs).returncode == 0
    meta = load_meta('rows')
    blind, count = Knowing([0] * meta['row_length'], meta['vocab_size'], 0.0), meta['counts']['val']
    for padded, scored in ((False, count['scored']), (True, count['rows'] * 6)):
        checkpoint = a_run(blind, 'mdm', 'rows', predict_pad=padded)
        (row,), _ = evaluation.likelihood([checkpoint], settings)
        assert row['nats/token'] == pytest.approx(math.log(meta['vocab_size']))
        assert row['bits/char'] == pytest.approx(
            math.log2(meta['vocab_size']) * scored / count['characters'])


def test_seeds_of_one_configuration_become_one_row():
    runs = [sample.Run(name, None, None, None, None, {
        'seed': seed, 'out_dir': name, 'n_embd': width, 'eval_interval': 10 * seed,
        'init_from': start}, 9, name)
            for name, seed, width, start in (('a', 1, 8, 'x'), ('b', 2, 8, 'y'), ('c', 1, 16, 'x'),
                                             ('d', 3, 8, 'z'), ('e', 4, 8, ''), ('f', 1, 8, 'y'))]
    rows = [{'run': name, 'split': split, 'nll': evaluation.Number(value, True), 'n': len(split),
             'texts': [f'text of {name}'], 'curve': [value, 0.0]}
            for split in ('train', 'val')
            for name, value in zip('abcdef', (1., 2., 5., 3., 9., 7.))]
    merged = evaluation.seeds_together(rows, runs)
    assert [(row['run'], row['split']) for row in merged] == [
        (name, split) for split in ('train', 'val') for name in ('a (3 seeds)', 'c', 'e', 'f')]
    assert f'{merged[0]["nll"]:.2f}' == '<= 2.00 +- 1.00'
    assert [row['n'] for row in merged] == [5] * 4 + [3] * 4, 'of one run and two rows, not seeds'
    assert (merged[0]['texts'], merged[0]['curve']) == (['text of a'], [2.0, 0.0])
    rows[1]['curve'] = [2.0]  # looked at less often: no mean of curves
    assert [row['run'] for row in evaluation.seeds_together(rows[:6], runs)] == [
        'a (2 seeds)', 'b', 'c', 'e', 'f']


def test_the_mean_over_orders_is_the_nelbo(settings):
    """By the table, for a model that has learned something; the orders apart by enumeration."""
    runs_ = evaluation.load_runs('out/ar,out/mdm', 'cpu')
    s = settings | {'gen_length': 3, 'max_windows': 5, 'repeats': 60, 'target_se': 0.01}
    rows, _ = evaluation.orders(runs_, s)
    found = {(row['run'], row['order']): row['nats/token'] for row in rows}
    model, x0 = runs_[1].model, evaluation.data_of(runs_[1]).windows('val', 3, 5)
    with torch.no_grad():
        by_hand = []
        for places in itertools.permutations(range(3)):
            nats = 0.0
            for i, place in enumerate(places):
                xt = x0.clone()
                xt[:, places[i:]] = model.mask_id
                nats -= model(xt).log_softmax(-1)[torch.arange(5), place, x0[:, place]].sum().item()
            by_hand.append(nats / x0.numel())
    assert found['mdm', 'left to right'] == pytest.approx(by_hand[0], abs=1e-4)
    assert found['mdm', 'right to left'] == pytest.approx(by_hand[-1], abs=1e-4)
    assert found['mdm', '60 random orders'] == pytest.approx(np.mean(by_hand), abs=0.02)
    assert found['mdm', 'all orders'] == pytest.approx(np.mean(by_hand), abs=0.04)
    assert found['ar', 'left to right'] == pytest.approx(
        runs_[0].objective.bound(runs_[0].model, x0, None).sum().item() / x0.numel(), abs=1e-4)


def test_the_mean_over_all_orders_is_the_bound():
    model = tiny(vocab_size=4, block_size=3, std=0.7)
    x0, orders = torch.tensor([0, 1, 2]), torch.tensor(list(itertools.permutations(range(3))))
    with torch.no_grad():
        nats = evaluation.ordered_nll(model, x0.expand(6, 3), orders)
        assert nats.mean().item() == pytest.approx(enumerated_nelbo(model, x0), abs=1e-5)
        xt, by_hand = torch.full((1, 3), 3), 0.0
        for i in (2, 0, 1):  # two cyclic steps: its inverse is another order
            by_hand -= model(xt)[0, i].log_softmax(-1)[x0[i]].item()
            xt[0, i] = x0[i]
        assert nats[orders.tolist().index([2, 0, 1])].item() == pytest.approx(by_hand, abs=1e-5)


def test_longest_copy_is_that_of_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(30):
        source = ''.join(rng.choice(list('ab\u20ac'), 200))
        texts = [''.join(rng.choice(list('ab\u20acd'), n, p=(0.4, 0.3, 0.2, 0.1)))
                 for n in rng.integers(0, 40, 3)]
        brute = max((j - i for text in texts for i in range(len(text))
                     for j in range(i + 1, len(text) + 1) if text[i:j] in source), default=0)
        assert evaluation.longest_copy(texts, source) == brute
    assert evaluation.longest_copy([source, 'x'], source) == 200, 'but not over the end of a text'
    assert evaluation.longest_copy(['q<|endoftext|>z'], 'a<|endoftext|>b') == 1, 'EOT is one token'


def test_who_knows_the_text_fills_it_in(settings):
    data = load_split('verse', 'val')
    text, V = data[:16].tolist(), load_meta('verse')['vocab_size']
    both = [a_run(Knowing(text, V), 'ar'), a_run(Knowing(text, V), 'mdm')]
    wide = settings | {'max_windows': 1, 'steps': 4}
    rows, _ = evaluation.infill(both, wide)
    common = Counter(load_split('verse', 'train').tolist()).most_common(1)[0][0]
    for row in rows:
        if row['run'] == 'most frequent token':
            assert row['accuracy (%)'] <= 100 * text.count(common) / 4
        else:
            assert row['accuracy (%)'] == 100 and row['ROUGE-1'] == row['ROUGE-L'] == 100
    sure = wide | {'decoder': 'threshold', 'threshold': 0.5}
    assert [row['nfe'] for row in evaluation.infill(both[1:], sure)[0]] == [0, 1] * 5, 'one pass'
    rows, _ = evaluation.recover([*both, a_run(Knowing(text, V), 'uniform')], wide)
    assert {row['run'] for row in rows} == {'ar', 'mdm', 'uniform'}
    assert all(row['accuracy (%)'] == row['found (%)'] == 100 for row in rows)
    assert {(row['found by'], row['precision (%)']) for row in rows} == {
        ('number', 100), ('threshold', 100)}, 'only replaced tokens are less likely than by chance'
    other = wide | {'split': 'train'}  # of which they know nothing
    assert any(row['accuracy (%)'] < 100 for row in evaluation.recover(both, other)[0])
    hidden = evaluation.hide((5, 64), 0.25, 8, torch.Generator().manual_seed(0))
    assert hidden.sum(1).tolist() == [16] * 5
    assert (hidden.view(5, 8, 8).float().mean(2) % 1 == 0).all(), 'whole spans'


def test_no_token_is_replaced_by_a_mask_inside_the_vocabulary(settings, monkeypatch):
    """As that of BERT is."""
    run_, given = a_run(Knowing([0] * 16, 12), 'mdm'), []
    run_.model.mask_id = 5
    monkeypatch.setattr(evaluation, 'token_by_token', lambda run, x, rate: torch.zeros(x.shape))
    monkeypatch.setattr(evaluation, 'fill', lambda run, x, where, s: given.append(x) or (x, 0))
    evaluation.recover([run_], settings)
    x0 = evaluation.common_windows([run_], settings)
    replaced = torch.stack([x[x != x0].bincount(minlength=6)[:6] for x in given]).sum(0)
    assert replaced[5] == 0 and (replaced[:5] > 0).all()


def test_tokens_less_likely_than_by_chance_are_suspects(settings, monkeypatch):
    """Which tokens are decoded anew, and what is counted of them; by a made-up score."""
    run_, asked = a_run(Knowing([0] * 16, 12), 'mdm'), []
    level = math.log(load_meta('verse')['vocab_size'])
    monkeypatch.setattr(evaluation, 'token_by_token',
                        lambda run, x, rate: level + torch.arange(16.).expand_as(x) - 12.5)
    monkeypatch.setattr(evaluation, 'fill', lambda run, x, where, s: asked.append(where) or (x, 0))
    rows, _ = evaluation.recover([run_], settings | {'max_windows': 3})
    assert all(where.sum(1).eq(max(1, round(16 * rate))).all() and where[:, -1].all()
               for where, rate in zip(asked[::2], (0.05, 0.1, 0.2)))
    assert all(torch.equal(where, (torch.arange(16) >= 13).expand(3, 16)) for where in asked[1::2])
    for row in rows:
        both = row['found (%)'] * max(1, round(16 * float(row['replaced'][:-1]) / 100)) * 3
        picked = {'number': max(1, round(16 * float(row['replaced'][:-1]) / 100)), 'threshold': 3}
        assert row['precision (%)'] * picked[row['found by']] * 3 == pytest.approx(both)


def test_texts_are_saved_as_lines(runs, monkeypatch):
    monkeypatch.chdir(runs)
    for words in (['--task=infill', '--steps=4'], ['--task=recover', '--steps=4'],
                  ['--task=generation', '--gen_tokens=20']):
        done = run('eval.py', '--out_dir=out/ar,out/mdm', *words, '--max_windows=2',
                   '--save_texts=x.jsonl', '--report_dir=texts', cwd=runs)
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (runs / 'x.jsonl').read_text('utf-8').splitlines()]
    assert not {'tokens', 'nfe', 'longest copy (chars)'} & {key for row in rows for key in row}
    count = Counter((row['task'], row['run']) for row in rows)
    assert count['infill', 'mdm'] == 5 * 2 and count['recover', 'ar'] == 3 * 2 * 2
    assert count['generation', 'ar'] == count['generation', 'validation text'] == 2
    training, held_out = (load_tokenizer(load_meta('verse')).decode(load_split('verse', split)
                          .tolist()) for split in ('train', 'val'))
    known = set(evaluation.words_of(training))
    for row in rows:
        assert len(row['written']) == 16
        if row['task'] == 'generation':
            words = evaluation.words_of(row['written'])
            assert row['score'] == pytest.approx(100 * np.mean([w in known for w in words]))
            continue
        assert row['right'] in held_out
        right = [a == b for a, b in zip(row['written'], row['right'])]
        if row['task'] == 'infill':  # what was given stays; the score is of what was not
            assert all(a in (b, sample.MASK_SHOWN) for a, b in zip(row['given'], row['right']))
            right = [ok for ok, a in zip(right, row['given']) if a == sample.MASK_SHOWN]
        else:
            assert sum(a != b for a, b in zip(row['corrupted'], row['right'])) == max(
                1, round(16 * float(row['replaced'][:-1]) / 100))
        assert row['score'] == pytest.approx(100 * np.mean(right))
    report = json.loads((runs / 'texts/report.json').read_text())
    assert not any('texts' in row for section in report.values() for row in section['rows'])


def test_a_fraction_of_correct_tokens_is_counted(settings):
    x0 = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    x = torch.tensor([[1, 2, 0, 0], [1, 0, 3, 0]])
    where = torch.tensor([[True, True, True, False], [False, False, True, True]])
    found = evaluation.accuracy(a_run(Knowing([0], 5), 'ar'), x, x0, where, given=x0)
    assert [text['score'] for text in found['texts']] == pytest.approx([200 / 3, 50])
    assert found['accuracy (%)'] == pytest.approx((200 / 3 + 50) / 2)
    assert found['s.e. (%)'] == pytest.approx((200 / 3 - 50) / 2)


def taken_for(objective):
    """The run out/mdm as if it had another objective, and a log; in out/<objective>, too."""
    shutil.copytree('out/mdm', f'out/{objective}', dirs_exist_ok=True)
    checkpoint = load_checkpoint('out/mdm')
    checkpoint['config']['objective'] = objective
    torch.save(checkpoint, f'out/{objective}/ckpt.pt')
    return evaluation.load_runs(f'out/{objective}', 'cpu')[0]


@pytest.mark.parametrize('text', ['null', '[1]', '{"curves": {"markdown": "x"}}', '{"a": 1', ''])
def test_a_report_of_another_shape_is_made_anew(tmp_path, text):
    section = {'markdown': 'a table', 'command': '', 'rows': [], 'settings': {'out_dir': 'out/x'}}
    (tmp_path / 'report.json').write_text(text)
    evaluation.save_report({'parts': section}, tmp_path)
    assert json.loads((tmp_path / 'report.json').read_text()) == {'parts': section}
    evaluation.save_report({'order': section}, tmp_path)
    assert list(json.loads((tmp_path / 'report.json').read_text())) == ['parts', 'order']
    evaluation.save_report({'curves': section | {'rows': [{'a': math.nan, 'b': [math.inf]}]}},
                           tmp_path)
    text = (tmp_path / 'report.json').read_text()
    assert 'NaN' not in text and 'Infinity' not in text, 'no JSON'
    assert json.loads(text)['curves']['rows'] == [{'a': None, 'b': [None]}]


def test_words_are_known_by_the_longest_training_text_of_any_run(settings):
    whole, part = (a_run(Knowing([0] * 16, 40), 'mdm', train_tokens=n) for n in (0, 90))
    text = evaluation.training_text([part, whole])
    assert len(evaluation.training_text([part])) == 90 < len(text)
    assert text == evaluation.training_text([whole, part]) == evaluation.training_text([whole])


def test_an_eot_is_no_word_and_no_characters(settings):
    assert evaluation.words_of("The owl's.<|endoftext|>Hoot") == ['the', "owl's", 'hoot']
    V, sizes = load_meta('verse')['vocab_size'], []
    judge, run_ = (a_run(Knowing([0] * 16, V, sure=0.0), 'ar') for _ in range(2))
    other = judge._replace(meta=judge.meta | {'eos_id': 0}, tokenizer=SimpleNamespace(
        encode=lambda text: [1] * 8))
    judged = evaluation.judged(other, run_, ['The<|endoftext|>cat.'], [[1] * 8])
    assert judged['nats/char under ar'] == pytest.approx(8 / 7 * math.log(V))
    other = other._replace(objective=SimpleNamespace(bound=lambda model, x0, rng: (
        sizes.append(len(x0)), torch.zeros(len(x0)))[1]))
    evaluation.judged(other, run_, ['The cat.'] * 5, [[1] * 8] * 5, batch_size=2)
    assert sorted(sizes) == [1, 2, 2]


def test_curves_of_several_data_sets_say_so(settings):
    runs = [evaluation.load_log(f'out/{name}')[0] for name in ('ar', 'mdm', 'other')]
    assert evaluation.curves(runs[:2], settings)[1] == ''
    assert 'cannot be compared' in evaluation.curves(runs, settings)[1]


def test_a_judge_with_another_eos_reads_texts(settings):
    """As its own tokens: the runs' EOS may be its mask, which it never predicts."""
    V = load_meta('verse')['vocab_size']
    judge, run_ = (a_run(Knowing([0] * 16, V, sure=0.0), 'ar') for _ in range(2))
    ids = [run_.tokenizer.encode('The cat')]
    assert evaluation.judged(judge, run_, ['The cat'], ids)['nll under ar'] == pytest.approx(
        math.log(V))
    other = judge._replace(meta=judge.meta | {'eos_id': 0}, tokenizer=SimpleNamespace(
        encode=lambda text: [1] * (2 * len(text))))  # two tokens for each character
    assert evaluation.judged(other, run_, ['The cat'], ids) == {
        'nats/char under ar': pytest.approx(2 * math.log(V)),
        'perplexity under ar': pytest.approx(V)}


def test_points_of_speed_have_a_step_for_each_block():
    """Fewer steps are one for each block, and so the same texts: only one such point is kept."""
    model = SimpleNamespace(config=SimpleNamespace(block_size=16))
    for objective, least in (('block', 4), ('mdm', 1), ('uniform', None)):
        run_ = row_run(model, objective=objective, block_length=4)
        points = evaluation.decoders_of(run_, (1, 2, 4, 8, 16, 32), 0.0)
        steps = {}
        for name, _, how in points:
            steps.setdefault(name, []).append(how.get('steps'))
        if least is None:
            assert steps == {'uniform': [1, 2, 4, 8, 16, 32]}
            continue
        assert steps['ancestral'] == [n for n in (1, 2, 4, 8, 16) if n >= least]
        assert objective == 'block' or steps['in blocks'] == [8, 16]


def test_a_damaged_config_json_is_no_run(runs, tmp_path):
    shutil.copytree(runs / 'out/mdm', tmp_path / 'x')
    for text in ('[1]', '{}', 'null'):
        (tmp_path / 'x/config.json').write_text(text)
        with pytest.raises(UserError, match='no whole log.csv and config.json'):
            evaluation.load_log(tmp_path / 'x')


def test_a_report_leaves_out_what_a_task_cannot_say(settings, runs):
    taken_for('d3pm')
    words = ['--out_dir=out/d3pm', '--gen_tokens=16', '--gen_length=4', '--max_windows=2',
             '--grid_steps=(2,)', '--repeats=2', '--target_se=0', '--report_dir=d3pm']
    done = run('eval.py', *words, '--task=order', cwd=runs)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'task order' in done.stderr
    done = run('eval.py', *words, '--task=report', cwd=runs)
    assert done.returncode == 0, done.stderr
    assert 'Left out: task order has nothing to say' in done.stdout
    assert list(json.loads((runs / 'd3pm/report.json').read_text())) == \
        [task for task in IN_REPORT if task != 'order']


def test_a_judge_of_hugging_face(settings, runs):
    """A tiny random GPT-2 against its own loss, by the character, through our windows."""
    transformers = pytest.importorskip('transformers')
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    vocabulary = {'<s>': 0, '?': 1} | {c: i for i, c in enumerate(sorted(set(TEXT)), 2)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token='?'))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token='<s>') \
        .save_pretrained(runs / 'gpt')
    torch.manual_seed(0)
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(vocabulary), n_positions=32, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=0)).eval()
    gpt.save_pretrained(runs / 'gpt')
    judge = evaluation.load_judge([], settings | {'judge': str(runs / 'gpt'), 'device': 'cpu'})
    (run_,) = evaluation.load_runs('out/mdm', 'cpu')
    texts, nats = [TEXT[:32], TEXT[40:50]], 0.0
    for text in texts:
        ids = torch.tensor([[0, *(vocabulary[c] for c in text)]])[:, :32]  # its 32 positions
        with torch.no_grad():
            logits = gpt(ids).logits[0].log_softmax(-1)
        target = torch.tensor([vocabulary[c] for c in text])
        nats -= logits[torch.arange(len(text)), target].sum().item()
    assert evaluation.judged(judge, run_, texts, [[1]]) == {
        'nats/char under gpt': pytest.approx(nats / 42, rel=1e-5),
        'perplexity under gpt': pytest.approx(math.exp(nats / 42), rel=1e-4)}
    with pytest.raises(UserError, match='cannot be loaded'):
        evaluation.load_judge([], settings | {'judge': str(runs / 'no_gpt'), 'device': 'cpu'})
    torch.manual_seed(0)
    transformers.BertLMHeadModel(transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, initializer_range=1.0)).save_pretrained(runs / 'bert')
    shutil.copy(runs / 'gpt/tokenizer.json', runs / 'bert')
    shutil.copy(runs / 'gpt/tokenizer_config.json', runs / 'bert')
    with pytest.raises(UserError, match='sees the tokens that it scores'):
        evaluation.load_judge([], settings | {'judge': f'hf:{runs / "bert"}', 'device': 'cpu'})


def test_report_is_one_page(runs):
    small = ['--gen_tokens=32', '--gen_length=4', '--max_windows=2', '--grid_steps=(2,4)',
             '--target_se=0', '--steps=4', '--report_dir=page']
    done = run('eval.py', '--out_dir=out/ar,out/mdm', '--task=report', *small, cwd=runs)
    assert done.returncode == 0, done.stderr
    page = (runs / 'page/report.md').read_text()
    numbers = json.loads((runs / 'page/report.json').read_text())
    assert list(numbers) == IN_REPORT
    for name, section in numbers.items():
        assert section['markdown'] in page and f'## {name}\n' in page
        assert section['settings']['steps'] == 4, 'what the user says comes before what suits'
    ar, mdm = (next(row for row in numbers['likelihood']['rows'] if row['run'] == name and
                    row['split'] == 'val') for name in ('ar', 'mdm'))
    assert f'<= {mdm["nats/token"]:.4f}' in page and ar['s.e.'] == 'exact'
    for picture in re.findall(r'\((\w+\.png)\)', page):
        assert (runs / 'page' / picture).read_bytes()[:4] == b'\x89PNG'
    assert page.count('.png)') == 3 and 'is given the number of wrong tokens' in page


def test_epochs_are_those_of_the_tokens_that_were_trained_on(runs, settings):
    run_, _ = evaluation.load_log('out/ar')
    (row,), _ = evaluation.curves([run_], settings)
    n = load_meta('verse')['counts']['train']['tokens']
    assert row['epochs'] == pytest.approx(30 * 8 * 16 / n) and row['at epoch'] == row['epochs']
    assert row['x: tokens'] == [30 * 8 * 16 / 1e6] and 'x: epochs' not in row
    scarce = run_._replace(settings=run_.settings | {'train_tokens': 100})
    rows, _ = evaluation.curves([run_, scarce], settings)
    assert [row['x: epochs'] for row in rows] == [
        [pytest.approx(30 * 8 * 16 / text)] for text in (n, 100)]
    assert 'epochs.png' in evaluation.plot_curves(rows, runs / 'epochs.png')
    assert (runs / 'epochs.png').stat().st_size > 10_000


@pytest.mark.parametrize('word, share', [('--row_share=1.0', 1), ('--row_share=0.5', 0.5),
                                         ('--predict_pad', 1),
                                         ('--predict_pad --random_length=1.0', 1),
                                         ('--predict_pad --pad_curriculum=99', 1)])
def test_train_and_curves_count_the_same_epochs(runs, settings, monkeypatch, word, share):
    """Of rows, an epoch has no PAD unless PAD is predicted, and only the rows that are kept."""
    monkeypatch.chdir(runs)
    pairs = [('x' * (1 + i % 3), 'y' * (1 + i % 5)) for i in range(100)]
    Path('xy.csv').write_text('a,b\n' + ''.join(f'{a},{b}\n' for a, b in pairs))
    prepare('xy.csv', fields='a,b')
    rows = sorted(len(a + b) for a, b in pairs[:90])[:int(90 * share)]
    if '--predict_pad' in word:
        rows = [len(a) + 5 for a, _ in pairs[:90]]
    size = 4 if ' ' in word else 99  # of the small batches some have no answer of the longest
    n = sum(math.ceil(rows_of / size) for rows_of in Counter(rows).values())  # batches of an epoch
    done = run('train.py', *TRAIN, '--dataset=xy', *word.split(), '--epochs=3',
               f'--batch_size={size}', '--out_dir=out/xy', '--overwrite', cwd=runs)
    assert f'{3 * n} updates = 3.0 epochs' in done.stdout, done.stderr + done.stdout
    run_, log = evaluation.load_log('out/xy')
    tokens = 3 * sum(width + 2 for width in rows)  # with SEP and EOS
    assert log['tokens'][-1] < tokens if ' ' in word else log['tokens'][-1] == tokens
    (row,), _ = evaluation.curves([run_], settings)
    assert row['epochs'] == pytest.approx(3)


# Loss over training compute


def write_log(name, C, loss, seed=1, **settings):
    """out/<name> as train.py leaves it, without weights: a run of C FLOPs that ends at `loss`."""
    settings = dict(dataset='abc', block_size=16, batch_size=8, predict_pad=False, n_layer=1,
                    n_head=2, n_embd=32, mask_range=[0.15, 0.99], max_iters=100, seed=seed,
                    objective=name.split('_')[0]) | settings
    tokens = C / flops_per_token(settings, data.open_run_data(settings))
    folder = Path('out', name)
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(settings))
    measured = 'nll' if settings['objective'] == 'ar' else 'nelbo <='
    (folder / 'log.csv').write_text('iter,tokens,measured,val,seconds\n' + ''.join(
        f'{i},{tokens * i / 100},{measured},{loss + 1 - i / 100},{C / 1e9 * i / 100}\n'
        for i in (0, 50, 100)))
    return f'out/{name}'


def scaling_of(paths, name='scaling'):
    runs = [evaluation.load_log(path)[0] for path in paths]
    settings = {'seed': 1, 'report_dir': 'r', 'out_dir': ','.join(paths), 'ckpt': 'last'}
    return evaluation.run_task(name, runs, settings, '...')


@pytest.fixture
def abc(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('abc.txt').write_text('abc ' * 99)
    prepare('abc.txt')
    Path('r').mkdir()


def test_scaling_fits_each_length_of_blocks_by_itself(abc):
    paths = [write_log(f'block_{n}_{k}', C, 3 - k / 4 - n / 9, block_length=n)
             for n in (4, 8) for k, C in enumerate((1e13, 2e13))]
    assert [row['group'] for row in scaling_of(paths)['rows']][-2:] == [
        'block 4, n_conv 0', 'block 8, n_conv 0']


@pytest.mark.parametrize('L_inf, n_budgets, n_seeds', [(1.2, 5, 3), (0.0, 3, 3), (0.0, 2, 1)])
def test_scaling_recovers_a_known_law_and_how_much_more_compute_a_group_needs(
        abc, L_inf, n_budgets, n_seeds):
    """MDM needs seven times the compute of AR; exactly, and with the noise of seeds."""
    rng = np.random.default_rng(0)
    for noise in (0.0, 0.01)[:n_seeds]:
        paths = [write_log(f'{group}_{noise}_{k}_{seed}', C, rng.normal(
                     L_inf + 0.3 * (C / 1e15 / times) ** -0.25, noise), seed, max_iters=100)
                 for group, times in (('ar', 1), ('mdm', 7))
                 for k, C in enumerate(np.geomspace(6e12, 1e14, n_budgets))
                 for seed in range(n_seeds)]
        section = scaling_of(paths)
        ar, mdm = (row for row in section['rows'] if row['run'] == 'fit')
        assert (ar['group'], mdm['group']) == ('ar, n_conv 0', 'mdm, n_conv 0')
        truth = {'L_inf': L_inf, 'b': 0.25, 'times': 7.0, 'a': 0.3 * 7 ** 0.25}
        for name, true in truth.items():
            error = mdm[name].spread or 0.0
            assert mdm[name] == pytest.approx(true, abs=4 * error if noise else 0.004 * true + 1e-3)
        if noise:
            assert 0.05 < mdm['times'].spread < 2
        if n_seeds == 1:  # as many parameters as runs
            assert mdm['times'].spread is None
        assert ar['times'] == 1 and mdm['val'] == max(min(ar['y']), min(mdm['y']))
        assert mdm['PFLOP'] == pytest.approx(max(mdm['x']), rel=0.2 if noise else 0.01)
        first = section['rows'][0]
        assert first['PFLOP'] == pytest.approx(6e-3) and first['seconds'] == pytest.approx(6e3)
        assert section['markdown'].count('| fit') == 2 and 'scaling.png' in section['markdown']
    assert Path('r/scaling.png').stat().st_size > 10_000


def test_a_law_falls_even_where_redrawn_losses_rise():
    """A single one that rose, with a < 0, made the error of the whole group nan."""
    C = np.array([1.0, 2, 4, 8, 16])
    floor, a, b = evaluation.power_law(C, np.array([1.2, 1.21, 1.23, 1.26, 1.3]), True)
    assert a > 0 and floor == pytest.approx(1.24), 'as flat as a falling law can be: the mean'
    floor, a, b = evaluation.power_law(C, 1.1 + 0.3 * C ** -0.5, True)
    assert (floor, a, b) == pytest.approx((1.1, 0.3, 0.5), rel=0.02)


def test_scaling_refuses_what_it_cannot_compare(abc):
    good = [write_log(f'ar_{k}', C, loss) for k, (C, loss) in enumerate(((1e12, 2.0), (4e12, 1.5)))]
    assert len(scaling_of(good)['rows']) == 3
    one = write_log('mdm_0', 1e12, 2.0)
    with pytest.raises(UserError, match='budgets of mdm, n_conv 0 is 1, but it must be 2 or more'):
        scaling_of([*good, one])
    with pytest.raises(UserError, match='falling losses'):
        scaling_of([*good, one, write_log('mdm_1', 4e12, 2.1)])
    with pytest.raises(UserError, match='out/ar_2.* finished'):
        scaling_of([*good, write_log('ar_2', 8e12, 1.3, max_iters=101)])
    Path('other.txt').write_text('xyz! ' * 99)
    prepare('other.txt')
    with pytest.raises(UserError, match='out/ar_3.* on the data'):
        scaling_of([*good, write_log('ar_3', 8e12, 1.3, dataset='other')])


# Length before decoding


def lengths_of_book(book, monkeypatch, objective='mdm', trained={}, **settings):
    """The rows, facts and probabilities of EOS of a model that knows the answers of `book`."""
    rows = []
    for prompt, reference in BOOK.items():
        ids = [*encoded(prompt), META['sep_id'], *encoded(reference), META['eos_id']]
        rows.append(ids + [META['pad_id']] * (META['row_length'] - len(ids)))
    model, found, eos_probabilities = Phrasebook(book), {}, evaluation.eos_probabilities
    model.device = torch.device('cpu')

    def watched(run, n, share, settings):
        found[share] = eos_probabilities(run, n, share, settings)
        return found[share]

    with monkeypatch.context() as patch:
        patch.setattr(data, 'load_split', lambda name, split: np.array(rows, np.uint16).ravel())
        patch.setattr(data, 'load_meta', lambda name: META)
        patch.setattr(evaluation, 'eos_probabilities', watched)
        run_ = row_run(model, objective=objective, dataset='rows', batch_size=4, **trained)
        rows, facts = evaluation.lengths([run_], defaults(**HOW | {'file': ''} | settings))
    return rows, facts, found


def test_bounds_are_measured_as_by_hand(book, monkeypatch):
    rows, note, _ = lengths_of_book(BOOK, monkeypatch)
    assert [row['length'] for row in rows] == ['full', 'fit', 'argmax', 'quantile',
                                               'full, in blocks']
    by_name = {row['length']: row for row in rows}
    n = np.array([len(reference) + 1 for reference in BOOK.values()])
    widths = {'full': [8] * 6, 'argmax': [4, 8, 2, 8, 4, 4],
              'fit': [min(round(1.5 * len(p) + 1.2), 19 - len(p)) for p in BOOK]}
    for name, masks in widths.items():
        row, masks = by_name[name], np.array(masks)
        fits = masks >= n
        assert row['fits (%)'] == pytest.approx(100 * fits.mean())
        assert row['too long by'] == pytest.approx(
            np.mean([m - k for m, k in zip(masks, n) if m >= k]))
        assert (row['masks'], row['saved']) == pytest.approx((masks.mean(), (8 - masks).mean()))
        rmse = 0 if name == 'argmax' else np.sqrt(np.mean((masks - n) ** 2))
        assert row['RMSE'] == pytest.approx(rmse, abs=1e-6)
        references = [*BOOK.values()]
        if name != 'fit':
            best = corpus_bleu(references, [references]).score
            assert row['BLEU'] == pytest.approx(best, abs=5e-3)
        assert float(row['ms/sentence']) > 0 and row['steps'] == 20
    (ratio,), _, _ = lengths_of_book(BOOK, monkeypatch, length='ratio')
    share = np.mean([int(1.3 * len(a)) + 2 > len(b) for a, b in BOOK.items()])
    assert ratio['fits (%)'] == pytest.approx(100 * share) and 0 < share < 1
    lone, _, _ = lengths_of_book(BOOK, monkeypatch, batch_size=1)
    how = row_settings(steps=20)
    for name in ('full', 'argmax'):
        passes = [sample.decode_batch(row_run(), [[*encoded(prompt), 10] + [12] * n], how, 9)[1]
                  for prompt, n in zip(BOOK, widths[name])]
        nfe = next(row['nfe'] for row in lone if row['length'] == name)
        assert nfe == pytest.approx(np.mean(passes) + (name == 'argmax')), 'one for the length'
    assert '6 prompts' in note


def test_answers_do_not_fit_into_lengths_that_are_too_short(book, monkeypatch):
    """A model that believes all answers to be of one letter."""
    rows, _, _ = lengths_of_book(dict.fromkeys(BOOK, 'h'), monkeypatch, length='argmax')
    assert [row['length'] for row in rows] == ['argmax']
    n = np.array([len(reference) + 1 for reference in BOOK.values()])
    assert rows[0]['fits (%)'] == pytest.approx(100 * np.mean(n <= 2)) and rows[0]['masks'] == 2
    assert rows[0]['RMSE'] == pytest.approx(np.sqrt(np.mean((n - 2) ** 2)))


def test_ar_and_runs_without_a_window_have_their_rows(book, monkeypatch):
    (row,), _, found = lengths_of_book(BOOK, monkeypatch, 'ar')
    assert (row['length'], row['fits (%)'], row['RMSE'], found) == ('', '', '', {})
    assert float(row['ms/sentence']) > 0 and float(row['nfe']) > 0
    (row,), _, found = lengths_of_book(BOOK, monkeypatch, trained={'predict_pad': False})
    assert (row['length'], found) == ('fit', {})
    rows, _, found = lengths_of_book(BOOK, monkeypatch, 'uniform')  # it reads no masks
    assert ([row['length'] for row in rows], found) == (['full', 'fit'], {})


def test_probabilities_of_an_eos_stand_at_their_distance_from_the_end(book, monkeypatch, tmp_path):
    """Of one who knows, and of one who believes that all answers have one letter."""
    _, facts, found = lengths_of_book(BOOK, monkeypatch)
    shares = ['25', '50', '75', '100']
    assert all(f'{share}% of the window masked: EOS found 100.0%' in facts
               for share in shares)
    for correct, mean in found.values():
        assert correct == 1 and mean[0] > 0.99
        assert all(p < 1e-3 for away, p in mean.items() if away != 0)
    n = [len(reference) + 1 for reference in BOOK.values()]
    rows, _, found = lengths_of_book(dict.fromkeys(BOOK, 'h'), monkeypatch)
    correct, mean = found[1.0]
    assert correct == np.mean([k == 2 for k in n])
    assert list(mean) == list(range(1 - max(n), 8 - min(n) + 1)), 'the whole window'
    for away, p in mean.items():
        at = [k + away == 2 for k in n if 1 <= k + away <= 8]
        assert p == pytest.approx(np.mean(at), abs=1e-2)
    evaluation.plot_length(rows, tmp_path / 'length.png')
    picture = (tmp_path / 'length.png').read_bytes()
    assert picture[:8] == b'\x89PNG\r\n\x1a\n' and len(picture) > 10_000


@pytest.mark.parametrize('settings, trained, said', [
    ({'length_candidates': 2}, {}, '1 for task=length'),
    ({'length': 'regress'}, {}, 'no such head'),
    ({'length': 'argmax'}, {'predict_pad': False}, 'train with predict_pad')])
def test_lengths_that_cannot_be_measured(book, monkeypatch, settings, trained, said):
    with pytest.raises(UserError, match=re.escape(said)):
        lengths_of_book(BOOK, monkeypatch, trained=trained, **settings)


def test_a_stream_has_no_lengths(runs):
    done = run('eval.py', '--out_dir=out/mdm', '--task=length', cwd=runs)
    assert done.returncode == 2 and "task (for stream) is 'length', not one of" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
