"""Trains a model, autoregressive (next token) or masked diffusion, from the same transformer.

    python train.py                                      masked diffusion on Tiny Shakespeare
    python train.py config/shakespeare_ar.py             its autoregressive twin
    python train.py config/shakespeare_mdm_10m.py --device=cuda
    python train.py --out_dir=out/shakespeare_mdm --resume
    python train.py config/length_classify.py            a length head on out/multi30k_mdm_pad
    python train.py config/shakespeare_ar.py --bench=10  how fast, and where the time goes
    torchrun --nproc_per_node=4 train.py config/shakespeare_mdm_10m.py

The first command takes 12 to 17 minutes on 2 CPU cores that have bfloat16 instructions (half an
hour to an hour on others). It prepares the data set if that is missing and writes a run to out_dir:
ckpt.pt (the weights), config.json, log.csv (evaluations), steps.csv (training losses) and loss.png
(both). An interrupted run goes on with --resume, and ends with the weights that it would have had:
the same bits on a CPU, unless it is compiled and on several threads.

In an update, each process of a torchrun works through batch_size * gradient_accumulation_steps
windows of its own: 2 processes with gradient_accumulation_steps=1 train as 1 process with 2. With
several machines, which must all see the same folder, start on each:

    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=<0 or 1> --master_addr=<of machine 0>
        --master_port=1234 train.py config/shakespeare_mdm_10m.py

Read the docstrings of config/__init__.py and of Stream.batch in prepare.py first; then main() and
read_settings() at the end of this file, TrainingRun (what a run consists of), micro_step(),
update() and train() (the loop: evaluate, save, update). Of model.py's second half that takes
make_objective and model_config. The rest can wait: check_settings(), and what follows the loop,
which is records, going on from an earlier run, the optimisers, and how fast it all is.
"""

import csv
import io
import json
import math
import os
import shlex
import signal
import sys
import time
import timeit
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.utils.benchmark import Timer
from tqdm import tqdm

import config
import sample
from config import UserError, one_of, require, write_atomically
from model import HubNetwork, LengthLoss, ModelConfig, evaluate, fields_in, flops_per_token, \
    hub_settings, load_checkpoint, load_hub, make_network, make_objective, model_config, \
    on_device, peak_memory, pick_device, pick_dtype
from prepare import data_set, mixed_seed, open_run_data, optional, prepare, recipe_names, split_row

# the settings: config.override() lets config files and --name=value words change their values
# the run
out_dir = 'out/shakespeare_mdm'  # the run's folder; a config file sets out/<its name>
resume = False              # continue the run in out_dir, with the settings that it has
overwrite = False           # delete the run in out_dir and begin anew
init_from = ''              # begin with the weights, and so the shape, of this run of the same
                            # vocabulary, perhaps of another objective; or hf:NAME, hf:FOLDER: of a
                            # model of the Hugging Face hub, GPT-2 or masked (BERT, ModernBERT)
trust_remote_code = False   # hf: run the code that such a model consists of
hub = ''                    # hf: its config.json, licence and revision; init_from sets it
seed = 1337
device = 'auto'             # cuda, mps, cpu; auto takes the first available
dtype = 'auto'              # float32, bfloat16 (autocast); auto is bfloat16 where that is fast
compile = 'auto'            # torch.compile: on, off; auto is on where it pays within this run
# data
dataset = 'shakespeare_char'  # a folder of data/, prepared if missing
batch_size = 16             # B, windows per forward and backward pass
gradient_accumulation_steps = 1  # batches per update, of each process
block_size = 256            # T, tokens per window
train_tokens = 0            # use only this many tokens, the first of the training split; 0 = all
random_length = 0.0         # share of batches that are cropped to a random width (of rows only PAD
                            # is cropped, and predict_pad must be on)
# data of rows: prompts and answers, or documents; a batch holds rows of one width
predict_pad = False         # predict PAD too, and so learn where an answer ends; False: rows have
                            # no PAD, and their width shows where the answer ends
score_prompt = False        # ar, prompts and answers: train on the prompt too
row_share = 1.0             # train on this share of the rows, the shortest ones
pad_curriculum = 0          # predict_pad: updates over which PAD after the answers grows; 0 = none
# model
n_layer = 4
n_head = 0                  # 0 = n_embd // 64, at least 1
n_kv_head = 0               # heads of keys and values; 0 = n_head
n_embd = 192
pos = 'rope'                # rope, learned
norm = 'rmsnorm'            # rmsnorm, layernorm
mlp = 'relu2'               # relu2, swiglu, gelu, gelu_tanh
n_conv = 5                  # local mixing, twice in a layer: over a token and its n_conv - 1
                            # neighbours; 0 = none
n_hidden = 0                # channels inside the mlp; 0 = 4 n_embd, of swiglu 8/3 n_embd
qk_norm = True
bias = False
tied = False                # the head shares the embedding's matrix
embed_scale = 0.0           # embeddings are multiplied by it; 0 = sqrt(n_embd) if tied, else 1
time_cond = False           # show the network the noise level
dropout = 0.0               # of what attention and mlp add, and of the embedding
attn_dropout = 0.0          # of the weights of attention: slow on a CPU
# objective
objective = 'mdm'           # ar, mdm, d3pm, uniform, block. Of the settings below ar uses none but
                            # w_max (see train()), and "d3pm:" marks what d3pm alone uses
schedule = 'linear'         # linear, cosine, polynomial: alpha_t, the fraction of tokens kept at t
loss_weight = 'clipped'     # weight of time t: elbo = w(t), clipped = min(w(t), w_max), flat = 1;
                            # masked_mean = 1, and the mean is over masked tokens alone. (uniform,
                            # which scores all tokens, multiplies it by 1 - alpha_t)
