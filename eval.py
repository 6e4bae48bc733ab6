"""Measures runs side by side: how well they predict text, and what they write.

    python eval.py --out_dir=out/shakespeare_ar,out/shakespeare_mdm --task=likelihood
    python eval.py --out_dir=out/shakespeare_ar,out/shakespeare_mdm --task=generation
    python eval.py --out_dir=out/shakespeare_ar,out/shakespeare_mdm --task=curves

The first two print a Markdown table with a row for each run and, below it, how the numbers were
obtained; on 2 CPU cores, likelihood takes a minute or two and generation about as long. The third
draws the runs' losses over training into <report_dir>/curves.png, in a second.
"""

import csv
import io
import itertools
import math
import re
import resource
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import config
import sample
from config import UserError
from model import BOUND_NAMES, ar_nll, bound_of, evaluate, load_checkpoint, load_model, pick_device
from prepare import load_meta, load_split, load_tokenizer

# what is measured
out_dir = 'out/shakespeare_ar,out/shakespeare_mdm'  # runs, separated by commas
task = 'likelihood'    # likelihood, generation, speed, curves
report_dir = 'out/report'  # speed, curves: where the picture goes
split = 'val'          # likelihood: train, val, test; always all of it
device = 'auto'        # cuda, mps, cpu; auto takes the first that is there
seed = 1
batch_size = 16        # rows at a time
repeats = 8            # likelihood: independent draws of a bound, for its standard error
gen_tokens = 10_000    # generation, speed: how many to write, in texts as long as the context
# generation, speed: how text is decoded, as in sample.py (decoder: of runs that are not ar)
decoder = 'auto'
steps = 128
noise_schedule = 'linear'
order = 'max_prob'
counts = 'linear'
threshold = 0.9
eta = 0.02
block_length = 0
prefix_cache = False
guidance = 0.0
temperature = 0.7
top_k = 0
top_p = 1.0
repetition_penalty = 1.0


def load_runs(out_dirs, device):
    """[(name, checkpoint, model)] of runs on one and the same data set."""
    runs = []
    for path in out_dirs.split(','):
        checkpoint = load_checkpoint(path.strip(), device)
        runs.append((Path(path.strip()).name, checkpoint, load_model(checkpoint, device)))
    dataset = runs[0][1]['config']['dataset']
    for name, checkpoint, _ in runs:
        if checkpoint['config']['dataset'] != dataset:
            raise UserError(f'{runs[0][0]} was trained on {dataset}, {name} on '
                            f'{checkpoint["config"]["dataset"]}: their tokens cannot be compared')
        if checkpoint['meta'] != load_meta(dataset):
            raise UserError(f'data/{dataset} is not what {name} was trained on')
    return runs


def markdown(rows):
    """A Markdown table of dicts with the same keys, the numbers aligned right."""
    keys = list(rows[0])
    cells = [keys] + [[str(row[key]) for key in keys] for row in rows]
    width = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    lines = ['| ' + ' | '.join(c.ljust(w) if i == 0 else c.rjust(w)
                               for i, (c, w) in enumerate(zip(line, width))) + ' |'
             for line in cells]
    rule = '|'.join('-' * (w + 2) if i == 0 else '-' * (w + 1) + ':' for i, w in enumerate(width))
    return '\n'.join([lines[0], f'|{rule}|', *lines[1:]])


