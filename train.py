"""Trains a model, autoregressive (next token) or masked diffusion, from the same transformer.

    python train.py                                      masked diffusion on Tiny Shakespeare
    python train.py config/shakespeare_ar.py             its autoregressive twin
    python train.py config/shakespeare_mdm_10m.py --device=cuda
    python train.py --out_dir=out/shakespeare_mdm --resume
    python train.py config/length_classify.py            a head on out/multi30k_mdm_pad
    python train.py config/shakespeare_ar.py --bench=10  how fast, and where the time goes
    torchrun --nproc_per_node=4 train.py config/shakespeare_mdm_10m.py

The first takes about 12 minutes on 2 CPU cores. It prepares the data set if that is missing and
writes a run to out_dir: ckpt.pt (the weights and all that resuming needs), config.json, log.csv and
loss.png. An interrupted run goes on with --resume as if nothing had happened.

Each process of a torchrun works through batch_size * gradient_accumulation_steps windows of its own
in an update: 2 processes do in one pass what 1 process does in 2. With several machines, on each:

    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=<0 or 1> --master_addr=<of machine 0>
        --master_port=1234 train.py config/shakespeare_mdm_10m.py

Read main(), then train(): evaluate, save, update. Above them stand the parts in the same order.
"""

import csv
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

import config
import sample
from config import UserError, one_of, require, write_atomically
from model import LengthLoss, Transformer, evaluate, load_checkpoint, make_objective, \
    model_config, peak_memory, pick_device, pick_dtype
from prepare import load_tokenizer, mixed_seed, open_data, prepare, recipe_names

# the run
out_dir = 'out/shakespeare_mdm'  # where it is written; a config file sets out/<its name>
resume = False              # go on with the run in out_dir, under the settings that it has
overwrite = False           # throw away the run in out_dir
init_from = ''              # a run of this shape and vocabulary, whose weights are the first:
                            # a short ar run saves masked diffusion a slow start, see README
seed = 1337
device = 'auto'             # cuda, mps, cpu; auto takes the first that is there
dtype = 'auto'              # float32, bfloat16 (autocast); auto is bfloat16 where that is fast
compile = 'auto'            # torch.compile: on, off; auto is on where it pays within this run
# data
dataset = 'shakespeare_char'  # a folder of data/, prepared if missing
batch_size = 16             # B, windows per forward and backward pass
gradient_accumulation_steps = 1  # passes per update
block_size = 256            # T, tokens per window
train_tokens = 0            # train on the first so many tokens of the training split; 0 = all
random_length = 0.0         # share of the batches that are cut to a random length: a stream's to
                            # any; rows, if predict_pad, to what the longest answer needs, or more
# data of rows: prompts and answers, or documents; a batch holds rows of one width
predict_pad = False         # PAD is predicted too, so that the model finds where an answer ends;
                            # False: the number of tokens says so, and the model never sees a PAD
score_prompt = False        # ar: train on the prompt too
row_share = 1.0             # train on this share of the rows, the shortest ones
length_curriculum = 0       # updates over which longer and longer rows join the shortest
pad_curriculum = 0          # predict_pad: updates over which the room behind the answers grows
token_weights = (1.0, 1.0, 1.0)  # mdm: what an error at text, at EOS, at PAD counts in the loss
# model
n_layer = 4
n_head = 4
n_kv_head = 0               # heads of keys and values; 0 = n_head
n_embd = 192
pos = 'rope'                # rope, learned
norm = 'rmsnorm'            # rmsnorm, layernorm
mlp = 'relu2'               # relu2, swiglu, gelu
n_conv = 0                  # local mixing over so many neighbours in every block; 0 = none
n_hidden = 0                # channels inside the mlp; 0 = 4 n_embd, of swiglu 8/3 n_embd
qk_norm = True
bias = False
tied = False                # the head shares the embedding's matrix
time_cond = False           # show the network the noise level
dropout = 0.0
# objective
objective = 'mdm'           # ar, mdm, d3pm, uniform, block; what follows is for all but ar
schedule = 'linear'         # linear, cosine, polynomial; how much is noise at level t
loss_weight = 'clipped'     # elbo = w(t), clipped = min(w(t), w_max), flat = 1, masked_mean
w_max = 5.0                 # for loss_weight = clipped
mask_range = (0.15, 0.99)   # levels t that are trained; below, a row has few masks to learn from
diffusion_steps = 1000      # d3pm: N, from all masks to none
subs = True                 # d3pm: the mask is never predicted; False leaves it a probability
block_length = 16           # block: tokens per block
soft_inputs = False         # uniform: train on mixtures of tokens, ever closer to a single one
divergence = 'elbo'         # uniform: elbo, symmetric_kl, scaled_kl; to train, never reported
# length before decoding: train a head that predicts it on the run init_from, which stays fixed
length_head = ''            # regress_mean, regress_concat, classify, encoder_regress,
                            # encoder_classify; see LengthHead in model.py