w_max = 5.0                 # for loss_weight = clipped
mask_range = (0.15, 0.99)   # from which t is drawn in training (with the linear schedule t is the
                            # share of masks): at small t a row has few masks to learn from, at
                            # t = 1 no text is left
diffusion_steps = 1000      # d3pm: N, from all masks to none
subs = True                 # d3pm: the mask is never predicted; False: it may be
shift = False               # mdm, d3pm: predict token i where token i - 1 is read, as ar and the
                            # hub's DiffuGPT do
attn_anneal = 0             # mdm, d3pm: updates over which a causal attention, that of an ar run in
                            # init_from, is opened: each later token is visible with a probability
                            # that grows from 0 to 1; 0 = all are visible from the start
block_length = 16           # block: tokens per block
# length prediction: train a head that predicts the length of an answer on the frozen run init_from
length_head = ''            # regress_mean, regress_concat, classify, encoder_regress,
                            # encoder_classify; see LengthHead in model.py
length_quantile = 0.95      # *regress*: the share of answers that are no longer than predicted
# optimiser
optimizer = 'muon'          # muon: Muon for matrices in blocks, AdamW for the rest; adamw: for all
max_iters = 3600            # updates
epochs = 0.0                # above 0 it sets max_iters: so many times all of the training text, at
                            # the present batch size and number of processes
learning_rate = 6e-3        # AdamW's
muon_lr = 0.02              # Muon's
lr_schedule = 'wsd'         # wsd (constant, then linear over the last fifth), cosine, constant
warmup_iters = 50           # updates over which the rates rise from 0
weight_decay = 0.0          # of matrices in the blocks
beta1 = 0.9                 # AdamW: decay of the average of the gradient
beta2 = 0.99                # AdamW: decay of the average of its square
grad_clip = 1.0             # largest norm of the gradient; 0 = no limit
# evaluation
eval_interval = 500         # updates between checkpoints, each with the full validation loss
keep_best = False           # also keep, in best.pt, the weights of the lowest validation loss
log_interval = 10           # updates between training losses, which go to steps.csv
eval_repeats = 4            # independent estimates of the final bound, for its standard error
track = ''                  # tensorboard (curves in out_dir), wandb, or tensorboard,wandb
wandb_project = 'nanomdm'   # wandb shows the run among those of this project
wandb_run_name = ''         # and under this name; '' = the last part of out_dir
bench = 0                   # only time this many updates and profile one more: nothing is written


# Fields of ModelConfig in which a run may differ from its init_from: training adapts the weights.
# (Where causal differs, each weight of local mixing meets another neighbour; data/RESULTS.md shows
# that it does no harm.)
MAY_DIFFER = ('block_size', 'causal', 'dropout', 'attn_dropout', 'subs', 'block_length',
              'length_head', 'shift')


# ------------------------------------------------------------------------------------------ set-up


def off_unless(s, name, fine, condition):
    """Raises UserError if a setting is on that only some runs can have."""
    require(name, vars(s)[name], fine or not vars(s)[name], f'off unless {condition}')


def check_settings(s):
    """Raises UserError for settings that do not go together, before anything is written.

    require(name, value, fine, wanted) raises it unless `fine`. The limits of single numbers are
    config.LIMITS.
    """
    one_of('optimizer', s.optimizer, ('muon', 'adamw'))
    one_of('lr_schedule', s.lr_schedule, ('cosine', 'wsd', 'constant'))
    one_of('compile', s.compile, ('auto', 'on', 'off'))
    for name in filter(None, s.track.split(',')):
        one_of('track', name, ('tensorboard', 'wandb'))
    objective = make_objective(vars(s))
    require('out_dir', s.out_dir, s.out_dir, 'a folder')
    require('subs', s.subs, s.subs or s.objective == 'd3pm', 'True unless objective is d3pm')
    require('block_length', s.block_length, s.objective != 'block'
            or 1 <= s.block_length <= s.block_size, 'in [1, block_size]')
    require('length_quantile', s.length_quantile, s.length_quantile < 1, 'in (0, 1)')
    masks, no_head = objective.masks_anywhere, not s.length_head
    off_unless(s, 'score_prompt', objective.causal, 'objective is ar')
    off_unless(s, 'pad_curriculum', s.predict_pad, 'predict_pad is on')
    off_unless(s, 'shift', masks, 'objective is mdm or d3pm')
    off_unless(s, 'attn_anneal', masks and no_head, 'objective is mdm or d3pm, without length_head')
    off_unless(s, 'length_head', masks and s.predict_pad and s.init_from[:3] not in ('', 'hf:'),
               'objective is mdm or d3pm, predict_pad is on and init_from is a run')
    off_unless(s, 'dropout', no_head, 'there is no length_head')
    off_unless(s, 'attn_dropout', no_head, 'there is no length_head')


