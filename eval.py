"""Measures runs side by side: how well they predict text, what they write, what they fill in.

    python eval.py --out_dir=out/shakespeare_ar,out/shakespeare_mdm --task=report
    python eval.py --out_dir=out/shakespeare_ar,out/shakespeare_mdm --task=likelihood
    python eval.py --out_dir=out/shakespeare_ar,out/shakespeare_mdm --task=generation
    python eval.py --out_dir=out/shakespeare_ar,out/shakespeare_mdm --task=curves
    python eval.py --out_dir=out/multi30k_ar,out/multi30k_mdm --task=translation --split=test
    python eval.py --out_dir=out/multi30k_ar,out/multi30k_mdm_pad,out/length_classify --task=length

Each prints a Markdown table with a row for each run (several seeds of one configuration make one
row, mean +- standard deviation) and, below it, how the numbers were obtained. All that was measured
is collected in report_dir: report.md, the same as numbers in report.json, and pictures. On 2 CPU
cores curves take a second, likelihood a minute or two, generation of the full 100,000 tokens by
each run ten, and report, which is all of it at sizes for a laptop, about 5.
"""

import csv
import io
import itertools
import json
import math
import re
import shlex
import sys
import textwrap
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import config
import sample
from config import UserError
from model import BOUND_NAMES, ar_nll, ar_token_nll, bound_of, evaluate, load_checkpoint, \
    load_model, mixed_seed, ordered_nll, pick_device, token_nll
from prepare import MARK, code_points, download, gather, gather_rows, load_meta, load_split, \
    load_tokenizer, row_batches, row_widths

# what is measured
out_dir = 'out/shakespeare_ar,out/shakespeare_mdm'  # runs, separated by commas
task = 'likelihood'    # likelihood, generation, speed, curves, infill, order, lambada, recover,
                       # noises, translation, length, reversal; report: most, on one page
report_dir = 'out/report'  # where report.md, report.json and the pictures go
split = 'val'          # train, val, test; likelihood: or several with commas; generation and
                       # speed: val, always
max_windows = 64       # likelihood: of train, evenly spread; order, infill, recover: of the split;
                       # lambada: texts; 0 = all
device = 'auto'        # cuda, mps, cpu; auto takes the first that is there
seed = 1
batch_size = 16        # rows at a time
repeats = 4            # independent draws of a bound
target_se = 0.005      # likelihood, order: 8 draws, or as many more as bring the standard error of
                       # a bound down to this (nats); 0: only repeats
discrete_steps = ()    # likelihood: of mdm and d3pm also the bounds in so many steps, as (10, 1000)
gen_tokens = 100_000   # generation: how many to write, in texts as long as the context; speed and
                       # report write fewer unless told
gen_length = 64        # order: tokens of a text, which takes as many passes
judge = ''             # generation, speed: an AR run, or a causal model of Hugging Face's
                       # transformers; '' = the first AR run of out_dir
x_axis = 'tokens'      # curves: tokens, or epochs, on a log axis
source = ''            # lambada: a local copy of lambada_test.jsonl
grid_steps = (4, 8, 16, 32, 64, 128, 256)  # speed: steps of each decoder
# translation, or whatever the answers to prompts are
file = ''              # lines of (level TAB) prompt TAB answer, in place of the split
max_rows = 0           # the first so many; 0 = all
greedy = True          # the likeliest tokens, and decoder auto is confidence; False: as below
answer_steps = (1, 4, 8, 16)  # mdm: in place of steps, one after the other
length = 'auto'        # mdm: as in sample.py, or reference, that of the right answer; a,b for both
length_ratio = 1.3
length_extra = 2
length_quantile = 0.9
length_candidates = 1
# length: the settings of translation, without file; of answer_steps, the last; length auto is each
length_block = 8       # tokens per block of the decoding in blocks that it is compared with
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

LAMBADA = ('https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl',
           '4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226')
KNOWN_TOKENS = 20_000_000  # of the training text, as many are searched for words and copies
PLAIN = {'block_length': 0, 'prefix_cache': False, 'guidance': 0.0}  # the decoder and no more
EOS_SHARES = (0.25, 0.5, 0.75, 1.0)  # of an answer's window that is masked, in length.png
MOST_DRAWS = 64        # of a bound, whatever its error is by then
LEVELS, PLACES = 16, 16  # points of the two curves of likelihood.png
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '0.45',
          '#882255')   # told apart by the colour-blind; in grey, by the markers
MARKERS = '*s^Dv<>Po'
DIGITS = {  # behind the point, of a column; 3 of others
    **dict.fromkeys(('nats/token', 's.e.', 'bits/token', 'bits/char', 'bits/byte'), 4),
    **dict.fromkeys(('BLEU', 'chrF', 'ROUGE-1', 'ROUGE-L', 'BERTScore'), 2),
    **dict.fromkeys(('known words (%)', 'ms/pass', 'right (%)', 's.e. (%)', 'minutes', 'nfe',
                     'fits (%)', 'too long by', 'masks', 'saved', 'ms/sentence', 'sentences/s'), 1),
    'batches/s': 2, 'tokens/s': 0}


class Number(float):
    """A float printed as what it is: `<=` before an upper bound, `+-` and a deviation behind."""

    def __new__(cls, value, bound=False, spread=None):
        number = super().__new__(cls, value)
        number.bound, number.spread = bound, spread
        return number

    def __format__(self, spec):
        text = f'{"<= " if self.bound else ""}{float(self):{spec}}'
        return text if self.spread is None else f'{text} +- {self.spread:{spec}}'


def load_runs(out_dirs, device, one_data_set=True):
    """[(name, checkpoint, model)] of runs, on one and the same data set unless told otherwise."""
    runs = []
    for path in map(str.strip, out_dirs.split(',')):
        checkpoint = load_checkpoint(path, device) | {'path': path}
        runs.append((Path(path).name, checkpoint, load_model(checkpoint, device)))
    if len({name for name, *_ in runs}) < len(runs):
        raise UserError(f'{out_dirs} has runs of the same name, which no table could tell apart')
    dataset = runs[0][1]['config']['dataset']
    for name, checkpoint, _ in runs:
        its = checkpoint['config']['dataset']
        if its != dataset and one_data_set:
            raise UserError(f'{runs[0][0]} was trained on {dataset}, {name} on {its}: their tokens '
                            'cannot be compared, only their likelihood can, in bits per byte')
        if checkpoint['meta'] != load_meta(its):
            raise UserError(f'data/{its} is not what {name} was trained on')
    return runs


def seeds_together(rows, runs):
    """The rows, but one for all runs of one kind: mean +- standard deviation.

    They differ in their seed, where they are, what weights of this seed they began with, and how
    often they were looked at.
    """
    kinds, groups, merged, seen = {}, {}, [], Counter()
    for name, checkpoint, _ in runs:
        config = checkpoint['config']
        kind = repr((checkpoint['iter'], sorted(
            (key, bool(value) if key == 'init_from' else value) for key, value in config.items()
            if key not in ('seed', 'out_dir', 'resume', 'overwrite', 'eval_interval',
                           'log_interval', 'eval_repeats'))))
        seen[kind, config['seed']] += 1  # two of the same seed are not of one kind
        kinds[name] = kind, seen[kind, config['seed']]
    for row in rows:
        seen[row['run']] += 1  # the n-th row of a run goes with the n-th of the others
        key = (kinds.get(row['run'], row['run']), seen[row['run']],  # and points of each curve
               *(len(value) for value in row.values() if isinstance(value, list)))
        groups.setdefault(key, []).append(row)
    for group in groups.values():
        merged.append(dict(group[0]))
        for key in group[0] if len(group) > 1 else ():
            values = [row[key] for row in group]
            if key == 'run':
                merged[-1][key] = f'{values[0]} ({len(group)} seeds)'
            elif isinstance(values[0], list):  # a curve; of texts the first
                merged[-1][key] = values[0] if key == 'beginning' else \
                    np.mean(values, axis=0).tolist()
            elif len(set(values)) > 1:
                merged[-1][key] = Number(np.mean(values), getattr(values[0], 'bound', False),
                                         np.std(values, ddof=1))
    return merged


def shown(key, value):
    """The text of a number in the column `key` of a table."""
    if isinstance(value, float):
        return f'{value:,.{DIGITS.get(key, 3)}f}'
    return value if isinstance(value, str) else f'{value:,}'


def markdown(rows):
    """A Markdown table of dicts with the same keys, the numbers aligned right; no lists."""
    keys = [key for key, value in rows[0].items() if not isinstance(value, list)]
    cells = [keys] + [[shown(key, row[key]) for key in keys] for row in rows]
    width = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    lines = ['| ' + ' | '.join(c.ljust(w) if i == 0 else c.rjust(w)
                               for i, (c, w) in enumerate(zip(line, width))) + ' |'
             for line in cells]
    rule = '|'.join('-' * (w + 2) if i == 0 else '-' * (w + 1) + ':' for i, w in enumerate(width))
    return '\n'.join([lines[0], f'|{rule}|', *lines[1:]])