length_quantile = 0.95      # of regress: the share of answers that are no longer than predicted
# optimiser
optimizer = 'muon'          # muon: Muon for the blocks' matrices, AdamW for the rest; adamw: all
max_iters = 1200            # updates
learning_rate = 6e-3        # AdamW's
muon_lr = 0.02              # Muon's
lr_schedule = 'wsd'         # wsd (constant, then linear over the last fifth), cosine, constant
warmup_iters = 50           # updates over which the rates rise from 0
weight_decay = 0.0          # of matrices in the blocks
beta1 = 0.9                 # AdamW's averages of the gradient
beta2 = 0.99                # and of its square
grad_clip = 1.0             # largest norm of the gradient; 0 = no limit
# evaluation
eval_interval = 200         # updates between evaluations on the full validation split, checkpoints
log_interval = 10           # updates between two losses that are shown
decode_rows = 0             # prompts to answer at each evaluation, greedily, into samples.csv
eval_repeats = 4            # independent draws of a bound at the end, for its standard error
track = ''                  # tensorboard (curves in out_dir), wandb (project nanomdm), or both
bench = 0                   # only time this many updates and profile a few: nothing is written
WARM_UP, PROFILED = 3, 3    # updates before and after those that bench times
COMPILING, GAIN = 60, 0.25  # seconds that torch.compile takes, and the share of an update it saves


# ----------------------------------------------------------------------------------- the optimisers