class TrainingRun:
    """What the loop works with (model, data, objective, optimizers) and how far it has come.

    Built from the settings and, when a run is resumed, from its checkpoint. (A finished run is a
    sample.Run.) Where epochs is set it writes max_iters into the settings. Nothing is written to
    out_dir here, but by train(), so that a mistake found before it leaves an earlier run intact.
    """

    def __init__(self, s, checkpoint=None):
        self.rank, self.world, self.device = join_processes(pick_device(s.device))
        self.dtype = pick_dtype(s.dtype, self.device)
        self.autocast = partial(torch.autocast, torch.device(self.device).type, torch.bfloat16,
                                enabled=self.dtype == 'bfloat16')
        self.data = open_training_data(s, self.rank, self.world)  # a Stream or Rows
        self.micro_steps = s.gradient_accumulation_steps * self.world  # batches of an update
        self.tokens_per_update = round(self.micro_steps * self.data.tokens_per_batch)
        if s.epochs:  # another way to say max_iters
            n = s.epochs * self.data.tokens_per_epoch / self.data.tokens_per_batch  # batches
            s.max_iters = max(1, round(n / self.micro_steps))
        torch.manual_seed(s.seed)
        shape = model_config(vars(s), self.data.meta)
        self.model = make_network(shape, s.trust_remote_code).to(self.device)
        off_unless(s, 'attn_anneal', not isinstance(self.model, HubNetwork),
                   'the model is a Transformer of ours: that of the hub sees all tokens')
        self.compiled = self.model  # what updates call: compile_model() may replace it
        self.objective = LengthLoss(self.data.meta['eos_id'], s.length_quantile) \
            if s.length_head else make_objective(vars(s))
        self.optimizers = make_optimizers(self.model, s, getattr(torch, self.dtype))
        self.iteration = 0      # updates done
        self.tokens = 0         # read in these updates by all processes; of several processes with
                                # batches of many widths approximately
        self.seconds = 0.0      # spent on these updates, without evaluations
        self.speed = 0.0        # tokens/s of all processes, since the run was started or resumed
        self.gradient_norm = torch.zeros(())  # of the last update, before clipping
        self.log, self.steps = [], []  # rows of log.csv, of steps.csv; once read back, of texts
        self.caught = []        # numbers of the signals that asked this process to stop
        self.stop = False       # some process has caught one: save and leave
        if checkpoint:
            restore(self, s, checkpoint)
        elif s.init_from:
            load_first_weights(self.model, s, self.data.meta)
        # FLOP/s: compile_model() judges by it whether compiling pays; speeds are shown in % of it
        peak = torch.tensor(fastest_flops(self.device, self.dtype), device=self.device)
        if self.world > 1:  # all begin with the same weights, and judge alike, on whatever machines
            for tensor in (*self.model.parameters(), peak):
                dist.broadcast(tensor.detach(), 0)
        self.peak = self.world * peak.item()
        self.flops_per_token = flops_per_token(vars(s), self.data)
        self.trackers = []      # functions of ({name: number}, iteration), see open_out_dir()


def join_processes(device):
    """(rank, world, device) of this process among those of a torchrun; (0, 1, device) if alone.

    All but the first print nothing from here on.
    """
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if world > 1:
        require('device', device, not device.startswith('mps'), 'cpu or cuda under torchrun')
        if device.startswith('cuda'):
            device = pick_device(f'cuda:{os.environ["LOCAL_RANK"]}')
            torch.cuda.set_device(device)
        dist.init_process_group('nccl' if device.startswith('cuda') else 'gloo')
        sys.excepthook = config.show_one_line  # torch's own would lose the line of an error
    if rank > 0:
        sys.stdout = open(os.devnull, 'w', errors='replace')  # one process speaks for all
    return rank, world, device


def open_training_data(s, rank, world):
    """The Stream or Rows to train on, prepared by the first process if it is missing."""
    if rank == 0 and s.dataset in recipe_names() \
            and not Path('data', s.dataset, 'meta.json').exists():
        print(f'data/{s.dataset} is missing: preparing it')
        prepare(s.dataset)
    if world > 1:  # until the data is complete, and all have read that out_dir holds no run
        dist.barrier()
    data = open_run_data(vars(s))
    off_unless(s, 'length_head', data.meta['sep_id'] is not None,
               'the data are prompts and answers')
    off_unless(s, 'random_length', s.predict_pad or data.meta['layout'] == 'stream',
               'predict_pad is on: without PAD there is nothing to crop')
    data.check()
    return data


# ---------------------------------------------------------------------------------------- the loop


def attention_options(run, s, x0):
    """{'attn_mask': (T, T) bool} for x0 (B, T) while attn_anneal opens the attention, else {}.

    A token sees those before it, and each later one with a probability that grows from 0 to 1
    [DiffuLLaMA]. Evaluation sees all tokens.
    """
    if run.iteration >= s.attn_anneal:
        return {}
    T = x0.size(1) + s.shift  # with the start token
    closed = torch.rand(T, T, device=run.device) >= run.iteration / s.attn_anneal
    return {'attn_mask': ~closed.triu(1)}


def micro_step(run, s, i):
    """Loss and backward of batch number i of the next update; gradients add up in p.grad.

    Returns the tensor (nats, tokens that count), and how many tokens were read.
    """
    seed = mixed_seed(s.seed, run.iteration, i)
    torch.manual_seed(mixed_seed(seed, 1))  # a second seed: for dropout, attn_anneal
    rng = torch.Generator(run.device).manual_seed(seed)  # for t and masks
    x0, given = on_device(run.data.batch(run.iteration, i, run.micro_steps), run.device)
    with run.autocast():
        options = attention_options(run, s, x0)
        nats, count = run.objective.loss(run.compiled, x0, rng, given, **options)
    nats.backward()  # of a sum: update() makes it a mean
    return torch.stack([nats.detach(), count]), x0.numel()


