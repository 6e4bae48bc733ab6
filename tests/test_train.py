"""train.py as a user runs it: real subprocesses, every configuration, every refusal."""

import copy
import csv
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROSE, run, run_alone, save_hub_model
from matplotlib.figure import Figure

import config
import prepare
import train as script
from config import UserError
from model import OBJECTIVES, MaskedDiffusion, ModelConfig, Noised, Objective, Transformer, \
    evaluate, load_checkpoint, load_model, model_config, noise_level

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p for p in (ROOT / 'config').glob('*.py')
                 if p.name != '__init__.py' and not p.name.startswith('length_'))
TINY = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4',
        '--max_iters=6', '--eval_interval=3', '--warmup_iters=2', '--device=cpu',
        '--log_interval=1', '--dataset=verse', '--eval_repeats=2', '--compile=off',
        '--dtype=float32']  # what auto takes depends on the CPU: the comparisons must not
# sentences in many orders, so that there is something to learn and nothing is repeated exactly
VERSE = '\n'.join(f'The {a} {b} the {c}.' for a in ('cat', 'old king', 'rose', 'night', 'sea')
                  for b in ('sees', 'loves', 'forgets', 'calls') for c in
                  ('moon', 'wind', 'song', 'stone', 'crown', 'river', 'owl', 'snow')) + '\n'


