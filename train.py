"""Trains a model: autoregressive (next token) or masked diffusion, from the same transformer.

    python train.py                                      masked diffusion on Tiny Shakespeare
    python train.py config/shakespeare_ar.py             its autoregressive twin
    python train.py config/shakespeare_mdm_10m.py --device=cuda
    python train.py --out_dir=out/shakespeare_mdm --resume

The first takes about 10 minutes on 2 CPU cores. It prepares the data set if that is missing and
writes a run to out_dir: ckpt.pt (the weights and all that resuming needs), config.json, log.csv and
loss.png. An interrupted run goes on with --resume as if nothing had happened.
"""

import csv
import io
import json
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import config
import sample
from config import UserError
from model import BOUND_NAMES, BOUNDS, LOSS_WEIGHTS, LOSSES, SCHEDULES, Transformer, evaluate, \
    load_checkpoint, model_config, pick_device, pick_dtype
from prepare import gather, load_meta, load_split, load_tokenizer, prepare

# the run
out_dir = 'out/shakespeare_mdm'  # where it is written; a config file sets out/<its name>
resume = False              # go on with the run in out_dir, under the settings that it has
overwrite = False           # throw away the run in out_dir
seed = 1337
device = 'auto'             # cuda, mps, cpu; auto takes the first that is there
dtype = 'auto'              # float32, bfloat16 (autocast); auto is bfloat16 where that is fast
compile = False             # torch.compile: faster after a minute or two of compiling
# data
dataset = 'shakespeare_char'  # a folder of data/, prepared if missing
batch_size = 16             # B, windows per forward and backward pass
gradient_accumulation_steps = 1  # passes per update
block_size = 256            # T, tokens per window
# model
n_layer = 4
n_head = 4
n_kv_head = 0               # heads of keys and values; 0 = n_head
n_embd = 256
pos = 'rope'                # rope, learned
norm = 'rmsnorm'            # rmsnorm, layernorm
mlp = 'relu2'               # relu2, swiglu, gelu
qk_norm = True
bias = False
tied = False                # the head shares the embedding's matrix
time_cond = False           # show the network the noise level
dropout = 0.0
# objective
objective = 'mdm'           # ar, mdm
schedule = 'linear'         # mdm: linear, cosine; how much is masked at level t
loss_weight = 'clipped'     # mdm: elbo = w(t), clipped = min(w(t), w_max), flat = 1, masked_mean
w_max = 5.0                 # mdm: for loss_weight = clipped
mask_range = (0.0, 1.0)     # mdm: levels t that are trained
# optimiser
optimizer = 'muon'          # muon: Muon for the blocks' matrices, AdamW for the rest; adamw: all
max_iters = 1500            # updates
learning_rate = 3e-3        # AdamW's
muon_lr = 0.02              # Muon's
lr_schedule = 'cosine'      # cosine, wsd (constant, then linear over the last fifth), constant
warmup_iters = 50           # updates over which the rates rise from 0
weight_decay = 0.0          # of matrices in the blocks
beta1 = 0.9                 # AdamW's averages of the gradient
beta2 = 0.99                # and of its square
grad_clip = 1.0             # largest norm of the gradient; 0 = no limit
# watching
eval_interval = 250         # updates between evaluations on the full validation split, checkpoints
log_interval = 10           # updates between looks at the loss
eval_repeats = 4            # independent draws of a bound at the end, for its standard error
settings = config.override(globals())


def get_batch(data, B, T, vocab_size, number, device):
    """Windows (B, T) int64 at random places, and the generator that draws their noise.

    Both follow from `number` alone: a resumed run sees what the killed one would have seen, and a
    batch is the same whether its parts run one after the other or on many processes.
    """
    starts = np.random.default_rng(number).integers(0, len(data) - T + 1, B)
    x0 = torch.from_numpy(gather(data, starts, T, vocab_size))
    if device.startswith('cuda'):
        x0 = x0.pin_memory()
    return x0.to(device, non_blocking=True), torch.Generator(device).manual_seed(number)


def make_optimizers(model, optimizer, betas, weight_decay):
    """[Muon, AdamW] or [AdamW]: Muon takes the matrices inside the blocks [Jordan 2024].

    Weight decay falls on those matrices under either. The loop sets the learning rates.
    """
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    adam = partial(torch.optim.AdamW, betas=betas, fused=True)
    if optimizer == 'muon':
        return [torch.optim.Muon(matrices, weight_decay=weight_decay),
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


def draw_losses(rows, path, title, bound_name, log_v):
    """loss.png: the training and validation curves in nats per token, log V' beside them."""
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
    name = bound_name.replace('<=', '(an upper bound on the nll)')
    ax.set(xlabel='updates', title=title, ylabel=f'{name}, nats per token')
    ax.grid(color='0.92')
    ax.legend(frameon=False)
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=150)
    plt.close(fig)
    write_atomically(path, buffer.getvalue())


# -------------------------------------------------------- from here on it runs, from top to bottom