def panels(n):
    """A figure and its n axes, side by side."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(4.8 * n, 4.4), layout='constrained')
    return fig, fig.subplots(1, n, squeeze=False)[0]


def save_figure(fig, path):
    """Writes a figure whose panels share one legend."""
    for ax in fig.axes:
        ax.grid(color='0.92')
        ax.spines[['top', 'right']].set_visible(False)
    handles, labels = fig.axes[-1].get_legend_handles_labels()
    inches = 0.6 + 0.07 * max(map(len, labels), default=0)  # of an entry
    fig.legend(handles, labels, loc='outside upper center', frameon=False, fontsize=9,
               ncols=max(1, int(fig.get_figwidth() / inches)))
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)


def held_out(checkpoint, T, n, split='val'):
    """n windows (n, T) of a split, evenly spread, or all there are; 0 = all."""
    data = load_split(checkpoint['config']['dataset'], split)
    T = min(T, len(data))
    starts = np.arange(0, len(data) - T + 1, T)
    if 0 < n < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, n).astype(int)]
    return torch.from_numpy(gather(data, starts, T, checkpoint['meta']['vocab_size']))


def about(checkpoint):
    """The data set of a run in words, for the note below a table."""
    meta = checkpoint['meta']
    return f'{meta["name"]} ({meta["source"]}; tokens: {meta["tokenizer"]["kind"]})'


# ------------------------------------------------------------------------------------ likelihood


def draw_until(target_se, repeats, draw):
    """(mean, its standard error, number) of draw(0), draw(1), ...: as many as the settings ask.

    The first say how many that is, 8 to MOST_DRAWS: the error of 4 draws is itself off by 40%, and
    who draws until it happens to look small believes in errors that are too small.
    """
    values = [draw(n) for n in range(max(8, repeats) if target_se else repeats)]
    needed = np.nan_to_num((np.std(values, ddof=1) / target_se) ** 2) if target_se else 0
    values += [draw(n) for n in range(len(values), min(MOST_DRAWS, math.ceil(needed)))]
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5), len(values)


@torch.no_grad()
def nll_by_place(model, objective, x0, batch_size, seed):
    """(LEVELS, PLACES) mean -log p(x0_i | xt) of masked tokens, by share of masks and by position.

    Level k masks each token with probability t = (k + 1/2) / LEVELS. The nelbo per token is the
    integral over t of what a masked token costs: the mean of the table. AR has one row, its nll.
    """
    places = [part.tolist() for part in np.array_split(np.arange(x0.size(1)),
                                                       min(PLACES, x0.size(1)))]
    device, generator = model.embed.weight.device, torch.Generator(model.embed.weight.device)
    generator.manual_seed(mixed_seed(seed))
    batches, table = x0.to(device).split(batch_size), []
    for k in range(LEVELS if objective != 'ar' else 1):
        sums, count = torch.zeros(2, x0.size(1), device=device)  # 2 x (T,)
        for rows in batches:
            is_mask = torch.ones_like(rows, dtype=torch.bool)
            if objective == 'ar':
                nll = ar_token_nll(model, rows)
            else:
                t = torch.full_like(rows[:, :1], (k + 0.5) / LEVELS, dtype=torch.float32)
                is_mask = torch.rand(rows.shape, generator=generator, device=device) < t
                h = model(torch.where(is_mask, model.mask_id, rows), t, where=is_mask, hidden=True)
                nll = torch.zeros(rows.shape, device=device).masked_scatter(
                    is_mask, token_nll(model, h, rows[is_mask]))
            sums, count = sums + nll.sum(0), count + is_mask.sum(0)
        table.append([(sums[part].sum() / count[part].sum()).item() for part in places])
    return np.array(table)


def pace(checkpoint):
    """Batches per second of a run's training, looks at the validation split not counted."""
    with suppress(UserError, KeyError):  # it has no log, or none yet
        batches = checkpoint['iter'] * checkpoint['config']['gradient_accumulation_steps']
        return batches / max(load_log(checkpoint['path'])[2]['seconds'][-1], 0.1)
    return ''


def in_units(nats, bound, tokens, count):
    """{column: a likelihood in its unit} of nats per token, for a text that has so many tokens."""
    bits = nats / math.log(2)
    units = {'nats/token': nats, 'bits/token': bits,
             'bits/char': bits * tokens / count['characters'],
             'bits/byte': bits * tokens / count['bytes'], 'perplexity': math.exp(nats)}
    return {key: Number(value, bound) for key, value in units.items()}


def likelihood(runs, settings):
    """A row for each run and split: nll or nelbo in every unit, and its curves as two lists.

    All windows of the split (of train: max_windows), each as long as the context and read alone,
    in float32. An nll is exact; a nelbo is an upper bound on it, drawn over the whole split. Of
    mdm and d3pm more rows may follow: the same of the reverse process in so many steps.
    """
    rows, splits = [], [word.strip() for word in settings['split'].split(',')]
    work = [(run, split) for run in runs for split in splits]
    for (name, checkpoint, model), split in tqdm(work, desc='likelihood', disable=None):
        run, meta, s = checkpoint['config'], checkpoint['meta'], settings
        data, exact = load_split(run['dataset'], split), run['objective'] == 'ar'
        windows = (s['max_windows'] or None) if split == 'train' else None
        padded = meta['layout'] == 'rows' and run['predict_pad']

        def draw(n, run=run):
            return evaluate(model, bound_of(run), data, s['batch_size'], mixed_seed(s['seed'], n),
                            max_windows=windows, meta=meta, predict_pad=padded)[0]

        measures = {BOUND_NAMES[run['objective']].split()[0]: draw}
        if run['objective'] in ('mdm', 'd3pm') and model.config.subs:
            measures |= {f'nelbo in {n:,} steps': partial(draw, run=run | {
                'objective': 'd3pm', 'diffusion_steps': n}) for n in s['discrete_steps']}
        by = {'by share': [], 'by position': []}
        if run['objective'] in ('ar', 'mdm') and split == 'val' and meta['layout'] == 'stream':
            table = nll_by_place(model, run['objective'],
                                 held_out(checkpoint, model.config.block_size, 64),
                                 s['batch_size'], s['seed'])
            by = {'by share': np.nanmean(table, 1).tolist(),
                  'by position': np.nanmean(table, 0).tolist()}
        for measured, drawn in measures.items():
            nats, error, draws = (draw(0), 'exact', '') if exact else \
                draw_until(s['target_se'], s['repeats'], drawn)
            count = meta['counts'][split]
            tokens = count['rows'] * (meta['max_answer'] + 1) if padded else \
                count['scored' if meta['layout'] == 'rows' else 'tokens']
            units = in_units(nats, not exact, tokens, count)
            rows.append({'run': name, 'data': meta['name'], 'split': split,
                         'parameters': model.count_parameters(), 'updates': checkpoint['iter'],
                         'batches/s': pace(checkpoint), 'measured': measured, 'draws': draws,
                         'nats/token': units['nats/token'], 's.e.': error} | units | by)
            by = dict.fromkeys(by, [])  # they are of the first
    return comparable(rows, runs), likelihood_note(runs, splits, settings)


def comparable(rows, runs):
    """The rows without what cannot be compared, if the runs are on different data sets."""
    if len({row['data'] for row in rows}) == 1:
        return [{key: value for key, value in row.items() if key != 'data'} for row in rows]
    per_byte = [row['bits/byte'] / row['bits/token'] for row in rows]
    return [{key: row[key] for key in ('run', 'data', 'split', 'measured', 'draws')}
            | {'bits/byte': row['bits/byte'], 's.e.': row['s.e.'] if row['s.e.'] == 'exact' else
               row['s.e.'] / math.log(2) * ratio} for row, ratio in zip(rows, per_byte)]


def likelihood_note(runs, splits, settings):
    """How the numbers of `likelihood` were obtained, in words."""
    sets = {about(checkpoint): checkpoint for _, checkpoint, _ in runs}
    sizes = ', '.join(sorted({str(model.config.block_size) for _, _, model in runs}))
    note = (f'{"; ".join(sets)}: all of {", ".join(splits)} in windows of {sizes} tokens'
            + (f' (of train {settings["max_windows"]}, evenly spread)'
               if 'train' in splits and settings['max_windows'] else '')
            + f'; seed {settings["seed"]}; s.e.: of the draws of a bound')
    if len(sets) > 1:
        note += '; tokens differ, so only bits per byte can be compared'
        if len({checkpoint['meta']['sha256'] for checkpoint in sets.values()}) > 1:
            note += ', and the texts differ too, so not even those say which model is better'
    return note


def draw_likelihood(rows, path):
    """likelihood.png: nll of a masked token against the share of masks, and against position."""
    fig, axes = panels(2)
    for i, row in enumerate(row for row in rows if row.get('by share')):
        how = {'color': COLORS[i % 9], 'marker': MARKERS[i % 9], 'ms': 5, 'lw': 1.3,
               'label': f'{row["run"]}, {row["split"]}'}
        share = (np.arange(LEVELS) + 0.5) / LEVELS
        if len(row['by share']) == 1:
            axes[0].axhline(row['by share'][0], **how | {'marker': '', 'ls': '--'})
        else:
            axes[0].plot(share, row['by share'], **how)
        n = len(row['by position'])
        axes[1].plot((np.arange(n) + 0.5) / n, row['by position'], **how)
    axes[0].set(xlabel='share of the tokens that are masked', xlim=(0, 1),
                ylabel='nats per masked token')
    axes[1].set(xlabel='position in the window (share of its length)', xlim=(0, 1),
                ylabel='nll, or bound on it (nats per token)')
    axes[0].annotate('dashed: AR, which masks nothing', (0.03, 0.95), xycoords='axes fraction',
                     color='0.4', fontsize=8)
    save_figure(fig, path)