def likelihood(runs, split, batch_size, seed, repeats):
    """A row of numbers for each run: nats, bits and perplexity per token, bits per character.

    All windows of the split, each as long as the context and read alone, in float32. An nll is
    exact; a nelbo is an upper bound on it, drawn `repeats` times over the whole split.
    """
    rows = []
    for name, checkpoint, model in tqdm(runs, desc='likelihood', disable=not sys.stderr.isatty()):
        settings, meta = checkpoint['config'], checkpoint['meta']
        objective, count = settings['objective'], meta['counts'].get(split)
        data = load_split(settings['dataset'], split)
        exact = objective == 'ar'
        nats, error = evaluate(model, bound_of(settings), data, batch_size, seed,
                               repeats=1 if exact else repeats)
        bits, sign = nats / math.log(2), '' if exact else '<= '
        rows.append({
            'run': name, 'parameters': f'{model.count_parameters():,}',
            'updates': f'{checkpoint["iter"]:,}', 'measured': BOUND_NAMES[objective].split()[0],
            'nats/token': f'{sign}{nats:.4f}', 's.e.': 'exact' if exact else f'{error:.4f}',
            'bits/token': f'{sign}{bits:.4f}',
            'bits/char': f'{sign}{bits * count["tokens"] / count["characters"]:.4f}',
            'perplexity': f'{sign}{math.exp(nats):.3f}'})
    _, checkpoint, model = runs[0]
    note = (f'{checkpoint["config"]["dataset"]} ({checkpoint["meta"]["source"]}), all of {split}: '
            f'{len(data):,} tokens ({checkpoint["meta"]["tokenizer"]["kind"]}) in windows of '
            f'{", ".join(sorted({str(m.config.block_size) for _, _, m in runs}))}; seed {seed}, '
            f'{repeats} draws of each bound')
    return rows, note


def words_of(text):
    """Runs of letters, apostrophes inside them, in lower case."""
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text.lower())


def text_row(name, texts, ids, known):
    """What can be counted in texts: known words, entropy of tokens, share of distinct n-grams."""
    words = [word for text in texts for word in words_of(text)]
    p = np.array(list(Counter(i for row in ids for i in row).values())) / sum(map(len, ids))
    row = {'text': name, 'tokens': f'{sum(map(len, ids)):,}',
           'known words': f'{100 * sum(w in known for w in words) / max(1, len(words)):.1f}%',
           'unigram entropy (bits)': f'{-(p * np.log2(p)).sum():.3f}'}
    for n in (1, 2, 3):
        grams = list(zip(*(words[i:] for i in range(n))))
        row[f'distinct-{n}'] = f'{len(set(grams)) / max(1, len(grams)):.3f}'
    return row


@torch.no_grad()
def judged(runs, ids):
    """{column: nats per token of texts (rows of ids) under the first AR run}, if there is one.

    Beside the entropy: a text that repeats itself is likely too.
    """
    judges = [(name, model) for name, checkpoint, model in runs
              if checkpoint['config']['objective'] == 'ar']
    if not judges or max(map(len, ids)) > judges[0][1].config.block_size:
        return {}
    name, judge = judges[0]
    x0 = torch.tensor(ids, device=judge.embed.weight.device)
    nats = sum(ar_nll(judge, rows).sum().item() for rows in x0.split(16)) / x0.numel()
    return {f'nll under {name}': f'{nats:.3f}'}


def write(name, checkpoint, model, settings):
    """Texts as long as the context, gen_tokens or a little more: (ids, nfe, seconds, passes).

    ids: rows. nfe: passes that a text took, on average over the batches. passes: of all batches.
    """
    T, objective, how = model.config.block_size, checkpoint['config']['objective'], settings
    if objective == 'ar':  # it has but one decoder
        how = how | {'decoder': 'ar', 'block_length': 0, 'prefix_cache': False, 'guidance': 0.0}
    n_texts = math.ceil(settings['gen_tokens'] / T)
    ids, nfes, seconds = [], [], 0.0
    for begin in tqdm(range(0, n_texts, settings['batch_size']), desc=name, leave=False,
                      disable=not sys.stderr.isatty()):
        n = min(settings['batch_size'], n_texts - begin)
        x, nfe, took = sample.generate(model, objective, [[model.mask_id] * T] * n,
                                       how | {'seed': settings['seed'] + begin})
        ids += x.tolist()
        nfes.append(nfe)
        seconds += took
    return ids, np.mean(nfes), seconds, sum(nfes)


def known_words(checkpoint):
    """The words of the training text."""
    tokenizer = load_tokenizer(checkpoint['meta'])
    return set(words_of(tokenizer.decode(load_split(checkpoint['config']['dataset'],
                                                    'train').tolist())))