def orthogonalize(G, dtype):
    """The nearest matrix to G / its norm whose singular values all lie near 1 [Jordan 2024, Muon].

    Five steps of X <- a X + (b A + c A A) X, A = X X', an odd polynomial that takes all of
    (0.002, 1] into about (0.7, 1.2); rows and columns are swapped where that makes A smaller.
    """
    X = (G if G.size(0) <= G.size(1) else G.T).to(dtype)
    X = X / (X.norm() + 1e-7)
    for _ in range(5):
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return X if G.size(0) <= G.size(1) else X.T


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is orthogonalised: as large in every direction [Jordan].

    Differs from torch.optim.Muon in its dtype alone, which that one fixes to bfloat16: on a CPU
    without bfloat16 instructions an update would take 80 times longer.
    """

    def __init__(self, params, weight_decay, dtype, momentum=0.95):
        super().__init__(params, {'lr': 0.0, 'weight_decay': weight_decay, 'momentum': momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                state = self.state[p]
                if not state:
                    state['momentum'] = torch.zeros_like(p)
                average = state['momentum'].lerp_(p.grad, 1 - group['momentum'])
                nesterov = p.grad.lerp(average, group['momentum'])
                p.mul_(1 - group['lr'] * group['weight_decay'])
                size = max(1, p.size(0) / p.size(1)) ** 0.5  # as far in spectral norm for any shape
                p.add_(orthogonalize(nesterov, self.dtype), alpha=-group['lr'] * size)


def make_optimizers(model, optimizer, betas, weight_decay, dtype):
    """[Muon, AdamW] or [AdamW]: Muon takes the matrices inside the blocks.

    Weight decay falls on those matrices under either. Local mixing is no matrix, but a vector of
    channels for each neighbour. The loop sets the learning rates. What is
    frozen is left out.
    """
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inside = {name for name, p in learned.items()
              if 'blocks.' in name and p.dim() == 2 and 'mixing' not in name}
    matrices = [p for name, p in learned.items() if name in inside]
    rest = [p for name, p in learned.items() if name not in inside]
    adam = partial(torch.optim.AdamW, betas=betas, fused=True)
    if optimizer == 'muon' and matrices:
        return [Muon(matrices, weight_decay, dtype),
                adam([{'params': rest, 'weight_decay': 0.0}])]
    return [adam([{'params': matrices, 'weight_decay': weight_decay},
                  {'params': rest, 'weight_decay': 0.0}])]


def lr_factor(iteration, max_iters, warmup_iters, lr_schedule):
    """Share of the peak learning rates that the update `iteration` (from 0) uses."""
    if iteration < warmup_iters:
        return (iteration + 1) / (warmup_iters + 1)
    progress = (iteration - warmup_iters) / max(1, max_iters - warmup_iters)  # in [0, 1)
    if lr_schedule == 'cosine':
        return 0.5 * (1 + math.cos(math.pi * progress))
    if lr_schedule == 'wsd':
        return min(1.0, 5 * (1 - progress))
    return 1.0  # constant


# ------------------------------------------------------------------------------------------ set-up


def check_settings(s, run_settings):
    """Raises UserError for settings that do not go together; run_settings: of a run to resume."""
    one_of('optimizer', s.optimizer, ('muon', 'adamw'))
    one_of('lr_schedule', s.lr_schedule, ('cosine', 'wsd', 'constant'))
    one_of('compile', s.compile, ('auto', 'on', 'off'))
    require('objective', s.objective, s.objective == run_settings.get('objective', s.objective),
            'that of the run')
    require('pad_curriculum', s.pad_curriculum, s.predict_pad or not s.pad_curriculum,
            '0 without predict_pad')
    require('token_weights', s.token_weights, len(s.token_weights) == 3 and (
        set(s.token_weights) == {1.0} or (s.objective == 'mdm' and not s.length_head)),
        'three numbers of 0 or more (1, 1, 1 but for mdm without a length_head)')
    require('soft_inputs', s.soft_inputs, s.objective == 'uniform' or not s.soft_inputs,
            'False (but for uniform)')
    require('subs', s.subs, s.subs or s.objective == 'd3pm', 'True (d3pm alone may use the mask)')
    require('block_length', s.block_length, s.objective != 'block'
            or 1 <= s.block_length <= s.block_size, 'in [1, block_size]')
    require('length_head', s.length_head, not s.length_head or (
        s.predict_pad and s.objective in ('mdm', 'd3pm')),
        "'', unless predict_pad is on and objective is mdm or d3pm")
    require('init_from', s.init_from, s.init_from or not s.length_head,
            'the run that a length_head is for')
    require('length_quantile', s.length_quantile, s.length_quantile < 1, 'in (0, 1)')


def in_todays_words(settings):
    """The settings of an older checkpoint, in which some had other names and values."""
    settings = dict(settings)
    track = [name for name in ('tensorboard', 'wandb') if settings.pop(name, False)]
    settings.setdefault('track', ','.join(track))
    if isinstance(settings.get('compile'), bool):
        settings['compile'] = 'on' if settings['compile'] else 'off'
    return settings


def join_processes(device, length_head):
    """(rank, world, device) of this process among those of a torchrun; (0, 1, device) if alone."""
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if world > 1:
        if length_head:
            raise UserError('a length_head is trained by one process: leave out torchrun')
        if device == 'cuda':
            device = f'cuda:{os.environ["LOCAL_RANK"]}'
            torch.cuda.set_device(device)
        dist.init_process_group('nccl' if device.startswith('cuda') else 'gloo')
    if rank > 0:
        sys.stdout = open(os.devnull, 'w')  # one process speaks for all
    return rank, world, device


def open_training_data(s, rank, world):
    """The Stream or Rows to train on, prepared by the first process if it is missing."""
    missing = not Path('data', s.dataset, 'meta.json').exists()
    if rank == 0 and missing and s.dataset in recipe_names():
        print(f'data/{s.dataset} is missing: preparing it')
        prepare(s.dataset)
    if world > 1:
        dist.barrier()  # from here on there is data, and every process has seen a free out_dir
    choices = ('predict_pad', 'train_tokens', 'random_length', 'score_prompt', 'row_share',
               'length_curriculum', 'pad_curriculum')
    data = open_data(s.dataset, s.block_size, s.batch_size, s.seed,
                     **{name: getattr(s, name) for name in choices})
    if s.score_prompt and s.objective != 'ar':
        raise UserError(f'score_prompt is for objective=ar alone: {s.objective} sees the prompt')
    if set(s.token_weights) != {1.0} and data.meta['layout'] != 'rows':
        raise UserError(f'token_weights are for rows, but data/{s.dataset} is a stream of text')
    if s.decode_rows and data.meta['sep_id'] is None:
        raise UserError(f'decode_rows is for prompts and answers, but data/{s.dataset} has none')
    data.check()
    return data


def training_objective(s, meta, vocab_size, device):
    """The Objective that the settings name, or a length head's loss."""
    if s.length_head:
        return LengthLoss(meta['pad_id'], s.length_quantile)
    objective = make_objective(vars(s))
    if set(s.token_weights) != {1.0}:  # of rows, which have an EOS and a PAD
        text, eos, pad = s.token_weights
        objective.token_weight = torch.full((vocab_size,), float(text), device=device)
        objective.token_weight[meta['eos_id']] = eos
        objective.token_weight[meta['pad_id']] = pad
    return objective


