"""Measures runs side by side: how well they predict text, and what they write.

    python eval.py --out_dir=out/shakespeare_ar,out/shakespeare_mdm --task=likelihood
    python eval.py --out_dir=out/shakespeare_ar,out/shakespeare_mdm --task=generation
    python eval.py --out_dir=out/shakespeare_ar,out/shakespeare_mdm --task=curves
    python eval.py --out_dir=out/multi30k_ar,out/multi30k_mdm --task=translation --split=test
    python eval.py --out_dir=out/multi30k_ar,out/multi30k_mdm_pad,out/length_classify --task=length

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
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import config
import sample
from config import UserError
from model import BOUND_NAMES, ar_nll, bound_of, evaluate, load_checkpoint, load_model, pick_device
from prepare import gather_rows, load_meta, load_split, load_tokenizer, row_batches, row_widths

# what is measured
out_dir = 'out/shakespeare_ar,out/shakespeare_mdm'  # runs, separated by commas
task = 'likelihood'    # likelihood, generation, speed, curves, translation, length, reversal
report_dir = 'out/report'  # speed, curves, translation, length: where the picture goes
split = 'val'          # likelihood, translation, length: train, val, test; always all of it
device = 'auto'        # cuda, mps, cpu; auto takes the first that is there
seed = 1
batch_size = 16        # rows at a time
repeats = 8            # likelihood: independent draws of a bound, for its standard error
gen_tokens = 10_000    # generation, speed: how many to write, in texts as long as the context
# translation, or whatever the answers to prompts are
file = ''              # lines of (level TAB) prompt TAB answer, in place of the split
max_rows = 0           # the first so many; 0 = all
greedy = True          # the likeliest tokens, and decoder auto is confidence; False: as below
answer_steps = (1, 4, 8, 16)  # mdm: in place of steps, one after the other
length = 'auto'        # mdm: as in sample.py, or reference, that of the right answer; a,b for both
length_ratio = 1.3
length_extra = 2
length_quantile = 0.9
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
        how = settings | {'decoder': 'ar' if objective == 'ar' else 'confidence', 'steps': 0,
                          'temperature': 0.0}
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
            row[column] = f'{100 * right / len(asked):.0f}%'
        rows.append(row)
    note = (f'{len(facts)} facts, {len(turned)} of them told in both directions; a blank is as '
            'wide as its answer, and all of it must be right')
    return rows, note


# ----------------------------------------------------------------------------------- translation


def file_pairs(path):
    """[(level, prompt, answer)] of a file with tabs: its columns, the first of which may lack."""
    try:
        text = Path(path).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'file {path!r} cannot be read ({type(e).__name__})') from e
    pairs = []
    for line in filter(str.strip, text.split('\n')):
        pairs.append([column.strip() for column in ['', *line.split('\t')][-3:]])
        if line.count('\t') not in (1, 2) or not all(pairs[-1][1:]):
            raise UserError(f'{path} has the line {line[:40]!r}: write prompt TAB answer, or level '
                            'TAB prompt TAB answer')
    return pairs


def row_pairs(meta, split):
    """[(level, prompt, answer)] of all rows of a split; the level is ''."""
    tokenizer = load_tokenizer(meta)
    rows = load_split(meta['name'], split).reshape(-1, meta['row_length']).tolist()
    return [('', *map(tokenizer.decode, sample.split_row(row, meta))) for row in rows]


def answer(model, run, meta, pairs, settings):
    """The answers of a model to the prompts of pairs, [text], and {column: figure} of them.

    run: the settings of training. Prompts of like lengths go together: few wait for others.
    """
    tokenizer = load_tokenizer(meta)
    prompts, right = ([tokenizer.encode(pair[i]) for pair in pairs] for i in (1, 2))
    canvases = sample.row_canvases(prompts, run, meta, settings, right)
    canvases, predicted, _, took = sample.shortened(model, canvases, run, meta, settings)
    order = sorted(range(len(pairs)), key=lambda i: len(prompts[i]))
    done, (_, _, seconds) = sample.complete(model, run['objective'], [canvases[i] for i in order],
                                            settings, meta['eos_id'])
    done = [done[k] for k in np.argsort(order)]
    ids = [sample.split_row(row, meta)[1] for row, _ in done]
    shares = {'length ratio': [len(a) / max(1, len(b)) for a, b in zip(ids, right)],
              'no EOS': [len(row) == len(canvas) for (row, _), canvas in zip(done, canvases)],
              'empty': [not row for row in ids]}
    return [tokenizer.decode(row) for row in ids], {
        **{name: f'{np.mean(share):.3f}' for name, share in shares.items()},
        'nfe': f'{np.mean([figures["nfe"] for _, figures in done]) + (predicted is not None):.1f}',
        'sentences/s': f'{len(pairs) / (seconds + took):,.1f}'}


def make_score():
    """score(texts, right) -> {column: score}, and how the scores are obtained, in words.

    BERTScore is one of them where bert-score is installed and its model can be loaded.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as e:
        raise UserError(f"--task=translation needs {e.name}: pip install -e '.[eval]'") from e
    # rouge-score's own words are of a-z and 0-9: it would cut French ones at every accent
    rouge = RougeScorer(['rouge1', 'rougeL'], tokenizer=SimpleNamespace(tokenize=words_of))
    bleu, chrf, bert = BLEU(), CHRF(), None
    with suppress(Exception):  # not installed, not on the disk, or of versions that do not fit
        from bert_score import BERTScorer
        bert = BERTScorer('bert-base-multilingual-cased')

    def score(texts, right):
        found = [rouge.score(b, a) for a, b in zip(texts, right)]
        row = {'BLEU': bleu.corpus_score(texts, [right]).score,
               'chrF': chrf.corpus_score(texts, [right]).score,
               'ROUGE-1': 100 * np.mean([f['rouge1'].fmeasure for f in found]),
               'ROUGE-L': 100 * np.mean([f['rougeL'].fmeasure for f in found])}
        if bert is not None:
            row['BERTScore'] = 100 * bert.score(texts, right)[2].mean().item()
        return {key: f'{value:.2f}' for key, value in row.items()}

    score(['a'], ['a'])  # without a score there is no signature
    return score, (f'BLEU {bleu.get_signature()}; chrF {chrf.get_signature()}; ROUGE: F1 of words '
                   'in lower case, mean over prompts' + ('; BERTScore: F1, bert-base-multilingual-'
                   'cased' if bert is not None else '; no BERTScore: no bert-score, or no model'))