SAVE_FIGURE = Figure.savefig


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing loss.png takes longer than all else that a tiny run does. What it shows has a test of
    its own, and runs in processes of their own do draw it."""
    monkeypatch.setattr(Figure, 'savefig', lambda figure, path, dpi: None)


@pytest.fixture(scope='module')
def verse(tmp_path_factory):
    """A folder with the prepared data set `verse`; copied by the tests that break it."""
    folder = tmp_path_factory.mktemp('verse')
    (folder / 'verse.txt').write_text(VERSE)
    done = run('prepare.py', 'verse.txt', cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def train(folder, *words):
    """What train.py prints."""
    done = run('train.py', *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_one_line(done, *said):
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith('error: '), done.stderr
    for words in said:
        assert words in lines[0], lines[0]


def weights(out_dir):
    return load_checkpoint(out_dir)['model']


def log_without_times(out_dir, name='log.csv'):
    with open(out_dir / name, newline='') as f:
        return [{k: v for k, v in row.items() if 'second' not in k} for row in csv.DictReader(f)]


@pytest.mark.parametrize('objective', ['ar', 'mdm'])
def test_a_run_leaves_what_it_promises(verse, objective):
    words = [*TINY, f'--objective={objective}', f'--out_dir=out/{objective}']
    done = run_alone('train.py', *words, cwd=verse)
    assert done.returncode == 0, done.stderr
    out = verse / 'out' / objective
    assert {p.name for p in out.iterdir()} == {'ckpt.pt', 'config.json', 'log.csv', 'steps.csv',
                                               'loss.png'}
    assert (out / 'loss.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    rows = log_without_times(out)
    assert [int(row['iter']) for row in rows] == [0, 3, 6]
    V = json.loads((verse / 'data/verse/meta.json').read_text())['vocab_size']
    assert float(rows[0]['val']) == pytest.approx(math.log(V), abs=1e-4), 'uniform at first'
    assert float(rows[-1]['val']) < float(rows[0]['val']) - 0.1
    assert all(row['data'] == 'verse.txt' for row in rows), 'the source of the data stays with them'
    assert all(row['measured'] == {'ar': 'nll', 'mdm': 'nelbo <='}[objective] for row in rows)
    checkpoint = load_checkpoint(out)
    assert checkpoint['iter'] == 6 and checkpoint['config']['objective'] == objective
    assert checkpoint['best'] == pytest.approx(float(rows[-1]['val']), abs=1e-6)
    assert checkpoint['config'] == json.loads((out / 'config.json').read_text()) | {
        'mask_range': (0.15, 0.99)}  # JSON has no tuples
    for words in ('parameters', "log V' =", 'nats/token',
                  f'python sample.py --out_dir=out/{objective}',
                  f'python eval.py --out_dir=out/{objective}'):
        assert words in done.stdout


def test_epochs_are_as_many_updates(verse):
    """They are kept by a run that is resumed, unless it is told otherwise."""
    n = json.loads((verse / 'data/verse/meta.json').read_text())['counts']['train']['tokens']
    updates, twice = (round(epochs * n / (2 * 4 * 32)) for epochs in (0.25, 0.5))
    said = train(verse, *TINY, '--epochs=0.25', '--gradient_accumulation_steps=2',
                 '--out_dir=out/epochs')
    assert f'{updates} updates = {updates * 2 * 4 * 32 / n:.1f} epochs' in said
    checkpoint = load_checkpoint(verse / 'out/epochs')
    assert checkpoint['iter'] == checkpoint['config']['max_iters'] == updates > 3
    for word, until in (('--seed=1337', updates), (f'--max_iters={updates + 1}', updates + 1),
                        ('--epochs=0.5', twice)):
        train(verse, '--out_dir=out/epochs', '--resume', word)
        assert load_checkpoint(verse / 'out/epochs')['iter'] == until
    assert ' 1 updates = ' in train(verse, *TINY, '--epochs=0.001', '--out_dir=out/one')


def test_training_learns_the_text(verse):
    """The bound falls well below the entropy of single characters, so context is used.

    On the training text: the validation split is 13 windows, too few to tell seeds from bugs.
    """
    train(verse, *TINY, '--out_dir=out/learned', '--max_iters=600', '--eval_interval=600',
          '--batch_size=8', '--warmup_iters=20')
    p = np.bincount(np.fromfile(verse / 'data/verse/train.bin', np.uint16))
    p = p[p > 0] / p.sum()
    nelbo = float(log_without_times(verse / 'out/learned')[-1]['train'])
    assert nelbo < -(p * np.log(p)).sum() - 0.25


@pytest.mark.parametrize('words', [
    ['--objective=ar', '--dropout=0.1', '--attn_dropout=0.1', '--gradient_accumulation_steps=2'],
    ['--objective=mdm', '--optimizer=adamw', '--lr_schedule=wsd', '--weight_decay=0.1'],
    ['--objective=d3pm', '--subs=False', '--time_cond', '--diffusion_steps=10'],
    ['--objective=uniform', '--time_cond', '--schedule=cosine'],
    ['--objective=block', '--block_length=5']])
def test_resumed_runs_end_in_the_same_bits(verse, words):
    """Also of a run that was killed after a checkpoint, with rows of the log behind it."""
    whole, parts = verse / 'out/whole', verse / 'out/parts'
    train(verse, *TINY, *words, '--out_dir=out/whole', '--overwrite')
    shutil.rmtree(parts, ignore_errors=True)
    code = ('import os, runpy, sys, torch; sys.argv = sys.argv[1:]; save, done = torch.save, []\n'
            'def once(*a):\n'
            '    if len(done) == 2: os.kill(os.getpid(), 9)\n'  # at the third checkpoint
            '    done.append(save(*a))\n'
            'torch.save = once; runpy.run_path(sys.argv[0], run_name="__main__")')
    killed = subprocess.run([sys.executable, '-c', code, ROOT / 'train.py', *TINY, *words,
                             '--out_dir=out/parts'], cwd=verse, capture_output=True,
                            env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    assert load_checkpoint(parts)['iter'] == 3 and len(log_without_times(parts)) == 3
    assert len(log_without_times(parts, 'steps.csv')) == 6
    with open(parts / 'steps.csv', 'a') as f:
        f.write('7,89')  # as if it had been killed while it wrote
    train(verse, '--out_dir=out/parts', '--resume')
    for name in ('log.csv', 'steps.csv'):
        assert log_without_times(parts, name) == log_without_times(whole, name)
    a, b = weights(whole), weights(parts)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    if words[0] not in ('--objective=ar', '--objective=mdm'):
        return
    sample = ['--gen_length=20', '--device=cpu']
    texts = [run('sample.py', f'--out_dir={d}', *sample, cwd=verse).stdout for d in (whole, parts)]
    assert texts[0].splitlines()[:-1] == texts[1].splitlines()[:-1] != []


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(verse, number):
    out = verse / f'out/{number.name}'
    words = [sys.executable, ROOT / 'train.py', *TINY, f'--out_dir={out}', '--max_iters=100000',
             '--eval_interval=100000']
    with subprocess.Popen(words, cwd=verse, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, env=os.environ | {'PYTHONUNBUFFERED': '1'}) as process:
        for line in process.stdout:  # it trains once it reports a loss
            if 'minutes left' in line:
                process.send_signal(number)
                break
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert f'python train.py --out_dir={out} --resume' in said
    saved = load_checkpoint(out)['iter']
    assert saved >= 1
    done = run('train.py', f'--out_dir={out}', '--resume', f'--max_iters={saved + 2}', cwd=verse)
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(out)['iter'] == saved + 2


def rates_of(max_iters, warmup_iters, lr_schedule):
    return types.SimpleNamespace(max_iters=max_iters, warmup_iters=warmup_iters,
                                 lr_schedule=lr_schedule)


def test_steps_have_the_rates_and_tokens_of_their_updates(verse):
    """Of every second update."""
    words = [*TINY, '--log_interval=2', '--lr_schedule=cosine', '--out_dir=out/steps']
    for optimizer, rates in (('muon', {'lr_muon': 0.02, 'lr_adamw': 6e-3}),
                             ('adamw', {'lr_adamw': 6e-3})):
        train(verse, *words, f'--optimizer={optimizer}', '--overwrite')
        rows = log_without_times(verse / 'out/steps', 'steps.csv')
        assert [(int(row['iter']), int(row['tokens'])) for row in rows] == [
            (n, n * 4 * 32) for n in (2, 4, 6)]
        assert rows[0].keys() == {'iter', 'tokens', 'weighted_loss', 'gradient_norm', *rates}
        for row in rows:
            factor = script.lr_factor(rates_of(6, 2, 'cosine'), int(row['iter']) - 1)
            for name, peak in rates.items():
                assert float(row[name]) == pytest.approx(factor * peak, rel=1e-5)
    path = verse / 'out/steps/steps.csv'
    path.unlink()  # older runs have none
    train(verse, '--out_dir=out/steps', '--resume', '--max_iters=8')
    assert [row['iter'] for row in log_without_times(path.parent, 'steps.csv')] == ['8']
    path.write_text(path.read_text().replace('8,', '?,', 1))
    assert_one_line(run('train.py', '--out_dir=out/steps', '--resume', cwd=verse), 'steps.csv is')


def test_the_best_weights_are_kept(verse, monkeypatch):
    """Those of 3 updates, by losses that are made up: they fall, rise and stay."""
    losses = iter([4.0, 0, 3.0, 0, 3.5, 0, 3.0, 0, 0])  # validation, training, ..., and at the end
    monkeypatch.setattr('model.evaluate', lambda *args, **options: (next(losses), math.nan))
    train(verse, *TINY, '--max_iters=9', '--keep_best', '--out_dir=out/best')
    monkeypatch.undo()
    out = verse / 'out/best'
    best, last = (load_checkpoint(out, ckpt=ckpt) for ckpt in ('best', 'last'))
    assert (best['iter'], best['best'], last['iter'], last['best']) == (3, 3.0, 9, 3.0)
    assert best.keys() == last.keys()
    shutil.copytree(out, verse / 'out/third')
    (verse / 'out/third/best.pt').rename(verse / 'out/third/ckpt.pt')
    words = ['--gen_length=20', '--device=cpu', '--seed=3']
    third, of_best, of_last = (
        run('sample.py', f'--out_dir=out/{name}', f'--ckpt={ckpt}', *words, cwd=verse).stdout
        for name, ckpt in (('third', 'last'), ('best', 'best'), ('best', 'last')))
    assert third.splitlines()[:-1] == of_best.splitlines()[:-1] != of_last.splitlines()[:-1]
    log = (out / 'log.csv').read_text().splitlines(keepends=True)
    (out / 'log.csv').write_text(''.join(log[:-1]))  # as of a run stopped before it was evaluated
    losses = iter([2.5, 0, 0])
    with monkeypatch.context() as patch:
        patch.setattr('model.evaluate', lambda *args, **options: (next(losses), math.nan))
        train(verse, '--out_dir=out/best', '--resume')
    assert load_checkpoint(out, ckpt='best')['iter'] == 9 and load_checkpoint(out)['best'] == 2.5
    shutil.copy(verse / 'out/third/ckpt.pt', out / 'best.pt')
    for ckpt, updates in (('best', 3), ('last', 9)):
        done = run('eval.py', '--out_dir=out/best', f'--ckpt={ckpt}', '--repeats=2',
                   '--target_se=0', cwd=verse)
        assert re.search(rf'\| best .*\| +{updates} \|', done.stdout), done.stderr
    train(verse, *TINY, '--max_iters=1', '--out_dir=out/best', '--overwrite')
    shutil.copytree(out, verse / 'out/late')
    losses = iter([5.0, 0, 0])  # a run may be resumed with keep_best where its loss is lowest
    with monkeypatch.context() as patch:
        patch.setattr('model.evaluate', lambda *args, **options: (next(losses), math.nan))
        train(verse, '--out_dir=out/late', '--resume', '--keep_best', '--max_iters=3')
    assert load_checkpoint(verse / 'out/late', ckpt='best')['iter'] == 1
    for name in ('sample.py', 'eval.py'):
        done = run(name, '--out_dir=out/best', '--ckpt=best', cwd=verse)
        assert_one_line(done, 'not a run with keep_best: it holds no best.pt')
        assert_one_line(run(name, '--out_dir=out/best', '--ckpt=b', cwd=verse), 'last, best')


def test_a_rare_level_is_no_divergence():
    """With the weight of the bound one token may count 1/t; nan is none of that."""
    run_ = types.SimpleNamespace(iteration=5, log=[{'train': '2.197225'}],
                                 data=types.SimpleNamespace(meta={'vocab_size': 9}))
    s = types.SimpleNamespace(out_dir='x')
    script.check_loss(run_, s, 45.0, math.inf)
    for loss, factor in ((45.0, 10), (math.nan, math.inf), (math.inf, math.inf)):
        with pytest.raises(UserError, match='diverged'):
            script.check_loss(run_, s, loss, factor)


def test_what_began_high_has_not_diverged():
    """Weights that learned something else first may begin far above a uniform guess."""
    run_ = types.SimpleNamespace(iteration=5, log=[{'train': '9.0'}],
                                 data=types.SimpleNamespace(meta={'vocab_size': 9}))
    s = types.SimpleNamespace(out_dir='x')
    script.check_loss(run_, s, 17.9, 2)
    for loss in (18.1, math.nan):
        with pytest.raises(UserError, match='diverged'):
            script.check_loss(run_, s, loss, 2)
    run_.log, run_.data.meta = [{'train': '0.000000'}], {'vocab_size': 1}
    script.check_loss(run_, s, 0.0, 2)  # a text of one character is known from the start


def test_a_signal_in_the_last_evaluation_stops_the_run(verse, monkeypatch):
    """No update comes after it that could see the signal."""
    calls = []

    def spy(*args, **options):
        calls.append(args)
        if len(calls) == 5:  # two of each evaluation: after 0, 3 and 6 updates
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **options)

    monkeypatch.setattr('model.evaluate', spy)
    done = run('train.py', *TINY, '--out_dir=out/last', cwd=verse)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert 'stopped and saved after 6 updates' in done.stdout
    assert load_checkpoint(verse / 'out/last')['iter'] == 6 and len(calls) == 6
    assert 'in float32' in train(verse, '--out_dir=out/last', '--resume')


@pytest.mark.slow
@pytest.mark.parametrize('words', [
    ['--objective=ar', '--dropout=0.1', '--optimizer=adamw'],
    ['--objective=mdm', '--gradient_accumulation_steps=2']])
def test_a_run_killed_twenty_times_ends_in_the_same_bits(verse, words):
    """SIGKILL at 20 random moments, wherever that finds it: training, looking, writing."""
    words = [*TINY, *words, '--max_iters=200', '--eval_interval=5']
    whole, parts = verse / 'out/unbroken', verse / 'out/broken'
    began = time.monotonic()
    done = run('train.py', *words, '--out_dir=out/unbroken', '--overwrite', cwd=verse)
    lasted = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    shutil.rmtree(parts, ignore_errors=True)
    draws, kills, reached = random.Random(1), 0, []
    while kills < 20:  # most of a life is importing torch, so a life lasts a fifth of the run
        going_on = ['--out_dir=out/broken', '--resume'] if (parts / 'ckpt.pt').exists() else \
            [*words, '--out_dir=out/broken', '--overwrite']
        process = subprocess.Popen([sys.executable, ROOT / 'train.py', *going_on], cwd=verse,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            assert process.wait(lasted * draws.uniform(0.1, 0.6)) == 0, process.stderr.read()
            shutil.rmtree(parts)  # it got to the end before it was killed: begin anew
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            if (parts / 'ckpt.pt').exists():
                reached.append(load_checkpoint(parts)['iter'])  # it is whole, whenever it is read
    assert len(set(reached)) > 3, f'killed at {reached}, hardly anywhere'
    done = run('train.py', '--out_dir=out/broken', '--resume', cwd=verse)
    assert done.returncode == 0, done.stderr
    for name in ('log.csv', 'steps.csv'):
        assert log_without_times(parts, name) == log_without_times(whole, name)
    a, b = weights(whole), weights(parts)
    assert all(torch.equal(a[k], b[k]) for k in a)


def torchrun(n, *words, cwd, code=None):
    """train.py on n processes; `code` runs before it in each of them."""
    script = [ROOT / 'train.py', *words]
    if code:
        (cwd / 'before.py').write_text('import os, runpy, sys; sys.argv = sys.argv[1:]\n' + code +
                                       'runpy.run_path(sys.argv[0], run_name="__main__")')
        script = [cwd / 'before.py', *script]
    return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone',
                           f'--nproc_per_node={n}', *script], cwd=cwd, capture_output=True,
                          text=True, timeout=240, env=os.environ | {'PYTHONPATH': str(ROOT)})


@pytest.mark.parametrize('words', [['--objective=ar'], [
    '--objective=mdm', '--dropout=0.1', '--loss_weight=masked_mean']])  # each has its own count
def test_two_processes_equal_one_with_accumulation_two(verse, words):
    """Real gloo processes: the same weights, and bounds that both have drawn one half of."""
    words = [*TINY, *words, '--max_iters=3', '--overwrite', '--grad_clip=0']
    done = torchrun(2, *words, '--out_dir=out/two', cwd=verse)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('parameters') == 1, 'one process speaks'
    done = run('train.py', *words, '--gradient_accumulation_steps=2', '--out_dir=out/one',
               cwd=verse)
    assert done.returncode == 0, done.stderr
    one, two = weights(verse / 'out/one'), weights(verse / 'out/two')
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=0)
    for a, b in zip(*(log_without_times(verse / 'out' / d) for d in ('one', 'two')), strict=True):
        assert float(a['val']) == pytest.approx(float(b['val']), abs=1e-6)
        assert (a['iter'], a['tokens']) == (b['iter'], b['tokens'])
    done = run('train.py', '--out_dir=out/two', '--resume', '--max_iters=5', cwd=verse)
    assert done.returncode == 0, done.stderr  # and goes on alone, with half the tokens per update
    assert [int(row['tokens']) for row in log_without_times(verse / 'out/two')] == \
        [0, 3 * 256, 3 * 256 + 2 * 128]


def test_a_process_that_dies_ends_the_others(verse):
    code = ('import torch\n'
            'if os.environ["RANK"] == "1":\n'
            '    step = torch.optim.AdamW.step\n'
            '    torch.optim.AdamW.step = lambda self: os.kill(os.getpid(), 9)\n')
    done = torchrun(2, *TINY, '--out_dir=out/dies', '--max_iters=1000', cwd=verse, code=code)
    assert done.returncode != 0 and 'SIGKILL' in done.stderr, done.stderr[-2000:]
    assert load_checkpoint(verse / 'out/dies')['iter'] == 0


def test_processes_say_what_is_wrong(verse):
    done = torchrun(2, *TINY, '--out_dir=out/wide', '--block_size=100000', cwd=verse)
    assert done.returncode != 0
    # torchrun stops the other process once one has failed, perhaps before it has spoken
    said = 'error: block_size is 100000, but it must be'
    assert said in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize('device, said', [  # gloo has no tensors of MPS
    ('mps', "device is 'mps', but it must be cpu or cuda under torchrun"),
    ('cuda', "device is 'cuda:7', but there is only")])
def test_a_process_without_a_device_of_its_own_says_so(monkeypatch, device, said):
    for name, value in {'RANK': '7', 'WORLD_SIZE': '8', 'LOCAL_RANK': '7'}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        script.join_processes(device)


def test_a_signal_to_one_process_stops_all_after_the_same_update(verse):
    code = ('import torch, signal\n'
            'step, done = torch.optim.AdamW.step, []\n'
            'def third(self):\n'
            '    done.append(step(self))\n'
            '    if len(done) == 3 and os.environ["RANK"] == "1":\n'
            '        os.kill(os.getpid(), signal.SIGTERM)\n'
            'torch.optim.AdamW.step = third\n')
    done = torchrun(2, *TINY, '--out_dir=out/stops', '--max_iters=1000', '--eval_interval=1000',
                    cwd=verse, code=code)
    assert '--out_dir=out/stops --resume' in done.stdout, done.stderr[-2000:]
    assert load_checkpoint(verse / 'out/stops')['iter'] == 4, 'agreed on in the update after it'


def test_muon_leaves_a_matrix_without_a_gradient_as_it_is():
    used, unused = (torch.nn.Parameter(torch.randn(4, 6)) for _ in range(2))
    before = unused.clone(), used.clone()
    used.grad = torch.randn(4, 6)
    muon = script.Muon([used, unused], 0.1, 0.1, torch.float32)
    muon.step()
    assert torch.equal(unused, before[0]) and not torch.equal(used, before[1])


def test_muon_is_that_of_torch():
    torch.manual_seed(0)
    shapes = (8, 8), (8, 32), (32, 8), (8, 8), (8, 32)  # those alike are updated in one product
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in weights]
                    for weights in [[torch.randn(shape) for shape in shapes]] * 2)
    optimizers = (script.Muon(ours, 0.02, 0.1, torch.bfloat16),
                  torch.optim.Muon(theirs, weight_decay=0.1))
    for lr in (0.02, 0.05, 0.01):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for o in optimizers:
            o.param_groups[0]['lr'] = lr
            o.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_rates_rise_stay_and_fall():
    lr_factor, wsd = script.lr_factor, rates_of(110, 10, 'wsd')
    for i, factor in ((0, 1 / 11), (9, 10 / 11), (10, 1), (89, 1), (100, 0.5), (110, 0)):
        assert lr_factor(wsd, i) == pytest.approx(factor)
    assert lr_factor(rates_of(110, 10, 'cosine'), 60) == pytest.approx(0.5)
    assert lr_factor(rates_of(110, 10, 'constant'), 110) == 1


@pytest.mark.parametrize('shape', [{}, {'tied': True}, {'time_cond': True, 'norm': 'layernorm',
                                                        'bias': True, 'pos': 'learned'}])
def test_every_parameter_is_learned_once_and_matrices_of_blocks_alone_decay(shape):
    model = Transformer(ModelConfig(12, 16, n_embd=32, n_layer=2, **shape))
    inside = {id(p) for p in model.blocks.parameters() if p.dim() == 2}
    for name in ('muon', 'adamw'):
        s = types.SimpleNamespace(optimizer=name, beta1=0.9, beta2=0.99, weight_decay=0.1,
                                  learning_rate=6e-3, muon_lr=0.02)
        groups = [group for o in script.make_optimizers(model, s, torch.float32)
                  for group in o.param_groups]
        learned = [id(p) for group in groups for p in group['params']]
        assert sorted(learned) == sorted(id(p) for p in model.parameters())
        assert {id(p) for g in groups if g['weight_decay'] for p in g['params']} == inside
        assert {g['betas'] for g in groups if 'betas' in g} == {(0.9, 0.99)}


@pytest.mark.parametrize('like', ['Bert', 'Albert'])
def test_matrices_in_the_layers_of_the_hub_decay_too(like):
    transformers = pytest.importorskip('transformers')
    c = getattr(transformers, f'{like}Config')(
        vocab_size=12, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, embedding_size=8)
    model = getattr(transformers, f'{like}ForMaskedLM')(c)
    model.length_head = None
    s = types.SimpleNamespace(optimizer='muon', beta1=0.9, beta2=0.99, weight_decay=0.1,
                              learning_rate=6e-3, muon_lr=0.02)
    muon, adam = script.make_optimizers(model, s, torch.float32)
    layers = model.bert.encoder if like == 'Bert' else model.albert.encoder.albert_layer_groups
    inside = {id(p) for p in layers.parameters() if p.dim() == 2}
    assert {id(p) for p in muon.param_groups[0]['params']} == inside
    assert len(adam.param_groups[0]['params']) == len([*model.parameters()]) - len(inside)


def test_orthogonalize_keeps_directions_and_levels_their_sizes():
    torch.manual_seed(0)
    for shape in ((16, 16), (16, 64), (64, 16)):
        G = torch.randn(shape)
        X, zero = script.orthogonalize(torch.stack([G, 0 * G]), torch.float32)
        assert not zero.any()
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        inside = U.T @ X @ Vh.T  # diagonal: the singular vectors are those of G
        off = inside - inside.diag().diag()
        assert off.abs().max() < 1e-3
        large = S > 0.05 * S.norm()
        assert (inside.diag()[large] > 0.6).all() and (inside.diag() < 1.3).all()


def test_bench_measures_and_writes_nothing(verse):
    done = run('train.py', *TINY, '--out_dir=out/bench', '--bench=4', cwd=verse)
    assert done.returncode == 0, done.stderr
    assert 'ms per update (median of 4)' in done.stdout and 'of torch.mm' in done.stdout
    assert 'aten::' in done.stdout and not (verse / 'out/bench').exists()


def test_the_picture_shows_losses_over_updates_and_over_the_tokens_that_were_read(tmp_path,
                                                                                 monkeypatch):
    """Of rows and random lengths, updates read another number of tokens than tokens_per_update."""
    drawn = []
    monkeypatch.setattr(Figure, 'savefig',
                        lambda fig, *a, **k: (drawn.append(fig), SAVE_FIGURE(fig, *a, **k)))
    losses = torch.linspace(4.2, 3.0, 100) + 0.1 * torch.arange(100) % 0.3
    steps = [{'iter': str(2 * i), 'weighted_loss': str(x.item())} for i, x in enumerate(losses)]
    done = types.SimpleNamespace(
        log=[], steps=steps, iteration=0, tokens=0, tokens_per_update=4000,
        objective=MaskedDiffusion(), data=types.SimpleNamespace(meta={'vocab_size': 65}))
    for done.iteration, val in ((0, 4.2), (100, 3.5), (200, 3.0)):
        done.tokens = 3000 * done.iteration
        done.log.append({'iter': done.iteration, 'val': str(val), 'train': str(val - 0.1)})
        script.plot_losses(done, types.SimpleNamespace(
            out_dir=tmp_path, objective='mdm', dataset='a$^$', length_head=''))  # no mathematics
    ax, = drawn[-1].axes
    batches, smooth, val, train, uniform = ax.lines
    assert batches.get_xydata() == pytest.approx(np.column_stack([range(0, 200, 2), losses]))
    for i in (0, 1, 50, 99):  # the mean of up to two neighbours on each side
        assert smooth.get_xydata()[i] == pytest.approx(
            [2 * i, losses[max(0, i - 2):i + 3].mean().item()])
    assert val.get_xydata().tolist() == [[0, 4.2], [100, 3.5], [200, 3.0]]
    assert train.get_ydata() == pytest.approx([4.1, 3.4, 2.9])
    assert uniform.get_ydata() == pytest.approx([math.log(65)] * 2)
    top, = ax.child_axes
    assert 'millions' in top.get_xlabel()
    assert top.get_xlim() == pytest.approx([3000e-6 * n for n in ax.get_xlim()])


@pytest.mark.parametrize('name, module', [('tensorboard', 'torch.utils.tensorboard'),
                                          ('wandb', 'wandb')])
def test_trackers_get_the_losses_or_one_line_says_what_to_install(verse, monkeypatch, name,
                                                                  module):
    words = [*TINY, '--out_dir=out/tracked', '--overwrite', f'--track={name}']
    tracked, named = [], []

    class Writer:
        def __init__(self, *a, config=None, **k):
            named.append((a, k))
            if a:
                Path(*a, f'events.out.tfevents.{len(named)}').touch()

        def add_scalar(self, k, v, i):
            tracked.append((i, k, v))

        def log(self, row, step):
            tracked.extend((step, k, v) for k, v in row.items())

    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(SummaryWriter=Writer,
                                                                   init=Writer))
    train(verse, *words)
    assert [i for i, k, v in tracked if k == 'val nelbo <=' and v > 0] == [0, 3, 6]
    for key in ('weighted_loss', 'gradient_norm', 'lr_muon', 'lr_adamw', 'tokens_per_second'):
        assert [i for i, k, v in tracked if k == key and v > 0] == [1, 2, 3, 4, 5, 6]
    train(verse, *words, '--wandb_project=poems', '--wandb_run_name=first')
    curves = [path.name for path in (verse / 'out/tracked').glob('events*')]
    assert curves == ['events.out.tfevents.2'] * (name == 'tensorboard'), 'old ones are mixed in'
    assert named == ([(('out/tracked',), {})] * 2 if name == 'tensorboard' else [
        ((), {'project': 'nanomdm', 'name': 'tracked'}), ((), {'project': 'poems',
                                                               'name': 'first'})])
    monkeypatch.setitem(sys.modules, module, None)
    assert_one_line(run('train.py', *words, cwd=verse), "'.[track]'")
    assert load_checkpoint(verse / 'out/tracked')['iter'] == 6, 'thrown away for nothing'
    done = run('train.py', '--out_dir=out/tracked', '--resume', '--objective=ar', cwd=verse)
    assert_one_line(done, 'another causal, objective')


@pytest.mark.parametrize('asked, device, many_widths, seconds, on, why', [
    ('on', 'cpu', True, 0, 'on', 'as set'),
    ('off', 'cuda', False, 1e6, 'off', 'as set'),
    ('auto', 'mps', False, 1e6, 'off', 'no compiler'),
    ('auto', 'cuda', False, 39, 'off', 'saves about 39 s'),
    ('auto', 'cpu', False, 41, 'on', 'saves about 41 s'),
    ('auto', 'cpu', True, 395, 'off', 'costs about 80 s and saves about 79 s'),
    ('auto', 'cuda', True, 405, 'on', 'saves about 81 s')])
def test_compiling_is_decided_by_what_it_saves(asked, device, many_widths, seconds, on, why):
    decided, reason = script.compile_or_not(asked, device, 'bfloat16', many_widths, seconds)
    assert decided == on and why in reason
    decided, _ = script.compile_or_not('auto', 'cpu', 'float32', many_widths, 390)
    assert decided == 'off'


def test_training_goes_on_without_a_compiler_that_fails(verse, monkeypatch):
    """It fails in the backward pass, when gradients are there already: they are forgotten."""
    words = [*TINY, '--objective=ar', '--max_iters=2', '--overwrite']
    train(verse, *words, '--out_dir=out/plain')

    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError('no space left')

    def compiled(model, options, dynamic):
        assert options == {'fallback_random': True}  # of a CPU
        assert dynamic is None  # the batches of a stream have one width
        broken = copy.copy(model)  # with the same weights
        broken.forward = lambda *inputs, **how: Breaks.apply(model(*inputs, **how))
        return broken

    monkeypatch.setattr(torch, 'compile', compiled)
    said = train(verse, *words, '--out_dir=out/fails', '--compile=on')
    failed = 'torch.compile failed (RuntimeError): going on without it'
    assert f'compile: on (as set, or as the run began)\n{failed}\n' in said
    a, b = (weights(verse / 'out' / name) for name in ('plain', 'fails'))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert load_checkpoint(verse / 'out/fails')['config']['compile'] == 'off', 'also when resumed'
    said = train(verse, *words, '--out_dir=out/auto', '--compile=auto')
    assert 'compile: off (it costs' in said
    assert load_checkpoint(verse / 'out/auto')['config']['compile'] == 'off'


def test_averages_of_other_shapes_are_refused(verse):
    """As of a version that ordered the parameters otherwise. torch itself would take them."""
    for name in ('adamw', 'muon'):
        words = [*TINY, f'--optimizer={name}', f'--out_dir=out/{name}']
        train(verse, *words, '--max_iters=2')
        path = verse / f'out/{name}/ckpt.pt'
        checkpoint = torch.load(path, weights_only=True)
        states = checkpoint['optimizer'][0]['state']
        shapes = {key: [x.shape for x in state.values()] for key, state in states.items()}
        a = next(iter(states))
        b = next(key for key in states if shapes[key] != shapes[a])
        states[a], states[b] = states[b], states[a]
        torch.save(checkpoint, path)
        done = run('train.py', f'--out_dir=out/{name}', '--resume', '--max_iters=3', cwd=verse)
        assert_one_line(done, 'have another shape')


def test_a_checkpoint_with_settings_of_another_kind_resumes(verse):
    """It has fewer settings, some that are gone, compile was a bool, and meta had no dtype."""
    train(verse, *TINY, '--n_conv=0', '--tied', '--embed_scale=1.0', '--out_dir=out/bools',
          '--max_iters=1', '--overwrite')
    path = verse / 'out/bools/ckpt.pt'
    checkpoint = torch.load(path, weights_only=True)
    for name in ('track', 'n_conv', 'attn_dropout', 'embed_scale'):
        del checkpoint['config'][name]
    del checkpoint['meta']['dtype']
    checkpoint['config'] |= {'compile': True, 'tensorboard': False, 'wandb': False}
    torch.save(checkpoint, path)
    said = train(verse, '--out_dir=out/bools', '--resume', '--max_iters=2', '--compile=off')
    assert 'compile: off (as set, or as the run began)' in said
    after = load_checkpoint(verse / 'out/bools')
    assert after['iter'] == 2 and after['config']['compile'] == 'off'
    assert after['config']['embed_scale'] == 1.0
    checkpoint['config']['compile'] = False
    torch.save(checkpoint, path)
    train(verse, '--out_dir=out/bools', '--resume', '--max_iters=2')
    assert load_checkpoint(verse / 'out/bools')['config'] | {'compile': 'off'} == after['config']


def test_a_run_goes_on_with_the_measure_that_its_log_has(verse):
    train(verse, *TINY, '--objective=d3pm', '--out_dir=out/grid', '--overwrite')
    before = (verse / 'out/grid/ckpt.pt').read_bytes()
    assert_one_line(run('train.py', '--out_dir=out/grid', '--resume', '--diffusion_steps=7',
                        cwd=verse),
                    'cannot be continued with another diffusion_steps')
    assert (verse / 'out/grid/ckpt.pt').read_bytes() == before


@pytest.mark.parametrize('setting', [{'soft_inputs': True}, {'divergence': 'scaled_kl'},
                                     {'token_weights': (1.0, 3.0, 0.3)}])
def test_a_run_of_a_training_that_is_gone_is_sampled_but_not_resumed(verse, setting):
    """Its weights are like any others; going on with another loss would be a silent change."""
    words = [*TINY, '--objective=uniform', '--out_dir=out/soft']
    train(verse, *words, '--overwrite')
    path = verse / 'out/soft/ckpt.pt'
    checkpoint = load_checkpoint(path.parent)
    checkpoint['config'] |= script.GONE
    torch.save(checkpoint, path)
    train(verse, '--out_dir=out/soft', '--resume', '--max_iters=7')
    checkpoint['config'] |= setting
    torch.save(checkpoint, path)
    before = path.read_bytes()
    assert_one_line(run('train.py', '--out_dir=out/soft', '--resume', cwd=verse),
                    f'cannot be continued with another {[*setting][0]}')
    assert path.read_bytes() == before
    done = run('sample.py', '--out_dir=out/soft', '--start=The', '--json', cwd=verse)
    assert done.returncode == 0 and json.loads(done.stdout)['decoder'] == 'uniform', done.stderr


def test_a_broken_write_keeps_the_old_checkpoint(verse, monkeypatch):
    """The disk is full from the second checkpoint on: one line, and the first can be resumed."""
    out, replace, checkpoints = verse / 'out/full', os.replace, []

    def full(a, b):
        checkpoints.extend([b] * str(b).endswith('ckpt.pt'))
        if len(checkpoints) == 2:
            raise OSError(28, 'No space left on device')
        replace(a, b)

    monkeypatch.setattr(os, 'replace', full)
    done = run('train.py', *TINY, f'--out_dir={out}', cwd=verse)
    assert_one_line(done, 'No space left on device', 'the one before it is intact')
    assert load_checkpoint(out)['iter'] == 0 and not list(out.glob('*.part'))
    checkpoints[:] = ['one']  # so that the first one fails
    done = run('train.py', *TINY, f'--out_dir={out}', '--overwrite', cwd=verse)
    assert_one_line(done, 'No space left on device')
    assert 'intact' not in done.stderr


def test_no_checkpoint_decides_whether_code_of_the_hub_is_run(monkeypatch):
    for name in config.names_of(vars(script)):  # read_settings() changes them
        monkeypatch.setattr(script, name, getattr(script, name))
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    monkeypatch.setattr(script, 'load_checkpoint', lambda out_dir: {
        'config': {'trust_remote_code': True, 'max_iters': 7}})
    for words in (['--resume'], ['--resume', '--trust_remote_code']):
        monkeypatch.setattr(sys, 'argv', ['train.py', '--out_dir=a b', *words])
        s, _ = script.read_settings()
        assert (s.trust_remote_code, s.max_iters) == (len(words) == 2, 7)
        assert script.folder_for_shell(s) == "'a b'" + ' --trust_remote_code' * (len(words) == 2)


def test_a_gradient_is_clipped(verse):
    """To so little that AdamW's epsilon is all of the denominator."""
    train(verse, *TINY, '--grad_clip=1e-30', '--optimizer=adamw', '--out_dir=out/clipped')
    rows = log_without_times(verse / 'out/clipped')
    assert rows[0]['val'] == rows[-1]['val']


