"""Measures runs side by side: how well they predict text, what they write, what they fill in.

    python eval.py --out_dir=out/shakespeare_ar,out/shakespeare_mdm --task=report
    python eval.py --out_dir=out/shakespeare_ar,out/shakespeare_mdm --task=likelihood
    python eval.py --out_dir=out/shakespeare_ar,out/shakespeare_mdm --task=generation
    python eval.py --out_dir=out/shakespeare_ar,out/shakespeare_mdm --task=curves
    python eval.py --out_dir=out/ar_1m,out/ar_4m,out/mdm_1m,out/mdm_4m --task=scaling
    python eval.py --out_dir=out/multi30k_ar,out/multi30k_mdm --task=translation --split=test
    python eval.py --out_dir=out/multi30k_ar,out/multi30k_mdm_pad,out/length_classify --task=length

Each prints a Markdown table with a row for each run (several seeds of one configuration make one
row, mean +- standard deviation) and, below it, how the numbers were obtained. All measurements are
collected in report_dir: report.md, the same as numbers in report.json, and pictures. On 2 CPU
cores curves take a second, likelihood a minute or two, generation of the full 100,000 tokens by
each run ten minutes, and report, which runs half of the tasks at sizes for a laptop, about five.

A task is a function (runs, settings) -> (rows, note) and one line of TASKS at the end. A row is
{column: value}; values that are lists go to the picture, and `texts` to save_texts. The docstring
is printed below the table: it tells a reader of the report what the columns mean. To read this
file, begin with likelihood(), the task that matters most, and run_task(), which calls it.
"""

import csv
import json
import math
import re
import shlex
import sys
import time
from bisect import bisect_left
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import partial
from inspect import getdoc
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from tqdm import tqdm

import config
import sample
from config import UserError, one_of, require, write_atomically
from model import HubNetwork, cross_entropy, evaluate, flops_per_token, in_slices, \
    make_objective, peak_memory, pick_device, spread
from prepare import EOT, SURROGATE, data_set, from_hub, load_meta, load_split, load_tokenizer, \
    mixed_seed, open_run_data, optional, read_chunks, row_batches
from sample import PLAIN, Run, load_run

# what is measured
out_dir = 'out/shakespeare_ar,out/shakespeare_mdm'  # runs, separated by commas
ckpt = 'last'          # their weights: last; or best, of the lowest validation loss (keep_best)
task = 'likelihood'    # likelihood, parts, generation, speed, curves, scaling, infill, order,
                       # recover, noises, translation, length, reversal; report: half of them, on
                       # one page
report_dir = 'out/report'  # where report.md, report.json and the pictures go
split = 'val'          # train, val, test; likelihood: or several with commas; generation and
                       # speed: val, always
max_windows = 64       # parts, infill, recover, order: windows of the split, evenly spread; 0 =
                       # all; likelihood: of train only, it reads all of the other splits
device = 'auto'        # cuda, mps, cpu; auto takes the first that is there
save_texts = ''        # generation, translation, infill, recover, reversal: a file, x.jsonl, to
                       # which the texts are added: given, corrupted, written, right, score (% of
                       # known words; chrF of translation; else % of right tokens, or texts)
cleanup = False        # generation, translation, length, reversal: drop words that repeat the one
                       # before, and then score
trust_remote_code = False  # run the code that a model of the Hugging Face hub consists of
seed = 1
batch_size = 16        # rows at a time
repeats = 4            # independent draws of a bound, each with its own noise
target_se = 0.005      # likelihood, noises, parts, order: 8 to 64 draws, as many as bring the
                       # standard error of a bound down to this (nats/token); 0: only repeats
discrete_steps = ()    # likelihood: also the bounds of mdm and d3pm in these numbers of diffusion
                       # steps, as (10, 1000)
levels = (0.15, 0.3, 0.5, 0.7, 0.9)  # parts: shares of noise at which the loss is measured
gen_tokens = 100_000   # generation: tokens to write, in texts as long as the context; speed and
                       # report write fewer unless it is given
gen_length = 64        # order: tokens of a text that is scored; an exact nll takes as many passes
judge = ''             # generation, speed: an AR run, or a causal model of Hugging Face's
                       # transformers; '' = the first AR run of out_dir
data = ''              # likelihood: score these texts in place of each run's own: files or names in
                       # data/, with commas; bits/byte compare runs of different tokenizers
skip_unknown = False   # data: leave out characters that a run's tokenizer lacks ("less" so many)
grid_steps = (4, 8, 16, 32, 64, 128, 256)  # speed: steps of each decoder
# answers to prompts, for translation and length; --length, a setting of sample.py, may here also be
# reference, as many masks as the reference answer needs, or several names with commas
file = ''              # translation: lines of (level TAB) prompt TAB answer, in place of the split
max_rows = 0           # the first so many prompts; 0 = all
greedy = True          # take the most likely tokens, most confident first if decoder is auto;
                       # False: sample them with temperature
answer_steps = (1, 4, 8, 16)  # steps of masked models, one after the other; length: only the last

KNOWN_TOKENS = 20_000_000  # of training text are read: for words, copies, facts and frequent tokens
EOS_SHARES = (0.25, 0.5, 0.75, 1.0)  # length.png: shares of an answer's window that are masked
LENGTH_BLOCK = 8       # length: tokens per block of the decoding in blocks, for comparison
MOST_DRAWS = 64        # draws of a bound, even if its standard error is still above target_se
N_LEVELS, N_PLACES = 16, 16  # points of the two curves of likelihood.png
# settings that seeds of one configuration may change
MAY_DIFFER = {'seed', 'out_dir', 'resume', 'overwrite', 'init_from', 'eval_interval', 'keep_best',
              'log_interval', 'eval_repeats', 'wandb_run_name', 'compile', 'device', 'track',
              'wandb_project'}
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '0.45',
          '#882255')   # distinct for the colour-blind; printed in grey, the markers are
MARKERS = 'os^Dv<>PXp'  # one more than colours, so that only the 91st line of a picture repeats
DIGITS = {             # digits after the point in a column; 1 of what is in %, 3 of the rest
    'tokens/s': 0, 'updates': 0, **dict.fromkeys(('BLEU', 'chrF', 'ROUGE-1', 'ROUGE-L'), 2),
    **dict.fromkeys(('nats/token', 's.e.', 'bits/token', 'bits/char', 'bits/byte', 'PFLOP'), 4),
    **dict.fromkeys(('ms/pass', 'minutes', 'nfe', 'too long by', 'masks', 'saved',
                     'ms/sentence', 'sentences/s', 'seconds'), 1)}


# --------------------------------------------------------------------------------- runs and data


def names_in(text):
    """The names in a text, which has commas between them."""
    return [name.strip() for name in text.split(',')]


def load_runs(out_dirs, device, one_data_set=True, ckpt='last', trust=False):
    """[Run] of the folders, with commas between them; all on one data set if that is asked."""
    runs = [load_run(path, device, ckpt, trust) for path in names_in(out_dirs)]
    for run in runs:
        if data_set(run.meta) != data_set(load_meta(run.settings['dataset'])):
            raise UserError(f'data/{run.settings["dataset"]} is not what {run.name} was trained on')
        if one_data_set and data_set(run.meta) != data_set(runs[0].meta):
            raise UserError(f'{runs[0].name} and {run.name} were trained on different data: their '
                            'tokens cannot be compared, only likelihoods can, in bits per byte')
    return runs