def load_first_weights(model, s, meta):
    """Gives model the weights of the run init_from; UserError if they are of another kind."""
    source = load_checkpoint(s.init_from, model.device)
    theirs, own = vars(model_config(source['config'], source['meta'])), vars(model.config)
    other = [name for name in theirs if theirs[name] != own[name]
             and name not in ('causal', 'dropout', 'subs', 'block_length', 'length_head')]
    other += [name for name in ('tokenizer', 'sep_id') if source['meta'][name] != meta[name]]
    other += [name for name in ('objective', 'predict_pad')
              if s.length_head and source['config'][name] != getattr(s, name)]
    if other:
        raise UserError(f'{s.init_from} cannot be what this run begins with, for it has another '
                        f'{", ".join(other)}')
    model.load_state_dict(model.state_dict() | {name: p for name, p in source['model'].items()
                                                if not name.startswith('length_head.')})


@dataclass
class Progress:
    """How far a run is: what a resumed run needs beside weights and settings."""
    iteration: int = 0        # updates done when this process began
    tokens: int = 0           # read in training
    seconds: float = 0.0      # of updates, evaluations not counted
    best: float = math.inf    # lowest loss on the validation split
    log: list = field(default_factory=list)  # rows of log.csv
    saved: str = 'nothing is saved yet'  # or which weights ckpt.pt has


def saved_words(out_dir, iteration):
    return f'{out_dir}/ckpt.pt has the weights after {iteration} updates'


def restore(checkpoint, model, optimizers, out):
    """Weights and optimizers of a checkpoint go where they belong; returns the run's Progress."""
    try:
        model.load_state_dict(checkpoint['model'])
        for o, state in zip(optimizers, checkpoint['optimizer'], strict=True):
            groups = [own | {'params': saved['params']} for own, saved in
                      zip(o.param_groups, state['param_groups'], strict=True)]
            o.load_state_dict(state | {'param_groups': groups})  # these settings' decay and betas
    except (RuntimeError, ValueError) as e:
        raise UserError(f'the weights in {out} have another shape than these settings ask for: '
                        'resume without changing the model or the optimizer') from e
    iteration = checkpoint['iter']
    try:
        with open(out / 'log.csv', newline='') as f:
            rows = [row for row in csv.DictReader(f)  # None: a line that was cut
                    if None not in row.values() and int(row['iter']) <= iteration]
        return Progress(iteration, int(checkpoint.get('tokens', rows[-1]['tokens'])),
                        float(checkpoint.get('seconds', rows[-1]['seconds'])), checkpoint['best'],
                        rows, saved_words(out, iteration))
    except (OSError, ValueError, TypeError, LookupError) as e:
        raise UserError(f'{out}/log.csv is damaged or gone ({type(e).__name__})') from e


def compile_or_not(asked, device, data, seconds_left):
    """(whether to compile, why): for 'auto' where it pays within the updates that are left."""
    if asked != 'auto':
        return asked == 'on', 'as set'
    if data.meta['layout'] == 'rows' or data.random_length:
        return False, 'batches have many widths, and each would be compiled anew'
    if device == 'mps' or (device == 'cpu' and not shutil.which(os.environ.get('CXX', 'g++'))):
        return False, 'there is no compiler for this device'
    if GAIN * seconds_left < COMPILING:
        return False, f'about {seconds_left:.0f} s of updates are too few to make up for it'
    return True, f'it saves a quarter of about {seconds_left:.0f} s of updates'


def compile_model(t, s):
    """Compiles the model by a first batch; where the compiler fails, goes on without it."""
    t.model.compile()
    try:
        x0, given = on_device(t.data.batch(0, t.rank, t.world), t.device)
        with t.autocast():
            t.objective.loss(t.model, x0, torch.Generator(t.device), given)[0].backward()
        t.model.zero_grad()
    except Exception as e:  # of a dozen kinds: no compiler, no headers, no space, a bug of its own
        t.model._compiled_call_impl = None
        print(f'torch.compile failed ({type(e).__name__}): going on without it')


class Parallel(torch.nn.parallel.DistributedDataParallel):
    """The model on one of several processes: backward() adds up the gradients of all of them."""

    def __getattr__(self, name):  # the losses ask it for mask_id, config and logits
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


# ----------------------------------------------------------------------------- evaluation, records