def noises(runs, settings):
    """A row for each run: bits per character by objective, beside the first that is ar."""
    sample.require(settings, ('split', settings['split'] in ('train', 'val', 'test'), 'one split'))
    found, note = likelihood(runs, settings | {'discrete_steps': ()})
    rows, exact = [], [row['bits/char'] for row in found if row['measured'] == 'nll']
    for row, (name, checkpoint, model) in zip(found, runs):
        run, kind = checkpoint['config'], checkpoint['config']['objective']
        kind += f' {run["block_length"]}' if kind == 'block' else ' with t' * run['time_cond']
        rows.append({'run': name, 'objective': kind, 'updates': row['updates'],
                     'minutes': load_log(checkpoint['path'])[2]['seconds'][-1] / 60,
                     'bits/char': row['bits/char'], 's.e.': row['s.e.'],
                     'over ar (%)': 100 * (row['bits/char'] / exact[0] - 1) if exact else ''})
    return rows, note + '; s.e. in nats per token'


def draw_noises(rows, path):
    """noises.png: bits per character of each run, from left to right as they were named."""
    fig, (ax,) = panels(1)
    kinds = [row['objective'].split()[0] for row in rows]
    chain = [i for i, row in enumerate(rows) if kinds[i] == 'block'
             or row['objective'] in ('ar', 'mdm')]
    ax.plot(chain, [rows[i]['bits/char'] for i in chain], color='0.8', lw=1.3, zorder=0)
    for i, (kind, row) in enumerate(zip(kinds, rows)):
        n = list(dict.fromkeys(kinds)).index(kind)
        ax.plot(i, row['bits/char'], MARKERS[n % 9], ms=9, color=COLORS[n % 9],
                label=kind if i == kinds.index(kind) else '')
        ax.annotate(f'{row["bits/char"]:.2f}', (i, row['bits/char']), xytext=(0, 8), ha='center',
                    textcoords='offset points', fontsize=8)
    ax.set_xticks(range(len(rows)), [row['objective'].replace(' ', '\n', 1) for row in rows])
    ax.set(ylabel='bits per character (all but ar: an upper bound)',
           xlabel='objective, and length of its blocks')
    ax.margins(y=0.15)
    save_figure(fig, path)


@torch.no_grad()
def orders(runs, settings):
    """A row for each run and order of revealing: the exact nll of short texts, token after token.

    Masked diffusion that reveals one token at a time has an exact likelihood in each order, as AR
    has in its own. Its mean over all orders is the nelbo.
    """
    rows, s = [], settings
    T = min(s['gen_length'], *(model.config.block_size for _, _, model in runs))
    x0 = held_out(runs[0][1], T, s['max_windows'], s['split'])
    left = torch.arange(x0.size(1)).expand_as(x0)  # (B, T)
    generator = torch.Generator().manual_seed(s['seed'])
    random = [torch.rand(x0.shape, generator=generator).argsort(1) for _ in range(s['repeats'])]
    for name, checkpoint, model in tqdm(runs, desc='order', disable=None):
        run, device = checkpoint['config'], model.embed.weight.device
        generator, found = torch.Generator(device).manual_seed(s['seed']), []

        def mean(nll, order):
            parts = zip(*(each.to(device).split(s['batch_size']) for each in (x0, order)))
            return sum(nll(*part).sum().item() for part in parts) / x0.numel()

        def given_order(x0, order):
            return ordered_nll(model, x0, order)

        def blind(x0, order):
            return bound_of(run)(model, x0, generator)

        if run['objective'] == 'ar':
            found = [('left to right', 'nll', mean(blind, left), 'exact')]
        elif run['objective'] == 'mdm':
            nats = [mean(given_order, order) for order in random]
            nelbo, error, _ = draw_until(s['target_se'], s['repeats'], lambda n: mean(blind, left))
            found = [('left to right', 'nll', mean(given_order, left), 'exact'),
                     ('right to left', 'nll', mean(given_order, left.flip(1)), 'exact'),
                     (f'{len(nats)} random orders', 'nll',
                      Number(np.mean(nats), spread=np.std(nats, ddof=1)), 'exact'),
                     ('all orders', 'nelbo', Number(nelbo, bound=True), error)]
        rows += [dict(zip(('run', 'order', 'measured', 'nats/token', 's.e.'), (name, *values)))
                 for values in found]
    return rows, (f'{about(runs[0][1])}: {len(x0)} texts of {x0.size(1)} tokens of {s["split"]}, '
                  f'each read alone; seed {s["seed"]}; +-: standard deviation over {s["repeats"]} '
                  'draws, in each of which every text has an order of its own. The nelbo is the '
                  'mean over all orders')


# ---------------------------------------------------------------------- what is written, and fast


def words_of(text):
    """Runs of letters, apostrophes inside them, in lower case."""
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text.lower())


def text_row(name, texts, ids, known):
    """What can be counted in texts: known words, entropy of tokens, share of distinct n-grams."""
    words = [word for text in texts for word in words_of(text)]
    p = np.array(list(Counter(i for row in ids for i in row).values())) / sum(map(len, ids))
    row = {'run': name, 'tokens': sum(map(len, ids)),
           'known words (%)': 100 * sum(w in known for w in words) / max(1, len(words)),
           'unigram entropy (bits)': float(-(p * np.log2(p)).sum())}
    for n in (1, 2, 3):
        grams = list(zip(*(words[i:] for i in range(n))))
        row[f'distinct-{n}'] = len(set(grams)) / max(1, len(grams))
    return row


def longest_copy(texts, source):
    """Characters in the longest piece of any of the texts that stands in `source` too; exact.

    Pieces of n characters are looked up by their hashes, and those found by themselves. If none of
    n is there, none of more is: n is doubled until none is there, then bisected.
    """
    text = MARK.join(texts)
    codes, known = code_points(text).astype(np.uint64), code_points(source).astype(np.uint64)

    def hashes(codes, n):
        h = np.zeros(max(0, len(codes) - n + 1), np.uint64)
        for j in range(n if len(h) else 0):  # modulo 2^64
            h = h * np.uint64(0x9E3779B97F4A7C15) + codes[j:j + len(h)]
        return h

    def copied(n):
        found = np.isin(hashes(codes, n), hashes(known, n)).nonzero()[0]
        return any(text[i:i + n] in source for i in found)

    low, high = 0, 1
    while copied(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if copied(middle) else (low, middle)
    return low


class HuggingFace:
    """A causal model of transformers that is read like one of ours: behind a start token."""

    def __init__(self, name, device):
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as e:
            raise UserError("a judge that is no run of ours needs transformers: pip install -e "
                            "'.[eval]'") from e
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = AutoModelForCausalLM.from_pretrained(name).to(device).eval()
        except (OSError, ValueError) as e:
            raise UserError(f'judge is {name!r}, which is neither a run nor a model that '
                            f'transformers can load ({type(e).__name__})') from e
        c, ids = self.model.config, self.tokenizer
        start = ids.bos_token_id if ids.bos_token_id is not None else ids.eos_token_id
        if start is None:
            raise UserError(f'judge {name} has no token that texts start or end with')
        self.mask_id, self.embed = start, self.model.get_input_embeddings()
        self.config = SimpleNamespace(vocab_size=c.vocab_size,
                                      block_size=c.max_position_embeddings)

    def __call__(self, x, hidden=True):
        return self.model(x).logits  # (B, T, V)

    def logits(self, h):
        return h

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False)['input_ids']


def load_judge(runs, settings):
    """(name, model, encode), or None: what the texts of the runs are judged by.

    encode is None for a judge with the tokens of the runs.
    """
    path, device = settings['judge'], pick_device(settings['device'])
    if path and not Path(path, 'ckpt.pt').exists():
        model = HuggingFace(path, device)
        return Path(path).name, model, model.encode
    judges = load_runs(path, device, one_data_set=False) if path else [
        run for run in runs if run[1]['config']['objective'] == 'ar'][:1]
    if not judges:
        return None
    name, checkpoint, model = judges[0]
    if checkpoint['config']['objective'] != 'ar':
        raise UserError(f'judge is {path!r}, but only an ar model says how likely a text is')
    same = checkpoint['meta']['tokenizer'] == runs[0][1]['meta']['tokenizer']
    return name, model, None if same else load_tokenizer(checkpoint['meta']).encode


@torch.no_grad()
def judged(judge, texts, ids):
    """{column: nats of texts (rows of ids) under a judge}, per token of the runs, or per character.

    In windows as long as the judge's context. A text that repeats itself is likely too.
    """
    if judge is None:
        return {}
    name, model, encode = judge
    rows = ids if encode is None else [encode(text) for text in texts]
    windows = [row[i:i + model.config.block_size] for row in rows
               for i in range(0, len(row), model.config.block_size)]
    nats = 0.0
    for _, group in itertools.groupby(sorted(windows, key=len), key=len):
        x0 = torch.tensor(list(group), device=model.embed.weight.device)
        nats += sum(ar_nll(model, part).sum().item() for part in x0.split(16))
    if encode is None:
        return {f'nll under {name}': nats / sum(map(len, ids))}
    return {f'nats/char under {name}': nats / sum(map(len, texts))}