def test_a_resumed_run_counts_on_and_takes_its_new_settings(verse):
    train(verse, *TINY, '--out_dir=out/time', '--max_iters=2')
    path, found = verse / 'out/time/ckpt.pt', []
    torch.save(torch.load(path, weights_only=True) | {'seconds': 1000.0}, path)
    for decay in (0.0, 50.0):  # 50 times the rate, 0.02, is all
        out = verse / f'out/decay{decay}'
        shutil.copytree(path.parent, out)
        train(verse, f'--out_dir={out}', '--resume', '--max_iters=3', f'--weight_decay={decay}')
        found.append(weights(out)['blocks.0.attn.q.weight'].norm())
    assert found[1] < 0.2 * found[0] and load_checkpoint(out)['seconds'] > 1000
    rows = [*csv.DictReader((out / 'log.csv').read_text().splitlines())]
    assert float(rows[-1]['tokens_per_second']) > 10, 'of this start'


@pytest.mark.parametrize('objective', ['ar', 'mdm'])
def test_the_last_line_is_true(verse, objective):
    said = train(verse, *TINY, f'--objective={objective}', f'--out_dir=out/line_{objective}')
    nats, spread, bits, n = re.search(
        r'([\d.]+)( \+- [\d.]+)? nats/token, ([\d.]+) bits/token on .* \(([\d,]+) tokens of',
        said).groups()
    assert float(bits) == pytest.approx(float(nats) / math.log(2), abs=2e-4)
    assert (spread is None) == (objective == 'ar')
    meta = json.loads((verse / 'data/verse/meta.json').read_text())
    assert int(n) == meta['counts']['val']['tokens']
    assert log_without_times(verse / f'out/line_{objective}')[0]['lr'] == '2.000e-03'  # 6e-3 / 3