def load_log(path):
    """A run without its model, and its log: {'iter', 'tokens', 'seconds', 'val', 'measured'}.

    All but 'measured' are arrays, with an entry for every evaluation.
    The evaluation before the first update is left out: most runs have log V' there, and it would
    stretch the axis of curves.png.
    """
    try:
        settings = json.loads(Path(path, 'config.json').read_text('utf-8'))
        rows = [*csv.DictReader(Path(path, 'log.csv').read_text('utf-8').splitlines())][1:]
        log = {k: np.array([float(r[k]) for r in rows]) for k in 'iter tokens seconds val'.split()}
        meta, measured = load_meta(settings['dataset']), [row['measured'] for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise UserError(f'{path} has no whole log.csv and config.json: it is not a run, or one '
                        f'that is half written ({type(e).__name__})') from e
    require('out_dir', path, rows, 'a run with evaluations: train it further')
    run = Run(Path(path).name, None, None, meta, None, settings, log['iter'][-1], path)
    return run, log | {'measured': measured[0]}


def about(run):
    """The data set and the context length of a run in words."""
    return (f'{run.meta["name"]} ({run.meta["source"]}; tokens: {run.meta["tokenizer"]["kind"]}; '
            f'context {run.settings["block_size"]})')


def data_of(run):
    """The Stream or Rows of a run as in its training, but with all rows: row_share is not read."""
    return open_run_data(run.settings | {'row_share': 1.0})


def common_windows(runs, settings, most=math.inf):
    """Windows (N, T) of the split, as long as the shortest context of the runs, T <= most."""
    T = min(most, *(run.model.config.block_size for run in runs))
    return data_of(runs[0]).windows(settings['split'], T, settings['max_windows'])


def decoded(run, rows, settings):
    """The texts of rows, lists of ids; with `cleanup` without words that repeat the one before."""
    texts = [run.tokenizer.decode(ids) for ids in rows]
    return [*map(sample.without_repeated_words, texts)] if settings['cleanup'] else texts


def records(run, score, **columns):
    """[{'given', 'written', ..., 'score'}], lines of save_texts; columns: texts, or ids (N, T)."""
    shown = [x if isinstance(x, list) else [sample.text_of(ids, run.tokenizer, run.model.mask_id)
                                            for ids in x.tolist()] for x in columns.values()]
    return [dict(zip([*columns, 'score'], values)) for values in zip(*shown, score)]


def decoding(run, settings):
    """The settings; for AR, which has one decoder and writes its own end, those that suit it."""
    only = PLAIN | {'decoder': 'auto', 'length': 'auto', 'length_candidates': 1}
    return settings | (only if run.objective.exact else {})


def training_text(runs):
    """The training text of runs on a stream; of a long one, its first KNOWN_TOKENS tokens.

    train_tokens are the first ones, so the longest text of any run holds those of the others.
    """
    ids = max((data_of(run).train for run in runs), key=len)
    return runs[0].tokenizer.decode(ids[:KNOWN_TOKENS].tolist())


# --------------------------------------------------------------------------- tables and pictures


class Number(float):
    """A float that prints `<=` before an upper bound, and `+-` spread after a mean."""

    def __new__(cls, value, bound=False, spread=None):
        number = super().__new__(cls, value)
        number.bound, number.spread = bound, spread
        return number

    def __format__(self, spec):
        text = f'{"<= " if self.bound else ""}{float(self):{spec}}'
        return text if self.spread is None else f'{text} +- {self.spread:{spec}}'


def seeds_together(rows, runs):
    """The rows, with the seeds of each configuration made one row: mean +- standard deviation.

    The n-th row of a run is averaged with the n-th rows of the other seeds, unless their curves
    have other numbers of points. Two runs of the same seed are not averaged.
    """
    copies, rows_of, owners, groups = Counter(), Counter(), {}, {}
    for run in runs:
        shared = {name: run.settings[name] for name in sorted({*run.settings} - MAY_DIFFER)}
        what = f'{run.updates} {bool(run.settings.get("init_from"))} {shared}'
        copies[what, run.settings['seed']] += 1
        owners[run.name] = what, copies[what, run.settings['seed']]  # 2: the second of one seed
    for row in rows:
        rows_of[row['run']] += 1
        points = [len(value) for value in row.values() if isinstance(value, list)]
        owner = owners.get(row['run'], row['run'])  # a reference row belongs to no run
        groups.setdefault((owner, rows_of[row['run']], *points), []).append(row)
    return [group[0] if len(group) == 1 else mean_row(group) for group in groups.values()]


def mean_row(rows):
    """The mean of the rows of several seeds; words and texts are the first's."""
    mean = dict(rows[0], run=f'{rows[0]["run"]} ({len(rows)} seeds)')
    for key, value in rows[0].items():
        values = [row[key] for row in rows]
        if isinstance(value, list) and key != 'texts':
            mean[key] = np.mean(values, axis=0).tolist()
        elif all(isinstance(v, (int, float)) for v in values) and len(set(values)) > 1:
            mean[key] = Number(np.mean(values), getattr(value, 'bound', False),
                               np.std(values, ddof=1))
    return mean


def shown(column, value):
    """The text of a value in a column of a table."""
    # its first word is for 'BLEU shorter', which is like 'BLEU'
    digits = 1 if '(%)' in column else DIGITS.get(column, DIGITS.get(column.split()[0], 3))
    digits = f'.{digits}f' if isinstance(value, float) else ''
    return value if isinstance(value, str) else f'{value:,{digits}}'


def markdown(rows):
    """A Markdown table of dicts with the same keys, all but the first column aligned right."""
    columns = [name for name, value in rows[0].items() if not isinstance(value, list)]
    cells = [columns] + [[shown(name, row[name]) for name in columns] for row in rows]
    first, *others = [max(map(len, column)) for column in zip(*cells)]  # widths
    lines = [' | '.join([a.ljust(first), *map(str.rjust, b, others)]) for a, *b in cells]
    rule = '|'.join(['-' * (first + 2), *('-' * (width + 1) + ':' for width in others)])
    return '\n'.join([f'| {lines[0]} |', f'|{rule}|', *(f'| {line} |' for line in lines[1:])])


def panels(n):
    """A figure and its n axes, side by side, whose lines take one colour and marker after another.

    A line that is given a colour and a marker of its own takes none of these.
    """
    fig = Figure(figsize=(4.8 * n, 4.4), layout='constrained')
    axes = fig.subplots(1, n, squeeze=False)[0]
    for ax in axes:
        ax.set_prop_cycle(color=COLORS * len(MARKERS), marker=[*MARKERS] * len(COLORS))
        ax.grid(color='0.92')
        ax.spines[['top', 'right']].set_visible(False)
    return fig, axes


def save_figure(fig, path):
    """Writes a figure whose panels share one legend; returns the Markdown that shows it."""
    handles, labels = fig.axes[-1].get_legend_handles_labels()
    inches = 0.6 + 0.07 * max(map(len, labels), default=0)  # of an entry
    fig.legend(handles, labels, loc='outside upper center', frameon=False, fontsize=9,
               ncols=max(1, int(fig.get_figwidth() / inches)))
    for text in fig.findobj(Text):  # names of runs: between two $ matplotlib reads mathematics
        text.set_parse_math('$' not in text.get_text())
    fig.savefig(path, dpi=150)
    return f'![{path.stem}]({path.name})'


# ------------------------------------------------------------------------------------ likelihood


def draw_until(target_se, repeats, draw):
    """(mean, its standard error, number) of the values draw(0), draw(1), ...

    With a target_se, at least 8 draws are made, since the standard error of 4 is itself off by 40%;
    their spread says how many are needed. To stop as soon as the error happens to look small would
    report errors that are much too small; these are up to 15% too small (simulated), since few are
    made where the first 8 happen to agree.
    """
    values = [draw(n) for n in range(max(8, repeats) if target_se else repeats)]
    needed = np.nan_to_num((np.std(values, ddof=1) / target_se) ** 2) if target_se else 0
    values += [draw(n) for n in range(len(values), min(MOST_DRAWS, math.ceil(needed)))]
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5), len(values)


def nll_or_bound(run, objective, batches, settings):
    """(nats per token of all batches, standard error, draws); an exact nll, 'exact', ''."""
    def draw(n):
        return evaluate(run.model, objective, batches, mixed_seed(settings['seed'], n))[0]

    if objective.exact:
        return draw(0), 'exact', ''
    return draw_until(settings['target_se'], settings['repeats'], draw)


def token_nll(model, x0, is_mask, scored, level=None):
    """-log p(x0_i | xt) at every scored position i, (B, T) nats; 0 at the others.

    xt is x0 with masks at is_mask. x0 int64, is_mask, scored bool: (B, T). level (B, 1), None: as
    Transformer has it.
    """
    h = model(torch.where(is_mask, model.mask_id, x0), level, where=scored, hidden=True)  # (M, C)
    return spread(in_slices(cross_entropy, model, h, x0[scored]), scored)  # (B, T)


def nll_by_place(run, x0, batch_size, seed):
    """(N_LEVELS, N_PLACES) mean -log p(x0_i | xt) of masked tokens, by noise level and by position.

    x0 (N, T). Level k masks each token with probability t = (k + 1/2) / N_LEVELS. The nelbo per
    token is the integral over t of the mean nll of a masked token: the mean of the table. That of
    AR has one row, its nll, in which every token counts: t = 1.
    """
    model, exact, table = run.model, run.objective.exact, []
    places = np.array_split(np.arange(x0.size(1)), min(N_PLACES, x0.size(1)))
    rng = torch.Generator(model.device).manual_seed(mixed_seed(seed))
    for level in [1.0] if exact else (np.arange(N_LEVELS) + 0.5) / N_LEVELS:
        nats, count = torch.zeros(2, x0.size(1), device=model.device)  # 2 x (T,)
        for rows in x0.to(model.device).split(batch_size):
            t = torch.full((len(rows), 1), level, device=model.device)  # (B, 1)
            is_mask = torch.rand(rows.shape, generator=rng, device=rows.device) < t  # (B, T)
            nll = run.objective.token_bounds(model, rows, rng) if exact else \
                token_nll(model, rows, is_mask, is_mask, t)  # (B, T)
            nats, count = nats + nll.sum(0), count + is_mask.sum(0)
        table.append([(nats[part].sum() / count[part].sum()).item() for part in places])
    return torch.tensor(table, dtype=torch.float64)


def training_pace(run):
    """Batches per second of each process in training, without evaluations; '' without a log."""
    with suppress(UserError, KeyError):
        log, parts = load_log(run.path)[1], run.settings['gradient_accumulation_steps']
        return log['iter'][-1] * parts / max(log['seconds'][-1], 0.1)
    return ''


def in_units(nats, error, tokens, counts):
    """{column: likelihood}: nats per token and its standard error, and the nats in other units.

    error: a float, or 'exact' if nats is no bound. A text of `tokens` scored tokens has so many
    characters and bytes: counts. Tokens differ between tokenizers, but characters and bytes do not.
    """
    bits, number = nats / math.log(2), partial(Number, bound=error != 'exact')
    return {'nats/token': number(nats), 's.e.': error, 'bits/token': number(bits),
            'bits/char': number(bits * tokens / counts['characters']),
            'bits/byte': number(bits * tokens / counts['bytes']),
            'perplexity': number(math.exp(nats))}


def objectives_of(run, discrete_steps):
    """{name: Objective} whose bounds are measured: the run's own, and D3PM's in discrete_steps.

    The network of masked diffusion is also that of a reverse process in discrete steps [D3PM],
    unless it gives the mask a probability or reads the clean text of earlier blocks.
    """
    own = run.objective
    steps = discrete_steps if own.masks_anywhere and run.model.config.subs else ()
    return {own.measured.split()[0]: own} | {f'nelbo in {n:,} steps': make_objective(
        run.settings | {'objective': 'd3pm', 'diffusion_steps': n}) for n in steps}