def write(checkpoint, model, settings):
    """Texts as long as the context, gen_tokens or a little more: (ids, nfe, seconds, passes).

    ids: rows. nfe: passes that a text took, on average over them. passes: of all batches.
    """
    T, objective = model.config.block_size, checkpoint['config']['objective']
    how = settings | PLAIN | {'decoder': 'ar'} if objective == 'ar' else settings
    canvases = [[model.mask_id] * T] * math.ceil(settings['gen_tokens'] / T)
    done, (_, passes, seconds) = sample.complete(model, objective, canvases, how)
    nfe = float(np.mean([figures['nfe'] for _, figures in done]))
    return [ids for ids, _ in done], nfe, seconds, passes


def training_text(checkpoint):
    """The training text, or the beginning of a long one."""
    ids = load_split(checkpoint['config']['dataset'], 'train')[:KNOWN_TOKENS]
    return load_tokenizer(checkpoint['meta']).decode(ids.tolist())


def generation(runs, settings):
    """A row of counts for each run's own text, and one for as much of the validation split."""
    checkpoint, judge = runs[0][1], load_judge(runs, settings)
    tokenizer, training = load_tokenizer(checkpoint['meta']), training_text(checkpoint)
    known, T, rows = set(words_of(training)), runs[0][2].config.block_size, []
    real = held_out(checkpoint, T, math.ceil(settings['gen_tokens'] / T)).tolist()
    for name, (ids, nfe, seconds, _) in itertools.chain(
            [('validation text', (real, '', '', ''))],
            ((name, write(*run, settings)) for name, *run in runs)):
        texts = [tokenizer.decode(row) for row in ids]
        rows.append(text_row(name, texts, ids, known) | judged(judge, texts, ids)
                    | {'longest copy (chars)': longest_copy(texts, training), 'passes per text':
                       nfe, 'tokens/s': sum(map(len, ids)) / seconds if seconds else '',
                       'beginning': [texts[0]]})
    note = (f'{about(checkpoint)}; texts as long as the context, {settings["batch_size"]} at a '
            f'time, seed {settings["seed"]}, temperature {settings["temperature"]}, decoder '
            f'{settings["decoder"]}, steps {settings["steps"]}; a word is known if it occurs in '
            'the training text, and a copy is the longest piece of a text that does')
    return rows, note


def side_by_side(rows, lines=16, columns=100):
    """The beginnings of the texts of rows, in columns of plain text."""
    width = columns // len(rows) - 2
    blocks = [[row['run'], '-' * len(row['run']), *itertools.chain.from_iterable(
        textwrap.wrap(line, width) or [''] for line in row['beginning'][0].splitlines())][:lines]
        for row in rows]
    return '\n'.join('  '.join(cell.ljust(width) for cell in line).rstrip()
                     for line in itertools.zip_longest(*blocks, fillvalue=''))


def peak_memory(device):
    """', 1.23 GB at most': what this process has held so far, on the GPU if it computes there.

    Nothing on a platform that does not tell (Windows has no `resource`).
    """
    if device.startswith('cuda'):
        return f', {torch.cuda.max_memory_allocated() / 1e9:.2f} GB at most'
    try:
        import resource
    except ImportError:
        return ''
    unit = 1 if sys.platform == 'darwin' else 1024
    return f', {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB at most'