out = Path(out_dir)
if (out / 'ckpt.pt').exists() and not (resume or overwrite):
    raise UserError(f'{out_dir} holds a run already: --resume goes on with it, --overwrite starts '
                    'anew, --out_dir=... puts the new one elsewhere')
checkpoint = load_checkpoint(out_dir) if resume else None
if resume:  # the settings that the run has, then what this command line says
    globals().update({k: v for k, v in checkpoint['config'].items() if k in settings})
    settings = config.override(globals())
for name, fine, wanted in (
        ('objective', objective in LOSSES, f'one of {", ".join(LOSSES)}'),
        ('schedule', schedule in SCHEDULES, f'one of {", ".join(SCHEDULES)}'),
        ('loss_weight', loss_weight in LOSS_WEIGHTS, f'one of {", ".join(LOSS_WEIGHTS)}'),
        ('optimizer', optimizer in ('muon', 'adamw'), 'muon or adamw'),
        ('lr_schedule', lr_schedule in ('cosine', 'wsd', 'constant'), 'cosine, wsd or constant'),
        ('mask_range', len(mask_range) == 2 and 0 <= mask_range[0] <= mask_range[1] <= 1
         and mask_range[1] > 0, '(lo, hi) with 0 <= lo <= hi <= 1 and hi > 0'),
        ('max_iters', max_iters >= 0, '0 or more'), ('grad_clip', grad_clip >= 0, '0 or more'),
        *((n, settings[n] >= 1, '1 or more') for n in (
            'batch_size', 'gradient_accumulation_steps', 'block_size', 'n_layer', 'n_head',
            'n_embd', 'eval_interval', 'log_interval', 'eval_repeats'))):
    if not fine:
        raise UserError(f'{name} is {settings[name]!r}, but it must be {wanted}')
device = pick_device(device)
dtype = pick_dtype(dtype, device)
if not (Path('data') / dataset / 'meta.json').exists():
    print(f'data/{dataset} is missing: preparing it')
    prepare(dataset)
meta = load_meta(dataset)
train_data, val_data = load_split(dataset, 'train'), load_split(dataset, 'val')
if len(train_data) < block_size:
    raise UserError(f'block_size is {block_size}, but data/{dataset} has only '
                    f'{len(train_data):,} training tokens')

torch.manual_seed(seed)
model = Transformer(model_config(settings, meta)).to(device)
optimizers = make_optimizers(model, optimizer, (beta1, beta2), weight_decay)
first_iter, best, rows = 0, math.inf, []
if resume:
    if checkpoint['meta'] != meta:
        raise UserError(f'data/{dataset} is not what {out_dir} was trained on')
    try:
        model.load_state_dict(checkpoint['model'])
        for o, state in zip(optimizers, checkpoint['optimizer'], strict=True):
            o.load_state_dict(state)
    except (RuntimeError, ValueError) as e:
        raise UserError(f'the weights in {out_dir} have another shape than these settings ask '
                        'for: resume without changing the model or the optimizer') from e
    first_iter, best = checkpoint['iter'], checkpoint['best']
    with open(out / 'log.csv', newline='') as f:
        rows = [row for row in csv.DictReader(f) if int(row['iter']) <= first_iter]
if compile:
    model.compile()

loss_fn, bound, bound_name = LOSSES[objective], BOUNDS[objective], BOUND_NAMES[objective]
if objective == 'mdm':
    loss_fn = partial(loss_fn, schedule=schedule, loss_weight=loss_weight, w_max=w_max,
                      mask_range=mask_range)
autocast = torch.autocast(device.partition(':')[0], torch.bfloat16, enabled=dtype == 'bfloat16')
log_v = math.log(meta['vocab_size'])
tokens_per_iter = batch_size * gradient_accumulation_steps * block_size
epochs = max_iters * tokens_per_iter / len(train_data)
print(f'{dataset} ({meta["source"]}): {len(train_data):,} training tokens of '
      f"{meta['vocab_size']:,} kinds, log V' = {log_v:.4f}")
print(f'{objective}: {model.count_parameters():,} parameters, {tokens_per_iter:,} tokens per '
      f'update, {max_iters:,} updates = {epochs:.1f} epochs, on {device} in {dtype}')

# SIGINT and SIGTERM only leave a note here: the update at work is finished, and saved, before we go
caught = []
for signal_number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signal_number, lambda number, frame: caught.append(number))
out.mkdir(parents=True, exist_ok=True)
if not resume:
    (out / 'ckpt.pt').unlink(missing_ok=True)  # of a run that --overwrite throws away
write_atomically(out / 'config.json', json.dumps(settings, indent=2).encode())
kept = 'nothing is saved yet' if not resume else f'{out}/ckpt.pt has the weights of {first_iter}'
bar = tqdm(total=max_iters, initial=first_iter, unit='it', disable=not sys.stderr.isatty())
seconds = float(rows[-1]['seconds']) if rows else 0.0  # of training, looking not counted
seconds_here = 0.0