def test_a_cosine_is_one():
    assert script.lr_factor(rates_of(110, 10, 'cosine'), 35) == pytest.approx((2 + 2 ** 0.5) / 4)


def test_a_seed_is_of_weights_and_of_noise(verse, monkeypatch):
    seeds, loss = [], MaskedDiffusion.loss

    def spy(self, model, x0, rng, *rest):
        seeds.extend([torch.initial_seed(), rng.initial_seed()])
        return loss(self, model, x0, rng, *rest)

    monkeypatch.setattr(MaskedDiffusion, 'loss', spy)
    for seed in (1, 2):
        train(verse, *TINY, '--max_iters=1', f'--seed={seed}', '--learning_rate=1e-30',
              f'--out_dir=out/seed{seed}')
    a, b = (weights(verse / f'out/seed{seed}')['embed.weight'] for seed in (1, 2))
    assert not torch.allclose(a, b) and len(set(seeds)) == 4


def test_bfloat16_trains_as_float32_does_but_for_rounding(verse):
    for dtype in ('float32', 'bfloat16'):
        train(verse, *TINY, f'--dtype={dtype}', '--optimizer=adamw', f'--out_dir=out/{dtype}')
    one, other = (verse / f'out/{dtype}' for dtype in ('float32', 'bfloat16'))
    assert not torch.allclose(*(weights(d)['head.weight'] for d in (one, other)), atol=1e-6)
    a, b = (float(log_without_times(d)[-1]['val']) for d in (one, other))
    assert a == pytest.approx(b, abs=0.05)