def decoders_of(objective, T, steps):
    """[(family, the one setting that moves, settings)]: the points of the figure of `speed`."""
    if objective == 'ar':
        return [('ar', '', {})]
    if objective == 'uniform':
        return [('uniform', f'steps={n}', {'decoder': 'uniform', 'steps': n}) for n in steps]
    families = {'ancestral': {'decoder': 'ancestral'}, 'confidence': {'decoder': 'confidence'},
                'confidence, cosine': {'decoder': 'confidence', 'counts': 'cosine'},
                'remask': {'decoder': 'remask'}, 'remdm': {'decoder': 'remdm'}}
    if objective != 'block':  # whose models have their own blocks
        in_blocks = {'decoder': 'confidence', 'block_length': max(1, T // 8)}
        families['in blocks'] = in_blocks
        families['in blocks, cached'] = in_blocks | {'prefix_cache': True}
    return [*((family, f'steps={n}', how | {'steps': n})
              for family, how in families.items() for n in steps
              if n <= T and ('block_length' not in how or n >= 8)),
            *(('threshold', f'threshold={h}', {'decoder': 'threshold', 'threshold': h})
              for h in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95))]


def speed(runs, settings):
    """A row for every decoder and number of steps: what it costs, and what its text is like."""
    checkpoint, judge = runs[0][1], load_judge(runs, settings)
    tokenizer, known = load_tokenizer(checkpoint['meta']), set(words_of(training_text(checkpoint)))
    rows, T = [], runs[0][2].config.block_size
    real = held_out(checkpoint, T, math.ceil(settings['gen_tokens'] / T)).tolist()

    def add(name, family, setting, ids, nfe='', fast='', slow=''):
        texts = [tokenizer.decode(row) for row in ids]
        row = {'run': name, 'decoder': family, 'setting': setting, 'nfe': nfe, 'tokens/s': fast,
               'ms/pass': slow} | judged(judge, texts, ids) | text_row(name, texts, ids, known)
        rows.append({key: value for key, value in row.items()
                     if key not in ('tokens', 'distinct-1', 'distinct-3')})

    add('validation text', '', '', real)
    for name, checkpoint, model in runs:
        objective, T = checkpoint['config']['objective'], model.config.block_size
        write(checkpoint, model, settings | {'gen_tokens': T, 'steps': 4})  # warm-up
        for family, setting, how in decoders_of(objective, T, settings['grid_steps']):
            ids, nfe, seconds, passes = write(checkpoint, model, settings | how)
            add(name, family, setting, ids, nfe, sum(map(len, ids)) / seconds,
                1000 * seconds / passes)
    note = (f'{about(checkpoint)}; {settings["gen_tokens"]:,} tokens each, in texts as long as the '
            f'context, {settings["batch_size"]} at a time (a pass serves them all), seed '
            f'{settings["seed"]}, temperature {settings["temperature"]}, '
            f'{torch.get_num_threads()} threads{peak_memory(pick_device(settings["device"]))}')
    return rows, note


def draw_speed(rows, path):
    """speed.png: quality of text against passes, a line for every decoder."""
    judge = next((key for key in rows[0] if ' under ' in key), None)
    keys = [key for key in (judge, 'known words (%)', 'unigram entropy (bits)') if key]
    fig, axes = panels(len(keys))
    families = list(dict.fromkeys((row['run'], row['decoder']) for row in rows[1:]))
    for ax, key in zip(axes, keys):
        ax.axhline(rows[0][key], color='0.5', lw=1, ls=':')
        ax.annotate('validation text', (0, rows[0][key]), xycoords=('axes fraction', 'data'),
                    xytext=(4, 3), textcoords='offset points', color='0.4', fontsize=8)
        for i, family in enumerate(families):
            points = sorted((row['nfe'], row[key]) for row in rows[1:]
                            if (row['run'], row['decoder']) == family)
            ax.plot(*zip(*points), marker=MARKERS[i % 9], ms=9 if i == 0 else 5, lw=1.3,
                    label=', '.join(family), color=COLORS[i % 9])
        ax.set(xscale='log', xlabel='passes per text',
               ylabel=f'{key} (nats per token)' if key.startswith('nll') else key)
        ax.set_xticks([4, 16, 64, 256], ['4', '16', '64', '256'])
        ax.minorticks_off()
    save_figure(fig, path)


# ---------------------------------------------------------------------------------------- curves


def load_log(out_dir):
    """{column: numbers} of a run's log.csv from the second look on, its name, and its settings.

    The first look says log V' for most. epochs: passes over the training text.
    """
    path = Path(out_dir.strip())
    try:
        run = json.loads((path / 'config.json').read_text())
        with open(path / 'log.csv', newline='') as f:
            rows = list(csv.DictReader(f))[1:]
        log = {key: np.array([float(row[key]) for row in rows])
               for key in ('tokens', 'seconds', 'train', 'val')}
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise UserError(f'{out_dir} has no whole log.csv and config.json: it is not a run, or one '
                        f'that is half written ({type(e).__name__})') from e
    if not rows:
        raise UserError(f'{out_dir} has not looked at its validation text yet: train it further')
    return path.name, run, log | {'measured': rows[0]['measured']}


def curves(runs, settings):
    """A row for each run, of its log: how good it was when, and at what all runs have in common."""
    logs, rows = [load_log(path) for path in settings['out_dir'].split(',')], []
    tokens, seconds = (min(log[key][-1] for _, _, log in logs) for key in ('tokens', 'seconds'))
    for name, run, log in logs:
        there = load_meta(run['dataset'])['counts']['train']['tokens']
        text = min(run.get('train_tokens', 0) or there, there)  # runs of old know no train_tokens
        best = log['val'].argmin()
        rows.append({'run': name, 'measured': log['measured'].split()[0],
                     'tokens (M)': log['tokens'][-1] / 1e6, 'epochs': log['tokens'][-1] / text,
                     'minutes': log['seconds'][-1] / 60, 'last val': log['val'][-1],
                     'best val': log['val'][best], 'at epoch': log['tokens'][best] / text,
                     f'val at {tokens / 1e6:.2f}M tokens':
                         np.interp(tokens, log['tokens'], log['val']),
                     f'val at {seconds / 60:.1f} minutes':
                         np.interp(seconds, log['seconds'], log['val']),
                     'x: minutes': (log['seconds'] / 60).tolist(), 'y': log['val'].tolist(),
                     f'x: {settings["x_axis"]}': (log['tokens'] / (
                         text if settings['x_axis'] == 'epochs' else 1e6)).tolist()})
    return rows, ('val: nats per token of the validation split, in training; nelbo: an upper bound '
                  'on the nll')


def draw_curves(rows, path):
    """curves.png: validation loss against training tokens or epochs, and against time."""
    fig, axes = panels(2)
    x_axis = 'epochs' if 'x: epochs' in rows[0] else 'tokens'
    for i, row in enumerate(rows):
        how = {'color': COLORS[i % 9], 'marker': MARKERS[1 + i % 8]}
        best, label = int(np.argmin(row['y'])), f'{row["run"]}, {row["measured"]}'
        if row['measured'] == 'nelbo':
            label += ' (an upper bound on the nll)'
        for ax, x in zip(axes, (row[f'x: {x_axis}'], row['x: minutes'])):
            ax.plot(x, row['y'], lw=1.3, ms=4, label=label, **how)
            if x_axis == 'epochs':
                ax.plot(x[best], row['y'][best], ms=11, mfc='none', mew=1.5, **how)
    axes[0].set(ylabel='validation loss (nats per token)', xlabel='training tokens (millions)')
    axes[1].set(xlabel='training time (minutes)')
    axes[1].sharey(axes[0])
    if x_axis == 'epochs':
        axes[0].set_xscale('log', base=2)
        axes[0].set_xlabel('epochs (passes over the training text)')
        axes[0].xaxis.set_major_formatter('{x:g}')
        axes[0].annotate('large, open: the lowest of a run', (0.97, 0.95), ha='right',
                         xycoords='axes fraction', color='0.4', fontsize=8)
    save_figure(fig, path)


# -------------------------------------------------------------- what is missing, or was spoilt


def greedy_settings(objective, decoder='auto'):
    """Settings that take the likeliest tokens; 'auto' has masked models write the surest first."""
    name = sample.decoder_name(decoder, objective)
    return {'temperature': 0.0, 'decoder': 'confidence' if decoder == 'auto' and name == 'ancestral'
            else name}


def fill(model, objective, x0, is_mask, settings):
    """x0 (B, T) written anew where is_mask is True, greedily; and the passes that a row took."""
    how = settings | PLAIN | greedy_settings(objective) | {'repetition_penalty': 1.0}
    canvases = torch.where(is_mask, model.mask_id, x0).tolist()
    done, _ = sample.complete(model, objective, canvases, how)
    return torch.tensor([ids for ids, _ in done]), \
        float(np.mean([figures['nfe'] for _, figures in done]))


def hide(shape, share, width, generator):
    """(B, T) bool: pieces of `width` tokens at random places, `share` of each row, one at least."""
    n = math.ceil(shape[1] / width)
    ranks = torch.rand(shape[0], n, generator=generator).argsort(1).argsort(1)
    return (ranks < max(1, round(share * n))).repeat_interleave(width, 1)[:, :shape[1]]


def right(x, x0, where):
    """{column: percent} of the tokens x (B, T) that are those of x0 where asked; s.e. over rows."""
    shares = 100 * ((x == x0) & where).sum(1) / where.sum(1).clamp(min=1)
    return {'right (%)': shares.mean().item(),
            's.e. (%)': shares.std().item() / len(x) ** 0.5 if len(x) > 1 else math.nan}


def rouge(texts, wanted):
    """{column: mean F1 of words, percent} of texts by those wanted; nothing without rouge-score.

    Words are ours: rouge-score's are of a-z and 0-9, it would cut French ones at every accent.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return {}
    scorer = RougeScorer(['rouge1', 'rougeL'], tokenizer=SimpleNamespace(tokenize=words_of))
    scores = [scorer.score(b, a) for a, b in zip(texts, wanted)]
    return {f'ROUGE-{key[5:]}': 100 * float(np.mean([score[key].fmeasure for score in scores]))
            for key in ('rouge1', 'rougeL')}


def infill(runs, settings):
    """A row for each run and way to hide tokens of held-out text: how many it finds again."""
    checkpoint, generator = runs[0][1], torch.Generator().manual_seed(settings['seed'])
    tokenizer, rows = load_tokenizer(checkpoint['meta']), []
    x0 = held_out(checkpoint, min(model.config.block_size for _, _, model in runs),
                  settings['max_windows'], settings['split'])
    texts = [tokenizer.decode(row) for row in x0.tolist()]
    common = np.bincount(load_split(checkpoint['config']['dataset'], 'train')[:KNOWN_TOKENS])
    for share, width in ((0.25, 1), (0.5, 1), (0.75, 1), (0.25, 8), (0.5, 8)):
        is_mask = hide(x0.shape, share, width, generator)
        filled = {'most frequent token': (torch.where(is_mask, int(common.argmax()), x0), 0.0)}
        for name, checkpoint, model in tqdm(runs, f'infill {share:.0%}', leave=False, disable=None):
            filled[name] = fill(model, checkpoint['config']['objective'], x0, is_mask, settings)
        rows += [{'run': name, 'hidden': f'{share:.0%}, {"tokens" if width == 1 else "spans of 8"}'}
                 | right(x, x0, is_mask)
                 | rouge([tokenizer.decode(row) for row in x.tolist()], texts)
                 | {'nfe': nfe} for name, (x, nfe) in filled.items()]
    return rows, (f'{about(runs[0][1])}: {len(x0)} windows of {x0.size(1)} tokens of '
                  f'{settings["split"]}; filled greedily, ar from left to right without what '
                  f'follows, mdm surest first in {settings["steps"]} steps; right: hidden tokens '
                  f'that are as they were, s.e. over windows; seed {settings["seed"]}; ' + (
                      'ROUGE: F1 of the words of whole windows' if 'ROUGE-1' in rows[0] else
                      "no ROUGE: pip install -e '.[eval]'"))


def recover(runs, settings):
    """A row for each run and rate at which tokens were replaced at random: how many it puts right.

    The run is told how many were. It reads each token with that hidden, an eighth of them at a
    time (ar: after those before it; uniform, which knows noise among the tokens that it sees: all
    at once), writes the least likely anew, and leaves the others.
    """
    checkpoint, generator = runs[0][1], torch.Generator().manual_seed(settings['seed'])
    V, rows = checkpoint['meta']['vocab_size'], []
    x0 = held_out(checkpoint, min(model.config.block_size for _, _, model in runs),
                  settings['max_windows'], settings['split'])
    for rate in (0.05, 0.1, 0.2):
        spoilt = hide(x0.shape, rate, 1, generator)
        xt = torch.where(spoilt, (x0 + torch.randint(1, V, x0.shape, generator=generator)) % V, x0)
        for name, checkpoint, model in runs:
            objective = checkpoint['config']['objective']
            if objective == 'block':  # it sees no token with all the others
                continue
            nll = torch.cat([token_by_token(model, objective, part, rate)
                             for part in xt.split(settings['batch_size'])])
            suspect = nll.argsort(1, descending=True).argsort(1) < spoilt.sum(1, keepdim=True)
            x, nfe = fill(model, objective, xt, suspect, settings)
            rows.append({'run': name, 'replaced': f'{rate:.0%}', 'found (%)':
                         100 * (suspect & spoilt).sum().item() / spoilt.sum().item()}
                        | right(x, x0, torch.ones_like(spoilt))
                        | {'before (%)': right(xt, x0, torch.ones_like(spoilt))['right (%)']})
    return rows, (f'{about(checkpoint)}: {len(x0)} windows of {x0.size(1)} tokens of '
                  f'{settings["split"]}, some of which are replaced; found: of those; right: as '
                  f'they were, after and before; s.e. over windows; seed {settings["seed"]}')


@torch.no_grad()
def token_by_token(model, objective, x, rate):
    """(B, T): -log p of each token of x given the others; of ar, given those before it.

    Of uniform, given all tokens, itself among them, and that so many of them are noise.
    """
    x = x.to(model.embed.weight.device)
    if objective == 'ar':
        return ar_token_nll(model, x).cpu()
    if objective == 'uniform':
        h = model(x, torch.full((len(x), 1), rate, device=x.device), hidden=True)  # (B, T, C)
        return token_nll(model, h.flatten(0, 1), x.flatten()).view_as(x).cpu()
    nll = torch.zeros(x.shape, device=x.device)
    for k in range(8):
        is_mask = (torch.arange(x.size(1), device=x.device) % 8 == k).expand_as(x)
        share = is_mask.float().mean(1, keepdim=True)  # (B, 1)
        h = model(torch.where(is_mask, model.mask_id, x), share, where=is_mask, hidden=True)
        nll = nll.masked_scatter(is_mask, token_nll(model, h, x[is_mask]))
    return nll.cpu()


def lambada_texts(settings):
    """The texts of LAMBADA [1606.06031] in OpenAI's version, from settings['source'] or the net."""
    path = Path(settings['source'] or 'data/downloads/lambada_test.jsonl')
    if not settings['source']:
        download(LAMBADA[:1], path, LAMBADA[1])
    try:
        return [json.loads(line)['text'] for line in path.read_text(encoding='utf-8').splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f'{path} is not lambada_test.jsonl: no text on each line '
                        f'({type(e).__name__})') from e


@torch.no_grad()
def lambada(runs, settings):
    """A row for each run: how often it knows the last word of a text, and how well.

    A word counts if all its tokens are right, decoded greedily. Perplexity is that of the word.
    """
    texts, s, rows = lambada_texts(settings), settings, []
    if 0 < s['max_windows'] < len(texts):
        texts = [texts[i] for i in np.linspace(0, len(texts) - 1, s['max_windows']).astype(int)]
    for name, checkpoint, model in runs:
        run, device = checkpoint['config'], model.embed.weight.device
        tokenizer, groups, skipped = load_tokenizer(checkpoint['meta']), {}, 0
        generator, nats, known = torch.Generator(device).manual_seed(s['seed']), [], []
        for text in texts:
            before, _, word = text.rstrip().rpartition(' ')
            try:
                ids, target = tokenizer.encode(before), tokenizer.encode(f' {word}')
            except UserError:  # a character that the training text does not have
                skipped += 1
                continue
            ids = (ids + target)[-model.config.block_size:]
            groups.setdefault(len(ids), []).append((ids, len(target)))
        work = [part for group in groups.values() for part in
                (group[i:i + s['batch_size']] for i in range(0, len(group), s['batch_size']))]
        if not work:
            raise UserError(f'{name} cannot read any of these texts: they have characters that its '
                            'tokenizer lacks')
        for part in tqdm(work, desc=name, leave=False, disable=None):
            x0, n = torch.tensor([ids for ids, _ in part]), torch.tensor([n for _, n in part])
            wanted = torch.arange(x0.size(1)) >= x0.size(1) - n[:, None]  # (B, T)
            draws = [bound_of(run)(model, x0.to(device), generator, ~wanted.to(device))
                     for _ in range(1 if run['objective'] == 'ar' else s['repeats'])]
            nats += torch.stack(draws).mean(0).tolist()
            x, _ = fill(model, run['objective'], x0, wanted,
                        s if run['objective'] == 'uniform' else s | {'steps': 0})
            known += (x == x0).all(1).tolist()
        exact, n = run['objective'] == 'ar', len(known)
        rows.append({'run': name, 'texts': n, 'skipped': skipped, 'right (%)': 100 * np.mean(known),
                     's.e. (%)': 100 * np.std(known) / n ** 0.5, 'nats/word':
                     Number(np.mean(nats), not exact), 'perplexity':
                     Number(math.exp(np.mean(nats)), not exact)})
    return rows, ('LAMBADA: the last word of each text, given what fits into the context before '
                  'it, and how many tokens it has (which ar has no use for); skipped: texts with '
                  'characters that the tokenizer lacks; bounds from '
                  f'{s["repeats"]} draws; s.e. over texts; seed {s["seed"]}')


FACT = re.compile(r'(?m)^(\w+ \w+) is (the \w+ of \w+)\.$')  # of the data set reversal
TURNED = re.compile(r'(?m)^(the \w+ of \w+) is (\w+ \w+)\.$')


def reversal(runs, settings):
    """A row for each run: the share of facts 'A is B.' that it completes, letter by letter.

    From the left, as they were told; with A blank, in the sentence as it was told; and from B in
    the turned sentence 'B is A.', which the model has read of half the facts, for those and for
    the others [reversal curse, 2309.12288]. Greedy; a masked model writes its surest token first.
    """
    rows = []
    for name, checkpoint, model in runs:
        objective = checkpoint['config']['objective']
        tokenizer = load_tokenizer(checkpoint['meta'])
        text = tokenizer.decode(load_split(checkpoint['config']['dataset'], 'train').tolist())
        facts, turned = set(FACT.findall(text)), {(a, b) for b, a in TURNED.findall(text)}
        if not facts or not turned:
            raise UserError(f'{name} was not trained on facts: run python prepare.py reversal')
        how = settings | greedy_settings(objective) | {'steps': 0}
        row = {'run': name}
        for column, asked, before, between, wanted in (
                ('A is __', facts, '{0} is ', '.', 1), ('__ is B', facts, '', ' is {1}.', 0),
                ('B is __, told', turned, '{1} is ', '.', 0),
                ('B is __, never told', facts - turned, '{1} is ', '.', 0)):
            asked = sorted(asked)
            canvases = [tokenizer.encode('\n' + before.format(*fact))
                        + [model.mask_id] * len(fact[wanted])
                        + tokenizer.encode(between.format(*fact) + '\n') for fact in asked]
            texts, _ = sample.complete(model, objective, canvases, how)
            right = sum('\n' + before.format(*fact) + fact[wanted] + between.format(*fact) + '\n'
                        == tokenizer.decode(ids) for fact, (ids, _) in zip(asked, texts))
            row[f'{column} (%)'] = 100 * right / len(asked)
        rows.append(row)
    note = (f'{len(facts)} facts, {len(turned)} of them told in both directions; a blank is as '
            'wide as its answer, and all of it must be right')
    return rows, note


# ----------------------------------------------------------------------------------- translation


def file_pairs(path):
    """[(level, prompt, answer)] of a file with tabs: its columns, the first of which may lack."""
    try:
        text = Path(path).read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'file {path!r} cannot be read ({type(e).__name__})') from e
    pairs = []
    for line in filter(str.strip, text.split('\n')):
        pairs.append([column.strip() for column in ['', *line.split('\t')][-3:]])
        if line.count('\t') not in (1, 2) or not all(pairs[-1][1:]):
            raise UserError(f'{path} has the line {line[:40]!r}: write prompt TAB answer, or level '
                            'TAB prompt TAB answer')
    return pairs