for iteration in range(first_iter, max_iters + 1):
    factor = lr_factor(iteration, max_iters, warmup_iters, lr_schedule)

    # look at the model as it is after `iteration` updates
    speed = tokens_per_iter * (iteration - first_iter) / max(seconds_here, 1e-9)
    look = iteration % eval_interval == 0 or iteration == max_iters
    if look and not (rows and int(rows[-1]['iter']) == iteration):
        with autocast:
            val, _ = evaluate(model, bound, val_data, batch_size)
            train, _ = evaluate(model, bound, train_data, batch_size, max_windows=4 * batch_size)
        if not math.isfinite(val):
            raise UserError(f'the validation loss is {val} after {iteration} updates; {kept}')
        rows.append({'iter': iteration, 'tokens': iteration * tokens_per_iter,
                     'measured': bound_name, 'train': f'{train:.6f}', 'val': f'{val:.6f}',
                     'lr': f'{factor * learning_rate:.3e}', 'data': meta['source'],
                     'seconds': f'{seconds:.1f}', 'tokens_per_second': f'{speed:.0f}'})
        best = min(best, val)
        write_log(rows, out / 'log.csv')
        draw_losses(rows, out / 'loss.png', f'{objective} on {dataset}', bound_name, log_v)
        bar.write(f'{iteration:6,} updates, {seconds:4.0f} s: {bound_name} {val:.4f} nats/token on '
                  f'the validation split, {train:.4f} on training text')
    if (look or caught) and not (resume and iteration == first_iter):
        buffer = io.BytesIO()
        torch.save({'model': model.state_dict(), 'optimizer': [o.state_dict() for o in optimizers],
                    'config': settings, 'meta': meta, 'iter': iteration, 'best': best,
                    'rng': seed}, buffer)  # every draw follows from the seed and the iteration
        write_atomically(out / 'ckpt.pt', buffer.getbuffer())
        kept = f'{out}/ckpt.pt has the weights after {iteration} updates'
    if caught:
        bar.close()
        print(f'stopped and saved after {iteration} updates; go on with\n'
              f'python train.py --out_dir={out_dir} --resume')
        sys.exit(128 + caught[0])
    if iteration == max_iters:
        break

    # one update
    began = time.perf_counter()
    for o in optimizers:
        for group in o.param_groups:
            group['lr'] = factor * (muon_lr if isinstance(o, torch.optim.Muon) else learning_rate)
    nats_sum, count_sum = 0.0, 0
    for micro in range(gradient_accumulation_steps):
        number = (seed * 2 ** 40 + iteration * 2 ** 12 + micro) % 2 ** 63
        torch.manual_seed(number)  # of dropout
        x0, generator = get_batch(train_data, batch_size, block_size, meta['vocab_size'], number,
                                  device)
        with autocast:
            nats, count = loss_fn(model, x0, generator)
        nats.backward()
        nats_sum, count_sum = nats_sum + nats.detach(), count_sum + count
    for p in model.parameters():
        p.grad /= count_sum.clamp(min=1)  # of the sum, now of the mean over all tokens that count
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    for o in optimizers:
        o.step()
        o.zero_grad()
    seconds, seconds_here = (s + time.perf_counter() - began for s in (seconds, seconds_here))
    speed = tokens_per_iter * (iteration + 1 - first_iter) / seconds_here
    bar.update()

    if iteration % log_interval == 0 or caught:
        loss = (nats_sum / count_sum).item()  # waits for the device, so not at every update
        if not math.isfinite(loss):
            raise UserError(f'the loss is {loss} at update {iteration}, at a learning rate of '
                            f'{factor * learning_rate:.2e}: lower it; {kept}')
        bar.set_postfix_str(f'loss {loss:.3f}, {speed:,.0f} tokens/s')
        if bar.disable and iteration % (10 * log_interval) == 0:
            minutes = (max_iters - iteration) * tokens_per_iter / speed / 60
            print(f'{iteration:6,} updates, {seconds:4.0f} s: loss {loss:.4f}, '
                  f'{speed:,.0f} tokens/s, {minutes:.1f} minutes left', flush=True)
bar.close()

repeats = 1 if objective == 'ar' else eval_repeats
nats, error = evaluate(model, bound, val_data, batch_size, seed=1, repeats=repeats)
print(f'{bound_name} {nats:.4f}{"" if repeats == 1 else f" +- {error:.4f}"} nats/token, '
      f'{nats / math.log(2):.4f} bits/token on the validation split ({len(val_data):,} tokens of '
      f'{meta["source"]}), in float32')
print(f'\nThe run is in {out_dir}: ckpt.pt, log.csv, loss.png. A sample of it:\n')
tokenizer = load_tokenizer(meta)
defaults = vars(sample) | {'seed': seed}
x, _, _ = sample.generate(model.eval(), objective, [model.mask_id] * block_size, defaults)
print(tokenizer.decode(x[0].tolist()))
print('\nTo try next:')
print(f'python sample.py --out_dir={out_dir} --num_samples=3')
print(f'python eval.py --out_dir={out_dir} --task=likelihood')