def test_a_diverged_run_that_is_stopped_saves_nothing(verse, monkeypatch):
    step, done = torch.optim.AdamW.step, []

    def third(self):
        done.append(step(self))
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(torch.optim.AdamW, 'step', third)
    ended = run('train.py', *TINY, '--out_dir=out/nan2', '--learning_rate=1e38', '--max_iters=99',
                '--optimizer=adamw', '--log_interval=99', '--eval_interval=99', cwd=verse)
    assert ended.returncode == 2 and load_checkpoint(verse / 'out/nan2')['iter'] == 0, ended.stderr


def test_rows_that_were_written_twice_are_read_once(tmp_path):
    """As by two processes that resumed one run at a time."""
    (tmp_path / 'log.csv').write_text('iter,val\n0,4\n5,3\n5,3.5\n10,2\n0,9\n15,1\n20')
    rows = [{'iter': '0', 'val': '9'}, {'iter': '5', 'val': '3.5'}, {'iter': '10', 'val': '2'}]
    assert script.read_rows(tmp_path / 'log.csv', 10) == rows


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(verse):
    done = run('train.py', *TINY, '--out_dir=out/nan', '--learning_rate=1e38', '--optimizer=adamw',
               '--max_iters=50', '--eval_interval=50', cwd=verse)
    assert_one_line(done, 'nan', 'ckpt.pt has weights from before')
    assert load_checkpoint(verse / 'out/nan')['iter'] == 0
    assert all(w.isfinite().all() for w in weights(verse / 'out/nan').values())


def test_a_loss_far_above_a_blind_guess_stops_the_run(verse):
    done = run('train.py', *TINY, '--out_dir=out/far', '--learning_rate=30.0', '--warmup_iters=0',
               '--optimizer=adamw', '--max_iters=50', '--eval_interval=10', cwd=verse)
    assert_one_line(done, 'diverged', 'learning rate', 'ckpt.pt has weights from before')
    assert 'after 10 updates' not in done.stderr, 'that is the first evaluation'
    assert load_checkpoint(verse / 'out/far')['iter'] == 0


def test_a_run_that_only_overfits_goes_on(verse):
    """Sure of letters that the end of the text, which is val, does not have."""
    (verse / 'turn.txt').write_text('ab' * 1800 + 'cd' * 200)
    assert run('prepare.py', 'turn.txt', cwd=verse).returncode == 0
    done = run('train.py', *TINY, '--dataset=turn', '--objective=ar', '--out_dir=out/the turn',
               '--max_iters=60', '--eval_interval=30', cwd=verse)
    assert done.returncode == 0, done.stderr
    log = [*csv.DictReader((verse / 'out/the turn/log.csv').read_text().splitlines())]
    assert float(log[-1]['val']) > 2 * math.log(4) > 10 * float(log[-1]['train'])
    assert "sample.py --out_dir='out/the turn'" in done.stdout, 'to be copied into a shell'


def header_count(path):
    return int(re.search(r'^# parameters: ([\d,]+)', path.read_text(), re.M)[1].replace(',', ''))


def settings_of(path):
    """The settings of train.py under a configuration (None: its defaults), running neither."""
    changes = config.read_config(path) if path else {}
    defaults = {name: getattr(script, name) for name in config.names_of(vars(script))}
    assert not changes.keys() - defaults.keys()
    return defaults | changes


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.name)
def test_configurations_have_the_parameters_they_say(path):
    s = settings_of(path)
    recipe = prepare.load_recipe(s['dataset'])
    V = {'gpt2': 50_257, 'bpe': recipe['vocab_size']}.get(recipe['tokenizer']) or {
        'shakespeare_char': 65, 'text8': 27, 'reversal': 38}[s['dataset']]
    with torch.device('meta'):
        model = Transformer(model_config(s, {'vocab_size': V, 'mask_id': V}))
    assert model.count_parameters() == header_count(path)


def test_a_run_that_was_moved_is_resumed_where_it_is(verse):
    """Although its checkpoint remembers the folder in which it was."""
    train(verse, *TINY, '--max_iters=2', '--out_dir=out/before')
    moved = verse / 'out/shakespeare_mdm'  # the default
    shutil.rmtree(moved, ignore_errors=True)
    shutil.move(verse / 'out/before', moved)
    train(verse, '--resume', '--max_iters=4')
    assert load_checkpoint(moved)['iter'] == 4 and not (verse / 'out/before').exists()
    assert json.loads((moved / 'config.json').read_text())['out_dir'] == 'out/shakespeare_mdm'


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.name)
def test_configurations_train_one_step_shrunk(path, pairs):
    tiny = ROWS if settings_of(path)['dataset'] in ('multi30k', 'opus_books') else TINY
    train(pairs, path, *tiny, '--max_iters=1', '--out_dir=out/shrunk', '--overwrite')
    assert load_checkpoint(pairs / 'out/shrunk')['iter'] == 1


def test_twins_differ_in_the_objective_alone():
    for path in CONFIGS:
        if '_ar' in path.name:
            twin = path.with_name(path.name.replace('_ar', '_mdm'))
            ar, mdm = settings_of(path), settings_of(twin)
            differ = {k for k in ar if ar[k] != mdm[k]}
            if path.stem in ('scarce_ar', 'reversal_ar', 'shakespeare_ar'):  # each at its best
                differ -= {'dropout', 'attn_dropout', 'weight_decay', 'learning_rate', 'muon_lr',
                           'lr_schedule', 'max_iters', 'eval_interval'}
            if path.stem == 'multi30k_ar':  # in the same minutes
                differ -= {'max_iters'}
            # of use to one of them alone
            only = {'objective', 'score_prompt', 'mask_range', 'loss_weight'}
            assert differ <= only, f'{path.name}: {differ}'