def row_pairs(meta, split, max_rows=0):
    """[(level, prompt, answer)] of a split, of max_rows rows if that is not 0.

    The level says to which half of them an answer belongs, the shorter or the longer.
    """
    tokenizer = load_tokenizer(meta)
    rows = load_split(meta['name'], split).reshape(-1, meta['row_length'])
    pairs = [sample.split_row(row, meta) for row in rows[:max_rows or None].tolist()]
    middle = np.median([len(answer) for _, answer in pairs] or [0])
    return [('shorter' if len(answer) <= middle else 'longer', tokenizer.decode(prompt),
             tokenizer.decode(answer)) for prompt, answer in pairs]


def answer(model, run, meta, pairs, settings):
    """The answers of a model to the prompts of pairs, [text], {column: figure} of them, and sizes.

    run: the settings of training. Prompts of like lengths go together: few wait for others.
    sizes (3, N): masks that answers got, as predicted, as the right answers and their EOS need.
    """
    tokenizer = load_tokenizer(meta)
    prompts, right = ([tokenizer.encode(pair[i]) for pair in pairs] for i in (1, 2))
    canvases = sample.row_canvases(prompts, run, meta, settings, right)
    canvases, predicted, _, took = sample.shortened(model, canvases, run, meta, settings)
    order = sorted(range(len(pairs)), key=lambda i: len(prompts[i]))
    done, (_, _, seconds) = sample.complete_rows(model, run, [canvases[i] for i in order],
                                                 settings, meta['eos_id'])
    done = [done[k] for k in np.argsort(order)]
    ids = [sample.split_row(row, meta)[1] for row, _ in done]
    shares = {'length ratio': [len(a) / max(1, len(b)) for a, b in zip(ids, right)],
              'no EOS': [not figures.get('ended', len(row) < len(canvas))
                         for (row, figures), canvas in zip(done, canvases)],
              'empty': [not row for row in ids]}
    masks = [canvas.count(model.mask_id) for canvas in canvases]
    sizes = np.array([masks, predicted or masks, [len(ids) + 1 for ids in right]])
    return [tokenizer.decode(row) for row in ids], {
        **{name: float(np.mean(share)) for name, share in shares.items()},
        'nfe': float(np.mean([figures['nfe'] for _, figures in done]) + (predicted is not None)),
        'sentences/s': len(pairs) / (seconds + took)}, sizes


def bleu(texts, right):
    """sacrebleu's BLEU with its defaults."""
    try:
        from sacrebleu import corpus_bleu
    except ImportError as e:
        raise UserError(f"BLEU needs {e.name}: pip install -e '.[eval]'") from e
    return corpus_bleu(texts, [right]).score


