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
"""

import csv
import io
import json
import math
import os
import signal
import sys
import time
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import config
import sample
from config import UserError
from eval import append_answers, draw_losses, fastest_flops, first_answers, flops_per_token, \
    print_bench
from model import BOUND_NAMES, DIVERGENCES, LOSS_WEIGHTS, LOSSES, SCHEDULES, Transformer, \
    bound_of, evaluate, length_loss, load_checkpoint, loss_of, mixed_seed, model_config, \
    pick_device, pick_dtype
from prepare import DATASETS, gather, gather_rows, load_meta, load_split, load_tokenizer, prepare, \
    row_batches, row_lengths, row_widths

# the run
out_dir = 'out/shakespeare_mdm'  # where it is written; a config file sets out/<its name>
resume = False              # go on with the run in out_dir, under the settings that it has
overwrite = False           # throw away the run in out_dir
init_from = ''              # a run of this shape and vocabulary, whose weights are the first:
                            # a short ar run saves masked diffusion a slow start, see README
seed = 1337
device = 'auto'             # cuda, mps, cpu; auto takes the first that is there
dtype = 'auto'              # float32, bfloat16 (autocast); auto is bfloat16 where that is fast
compile = False             # torch.compile: faster after a minute or two of compiling
# data
dataset = 'shakespeare_char'  # a folder of data/, prepared if missing
batch_size = 16             # B, windows per forward and backward pass
gradient_accumulation_steps = 1  # passes per update
block_size = 256            # T, tokens per window
train_tokens = 0            # train on the first so many tokens of the training split; 0 = all
random_length = 0.0         # share of the batches that are cut to a random length: a stream's to
                            # any; rows, if predict_pad, to what the longest answer needs, or more
# data of rows: prompts and answers, or documents; a batch holds rows of one width
predict_pad = False         # PAD is to be predicted too, so that the model finds where to end;
                            # False: it is told by how many tokens there are, and never sees a PAD
score_prompt = False        # ar: train on the prompt too
row_share = 1.0             # train on this share of the rows, the shortest ones
length_curriculum = 0       # updates over which longer and longer rows join the shortest
pad_curriculum = 0          # predict_pad: updates over which the room behind the answers grows
token_weights = (1.0, 1.0, 1.0)  # mdm: what an error counts in the loss at text, at EOS, at PAD
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
# length before decoding: train a head that tells it, on the run init_from, which stays as it is
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
# watching
eval_interval = 200         # updates between evaluations on the full validation split, checkpoints
log_interval = 10           # updates between looks at the loss
decode_rows = 0             # prompts to answer at each evaluation, greedily, into samples.csv
eval_repeats = 4            # independent draws of a bound at the end, for its standard error
tensorboard = False         # also write the curves for TensorBoard, to out_dir
wandb = False               # also send them to Weights & Biases, as project nanomdm
bench = 0                   # only time this many updates and profile a few: nothing is written
settings = config.override(globals())
WARM_UP, PROFILED = 3, 3    # updates before and after those that bench times


def get_windows(data, B, T, vocab_size, number):
    """Windows (B, T) int64 at random places, in which nothing is given.

    They follow from `number` alone, as their noise does: a resumed run sees what the killed one
    would have seen, and a batch is the same whether its parts run one after the other or on many
    processes.
    """
    starts = np.random.default_rng(number).integers(0, len(data) - T + 1, B)
    return torch.from_numpy(gather(data, starts, T, vocab_size)), None


def shortened(x0, given, pad_id, share):
    """x0 and given (B, T), cut at `share` of the way from the shortest length there can be to T.

    That is the one at which a row loses its last token but PAD; of windows without rows, 1.
    """
    least, T = 1, x0.size(1)
    if given is not None:
        least += (x0 != pad_id).any(0).nonzero().max().item()
    length = least + round(share * (T - least))
    return x0[:, :length], None if given is None else given[:, :length]


class RowBatches:
    """The endless sequence of batches of rows, each of rows of one width, shuffled every epoch."""

    def __init__(self, data, meta, batch_size, predict_pad, seed, share=1.0):
        self.data, self.meta, self.predict_pad = data, meta, predict_pad
        rows = data.reshape(-1, meta['row_length'])
        lengths = row_lengths(rows, meta)[1]  # without PAD
        self.kept = np.sort(lengths.argsort(kind='stable')[:math.ceil(share * len(rows)) or 1])
        self.widths = row_widths(rows, meta, predict_pad)[self.kept]  # (N,)
        self.known = lengths[self.kept].sum()  # tokens of all rows, no PAD among them
        self.per_epoch = len(row_batches(self.widths, batch_size))

        self.epoch = lru_cache(2)(lambda number: row_batches(
            self.widths, batch_size, np.random.default_rng(mixed_seed(seed, number))))

    def get(self, number, share=1.0):
        """x0 (B, T) int64, given (B, T) bool: they follow from `number` and the seed alone.

        share < 1: of the batches of that epoch that are no wider than this share of the widths.
        """
        epoch, i = divmod(number, self.per_epoch)
        low, high = self.widths.min(), self.widths.max()
        batches = [b for b in self.epoch(epoch) if self.widths[b[0]] <= low + share * (high - low)]
        rows = self.kept[batches[i % len(batches)]]
        x0, given = gather_rows(self.data, rows, self.meta, self.predict_pad)
        return torch.from_numpy(x0), torch.from_numpy(given)


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


class Parallel(torch.nn.parallel.DistributedDataParallel):
    """The model on one of several processes: backward() adds up the gradients of all of them."""

    def __getattr__(self, name):  # the losses ask it for mask_id, config and logits
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


def make_trackers(tensorboard, wandb, out_dir, settings):
    """Functions (iteration, {name: number}), one for each tracker that is asked for."""
    trackers = []
    try:
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(out_dir)
            trackers.append(lambda i, row: [writer.add_scalar(k, v, i) for k, v in row.items()])
        if wandb:
            from wandb import init
            run = init(project='nanomdm', name=Path(out_dir).name, config=settings)
            trackers.append(lambda i, row: run.log(row, step=i))
    except ImportError as e:
        raise UserError(f"{e}: python -m pip install -e '.[track]'") from e
    return trackers


def write_atomically(path, content):
    """Writes bytes so that `path` holds, at every moment, all of the old content or of the new."""
    part = path.with_name(path.name + '.part')
    try:
        with open(part, 'wb') as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise UserError(f'cannot write {path} ({e.strerror}); the one before it is intact') from e


def write_log(rows, path):
    """log.csv: a row for every look at the validation split."""
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


# -------------------------------------------------------- from here on it runs, from top to bottom

out = Path(out_dir)
if (out / 'ckpt.pt').exists() and not (resume or overwrite or bench):
    raise UserError(f'{out_dir} holds a run already: --resume goes on with it, --overwrite starts '
                    'anew, --out_dir=... puts the new one elsewhere')
checkpoint = load_checkpoint(out_dir) if resume else None
if resume:  # the settings that the run has, then what this command line says
    globals().update({k: v for k, v in checkpoint['config'].items() if k in settings})
    settings = config.override(globals())
for name, fine, wanted in (
        ('objective', objective in LOSSES, f'one of {", ".join(LOSSES)}'),
        ('objective', not resume or objective == checkpoint['config']['objective'],
         'that of the run'),
        ('seed', 0 <= seed < 2 ** 63, 'in [0, 2^63)'),
        *((n, 0 <= settings[n] < 1, 'in [0, 1)') for n in ('beta1', 'beta2')),
        ('schedule', schedule in SCHEDULES, f'one of {", ".join(SCHEDULES)}'),
        ('loss_weight', loss_weight in LOSS_WEIGHTS, f'one of {", ".join(LOSS_WEIGHTS)}'),
        ('optimizer', optimizer in ('muon', 'adamw'), 'muon or adamw'),
        ('lr_schedule', lr_schedule in ('cosine', 'wsd', 'constant'), 'cosine, wsd or constant'),
        ('mask_range', len(mask_range) == 2 and 0 <= mask_range[0] <= mask_range[1] <= 1
         and mask_range[1] > 0, '(lo, hi) with 0 <= lo <= hi <= 1 and hi > 0'),
        ('pad_curriculum', predict_pad or not pad_curriculum, '0 without predict_pad'),
        *((n, 0 <= settings[n] <= 1, '0 to 1') for n in ('random_length', 'row_share', 'dropout')),
        ('token_weights', len(token_weights) == 3 and min(token_weights) >= 0
         and (objective == 'mdm' and not length_head or set(token_weights) == {1.0}),
         'three numbers of 0 or more (1, 1, 1 but for mdm without a length_head)'),
        ('divergence', divergence in DIVERGENCES, f'one of {", ".join(DIVERGENCES)}'),
        ('soft_inputs', objective == 'uniform' or not soft_inputs, 'False (but for uniform)'),
        ('subs', subs or objective == 'd3pm', 'True (d3pm alone has a use for the mask)'),
        ('block_length', objective != 'block' or block_length <= block_size, 'block_size at most'),
        ('length_head', not length_head or (predict_pad and objective in ('mdm', 'd3pm')),
         "'', unless predict_pad is on and objective is mdm or d3pm"),
        ('init_from', init_from or not length_head, 'the run that a length_head is for'),
        ('length_quantile', 0 < length_quantile < 1, 'in (0, 1)'),
        *((n, settings[n] >= 0, '0 or more') for n in (
            'max_iters', 'train_tokens', 'grad_clip', 'bench', 'decode_rows', 'length_curriculum',
            'pad_curriculum', 'n_kv_head', 'n_hidden', 'n_conv', 'warmup_iters', 'weight_decay',
            'w_max', 'learning_rate', 'muon_lr')),
        *((n, settings[n] >= 1, '1 or more') for n in (
            'batch_size', 'gradient_accumulation_steps', 'block_size', 'n_layer', 'n_head',
            'n_embd', 'eval_interval', 'log_interval', 'eval_repeats', 'diffusion_steps',
            'block_length'))):
    if not fine:
        raise UserError(f'{name} is {settings[name]!r}, but it must be {wanted}')
rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))  # of torchrun
device = pick_device(device)
if world > 1:
    if length_head:
        raise UserError('a length_head is trained by one process: leave out torchrun')
    if device == 'cuda':
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
        torch.cuda.set_device(device)
    dist.init_process_group('nccl' if device.startswith('cuda') else 'gloo')
dtype = pick_dtype(dtype, device)
if rank == 0 and dataset in DATASETS and not (Path('data') / dataset / 'meta.json').exists():
    print(f'data/{dataset} is missing: preparing it')
    prepare(dataset)
if world > 1:
    dist.barrier()  # from here on there is data, and every process has seen that out_dir is free
meta = load_meta(dataset)
train_data, val_data = load_split(dataset, 'train')[:train_tokens or None], \
    load_split(dataset, 'val')
row_data = None
if meta['layout'] == 'rows':
    if train_tokens:
        raise UserError(f'train_tokens is for a stream of text, but data/{dataset} has rows')
    if score_prompt and objective != 'ar':
        raise UserError(f'score_prompt is for objective=ar alone: {objective} sees all the prompt')
    row_data = RowBatches(train_data, meta, batch_size, predict_pad, seed, row_share)
    val_rows = val_data.reshape(-1, meta['row_length'])
    train_data = train_data.reshape(-1, meta['row_length'])[row_data.kept].ravel()  # to look at
    widest = max(row_data.widths.max(), row_widths(val_rows, meta, predict_pad).max())
    if widest > block_size:
        raise UserError(f'data/{dataset} has rows of {widest} tokens: set block_size, which is '
                        f'{block_size}, to {widest} or more')
elif predict_pad or score_prompt or length_curriculum or {*token_weights, row_share} != {1.0}:
    raise UserError('predict_pad, score_prompt, row_share, length_curriculum and token_weights '
                    f'are for rows, but data/{dataset} is a stream of text')
elif len(train_data) < block_size:
    raise UserError(f'block_size is {block_size}, but data/{dataset} has only '
                    f'{len(train_data):,} training tokens')

if decode_rows and meta['sep_id'] is None:
    raise UserError(f'decode_rows is for prompts and answers, but data/{dataset} has none')

torch.manual_seed(seed)
model = Transformer(model_config(settings, meta)).to(device)
if init_from and not resume:
    source = load_checkpoint(init_from, device)
    shape, own = vars(model_config(source['config'], source['meta'])), vars(model.config)
    other = [name for name in shape if shape[name] != own[name]
             and name not in ('causal', 'dropout', 'subs', 'block_length', 'length_head')]
    other += [name for name in ('tokenizer', 'sep_id') if source['meta'][name] != meta[name]]
    other += [name for name in ('objective', 'predict_pad')
              if length_head and source['config'][name] != settings[name]]
    if other:
        raise UserError(f'{init_from} cannot be what this run begins with, for it has another '
                        f'{", ".join(other)}')
    model.load_state_dict(model.state_dict() | {k: v for k, v in source['model'].items()
                                                if not k.startswith('length_head.')})
if length_head:
    model.requires_grad_(False)
    model.length_head.requires_grad_(True)
learned = [p for p in model.parameters() if p.requires_grad]
optimizers = make_optimizers(model, optimizer, (beta1, beta2), weight_decay,
                             getattr(torch, dtype))
first_iter, best, tokens, seconds, rows = 0, math.inf, 0, 0.0, []
if resume:
    if checkpoint['meta'] != meta:
        raise UserError(f'data/{dataset} is not what {out_dir} was trained on')
    try:
        model.load_state_dict(checkpoint['model'])
        for o, state in zip(optimizers, checkpoint['optimizer'], strict=True):
            groups = [own | {'params': saved['params']} for own, saved in
                      zip(o.param_groups, state['param_groups'], strict=True)]
            o.load_state_dict(state | {'param_groups': groups})  # these settings' decay and betas
    except (RuntimeError, ValueError) as e:
        raise UserError(f'the weights in {out_dir} have another shape than these settings ask '
                        'for: resume without changing the model or the optimizer') from e
    first_iter, best = checkpoint['iter'], checkpoint['best']
    try:
        with open(out / 'log.csv', newline='') as f:
            rows = [row for row in csv.DictReader(f)  # None: a line that was cut
                    if None not in row.values() and int(row['iter']) <= first_iter]
        tokens = int(checkpoint.get('tokens', rows[-1]['tokens']))  # runs of old have neither
        seconds = float(checkpoint.get('seconds', rows[-1]['seconds']))
    except (OSError, ValueError, TypeError, LookupError) as e:
        raise UserError(f'{out}/log.csv is damaged or gone ({type(e).__name__})') from e
if compile:
    model.compile()
parallel = Parallel(model, broadcast_buffers=False) if world > 1 else model

loss_fn, bound, bound_name = loss_of(settings), bound_of(settings), BOUND_NAMES[objective]
if length_head:
    bound_name = 'loss of the length'
    bound = partial(length_loss, pad_id=meta['pad_id'], length_quantile=length_quantile)
    loss_fn = lambda *batch: (bound(*batch).sum(), (~batch[3]).sum())  # given is the fourth
if set(token_weights) != {1.0}:  # of rows, which have an EOS and a PAD
    token_weight = torch.full((model.config.vocab_size,), float(token_weights[0]), device=device)
    for token, its_weight in zip((meta['eos_id'], meta['pad_id']), token_weights[1:]):
        token_weight[token] = its_weight
    loss_fn = partial(loss_fn, token_weight=token_weight)
measure = partial(evaluate, model, bound, batch_size=batch_size, meta=meta, predict_pad=predict_pad)
autocast = torch.autocast(device.partition(':')[0], torch.bfloat16, enabled=dtype == 'bfloat16')
log_v = math.log(meta['vocab_size'])
passes = gradient_accumulation_steps * world
tokens_per_epoch, T = len(train_data), block_size
tokens_per_iter = batch_size * passes * block_size
if row_data:  # means: every batch has its own width
    tokens_per_epoch, T = int(row_data.widths.sum()), round(row_data.widths.mean())
    tokens_per_iter = round(tokens_per_epoch / row_data.per_epoch * passes)
epochs = max_iters * tokens_per_iter / tokens_per_epoch
flops, peak = flops_per_token(model, T), fastest_flops(device, dtype)
say = print if rank == 0 else lambda *words, **how: None
say(f'{dataset} ({meta["source"]}): {tokens_per_epoch:,} training tokens of '
    f"{meta['vocab_size']:,} kinds, log V' = {log_v:.4f}")
if row_data:
    say(f'{len(row_data.widths):,} rows of {row_data.widths.min()} to {row_data.widths.max()} '
        f'tokens, {row_data.per_epoch:,} batches an epoch, '
        f'{100 * (1 - row_data.known / tokens_per_epoch):.1f}% of what is computed is PAD')
say(f'{objective}: {model.count_parameters():,} parameters, '
    + (f'{sum(p.numel() for p in learned):,} of them learned, ' if length_head else '')
    + f'{tokens_per_iter:,} tokens per '
    f'update, {max_iters:,} updates = {epochs:.1f} epochs, on {device} in {dtype}'
    + (f', {world} processes' if world > 1 else ''))

# SIGINT and SIGTERM only leave a note here: the update at work is finished, and saved, before we go
caught = []
for signal_number in () if bench else (signal.SIGINT, signal.SIGTERM):
    signal.signal(signal_number, lambda number, frame: caught.append(number))
trackers = []
if rank == 0 and not bench:  # the others write nothing
    out.mkdir(parents=True, exist_ok=True)
    trackers = make_trackers(tensorboard, wandb, out_dir, settings)
    if not resume:
        for name in ('ckpt.pt', 'samples.csv'):  # of a run that --overwrite throws away
            (out / name).unlink(missing_ok=True)
    write_atomically(out / 'config.json', json.dumps(settings, indent=2).encode())
kept = 'nothing is saved yet' if not resume else f'{out}/ckpt.pt has the weights of {first_iter}'
bar = tqdm(total=max_iters, initial=first_iter, unit='it',
           disable=not sys.stderr.isatty() or rank > 0)
first_tokens, first_seconds = tokens, seconds  # of training, looking not counted
speed, stop = 0.0, False
if bench:
    max_iters = first_iter + WARM_UP + bench + PROFILED
    profiler, milliseconds = torch.profiler.profile(), []

for iteration in range(first_iter, max_iters + 1):
    factor = lr_factor(iteration, max_iters, warmup_iters, lr_schedule)

    # look at the model as it is after `iteration` updates
    look = not bench and (iteration % eval_interval == 0 or iteration == max_iters)
    if look and not (rows and int(rows[-1]['iter']) == iteration):
        with autocast:
            val, _ = measure(data=val_data)
            train, _ = measure(data=train_data, max_windows=4 * batch_size)
        if not val <= (2 * log_v if token_weights[0] else math.inf):  # nan is not, either
            raise UserError(f'diverged: the validation loss is {val:.4g} after {iteration} updates '
                            f'and at learning rate {factor * learning_rate:.2e}; {kept}')
        rows.append({'iter': iteration, 'tokens': tokens, 'measured': bound_name,
                     'train': f'{train:.6f}', 'val': f'{val:.6f}',
                     'lr': f'{factor * learning_rate:.3e}', 'data': meta['source'],
                     'seconds': f'{seconds:.1f}', 'tokens_per_second': f'{speed:.0f}'})
        best = min(best, val)
        if rank == 0:
            write_log(rows, out / 'log.csv')
            picture = draw_losses(rows, f'{length_head or objective} on {dataset}',
                                  None if length_head else log_v)
            write_atomically(out / 'loss.png', picture)
            bar.write(f'{iteration:6,} updates, {seconds:4.0f} s: {bound_name} {val:.4f} '
                      f'nats/token on the validation split, {train:.4f} on training text')
        for track in trackers:
            track(iteration, {f'train {bound_name}': train, f'val {bound_name}': val,
                              'tokens/s': speed})
    if (look or stop) and rank == 0 and not (bench or (resume and iteration == first_iter)):
        buffer = io.BytesIO()
        torch.save({'model': model.state_dict(), 'optimizer': [o.state_dict() for o in optimizers],
                    'config': settings, 'meta': meta, 'iter': iteration, 'best': best,
                    'tokens': tokens, 'seconds': seconds, 'rng': seed}, buffer)  # draws: rng, iter
        write_atomically(out / 'ckpt.pt', buffer.getbuffer())
        kept = f'{out}/ckpt.pt has the weights after {iteration} updates'
        if look and decode_rows:
            found = first_answers(model.eval(), settings, meta, decode_rows,
                                  vars(sample) | {'seed': seed})
            append_answers(out / 'samples.csv', iteration, found)
            model.train()
    if stop:
        bar.close()
        say(f'stopped and saved after {iteration} updates; go on with\n'
            f'python train.py --out_dir={out_dir} --resume')
        sys.exit(128 + (caught or [signal.SIGTERM])[0])
    if iteration == max_iters:
        break
    if bench and iteration == max_iters - PROFILED:
        profiler.start()

    # one update
    began = time.perf_counter()
    for o in optimizers:
        for group in o.param_groups:
            group['lr'] = factor * (muon_lr if isinstance(o, Muon) else learning_rate)
    sums = torch.zeros(3, device=device)  # nats, tokens that count, processes that caught a signal
    how = {'tau': 1e-3 * 1e-5 ** (iteration / max_iters)} if soft_inputs else {}  # to argmax
    for micro in range(gradient_accumulation_steps):
        number = mixed_seed(seed, iteration, micro * world + rank)
        torch.manual_seed(number)  # of dropout
        if row_data:
            x0, given = row_data.get(iteration * passes + micro * world + rank,
                                     iteration / length_curriculum if length_curriculum else 1.0)
        else:
            x0, given = get_windows(train_data, batch_size, block_size, meta['vocab_size'], number)
        draws = np.random.default_rng([number, 1])  # not those of get_windows
        share = min(1.0, iteration / pad_curriculum) if pad_curriculum else 1.0
        share *= draws.random() if draws.random() < random_length else 1.0
        x0, given = shortened(x0, given, meta['pad_id'], share)
        tokens += x0.numel() * world  # the others' batches are about as wide
        if device.startswith('cuda'):
            x0 = x0.pin_memory()
        x0 = x0.to(device, non_blocking=True)
        generator = torch.Generator(device).manual_seed(number)
        given = None if given is None or score_prompt else given.to(device)
        parallel.require_backward_grad_sync = micro == gradient_accumulation_steps - 1
        with autocast:
            nats, count = loss_fn(parallel, x0, generator, given, **how)
        nats.backward()
        sums += torch.stack([nats.detach(), count, torch.zeros_like(nats)])
    if world > 1:
        sums[2] = len(caught)
        dist.all_reduce(sums)
    for p in learned:  # of the sum (the mean, if by processes) of nats, now per token
        p.grad *= world / sums[1].clamp(min=1)
    torch.nn.utils.clip_grad_norm_(learned, grad_clip or math.inf)
    for o in optimizers:
        o.step()
        o.zero_grad()
    stop = sums[2].item() > 0 if world > 1 else bool(caught)  # all processes stop after the same
    if bench:
        sums.tolist()  # waits for the device
    took = time.perf_counter() - began
    seconds += took
    speed = (tokens - first_tokens) / (seconds - first_seconds)
    bar.update()
    if bench and first_iter + WARM_UP <= iteration < max_iters - PROFILED:
        milliseconds.append(1000 * took)

    if (iteration % log_interval == 0 or stop) and not bench:
        loss = (sums[0] / sums[1].clamp(min=1)).item()  # waits for the device: not every time
        if not loss < 10 * log_v:
            raise UserError(f'diverged: the loss is {loss:.4g} at update {iteration} and learning '
                            f'rate {factor * learning_rate:.2e}: lower it; {kept}')
        used = f'{100 * speed * flops / world / peak:.0f}% of torch.mm'
        bar.set_postfix_str(f'loss {loss:.3f}, {speed:,.0f} tokens/s, {used}')
        if bar.disable and iteration % (10 * log_interval) == 0:
            pace = (seconds - first_seconds) / (iteration + 1 - first_iter)
            minutes = (max_iters - iteration - 1) * pace / 60
            say(f'{iteration:6,} updates, {seconds:4.0f} s: loss {loss:.4f}, {speed:,.0f} '
                f'tokens/s, {used}, {minutes:.1f} minutes left', flush=True)
bar.close()
if bench:
    profiler.stop()
    if rank == 0:
        print_bench(milliseconds, profiler, PROFILED, tokens_per_iter * flops, peak,
                    tokens_per_iter, device)
    sys.exit()
for signal_number in (signal.SIGINT, signal.SIGTERM):  # all is saved: they may stop what follows
    signal.signal(signal_number, signal.SIG_DFL)

repeats = 1 if objective == 'ar' or length_head else eval_repeats
scored = f'{len(val_rows):,} rows' if row_data else f'{len(val_data):,} tokens'
nats, error = measure(data=val_data, seed=1, repeats=repeats)
say(f'{bound_name} {nats:.4f}{"" if repeats == 1 else f" +- {error:.4f}"} nats/token, '
    f'{nats / math.log(2):.4f} bits/token on the validation split ({scored} of '
    f'{meta["source"]}), in float32')
if world > 1:
    dist.destroy_process_group()
if rank > 0:
    sys.exit()
print(f'\nThe run is in {out_dir}: ckpt.pt, log.csv, loss.png. A sample of it:\n')
defaults, task, start = vars(sample) | {'seed': seed}, 'likelihood', '--num_samples=3'
if meta['sep_id'] is not None:
    for prompt, right, written in first_answers(model.eval(), settings, meta, 2, defaults):
        print(f'prompt:       {prompt}\nright answer: {right}\nanswer:       {written}\n')
    task, start = 'translation', f'--start={prompt!r}'
else:
    canvas, eos_id = [model.mask_id] * block_size, meta['eos_id'] if row_data else None
    ((ids, _),), _ = sample.complete(model.eval(), objective, [canvas], defaults, eos_id)
    print(load_tokenizer(meta).decode(ids), end='\n\n')
print('To try next:')
print(f'python sample.py --out_dir={out_dir} {start}')
print(f'python eval.py --out_dir={out_dir} --task={task}')