def test_the_defaults_are_the_laptop_mdm():
    laptop = settings_of(ROOT / 'config/shakespeare_mdm.py')
    assert laptop == settings_of(None)


def test_an_unknown_data_set_ends_in_one_line(tmp_path):
    """An unknown name cannot be prepared, which is found out before anything is written."""
    done = run('train.py', *TINY, '--dataset=no_such_set', cwd=tmp_path)
    assert_one_line(done, 'no_such_set')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('words, said', [
    (['--max_iter=3'], 'did you mean max_iters'), (['--n_layer=two'], 'of type int'),
    (['--seed', '5'], 'write --seed=VALUE'), (['--seed=-1'], 'seed'), (['--beta2=1'], 'beta2'),
    (["--mask_range=('a', 1)"], 'tuple of numbers'), (['--dataset=x/verse.txt'], 'is the name of'),
    (['config/none.py'], 'there is no config file'), (['--objective=gan'], 'one of ar, mdm'),
    (['--optimizer=sgd'], 'muon, adamw'), (['--compile=maybe'], 'on, off'),
    (['--lr_schedule=x'], 'cosine, wsd'),
    (['--n_head=3'], 'multiple of n_head'), (['--block_size=100000'], 'no more training tokens'),
    (['--resume', '--out_dir=out/nowhere'], 'is not a run'), (['--device=tpu'], 'tpu'),
    (['--train_tokens=20'], 'block_size is 32, but it must be 20 or less'),
    (['--batch_size=0'], 'batch_size'), (['--max_iters=-1'], 'max_iters'),
    (['--epochs=0'], 'above 0'), (['--epochs'], 'epochs=VALUE'),
    (['--dtype=int8'], 'dtype'),
    (['--subs=False'], 'unless objective is d3pm'),
    (['--block_length=0', '--objective=block'], 'block_length'),
    (['--random_length=2'], 'random_length'),
    (['--pad_curriculum=9'], 'unless predict_pad is on'),
    (['--loss_weight=heavy'], 'loss_weight'), (['--mask_range=(0.5, 2.0)'], 'mask_range')])
def test_bad_settings_end_in_one_line(verse, words, said):
    assert_one_line(run('train.py', *TINY, '--out_dir=out/bad', *words, cwd=verse), said)
    assert not (verse / 'out/bad/ckpt.pt').exists()


def test_a_run_is_not_overwritten_unasked(verse):
    words = [*TINY, '--max_iters=1', '--out_dir=out/kept']
    assert run('train.py', *words, cwd=verse).returncode == 0
    before = (verse / 'out/kept/ckpt.pt').read_bytes()
    assert_one_line(run('train.py', *words, cwd=verse), 'holds a run or model', '--overwrite')
    assert_one_line(run('train.py', '--out_dir=out/kept', '--resume', '--overwrite', cwd=verse),
                    'overwrite is True', 'off unless resume is off')
    done = run('train.py', *words, '--overwrite', '--track=wandb,tensorbord', cwd=verse)
    assert_one_line(done, "track is 'tensorbord'")
    assert (verse / 'out/kept/ckpt.pt').read_bytes() == before
    for name in ('best.pt', 'config.json'):  # of a run without its last weights; of another model
        (verse / 'out/some').mkdir(exist_ok=True)
        (verse / 'out/some' / name).write_text('mine')
        done = run('train.py', *words, '--out_dir=out/some', cwd=verse)
        assert_one_line(done, 'out/some holds a run or model already')
        assert (verse / 'out/some' / name).read_text() == 'mine'
        (verse / 'out/some' / name).unlink()
    assert run('train.py', *words, '--overwrite', cwd=verse).returncode == 0
    log = verse / 'out/kept/log.csv'
    log.write_text(log.read_text()[:-40])  # the last line is left out, and written anew
    assert run('train.py', '--out_dir=out/kept', '--resume', cwd=verse).returncode == 0
    assert len(log.read_text().splitlines()) == 3
    log.write_text(log.read_text().replace('0,0,', '?,0,'))
    assert_one_line(run('train.py', '--out_dir=out/kept', '--resume', cwd=verse),
                    'log.csv or steps.csv is damaged')


def test_a_run_goes_on_as_the_model_that_it_is(verse):
    train(verse, *TINY, '--max_iters=2', '--out_dir=out/same')
    before = (verse / 'out/same/config.json').read_bytes()
    for word, said in (('--n_embd=64', 'another n_embd'), ('--norm=layernorm', 'another norm'),
                       ('--mlp=gelu', 'another mlp'), ('--shift', 'another shift'),
                       ('--block_size=8', 'another block_size'),
                       ('--optimizer=adamw', 'another optimizer'), ('--max_iters=1', '2 or more'),
                       ('--init_from=out/same', 'another init_from')):
        assert_one_line(run('train.py', '--out_dir=out/same', '--resume', word, cwd=verse), said)
    assert (verse / 'out/same/config.json').read_bytes() == before
    train(verse, '--out_dir=out/same', '--resume', '--max_iters=3', '--dropout=0.1')


def test_damaged_data_and_checkpoints_end_in_one_line(verse, tmp_path):
    shutil.copytree(verse / 'data', tmp_path / 'data')
    words = [*TINY, '--max_iters=1', '--out_dir=out/x']
    assert run('train.py', *words, cwd=tmp_path).returncode == 0
    ckpt = tmp_path / 'out/x/ckpt.pt'
    ckpt.write_bytes(ckpt.read_bytes()[:1000])
    assert_one_line(run('train.py', '--out_dir=out/x', '--resume', cwd=tmp_path), 'damaged')
    (tmp_path / 'data/verse/val.bin').write_bytes(b'\xff\xff' * 3)
    assert_one_line(run('train.py', *words, '--overwrite', cwd=tmp_path), 'val.bin')
    assert ckpt.stat().st_size == 1000, 'what was there is there'
    (tmp_path / 'data/verse/meta.json').write_text('{"name": ')
    assert_one_line(run('train.py', *words, '--overwrite', cwd=tmp_path), 'meta.json is damaged')


def test_ids_outside_the_vocabulary_end_in_one_line(verse, tmp_path):
    shutil.copytree(verse / 'data', tmp_path / 'data')
    path = tmp_path / 'data/verse/val.bin'
    V = json.loads((tmp_path / 'data/verse/meta.json').read_text())['vocab_size']
    path.write_bytes(V.to_bytes(2, 'little') * (path.stat().st_size // 2))  # all masks
    assert_one_line(run('train.py', *TINY, '--out_dir=out/x', cwd=tmp_path), f'hold the id {V}')


# ------------------------------------------------------------------------------------------ rows

WORDS = ('sun', 'moon', 'river', 'a', 'stone')
PAIRS = [(f'{a} {b}', f'{b} {a}'.upper()) for a in WORDS for b in WORDS] * 3
ROWS = [word for word in TINY if 'dataset' not in word] + ['--dataset=pairs']


@pytest.fixture(scope='module')
def pairs(verse):
    """The folder of `verse` with the rows `pairs` beside it."""
    for side, file in enumerate(('prompts', 'answers')):
        (verse / file).write_text(''.join(pair[side] + '\n' for pair in PAIRS))
    done = run('prepare.py', 'pairs', '--prompts=prompts', '--answers=answers', cwd=verse)
    assert done.returncode == 0, done.stderr
    return verse


@pytest.mark.slow
@pytest.mark.parametrize('objective', ['ar', 'mdm', 'block'])
def test_rows_are_compiled_once_for_all_widths(pairs, objective, monkeypatch):
    """By the real compiler: to compile again for another width is an error here, the losses are
    those of a run that is not compiled, and a run that is resumed has the same bits."""
    monkeypatch.setenv('TORCH_LOGS', 'recompiles')
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    words = [*ROWS, f'--objective={objective}', '--block_length=4', '--n_conv=3', '--n_embd=64',
             '--lr_schedule=constant', '--overwrite']

    def end(name, *words):
        done = run_alone('train.py', *words, f'--out_dir=out/{name}', cwd=pairs)
        assert done.returncode == 0 and 'torch.compile failed' not in done.stdout, done.stderr
        assert 'Recompiling' not in done.stderr
        return [float(row['weighted_loss'])
                for row in log_without_times(pairs / 'out' / name, 'steps.csv')]

    compiled = end('compiled', *words, '--compile=on')
    assert compiled == pytest.approx(end('plain', *words), abs=1e-4)
    end('parts', *words, '--compile=on', '--max_iters=2')
    assert end('parts', '--resume', '--max_iters=6') == compiled
    a, b = (weights(pairs / 'out' / name) for name in ('compiled', 'parts'))
    assert all(torch.equal(a[k], b[k]) for k in a)


def rows_of(folder, split, answer_width=None):
    """[(ids without PAD, or with it up to a width of the answer; tokens given)], by plain loops."""
    meta = json.loads((folder / 'data/pairs/meta.json').read_text())
    data = np.fromfile(folder / f'data/pairs/{split}.bin', np.uint16)
    rows = []
    for row in data.reshape(-1, meta['row_length']).tolist():
        known, end = row.index(meta['sep_id']) + 1, row.index(meta['eos_id']) + 1
        rows.append((row[:end if answer_width is None else known + answer_width], known))
    return rows


def nll_by_hand(model, rows):
    """-log p per token from the logits at all positions; rows: [(ids, the first that counts)]."""
    nats = 0.0
    for ids, first in rows:
        logits = model(torch.tensor([[model.mask_id, *ids[:-1]]]))[0, first:]
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[first:]),
                                                  reduction='sum')
    return nats / sum(len(ids) - first for ids, first in rows)