def update(run, s):
    """One update: data, corruption, loss and backward (micro_step), mean, clip, step.

    Counts run.iteration and run.tokens; sets run.gradient_norm and run.stop. Returns the loss per
    token that counts, over all batches of all processes, as a tensor: to read it is to wait for
    the device.
    """
    sums = torch.zeros(3, device=run.device)  # nats, tokens that count, signals that were caught
    for i in range(run.rank, run.micro_steps, run.world):  # micro-steps of this process
        nats_and_count, tokens = micro_step(run, s, i)
        sums[:2] += nats_and_count
        run.tokens += tokens * run.world  # the others' batches are about as wide
    learned = [p for p in run.model.parameters() if p.grad is not None]
    sums[2] = len(run.caught)
    if run.world > 1:
        for tensor in (sums, *(p.grad for p in learned)):
            dist.all_reduce(tensor)  # now of all batches of all processes
    nats, count, signals = sums
    # Gradients become a mean only here, where the number of tokens that count is known. The mean of
    # the means of batches would give a token more weight in a batch in which few tokens count, and
    # would depend on how an update is cut into batches and processes.
    for p in learned:
        p.grad *= 1 / count.clamp(min=1)
    run.gradient_norm = torch.nn.utils.clip_grad_norm_(learned, s.grad_clip or math.inf)
    for o in run.optimizers:
        for group in o.param_groups:
            group['lr'] = lr_factor(s, run.iteration) * o.defaults['lr']
        o.step()
        o.zero_grad()
    run.iteration += 1
    # All processes have the same sums, and so stop after the same update. A single one reads its
    # own list instead, which does not wait for the device.
    run.stop = bool(signals if run.world > 1 else run.caught)
    return nats / count.clamp(min=1)