def likelihood_curves(run, split, settings):
    """The two curves of likelihood.png, {} where there is nothing to draw.

    They are of the validation split alone, and of objectives with a nelbo that is the mean over
    masked tokens: those of any order, and AR.
    """
    if split != 'val' or run.meta['layout'] != 'stream' or not (
            run.objective.exact or run.objective.any_order):
        return {}
    x0 = data_of(run).windows(split, run.model.config.block_size, 64)
    table = nll_by_place(run, x0, settings['batch_size'], settings['seed'])
    by_share = table.nanmean(1).tolist() * (N_LEVELS // len(table))  # of AR the same everywhere
    return {'by share': by_share, 'by position': table.nanmean(0).tolist()}


def texts_to_score(run, settings):
    """[(data, split, Stream or Rows)]: the texts for likelihood(), in the run's own tokens."""
    splits = names_in(settings['split'])
    if not settings['data']:
        return [(run.meta['name'], split, data_of(run)) for split in splits]
    return [foreign_text(run, name, split, settings) for name in names_in(settings['data'])
            for split in ([''] if Path(name).is_file() else splits)]


def foreign_text(run, name, split, settings):
    """The same of a file, or of a data set with any tokenizer.

    As in prepare.py an EOT is none of the characters that are counted.
    """
    is_file = Path(name).is_file()
    layouts = {run.meta['layout'], 'stream' if is_file else load_meta(name)['layout']}
    require('data', name, layouts == {'stream'}, 'a text or a stream, and that for a run on one')
    text = ''.join(read_chunks(Path(name))) if is_file else \
        load_tokenizer(load_meta(name)).decode(load_split(name, split).tolist())
    known = set(run.meta['tokenizer'].get('chars', text))
    lacking = Counter(char for char in text.replace(EOT, '') if char not in known)
    require('skip_unknown', False, not lacking or settings['skip_unknown'],
            f'True: {name} has {lacking.total():,} characters that {run.name} does not know, '
            + ' '.join(sorted(map(repr, lacking))[:9]))
    parts = [''.join(filter(known.__contains__, part)) for part in text.split(EOT)]
    ids = run.tokenizer.encode(('' if run.meta['eos_id'] is None else EOT).join(parts))
    text = ''.join(parts)
    require('data', name, ids and text, 'a text that is not empty')
    data = data_of(run)
    data.train = np.array(ids)  # the run's Stream, but of this text
    data.tokens = lambda split: data.train
    data.meta = run.meta | {'counts': {split: {
        'tokens': len(ids), 'characters': len(text), 'bytes': len(text.encode())}}}
    lossy = run.tokenizer.decode(ids).replace(EOT, '') != text  # as BERT's, which drops capitals
    return name + f' less {lacking.total():,}' * bool(lacking) + ' rewritten' * lossy, split, data


def likelihood(runs, settings):
    """nll and nelbo of text: the nll is exact, a nelbo is an upper bound on it.

    All windows of the split (of train max_windows, evenly spread), as long as the context but for
    the last, or all rows, each read alone, in float32; of `data`, where it is given, in the tokens
    of each run. (Of train, windows of the part that a run was trained on.) A picture of it is of 64
    windows of val, and of one draw at each of 16 levels. draws: how many of the bound, each over
    all that is read; s.e.: the standard error of their mean, without that of reading few windows.
    nelbo in N steps: of the same network, in N diffusion steps. Training batches/s are those of the
    run's log (of a length head, the head's), at its own batch size; evaluation batches/s are those
    of this table, of one draw after another. Rows: the nll of ar pays for where an answer ends,
    too, but a bound of a run without predict_pad does not, since the width of a row tells; with
    predict_pad PAD is among the tokens, so that only bits per character can be compared.
    """
    rows, s = [], settings
    for run in tqdm(runs, 'likelihood', disable=None):
        for name, split, data in texts_to_score(run, s):
            batches = data.batches(split, s['batch_size'], s['max_windows'] * (split == 'train'))
            evaluate(run.model, run.objective, batches[:1])  # warm-up
            for measured, objective in objectives_of(run, s['discrete_steps']).items():
                began = time.perf_counter()
                nats, error, draws = nll_or_bound(run, objective, batches, s)
                seconds = (time.perf_counter() - began) / (draws or 1)  # of one draw
                rows.append({'run': run.name, 'data': name, 'split': split,
                             'parameters': run.model.count_parameters(), 'updates': run.updates,
                             'training batches/s': training_pace(run),
                             'evaluation batches/s': len(batches) / seconds,
                             'measured': measured, 'draws': draws}
                            | in_units(nats, error, data.scored(split), data.meta['counts'][split]))
                if objective is run.objective and s['task'] != 'noises' and not s['data']:
                    rows[-1] |= likelihood_curves(run, split, s)
    notes = []
    if len({str(run.meta['tokenizer']) for run in runs}) > 1:
        notes = ['tokens differ, so only bits per character or byte can be compared']
    texts = {(run.meta['sha256'], split, run.meta['counts'][split]['characters'])
             for run in runs for split in names_in(s['split']) if not s['data']}
    if len(texts) > len(names_in(s['split'])):
        notes += ['the texts differ, so not even those say which model is better: give --data']
    return rows, '; '.join(notes)


def plot_likelihood(rows, path):
    """likelihood.png: nll of a masked token against the share of masks, and against position."""
    rows = [row for row in rows if 'by share' in row]
    if not rows:  # they are of prompts and answers, or of texts of `data`
        return ''
    fig, (by_share, by_position) = panels(2)
    for row in rows:
        for ax, nats in (by_share, row['by share']), (by_position, row['by position']):
            n = len(nats)
            ax.plot((np.arange(n) + 0.5) / n, nats, label=row['run'])
    by_share.set(xlabel='share of tokens that are masked (AR: no masks)', xlim=(0, 1),
                 ylabel='nats per masked token')
    by_position.set(xlabel='position in the window (share of its length)', xlim=(0, 1),
                    ylabel='nll, or bound on it (nats per token)')
    return save_figure(fig, path)


def only_levels(objective, lo, hi, schedule):
    """The objective, but its bound reads levels in (lo, hi] alone, or lo = hi."""
    part = replace(objective, mask_range=(lo, hi), schedule=schedule, loss_weight='elbo')
    part.corrupt_evenly = part.corrupt  # its own reads all levels, whatever mask_range says
    return part


def parts(runs, settings):
    """What a bound consists of, by noise level, and in d3pm by step.

    The nelbo of d3pm is the sum of three parts, each measured by itself. prior: how far q(x_N | x0)
    is from masks alone; last step: the nll of writing the text from t = 1/N; other steps: the KL
    divergences of the steps before. at P% noise: the mean loss of a token that is noise (of
    uniform, of any token) where each token is noise with probability P, for P of `levels` (of d3pm
    rounded up to its steps); the mean over all P in (0, 1] is the nelbo
    of mdm, uniform and block. All in max_windows of the split, evenly spread.
    """
    rows, s = [], settings
    for run in [run for run in runs if not run.objective.exact]:
        batches = data_of(run).batches(s['split'], s['batch_size'], s['max_windows'])
        own, N = run.objective, getattr(run.objective, 'diffusion_steps', 0)
        # {part: (objective, its share of the levels)}
        found = {'nelbo': (own, 1)} | {f'at {100 * t:g}% noise': (
            only_levels(own, t, t, 'linear'), 1) for t in s['levels']}
        if N:
            rows.append({'run': run.name, 'part': 'prior', 'nats/token': 0.0, 's.e.': 'exact'})
            found = {'other steps': (only_levels(own, 1 / N, 1, own.schedule), 1 - 1 / N),
                     'last step': (only_levels(own, 0, 1 / N, own.schedule), 1 / N)} | found
        for part, (objective, share) in found.items():
            nats, error, _ = nll_or_bound(run, objective, batches, s)
            rows.append({'run': run.name, 'part': part, 'nats/token': Number(
                share * nats, bound=part == 'nelbo'), 's.e.': share * error})
    return rows, ''


def noises(runs, settings):
    """Bits per character by objective; over ar: how far above the first run with an exact nll.

    The bounds are those of task=likelihood; s.e. in nats per token.
    """
    one_of('split', settings['split'], ('train', 'val', 'test'))
    found, note = likelihood(runs, settings | {'discrete_steps': (), 'data': ''})  # one row a run
    rows, exact = [], [row['bits/char'] for row in found if row['s.e.'] == 'exact']
    for run, row in zip(runs, found):
        kind = f'{run.settings["objective"]} {run.objective.block_length or ""}'.strip()
        log = load_log(run.path)[1]
        rows.append({'run': run.name, 'objective': kind + ' with t' * run.settings['time_cond'],
                     'updates': row['updates'],
                     'minutes': np.interp(run.updates, log['iter'], log['seconds']) / 60,
                     'bits/char': row['bits/char'], 's.e.': row['s.e.'],
                     'over ar (%)': 100 * (row['bits/char'] / exact[0] - 1) if exact else ''})
    return rows, note


def plot_noises(rows, path):
    """noises.png: bits per character of each run, from left to right as they were named."""
    fig, (ax,) = panels(1)
    names = [row['objective'].replace(' ', '\n', 1) for row in rows]
    bits = [row['bits/char'] for row in rows]
    bars = ax.bar(range(len(rows)), bits, tick_label=names, zorder=2)  # above the grid
    ax.bar_label(bars, fmt='%.2f')
    ax.tick_params(axis='x', labelsize=9)  # room for 'uniform'
    ax.set(ylabel='bits per character (all but ar: an upper bound)',
           xlabel='objective, and length of its blocks')
    return save_figure(fig, path)


def ordered_nll(model, x0, order):
    """-log p(x0) of each row, (B,) nats, exact: masked diffusion that reveals in one order.

        sum over i of  -log p(x0[order[i]] | x0[order[:i]])

    x0, order int64 (B, T). order: a permutation of the positions, and order[0] is revealed first.
    One pass per token. The mean over all orders is mdm's nelbo [2110.02037].
    """
    rank = order.argsort(dim=1)  # (B, T): when each position is revealed
    return sum(token_nll(model, x0, rank >= i, rank == i).sum(1) for i in range(x0.size(1)))


def orders(runs, settings):
    """The exact nll of short texts, by the order in which their tokens are revealed.

    Masked diffusion that reveals one token at a time has an exact likelihood in each order, as AR
    has in its own. Its mean over all orders is the nelbo. Each text is read alone. In random orders
    every text has an order of its own; +- of one run: standard deviation over `repeats` draws.
    Runs on blocks, of random tokens and of d3pm are left out.
    """
    rows, s = [], settings
    require('gen_length', s['gen_length'], s['gen_length'] >= 1, '1 or more')
    x0 = common_windows(runs, s, s['gen_length'])  # (N, T)
    left = torch.arange(x0.size(1)).expand_as(x0)  # (N, T)
    rng = torch.Generator().manual_seed(s['seed'])
    random = [torch.rand(x0.shape, generator=rng).argsort(1) for _ in range(s['repeats'])]
    batches = [lambda part=part: (part, part < 0) for part in x0.split(s['batch_size'])]

    def mean(model, order):
        """The mean nll of a token of x0, revealed in the order (N, T), batch by batch."""
        both = (each.to(model.device).split(s['batch_size']) for each in (x0, order))
        return sum(ordered_nll(model, *part).sum().item() for part in zip(*both)) / x0.numel()

    for run in tqdm(runs, 'order', disable=None):
        own, exact = run.objective, run.objective.exact
        if own.any_order:
            forward, backward, *each = [mean(run.model, o) for o in (left, left.flip(1), *random)]
            found = {'left to right': forward, 'right to left': backward,
                     f'{len(each)} random orders': Number(np.mean(each),
                                                          spread=np.std(each, ddof=1))}
            rows += [{'run': run.name, 'order': order, 'measured': 'nll', 'nats/token': nats,
                      's.e.': 'exact'} for order, nats in found.items()]
        if own.any_order or exact:
            nats, error, _ = nll_or_bound(run, own, batches, s)
            rows.append({'run': run.name, 'order': 'left to right' if exact else 'all orders',
                         'measured': own.measured.split()[0],
                         'nats/token': Number(nats, bound=not exact), 's.e.': error})
    return rows, f'{len(x0)} texts of {x0.size(1)} tokens'


def curves(runs, settings):
    """How good runs were at which point of their training, by their logs.

    val: nats per token of the validation split (with predict_pad, PAD among them; of a length head,
    its own loss); nelbo: an upper bound on the nll. `val at`: the loss of every run where the first
    one ended, by tokens and by time, interpolated between evaluations (nan before its first). The
    left panel's x axis is the training tokens; if a run was trained on a part of the text
    (train_tokens), it is epochs.
    """
    logs, rows = [load_log(run.path)[1] for run in runs], []
    value_at = partial(np.interp, left=math.nan)
    tokens, seconds = (min(log[key][-1] for log in logs) for key in ('tokens', 'seconds'))
    scarce = any(run.settings.get('train_tokens') for run in runs)
    for run, log in zip(runs, logs):
        data, s = open_run_data(run.settings), run.settings
        # a row whose PAD is cropped has been read, too; of several processes, one is counted
        epochs = log['iter'] * s['gradient_accumulation_steps'] / data.batches_per_epoch \
            if s.get('predict_pad') else log['tokens'] / data.tokens_per_epoch
        best, minutes, millions = log['val'].argmin(), log['seconds'] / 60, log['tokens'] / 1e6
        x = {'x: epochs': epochs.tolist()} if scarce else {'x: tokens': millions.tolist()}
        rows.append({
            'run': run.name, 'measured': log['measured'].removesuffix(' <='),
            'tokens (M)': millions[-1], 'epochs': epochs[-1], 'minutes': minutes[-1],
            'last val': log['val'][-1], 'best val': log['val'][best], 'at epoch': epochs[best],
            f'val at {tokens / 1e6:.2f}M tokens': value_at(tokens, log['tokens'], log['val']),
            f'val at {seconds / 60:.1f} minutes': value_at(seconds, log['seconds'], log['val']),
            'y': log['val'].tolist(), 'x: minutes': minutes.tolist()} | x)
    return rows, 'the data differ, and so losses cannot be compared' * any(
        data_set(run.meta) != data_set(runs[0].meta) for run in runs)


def plot_curves(rows, path):
    """curves.png: validation loss against training tokens or epochs, and against time.

    Over many epochs of a short text the loss rises again, so a ring is around its lowest point.
    """
    labels = {'x: tokens': 'training tokens (millions)',
              'x: epochs': 'epochs over the training text (ring: lowest loss)',
              'x: minutes': 'training time (minutes)'}
    fig, axes = panels(2)
    for ax, x in zip(axes, [name for name in labels if name in rows[0]]):
        for row in rows:
            bound = ' (an upper bound on the nll)' * (row['measured'] == 'nelbo')
            (line,) = ax.plot(row[x], row['y'], label=f'{row["run"]}, {row["measured"]}{bound}')
            if 'x: epochs' in row:
                best = np.argmin(row['y'])
                ax.plot(row[x][best], row['y'][best], 'o', ms=16, mfc='none', c=line.get_color())
        ax.set_xlabel(labels[x])
        if x == 'x: epochs':
            ax.set_xscale('log', base=2)
            ax.xaxis.set_major_formatter('{x:g}')
    axes[0].set_ylabel('validation loss (nats per token)')
    return save_figure(fig, path)


def power_law(C, L, with_floor):
    """L_inf, a > 0, b of L(C) = L_inf + a C^-b by least squares; L_inf = 0 unless with_floor.

    C, L (n,). For each b of a fine grid, L is linear in the other two.
    """
    b = np.geomspace(0.01, 4, 1000)
    x = C ** -b[:, None]  # (1000, n)
    dx, dL = x - with_floor * x.mean(1, keepdims=True), L - with_floor * L.mean()
    a = (dx @ dL / (dx ** 2).sum(1)).clip(1e-9)  # (1000,)
    best = ((a[:, None] * dx - dL) ** 2).sum(1).argmin()
    return (L.mean() - a[best] * x[best].mean() if with_floor else 0.0), a[best], b[best]


def scaling(runs, settings):
    """How the loss of groups of runs falls with training compute, and how much more one needs.

    val: the last loss of a run, nats per token (<= an upper bound). PFLOP: 10^15 multiplications
    and additions of its updates, those of the head only where a token is scored; seconds: of the
    same updates. Neither counts evaluations, nor the run that a run began with (init_from). fit:
    L(C) = L_inf + a C^-b, C in PFLOP, by least squares; with fewer than four budgets of compute
    L_inf is 0. val of a fit: the lowest loss that both its group and the first group have reached;
    PFLOP: what this loss costs by the fit; times: that cost divided by the cost by the first
    group's fit. +- of a fit: half of the central 68% of it and 200 fits to redrawn losses, which
    are the curve with normal noise as large as the residuals; none where a group has no more runs
    than the curve has parameters. The error does not include that the law may be another.
    """
    rows, seen, of_fit = [], [], dict.fromkeys(('L_inf', 'a', 'b', 'times'), '')
    for run in runs:
        s, log = run.settings, load_log(run.path)[1]
        kind = f'{s["objective"]} {make_objective(s).block_length or ""}'.strip()
        same = data_set(run.meta) == data_set(runs[0].meta)
        require('out_dir', run.path, same and log['iter'][-1] == s['max_iters'],
                'a run that is finished, on the data of the others')
        rows.append({
            'run': run.name, 'group': f'{kind}, n_conv {s.get("n_conv", 0)}',
            'seconds': log['seconds'][-1], 'val': Number(log['val'][-1], '<=' in log['measured']),
            'PFLOP': log['tokens'][-1] * flops_per_token(s, open_run_data(s)) / 1e15} | of_fit)
    for i, group in enumerate(dict.fromkeys(row['group'] for row in rows)):
        C, L = np.array(sorted((r['PFLOP'], r['val']) for r in rows if r['group'] == group)).T
        n = int(1 + (np.diff(np.log(C)) > 0.05).sum())  # budgets; the compute of seeds differs less
        require(f'budgets of {group}', n, n > 1 and L[0] > L[-1], '2 or more, with falling losses')
        floor, a, b = power_law(C, L, n > 3)
        curve = floor + a * C ** -b
        noise = (((L - curve) ** 2).sum() / (len(L) - 2 - (n > 3) or np.inf)) ** 0.5
        redraws = np.random.default_rng((settings['seed'], i)).normal(curve, noise, (200, len(L)))
        fit = np.array([power_law(C, y, n > 3) for y in (L, *redraws)]).T  # (3, 201)
        seen.append((L.min(), fit))
        loss = max(L.min(), seen[0][0])
        # the logarithm of the compute for this loss, of the group and of the first one: 2 x (201,)
        own, one = (np.log(a / (loss - floor).clip(1e-9)) / b for floor, a, b in (fit, seen[0][1]))
        rows.append(dict(run='fit', group=group, seconds='', val=loss, x=[*C], y=[*L]) | {
            name: Number(x[0], spread=np.diff(np.percentile(x, (16, 84)))[0] / 2 or None)
            for name, x in zip(('PFLOP', *of_fit), (np.exp(own), *fit, np.exp(own - one)))})
    return rows, ''


def plot_scaling(rows, path):
    """scaling.png: the last loss of every run against its compute, and the fit of each group."""
    fig, (ax,) = panels(1)
    for fit in [row for row in rows if 'x' in row]:
        x = np.array(fit['x'])
        (points,) = ax.plot(x, fit['y'], ls='', label=fit['group'])
        ax.plot(x, fit['L_inf'] + fit['a'] * x ** -fit['b'], c=points.get_color(), marker='')
    ax.set(xscale='log', xlabel='compute (PFLOP)', ylabel='validation loss (nats per token)')
    return save_figure(fig, path)


# ------------------------------------------------------------------------ text that runs generate


def words_of(text):
    """Runs of letters, apostrophes inside them, in lower case."""
    return re.findall(sample.WORD, text.replace(EOT, ' ').lower())


def text_row(name, texts, ids, known):
    """What can be counted in texts: known words, entropy of tokens, share of distinct n-grams.

    ids: the tokens of each text; known: the set of words that count as known. No n-gram reaches
    from one text into the next.
    """
    words_in, tokens = [*map(words_of, texts)], [i for row in ids for i in row]
    words = [w for each in words_in for w in each]
    p = np.array(list(Counter(tokens).values())) / len(tokens)
    row = {'run': name, 'tokens': len(tokens),
           'known words (%)': 100 * sum(w in known for w in words) / max(1, len(words)),
           'unigram entropy (bits)': float(-(p * np.log2(p)).sum())}
    for n in (1, 2, 3):
        grams = [gram for each in words_in for gram in zip(*(each[i:] for i in range(n)))]
        row[f'distinct-{n}'] = len(set(grams)) / max(1, len(grams))
    return row


def longest_copy(texts, source):
    """Length, in characters, of the longest piece of any of the texts that is in `source` too.

    Hashes of all pieces of n characters are compared first; where they match, the pieces
    themselves, so the result is exact. If no piece of n is there, no longer one is: n is doubled
    until none is there, then bisected.
    """
    text, source = SURROGATE.join(texts).replace(EOT, '\n'), source.replace(EOT, '\n')
    codes = [np.frombuffer(each.encode('utf-32-le', 'surrogatepass'), np.uint32).astype(np.uint64)
             for each in (text, source)]

    def is_new(n):
        if n > min(map(len, codes)):
            return True
        powers = np.uint64(0x9E3779B97F4A7C15) ** np.arange(n, dtype=np.uint64)  # modulo 2^64
        hashes, known = (np.lib.stride_tricks.sliding_window_view(x, n) @ powers for x in codes)
        found = np.isin(hashes, known).nonzero()[0]
        return not any(text[i:i + n] in source for i in found)

    high = 1
    while not is_new(high):
        high *= 2
    return bisect_left(range(high), True, lo=high // 2 + 1, key=is_new) - 1


def hub_judge(path, device, trust):
    """A Run of a causal model of transformers, as far as judged() needs one.

    Like ours it reads a start token before every text.
    """
    tokenizer = from_hub('AutoTokenizer', path, trust_remote_code=trust)
    model = from_hub('AutoModelForCausalLM', path, dtype=torch.float32,
                     trust_remote_code=trust).to(device).eval()
    context = getattr(model.config, 'max_position_embeddings', None)
    ids = model.config.bos_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    start = next((i for i in ids if i is not None), None)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    require('judge', path, context and start is not None and encode('a'),
            'a model with a tokenizer, a start or an end token, and a longest context')
    a, b = model(torch.tensor([[start, 0], [start, 1]], device=device)).logits
    require('judge', path, torch.allclose(a[0], b[0], atol=1e-4),
            'a causal model: this one sees the tokens that it scores')

    def nll(model, x0, rng):
        """As the bound of Autoregression, -log p of each row of x0 (B, T): (B,) nats."""
        x = torch.cat([torch.full_like(x0[:, :1], start), x0[:, :-1]], dim=1)  # (B, T)
        return cross_entropy(model(x).logits.flatten(0, 1), x0.flatten()).view(x0.shape).sum(1)

    return Run(Path(path).name, model, SimpleNamespace(bound=nll), {'tokenizer': path},
               SimpleNamespace(encode=encode), {'block_size': context}, 0, path)


def load_judge(runs, settings):
    """The autoregressive Run whose likelihood of a text is reported, or None if there is none."""
    path, device = settings['judge'], pick_device(settings['device'])
    if not path:
        return next((run for run in runs if run.objective.exact), None)
    if not Path(path, 'ckpt.pt').exists():
        return hub_judge(path.removeprefix('hf:'), device, settings['trust_remote_code'])
    (run,) = load_runs(path, device)
    require('judge', path, run.objective.exact, 'an ar run: no other says how likely a text is')
    return run


def judged(judge, run, texts, ids, batch_size=16):
    """{column: -log p(texts) by the judge}, nats per token, or per character of another tokenizer.

    perplexity: exp of the nats per token of the judge, the "generative perplexity" of the papers.
    ids: the tokens of each text. Texts are cut into windows as long as the judge's context. A text
    that repeats itself is likely too, so the entropy and the distinct n-grams belong beside it.
    """
    if judge is None:
        return {}
    T = judge.settings['block_size']
    same = all(judge.meta.get(key) == run.meta[key] for key in ('tokenizer', 'eos_id'))
    rows = ids if same else [judge.tokenizer.encode(text) for text in texts]
    windows = [row[i:i + T] for row in rows for i in range(0, len(row), T)]
    nats = 0.0
    for batch in row_batches(np.array([*map(len, windows)]), batch_size):
        x0 = torch.tensor([windows[i] for i in batch], device=judge.model.device)  # (B, <= T)
        nats += judge.objective.bound(judge.model, x0, None).sum().item()
    unit, counted = ('nll', ids) if same else ('nats/char', [t.replace(EOT, '') for t in texts])
    return {f'{unit} under {judge.name}': nats / sum(map(len, counted)),
            f'perplexity under {judge.name}': math.exp(nats / sum(map(len, rows)))}


def write_texts(run, settings):
    """(name, ids of texts, cost): at least gen_tokens, in texts as long as the context.

    cost: {column: figure}. nfe: passes of a text, mean over texts; a pass serves a whole batch.
    """
    T = run.model.config.block_size
    canvases = [[run.model.mask_id] * T] * math.ceil(settings['gen_tokens'] / T)
    done, (n_tokens, passes, seconds) = sample.complete(run, canvases, decoding(run, settings))
    return run.name, [ids for ids, _ in done], {
        'nfe': float(np.mean([figures['nfe'] for _, figures in done])),
        'tokens/s': n_tokens / seconds, 'ms/pass': 1000 * seconds / passes}


def held_out(run, settings):
    """As write_texts(), but the texts are of the validation split, and the cost is ''."""
    T = run.model.config.block_size
    windows = data_of(run).windows('val', T, math.ceil(settings['gen_tokens'] / T))
    return 'validation text', windows.tolist(), dict.fromkeys(('nfe', 'tokens/s', 'ms/pass'), '')


def generation(runs, settings):
    """What runs write, beside as much of the validation split; texts are as long as the context.

    A word is known if it occurs in the training text (its first 20,000,000 tokens); what is left of
    a word that the end of a text cuts off counts as a word, the more often the shorter the context.
    The validation text is cut as the texts of the first run. The longest copy is the longest piece
    of a text that occurs there. nll under: nats per token of an autoregressive model, the judge;
    nats/char under: the same of a judge of the hub or with other tokens; perplexity: exp of the
    nats per judge's token. nfe: passes of a text; a pass serves a whole batch.
    """
    run, judge, training = runs[0], load_judge(runs, settings), training_text(runs)
    known, rows = set(words_of(training)), []
    for name, ids, cost in [held_out(run, settings),
                            *(write_texts(each, settings) for each in runs)]:
        texts = decoded(run, ids, settings)
        ids = [*map(run.tokenizer.encode, texts)] if settings['cleanup'] else ids
        scores = [text_row('', [text], [row], known)['known words (%)']
                  for text, row in zip(texts, ids)]
        rows.append(text_row(name, texts, ids, known)
                    | judged(judge, run, texts, ids, settings['batch_size'])
                    | {'longest copy (chars)': longest_copy(texts, training)} | cost
                    | {'texts': records(run, scores, written=texts)})
    return rows, ''


def first_texts(rows, path):
    """The beginning of each row's first text, one below the other; path is not used."""
    return '\n\n'.join(f'{row["run"]}:\n\n```text\n{row["texts"][0]["written"][:300]}\n```'
                       for row in rows)


def decoders_of(run, steps, guidance):
    """[(decoder, its varied setting as text, settings)]: the points of speed.png."""
    objective, T = run.objective, run.model.config.block_size
    if objective.exact:
        return [(objective.decoders[0], '', {})]
    ways = {name: {'decoder': name} for name in objective.decoders if name != 'threshold'}
    if objective.reads_masks:
        ways['confidence, cosine'] = {'decoder': 'confidence', 'counts': 'cosine'}
    if objective.masks_anywhere:  # it has no blocks of its own
        ways['in blocks'] = {'decoder': 'confidence', 'block_length': math.ceil(T / 8)}
        if not (guidance or isinstance(run.model, HubNetwork)):
            ways['in blocks, cached'] = ways['in blocks'] | {'prefix_cache': True}
    # T masks take T steps at most, and a block one at least
    points = [(name, f'steps={n}', how | {'steps': n}) for name, how in ways.items() for n in steps
              if not objective.reads_masks
              or T / (objective.block_length or how.get('block_length', T)) <= n <= T]
    if 'threshold' in objective.decoders:
        points += [('threshold', f'threshold={p}', {'decoder': 'threshold', 'threshold': p})
                   for p in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)]
    return points


def speed(runs, settings):
    """What text costs with every decoder and number of steps, and how good it is.

    The columns are those of task=generation. decoder, steps and threshold are those of the rows,
    whatever the settings say, and so are counts and prefix_cache where a row names them.
    """
    require('block_length', settings['block_length'], not settings['block_length'],
            '0: there are rows of decoding in blocks')
    run, judge, known = runs[0], load_judge(runs, settings), set(words_of(training_text(runs)))
    rows, grid = [], settings['grid_steps']
    written = [('', '', *held_out(run, settings))]
    for each in runs:
        write_texts(each, settings | {'gen_tokens': 1, 'steps': 4})  # warm-up, one text
        written += [(decoder, setting, *write_texts(each, settings | how)) for
                    decoder, setting, how in decoders_of(each, grid, settings['guidance'])]
    for decoder, setting, name, ids, cost in written:
        texts = [run.tokenizer.decode(row) for row in ids]
        rows.append({'run': name, 'decoder': decoder, 'setting': setting} | cost
                    | judged(judge, run, texts, ids, settings['batch_size'])
                    | text_row(name, texts, ids, known))
    return rows, f'{run.model.device}{peak_memory(str(run.model.device))}'


def plot_by_passes(rows, path):
    """speed.png, translation.png: quality against passes, a line for each way to decode a run.

    What has one number of passes, as AR has, is a dotted line, too; so is the validation text.
    """
    columns = [name for name in rows[0]
               if name == 'BLEU' or name.startswith(('nll', 'nats', 'known', 'unigram'))]
    lines = {}
    for row in rows:
        words = [row.get(name) for name in ('run', 'decoder', 'length')]
        lines.setdefault(', '.join(filter(None, words)), []).append(row)
    fig, axes = panels(len(columns))
    for ax, column in zip(axes, columns):
        for label, line in lines.items():
            points = sorted((row['nfe'], row[column]) for row in line if row['nfe'] != '')
            color = '0.5'
            if points:
                color = ax.plot(*zip(*points), label=label)[0].get_color()
            if len(line) == 1:
                ax.axhline(line[0][column], c=color, lw=1, ls=':', label=label * (not points))
        ax.set_xscale('log', base=2)
        ax.xaxis.set_major_formatter('{x:g}')
        ax.set(xlabel='passes per text', ylabel=column.replace('nll', 'nll (nats per token)'))
    return save_figure(fig, path)


# ---------------------------------------------------------------------- masked or corrupted text


def fill(run, x0, is_mask, settings):
    """x0 (B, T) with the tokens at is_mask (B, T) decoded anew, greedily; and the mean nfe."""
    how = settings | PLAIN | sample.greedy(run.objective, decoding(run, settings)['decoder'])
    how |= {'repetition_penalty': 1.0}  # a blank may well hold what the text already has
    canvases = torch.where(is_mask, run.model.mask_id, x0).tolist()
    ids, figures = zip(*sample.complete(run, canvases, how)[0])
    return torch.tensor(ids), float(np.mean([each['nfe'] for each in figures]))


def hide(shape, share, width, rng):
    """(B, T) bool, True in a random `share` of a row's spans of `width` tokens, in one at least."""
    n = math.ceil(shape[1] / width)
    ranks = torch.rand(shape[0], n, generator=rng).argsort(1).argsort(1)  # (B, n) of the spans
    return (ranks < max(1, round(share * n))).repeat_interleave(width, 1)[:, :shape[1]]


def accuracy(run, x, x0, where, **given):
    """{column: percent} of the tokens x (B, T) at `where` that equal x0; the s.e. is over rows.

    texts: records() of them, with what was given. run: any that has their tokens.
    """
    shares = 100 * ((x == x0) & where).sum(1) / where.sum(1).clamp(min=1)
    return {'accuracy (%)': shares.mean().item(),
            's.e. (%)': shares.std().item() / len(x) ** 0.5 if len(x) > 1 else math.nan,
            'texts': records(run, shares.tolist(), **given, written=x, right=x0)}


def rouge(texts, references):
    """{column: F1 of words in percent, mean over texts}; {} without the package rouge-score.

    Words are those of words_of(): rouge-score's own, of a-z and 0-9, end at every accent.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return {}
    scorer = RougeScorer(['rouge1', 'rougeL'], tokenizer=SimpleNamespace(tokenize=words_of))
    scores = [scorer.score(reference, text) for text, reference in zip(texts, references)]
    return {f'ROUGE-{k[5:]}': 100 * np.mean([s[k].fmeasure for s in scores]) for k in scores[0]}


def infill(runs, settings):
    """How many masked tokens of held-out text are found again, filled in greedily.

    AR fills from left to right without what follows, masked diffusion the most confident first
    unless decoder is set (on blocks one block after the other, without what follows), uniform all
    in each step. Not read are temperature, top_k, top_p, repetition_penalty, block_length,
    prefix_cache and guidance. accuracy: share of the masked tokens that are right, s.e. over
    windows. ROUGE (pip install -e '.[eval]'): F1 of the words of whole windows.
    """
    decode, mask_id, rows = runs[0].tokenizer.decode, runs[0].model.mask_id, []
    x0, rng = common_windows(runs, settings), torch.Generator().manual_seed(settings['seed'])
    texts = [decode(row) for row in x0.tolist()]  # x0 (N, T)
    common = np.bincount(load_split(runs[0].settings['dataset'], 'train')[:KNOWN_TOKENS]).argmax()
    for share, width in ((0.25, 1), (0.5, 1), (0.75, 1), (0.25, 8), (0.5, 8)):
        is_mask = hide(x0.shape, share, width, rng)
        filled = {'most frequent token': (torch.where(is_mask, int(common), x0), 0.0)}
        for run in tqdm(runs, f'infill {share:.0%}', leave=False, disable=None):
            filled[run.name] = fill(run, x0, is_mask, settings)
        rows += [{'run': name, 'hidden': f'{share:.0%}, {"tokens" if width == 1 else "spans of 8"}'}
                 | accuracy(runs[0], x, x0, is_mask, given=x0.masked_fill(is_mask, mask_id))
                 | rouge([decode(row) for row in x.tolist()], texts) | {'nfe': nfe}
                 for name, (x, nfe) in filled.items()]
    return rows, f'{len(x0)} windows of {x0.size(1)} tokens'


def recover(runs, settings):
    """How many corrupted tokens are found, and corrected, where some were replaced at random.

    A run scores every token, as below, then replaces suspects and leaves the others. It finds them
    in two ways. number: it is given the number of wrong tokens, but not their places, and suspects
    as many, those with the highest scores. threshold: it is not, and suspects those with a score
    above log V', that of a uniform guess, and the highest in any case. found: share of the
    replaced tokens that are suspects; precision: share of the suspects that were replaced.
    accuracy: share of all tokens that are right; before: in the text that the run was given;
    s.e. over windows. Scores are nll: of ar, given the tokens before; of masked diffusion,
    given all tokens but an eighth of the positions, which is masked; of uniform, given all
    tokens and (in both ways) the share that is noise. Suspects are decoded as the blanks of
    task=infill are. Runs on blocks are left out.
    """
    x0, rng = common_windows(runs, settings), torch.Generator().manual_seed(settings['seed'])
    V, everywhere, rows = runs[0].meta['vocab_size'], torch.ones_like(x0, dtype=torch.bool), []
    for rate in (0.05, 0.1, 0.2):
        corrupted = hide(x0.shape, rate, 1, rng)  # (N, T)
        other = (x0 + torch.randint(1, V, x0.shape, generator=rng)) % V
        corrupted &= other != runs[0].model.mask_id  # which is one of the V in a run from the hub
        xt, n = torch.where(corrupted, other, x0), corrupted.sum(1, keepdim=True)  # (N, T), (N, 1)
        # a run on blocks never reads the blocks that follow
        for run in [run for run in runs if not run.objective.block_length]:
            nll = torch.cat([token_by_token(run, part, rate)
                             for part in xt.split(settings['batch_size'])])  # (N, T)
            rank = nll.argsort(1, descending=True).argsort(1)  # (N, T)
            # one suspect at least: a canvas without a mask cannot be decoded
            for way, suspect in (('number', rank < n),
                                 ('threshold', (nll > math.log(V)) | (rank == 0))):
                x, _ = fill(run, xt, suspect, settings)
                right = (suspect & corrupted).sum().item()
                rows.append({'run': run.name, 'replaced': f'{rate:.0%}', 'found by': way,
                             'found (%)': 100 * right / n.sum().item(),
                             'precision (%)': 100 * right / suspect.sum().item()}
                            | accuracy(run, x, x0, everywhere, corrupted=xt)
                            | {'before (%)': 100 * (xt == x0).float().mean().item()})
    return rows, f'{len(x0)} windows of {x0.size(1)} tokens'


def token_by_token(run, x, rate):
    """-log p of every token of x (B, T), which may be wrong: (B, T) nats, see recover().

    rate: the share of wrong tokens, the noise level of uniform diffusion.
    """
    model, x = run.model, x.to(run.model.device)
    if run.objective.exact:
        return run.objective.token_bounds(model, x, None).cpu()  # its nll: AR draws nothing
    if not run.objective.reads_masks:
        level = torch.full((len(x), 1), rate, device=x.device)
        return token_nll(model, x, x < 0, x >= 0, level).cpu()  # no masks, and all are scored
    eighth = torch.arange(x.size(1), device=x.device).expand_as(x) % 8  # (B, T)
    return sum(token_nll(model, x, eighth == k, eighth == k) for k in range(8)).cpu()


FACT = re.compile(r'(?m)^(\w+ \w+) is (the \w+ of \w+)\.$')  # of the data set reversal


def reversal(runs, settings):
    """The share of facts 'A is B.' that a run completes, letter by letter [2309.12288].

    The training text has all facts as 'A is B.', and half of them ('stated') also as 'B is A.'
    Greedy; a masked model writes its most confident token first. The blank, __, is as wide as its
    answer, and all of it must be right.
    """
    rows = []
    for run in runs:
        training, row, texts = training_text([run]), {'run': run.name}, []
        facts = sorted(set(FACT.findall(training)))
        turned = [(a, b) for a, b in facts if f'\n{b} is {a}.\n' in training]
        others = [fact for fact in facts if fact not in turned]
        fine = turned and others and run.meta['tokenizer']['kind'] == 'char'
        require('out_dir', run.path, fine, 'a run on facts: python prepare.py reversal')
        how = decoding(run, settings) | sample.greedy(run.objective)
        how |= {'steps': 0} if run.objective.reads_masks else {}  # one token a step
        questions = {'A is __': [(f'\n{a} is {b}.\n', b) for a, b in facts],
                     '__ is B': [(f'\n{a} is {b}.\n', a) for a, b in facts],
                     'B is __, stated': [(f'\n{b} is {a}.\n', a) for a, b in turned],
                     'B is __, never stated': [(f'\n{b} is {a}.\n', a) for a, b in others]}
        for column, asked in questions.items():
            templates = [text.replace(answer, f'[_:{len(answer)}]') for text, answer in asked]
            done, _ = sample.complete(run, [sample.template_canvas(
                template, run.tokenizer, run.model.mask_id) for template in templates], how)
            written = decoded(run, [ids for ids, _ in done], settings)
            right = [text for text, _ in asked]
            score = [100 * (text == other) for text, other in zip(written, right)]
            row[f'{column} (%)'] = sum(score) / len(score)
            texts += records(run, score, given=templates, written=written, right=right)
        rows.append(row | {'texts': texts})
    return rows, f'{len(facts)} facts, {len(turned)} of them stated in both directions'


# ---------------------------------------------------------------------------- answers to prompts


def file_pairs(run, path):
    """As row_pairs, of the lines of a file with tabs; '' is the level of lines without one."""
    text = ''.join(read_chunks(Path(path)))
    rows = [[column.strip() for column in line.split('\t')]
            for line in text.split('\n') if line.strip()]
    bad = [row for row in rows if len(row) not in (2, 3) or not all(row[-2:])]
    if bad or not rows:
        found = f'has the line {" ".join(bad[0])[:40]!r}' if bad else 'is empty'
        raise UserError(f'{path} {found}: write (level TAB) prompt TAB answer on each line')
    return [['', *row][-3:] + [*map(run.tokenizer.encode, row[-2:])] for row in rows]


def row_pairs(run, settings):
    """[(level, prompt, answer, ids of the prompt, of the answer)] of max_rows rows of the split.

    The level is 'shorter' up to the median length of an answer, and 'longer' above it.
    """
    decode = run.tokenizer.decode
    pairs = data_of(run).pairs(settings['split'], settings['max_rows'])
    middle = np.median([len(answer) for _, answer in pairs])
    return [('shorter' if len(answer) <= middle else 'longer', decode(prompt), decode(answer),
             prompt, answer) for prompt, answer in pairs]


def answers_of(run, pairs, settings):
    """sample.answer's (answers, figures, sizes (3, N)) for N pairs; the answers as texts."""
    *_, prompts, references = zip(*pairs)
    answers, figures, sizes = sample.answer(run, prompts, settings, references)
    return decoded(run, answers, settings), figures, sizes


def make_score():
    """The function score(texts, references) -> {column: score}, and its scores' signatures."""
    sacrebleu = optional('sacrebleu.metrics', extra='eval')
    metrics = {'BLEU': sacrebleu.BLEU(), 'chrF': sacrebleu.CHRF()}

    def score(texts, references):
        return {name: metric.corpus_score(texts, [references]).score
                for name, metric in metrics.items()} | rouge(texts, references)

    score(['a'], ['a'])  # without a score there is no signature
    return score, '; '.join(f'{name} {each.get_signature()}' for name, each in metrics.items())


def ways_to_answer(run, settings):
    """[(length, steps, settings)]: each `length` with each of answer_steps; of AR one way, ''."""
    s = decoding(run, settings)
    s |= sample.greedy(run.objective, s['decoder']) if s['greedy'] else \
        {'decoder': sample.decoder_name(s['decoder'], run.objective)}
    if run.objective.exact:
        return [('', '', s)]
    names = dict.fromkeys(sample.length_name(name, run) for name in names_in(s['length']))
    steps = s['answer_steps'] if s['decoder'] != 'threshold' else ['']  # it takes what it needs
    return [(name, n, s | {'length': name, 'steps': n}) for name in names for n in steps]


def translation(runs, settings):
    """Scores of answers to prompts, for each way to decode a run.

    length: how a masked model knows the number of tokens to write. length ratio: tokens of the
    answer over those of the reference, mean; no EOS, empty: shares of the answers; nfe: passes of
    a batch, mean over prompts. BLEU and chrF are sacrebleu's; BLEU shorter, longer: of references
    up to the median length, and above it (of a file, of each level); ROUGE: F1 of words in lower
    case, mean over prompts.
    """
    score, signatures = make_score()
    rows, path, n = [], settings['file'], settings['max_rows'] or None
    pairs = file_pairs(runs[0], path)[:n] if path else row_pairs(runs[0], settings)
    levels, prompts, references, *_ = map(list, zip(*pairs))
    for run in runs:
        for length, steps, how in ways_to_answer(run, settings):
            length += ' (oracle)' * (length == 'reference')
            length += f', best of {how["length_candidates"]}' * (how['length_candidates'] > 1)
            written, figures, _ = answers_of(run, pairs, how)
            rows.append({'run': run.name, 'decoder': how['decoder'], 'length': length,
                         'steps': steps} | score(written, references) | figures)
            for level in filter(None, dict.fromkeys(levels)):
                part = [(a, b) for a, b, its in zip(written, references, levels) if its == level]
                rows[-1][f'BLEU {level}'] = score(*map(list, zip(*part)))['BLEU']
            chrf = [score([a], [b])['chrF'] for a, b in zip(written, references)]
            rows[-1]['texts'] = records(run, chrf, given=prompts, written=written, right=references)
    return rows, f'{len(pairs):,} prompts of {path or "the split"}; {signatures}'


# ------------------------------------------------------------------------ length before decoding


def saw_pad(run):
    """Whether a run learned to predict PAD after EOS, so that it can say where an answer ends.

    False for a run with a length head: its network is that of the run which it was trained on.
    """
    return run.settings['predict_pad'] and not run.settings.get('length_head')


def eos_probabilities(run, n, share, settings):
    """(accuracy at EOS, {distance from EOS: mean P(EOS)}) of n rows of the split.

    A random share of each answer's window is masked, and EOS always is. accuracy: in which share of
    the rows EOS is the most likely token at its own place.
    """
    model, eos_id, correct, found = run.model, run.meta['eos_id'], 0, {}
    rng = torch.Generator().manual_seed(settings['seed'])
    for batch in data_of(run).batches(settings['split'], settings['batch_size'], n):
        x0, given = batch()  # 2 x (B, T)
        is_eos = ~given & (x0 == eos_id)
        is_eos &= is_eos.cumsum(1) == 1  # PAD may be EOS
        is_mask = ~given & (torch.rand(x0.shape, generator=rng) < share) | is_eos
        xt = torch.where(is_mask, model.mask_id, x0).to(model.device)
        logits = model(xt, where=is_mask.to(model.device)).cpu()  # (M, V)
        correct += (logits.argmax(1) == eos_id)[is_eos[is_mask]].sum().item()
        distance = torch.arange(x0.size(1)) - is_eos.long().argmax(1, keepdim=True)  # (B, T)
        for i, p in zip(distance[is_mask].tolist(), logits.softmax(1)[:, eos_id].tolist()):
            found.setdefault(i, []).append(p)
    return correct / n, {i: np.mean(found[i]) for i in sorted(found)}


def ways_to_know_length(run, settings):
    """As ways_to_answer, with the last of answer_steps; `length` auto is all ways of the run."""
    s = settings | {'answer_steps': settings['answer_steps'][-1:]}
    if s['length'] == 'auto' and saw_pad(run):
        s['length'] = 'full,fit' + ',argmax,quantile' * (
            run.objective.masks_anywhere and run.meta['pad_id'] != run.meta['eos_id'])
    ways = ways_to_answer(run, s)
    may_have_blocks = run.objective.masks_anywhere and not s['block_length']
    return ways + [('full, in blocks', steps, how | {'block_length': LENGTH_BLOCK})
                   for length, steps, how in ways if length == 'full' and may_have_blocks]


def lengths(runs, settings):
    """What it saves to know the length of an answer before decoding it, and what it costs.

    fits: share of the references that fit, with EOS, into the masks; too long by: masks to spare
    where they do; masks: their mean; saved: masks fewer than `full` has; RMSE: of the predicted
    lengths, before they are rounded up, or else of the masks; nfe and ms/sentence: with the pass
    that predicts; full, in blocks: of 8 tokens. EOS found, of rows all over the split: in which
    share of the rows EOS is the most likely token at its own place.
    """
    score, _ = make_score()
    n = settings['length_candidates']
    require('length_candidates', n, n == 1, '1 for task=length')
    pairs, rows, notes = row_pairs(runs[0], settings), [], []
    full = runs[0].meta['max_answer'] + 1  # with EOS
    for run in runs:
        ways = ways_to_know_length(run, settings)
        answers_of(run, pairs[:4], ways[0][2])  # warm-up
        for length, steps, how in ways:
            written, figures, (masks, predicted, needed) = answers_of(run, pairs, how)  # 3 x (N,)
            fits = masks >= needed
            window = {'fits (%)': 100 * fits.mean(),
                      'too long by': (masks - needed)[fits].mean() if fits.any() else math.nan,
                      'masks': masks.mean(), 'saved': full - masks.mean(),
                      'RMSE': ((predicted - needed) ** 2).mean() ** 0.5}
            if run.objective.exact:  # it writes its own end
                window = dict.fromkeys(window, '')
            rows.append({'run': run.name, 'length': length} | window | {
                'steps': steps, 'nfe': figures['nfe'], 'ms/sentence': 1000 / figures['sentences/s'],
                'BLEU': score(written, [pair[2] for pair in pairs])['BLEU']})
        for share in EOS_SHARES if saw_pad(run) and run.objective.masks_anywhere else ():
            found, mean = eos_probabilities(run, len(pairs), share, settings)
            rows[-1] |= {f'x {share:.0%}': [*mean], f'y {share:.0%}': [*map(float, mean.values())]}
            notes.append(f'{run.name}, {share:.0%} of the window masked: EOS found {found:.1%}')
    return rows, '; '.join([f'{len(pairs):,} prompts; full: {full} masks', *notes])


def plot_length(rows, path):
    """length.png: P(EOS) by the distance from its place in the reference, a panel for a run."""
    rows = [row for row in rows if 'x 100%' in row]
    if not rows:  # no run learned to predict PAD
        return ''
    fig, axes = panels(len(rows))
    for ax, row in zip(axes, rows):
        for share in EOS_SHARES:
            ax.plot(row[f'x {share:.0%}'], row[f'y {share:.0%}'], marker='',
                    label=f'{share:.0%} masked')
        ax.axvline(0, color='0.5', lw=1, ls=':')
        ax.set(title=row['run'], xlabel='tokens from EOS in the reference', xlim=(-20, 20),
               ylabel='P(EOS), mean over rows')
    return save_figure(fig, path)


# ------------------------------------------------------------------------------------ the report


class Task(NamedTuple):
    """A measurement, and what is said and shown below its table."""
    measure: Callable      # (runs, settings) -> (rows, note), see the head of this file
    settings: str          # names of settings that are printed, since the numbers depend on them
    show: Callable = None  # (rows, path of a picture) -> Markdown
    on: str = 'stream'     # the kind of data that it is for: stream, pairs; '' = any


TASKS = {
    'curves': Task(curves, '', plot_curves, on=''),
    'scaling': Task(scaling, 'seed', plot_scaling, on=''),
    'likelihood': Task(likelihood, 'split max_windows seed', plot_likelihood, on=''),
    'order': Task(orders, 'split repeats seed'),
    'parts': Task(parts, 'split max_windows seed', on=''),
    'generation': Task(generation, 'batch_size seed temperature decoder steps', first_texts),
    'infill': Task(infill, 'split steps decoder seed'),
    'recover': Task(recover, 'split steps decoder seed'),
    'speed': Task(speed, 'gen_tokens batch_size seed temperature', plot_by_passes),
    'noises': Task(noises, 'split max_windows seed', plot_noises),
    'translation': Task(translation, 'split batch_size greedy temperature seed', plot_by_passes,
                        'pairs'),
    'length': Task(lengths, 'split batch_size seed length_quantile', plot_length, 'pairs'),
    'reversal': Task(reversal, '')}
WRITING = ('generation', 'infill', 'recover', 'translation', 'reversal', 'report')  # have texts
ALONE = {'speed': '--gen_tokens=2048'}  # settings of one task that come before those of the user
REPORT = {                 # the tasks of a report, and the same of each, for a laptop
    'curves': '', 'likelihood': '--split=train,val', 'order': '--max_windows=8 --target_se=0.02',
    'generation': '--gen_tokens=4096', 'infill': '--max_windows=16 --steps=32',
    'recover': '--max_windows=16 --steps=32', 'speed': '--gen_tokens=1024 --grid_steps=(8,32,128)'}


@torch.no_grad()
def run_task(name, runs, settings, command):
    """{'markdown', 'rows', 'settings', 'command'} of a task: a section of the report."""
    task, picture = TASKS[name], Path(settings['report_dir'], f'{name}.png')
    of_rows = 'documents' if runs[0].meta['sep_id'] is None else 'pairs'
    kind = 'stream' if runs[0].meta['layout'] == 'stream' else of_rows
    one_of(f'task (for {kind})', name, [other for other in TASKS if TASKS[other].on in ('', kind)])
    rows, note = task.measure(runs, settings)
    if not rows:
        raise UserError(f'task {name} has nothing to say about objectives like those of these runs')
    # of each row its words and steps, not its measurements, go into every line
    texts = [{'task': name, **{k: v for k, v in row.items()
                               if v != '' and (k == 'steps' or type(v) is str)}, **text}
             for row in rows for text in row.get('texts', [])]
    if texts and settings['save_texts']:
        with open(settings['save_texts'], 'a', encoding='utf-8') as f:
            f.writelines(json.dumps(text, ensure_ascii=False) + '\n' for text in texts)
    if settings['ckpt'] == 'best':  # which differ in their updates from seed to seed
        runs = [run._replace(updates=0) for run in runs]
    n_rows, rows = len(rows), seeds_together(rows, runs)
    picture.unlink(missing_ok=True)
    said = [f'{setting} {settings[setting]}' for setting in task.settings.split()]
    seeds = '(n seeds): mean +- standard deviation; s.e.: the mean of theirs' * (len(rows) < n_rows)
    notes = [*dict.fromkeys(map(about, runs)), note, f'{torch.get_num_threads()} threads', *said]
    parts = [markdown(rows), task.show(rows, picture) if task.show else '', getdoc(task.measure),
             f'{"; ".join(filter(None, [*notes, seeds]))}. Command: python eval.py {command}\n']
    rows = [{key: value for key, value in row.items() if key != 'texts'}
            | {f'{column} s.d.': value.spread for column, value in row.items()
               if getattr(value, 'spread', None) is not None} for row in rows]
    return {'markdown': '\n\n'.join(filter(None, parts)), 'command': command, 'rows': rows,
            'settings': settings}


def save_report(sections, folder):
    """Adds {task: section} to report.json, and makes report.md of all that it then holds."""
    path = Path(folder, 'report.json')
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # none, or damaged
        sections = {name: x for name, x in json.loads(path.read_text(encoding='utf-8')).items()
                    if x['markdown'] and x['settings']['out_dir']} | sections
    # nan and inf, which JSON lacks, become null
    sections = json.loads(json.dumps(sections), parse_constant=lambda constant: None)
    write_atomically(path, json.dumps(sections, indent=1).encode())
    out_dirs = dict.fromkeys(section['settings']['out_dir'] for section in sections.values())
    page = [f'# {" and ".join(out_dirs)}\n', *(f'## {name}\n\n{section["markdown"]}'
                                               for name, section in sections.items())]
    path.with_suffix('.md').write_text('\n'.join(page), encoding='utf-8')


def main():
    config.override(globals(), inherited=sample, names=sample.DECODING)
    one_of('task', task, (*TASKS, 'report'))
    for name, value in (('discrete_steps', discrete_steps or (1,)), ('grid_steps', grid_steps),
                        ('answer_steps', answer_steps)):
        require(name, value, value and all(type(n) is int for n in value),
                'of whole numbers, as 4,16')
    require('data', data, not data or task in ('likelihood', 'report'), "'' for other tasks")
    require('save_texts', save_texts, not save_texts or task in WRITING, "'' for other tasks")
    require('file', file, not file or task == 'translation', "'' for other tasks")
    if task in ('curves', 'scaling'):  # they read logs, no models
        runs = [load_log(path)[0] for path in names_in(out_dir)]
    else:
        runs = load_runs(out_dir, pick_device(device), task != 'likelihood', ckpt,
                         trust_remote_code)
    if len({run.name for run in runs}) < len(runs):
        raise UserError(f'{out_dir} has runs of the same name, which no table could tell apart')
    work = REPORT if task == 'report' else {task: ALONE.get(task, '')}
    Path(report_dir).mkdir(parents=True, exist_ok=True)
    for path in filter(None, (Path(report_dir, 'report.md'), save_texts)):
        open(path, 'a').close()  # what cannot be written is refused before the work
    for name, before in work.items():
        words = [word for word in sys.argv[1:] if not word.startswith('--task=')]
        words = [*before.split(), *words, f'--task={name}']
        own = config.override(dict(globals()), words, sample, sample.DECODING)
        try:
            section = run_task(name, runs, own, shlex.join(words))
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