@pytest.mark.parametrize('word', ['--predict_pad=False', '--predict_pad', '--score_prompt'])
def test_the_losses_of_rows_are_those_by_hand(pairs, word):
    """Of one update that changes nothing: an accumulation over all widths is a whole epoch."""
    widest = max(len(answer) + 1 for _, answer in PAIRS) if word == '--predict_pad' else None
    train, val = (rows_of(pairs, split, widest) for split in ('train', 'val'))
    n = len({len(row) for row, _ in train})
    done = run('train.py', *ROWS, '--objective=ar', word, '--learning_rate=1e-30', '--tied',
               '--muon_lr=1e-30', '--batch_size=99', f'--gradient_accumulation_steps={n}',
               '--max_iters=1', '--out_dir=out/loss', '--overwrite', cwd=pairs)
    assert done.returncode == 0, done.stderr
    model = load_model(load_checkpoint(pairs / 'out/loss'), 'cpu')
    for row in log_without_times(pairs / 'out/loss'):
        assert float(row['val']) == pytest.approx(nll_by_hand(model, val).item(), abs=2e-5)
        assert float(row['train']) == pytest.approx(nll_by_hand(model, train).item(), abs=2e-5)
    if word == '--score_prompt':  # when training, but what is measured is the answer
        train = [(ids, 0) for ids, _ in train]
    (step,), nll = log_without_times(pairs / 'out/loss', 'steps.csv'), nll_by_hand(model, train)
    nll.backward()
    assert float(step['weighted_loss']) == pytest.approx(nll.item(), abs=2e-5)
    assert float(step['gradient_norm']) == pytest.approx(
        math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()
                      if p.grad is not None)), rel=1e-4)
    computed = sum(len(ids) for ids, _ in train)
    tokens = sum(len(p) + len(a) + 2 for p, a in PAIRS[:len(train)])
    assert f'{computed:,} training tokens' in done.stdout
    assert f'{100 * (1 - tokens / computed):.1f}% of what is computed is PAD' in done.stdout
    assert (word == '--predict_pad') == (tokens < computed)


def test_dropout_and_noise_have_streams_of_their_own(verse, monkeypatch):
    """Of one seed, torch's generator would drop what ours has masked."""
    seeds, loss = [], MaskedDiffusion.loss

    def spy(self, model, x0, rng, *rest):
        seeds.append((torch.initial_seed(), rng.initial_seed()))
        return loss(self, model, x0, rng, *rest)

    monkeypatch.setattr(MaskedDiffusion, 'loss', spy)
    train(verse, *TINY, '--objective=mdm', '--max_iters=3', '--out_dir=out/streams')
    assert len({seed for pair in seeds for seed in pair}) == 6


def test_random_lengths_are_as_many_as_asked(verse, monkeypatch):
    """A share of 0.5 of 150 batches, and most lengths among them."""
    seen, loss = [], MaskedDiffusion.loss

    def spy(self, model, x0, *rest):
        seen.append(x0.size(1))
        return loss(self, model, x0, *rest)

    monkeypatch.setattr(MaskedDiffusion, 'loss', spy)
    train(verse, *TINY, '--objective=mdm', '--max_iters=150', '--eval_interval=150',
          '--random_length=0.5', '--out_dir=out/lengths')
    log = log_without_times(verse / 'out/lengths')
    assert int(log[-1]['tokens']) == 4 * sum(seen[-150:]) < 4 * 32 * 150, 'what was read is counted'
    whole = seen.count(max(seen))
    assert 55 < whole < 95 and len(set(seen)) > 24 and max(seen) == 32


def test_resumed_runs_on_rows_end_in_the_same_bits(pairs):
    words = [*ROWS, '--objective=mdm', '--predict_pad', '--dropout=0.1',
             '--random_length=0.5', '--pad_curriculum=10',
             '--gradient_accumulation_steps=2', '--lr_schedule=constant', '--eval_interval=20']
    for out, until in (('whole', 20), ('parts', 7)):  # 40 batches are more than an epoch
        train(pairs, *words, f'--max_iters={until}', f'--out_dir=out/{out}_rows')
    said = train(pairs, '--out_dir=out/parts_rows', '--resume', '--max_iters=20')
    assert '20 updates' in said and int(re.search(r'(\d+) batches', said)[1]) < 40
    a, b = (weights(pairs / 'out' / d) for d in ('whole_rows', 'parts_rows'))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_two_processes_share_the_rows_of_one_with_accumulation_two(pairs):
    words = [*ROWS, '--objective=mdm', '--max_iters=3', '--grad_clip=0']
    done = torchrun(2, *words, '--out_dir=out/two_rows', cwd=pairs)
    assert done.returncode == 0, done.stderr
    done = run('train.py', *words, '--gradient_accumulation_steps=2', '--out_dir=out/one_rows',
               cwd=pairs)
    assert done.returncode == 0, done.stderr
    one, two = (weights(pairs / 'out' / d) for d in ('one_rows', 'two_rows'))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize('words, said', [
    ([*ROWS, '--block_size=8'], 'block_size is 8, but it must be '),
    ([*ROWS, '--train_tokens=100'], 'train_tokens is 100, but it must be 0: data/'),
    ([*ROWS, '--score_prompt', '--objective=mdm'], 'unless objective is ar'),
    ([*ROWS, '--random_length=0.5'], 'there is nothing to crop'),
    ([*TINY, '--predict_pad'], 'are for rows'),
    ([*TINY, '--row_share=0.5'], 'are for rows'), ([*ROWS, '--row_share=2'], 'in [0, 1]')])
def test_settings_of_streams_and_rows_do_not_mix(pairs, words, said):
    done = run('train.py', *words, '--out_dir=out/bad', cwd=pairs)
    assert_one_line(done, said)
    assert not (pairs / 'out/bad').exists()


def test_a_run_without_a_folder_is_not_written_where_one_stands(pairs):
    done = run('train.py', *TINY, '--out_dir=', cwd=pairs)
    assert_one_line(done, "out_dir is '', but it must be a folder")
    assert not (pairs / 'config.json').exists()


def test_documents_have_no_answers_whose_length_could_be_learned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('lines.txt').write_text('a b c\n' * 50)
    prepare.prepare('lines.txt', documents=True, max_answer=9)
    changes = {'dataset': 'lines', 'predict_pad': True, 'length_head': 'classify'}
    s = types.SimpleNamespace(**settings_of(None) | changes)
    with pytest.raises(UserError, match='length_head .* unless the data are prompts and answers'):
        script.open_training_data(s, 0, 1)


# ------------------------------------------------------------ runs that begin with those of another


def test_a_run_begins_with_the_weights_of_another(verse, monkeypatch):
    """Of another objective, even; those of a network or a vocabulary that is not its own, never."""
    monkeypatch.chdir(verse)
    train(verse, *TINY, '--objective=ar', '--out_dir=out/first')
    words = [*TINY, '--init_from=out/first', '--max_iters=1', '--overwrite', '--out_dir=out/then']
    train(verse, *words, '--learning_rate=1e-30', '--muon_lr=1e-30')
    first, then = weights('out/first'), weights('out/then')
    assert all(torch.equal(then[name], first[name]) for name in first)
    assert load_checkpoint('out/then')['iter'] == 1
    Path('other.txt').write_text(VERSE.replace('cat', 'dog').replace('.', ';'))
    prepare.prepare('other.txt')
    for other, said in (('--n_head=4', 'another n_head'), ('--norm=layernorm', 'another norm'),
                        ('--n_embd=16', 'another n_embd'), ('--dataset=other', 'another tokenizer'),
                        ('--init_from=out/no', 'out/no is not a run')):
        assert_one_line(run('train.py', *words, other, cwd=verse), said)
    assert all(torch.equal(then[name], weights('out/then')[name]) for name in then)


def test_a_length_head_is_trained_on_a_run_that_stays_as_it_is(verse, monkeypatch):
    """Of answers that are as long as the prompt says, by the configurations and what they name."""
    monkeypatch.chdir(verse)
    prompts = [f'{a}{b}{c}' for a in 'ab' for b in 'abc' for c in 'abcdefgh']
    for name, lines in (('prompts', prompts), ('answers', ['x' * (1 + p.count('a') * 3)
                                                           for p in prompts])):
        Path(name).write_text('\n'.join(lines) + '\n')
    prepare.prepare('ends', prompts='prompts', answers='answers', tokenizer='char')
    tiny = [word for word in TINY if 'dataset' not in word] + ['--dataset=ends', '--predict_pad']
    words = [*tiny, '--init_from=out/ends', '--overwrite', '--tied']
    train(verse, *tiny, '--out_dir=out/ends', '--tied', '--n_conv=0')
    frozen = weights('out/ends')
    for name, other in (('classify', ''), ('regress', ''), ('encoder', ''),
                        ('regress', 'regress_mean'), ('encoder', 'encoder_regress')):
        out, more = Path(f'out/length_{other or name}'), [f'--length_head={other}'] * bool(other)
        done = train(verse, ROOT / f'config/length_{name}.py', *words, '--batch_size=16', *more,
                     f'--out_dir={out}', '--max_iters=40', '--eval_interval=20')
        assert 'loss of the length' in done and '/token' not in done.split('compile')[1]
        once = weights(out)
        train(verse, f'--out_dir={out}', '--resume', '--max_iters=60')
        found, rows = weights(out), log_without_times(out)
        assert {key.split('.')[0] for key in found.keys() - frozen.keys()} == {'length_head'}
        for key in found:
            assert torch.equal(found[key], once[key]) == (key in frozen), key
            assert key not in frozen or torch.equal(found[key], frozen[key]), 'bit by bit'
        assert float(rows[-1]['val']) < 0.7 * float(rows[0]['val'])
    assert_one_line(run('train.py', '--out_dir=out/length_regress', '--resume',
                        '--length_quantile=0.5', cwd=verse), 'another length_quantile')
    head = [*words, '--length_head=classify', '--out_dir=out/bad']
    for bad, said in (('--init_from=', 'init_from is a run'),
                      ('--predict_pad=False', 'length_head is'),
                      ('--attn_dropout=0.1', 'attn_dropout is'),
                      ('--dropout=0.1', 'dropout is'),  # hidden states of a frozen model are exact
                      ('--objective=ar', 'length_head is'), ('--length_head=x', 'length_head is'),
                      ('--length_quantile=1.0', 'length_quantile'), ('--n_layer=1', 'n_layer'),
                      ('--objective=d3pm', 'another objective'), ('--shift', 'another shift')):
        assert_one_line(run('train.py', *head, bad, cwd=verse), said)
    assert not Path('out/bad').exists()


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('length_*.py')),
                         ids=lambda p: p.name)