def make_trackers(track, out_dir, settings):
    """Functions (iteration, {name: number}), one for each tracker that is asked for."""
    trackers = []
    try:
        for name in filter(None, track.split(',')):
            one_of('track', name, ('tensorboard', 'wandb'))
            if name == 'tensorboard':
                from torch.utils.tensorboard import SummaryWriter
                writer = SummaryWriter(out_dir)
                trackers.append(lambda i, row: [writer.add_scalar(k, v, i) for k, v in row.items()])
            else:
                from wandb import init
                run = init(project='nanomdm', name=Path(out_dir).name, config=settings)
                trackers.append(lambda i, row: run.log(row, step=i))
    except ImportError as e:
        raise UserError(f"{e}: python -m pip install -e '.[track]'") from e
    return trackers


def evaluate_now(t, s, progress, iteration, learning_rate, speed):
    """Adds a row to the log: the loss on all of the validation split and on some training text."""
    with t.autocast():
        val, _ = evaluate(t.model, t.objective, t.data.batches('val', s.batch_size))
        train, _ = evaluate(t.model, t.objective, t.data.batches('train', s.batch_size,
                                                                 limit=4 * s.batch_size))
    limit = 2 * math.log(t.data.meta['vocab_size']) if s.token_weights[0] else math.inf
    if not val <= limit:  # nan is not, either
        raise UserError(f'diverged: the validation loss is {val:.4g} after {iteration} updates and '
                        f'at learning rate {learning_rate:.2e}; {progress.saved}')
    progress.best, measured = min(progress.best, val), t.objective.measured
    progress.log.append({
        'iter': iteration, 'tokens': progress.tokens, 'measured': measured, 'train': f'{train:.6f}',
        'val': f'{val:.6f}', 'lr': f'{learning_rate:.3e}', 'data': t.data.meta['source'],
        'seconds': f'{progress.seconds:.1f}', 'tokens_per_second': f'{speed:.0f}'})
    if t.rank == 0:
        write_log(progress.log, Path(s.out_dir))
        title = f'{s.length_head or s.objective} on {s.dataset}'
        log_v = None if s.length_head else math.log(t.data.meta['vocab_size'])
        write_atomically(Path(s.out_dir, 'loss.png'), draw_losses(progress.log, title, log_v))
    for track in t.trackers:
        track(iteration, {f'train {measured}': train, f'val {measured}': val, 'tokens/s': speed})
    return (f'{iteration:6,} updates, {progress.seconds:4.0f} s: {measured} {val:.4f} nats/token '
            f'on the validation split, {train:.4f} on training text')


def write_log(rows, out):
    """log.csv: a row for every evaluation."""
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(out / 'log.csv', text.getvalue().encode())