def ways_to_answer(run, settings):
    """[(length, steps, settings)]: the decodings of a run that `translation` compares."""
    s = settings | ({'temperature': 0.0} if settings['greedy'] else {})
    if run['objective'] == 'ar':  # it has but one decoder, and writes its own end
        return [('', '', s | {'decoder': 'ar', 'block_length': 0, 'prefix_cache': False,
                              'guidance': 0.0, 'length': 'auto'})]
    if s['decoder'] == 'auto':
        s = s | {'decoder': 'confidence' if s['greedy'] else 'ancestral'}
    names = [sample.length_name(name.strip(), run) for name in s['length'].split(',')]
    if s['decoder'] == 'threshold':  # it takes as many as it needs
        return [(name, '', s | {'length': name}) for name in dict.fromkeys(names)]
    return [(name, n, s | {'length': name, 'steps': n})
            for name in dict.fromkeys(names) for n in s['answer_steps']]


def translation(runs, settings):
    """A row of scores for each run and way to decode it; of a file it also prints all texts."""
    score, how = make_score()
    meta, path, all_steps = runs[0][1]['meta'], settings['file'], settings['answer_steps']
    sample.require(settings, ('max_rows', settings['max_rows'] >= 0, '1 or more, or 0 for all'),
                   ('answer_steps', all_steps and {type(n) for n in all_steps} == {int},
                    'of whole numbers, as in (1, 4, 8) or (16,)'))
    if meta['sep_id'] is None:
        raise UserError(f'data/{meta["name"]} has no prompts and answers: nothing to translate')
    pairs = file_pairs(path) if path else row_pairs(meta, settings['split'])
    pairs = pairs[:settings['max_rows'] or None]
    if not pairs:
        raise UserError(f'{path} is empty: write prompt TAB answer on each line')
    levels, _, right = map(list, zip(*pairs))
    rows, texts = [], {'reference': right}
    for name, checkpoint, model in runs:
        run = checkpoint['config']
        for length, steps, s in ways_to_answer(run, settings):
            written, figures = answer(model, run, meta, pairs, s)
            rows.append({'run': name, 'decoder': s['decoder'], 'length': length, 'steps': steps}
                        | score(written, right) | figures)
            for level in filter(None, dict.fromkeys(levels)):
                part = [(a, b) for a, b, c in zip(written, right, levels) if c == level]
                rows[-1][f'BLEU {level}'] = score(*map(list, zip(*part)))['BLEU']
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
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6.4, 4.4), constrained_layout=True)
    colors = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '0.45')
    lines = list(dict.fromkeys((row['run'], row['decoder'], row['length']) for row in rows))
    for i, line in enumerate(lines):
        points = sorted((float(row['nfe']), float(row['BLEU'])) for row in rows
                        if (row['run'], row['decoder'], row['length']) == line)
        label, color = ', '.join(filter(None, line)), colors[i % len(colors)]
        if line[1] == 'ar':
            ax.axhline(points[0][1], color=color, lw=1, ls=':')
        ax.plot(*zip(*points), marker='*s^Dv<>P'[i % 8], ms=9 if line[1] == 'ar' else 5, lw=1.3,
                label=label, color=color)
    ax.set(xscale='log', xlabel='passes per sentence', ylabel='BLEU')
    ax.set_xticks([1, 2, 4, 8, 16, 32], ['1', '2', '4', '8', '16', '32'])
    ax.minorticks_off()
    ax.grid(color='0.92')
    ax.spines[['top', 'right']].set_visible(False)
    fig.legend(*ax.get_legend_handles_labels(), loc='outside upper center', ncols=2,
               frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


# ------------------------------------------------------------------------ length before decoding


def bounds_row(model, run, meta, pairs, settings):
    """{column: figure} of the masks that answers get, against what they need with their EOS."""
    if run['objective'] == 'ar':
        return dict.fromkeys(('fits', 'too long by', 'masks', 'saved', 'RMSE'), '')
    tokenizer = load_tokenizer(meta)
    canvases = sample.row_canvases([tokenizer.encode(prompt) for _, prompt, _ in pairs], run, meta,
                                   settings)
    canvases, predicted, _, _ = sample.shortened(model, canvases, run, meta, settings)
    masks = np.array([canvas.count(model.mask_id) for canvas in canvases])
    right = np.array([len(tokenizer.encode(answer)) + 1 for _, _, answer in pairs])
    error = (masks if predicted is None else np.array(predicted)) - right
    fits = masks >= right
    return {'fits': f'{100 * fits.mean():.1f}%',
            'too long by': f'{(masks - right)[fits].mean() if fits.any() else math.nan:.1f}',
            'masks': f'{masks.mean():.1f}', 'saved': f'{meta["max_answer"] + 1 - masks.mean():.1f}',
            'RMSE': f'{(error ** 2).mean() ** 0.5:.2f}'}


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
    return 'full,ratio,argmax,quantile'


def lengths(runs, settings):
    """A row for each run and way to know the length, a note, and {run: {share: eos_chances}}."""
    score, how = make_score()
    meta, split = runs[0][1]['meta'], settings['split']
    sample.require(settings, ('file', not settings['file'], "'' for task=length"),
                   ('length_block', settings['length_block'] >= 1, '1 or more'))
    if meta['sep_id'] is None:
        raise UserError(f'data/{meta["name"]} has no prompts and answers: no lengths to predict')
    pairs = row_pairs(meta, split)[:settings['max_rows'] or None]
    data = load_split(meta['name'], split).reshape(-1, meta['row_length'])[:len(pairs)]
    rows, chances = [], {}
    for name, checkpoint, model in runs:
        run = checkpoint['config']
        ways = ways_to_answer(run, settings | {'length': lengths_of(run, settings),
                                               'answer_steps': settings['answer_steps'][-1:]})
        ways += [('full, in blocks', steps, s | {'block_length': settings['length_block']})
                 for length, steps, s in ways if length == 'full' and not s['block_length']]
        answer(model, run, meta, pairs[:4], ways[0][2])  # warm-up
        for length, steps, s in ways:
            written, figures = answer(model, run, meta, pairs, s)
            rows.append({'run': name, 'length': length} | bounds_row(model, run, meta, pairs, s) | {
                'steps': steps, 'nfe': figures['nfe'],
                'ms/sentence': f'{1000 / float(figures["sentences/s"].replace(",", "")):.1f}',
                'BLEU': score(written, [answer for _, _, answer in pairs])['BLEU']})
        if run['objective'] != 'ar' and run['predict_pad'] and not run.get('length_head'):
            chances[name] = {share: eos_chances(model, meta, data, share, settings['batch_size'],
                                                settings['seed'])
                             for share in (0.25, 0.5, 0.75, 1.0)}
    right = [f'; {name} knows EOS at its place with ' + ', '.join(
        f'{share:.0%} of the window masked in {found[0]:.1%}' for share, found in of.items())
        for name, of in chances.items()]
    note = (f'{split} of {meta["name"]} ({meta["source"]}): {len(pairs):,} prompts, '
            f'{settings["batch_size"]} at a time, seed {settings["seed"]}; fits: the right answer '
            'and its EOS do; too long by: tokens, where they do; saved: masks of the '
            f'{meta["max_answer"] + 1} of full; RMSE: of what was predicted, before it was rounded '
            f'up; length_quantile {settings["length_quantile"]}; nfe and ms/sentence: with the '
            f'pass that predicts; {torch.get_num_threads()} threads; {how}{"".join(right)}')
    return rows, note, chances


def draw_length(chances, path):
    """length.png: the chance of an EOS by the distance from its right place, a panel for a run."""
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, max(1, len(chances)), figsize=(6.4 * max(1, len(chances)), 4.2),
                             constrained_layout=True, squeeze=False)
    for ax, (name, of) in zip(axes[0], chances.items()):
        for (share, (_, mean)), color in zip(of.items(), ('#56B4E9', '#009E73', '#E69F00',
                                                          '#0072B2')):
            ax.plot(mean.keys(), mean.values(), lw=1.3, color=color, label=f'{share:.0%} masked')
        ax.axvline(0, color='0.5', lw=1, ls=':')
        ax.annotate('true end', (0, 1), xycoords=('data', 'axes fraction'), xytext=(4, -4),
                    textcoords='offset points', color='0.4', va='top', fontsize=8)
        ax.set(title=name, xlabel='tokens from the true end', ylabel='P(EOS), mean over rows')
        ax.grid(color='0.92')
        ax.spines[['top', 'right']].set_visible(False)
        ax.legend(frameon=False)
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


def main():
    settings = config.override(globals())
    tasks = ('likelihood', 'generation', 'speed', 'curves', 'translation', 'length', 'reversal')
    if task not in tasks:
        raise UserError(f'task is {task!r}, not one of {", ".join(tasks)}')
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
    elif task == 'reversal':
        rows, note = reversal(runs, settings)
    elif task == 'translation':
        rows, note = translation(runs, settings)
        draw_translation(rows, Path(report_dir, 'translation.png'))
        note += f'. Drawn in {report_dir}/translation.png'
    elif task == 'length':
        rows, note, chances = lengths(runs, settings)
        if chances:
            draw_length(chances, Path(report_dir, 'length.png'))
            note += f'. Drawn in {report_dir}/length.png'
    else:
        rows, note = generation(runs, settings)
    print(markdown(rows))
    print(f'\n{note}. Command: python eval.py {shlex.join(sys.argv[1:])}')


if __name__ == '__main__':
    main()