def test_length_configurations_fit_the_run_that_they_are_for(path):
    base = settings_of(ROOT / 'config/multi30k_mdm_pad.py')
    head = settings_of(path) | {'tied': base['tied']}  # read_settings() takes it from init_from
    assert head['init_from'] == 'out/multi30k_mdm_pad'
    with torch.device('meta'):
        whole, frozen = (Transformer(model_config(s, {'vocab_size': 8000, 'mask_id': 8000}))
                         for s in (head, base))
    assert whole.count_parameters() == header_count(path)
    assert whole.state_dict().keys() >= frozen.state_dict().keys()
    assert all(head[name] == base[name] for name in ('dataset', 'objective', 'predict_pad'))


# A new objective


class HalfMasked(MaskedDiffusion):
    """A toy: half of the tokens are masks at every level, and each of them counts twice."""
    decoders = ('confidence', 'remask')

    def corrupt_evenly(self, model, x0, given, rng):
        is_mask = (torch.rand(x0.shape, generator=rng) < 0.5) & ~given
        xt = torch.where(is_mask, model.mask_id, x0)
        return Noised(xt, is_mask, torch.full((1, 1), 2.0), noise_level(0.5, given))

    def corrupt(self, model, x0, given, rng):
        return self.corrupt_evenly(model, x0, given, rng)


def test_a_new_objective_is_trained_sampled_and_measured(verse, monkeypatch):
    """One class and one line of a table: no script compares names."""
    monkeypatch.setitem(OBJECTIVES, 'half', HalfMasked)
    said = train(verse, *TINY, '--objective=half', '--out_dir=out/half')
    assert 'nelbo <= ' in said and 'half: ' in said
    done = run('sample.py', '--out_dir=out/half', '--start=The', '--json', cwd=verse)
    assert done.returncode == 0 and json.loads(done.stdout)['decoder'] == 'confidence', done.stderr
    assert_one_line(run('sample.py', '--out_dir=out/half', '--decoder=ar', cwd=verse), 'remask')
    for task in ('likelihood', 'generation', 'infill'):
        done = run('eval.py', '--out_dir=out/half', f'--task={task}', '--repeats=2', '--steps=4',
                   '--target_se=0', '--gen_tokens=32', '--max_windows=2', cwd=verse)
        assert done.returncode == 0 and '| half' in done.stdout, done.stderr


@pytest.mark.parametrize('like, words, decoders', [
    ('gpt2', ['--objective=ar'], ['ar']),
    ('gpt2', ['--objective=mdm', '--shift', '--attn_anneal=8', '--optimizer=muon'],
     Objective.decoders),
    ('bert', ['--objective=mdm'], Objective.decoders)])
def test_a_model_of_the_hub_is_trained_resumed_sampled_and_measured(tmp_path, like, words,
                                                                    decoders):
    """20 updates; the run is whole without the folder that it began with."""
    save_hub_model(tmp_path / 'hub', like)
    (tmp_path / 'prose.txt').write_text(PROSE)
    done = run('prepare.py', 'prose.txt', '--tokenizer=hf:hub', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = ['--init_from=hf:hub', *words, '--dataset=prose', '--max_iters=20', '--device=cpu',
             '--eval_interval=10', '--block_size=32', '--batch_size=4', '--compile=off',
             '--dtype=float32', '--warmup_iters=2', '--learning_rate=1e-3', '--eval_repeats=2']
    said = train(tmp_path, *words, '--out_dir=out/whole')
    assert 'hf:hub: licence not stated, revision of a folder' in said
    rows = log_without_times(tmp_path / 'out/whole')
    assert float(rows[-1]['val']) < float(rows[0]['val']) - 0.2
    with pytest.MonkeyPatch.context() as patch:
        save, saved = torch.save, []

        def stop_at_the_third(*what):
            if len(saved) == 2:
                raise OSError('no space left')
            saved.append(save(*what))

        patch.setattr(torch, 'save', stop_at_the_third)
        done = run('train.py', *words, '--out_dir=out/parts', cwd=tmp_path)
        assert done.returncode == 2 and load_checkpoint(tmp_path / 'out/parts')['iter'] == 10
    shutil.rmtree(tmp_path / 'hub')
    train(tmp_path, '--out_dir=out/parts', '--resume')
    assert log_without_times(tmp_path / 'out/parts') == rows
    a, b = weights(tmp_path / 'out/whole'), weights(tmp_path / 'out/parts')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for decoder in decoders:
        for how in (['--start=It is'], ['--template=It is [___] said the [___:2].']):
            done = run('sample.py', '--out_dir=out/whole', f'--decoder={decoder}', '--steps=8',
                       '--device=cpu', '--json', *how, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            assert load_checkpoint(tmp_path / 'out/whole')['meta']['mask_id'] not in \
                json.loads(done.stdout)['tokens']
    done = run('eval.py', '--out_dir=out/whole', '--device=cpu', '--target_se=0', '--repeats=2',
               cwd=tmp_path)
    assert done.returncode == 0 and 'nats/token' in done.stdout, done.stderr


def test_settings_that_contradict_a_model_of_the_hub_are_one_line(tmp_path):
    """And a run goes on from a run of it, in another objective, with what it brought along."""
    import transformers
    save_hub_model(tmp_path / 'hub', 'gpt2')
    save_hub_model(tmp_path / 'bert', 'bert')
    transformers.LlamaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1).save_pretrained(
        tmp_path / 'llama')
    (tmp_path / 'prose.txt').write_text(PROSE)
    (tmp_path / 'nothing').mkdir()
    (tmp_path / 'nothing/config.json').write_bytes((tmp_path / 'hub/config.json').read_bytes())
    assert_one_line(run('prepare.py', 'prose.txt', '--tokenizer=hf:nothing', cwd=tmp_path),
                    'hf:nothing')
    run('prepare.py', 'prose.txt', '--tokenizer=hf:hub', cwd=tmp_path)
    run('prepare.py', 'prose.txt', '--tokenizer=hf:bert', '--name=of_bert', cwd=tmp_path)
    run('prepare.py', 'prose.txt', '--name=chars', cwd=tmp_path)
    tiny = ['--max_iters=1', '--block_size=16', '--batch_size=2', '--device=cpu', '--compile=off',
            '--eval_repeats=2']
    words = ['--init_from=hf:hub', '--objective=ar', '--dataset=prose', '--out_dir=out/ar', *tiny]
    for word, said in (('--n_layer=3', 'hf:hub cannot be continued with another n_layer'),
                       ('--mlp=relu2', 'another mlp'),
                       ('--dataset=chars', 'must be prepared with --tokenizer=hf:hub'),
                       ('--shift', 'shift is True, but it must be off unless objective is mdm'),
                       ('--init_from=hf:llama', 'a llama of the hub, but it must be a GPT-2 or a'),
                       ('--init_from=hf:nowhere', 'write hf:FOLDER')):
        assert_one_line(run('train.py', *words, word, cwd=tmp_path), said)
        assert not (tmp_path / 'out').exists()
    assert_one_line(run('train.py', '--init_from=hf:bert', '--dataset=of_bert', '--attn_anneal=5',
                        '--out_dir=out/bert', *tiny, cwd=tmp_path), 'attn_anneal is 5')
    for objective in ('ar', 'mdm'):  # a GPT-2 that never saw a mask or PAD cannot be asked
        assert_one_line(run('train.py', *words, f'--objective={objective}', '--predict_pad',
                            '--length_head=classify', cwd=tmp_path), 'and init_from is a run')
    assert not (tmp_path / 'out').exists()
    train(tmp_path, *words)
    config = load_checkpoint(tmp_path / 'out/ar')['config']
    assert (config['mlp'], config['tied'], config['n_embd']) == ('gelu_tanh', True, 32)
    train(tmp_path, '--init_from=out/ar', '--dataset=prose', '--out_dir=out/mdm', *tiny,
          '--block_size=15', '--shift', '--attn_anneal=1')
    for name, start in (('ar', 0), ('mdm', 0)):
        saved = load_checkpoint(tmp_path / 'out' / name)
        assert load_model(saved, 'cpu').config.start_id == start
        assert saved['config']['hub'] == config['hub']
    done = run('sample.py', '--out_dir=out/ar', '--export=there', cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / 'there/model.safetensors').exists(), done.stderr
    assert_one_line(run('sample.py', '--out_dir=out/mdm', '--export=mdm', cwd=tmp_path),
                    'only ar models can be exported')