def draw_losses(rows, title, log_v):
    """The bytes of loss.png: a run's losses over updates and tokens, and log V', if not None."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(7, 4.2), layout='constrained')
    ax, x = fig.subplots(), [int(row['iter']) for row in rows]
    for key, label, style, color in (('train', 'training text', 'o--', '#E69F00'),
                                     ('val', 'validation text', 'o-', '#0072B2')):
        ax.plot(x, [float(row[key]) for row in rows], style, ms=4, label=label, color=color)
    if log_v is not None:
        ax.axhline(log_v, color='0.5', lw=1, ls=':')
        ax.annotate("log V', a uniform guess", (1, log_v), xycoords=('axes fraction', 'data'),
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
    fig.savefig(buffer, dpi=150, format='png')
    return buffer.getvalue()


def save(t, s, progress, iteration):
    """Writes ckpt.pt. All draws follow from the seed and the iteration: those are the rng."""
    if t.rank == 0:
        buffer = io.BytesIO()
        torch.save({'model': t.model.state_dict(), 'config': vars(s), 'meta': t.data.meta,
                    'optimizer': [o.state_dict() for o in t.optimizers], 'iter': iteration,
                    'tokens': progress.tokens, 'seconds': progress.seconds, 'best': progress.best,
                    'rng': s.seed}, buffer)
        write_atomically(Path(s.out_dir, 'ckpt.pt'), buffer.getbuffer())
    progress.saved = saved_words(s.out_dir, iteration)


def write_answers(t, s, iteration):
    """Adds answers to the first prompts to samples.csv, with BLEU if sacrebleu is installed."""
    path, bleu = Path(s.out_dir, 'samples.csv'), ''
    answers = sample.first_answers(as_run(t, s), t.data, s.decode_rows, sample.defaults() | {
        'seed': s.seed})
    with suppress(ImportError):
        from sacrebleu import corpus_bleu
        _, references, texts = zip(*answers)
        bleu = f'{corpus_bleu(texts, [references]).score:.2f}'
    new = not path.exists()
    with open(path, 'a', newline='', encoding='utf-8') as f:
        writer = csv.writer(f)
        writer.writerows([('iter', 'BLEU of all', 'prompt', 'reference', 'answer')] * new)
        writer.writerows((iteration, bleu, *texts) for texts in answers)
    t.model.train()


def as_run(t, s):
    """The model at work as what sample.py decodes with."""
    return sample.Run(Path(s.out_dir).name, t.model.eval(), make_objective(vars(s)), t.data.meta,
                      load_tokenizer(t.data.meta), vars(s), s.max_iters, s.out_dir)


# ---------------------------------------------------------------------------------------- the loop


class Training(NamedTuple):
    """What the loop works with."""
    model: Transformer
    network: Any         # the model, or its Parallel
    objective: Any       # an Objective, or a LengthLoss
    data: Any            # a Stream or Rows
    optimizers: list
    trackers: list
    rank: int            # of this process, of `world`
    world: int
    device: str
    dtype: str

    def autocast(self):
        return torch.autocast(self.device.partition(':')[0], torch.bfloat16,
                              enabled=self.dtype == 'bfloat16')


def on_device(batch, device):
    """The tensors of a batch on the device; a None stays."""
    pin = device.startswith('cuda')
    return [None if x is None else (x.pin_memory() if pin else x).to(device, non_blocking=True)
            for x in batch]


def update(t, s, iteration, caught=()):
    """One update: data, corruption and loss, backward, clip, step.

    Returns sums (3,): nats, tokens that count, processes that caught a signal; and tokens read.
    """
    parts, tokens = s.gradient_accumulation_steps * t.world, 0
    sums = torch.zeros(3, device=t.device)
    for micro in range(s.gradient_accumulation_steps):
        part = micro * t.world + t.rank
        seed = mixed_seed(s.seed, iteration, part)
        torch.manual_seed(seed)  # of dropout
        rng = torch.Generator(t.device).manual_seed(seed)  # of noise
        x0, given = on_device(t.data.batch(iteration, part, parts), t.device)
        tokens += x0.numel() * t.world  # the others' batches are about as wide
        t.network.require_backward_grad_sync = micro == s.gradient_accumulation_steps - 1
        with t.autocast():
            nats, count = t.objective.loss(t.network, x0, rng, given, iteration / s.max_iters)
        nats.backward()
        sums += torch.stack([nats.detach(), count, torch.zeros_like(nats)])
    if t.world > 1:
        sums[2] = len(caught)
        dist.all_reduce(sums)
    learned = [p for p in t.model.parameters() if p.requires_grad]
    for p in learned:  # of the sum (the mean, if by processes) of nats, now per token
        p.grad *= t.world / sums[1].clamp(min=1)
    torch.nn.utils.clip_grad_norm_(learned, s.grad_clip or math.inf)
    for o in t.optimizers:
        o.step()
        o.zero_grad()
    return sums, tokens


def set_rates(optimizers, s, factor):
    """Muon's and AdamW's learning rates: the peaks times factor."""
    for o in optimizers:
        for group in o.param_groups:
            group['lr'] = factor * (s.muon_lr if isinstance(o, Muon) else s.learning_rate)


def train(t, s, progress, peak):
    """The loop: evaluate, save, update, until max_iters or a signal."""
    bar = tqdm(total=s.max_iters, initial=progress.iteration, unit='it',
               disable=not sys.stderr.isatty() or t.rank > 0)
    first, tokens, seconds = progress.iteration, progress.tokens, progress.seconds
    flops, speed, stop = t.model.flops_per_token(t.data.mean_width) / t.world / peak, 0.0, False
    # SIGINT and SIGTERM only leave a note: the update at work is finished, and saved, first
    caught = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: caught.append(number))
    for iteration in range(first, s.max_iters + 1):
        factor = lr_factor(iteration, s.max_iters, s.warmup_iters, s.lr_schedule)
        due = iteration % s.eval_interval == 0 or iteration == s.max_iters
        if due and not (progress.log and int(progress.log[-1]['iter']) == iteration):
            bar.write(evaluate_now(t, s, progress, iteration, factor * s.learning_rate, speed))
        if (due or stop) and not (s.resume and iteration == first):
            save(t, s, progress, iteration)
            if due and s.decode_rows and t.rank == 0:
                write_answers(t, s, iteration)
        if stop:
            bar.close()
            print(f'stopped and saved after {iteration} updates; go on with\n'
                  f'python train.py --out_dir={s.out_dir} --resume')
            sys.exit(128 + (caught or [signal.SIGTERM])[0])
        if iteration == s.max_iters:
            break

        began = time.perf_counter()
        set_rates(t.optimizers, s, factor)
        sums, read = update(t, s, iteration, caught)
        stop = sums[2].item() > 0 if t.world > 1 else bool(caught)  # all stop after the same update
        progress.tokens += read
        progress.seconds += time.perf_counter() - began
        speed = (progress.tokens - tokens) / (progress.seconds - seconds)
        bar.update()

        if iteration % s.log_interval == 0 or stop:
            loss = (sums[0] / sums[1].clamp(min=1)).item()  # waits for the device: not every time
            if not loss < 10 * math.log(t.data.meta['vocab_size']):
                raise UserError(f'diverged: the loss is {loss:.4g} at update {iteration} and '
                                f'learning rate {factor * s.learning_rate:.2e}: lower it; '
                                f'{progress.saved}')
            state = f'{speed:,.0f} tokens/s, {100 * speed * flops:.0f}% of torch.mm'
            bar.set_postfix_str(f'loss {loss:.3f}, {state}')
            if bar.disable and iteration % (10 * s.log_interval) == 0:
                left = (progress.seconds - seconds) / (iteration + 1 - first) \
                    * (s.max_iters - iteration - 1) / 60
                print(f'{iteration:6,} updates, {progress.seconds:4.0f} s: loss {loss:.4f}, '
                      f'{state}, {left:.1f} minutes left', flush=True)
    bar.close()
    for number in (signal.SIGINT, signal.SIGTERM):  # all is saved: they may stop what follows
        signal.signal(number, signal.SIG_DFL)


# ------------------------------------------------------------------------------------------- speed


def fastest_flops(device, dtype):
    """FLOP/s of torch.mm on square matrices, the most that can be hoped for on this device."""
    n = 4096 if device.startswith('cuda') else 1024
    a, seconds = torch.randn(n, n, device=device, dtype=getattr(torch, dtype)), []
    while len(seconds) < 10 and sum(seconds) < 1:
        began = time.perf_counter()
        torch.mm(a, a)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * n ** 3 / sorted(seconds)[len(seconds) // 2]


def time_updates(t, s, first, tokens, peak):
    """Prints the speed of s.bench updates, and what a few more, profiled, were busy with."""
    milliseconds, profiler = [], torch.profiler.profile()
    for i in range(WARM_UP + s.bench + PROFILED):
        if i == WARM_UP + s.bench:
            profiler.start()
        began = time.perf_counter()
        update(t, s, first + i)[0].tolist()  # waits for the device
        milliseconds.append(1000 * (time.perf_counter() - began))
    profiler.stop()
    if t.rank > 0:
        return
    ms = sorted(milliseconds[WARM_UP:-PROFILED])[s.bench // 2]
    flops = tokens * t.model.flops_per_token(t.data.mean_width)
    print(f'{ms:.1f} ms per update (median of {s.bench}), {tokens / ms * 1e3:,.0f} tokens/s, '
          f'{flops / ms / 1e6:.1f} GFLOP/s = {100 * flops / ms * 1e3 / peak:.1f}% of the '
          f'{peak / 1e9:.1f} of torch.mm{peak_memory(t.device)}\n')
    share = f'self_{"device" if t.device.startswith("cuda") else "cpu"}_time_total'
    events = sorted(profiler.key_averages(), key=lambda e: -getattr(e, share))
    whole = sum(getattr(e, share) for e in events)
    for e in events[:15]:
        print(f'{100 * getattr(e, share) / whole:5.1f}%  {e.count // PROFILED:4} x  {e.key[:70]}')


# ------------------------------------------------------------------------------ from start to end


def start(s, checkpoint):
    """(Training, Progress): everything that the loop needs."""
    rank, world, device = join_processes(pick_device(s.device), s.length_head)
    dtype = pick_dtype(s.dtype, device)
    data = open_training_data(s, rank, world)
    if checkpoint and checkpoint['meta'] != data.meta:
        raise UserError(f'data/{s.dataset} is not what {s.out_dir} was trained on')
    torch.manual_seed(s.seed)
    model = Transformer(model_config(vars(s), data.meta)).to(device)
    if s.init_from and not checkpoint:
        load_first_weights(model, s, data.meta)
    if s.length_head:
        model.requires_grad_(False)
        model.length_head.requires_grad_(True)
    optimizers = make_optimizers(model, s.optimizer, (s.beta1, s.beta2), s.weight_decay,
                                 getattr(torch, dtype))
    progress = restore(checkpoint, model, optimizers, Path(s.out_dir)) if checkpoint else Progress()
    trackers = open_out_dir(s) if rank == 0 and not s.bench else []  # the others write nothing
    t = Training(model, Parallel(model, broadcast_buffers=False) if world > 1 else model,
                 training_objective(s, data.meta, model.config.vocab_size, device), data,
                 optimizers, trackers, rank, world, device, dtype)
    return t, progress


def open_out_dir(s):
    """Makes out_dir, writes config.json, and returns the trackers."""
    out = Path(s.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    trackers = make_trackers(s.track, s.out_dir, vars(s))  # may fail: before anything is deleted
    if not s.resume:
        for name in ('ckpt.pt', 'samples.csv'):  # of a run that --overwrite throws away
            (out / name).unlink(missing_ok=True)
    write_atomically(out / 'config.json', json.dumps(vars(s), indent=2).encode())
    return trackers


def finish(t, s):
    """The last evaluation, in float32, and a sample of what the model writes."""
    repeats = 1 if t.objective.exact else s.eval_repeats
    nats, error = evaluate(t.model, t.objective, t.data.batches('val', s.batch_size), seed=1,
                           repeats=repeats)
    error = '' if repeats == 1 else f' +- {error:.4f}'
    print(f'{t.objective.measured} {nats:.4f}{error} nats/token, {nats / math.log(2):.4f} '
          f'bits/token on the validation split ({t.data.size("val")} of {t.data.meta["source"]}), in float32')
    if t.world > 1:
        dist.destroy_process_group()
    if t.rank > 0:
        sys.exit()
    print(f'\nThe run is in {s.out_dir}: ckpt.pt, log.csv, loss.png. A sample of it:\n')
    run, how, task, start = as_run(t, s), sample.defaults() | {'seed': s.seed}, 'likelihood', \
        '--num_samples=3'
    if t.data.meta['sep_id'] is not None:
        for prompt, reference, answer in sample.first_answers(run, t.data, 2, how):
            print(f'prompt:    {prompt}\nreference: {reference}\nanswer:    {answer}\n')
        task, start = 'translation', f'--start={prompt!r}'
    else:
        canvas, eos_id = [t.model.mask_id] * s.block_size, t.data.meta['eos_id']
        rows = t.data.meta['layout'] == 'rows'
        ((ids, _),), _ = sample.complete(run, [canvas], how, eos_id if rows else None)
        print(run.tokenizer.decode(ids), end='\n\n')
    print('To try next:')
    print(f'python sample.py --out_dir={s.out_dir} {start}')
    print(f'python eval.py --out_dir={s.out_dir} --task={task}')


def main():
    settings = config.override(globals())
    if Path(out_dir, 'ckpt.pt').exists() and not (resume or overwrite or bench):
        raise UserError(f'{out_dir} holds a run already: --resume goes on with it, --overwrite '
                        'starts anew, --out_dir=... puts the new one elsewhere')
    checkpoint = load_checkpoint(out_dir) if resume else None
    if resume:  # the settings that the run has, then what this command line says
        before = in_todays_words(checkpoint['config'])
        globals().update({name: before[name] for name in settings if name in before})
        settings = config.override(globals())
    s = SimpleNamespace(**settings)
    check_settings(s, checkpoint['config'] if resume else {})
    t, progress = start(s, checkpoint)
    tokens = round(t.data.tokens_per_batch * gradient_accumulation_steps * t.world)  # an update's
    learned = sum(p.numel() for p in t.model.parameters() if p.requires_grad)
    peak = fastest_flops(t.device, t.dtype)
    print(t.data.describe())
    print(f'{objective}: {t.model.count_parameters():,} parameters, '
          + (f'{learned:,} of them learned, ' if length_head else '')
          + f'{tokens:,} tokens per update, {max_iters:,} updates = '
          f'{max_iters * tokens / t.data.tokens_per_epoch:.1f} epochs, on {t.device} in {t.dtype}'
          + (f', {t.world} processes' if t.world > 1 else ''))
    left = (bench or max_iters - progress.iteration) * tokens
    seconds_left = left * t.model.flops_per_token(t.data.mean_width) / (0.25 * peak)
    on, why = compile_or_not(settings['compile'], t.device, t.data, seconds_left)
    print(f'compile: {"on" if on else "off"} ({why})')
    if on:
        compile_model(t, s)
    if bench:
        return time_updates(t, s, progress.iteration, tokens, peak)
    train(t, s, progress, peak)
    finish(t, s)


if __name__ == '__main__':
    main()