@contextmanager
def catching_signals(run):
    """Inside it SIGINT and SIGTERM only add their number to run.caught.

    An update that stopped halfway would have changed some weights and not others: so the loop
    finishes it, saves, and then stops.
    """
    handlers = {number: signal.signal(number, lambda caught, frame: run.caught.append(caught))
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(run, s):
    """The loop: evaluate, save, update, until max_iters or a signal."""
    if run.rank == 0:
        open_out_dir(run, s)
    # disable=None: tqdm shows a bar only on a terminal
    bar = tqdm(total=s.max_iters, initial=run.iteration, disable=True if run.rank else None)
    tokens_before, seconds_before = run.tokens, run.seconds  # run.speed counts from this start
    if run.log and s.keep_best:
        save(run, s)  # if keep_best was set at this resume, best.pt may be due
    with catching_signals(run):
        while True:  # at max_iters it evaluates and saves a last time, and leaves
            done = run.iteration == s.max_iters
            # a run that is resumed at this iteration may have logged it already
            logged = run.log and int(run.log[-1]['iter']) == run.iteration
            due = (done or run.iteration % s.eval_interval == 0) and not logged
            if due:
                bar.write(evaluate_now(run, s))
            if due or run.stop:
                save(run, s)
            if done or run.stop:
                break

            began = time.perf_counter()
            loss = update(run, s)
            to_record = run.iteration % s.log_interval == 0
            if to_record or run.stop:
                loss = loss.item()
                # A loss of few batches is noisy, so its limit is loose: by a factor of twice the
                # largest weight, w_max, and 10 at least. elbo has no largest weight, so no limit.
                unlimited = s.loss_weight == 'elbo' and not run.objective.exact
                factor = math.inf if unlimited else 2 * max(5.0, s.w_max)
                check_loss(run, s, loss, factor)
            run.seconds += time.perf_counter() - began  # with the wait for loss.item()
            run.speed = (run.tokens - tokens_before) / (run.seconds - seconds_before)
            bar.update()
            if to_record:
                record_step(run, s, loss, bar)
    bar.close()
    # A signal during the last evaluation came too late for run.stop. A single process stops all the
    # same, and --resume prints the final loss; several go on, since perhaps only some caught it.
    if run.stop or run.world == 1 and run.caught:
        print(f'stopped and saved after {run.iteration} updates; go on with\n'
              f'python train.py --out_dir={folder_for_shell(s)} --resume')
        sys.exit(128 + (run.caught or [signal.SIGTERM])[0])


# ----------------------------------------------------------------------- records and evaluation


def write_rows(file, rows):
    """Writes dicts to an open CSV file, after a header if the file is empty."""
    writer = csv.writer(file)
    if rows and file.tell() == 0:
        writer.writerow(rows[0])  # its keys
    writer.writerows(row.values() for row in rows)


def append_rows(path, rows):
    """Appends dicts to a CSV file."""
    with open(path, 'a', newline='', encoding='utf-8') as f:
        write_rows(f, rows)


def open_out_dir(run, s):
    """Makes out_dir, config.json and, with the rows of a resumed run, log.csv and steps.csv.

    Also makes run.trackers. Deletes the weights and the curves of a run that is thrown away
    (overwrite).
    """
    out = Path(s.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    old = [] if s.resume else [out / 'ckpt.pt', out / 'best.pt',
                               *out.glob('events.out.tfevents.*')]  # TensorBoard's
    # a tracker may be missing: that is found out before anything is deleted
    run.trackers = [make_tracker(name, s) for name in filter(None, s.track.split(','))]
    for path in old:
        path.unlink(missing_ok=True)
    write_atomically(out / 'config.json', json.dumps(vars(s), indent=2).encode())
    for name, rows in (('log.csv', run.log), ('steps.csv', run.steps)):
        text = io.StringIO(newline='')
        write_rows(text, rows)
        write_atomically(out / name, text.getvalue().encode())


def make_tracker(name, s):
    """A function ({name: number}, iteration) that reports to TensorBoard or Weights & Biases."""
    if name == 'tensorboard':
        writer = optional('torch.utils.tensorboard', extra='track').SummaryWriter(s.out_dir)
        return lambda row, step: [writer.add_scalar(k, v, step) for k, v in row.items()]
    return optional('wandb', extra='track').init(
        project=s.wandb_project, name=s.wandb_run_name or Path(s.out_dir).name, config=vars(s)).log


def evaluate_now(run, s):
    """Measures, logs and draws the loss on the validation split and on some training text.

    It is measured in the dtype of training; that at the end, by print_final_loss(), in float32.
    Returns a line to print.
    """
    mean_loss = partial(evaluate, run.model, run.objective)
    with run.autocast():
        val, _ = mean_loss(run.data.batches('val', s.batch_size))
        train_loss, _ = mean_loss(run.data.batches('train', s.batch_size, limit=4 * s.batch_size))
    # of training text: on validation text, mere overfitting could look like divergence
    check_loss(run, s, train_loss, factor=2)
    name = run.objective.measured
    lr = lr_factor(s, run.iteration) * s.learning_rate  # AdamW's
    run.log.append({
        'iter': run.iteration, 'tokens': run.tokens, 'measured': name, 'train': f'{train_loss:.6f}',
        'val': f'{val:.6f}', 'lr': f'{lr:.3e}', 'data': run.data.meta['source'],
        'seconds': f'{run.seconds:.1f}', 'tokens_per_second': f'{run.speed:.0f}'})
    if run.rank == 0:
        append_rows(Path(s.out_dir, 'log.csv'), run.log[-1:])
        plot_losses(run, s)
    for track in run.trackers:
        track({f'train {name}': train_loss, f'val {name}': val}, run.iteration)
    return (f'{run.iteration:6,} updates, {run.seconds:4.0f} s: {name} {val:.4f}'
            f'{run.objective.unit} on the validation split, {train_loss:.4f} on training text')


def check_loss(run, s, loss, factor):
    """Raises UserError if a training loss is nan or inf, or has grown beyond all reason.

    The limit is `factor` times the larger of two: the first training loss in log.csv, and that of
    a uniform guess. Before the first evaluation there is none, for there is no checkpoint yet.
    """
    guess = math.log(run.data.meta['vocab_size'])  # log V': meta does not count the mask
    # "not <", since nan is neither above nor below, and inf not below inf
    if run.log and not loss < factor * max(guess, float(run.log[0]['train']), 1e-9):
        raise UserError(f'diverged: the training loss is {loss:.4g} after {run.iteration} updates: '
                        f'lower the learning rate; {s.out_dir}/ckpt.pt has weights from before')


def record_step(run, s, loss, bar):
    """Appends an update to steps.csv, and reports it to the trackers and on the screen.

    loss: of its batches, in nats per token, weighted as in training. Without dropout, cropping and
    score_prompt it estimates the losses in log.csv for ar, and for others with loss_weight='elbo'
    and mask_range=(0, 1).
    """
    rates = {f'lr_{type(o).__name__.lower()}': o.param_groups[0]['lr'] for o in run.optimizers}
    numbers = {'weighted_loss': loss, 'gradient_norm': run.gradient_norm.item(), **rates,
               'tokens_per_second': run.speed}
    run.steps.append({'iter': run.iteration, 'tokens': run.tokens}
                     | {name: f'{number:.6g}' for name, number in numbers.items()})
    if run.rank == 0:
        append_rows(Path(s.out_dir, 'steps.csv'), run.steps[-1:])
    for track in run.trackers:
        track(numbers, run.iteration)
    state = (f'loss {loss:.4f}, {run.speed:,.0f} tokens/s, '
             f'{100 * run.speed * run.flops_per_token / run.peak:.0f}% of torch.mm')
    bar.set_postfix_str(state)
    if bar.disable and run.iteration % (10 * s.log_interval) == 0:  # no terminal: lines
        left = (s.max_iters - run.iteration) * run.tokens_per_update / run.speed / 60
        print(f'{run.iteration:6,} updates, {run.seconds:4.0f} s: {state}, '
              f'{left:.1f} minutes left', flush=True)


def plot_losses(run, s):
    """loss.png: losses of evaluations and, pale, of batches; log V', that of a uniform guess."""
    from matplotlib.figure import Figure

    def column(rows, name):
        return torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)

    fig = Figure(figsize=(7, 4.5), layout='constrained')
    ax = fig.subplots()
    if run.steps:  # drawn below the others; smoothed: the mean over a twentieth of them
        steps, loss = column(run.steps, 'iter'), column(run.steps, 'weighted_loss')  # (N,) each
        half = len(steps) // 40
        smooth = torch.avg_pool1d(loss[None], 2 * half + 1, 1, half, count_include_pad=False)[0]
        ax.plot(steps, loss, c='0.85', lw=0.8)
        ax.plot(steps, smooth, c='0.6', label='batches, weighted as in training')
    for name, label in (('val', 'validation text'), ('train', 'training text')):
        ax.plot(column(run.log, 'iter'), column(run.log, name), 'o-', ms=4, label=label)
    if not s.length_head:
        ax.axhline(math.log(run.data.meta['vocab_size']), c='0.5', ls=':', label="log V' (uniform)")
    dataset = s.dataset.replace('$', r'\$')  # between two of them matplotlib reads mathematics
    ax.set(xlabel='updates', title=f'{s.length_head or s.objective} on {dataset}',
           ylabel=run.objective.measured.replace(' <=', ', a bound,') + run.objective.unit)
    millions = (run.tokens or run.tokens_per_update) / max(1, run.iteration) / 1e6  # per update
    ax.secondary_xaxis('top', xlabel='training tokens (millions)',
                       functions=(lambda n: n * millions, lambda n: n / millions))
    ax.legend(edgecolor='none', framealpha=1)  # above the line of log V'
    fig.savefig(Path(s.out_dir, 'loss.png'), dpi=150)


def save(run, s):
    """Writes ckpt.pt and, with keep_best after an evaluation that is the best so far, best.pt.

    The key `rng` holds the seed: it and the iteration are the state of all random draws.
    """
    if run.rank == 0:
        buffer, best = io.BytesIO(), min(run.log, key=lambda row: float(row['val']))
        torch.save({'model': run.model.state_dict(), 'config': vars(s), 'meta': run.data.meta,
                    'optimizer': [o.state_dict() for o in run.optimizers], 'rng': s.seed,
                    'iter': run.iteration, 'tokens': run.tokens, 'seconds': run.seconds,
                    'best': float(best['val'])}, buffer)
        # best.pt first: a run that is killed in between comes here again when it is resumed
        if s.keep_best and int(best['iter']) == run.iteration:
            write_atomically(Path(s.out_dir, 'best.pt'), buffer.getbuffer())
        write_atomically(Path(s.out_dir, 'ckpt.pt'), buffer.getbuffer())


# ------------------------------------------------------------------------ going on from a run


# Settings that were removed, and the values at which they did nothing: a run that used one can be
# sampled, but it cannot go on.
GONE = {'soft_inputs': False, 'divergence': 'elbo', 'length_curriculum': 0,
        'token_weights': (1.0, 1.0, 1.0)}


def require_same(names, name_of_run, checkpoint, s, meta):
    """Raises UserError if an earlier run differs in one of names from these settings and data.

    names: of settings, fields of ModelConfig and keys of meta; 'data set' is data_set(meta). What
    an older run has not saved counts as the same. Returns {name: value} of the earlier run.
    """
    def described(settings, meta):
        return meta | settings | vars(model_config(settings, meta)) | {'data set': data_set(meta)}

    theirs = described(checkpoint['config'], checkpoint['meta'])
    own = described(vars(s), meta) | GONE
    if differing := [name for name in names if theirs.get(name, own[name]) != own[name]]:
        raise UserError(f'{name_of_run} cannot be continued with another {", ".join(differing)} '
                        'than its own: keep to that, or train anew')
    return theirs


def load_first_weights(model, s, meta):
    """Gives model the weights of init_from; UserError if shapes or vocabulary differ.

    A length head learns from a frozen model: then what that predicts, and how, must be equal too.
    """
    source = load_hub(s, meta) if s.init_from.startswith('hf:') else load_checkpoint(s.init_from)
    names = [name for name in vars(model.config) if name not in MAY_DIFFER]
    names += ['tokenizer', 'sep_id']
    if s.length_head:
        names += ['objective', 'predict_pad', 'subs', 'shift']
    theirs = require_same(names, s.init_from, source, s, meta)
    # learned positions: with shift there is one more, that of the start token
    most = theirs['block_size'] + theirs['shift'] - s.shift
    require('block_size', s.block_size, s.pos == 'rope' or s.block_size <= most, f'{most} or less')
    weights = {name: p[:s.block_size + s.shift] if name == 'embed_pos.weight' else p
               for name, p in source['model'].items() if 'length_head.' not in name}
    model.load_state_dict(model.state_dict() | weights)


def restore(run, s, checkpoint):
    """Brings weights, optimizers, counters and the log back to where they were at a checkpoint."""
    names = [name for name in vars(run.model.config) if 'dropout' not in name]
    names += ['objective', 'init_from', 'optimizer', 'data set', *GONE]
    names += ['predict_pad', 'diffusion_steps', 'length_quantile']  # another measure in log.csv
    require_same(names, s.out_dir, checkpoint, s, run.data.meta)
    run.iteration = checkpoint['iter']
    require('max_iters', s.max_iters, s.max_iters >= run.iteration,
            f'{run.iteration} or more: so many are done')
    try:
        run.model.load_state_dict(checkpoint['model'])
        for o, state in zip(run.optimizers, checkpoint['optimizer']):
            # only the averages of gradients: weight decay and betas are those of the settings
            o.load_state_dict(o.state_dict() | {'state': state['state']})
            # torch compares no shapes, and fused AdamW would crash
            if any(x.dim() and x.shape != p.shape for p in o.state for x in o.state[p].values()):
                raise ValueError
    except (RuntimeError, ValueError, KeyError) as e:
        raise UserError(f'the weights in {s.out_dir} have another shape than its settings ask for: '
                        'they are of another version of train.py, or damaged') from e
    try:
        run.log = read_rows(Path(s.out_dir, 'log.csv'), run.iteration)
        run.steps = read_rows(Path(s.out_dir, 'steps.csv'), run.iteration)
        last = run.log[-1]  # there must be one
        run.tokens = int(checkpoint.get('tokens', last['tokens']))  # older checkpoints lack both
        run.seconds = float(checkpoint.get('seconds', last['seconds']))
    except (OSError, ValueError, TypeError, LookupError, csv.Error) as e:
        raise UserError(f'{s.out_dir}: log.csv or steps.csv is damaged ({type(e).__name__})') from e


def read_rows(path, last):
    """The rows of log.csv or steps.csv up to that of `last` updates; [] if there is no file."""
    lines = path.read_text('utf-8').splitlines() if path.exists() else []
    rows = {int(row['iter']): row for row in csv.DictReader(lines)  # one for each number of updates
            if None not in row.values()}  # a line cut short has a None
    return [row for number, row in rows.items() if number <= last]


# ----------------------------------------------------------------------------------- the optimisers


def orthogonalize(G, dtype):
    """Matrices G (number, n, m) with all singular values near 1: about U V^T where G = U S V^T
    [Jordan 2024, Muon].

    Five steps of X <- a X + (b A + c A A) X, A = X X^T, with a = 3.4445, b = -4.7750, c = 2.0315.
    A step maps each singular value s of X to a s + b s^3 + c s^5; five take all of (0.002, 1] into
    about (0.7, 1.2). X is G, or the transpose of a tall G, so that A is as small as can be.
    kellerjordan.github.io/posts/muon
    """
    is_tall = G.size(1) > G.size(2)
    X = (G.mT if is_tall else G).to(dtype)
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT  # (number, k, k), k = min(n, m)
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return X.mT if is_tall else X


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with all of its singular values made near 1 [Jordan 2024].

    torch.optim.Muon takes matrices one by one, and orthogonalizes in bfloat16 everywhere: on a CPU
    without bfloat16 instructions 10.4 s an update in place of 0.9 s (4 x 256; RESULTS, Speed).
    """

    def __init__(self, params, lr, weight_decay, dtype, momentum=0.95):
        super().__init__(params, {'lr': lr, 'weight_decay': weight_decay, 'momentum': momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)  # matrices of one shape share their products
            for p in [p for p in group['params'] if p.grad is not None]:
                state = self.state[p]
                average = state['momentum'] = state['momentum'] if state else torch.zeros_like(p)
                average.lerp_(p.grad, 1 - group['momentum'])
                by_shape[p.shape].append((p, p.grad.lerp(average, group['momentum'])))
            for (rows, columns), pairs in by_shape.items():
                params, nesterov = zip(*pairs)
                # a row of a tall orthogonal matrix is about sqrt(columns / rows) long, and a row of
                # a wide one 1: the factor makes both 1
                rate = group['lr'] * max(1, rows / columns) ** 0.5
                for p, direction in zip(params, orthogonalize(torch.stack(nesterov), self.dtype)):
                    p.mul_(1 - group['lr'] * group['weight_decay'])
                    p.add_(direction, alpha=-rate)


def make_optimizers(model, s, dtype):
    """[Muon, AdamW] or [AdamW]: Muon takes the matrices inside the blocks.

    Either way these matrices alone have weight decay. The weights of local mixing are no matrix:
    they are a vector of channels for each neighbour. Of a model with a length head, only the head
    is trained. The learning rates here are the peaks: update() multiplies them by lr_factor().
    """
    matrices, rest = [], []
    for name, p in (model.length_head or model).named_parameters():
        # models of the hub call their blocks layers
        is_matrix = p.ndim == 2 and ('blocks.' in name or 'layer' in name) and 'mixing' not in name
        (matrices if is_matrix else rest).append(p)
    adam = partial(torch.optim.AdamW, lr=s.learning_rate, betas=(s.beta1, s.beta2),
                   weight_decay=0.0, fused=True)
    if s.optimizer == 'muon' and matrices:
        return [Muon(matrices, s.muon_lr, s.weight_decay, dtype), adam(rest)]
    return [adam([{'params': matrices, 'weight_decay': s.weight_decay}, {'params': rest}])]


def lr_factor(s, iteration):
    """The learning rates of update number `iteration` (from 0), as a fraction of their peaks."""
    if iteration < s.warmup_iters:
        return (iteration + 1) / (s.warmup_iters + 1)
    progress = (iteration - s.warmup_iters) / max(1, s.max_iters - s.warmup_iters)  # in [0, 1]
    return {'constant': 1.0,
            'wsd': min(1.0, 5 * (1 - progress)),
            'cosine': 0.5 * (1 + math.cos(math.pi * progress))}[s.lr_schedule]


# ------------------------------------------------------------------------------------------- speed


def fastest_flops(device, dtype):
    """FLOP/s of torch.mm on square matrices: about the most that a device can do."""
    n = 4096 if device.startswith('cuda') else 1024
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    # item() waits for the device
    timer = Timer('(a @ a)[0, 0].item()', globals={'a': a}, num_threads=torch.get_num_threads())
    return 2 * n ** 3 / timer.blocked_autorange(min_run_time=0.3).median


def compile_or_not(asked, device, dtype, many_widths, seconds):
    """('on' or 'off', why). 'auto' compiles where that saves time within this run.

    seconds: what the updates of this run would take if compiled. Otherwise they take a tenth longer
    in float32, and in bfloat16 up to twice as long, or a fifth longer if batches have many
    widths (RESULTS, Speed). On 2 cores compiling costs about 40 s, of rows twice: torch compiles
    once more when a batch has a single row.
    """
    if asked != 'auto':
        return asked, 'as set, or as the run began'
    if device.startswith('mps'):
        return 'off', 'there is no compiler for this device'
    cost = 80 if many_widths else 40
    saved = seconds * (0.1 if dtype == 'float32' else 0.2 if many_widths else 1.0)
    return 'on' if saved > cost else 'off', f'it costs about {cost} s and saves about {saved:.0f} s'


def compile_model(run, s):
    """Compiles the model for updates where that pays; undoes it if the compiler fails.

    Evaluation keeps to run.model: it is too short to be worth the compiling.
    """
    tokens = run.tokens_per_update * (s.max_iters - run.iteration)  # bench, too: of a whole run
    seconds = tokens * run.flops_per_token / (0.25 * run.peak)  # a quarter of peak is usual
    # what is decided stands in ckpt.pt, so that a resumed run goes on with the same kernels
    many_widths = run.data.meta['layout'] == 'rows' or s.random_length > 0
    s.compile, why = compile_or_not(s.compile, run.device, run.dtype, many_widths, seconds)
    print(f'compile: {s.compile} ({why})')
    if s.compile == 'on':
        # on a CPU compiled random numbers are slow: dropout's are drawn as if not compiled
        options = {'fallback_random': torch.device(run.device).type == 'cpu'}
        try:
            # dynamic: at once for any width, else for that of the first batch
            run.compiled = torch.compile(run.model, options=options, dynamic=many_widths or None)
            # torch compiles the first batch for its own number of masks and, at the next one with
            # another number, once more, for any number. The first batch is this one, outside of all
            # updates, so that those of a run that is resumed use the same kernels as others.
            micro_step(run, s, run.micro_steps + run.rank)
        except Exception as e:  # of many kinds: no headers, no space, a bug of the compiler
            run.compiled, s.compile = run.model, 'off'
            print(f'torch.compile failed ({type(e).__name__}): going on without it')
        run.model.zero_grad()


def time_updates(run, s):
    """Prints the speed of s.bench updates and, of one more, where its time goes.

    They change the weights, as all updates do, but nothing is saved.
    """
    def timed_update():
        update(run, s).item()  # waits for the device

    seconds = median(timeit.repeat(timed_update, number=1, repeat=3 + s.bench)[3:])  # 3: warm-up
    with torch.profiler.profile() as profiler:
        timed_update()
    speed = run.tokens_per_update / seconds
    flops = speed * run.flops_per_token
    print(f'{1000 * seconds:.1f} ms per update (median of {s.bench}), {speed:,.0f} tokens/s, '
          f'{flops / 1e9:.1f} GFLOP/s = {100 * flops / run.peak:.1f}% of the '
          f'{run.peak / 1e9:.1f} of torch.mm{peak_memory(run.device)}\n')
    kind = 'cuda' if run.device.startswith('cuda') else 'cpu'
    print(profiler.key_averages().table(sort_by=f'self_{kind}_time_total', row_limit=15))


# ------------------------------------------------------------------------------ from start to end


def folder_for_shell(s):
    """out_dir as a word of a command, with the flag that a model with code of its own needs."""
    return shlex.quote(s.out_dir) + ' --trust_remote_code' * s.trust_remote_code


def print_final_loss(run, s):
    """Prints the final validation loss, in float32; of a bound, the mean of eval_repeats draws."""
    nats, error = evaluate(run.model, run.objective, run.data.batches('val', s.batch_size), seed=1,
                           repeats=1 if run.objective.exact else s.eval_repeats)
    spread = '' if math.isnan(error) else f' +- {error:.4f}'
    unit = run.objective.unit
    bits = f', {nats / math.log(2):.4f} bits/token' if unit else ''
    print(f'{run.objective.measured} {nats:.4f}{spread}{unit}{bits} on the validation split '
          f'({run.data.scored("val"):,} tokens of {run.data.meta["source"]}), in float32')


def show_sample(run, s):
    """Prints what the model in ckpt.pt writes (a text, or two answers) and what to try next."""
    print(f'\nThe run is in {s.out_dir}: ckpt.pt, log.csv, steps.csv, loss.png. A sample of it:\n')
    trained = sample.load_run(s.out_dir, run.device, trust=s.trust_remote_code)
    how = sample.defaults() | {'seed': s.seed}
    if trained.meta['sep_id'] is None:
        task, option = 'likelihood', '--num_samples=3'
        canvas = sample.text_canvas(trained, 'prompt', '', how)
        done, _ = sample.complete(trained, [canvas], how, trained.meta['eos_id'])
        print(trained.tokenizer.decode(split_row(done[0][0], trained.meta)[1]), end='\n\n')
    else:
        rows = sample.first_answers(trained, run.data, 2, how)
        for prompt, reference, answer in rows:
            print(f'prompt:    {prompt}\nreference: {reference}\nanswer:    {answer}\n')
        task, option = 'translation', f'--start={shlex.quote(rows[0][0])}'
    run_dir = folder_for_shell(s)
    print(f'To try next:\npython sample.py --out_dir={run_dir} {option}\n'
          f'python eval.py --out_dir={run_dir} --task={task}')


def read_settings():
    """The settings of this run and, if it is resumed, its checkpoint, else None.

    There are four sources, and a later one overrides an earlier: the head of this file; the run
    that out_dir (resume) or init_from names, of which init_from takes the shape alone; the config
    file; the command line. override() is called twice: to find that run, and to apply all four.
    """
    s = SimpleNamespace(**config.override(globals()))
    off_unless(s, 'overwrite', not s.resume, 'resume is off: it deletes the run that is to go on')
    checkpoint, earlier = None, {}
    if s.resume:
        checkpoint = load_checkpoint(s.out_dir)
        # it may have been moved; and no checkpoint decides what code is run
        earlier = checkpoint['config'] | {'out_dir': s.out_dir,
                                          'trust_remote_code': s.trust_remote_code}
    elif not (s.overwrite or s.bench) and any(
            Path(s.out_dir, name).exists() for name in ('ckpt.pt', 'best.pt', 'config.json')):
        raise UserError(f'{s.out_dir} holds a run or model already: --resume goes on from ckpt.pt, '
                        '--overwrite starts anew, --out_dir=... puts the new one elsewhere')
    elif s.init_from:
        theirs = hub_settings(s) if s.init_from.startswith('hf:') else \
            load_checkpoint(s.init_from)['config']
        earlier = {k: v for k, v in fields_in(ModelConfig, theirs).items() if k not in MAY_DIFFER}
    return SimpleNamespace(**config.override(globals(), earlier=earlier)), checkpoint


def main():
    s, checkpoint = read_settings()
    check_settings(s)
    run = TrainingRun(s, checkpoint)
    print(run.data.describe())
    print(f'{s.objective}: {run.model.count_parameters():,} parameters, {run.tokens_per_update:,} '
          f'tokens per update, {s.max_iters:,} updates = '
          f'{s.max_iters * run.tokens_per_update / run.data.tokens_per_epoch:.1f} epochs, '
          f'on {run.world} x {run.device} in {run.dtype}')
    compile_model(run, s)
    if s.bench:
        time_updates(run, s)
    else:
        train(run, s)
        print_final_loss(run, s)
    if run.world > 1:
        dist.destroy_process_group()
    if run.rank == 0 and not s.bench:
        show_sample(run, s)


if __name__ == '__main__':
    main()