def held_out(checkpoint, T, n_tokens):
    """Rows of T tokens from the beginning of the validation split, at least one."""
    data = load_split(checkpoint['config']['dataset'], 'val')
    return data[:max(1, n_tokens // T) * T].reshape(-1, T).tolist()


def generation(runs, settings):
    """A row of counts for each run's own text, and one for as much of the validation split."""
    _, checkpoint, model = runs[0]
    dataset, meta = checkpoint['config']['dataset'], checkpoint['meta']
    tokenizer = load_tokenizer(meta)
    known, real = known_words(checkpoint), held_out(checkpoint, model.config.block_size,
                                                    settings['gen_tokens'])
    rows = [text_row('validation text', [tokenizer.decode(sum(real, []))], real, known)
            | judged(runs, real) | {'passes per text': '', 'tokens/s': ''}]
    for name, checkpoint, model in runs:
        ids, nfe, seconds, _ = write(name, checkpoint, model, settings)
        rows.append(text_row(name, [tokenizer.decode(row) for row in ids], ids, known)
                    | judged(runs, ids) | {'passes per text': f'{nfe:.0f}',
                       'tokens/s': f'{sum(map(len, ids)) / seconds:,.0f}'})
    note = (f'{dataset} ({meta["source"]}); texts as long as the context, {settings["batch_size"]} '
            f'at a time, seed {settings["seed"]}, temperature {settings["temperature"]}; a word is '
            'known if it occurs in the training text')
    return rows, note


def decoders_of(objective, T):
    """[(family, the one setting that moves, settings)]: the points of the figure of `speed`."""
    if objective == 'ar':
        return [('ar', '', {})]
    steps = [n for n in (4, 8, 16, 32, 64, 128, 256) if n <= T]
    families = {'ancestral': {'decoder': 'ancestral'}, 'confidence': {'decoder': 'confidence'},
                'confidence, cosine': {'decoder': 'confidence', 'counts': 'cosine'},
                'remask': {'decoder': 'remask'}, 'remdm': {'decoder': 'remdm'},
                'in blocks': {'decoder': 'confidence', 'block_length': max(1, T // 8)},
                'in blocks, cached': {'decoder': 'confidence', 'block_length': max(1, T // 8),
                                      'prefix_cache': True}}
    return [*((family, f'steps={n}', how | {'steps': n})
              for family, how in families.items() for n in steps
              if 'block_length' not in how or n >= 8),
            *(('threshold', f'threshold={h}', {'decoder': 'threshold', 'threshold': h})
              for h in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95))]


def speed(runs, settings):
    """A row for every decoder and number of steps: what it costs, and what its text is like."""
    _, checkpoint, model = runs[0]
    tokenizer, known = load_tokenizer(checkpoint['meta']), known_words(checkpoint)
    real = held_out(checkpoint, model.config.block_size, settings['gen_tokens'])
    rows = [{'run': 'validation text', 'decoder': '', 'setting': '', 'nfe': '', 'tokens/s': '',
             'ms/pass': ''} | judged(runs, real)
            | text_row('', [tokenizer.decode(sum(real, []))], real, known)]
    for name, checkpoint, model in runs:
        objective, T = checkpoint['config']['objective'], model.config.block_size
        write('warm-up', checkpoint, model, settings | {'gen_tokens': T, 'steps': 4})
        for family, setting, how in decoders_of(objective, T):
            ids, nfe, seconds, passes = write(f'{family} {setting}', checkpoint, model,
                                              settings | how)
            rows.append({'run': name, 'decoder': family, 'setting': setting, 'nfe': f'{nfe:.0f}',
                         'tokens/s': f'{sum(map(len, ids)) / seconds:,.0f}',
                         'ms/pass': f'{1000 * seconds / passes:.1f}'} | judged(runs, ids)
                        | text_row('', [tokenizer.decode(row) for row in ids], ids, known))
    for row in rows:
        for key in ('text', 'tokens', 'distinct-1', 'distinct-3'):
            del row[key]
    note = (f'{checkpoint["config"]["dataset"]} ({checkpoint["meta"]["source"]}); '
            f'{settings["gen_tokens"]:,} tokens each, in texts as long as the context, '
            f'{settings["batch_size"]} at a time (a pass serves them all), seed '
            f'{settings["seed"]}, temperature {settings["temperature"]}, '
            f'{torch.get_num_threads()} threads')
    return rows, note


def draw_speed(rows, path):
    """speed.png: quality of text against passes, a line for every decoder."""
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    judge = next((key for key in rows[0] if key.startswith('nll under')), None)
    panels = [(key, label) for key, label in (
        (judge, f'{judge} (nats per token)'), ('known words', 'known words (%)'),
        ('unigram entropy (bits)', 'unigram entropy (bits)')) if key]
    fig, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.4),
                             constrained_layout=True, squeeze=False)
    colors = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '0.45',
              '#882255')
    families = list(dict.fromkeys((row['run'], row['decoder']) for row in rows[1:]))
    for ax, (key, label) in zip(axes[0], panels):
        real = float(rows[0][key].rstrip('%'))
        ax.axhline(real, color='0.5', lw=1, ls=':')
        ax.annotate('validation text', (0, real), xycoords=('axes fraction', 'data'),
                    xytext=(4, 3), textcoords='offset points', color='0.4', fontsize=8)
        for i, family in enumerate(families):
            points = sorted((float(row['nfe']), float(row[key].rstrip('%'))) for row in rows[1:]
                            if (row['run'], row['decoder']) == family)
            ax.plot(*zip(*points), marker='*s^Dv<>Po'[i % 9], ms=9 if i == 0 else 5, lw=1.3,
                    label=', '.join(family), color=colors[i % 9])
        ax.set(xscale='log', xlabel='passes per text', ylabel=label)
        ax.set_xticks([4, 16, 64, 256], ['4', '16', '64', '256'])
        ax.minorticks_off()
        ax.grid(color='0.92')
        ax.spines[['top', 'right']].set_visible(False)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside upper center', ncols=3,
               frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def curves(out_dirs, path):
    """Draws the validation loss of runs against training tokens and time, from their log.csv."""
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, constrained_layout=True)
    styles = zip(('#0072B2', '#D55E00', '#009E73', '#CC79A7'), ('o', 's', '^', 'D'))
    for out_dir, (color, marker) in zip(out_dirs.split(','), itertools.cycle(styles)):
        log = Path(out_dir.strip(), 'log.csv')
        if not log.is_file():
            raise UserError(f'{out_dir} has no log.csv: it is not a run')
        with open(log, newline='') as f:
            rows = list(csv.DictReader(f))[1:]  # the first is log V' for all
        measured = rows[0]['measured'].replace('<=', '(an upper bound on the nll)')
        for ax, x in zip(axes, ([float(row['tokens']) / 1e6 for row in rows],
                                [float(row['seconds']) / 60 for row in rows])):
            ax.plot(x, [float(row['val']) for row in rows], marker=marker, ms=4, color=color,
                    label=f'{log.parent.name}, {measured}')
    axes[0].set(xlabel='training tokens (millions)', ylabel='validation loss (nats per token)')
    axes[1].set(xlabel='training time (minutes)')
    for ax in axes:
        ax.grid(color='0.92')
        ax.spines[['top', 'right']].set_visible(False)
    fig.legend(*axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=2,
               frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


# ------------------------------------------------------------------------------ what train.py shows


def flops_per_token(model, T):
    """Multiplications and additions of an update for a token: 6 for every weight of a matrix, and
    12 C in each layer for every position attended to [PaLM 2204.02311, app. B], half of them on
    average if causal. Reading an embedding is none; the head is counted at all positions."""
    c = model.config
    weights = model.count_parameters() - (0 if c.tied else model.embed.weight.numel())
    return 6 * weights + 12 * c.n_layer * c.n_embd * (T / 2 if c.causal else T)


def fastest_flops(device, dtype):
    """FLOP/s of torch.mm on square matrices, the most that can be hoped for on this device."""
    n = 4096 if device.startswith('cuda') else 1024
    a, seconds = torch.randn(n, n, device=device, dtype=getattr(torch, dtype)), []
    while len(seconds) < 10 and sum(seconds) < 1:
        began = time.perf_counter()
        torch.mm(a, a)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * n ** 3 / sorted(seconds)[len(seconds) // 2]


def print_bench(milliseconds, profiler, profiled, flops, peak, tokens_per_iter, device):
    """The speed of the updates that --bench timed, and what the profiled ones were busy with."""
    ms = sorted(milliseconds)[len(milliseconds) // 2]
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.startswith('cuda') else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else
                                                              1024) / 1e9
    print(f'{ms:.1f} ms per update (median of {len(milliseconds)}), '
          f'{tokens_per_iter / ms * 1e3:,.0f} tokens/s, {flops / ms / 1e6:.1f} GFLOP/s = '
          f'{100 * flops / ms * 1e3 / peak:.1f}% of the {peak / 1e9:.1f} of torch.mm, '
          f'{memory:.2f} GB at most\n')
    share = 'self_device_time_total' if device.startswith('cuda') else 'self_cpu_time_total'
    events = sorted(profiler.key_averages(), key=lambda e: -getattr(e, share))
    whole = sum(getattr(e, share) for e in events)
    for e in events[:15]:
        print(f'{100 * getattr(e, share) / whole:5.1f}%  {e.count // profiled:4} x  {e.key[:70]}')


def draw_losses(rows, title, log_v):
    """The bytes of loss.png: a run's losses over updates and tokens, log V' beside them."""
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    x = [int(row['iter']) for row in rows]
    for key, label, style, color in (('train', 'training text', 'o--', '#E69F00'),
                                     ('val', 'validation text', 'o-', '#0072B2')):
        ax.plot(x, [float(row[key]) for row in rows], style, ms=4, label=label, color=color)
    ax.axhline(log_v, color='0.5', lw=1, ls=':')
    ax.annotate("log V', a blind guess", (1, log_v), xycoords=('axes fraction', 'data'),
                xytext=(-4, -4), textcoords='offset points', color='0.4', ha='right', va='top')
    name = rows[0]['measured'].replace('<=', '(an upper bound on the nll)')
    ax.set(xlabel='updates', title=title, ylabel=f'{name}, nats per token')
    per_update = int(rows[-1]['tokens']) / max(1, x[-1]) / 1e6
    if per_update:
        tokens = ax.secondary_xaxis('top', functions=(lambda n: n * per_update,
                                                      lambda n: n / per_update))
        tokens.set_xlabel('training tokens (millions)')
    ax.grid(color='0.92')
    ax.legend(frameon=False)
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=150)
    plt.close(fig)
    return buffer.getvalue()


def main():
    settings = config.override(globals())
    if task not in ('likelihood', 'generation', 'speed', 'curves'):
        raise UserError(f'task is {task!r}, not one of likelihood, generation, speed, curves')
    for name in ('batch_size', 'repeats', 'gen_tokens'):
        if settings[name] < 1:
            raise UserError(f'{name} is {settings[name]}, but it must be 1 or more')
    if task == 'curves':
        curves(out_dir, Path(report_dir, 'curves.png'))
        return print(f'{report_dir}/curves.png')
    runs = load_runs(out_dir, pick_device(device))
    if task == 'likelihood':
        rows, note = likelihood(runs, split, batch_size, seed, repeats)
    elif task == 'speed':
        rows, note = speed(runs, settings)
        draw_speed(rows, Path(report_dir, 'speed.png'))
        note += f'. Drawn in {report_dir}/speed.png'
    else:
        rows, note = generation(runs, settings)
    print(markdown(rows))
    print(f'\n{note}. Command: python eval.py {shlex.join(sys.argv[1:])}')


if __name__ == '__main__':
    main()