def make_score():
    """score(texts, right) -> {column: score}, and how the scores are obtained, in words.

    BERTScore is one of them where bert-score is installed and its model can be loaded.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as e:
        raise UserError(f"--task=translation needs {e.name}: pip install -e '.[eval]'") from e
    bleu, chrf, bert = BLEU(), CHRF(), None
    with suppress(Exception):  # not installed, not on the disk, or of versions that do not fit
        from bert_score import BERTScorer
        bert = BERTScorer('bert-base-multilingual-cased')

    def score(texts, right):
        row = {'BLEU': bleu.corpus_score(texts, [right]).score,
               'chrF': chrf.corpus_score(texts, [right]).score} | rouge(texts, right)
        if bert is not None:
            row['BERTScore'] = 100 * bert.score(texts, right)[2].mean().item()
        return {key: float(value) for key, value in row.items()}

    score(['a'], ['a'])  # without a score there is no signature
    return score, (f'BLEU {bleu.get_signature()}; chrF {chrf.get_signature()}; ROUGE: F1 of words '
                   'in lower case, mean over prompts' + ('; BERTScore: F1, bert-base-multilingual-'
                   'cased' if bert is not None else '; no BERTScore: no bert-score, or no model'))


def ways_to_answer(run, settings):
    """[(length, steps, settings)]: the decodings of a run that `translation` compares."""
    s, objective = settings, run['objective']
    if objective == 'ar':  # it has but one decoder
        s = s | PLAIN | {'decoder': 'auto'}
    s = s | (greedy_settings(objective, s['decoder']) if s['greedy'] else
             {'decoder': sample.decoder_name(s['decoder'], objective)})
    if objective == 'ar':  # and writes its own end
        return [('', '', s | {'length': 'auto', 'length_candidates': 1})]
    names = [sample.length_name(name.strip(), run) for name in s['length'].split(',')]
    ways = [s | {'length': name} for name in dict.fromkeys(names)]
    if s['decoder'] == 'threshold':  # it takes as many steps as it needs
        return [(way['length'], '', way) for way in ways]
    return [(way['length'], n, way | {'steps': n}) for way in ways for n in s['answer_steps']]


def translation(runs, settings):
    """A row of scores for each run and way to decode it; of a file it also prints all texts."""
    score, how = make_score()
    meta, path, all_steps = runs[0][1]['meta'], settings['file'], settings['answer_steps']
    sample.require(settings, ('max_rows', settings['max_rows'] >= 0, '1 or more, or 0 for all'),
                   ('answer_steps', all_steps and {type(n) for n in all_steps} == {int},
                    'of whole numbers, as 1,4,8 or 16,'))
    if meta['sep_id'] is None:
        raise UserError(f'data/{meta["name"]} has no prompts and answers: nothing to translate')
    n = settings['max_rows']
    pairs = file_pairs(path)[:n or None] if path else row_pairs(meta, settings['split'], n)
    if not pairs:
        raise UserError(f'{path} is empty: write prompt TAB answer on each line')
    levels, _, right = map(list, zip(*pairs))
    rows, texts = [], {'reference': right}
    for name, checkpoint, model in runs:
        run = checkpoint['config']
        for length, steps, s in ways_to_answer(run, settings):
            length += ' (oracle)' * (length == 'reference')
            length += f', best of {s["length_candidates"]}' * (s['length_candidates'] > 1)
            written, figures, _ = answer(model, run, meta, pairs, s)
            rows.append({'run': name, 'decoder': s['decoder'], 'length': length, 'steps': steps}
                        | score(written, right) | figures)
            for level in filter(None, dict.fromkeys(levels)):
                part = [(a, b) for a, b, c in zip(written, right, levels) if c == level]
                rows[-1][f'BLEU {level}'] = bleu(*zip(*part))
            texts[' '.join(f'{name} {length} {steps}'.split())] = written
    if path:
        for i, (level, prompt, _) in enumerate(pairs):
            print(f'{level} {prompt}'.strip(), *(f'    {name}: {written[i]}' for name, written
                                                 in texts.items()), '', sep='\n')
    drawn = 'the likeliest tokens' if settings['greedy'] else \
        f'temperature {settings["temperature"]}'
    note = (f'{path or settings["split"] + " of " + meta["name"]} ({meta["source"]}): '
            f'{len(pairs):,} prompts, {settings["batch_size"]} at a time, the masked ones of one '
            f'length; {drawn}, seed {settings["seed"]}; length ratio: tokens by those of the right '
            f'answer, mean; nfe: of a batch, mean over prompts; {how}')
    return rows, note


def draw_translation(rows, path):
    """translation.png: BLEU against passes, a line for a masked run and length, and one for AR."""
    fig, (ax,) = panels(1)
    lines = list(dict.fromkeys((row['run'], row['decoder'], row['length']) for row in rows))
    for i, line in enumerate(lines):
        points = sorted((row['nfe'], row['BLEU']) for row in rows
                        if (row['run'], row['decoder'], row['length']) == line)
        if line[1] == 'ar':
            ax.axhline(points[0][1], color=COLORS[i % 9], lw=1, ls=':')
        ax.plot(*zip(*points), marker=MARKERS[i % 9], ms=9 if line[1] == 'ar' else 5, lw=1.3,
                label=', '.join(filter(None, line)), color=COLORS[i % 9])
    ax.set(xscale='log', xlabel='passes per sentence', ylabel='BLEU', ylim=(0, None))
    ax.set_xticks([1, 2, 4, 8, 16, 32, 64], ['1', '2', '4', '8', '16', '32', '64'])
    ax.minorticks_off()
    save_figure(fig, path)


# ------------------------------------------------------------------------ length before decoding


def bounds_row(masks, predicted, need, full):
    """{column: figure} of the masks that answers get, against what they need with their EOS."""
    fits = masks >= need
    return {'fits (%)': float(100 * fits.mean()),
            'too long by': float((masks - need)[fits].mean() if fits.any() else math.nan),
            'masks': float(masks.mean()), 'saved': float(full - masks.mean()),
            'RMSE': float(((predicted - need) ** 2).mean() ** 0.5)}


@torch.no_grad()
def eos_chances(model, meta, rows, share, batch_size, seed):
    """P(EOS) at the masks of rows (N, row_length), a share of each answer's window, at random.

    The mask of EOS is one of them. Returns in how many rows EOS is the likeliest token there, a
    share, and the mean of P(EOS) at each distance from there, {distance: mean}.
    """
    device, right, found = model.embed.weight.device, 0, {}
    generator = torch.Generator().manual_seed(seed)
    for batch in row_batches(row_widths(rows, meta, predict_pad=True), batch_size):
        x0, given = map(torch.from_numpy, gather_rows(rows.reshape(-1), batch, meta, True))
        is_eos = ~given & (x0 == meta['eos_id'])  # (B, T)
        is_mask = ~given & (torch.rand(x0.shape, generator=generator) < share) | is_eos
        xt = torch.where(is_mask, model.mask_id, x0).to(device)
        logits = model(xt, is_mask.float().mean(1, keepdim=True).to(device),
                       where=is_mask.to(device)).cpu()  # (N, V)
        right += (logits.argmax(1) == meta['eos_id'])[is_eos[is_mask]].sum().item()
        away = torch.arange(x0.size(1)) - is_eos.long().argmax(1, keepdim=True)  # (B, T)
        for i, p in zip(away[is_mask].tolist(), logits.softmax(1)[:, meta['eos_id']].tolist()):
            found.setdefault(i, []).append(p)
    return right / len(rows), {i: np.mean(found[i]) for i in sorted(found)}


def lengths_of(run, settings):
    """The `length` of decodings to compare: with a head that of the head, for the other ways are
    those of the run it was trained on."""
    if settings['length'] != 'auto' or not run['predict_pad'] or run.get('length_head'):
        return settings['length']
    return 'full,fit' + ',argmax,quantile' * (run['objective'] not in ('uniform', 'block'))


def lengths(runs, settings):
    """A row for each run and way to know the length: what it saves, and what it does to answers."""
    meta, split = runs[0][1]['meta'], settings['split']
    sample.require(settings, ('file', not settings['file'], "'' for task=length"),
                   ('max_rows', settings['max_rows'] >= 0, '1 or more, or 0 for all'),
                   ('answer_steps', settings['answer_steps'], 'of whole numbers, as 16,'),
                   ('length_block', settings['length_block'] >= 1, '1 or more'))
    if meta['sep_id'] is None:
        raise UserError(f'data/{meta["name"]} has no prompts and answers: no lengths to predict')
    pairs, full = row_pairs(meta, split, settings['max_rows']), meta['max_answer'] + 1
    data = load_split(meta['name'], split).reshape(-1, meta['row_length'])[:len(pairs)]
    rows, chances = [], {}
    bleu(['a'], ['a'])  # before anything is decoded, for what there is to say without sacrebleu
    for name, checkpoint, model in runs:
        run = checkpoint['config']
        ways = ways_to_answer(run, settings | {'length': lengths_of(run, settings),
                                               'answer_steps': settings['answer_steps'][-1:]})
        ways += [('full, in blocks', steps, s | {'block_length': settings['length_block']})
                 for length, steps, s in ways if length == 'full' and not s['block_length']]
        answer(model, run, meta, pairs[:4], ways[0][2])  # warm-up
        for length, steps, s in ways:
            written, figures, sizes = answer(model, run, meta, pairs, s)
            bounds = bounds_row(*sizes, full)
            rows.append({'run': name, 'length': length} | (
                bounds if run['objective'] != 'ar' else dict.fromkeys(bounds, '')) | {
                'steps': steps, 'nfe': figures['nfe'],
                'ms/sentence': 1000 / figures['sentences/s'],
                'BLEU': bleu(written, [wanted for _, _, wanted in pairs])})
        if run['objective'] != 'ar' and run['predict_pad'] and not run.get('length_head'):
            chances[name] = {share: eos_chances(model, meta, data, share, settings['batch_size'],
                                                settings['seed'])
                             for share in EOS_SHARES}
            for share, (_, mean) in chances[name].items():
                rows[-len(ways)] |= {f'x {share:.0%}': list(mean),
                                     f'y {share:.0%}': [float(p) for p in mean.values()]}
    right = [f'; {name} knows EOS at its place with ' + ', '.join(
        f'{share:.0%} of the window masked in {found[0]:.1%}' for share, found in of.items())
        for name, of in chances.items()]
    note = (f'{split} of {meta["name"]} ({meta["source"]}): {len(pairs):,} prompts, '
            f'{settings["batch_size"]} at a time, seed {settings["seed"]}; fits: the right answer '
            'and its EOS do; too long by: tokens, where they do; saved: masks of the '
            f'{full} of full; RMSE: of what was predicted, before it was rounded '
            f'up; length_quantile {settings["length_quantile"]}; nfe and ms/sentence: with the '
            f'pass that predicts; {torch.get_num_threads()} threads{"".join(right)}')
    return rows, note


def draw_length(rows, path):
    """length.png: the chance of an EOS by the distance from its right place, a panel for a run."""
    rows = [row for row in rows if 'x 100%' in row]
    if not rows:  # of runs that never saw a PAD
        return
    fig, axes = panels(len(rows))
    for ax, row in zip(axes, rows):
        for i, share in enumerate(EOS_SHARES):
            ax.plot(row[f'x {share:.0%}'], row[f'y {share:.0%}'], lw=1.3, color=COLORS[i],
                    label=f'{share:.0%} masked')
        ax.axvline(0, color='0.5', lw=1, ls=':')
        ax.annotate('true end', (0, 1), xycoords=('data', 'axes fraction'), xytext=(4, -4),
                    textcoords='offset points', color='0.4', va='top', fontsize=8)
        ax.set(title=row['run'], xlabel='tokens from the true end', xlim=(-20, 20),
               ylabel='P(EOS), mean over rows')
    save_figure(fig, path)


# ------------------------------------------------------------------------------ what train.py shows


def first_answers(model, run, meta, n, settings):
    """[(prompt, right answer, answer)], texts, of the first n rows of the validation split."""
    pairs = row_pairs(meta, 'val', n)
    texts, *_ = answer(model, run, meta, pairs, settings | greedy_settings(run['objective']))
    return [(prompt, right, text) for (_, prompt, right), text in zip(pairs, texts)]


def append_answers(path, iteration, found):
    """Adds what first_answers found to samples.csv, with BLEU if sacrebleu is installed."""
    of_all, new = '', not path.exists()
    with suppress(UserError):
        _, wanted, texts = zip(*found)
        of_all = f'{bleu(texts, wanted):.2f}'
    with open(path, 'a', newline='', encoding='utf-8') as f:
        writer = csv.writer(f)
        writer.writerows([('iter', 'BLEU of all', 'prompt', 'right answer', 'answer')] * new)
        writer.writerows((iteration, of_all, *texts) for texts in found)


def flops_per_token(model, T):
    """Multiplications and additions of an update for a token: 6 for every weight of a matrix, and
    12 C in each layer for every position attended to [PaLM 2204.02311, app. B], half of them on
    average if causal. Reading an embedding is none; the head is counted at all positions."""
    c = model.config
    weights = model.count_parameters() - (0 if c.tied else model.embed.weight.numel())
    halves = 2 if c.block_length else 1  # of block's [xt ; x0]
    return halves * (6 * weights + 12 * c.n_layer * c.n_embd * (T / 2 if c.causal else T))


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
    print(f'{ms:.1f} ms per update (median of {len(milliseconds)}), '
          f'{tokens_per_iter / ms * 1e3:,.0f} tokens/s, {flops / ms / 1e6:.1f} GFLOP/s = '
          f'{100 * flops / ms * 1e3 / peak:.1f}% of the {peak / 1e9:.1f} of torch.mm'
          f'{peak_memory(device)}\n')
    share = 'self_device_time_total' if device.startswith('cuda') else 'self_cpu_time_total'
    events = sorted(profiler.key_averages(), key=lambda e: -getattr(e, share))
    whole = sum(getattr(e, share) for e in events)
    for e in events[:15]:
        print(f'{100 * getattr(e, share) / whole:5.1f}%  {e.count // profiled:4} x  {e.key[:70]}')


def draw_losses(rows, title, log_v):
    """The bytes of loss.png: a run's losses over updates and tokens, and log V', if not None."""
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    x = [int(row['iter']) for row in rows]
    for key, label, style, color in (('train', 'training text', 'o--', '#E69F00'),
                                     ('val', 'validation text', 'o-', '#0072B2')):
        ax.plot(x, [float(row[key]) for row in rows], style, ms=4, label=label, color=color)
    if log_v is not None:
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


# a task: (runs, settings) -> (rows, note), and what draws <task>.png from the rows. Values that are
# lists are for report.json and the picture alone. REPORT: what a report has, in order, and what
# is other than the settings there; ALONE: what is, by itself. What the user gives comes first.
TASKS = {'curves': (curves, draw_curves), 'likelihood': (likelihood, draw_likelihood),
         'order': (orders, None), 'generation': (generation, None), 'infill': (infill, None),
         'recover': (recover, None), 'speed': (speed, draw_speed), 'lambada': (lambada, None),
         'noises': (noises, draw_noises), 'translation': (translation, draw_translation),
         'length': (lengths, draw_length), 'reversal': (reversal, None)}
ON_ROWS = ('likelihood', 'curves', 'translation', 'length')
REPORT = {'curves': {}, 'likelihood': {'split': 'train,val'},
          'order': {'max_windows': 8, 'target_se': 0.02},
          'generation': {'gen_tokens': 4096}, 'infill': {'max_windows': 16, 'steps': 32},
          'recover': {'max_windows': 16, 'steps': 32},
          'speed': {'gen_tokens': 1024, 'grid_steps': (8, 32, 128)}}
ALONE = {'speed': {'gen_tokens': 2048}}  # as many for each decoder and number of steps


def measure(task, runs, settings, command):
    """{'markdown', 'rows', 'settings', 'command'} of a task: a section of the report."""
    function, draw = TASKS[task]
    if task not in ON_ROWS and any(c['meta']['layout'] == 'rows' for _, c, _ in runs):
        raise UserError(f'task {task} is for streams of text; of rows there are '
                        f'{", ".join(ON_ROWS)}')
    rows, note = function(runs, settings)
    if not rows:
        raise UserError(f'task {task} has nothing to say about objectives like those of these runs')
    rows = seeds_together(rows, runs)
    text = f'{markdown(rows)}\n'
    if draw:
        picture = Path(settings['report_dir'], f'{task}.png')
        picture.unlink(missing_ok=True)
        draw(rows, picture)
        text += f'\n![{task}]({task}.png)\n' if picture.exists() else ''
    if 'beginning' in rows[0]:
        text += f'\n```text\n{side_by_side(rows)}\n```\n'
    text += f'\n{note}. Command: python eval.py {command}\n'
    spreads = [{f'{key} s.d.': value.spread for key, value in row.items()
                if getattr(value, 'spread', None) is not None} for row in rows]
    return {'markdown': text, 'rows': [row | spread for row, spread in zip(rows, spreads)],
            'settings': settings, 'command': command}


def save_report(sections, folder):
    """Adds {task: section} to report.json, and makes report.md of all that it then holds."""
    path = Path(folder, 'report.json')
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError, ValueError):  # none yet, or a damaged one
        sections = json.loads(path.read_text(encoding='utf-8')) | sections
    part = path.with_suffix('.part')  # a full disk must not cost what is there
    part.write_text(json.dumps(sections, indent=1), encoding='utf-8')
    part.replace(path)
    path.with_suffix('.md').write_text('\n'.join(
        [f'# {" and ".join(dict.fromkeys(s["settings"]["out_dir"] for s in sections.values()))}\n',
         *(f'## {task}\n\n{section["markdown"]}' for task, section in sections.items())]),
        encoding='utf-8')


def main():
    settings = config.override(globals())
    if task not in (*TASKS, 'report'):
        raise UserError(f'task is {task!r}, not one of {", ".join(TASKS)}, report')
    sample.require(settings, *((n, settings[n] >= 1, '1 or more') for n in (
        'batch_size', 'gen_tokens', 'gen_length')), ('repeats', repeats >= 2, '2 or more'),
        *((n, settings[n] >= 0, '0 or more') for n in ('max_windows', 'target_se')),
        ('grid_steps', grid_steps and all(n in range(1, 10 ** 6) for n in grid_steps),
         'of numbers of steps, as in (4, 16) or (8,)'),
        ('discrete_steps', all(n in range(1, 10 ** 6) for n in discrete_steps),
         'of numbers of steps, as in (10, 1000) or (1000,)'),
        ('x_axis', x_axis in ('tokens', 'epochs'), 'tokens or epochs'))
    if task == 'curves':  # of logs alone: no model, and any device
        runs = [(name, {'config': run, 'iter': log['tokens'][-1]}, None)
                for name, run, log in map(load_log, out_dir.split(','))]
    else:
        runs = load_runs(out_dir, pick_device(device), one_data_set=task != 'likelihood')
    words = [word for word in sys.argv[1:] if not word.startswith('--task=')]
    given = {word[2:].partition('=')[0] for word in words}
    for name, change in REPORT.items() if task == 'report' else [(task, ALONE.get(task, {}))]:
        change = {key: value for key, value in change.items() if key not in given}
        command = shlex.join([*words, f'--task={name}', *(f'--{k}={v}' for k, v in change.items())])
        try:
            section = measure(name, runs, settings | change, command)
        except UserError as e:
            if task != 'report':
                raise
            print(f'## {name}\n\nLeft out: {e}.\n')
            continue
        print((f'## {name}\n\n' if task == 'report' else '') + section['markdown'])
        save_report({name: section}, report_dir)
    print(f'Collected in {report_dir}/report.md and report.json')


if __name__ == '__main__':
    main()
