"""Turns a trained model into text: left to right, by unmasking, or into the blanks of a template.

    python sample.py --out_dir=out/shakespeare_mdm --start="ROMEO:" --steps=64
    python sample.py --out_dir=out/shakespeare_ar --start="ROMEO:"
    python sample.py --out_dir=out/shakespeare_mdm --template="To [___] or not to [___:9]"
    python sample.py --out_dir=out/shakespeare_mdm --prompt_file=prompts.txt --json
    python sample.py --out_dir=out/multi30k_mdm --start="A man is sleeping."
    python sample.py --out_dir=out/talk --chat  # a run on prompts and answers; an empty line ends
    python sample.py --corrupt="What's in a name?"

From a checkpoint to text; what is indented is called by what stands above it:

    main
        make_canvases     the ids of a text, with mask_id wherever a token is to be generated.
                          Continuing a prompt, infilling and writing from nothing differ in
                          nothing else
        complete_best     complete, unless length_candidates asks for several lengths: skip it
            complete      fills canvases batch by batch: the ids of each up to its EOS
                decode_batch
                    make_decoder    a generator function that fills the masks of x (B, T)
                    run_decoder     runs it, counts the passes of the network, ends rows at EOS

At a first reading go from section to section: sampling a token, the loop around a decoder, decoders
(remdm is the default of objective=mdm; decode_ar and decode_uniform can wait), the decoder of the
settings with block_length, prefix_cache and guidance not set, runs and their canvases, from
canvases to text; then make_canvases and main(). Blocks and guidance, the lengths of answers and the
pictures can wait.

Letters are those of model.py: B rows of T tokens, which are the canvas x (B, T); V = V' + 1:
the real tokens and the mask. where (B, T) bool marks the positions that a pass predicts,
M in all rows together, and the pass returns their logits (M, V).
"""

import math
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from inspect import getfullargspec
from itertools import groupby, takewhile
from json import dumps  # by name: json is a setting
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unicodedata import east_asian_width

import numpy as np
import torch
import torch.nn.functional as F

import config
from config import UserError, one_of, require
from model import SCHEDULES, KVCache, MaskedDiffusion, Objective, Transformer, after_start, \
    alpha_and_weight, cross_entropy, export_model, first_to_hold, load_checkpoint, load_model, \
    make_objective, pick_device
from prepare import EOT, SPECIALS, chat_prompt, load_tokenizer, mixed_seed, read_chunks, split_row

# what is read
out_dir = 'out/shakespeare_mdm'  # the folder of the run whose model is used
ckpt = 'last'          # its weights: last; or best, of the lowest validation loss (keep_best)
device = 'auto'        # cuda, mps, cpu; auto takes the first that this machine has
trust_remote_code = False  # run the code that a model of the Hugging Face hub consists of
export = ''            # only write an ar model to this new folder, as a GPT-2 of transformers
# what is to be generated
start = ''             # the text to continue; in a run on prompts and answers, the prompt (for
                       # conversations written as in training: user: TEXT)
template = ''          # a text with blanks to fill: [___] is 5 tokens wide, [___:9] is 9
prompt_file = ''       # a prompt or a template on every line; - reads them from stdin
chat = False           # answer each line of stdin; a run on conversations reads all turns before it
corrupt = ''           # a text: only show what noise makes of it and, if out_dir holds a run, what
                       # the run makes of that
num_samples = 1        # of each prompt
batch_size = 16        # rows at a time
gen_length = 0         # tokens to write after start (not in a template, which says how many). 0:
                       # fills the context or, of a run on documents whose objective is not ar or
                       # block, a canvas about as wide as documents in training
seed = 1337
# how it is decoded
decoder = 'auto'       # ar: left to right; ancestral: places at random; confidence, threshold: most
                       # confident first; remask: the same, and the least confident are masked
                       # again; remdm: ancestral, and some are masked again; uniform: from random
                       # tokens; auto: the default of the objective
steps = 192            # decoding steps; confidence, remask: 0 is one token a step
noise_schedule = 'linear'  # ancestral, remdm, uniform: how alpha rises over the steps, whatever it
                       # was in training; linear, cosine, polynomial
order = 'max_prob'     # confidence, threshold, remask: max_prob, margin, entropy, random
counts = 'linear'      # confidence, remask: linear (as many each step), cosine (few first)
threshold = 0.9        # threshold: a pass commits all tokens of at least this confidence, and
                       # always at least one
eta = 0.06             # remdm: largest probability per step that a written token is masked again
cool = 0.7             # remdm: the temperature falls from (1 + cool) towards (1 - cool) times its
                       # value
block_length = 0       # write blocks of so many tokens from left to right; 0: none, or those that
                       # the model learned
prefix_cache = False   # read what precedes a block once: faster, but an approximation
guidance = 0.0         # above 0: follow the given text, where there is one, more closely, at two
                       # passes a step
temperature = 0.7      # 0 takes the most likely token; data/RESULTS.md, What each decoder buys
top_k = 0              # sample among the k most likely tokens; 0 = all
top_p = 1.0            # sample among the fewest tokens that hold this probability together
repetition_penalty = 1.0  # above 1: tokens that the text already holds are made less likely, except
                       # EOS, SEP and PAD
length = 'auto'        # masks for the answer to a prompt. full: as many as in training; fit: the
                       # average in training for so long a prompt; ratio: by length_line. argmax,
                       # quantile: the model predicts it in one pass; regress, classify, encoder: a
                       # head does, which config/length_*.py train. auto: the head, if the run has
                       # one; else full, if it was trained with predict_pad; else fit. (eval.py
                       # also has reference, as many as the reference needs)
length_line = (1.3, 2.0)  # ratio, (a, b): a * (tokens of the prompt) + b masks; also fit, where
                       # the data set has counted no average
length_quantile = 0.9  # quantile and heads that classify: P(the answer is at most as long as
                       # predicted); a head that regresses keeps that of its training, train.py's
length_candidates = 1  # fit, ratio, reference: lengths to try; the most confident answer stays
# how it is shown
watch = False          # show the first sample step by step; the tokens/s include this
save = ''              # a file for the steps of the first sample: x.gif, x.png (in the letters of
                       # DejaVu Sans Mono: no Chinese, no emoji), x.html or x.jsonl
cleanup = False        # drop words that repeat the one before; in the text, not in `tokens`
json = False           # one JSON object a line for each sample

SAMPLING = ('temperature', 'top_k', 'top_p', 'repetition_penalty')  # of probabilities()
# The settings of decoding, which eval.py has too
DECODING = ('decoder', 'steps', 'noise_schedule', 'order', 'counts', 'threshold', 'eta',
            'cool', 'block_length', 'prefix_cache', 'guidance', *SAMPLING, 'length', 'length_line',
            'length_quantile', 'length_candidates')
PLAIN = {'block_length': 0, 'prefix_cache': False, 'guidance': 0.0}  # nothing around a decoder
ORDERS, COUNTS = ('max_prob', 'margin', 'entropy', 'random'), ('linear', 'cosine')
PREDICTED = ('argmax', 'quantile', 'regress', 'classify', 'encoder')
LENGTHS = ('full', 'fit', 'ratio', 'reference', *PREDICTED)
WORD = r"[^\W\d_]+(?:['’][^\W\d_]+)*"  # letters, apostrophes inside them
BLANK = re.compile(r'\[_+(?::(\d{1,6}))?\]')
BLANK_WIDTH = 5        # tokens, of a [___] without a number
MASK_SHOWN = '█'


def defaults():
    """The settings above as a dict, which complete() and answer() take."""
    return {name: globals()[name] for name in config.names_of(globals())}


# ------------------------------------------------------------------------------ sampling a token


def filter_logits(logits, top_k, top_p):
    """logits (M, V) with -inf outside the top_k likeliest tokens, and the nucleus of those left.

    Tokens as likely as the last of the top_k stay too. The nucleus [1904.09751] is the smallest set
    of likeliest tokens that holds at least top_p.
    """
    if 0 < top_k < logits.size(-1):
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ranked, index = logits.sort(dim=-1, descending=True)
        p = ranked.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p  # the likelier tokens hold top_p without this one
        outside = outside.scatter(-1, index, outside)  # from ranks back to the order of the ids
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def probabilities(logits, x, where, *, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
                  specials=()):
    """The distributions (M, V) float64 to sample from, given the model's logits (M, V).

    x (B, any width): the text so far. where (B, T): True at the M positions of the logits, which
    tells the row that each belongs to. repetition_penalty makes tokens less likely that their row
    already holds [CTRL 1909.05858, sec. 4.1], except the ids `specials` (mask, EOS, SEP, PAD): else
    an EOS that is given would make it harder for the row to end.
    """
    logits = logits.double()
    if repetition_penalty != 1.0:
        seen = torch.zeros(x.size(0), logits.size(-1), dtype=torch.bool, device=x.device)
        seen = seen.scatter(1, x, True)[where.nonzero()[:, 0]].to(logits.device)  # (M, V)
        seen[:, [*specials]] = False
        less = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, less, logits)
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).double()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # at most 0: no overflow
    return filter_logits(logits, top_k, top_p).softmax(-1)


def sample_categorical(p, rng):
    """One token (M,) for each row of p (M, V) float64, whose rows need not sum to 1.

    The argmax of p / e, where e ~ Exponential(1) for each token, is token j with probability
    p_j / sum p, exactly (an exponential race), and float64 keeps the tails of p, which float32
    noise cuts off [2409.02908].
    """
    return (p / torch.empty_like(p).exponential_(generator=rng)).argmax(-1)


def sample_token(logits, x, where, rng, *, temperature=1.0, **sampling):
    """One token (M,) for each row of logits (M, V); the arguments are those of probabilities().

    On MPS, which has no float64, rng is on the CPU, and so is the sampling.
    """
    p = probabilities(logits.to(rng.device), x, where, temperature=temperature, **sampling)
    token = p.argmax(-1) if temperature == 0 else sample_categorical(p, rng)  # (M,)
    return token.to(logits.device)


# ---------------------------------------------------------------------- the loop around a decoder
#
# What all decoders have in common; read it together with decode_ancestral, the first one.
# decode_<name>(model, x, to_generate, rng, *, its own settings, **sampling) is a generator. In
# place it fills the canvases x (B, T) where to_generate (B, T) is True at first, and nothing else:
# other masks (later blocks, padding) are read and left. After a step that changed x or to_generate
# it yields `where, logits`: the positions (B, T) that its pass predicted, and the logits (M, V)
# there.
#
# Then run_decoder() ends rows: once a row has an EOS where to_generate is True, with no mask before
# it, the rest becomes EOS, and the row of to_generate, the same tensor, False. So most decoders
# read to_generate anew in every step. One that may change what it wrote (remdm, remask, uniform)
# reads a copy, and keeps to_generate False until a row is final, so that no EOS ends it too soon.
#
#     rng                   the torch.Generator of everything random
#     its own settings      make_decoder() passes them all; defaults serve direct calls
#     **sampling            the keywords of probabilities(). (decode_blocks and decode_guided take
#                           `inner` instead, a decoder to which its keywords are bound already.)
#
# All but decode_ar call model(x, level, where=...), which returns the logits (M, V) at `where`.
# level (B, 1), which only networks with time_cond read, is the fraction of the canvas that is
# noise; without it the model counts the masks of x. To commit a token is to write it for good.
# nfe, the number of function evaluations, counts passes.
#
# A new decoder is named in DECODERS, and in `decoders` of the objectives that have it (model.py);
# its settings stand at the top of this file and in DECODING.


class Counted:
    """A model that counts its passes in nfe, those of caches and of guidance among them."""

    def __init__(self, model):
        self.model, self.config, self.mask_id = model, model.config, model.mask_id
        self.nfe = 0

    def __call__(self, *inputs, **options):
        self.nfe += 1
        return self.model(*inputs, **options)


def end_rows(x, to_generate, may_end, eos_id, mask_id):
    """Ends, in place, rows that have generated an eos_id where may_end, once no mask is before it.

    All that was to be generated after it becomes eos_id, and to_generate is cleared in the row.
    """
    before = (x == mask_id).cumsum(1)  # masks up to here
    ended = to_generate & may_end & (x == eos_id) & (before == 0)
    x[to_generate & (ended.cumsum(1) > 0)] = eos_id
    to_generate &= ~ended.any(1, keepdim=True)


@torch.no_grad()
def run_decoder(decoder, model, x, rng, eos_id=None, on_step=None, lengths=None):
    """The canvases x (B, T) filled by a decoder, and how many passes of the network that took.

    With an eos_id, a row ends at the first one that it generates after the last given token; in a
    blank with given text after it an eos_id is a token like others. on_step(x, nfe, where, logits)
    is called after every step, with the `where, logits` that the decoder yielded. The next step
    changes x in place: clone what is to be kept. lengths: of each row the number of tokens before
    its padding, which stays masked; None: T.
    """
    x, model = x.clone(), Counted(model)
    to_generate = x == model.mask_id
    # True where only masks follow, those of padding among them
    may_end = to_generate.flip(1).cumprod(1).flip(1).bool()
    for row, length in zip(to_generate, lengths or ()):
        row[length:] = False
    for where, logits in decoder(model, x, to_generate, rng):
        if eos_id is not None:
            end_rows(x, to_generate, may_end, eos_id, model.mask_id)
        if on_step is not None:
            on_step(x, model.nfe, where, logits)
    return x, model.nfe


# -------------------------------------------------------------------------------------- decoders


def reverse_steps(model, x, to_generate, steps, schedule):
    """[(alpha_t, alpha_s, level)] of `steps` steps from t = 1 to t = 0, s = t - 1/steps.

    level (B, 1): the expected fraction of each canvas that is noise at t: a share 1 - alpha_t of
    the tokens to be generated, and the masks that stand elsewhere (in later blocks, and padding).
    """
    require('steps', steps, steps > 0, '1 or more: 0, one token a step, is for confidence, remask')
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    alpha = alpha_and_weight(t, schedule)[0].tolist()
    here = to_generate.float().mean(1, keepdim=True)  # (B, 1)
    elsewhere = ((x == model.mask_id) & ~to_generate).float().mean(1, keepdim=True)  # (B, 1)
    return [(alpha_t, alpha_s, here * (1 - alpha_t) + elsewhere)
            for alpha_t, alpha_s in zip(alpha, alpha[1:])]


def decode_ancestral(model, x, to_generate, rng, *, steps, noise_schedule='linear', **sampling):
    """The reverse process of masked diffusion in `steps` steps from t = 1 to 0 [MDLM eq. 7].

        a masked token is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t),
        s = t - 1/steps, and then drawn from p(x0 | xt)

    Which masks are revealed does not depend on the network, so they are drawn first: a step that
    reveals none needs no pass, and any other step needs logits at these masks alone.

    To be skipped at first: a d3pm model with subs=False gives the mask a probability p_mask too,
    and in all steps but the last a mask is revealed less often: the posterior q(xs | xt, x0), with
    the prediction in place of x0, reveals one with probability

        (alpha_s - alpha_t) * (1 - p_mask) / (1 - alpha_t * (1 - p_mask))
    """
    for alpha_t, alpha_s, level in reverse_steps(model, x, to_generate, steps, noise_schedule):
        u = torch.rand(x.shape, generator=rng, device=rng.device).to(x.device)  # (B, T)
        is_mask = to_generate & (x == model.mask_id)
        reveal = is_mask & (u < (alpha_s - alpha_t) / (1 - alpha_t))
        if not reveal.any():
            continue
        logits = model(x, level, where=reveal)  # (M, V), M to reveal
        p_mask = None if model.config.subs else logits.float().softmax(-1)[:, model.mask_id]  # (M,)
        logits[:, model.mask_id] = -torch.inf
        token = sample_token(logits, x, reveal, rng, **sampling)  # (M,)
        if p_mask is not None and alpha_s < 1:  # d3pm alone
            p_reveal = (alpha_s - alpha_t) * (1 - p_mask) / (1 - alpha_t * (1 - p_mask))
            # the smaller of the two probabilities, so that the same u decides
            token[u[reveal] >= p_reveal] = model.mask_id
        x[reveal] = token
        yield reveal, logits


def decode_remdm(model, x, to_generate, rng, *, steps, noise_schedule='linear', eta, cool=0.0,
                 temperature=1.0, **sampling):
    """As decode_ancestral, but a written token may be masked again [ReMDM 2503.00307, its 'cap'].

        a written token is masked again with probability sigma = min(eta, (1 - alpha_s) / alpha_t),
        a masked one is revealed with probability (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)

    so that the expected fraction of written tokens at s is alpha_s: (1 - sigma) * alpha_t stay, and
    alpha_s - (1 - sigma) * alpha_t come. The temperature falls as text appears, from 1 + cool
    towards 1 - cool times its value: early tokens are sampled with variety, late ones, which must
    fit the text around them, from the likeliest. All rows take all steps. With eta = 0 nothing is
    masked again: rows may end at any step, and only the temperature differs from decode_ancestral.
    (Skip at first: for a d3pm model with subs=False, eta = 0 calls decode_ancestral, without that
    temperature.)
    """
    if eta == 0 and not model.config.subs:  # decode_ancestral knows that d3pm may predict a mask
        yield from decode_ancestral(model, x, to_generate, rng, steps=steps, **sampling,
                                    noise_schedule=noise_schedule, temperature=temperature)
        return
    generated = to_generate.clone() if eta > 0 else to_generate
    for alpha_t, alpha_s, level in reverse_steps(model, x, generated, steps, noise_schedule):
        if eta > 0:  # an EOS may be masked again, so rows end after the last step
            to_generate[:] = generated & (alpha_s == 1)
        u = torch.rand(x.shape, generator=rng, device=rng.device).to(x.device)  # (B, T)
        is_mask = generated & (x == model.mask_id)
        sigma = min(eta, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 0.0  # at t = 1 all are masks
        # one u serves both: a token is either masked or written
        reveal = is_mask & (u < (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t))
        remask = generated & ~is_mask & (u < sigma)
        # the last step is yielded in any case, so that rows can end
        if not (reveal | remask | to_generate & (eta > 0)).any():
            continue
        if reveal.any():
            logits = model(x, level, where=reveal)  # (M, V), M to reveal
            logits[:, model.mask_id] = -torch.inf
            cooled = temperature * (1 + cool * (1 - 2 * alpha_t))
            x[reveal] = sample_token(logits, x, reveal, rng, temperature=cooled, **sampling)
        else:  # tokens are only masked again, if at all: no pass, so no logits
            logits = torch.empty(0, model.config.vocab_size, device=x.device)
        x[remask] = model.mask_id
        yield reveal, logits


def token_confidence(order, logits, token, rng):
    """How sure the model is of each of M sampled tokens: (M,) in [0, 1], float64; logits (M, V).

    By `order` it is the probability of the sampled token (max_prob), the probability of the best
    token less that of the second (margin), 1 / perplexity = exp(-entropy) (entropy), or random.
    Probabilities are the model's own, with neither temperature nor filters.
    """
    if order == 'random':
        return torch.rand(token.shape, generator=rng, device=rng.device).double()
    p = logits.to(rng.device).double().softmax(-1)
    if order == 'max_prob':
        return p.gather(-1, token.to(rng.device)[:, None])[:, 0]
    if order == 'margin':
        best, second = p.topk(2, dim=-1).values.unbind(-1)
        return best - second
    return torch.special.xlogy(p, p).sum(-1).exp()  # exp(-entropy), with 0 log 0 = 0


def propose(model, x, is_mask, order, rng, sampling):
    """Samples a token wherever is_mask (B, T): (tokens (B, T), scores (B, T), logits (M, V)).

    tokens: x with its masks filled by the samples. A score is log(p / (1 - p)) and not the
    confidence p: in float32 (MPS has no float64) all p above 1 - 3e-8 would be 1, and have no
    order. It is -inf elsewhere; at masks it is at least -1e4, even of confidence 0.
    """
    # (B, 1), counted here, over the whole canvas: PrefixCached shows the model a part of it
    level = (x == model.mask_id).float().mean(1, keepdim=True)
    logits = model(x, level, where=is_mask)  # (M, V)
    logits[:, model.mask_id] = -torch.inf  # with subs it is already; d3pm may predict the mask
    token = sample_token(logits, x, is_mask, rng, **sampling)  # (M,)
    confidence = token_confidence(order, logits, token, rng)  # (M,)
    score = confidence.logit().clamp(min=-1e4).float().to(x.device)  # (M,); logit(0) is -inf
    scores = torch.full(x.shape, -torch.inf, device=x.device).masked_scatter(is_mask, score)
    return x.masked_scatter(is_mask, token), scores, logits


def confidence_rank(scores):
    """(B, T): 0 for the highest score of a row, 1 for the next; ties from left to right.

    Scores are rounded to 1e-4, more than the noise of logits in float32, so that noise orders no
    ties, and a greedy row does not depend on the rest of its batch (unless a score is at an edge).
    """
    return scores.round(decimals=4).argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def masks_left(n, i, steps, counts):
    """How many of n (B,) masks are left after i of `steps` steps; steps = 0 is one token a step.

    'linear': n // steps tokens a step, and the remainder one each in the first steps, as in LLaDA's
    code. 'cosine': MaskGIT's, a few tokens at first, when little is known, and ever more later.
    """
    if steps == 0:
        return (n - i).clamp(min=0)
    if counts == 'linear':
        return n - n // steps * i - (n % steps).clamp(max=i)
    return (n.cpu().double() * math.cos(math.pi / 2 * i / steps)).long().to(n.device)


def decode_confidence(model, x, to_generate, rng, *, steps, order='max_prob', counts='linear',
                      **sampling):
    """Commits the most confident tokens first [MaskGIT sec. 3.2; LLaDA sec. 2.4].

    Each pass samples a token for every mask and commits the most confident ones, so many that
    masks_left() masks remain in each row. The simplest decoder of all is this one with steps = 0
    and temperature = 0: it writes the one token that the model is most confident of, reads the
    canvas again, and goes on until no mask is left.
    """
    n_masks = to_generate.sum(1)  # (B,)
    for i in range(1, (steps or x.size(1)) + 1):
        is_mask = to_generate & (x == model.mask_id)
        quota = is_mask.sum(1) - masks_left(n_masks, i, steps, counts)  # (B,)
        if not (quota > 0).any():
            continue
        tokens, scores, logits = propose(model, x, is_mask, order, rng, sampling)
        commit = is_mask & (confidence_rank(scores) < quota[:, None])
        x[commit] = tokens[commit]
        yield is_mask, logits


def decode_threshold(model, x, to_generate, rng, *, threshold, order='max_prob', **sampling):
    """Commits all tokens of enough confidence, as many passes as it takes [Fast-dLLM 2505.22618].

    Each pass samples a token for every mask and commits those whose confidence is not below the
    threshold, and the most confident of each row in any case. With threshold = 1 a pass commits
    that one token and all those of probability 1 (in float64).
    """
    least = torch.tensor(threshold, dtype=torch.float64).logit().item()  # as the scores are
    while (is_mask := to_generate & (x == model.mask_id)).any():
        tokens, scores, logits = propose(model, x, is_mask, order, rng, sampling)
        commit = is_mask & ((scores >= least) | (confidence_rank(scores) == 0))
        x[commit] = tokens[commit]
        yield is_mask, logits


def decode_remask(model, x, to_generate, rng, *, steps, order='max_prob', counts='linear',
                  **sampling):
    """Keeps the most confident tokens, and commits none before a row is full [Mask-Predict
    1904.09324].

    As decode_confidence, but every token keeps the score it had when it was sampled, and each step
    keeps the most confident of all, old and new, and masks the others again.
    """
    n_masks, score_of_all = to_generate.sum(1), torch.full(x.shape, -torch.inf, device=x.device)
    generated = to_generate.clone()
    for i in range(1, (steps or x.size(1)) + 1):
        is_mask = generated & (x == model.mask_id)
        keep = n_masks - masks_left(n_masks, i, steps, counts)  # (B,)
        if not (is_mask.any(1) & (keep > 0)).any():  # cosine may keep none at first
            continue
        tokens, scores, logits = propose(model, x, is_mask, order, rng, sampling)
        score_of_all = torch.where(is_mask, scores, score_of_all)
        x[is_mask] = tokens[is_mask]
        x[generated & (confidence_rank(score_of_all) >= keep[:, None])] = model.mask_id
        to_generate[:] = generated & (keep == n_masks)[:, None]  # rows that are final
        yield is_mask, logits


def window_start(i, size):
    """The first token of the window that is read to write token i; its last is token i - 1.

    It is the smallest multiple of half the size that leaves fewer than size tokens in the window:
    the start token needs a place too. With size = 8 it is 0 for i = 0..7, 4 for 8..11, 8 for
    12..15. That follows from i alone, so that a text does not depend on where its prompt ended.
    """
    return next(begin for begin in range(0, i + 1, (size + 1) // 2) if i - begin < size)


def decode_ar(model, x, to_generate, rng, **sampling):
    """Left to right, each token given those before it; what follows a blank does not influence it.

    One pass for each column i that any row generates. It reads the tokens before i that are not yet
    in the KV cache, mostly one. A canvas longer than the context is read through a window, the
    start token and x[:, begin:i]. With masks at 3, 4 and 8, and a context of 8:

        i = 3    begin = 0    the cache is empty               unread: start, tokens 0, 1, 2
        i = 4    begin = 0    it holds start, tokens 0, 1, 2   unread: token 3
        i = 8    begin = 4    the window moved: it is empty    unread: start, tokens 4, 5, 6, 7

    A pass with cache=cache appends what it reads and raises cache.length, the number of tokens that
    it holds, with the start token; 0 empties it.
    """
    cache, begin = KVCache(model.config), 0  # begin: of the window in the canvas
    for i in to_generate.any(0).nonzero()[:, 0].tolist():
        if not to_generate[:, i].any():  # rows have ended since
            continue
        if (new := window_start(i, model.config.block_size)) > begin:
            begin, cache.length = new, 0  # positions have shifted, so all is read again
        unread = after_start(model, x[:, begin:i])[:, cache.length:]  # the rest is in the cache
        last = torch.zeros_like(unread, dtype=torch.bool)
        last[:, -1] = True  # the output at token i - 1 predicts token i
        logits = model(unread, cache=cache, where=last)  # (B, V)
        column = (torch.arange(x.size(1), device=x.device) == i).expand_as(x)  # (B, T)
        token = sample_token(logits, x[:, :i], column, rng, **sampling)  # (B,)
        where = to_generate & column
        x[where] = token[where[:, i]]
        yield where, logits[where[:, i]]


def decode_uniform(model, x, to_generate, rng, *, steps, noise_schedule='linear', **sampling):
    """The reverse process of uniform-state diffusion in `steps` steps from t = 1 to 0.

    All tokens to be generated start uniformly random, and every step may change all of them, so
    that errors are mended. With s = t - 1/steps, V' real tokens and p_j = p(x0 = j | the others
    of xt), which is what Uniform in model.py learns, a token a becomes j with a probability
    proportional to q(xt = a | xs = j) * q(xs = j | x0), in which p takes the place of x0
    [D3PM 2107.03006; Duo 2506.10892]:

        (alpha_t / alpha_s * [a = j] + (1 - alpha_t / alpha_s) / V') * (alpha_s * p_j
                                                                        + (1 - alpha_s) / V')

    Temperature and the filters shape p. At temperature 0 all of p is on the likeliest token, and
    the last step, where alpha_s = 1, takes it; the steps before it still sample noise.
    """
    generated, n_real = to_generate.clone(), model.mask_id  # V': here the mask is the last id
    noise = torch.randint(n_real, x.shape, generator=rng, device=rng.device).to(x.device)
    x[generated] = noise[generated]
    if not generated.any():
        return
    for alpha_t, alpha_s, level in reverse_steps(model, x, generated, steps, noise_schedule):
        logits = model(x, level, where=generated)  # (M, V)
        # for repetition_penalty: only what is given counts, not what is about to be sampled anew
        held = x.masked_fill(generated, model.mask_id)
        p = probabilities(logits.to(rng.device), held, generated, **sampling)[:, :n_real]  # (M, V')
        keep = alpha_t / alpha_s
        # [a = j], (M, V'), on the device of p, since MPS has no float64
        current = F.one_hot(x[generated].to(p.device), n_real).double()
        p = (keep * current + (1 - keep) / n_real) * (alpha_s * p + (1 - alpha_s) / n_real)
        x[generated] = sample_categorical(p, rng).to(x.device)
        to_generate[:] = generated & (alpha_s == 1)  # all tokens may change before the last step
        yield generated, logits


# -------------------------------------------- around a decoder for masks: blocks and guidance


class PrefixCached:
    """A model that reads what precedes a block only in the first pass there [Fast-dLLM 2505.22618].

    An approximation if the model is bidirectional: the tokens before the block see what is written
    in it, so that their keys and values should change, but the cache keeps those of the first pass.
    At the block x[:, 6:10] of 12 columns:

                                   the cache holds        the pass reads
        the first pass             nothing                x[:, 0:12]
        later passes               x[:, 0:6]              x[:, 6:12]
        the same with shift        start, x[:, 0:5]       x[:, 5:12], whose output at 5 predicts 6
    """

    def __init__(self, model):
        self.model, self.config, self.mask_id = model, model.config, model.mask_id
        self.cache, self.start = KVCache(model.config), 0

    def enter(self, x, start, stop):
        """Goes to the block x[:, start:stop]."""
        self.cache.length, self.start = 0, start

    def __call__(self, x, level=None, *, where):
        # 0 in the first pass; later what the last pass read of the block is dropped
        begin = self.cache.length = min(self.cache.length, self.start)
        x = x[:, max(0, begin - self.config.shift):]
        return self.model(x, level, cache=self.cache, where=where[:, begin:])


class BlockCached:
    """A model that was trained on blocks: it reads one block, and those before it from a cache.

    Exact: a finished block has not seen what follows it, so its keys and values stay as they are.
    Where the canvas is longer than the context, a window of whole blocks slides over it.
    """

    def __init__(self, model):
        self.model, self.config, self.mask_id = model, model.config, model.mask_id
        self.cache, self.begin = KVCache(model.config), 0  # begin: of the window

    def enter(self, x, start, stop):
        """Goes to the block x[:, start:stop]: a pass for each earlier block that is not cached."""
        size, n, self.block = self.config.block_size, self.config.block_length, slice(start, stop)
        # window_start() in blocks: where it keeps a place for the start token, here one is for the
        # block that is being written
        if stop - self.begin > size:
            self.begin, self.cache.length = n * window_start(start // n, size // n), 0
        clean = torch.zeros(len(x), 1, device=x.device)  # the level of a finished block
        for k in range(self.begin + self.cache.length, start, n):
            self.model(x[:, k:k + n], clean, hidden=True, cache=self.cache)

    def __call__(self, x, level=None, *, where):
        x = x[:, self.block]  # the level is not that of the canvas: the model counts these masks
        logits = self.model(x, where=where[:, self.block], cache=self.cache)  # (M, V)
        self.cache.length -= x.size(1)  # only finished blocks stay
        return logits


def decode_blocks(model, x, to_generate, rng, *, inner, block_length, steps=None, cached=None):
    """Block by block from left to right, each by the decoder `inner` (semi-autoregressive).

    Blocks of block_length columns cover the first to the last column to be generated, and the last
    block may be shorter; all rows have the same blocks. What follows a block is read as it stands,
    masks mostly (by BlockCached not at all). The steps are spread over the blocks by their lengths,
    at least one for each; without them (0, or None), `inner` keeps its own settings in every block.

    cached: None, or the class PrefixCached or BlockCached, which wraps the model. The blocks of a
    model that was trained on blocks [BD3-LM 2503.09573] begin at multiples of block_length.

    With block_length = 4 and two given tokens before 8 masks, the blocks are columns 2-5 and 6-9.
    At 6-9 PrefixCached reads 0-9 in its first pass and 6-9 in every later one. BlockCached has
    blocks 0-3, 4-7, 8-9: at 4-7 it reads 0-3 once, for the cache, and 4-7 in every pass.
    """
    columns = to_generate.any(0).nonzero()[:, 0].tolist()
    first, end = (columns[0], columns[-1] + 1) if columns else (0, 0)
    if cached is BlockCached:
        first -= first % block_length
        end = min(end + -end % block_length, x.size(1))
    reader = cached(model) if cached else model
    for start in range(first, end, block_length):
        stop, block = min(start + block_length, end), torch.zeros_like(to_generate)
        block[:, start:stop] = to_generate[:, start:stop]
        if not block.any():
            continue
        if cached:
            reader.enter(x, start, stop)
        if steps:
            before, after = (steps * (edge - first) // (end - first) for edge in (start, stop))
            inner = partial(inner, steps=max(1, after - before))
        for step in inner(reader, x, block, rng):
            to_generate[:, start:stop] = block[:, start:stop]  # tells run_decoder what is final
            yield step
            block &= to_generate  # tells the inner decoder which rows have ended


class Guided:
    """A model that follows the given tokens more closely, at two passes a call.

    Unsupervised classifier-free guidance [2410.18514; cfg_scale of LLaDA's code]:

        logits = blind + (guidance + 1) * (seeing - blind)

    seeing: the logits of the canvas; blind: those of the canvas with the given tokens masked too.
    """

    def __init__(self, model, given, guidance):
        self.model, self.given, self.guidance = model, given, guidance
        self.config, self.mask_id = model.config, model.mask_id

    def __call__(self, x, level=None, *, where):
        xt = torch.where(self.given, self.mask_id, x)
        blind, seeing = self.model(xt, where=where), self.model(x, where=where)  # levels: counted
        logits = blind + (self.guidance + 1) * (seeing - blind)
        if self.config.subs:
            logits[..., self.mask_id] = -torch.inf  # again, since -inf - -inf is nan
        return logits


def decode_guided(model, x, to_generate, rng, *, inner, guidance):
    """Decodes by the decoder `inner`, which gets a Guided model."""
    yield from inner(Guided(model, x != model.mask_id, guidance), x, to_generate, rng)


# ------------------------------------------------------------------- the decoder of the settings

DECODERS = {'ar': decode_ar, 'ancestral': decode_ancestral, 'confidence': decode_confidence,
            'threshold': decode_threshold, 'remask': decode_remask, 'remdm': decode_remdm,
            'uniform': decode_uniform}


def decoder_name(name, objective):
    """`name`, or for 'auto' the default decoder of the objective; UserError if it has no `name`."""
    one_of('decoder', name, ('auto', *objective.decoders))
    return objective.decoders[0] if name == 'auto' else name


def greedy(objective, decoder='auto'):
    """Settings that take the most likely token; 'auto' is confidence where the objective has it."""
    if decoder == 'auto' and 'confidence' in objective.decoders:
        decoder = 'confidence'
    return {'temperature': 0.0, 'decoder': decoder_name(decoder, objective)}


def make_decoder(objective, settings, specials=()):
    """The decoder that the settings ask for, to be called as decoder(model, x, to_generate, rng).

    A decoder takes the settings that its signature names, and passes on those of probabilities():
    SAMPLING, and the ids `specials`.
    """
    s, name = settings, decoder_name(settings['decoder'], objective)
    learned = objective.block_length  # the blocks that the model was trained on; 0: none
    size = learned or s['block_length']
    cached = BlockCached if learned else PrefixCached if s['prefix_cache'] else None
    one_of('order', s['order'], ORDERS)
    one_of('counts', s['counts'], COUNTS)
    one_of('noise_schedule', s['noise_schedule'], SCHEDULES)
    for setting in PLAIN:
        require(setting, s[setting], objective.reads_masks or not s[setting],
                f'off for {name}, which reads no masks')
    require('block_length', s['block_length'], not learned or s['block_length'] in (0, learned),
            f'0 or {learned}: this model learned blocks of {learned} and reads no others')
    require('prefix_cache', s['prefix_cache'],
            not s['prefix_cache'] or s['block_length'] and not learned,
            'off unless block_length is set; a model that learned blocks has an exact cache')
    require('guidance', s['guidance'], not (s['guidance'] and cached),
            '0 with a cache: guidance reads finished text again, masked, and a cache reads it once')
    # the keyword-only arguments of a decoder, as steps of decode_confidence, name its settings
    own = {key: s[key] for key in (*getfullargspec(DECODERS[name]).kwonlyargs, *SAMPLING)}
    decoder = partial(DECODERS[name], specials=specials, **own)
    if size:
        decoder = partial(decode_blocks, inner=decoder, block_length=size, cached=cached,
                          steps=own.get('steps'))
    if s['guidance']:
        decoder = partial(decode_guided, inner=decoder, guidance=s['guidance'])
    return decoder


# -------------------------------------------------------------------------- runs and their canvases


class Run(NamedTuple):
    """A trained model and all that it takes to use it."""
    name: str             # the last part of path
    model: Transformer
    objective: Objective
    meta: dict            # of the data set: the ids of mask, EOS and SEP, the tokenizer
    tokenizer: object     # encode(text), decode(ids)
    settings: dict        # those of train.py
    updates: int          # of its training
    path: str             # the folder, out_dir


def load_run(out_dir, device, ckpt='last', trust=False):
    """The Run that train.py saved in out_dir; ckpt: last, best; trust: trust_remote_code."""
    checkpoint = load_checkpoint(out_dir, ckpt)
    settings, meta = checkpoint['config'], checkpoint['meta']
    return Run(Path(out_dir).name, load_model(checkpoint, device, trust), make_objective(settings),
               meta, load_tokenizer(meta), settings, checkpoint['iter'], out_dir)


def read_prompts(start, template, prompt_file, gen_length):
    """[(kind, text)], kind 'prompt' or 'template': start, template or the lines of prompt_file.

    A line of the file that has a blank is a template; empty lines are skipped.
    """
    require('template', template, not template or not (start or gen_length), 'alone, since it says '
            'what is given and how much is to be generated: leave out start and gen_length')
    require('prompt_file', prompt_file, not prompt_file or not (start or template),
            'alone, since it says what is given: leave out start and template')
    if not prompt_file:
        return [('template', template) if template else ('prompt', start)]
    text = sys.stdin.read() if prompt_file == '-' else ''.join(read_chunks(Path(prompt_file)))
    text = text.removeprefix('\ufeff').replace('\r\n', '\n')  # as Windows has them
    lines = [line for line in text.split('\n') if line.strip()]
    require('prompt_file', prompt_file, lines, 'a file with a prompt or a template on each line')
    return [('template' if BLANK.search(line) else 'prompt', line) for line in lines]


def template_canvas(template, tokenizer, mask_id):
    """The ids of a template, mask_id in its blanks.

    The text between the blanks is tokenised piece by piece. With a BPE tokenizer a word that
    touches a blank may get other tokens than it has inside a text, so put blanks at spaces.
    """
    first, *pieces = BLANK.split(template)  # first text, then in turn a width and a text
    require('template', template, pieces, 'one with a blank: [___], or [___:9] (6 digits at most)')
    ids = tokenizer.encode(first)
    for width, text in zip(pieces[::2], pieces[1::2]):
        ids += [mask_id] * int(width or BLANK_WIDTH) + tokenizer.encode(text)
    require('template', template, mask_id in ids, 'one with a blank that is not 0 tokens wide')
    return ids


def text_canvas(run, kind, text, settings):
    """The ids of a 'template', or of a 'prompt' and gen_length masks; 0 fills the context.

    Documents are stored as answers without a prompt. For a model that reads a canvas as a whole 0
    then gives the one width of training with predict_pad, and without it the mean width, since the
    width alone says where such a document ends.
    """
    T, mask_id = run.model.config.block_size, run.model.mask_id
    if kind == 'template':
        return template_canvas(text, run.tokenizer, mask_id)
    ids = run.tokenizer.encode(text)
    are_documents = run.meta['pad_id'] is not None  # a stream has no PAD
    if are_documents and not (run.objective.causal or run.objective.block_length):
        count = run.meta['counts']['train']
        width = run.meta['max_answer'] + 1 if run.settings['predict_pad'] else \
            round(count['scored'] / count['rows'])  # both with EOS
        T = min(T, max(width, len(ids) + 1))
    n_masks = settings['gen_length'] or T - len(ids)
    if n_masks <= 0:
        raise UserError(f'the prompt {text[:20]!r}... is {len(ids)} tokens long and fills the '
                        f'context of {T}: shorten it, or set gen_length (ar and block models)')
    return ids + [mask_id] * n_masks


# ---------------------------------------------------------------------------- from canvases to text


def group_canvases(run, canvases, batch_size, same_columns):
    """Lists of indices of canvases: those that are decoded together, at most batch_size of them.

    AR takes canvases of any lengths together. Other models read a canvas as a whole, so that only
    canvases of one length go together; in blocks also their masks span the same columns.
    """
    groups = {}
    for i, canvas in enumerate(canvases):
        key = () if run.objective.causal else (len(canvas),)
        if same_columns or run.objective.block_length:
            key += canvas.index(run.model.mask_id), canvas[::-1].index(run.model.mask_id)
        groups.setdefault(key, []).append(i)
    return [group[k:k + batch_size] for group in groups.values()
            for k in range(0, len(group), batch_size)]


def decode_batch(run, canvases, settings, eos_id=None, on_step=None):
    """Fills canvases by the decoder of the settings: (x (B, T), nfe, seconds).

    With an eos_id, a row ends where it generates one; without, at the end of its canvas. Masks pad
    shorter canvases to the longest, T, and are still there in x.
    """
    device, mask_id = run.model.device, run.model.mask_id
    specials = [run.meta[key] for key in ('mask_id', *SPECIALS) if run.meta.get(key) is not None]
    decoder = make_decoder(run.objective, settings, specials)
    rng = torch.Generator('cpu' if device.type == 'mps' else device).manual_seed(settings['seed'])
    began, lengths = time.perf_counter(), [*map(len, canvases)]
    x = torch.tensor([canvas + [mask_id] * (max(lengths) - len(canvas)) for canvas in canvases])
    x, nfe = run_decoder(decoder, run.model, x.to(device), rng, eos_id, on_step, lengths)
    return x.cpu(), nfe, time.perf_counter() - began


def keep_log_p(log_p, x, nfe, where, logits):
    """Keeps in log_p (B, T) the log probability of each new token; partial(keep_log_p, log_p) is
    an on_step.

    Every pass overwrites the entries of the positions that it predicted, so that a written token
    has the entry of the pass that wrote it. (The entry of a position that is still a mask means
    nothing.)
    """
    log_p[where.cpu()] = -cross_entropy(logits.float(), x[where]).cpu()  # (M,)


def end_of(ids, canvas, eos_id, mask_id):
    """The length of the text in ids, which fill a canvas: up to EOS, without it.

    EOS is the first eos_id at one of the masks with which the canvas ends. Without one, all of the
    canvas is text. (ids may be longer: padding follows.)
    """
    begin = len(canvas) - sum(1 for _ in takewhile(mask_id.__eq__, reversed(canvas)))
    written = ids[begin:len(canvas)]
    return begin + written.index(eos_id) if eos_id in written else len(canvas)


def complete(run, canvases, settings, eos_id=None, on_step=None, with_log_p=False):
    """Fills canvases of any lengths, batch by batch: ([(ids, figures)] in their order, totals).

    ids: the canvas, filled, up to the first eos_id that was generated after all that is given, and
    without it.
    figures: nfe, seconds and tokens_per_second of the whole batch; `ended`, whether there is such
    an eos_id; with_log_p: also `log_p`, the mean log probability of the generated tokens.
    totals: (generated tokens, with the first eos_id of each row; nfe; seconds).
    on_step sees the first batch, whose row 0 is the first canvas; with_log_p it is not called.
    """
    done, totals, mask_id = [None] * len(canvases), (0, 0, 0.0), run.model.mask_id
    for batch in group_canvases(run, canvases, settings['batch_size'], settings['block_length']):
        rows = [canvases[i] for i in batch]
        log_p = torch.zeros(len(rows), max(map(len, rows)))  # of each token, if with_log_p
        watcher = on_step if batch[0] == 0 else None
        if with_log_p:
            watcher = partial(keep_log_p, log_p)
        # the first batch has the seed as it is; neighbouring seeds would not be independent
        seed = mixed_seed(settings['seed'], batch[0]) if batch[0] else settings['seed']
        x, nfe, seconds = decode_batch(run, rows, settings | {'seed': seed}, eos_id, watcher)
        ends = [end_of(ids, row, eos_id, mask_id) for ids, row in zip(x.tolist(), rows)]
        written = [row[:end + 1].count(mask_id) for row, end in zip(rows, ends)]  # with the EOS
        for k, (i, row, end) in enumerate(zip(batch, rows, ends)):
            figures = {'nfe': nfe, 'seconds': seconds, 'ended': end < len(row),
                       'tokens_per_second': sum(written) / seconds}
            if with_log_p:
                figures['log_p'] = log_p[k, :end + 1].sum().item() / written[k]
            done[i] = x[k, :end].tolist(), figures
        totals = tuple(a + b for a, b in zip(totals, (sum(written), nfe, seconds)))
    return done, totals


def text_of(ids, tokenizer, mask_id):
    """The text of ids, MASK_SHOWN for every mask; tokens between masks are decoded together."""
    return ''.join(MASK_SHOWN * len([*part]) if is_mask else tokenizer.decode([*part])
                   for is_mask, part in groupby(ids, key=mask_id.__eq__))


# ------------------------------------------------------------ answers to prompts, and their lengths


def length_name(name, run):
    """`name`, or for 'auto' the value of the setting `length` that suits the run."""
    one_of('length', name, ('auto', *LENGTHS))
    head = run.settings.get('length_head', '').partition('_')[0]  # '' in runs without the setting
    if name in PREDICTED:
        require('length', name, name == head or name in ('argmax', 'quantile'), 'another: this run '
                f'has no such head, config/length_{name}.py trains one')
        require('length', name, run.settings['predict_pad'], 'another: this run never saw more '
                'masks than its answer needed, train with predict_pad')
        require('length', name, name == head or run.meta['pad_id'] != run.meta['eos_id'],
                'another: PAD is EOS in this vocabulary, so that EOS does not mark the end')
        require('length', name, run.objective.masks_anywhere, 'another: this run never saw an '
                'answer that is all masks, and cannot say where that ends')
    usual = head or ('full' if run.settings['predict_pad'] else 'fit')
    return usual if name == 'auto' else name


def answer_canvases(run, prompts, settings, references=None):
    """Canvases for prompts, lists of ids: prompt, SEP, then masks for the answer and its EOS.

    An autoregressive model ends its answer itself, so that it gets all masks that fit. Other models
    fill every mask, and only those trained to predict PAD can use more than the answer needs: the
    setting `length` says how many masks there are. Where it predicts, they are as many as in
    training, of which crop_to_predicted() leaves those that the answer needs. references: answers
    as lists of ids, from which length = 'reference' takes the number of tokens.

    Returns (canvases, predicted, passes, seconds): the predicted numbers of tokens, or None, and
    what the prediction took, 0 where there is none.
    """
    require('length', settings['length'], not run.objective.causal or settings['length'] == 'auto',
            'auto for an autoregressive model, which writes until it is done')
    name, meta, context = length_name(settings['length'], run), run.meta, run.settings['block_size']
    line = settings['length_line']
    require('length_line', line, len(line) == 2, 'two numbers')
    fit = meta['counts']['train'].get('answer_line', line)  # not in every data set
    require('length', name, name != 'reference' or references is not None,
            'another where no reference is known')
    canvases = []
    for i, prompt in enumerate(prompts):
        room = context - len(prompt) - 1
        if room < 1:
            raise UserError(f'a prompt of {len(prompt)} tokens leaves no room for an answer: '
                            f'block_size is {context}')
        widths = {'ratio': int(line[0] * len(prompt) + line[1]),
                  'fit': round(fit[0] * len(prompt) + fit[1]),
                  'reference': len(references[i]) + 1 if references else 0}
        wanted = room if run.objective.causal else widths.get(name, meta['max_answer'] + 1)
        canvases.append([*prompt, meta['sep_id']] + [meta['mask_id']] * max(1, min(wanted, room)))
    if name in PREDICTED:
        return crop_to_predicted(run, canvases, name, settings)
    return canvases, None, 0, 0.0


@torch.no_grad()
def predict_lengths(model, x, name, quantile, eos_id):
    """The predicted numbers of tokens of answers, with their EOS: (B,) float, from one pass.

    x (B, P + W): prompts of P tokens, then W masks. 'argmax': up to the mask where EOS is most
    probable. 'quantile': up to the mask where the probabilities of EOS, normalised over the W
    masks, have summed to quantile. Other names: what the length_head of the model predicts.
    """
    if name not in ('argmax', 'quantile'):
        return model.length_head.predict(model, x, quantile)
    is_mask = x == model.mask_id
    logits = model(x, where=is_mask)  # (B * W, V)
    eos = logits.float().log_softmax(-1)[:, eos_id].view(len(x), -1)  # (B, W)
    held = eos.softmax(1).cumsum(1)  # (B, W)
    return eos.argmax(1) + 1.0 if name == 'argmax' else first_to_hold(held, quantile)


def crop_to_predicted(run, canvases, name, settings):
    """The canvases, cropped to about as many masks as their answers are predicted to need.

    That number is rounded up to a power of two, at most all masks, so that there are few lengths:
    only canvases of one length are decoded together. name: of PREDICTED, what predicts. Returns
    (canvases, the predicted numbers of tokens, passes, seconds).
    """
    model, began = run.model, time.perf_counter()
    canvases, predicted = list(canvases), [None] * len(canvases)
    groups = group_canvases(run, canvases, settings['batch_size'], same_columns=True)
    for batch in groups:
        x = torch.tensor([canvases[i] for i in batch], device=model.device)
        lengths = predict_lengths(model, x, name, settings['length_quantile'], run.meta['eos_id'])
        n_masks = canvases[batch[0]].count(model.mask_id)  # the same in the whole batch
        for i, length in zip(batch, lengths.tolist()):
            needed = math.ceil(min(max(length, 1.0), n_masks))
            kept = 1 << (needed - 1).bit_length()  # needed, rounded up to a power of two
            canvases[i], predicted[i] = canvases[i][:x.size(1) - n_masks + kept], length
    return canvases, predicted, len(groups), time.perf_counter() - began


def complete_best(run, canvases, settings, on_step=None):
    """As complete(), but with length_candidates > 1 it tries as many numbers of masks for a canvas.

    They lie around the number that the canvas has. The answer with the highest log_p stays: its
    probability says more about the right length than the length of the prompt does [Mask-Predict
    1904.09324, sec. 3.3]. nfe and the totals count all candidates.
    """
    n, eos_id, mask_id = settings['length_candidates'], run.meta['eos_id'], run.model.mask_id
    if n == 1:
        return complete(run, canvases, settings, eos_id, on_step)
    require('length_candidates', n, on_step is None, '1 with watch or save')
    known = length_name(settings['length'], run) in ('fit', 'ratio', 'reference')
    require('length_candidates', n, run.objective.reads_masks and known,
            '1 unless masks are filled and length is fit, ratio or reference')
    tried = []  # for each canvas the same canvas with several numbers of masks at its end
    for canvas in canvases:
        least, T = canvas.index(mask_id) + 1, len(canvas)
        sizes = {min(max(T + k - n // 2, least), run.settings['block_size']) for k in range(n)}
        tried.append([canvas[:size] + [mask_id] * (size - T) for size in sizes])
    done, totals = complete(run, sum(tried, []), settings, eos_id, with_log_p=True)
    best, rest = [], iter(done)
    for group in tried:
        candidates = [next(rest) for _ in group]
        ids, figures = max(candidates, key=lambda candidate: candidate[1]['log_p'])
        best.append((ids, figures | {'nfe': sum(figures['nfe'] for _, figures in candidates)}))
    return best, totals


def answer(run, prompts, settings, references=None):
    """The answers of a run to prompts, lists of ids: (answers, figures, sizes).

    answers: lists of ids without SEP, EOS and PAD. figures: {column: mean over the answers}.
    sizes (2, N): the numbers of masks of the N answers, and the numbers predicted. With references
    (3, N): then the numbers of tokens of the references, with their EOS. Prompts of similar length
    are answered together, since a batch decodes until its last row has ended.
    """
    canvases, predicted, _, took = answer_canvases(run, prompts, settings, references)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    done, (_, _, seconds) = complete_best(run, [canvases[i] for i in by_length], settings)
    done = [done[k] for k in np.argsort(by_length)]  # in the order of the prompts again
    answers = [split_row(ids, run.meta)[1] for ids, _ in done]
    masks = [canvas.count(run.model.mask_id) for canvas in canvases]
    sizes = [masks, predicted or masks]
    figures = {'no EOS': np.mean([not each['ended'] for _, each in done]),
               'empty': np.mean([not ids for ids in answers]),
               'nfe': np.mean([each['nfe'] for _, each in done]) + (predicted is not None),
               'sentences/s': len(prompts) / (seconds + took)}
    if references is not None:
        sizes.append([len(ids) + 1 for ids in references])
        ratios = [len(ids) / max(1, len(true)) for ids, true in zip(answers, references)]
        figures = {'length ratio': np.mean(ratios)} | figures
    return answers, {name: float(figure) for name, figure in figures.items()}, np.array(sizes)


def first_answers(run, data, n, settings):
    """[(prompt, reference, answer)] as texts: the first n validation rows, answered greedily."""
    prompts, references = zip(*data.pairs('val', n))
    answers, *_ = answer(run, prompts, settings | greedy(run.objective), references)
    return [tuple(map(run.tokenizer.decode, row)) for row in zip(prompts, references, answers)]


# --------------------------------------------------------------------------------- the command line


def make_canvases(run, prompts, settings):
    """(a canvas for each (kind, text), predicted lengths of answers or None, passes, seconds).

    passes, seconds: what the prediction took, 0 where there is none.
    """
    if run.meta['sep_id'] is None:
        for name, usual in (('length', 'auto'), ('length_candidates', 1)):
            require(name, settings[name], settings[name] == usual,
                    f'{usual} for a run without answers')
        return [text_canvas(run, kind, text, settings) for kind, text in prompts], None, 0, 0.0
    require('gen_length', settings['gen_length'], settings['gen_length'] == 0,
            '0 for a run on prompts and answers: length says how long an answer is')
    for kind, text in prompts:
        if kind == 'template' or not text.strip():
            raise UserError(f'{text[:20]!r} is no prompt, but this run is on prompts and answers: '
                            'ask it by start or prompt_file')
    return answer_canvases(run, [run.tokenizer.encode(text.strip()) for _, text in prompts],
                           settings)


def chat_with(run, settings, lines):
    """Answers the lines up to an empty one. A run on conversations is shown all turns before, too.

    Of these, the oldest are left out where no room would remain for the longest answer."""
    require('chat', True, run.meta['sep_id'] is not None, 'False for a run without answers')
    turns, room = [], run.settings['block_size'] - run.meta['max_answer'] - 2  # with SEP and EOS

    def prompt():
        return chat_prompt(turns) if run.meta.get('is_chat') else turns[-1]['content']

    for line in takewhile(str.strip, lines):
        turns.append({'role': 'user', 'content': line.strip()})
        while len(ids := run.tokenizer.encode(prompt())) > room and len(turns) > 1:
            del turns[:2]
        text = run.tokenizer.decode(answer(run, [ids], settings)[0][0])
        print(text, flush=True)
        turns.append({'role': 'assistant', 'content': text})


@torch.no_grad()
def show_corruption(run, text, seed):
    """Prints the noise that a run learns to undo, and what it makes of each level, side by side.

    Tokens are corrupted by the run's own forward process, at level t of its schedule; the random
    numbers are the same at every level, so that noise at one level is noise at the next. The
    reconstruction takes one pass, and the most likely token wherever the run predicts one: at the
    masks or, if noise is random tokens, everywhere; in blocks, each is given the text before it.
    Without a run (None) the tokens are characters, become masks, and stay corrupted.
    """
    if run is None:
        chars = ''.join(sorted(set(text)))
        run = Run('', SimpleNamespace(mask_id=len(chars), device='cpu'), MaskedDiffusion(), {},
                  load_tokenizer({'tokenizer': {'kind': 'char', 'chars': chars}}), {}, 0, '')
    require('corrupt', text, not run.objective.exact, "'' for an ar run, which undoes no noise")
    x0 = torch.tensor([run.tokenizer.encode(text)], device=run.model.device)  # (1, T)
    require('corrupt', text, x0.numel(), 'a text that has tokens')
    given, rng = torch.zeros_like(x0, dtype=torch.bool), torch.Generator(x0.device)
    rows = [('', 'original', 'corrupted', 'reconstructed') if run.settings else
            ('t = 0.0', visible(text))]
    for t in (0.2, 0.4, 0.6, 0.8, 1.0):
        objective = replace(run.objective, mask_range=(t, t))
        noised = objective.corrupt(run.model, x0, given, rng.manual_seed(seed))
        xt = noised.xt[:, :x0.size(1)]  # in blocks without the clean half
        columns = [xt]
        if run.settings:
            logits = run.model(noised.xt, noised.level, where=noised.scored, **noised.inputs)
            logits[:, run.model.mask_id] = -torch.inf  # d3pm may predict the mask
            columns = [x0, xt, xt.masked_scatter(noised.scored, logits.argmax(1))]
        texts = (text_of(x[0].tolist(), run.tokenizer, run.model.mask_id) for x in columns)
        rows.append((f't = {t:.1f}', *map(visible, texts)))
    width = (COLUMNS - 13) // 3 if run.settings else len(text)  # beside 7 + 3 * 2 characters
    for name, *texts in rows:
        for i in range(0, max(map(len, texts)), width):
            cells = [part[i:i + width].ljust(width) for part in texts]
            print('  '.join([f'{name if i == 0 else "":7}', *cells]).rstrip())


def without_repeated_words(text):
    """The text with each word once where it stands several times in a row, in capitals or not."""
    return re.sub(rf"(?i)(?<![\w'’])({WORD})(?:\s+\1(?!['’]?\w))+", r'\1', text)


def main():
    settings = config.override(globals())  # the names above hold them, too
    require('save', save, not save or Path(save).suffix in SAVERS and Path(save).parent.is_dir(),
            f'a file ending in one of {", ".join(SAVERS)}, in a folder that is there')
    require('watch', watch, not (watch and json), 'False with json')
    alone = not any((start, template, prompt_file, watch, save, json, cleanup, gen_length,
                     num_samples > 1))
    for name in ('corrupt', 'export', 'chat'):  # which read none of these
        require(name, settings[name], alone or not settings[name], 'alone: leave out save, etc.')
    no_run = corrupt and not (Path(out_dir) / 'ckpt.pt').is_file()
    run = None if no_run else load_run(out_dir, pick_device(device), ckpt, trust_remote_code)
    if corrupt:
        return show_corruption(run, corrupt, seed)
    if export:
        return export_model(run, export)
    if chat:
        return chat_with(run, settings, sys.stdin)
    name = decoder_name(decoder, run.objective)
    prompts = [prompt for prompt in read_prompts(start, template, prompt_file, gen_length)
               for _ in range(num_samples)]
    canvases, predicted, passes, took = make_canvases(run, prompts, settings)
    recorder = Recorder(canvases[0], run.tokenizer, run.model.mask_id, Screen() if watch else None)
    done, (written, nfe, seconds) = complete_best(run, canvases, settings,
                                                  recorder if watch or save else None)
    for (kind, asked), (ids, figures) in zip(prompts, done):
        if run.meta['pad_id'] is not None and kind == 'prompt':
            ids = split_row(ids, run.meta)[1]  # the answer, or the document
        text = run.tokenizer.decode(ids)
        text = without_repeated_words(text) if cleanup else text
        figures['nfe'] += predicted is not None  # with the pass that predicted its length
        print(dumps({kind: asked, 'text': text, 'tokens': ids, **figures, 'seed': seed,
                     'decoder': name}) if json else f'{text}\n{"-" * 80}')
    if not json:
        print(f'{written} tokens in {nfe + passes} passes and {seconds + took:.2f} s, '
              f'{written / (seconds + took):,.0f} tokens/s')
    if save:
        about = {'title': f'{run.name}, {name}', 'objective': run.settings['objective'], **settings}
        SAVERS[Path(save).suffix](recorder, save, about | {'decoder': name})


# -------------------------------------------------------------------------------------- pictures
#
# A Recorder is an on_step that keeps every step of a text. A Screen shows them as they come, and
# each save_*(recorder, path, about) writes them to a file, under about['title'].

WATCH_DELAY = 0.05     # seconds for which watch shows a step
TOP = 5                # alternatives kept of each token
COLUMNS = 80           # characters in a line of a picture
FRAMES = 120           # of a GIF, at most
ROWS, ROW_LINES = 9, 8  # of a PNG: steps shown, and lines of each, at most
# Colours from the first step to the last are the upper half of viridis: lightness grows along it,
# black ink is legible on all of it, and masks are darker, so that it works in grey as well.
RAMP_256 = (31, 37, 36, 72, 71, 77, 113, 149, 185, 221)  # similar ones of a terminal's 256
MASK_COLOR, MASK_256 = '#3d4454', 240


class Recorder:
    """Keeps how row 0 of a canvas changed, whatever the decoder; called as its on_step.

    steps: for the canvas as given, then for each step, {'step': 0, 1, ..., 'nfe': passes so far,
    'ids': the canvas then, 'new': what changed}. new is a list of {'i': position, 'id': the new id,
    mask_id if a token was masked again, 'text': that id decoded, 'p': the model's probability of
    it, 'alternatives': [[id, p, text], ...], the TOP likeliest}. At a position that the pass did
    not predict, p is None and there are no alternatives. stood: for each position all texts that it
    has had, as shown.
    """

    def __init__(self, canvas, tokenizer, mask_id, screen=None):
        self.tokenizer, self.mask_id, self.screen = tokenizer, mask_id, screen
        self.steps, self.stood = [], [[] for _ in canvas]
        self.keep([None] * len(canvas), list(canvas), 0, {})

    def __call__(self, x, nfe, where, logits):
        predicted = where[0].nonzero()[:, 0].tolist()
        self.keep(self.steps[-1]['ids'], x[0].tolist()[:len(self.stood)], nfe,
                  dict(zip(predicted, logits[:len(predicted)])))
        if self.screen is not None:
            self.screen(self)

    def keep(self, before, ids, nfe, logits):
        """Adds a step; logits[i] (V,) are those of position i."""
        new = []
        for i, id in enumerate(ids):
            if id == before[i]:
                continue
            text, p, alternatives = text_of([id], self.tokenizer, self.mask_id), None, []
            if i in logits and id != self.mask_id:
                p_all = logits[i].float().softmax(-1).cpu()  # (V,)
                p_all[self.mask_id] = -1.0  # no alternative, even if others have underflowed to 0
                p, best = round(p_all[id].item(), 6), p_all.topk(min(TOP, len(p_all) - 1))
                alternatives = [[k, round(p_k, 6), self.tokenizer.decode([k])]
                                for k, p_k in zip(best.indices.tolist(), best.values.tolist())]
            new.append({'i': i, 'id': id, 'text': text, 'p': p, 'alternatives': alternatives})
            self.stood[i].append(visible(text))
        self.steps.append({'step': len(self.steps), 'nfe': nfe, 'ids': ids, 'new': new})

    def progress(self, k):
        """How many masks step k left or, if none before it either, how many tokens it changed."""
        before, step = self.steps[max(k - 1, 0)], self.steps[k]
        if self.mask_id not in before['ids'] + step['ids']:
            return f'{len(step["new"])} tokens changed'
        return f'{step["ids"].count(self.mask_id)} masks left'

    def rewritten(self):
        """The fraction of generated tokens that were written more than once: corrected, or what
        followed an EOS and became EOS."""
        times = Counter(new['i'] for step in self.steps[1:] for new in step['new']
                        if new['id'] != self.mask_id)
        return sum(n > 1 for n in times.values()) / self.steps[0]['ids'].count(self.mask_id)


def visible(text):
    """The text on one line, and with nothing in it that a terminal would obey."""
    text = text.replace(EOT, '∎').replace('\n', '⏎')
    return ''.join(c if c.isprintable() else ' ' if c.isspace() else '�' for c in text)


def layout(stood, columns):
    """(line, column, width) of each token on a page, which breaks where the text does.

    stood: for each position the texts that stand there in turn. There is room for the widest of
    them, so that nothing moves when masks become tokens.
    """
    places, line, column = [], 0, 0
    for texts in stood:
        width = max(sum(1 + (east_asian_width(c) in 'WF') for c in text) for text in texts)
        if column > 0 and column + width > columns:
            line, column = line + 1, 0
        places.append((line, column, width))
        column += width
        if '⏎' in texts[-1]:
            line, column = line + texts[-1].count('⏎'), 0
    return places


class Screen:
    """Shows a Recorder's canvas in the terminal, each step over the one before.

    The colour of a token tells how much of the canvas was settled when the token came: was no mask
    or, if there were no masks, did not change. Where stdout is no terminal, a step is one line.
    """

    def __init__(self):
        self.height, self.colors = 0, {}

    def __call__(self, r):
        columns, rows = shutil.get_terminal_size()
        step, texts = r.steps[-1], [texts[-1] for texts in r.stood]
        left = r.progress(step['step'])
        if not sys.stdout.isatty():
            print(f'pass {step["nfe"]}: {left} | {"".join(texts)}'[:columns], flush=True)
            return
        unsettled = r.steps[-2]['ids'].count(r.mask_id) or len(step['new'])
        filled = 1 - unsettled / max(r.steps[0]['ids'].count(r.mask_id), unsettled, 1)
        for new in step['new']:
            self.colors[new['i']] = RAMP_256[round(filled * (len(RAMP_256) - 1))]
        places = layout([[text] for text in texts], columns - 1)  # the last column may wrap
        lines, first_mask = [''] * (places[-1][0] + 1), len(places)
        for i, (text, (line, _, _)) in enumerate(zip(texts, places)):
            is_mask = step['ids'][i] == r.mask_id
            first_mask = min(first_mask, line) if is_mask else first_mask
            color = MASK_256 if is_mask else self.colors.get(i)
            text = text.replace('⏎', '')[:columns - 1]
            lines[line] += f'\x1b[38;5;{color}m{text}\x1b[m' if color else text
        lines = lines[:max(first_mask + 1, rows - 2)][2 - rows:]  # a long text is followed down
        lines.append(f'step {step["step"]}, pass {step["nfe"]}, {left}'[:columns - 1])
        # the cursor is hidden within this one string only, so that no error can leave it hidden
        up = f'\x1b[{self.height}A' if self.height else ''
        drawn = ''.join(f'\x1b[2K{line}\n' for line in lines)
        print(f'\x1b[?25l{up}{drawn}\x1b[J\x1b[?25h', end='', flush=True)
        self.height = len(lines)
        time.sleep(WATCH_DELAY)


def ramp(n):
    """n colours '#rrggbb' for the steps, from the first to the last."""
    from matplotlib import colormaps, colors
    return [colors.to_hex(color) for color in colormaps['viridis'](np.linspace(0.5, 1, n))]


def text_and_color(new, color, mask_id):
    """What stands in the cell of a new token that came in this colour; a mask is a dark cell."""
    return ('', MASK_COLOR) if new['id'] == mask_id else (visible(new['text']), color)


def draw_steps(r, most, stood, title, size):
    """Yields PIL images of the canvas after `most` of the steps; a character is size x 2 size.

    Above it are the title and a bar with the colours of the steps so far.
    """
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont  # comes with matplotlib
    places, n = layout(stood, COLUMNS), len(r.steps) - 1
    shown = np.linspace(0, n, min(n + 1, most)).round()
    font = ImageFont.truetype(f'{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf', size * 3 // 2)
    image = Image.new('RGB', (size * (COLUMNS + 2), size * 2 * (places[-1][0] + 3)), 'white')
    draw = ImageDraw.Draw(image)

    def put(line, column, width, text, color, height=1.0):
        x, y, gap = size * (column + 1), size * (2 * line + 3), size // 10
        right, bottom = x + size * width - 1 - gap, y + size * 2 * height - 1 - gap
        draw.rectangle((x, y, max(x, right), bottom), color)
        draw.text((x, y + size * 1.5), text, 'black', font, anchor='ls')

    put(-0.9, COLUMNS / 2, COLUMNS / 2, '', MASK_COLOR, 0.4)
    for k, (step, color) in enumerate(zip(r.steps, ['white', *ramp(n)])):
        for new in step['new']:
            put(*places[new['i']], *text_and_color(new, color, r.mask_id))
        if k > 0:
            length = COLUMNS / 2 / n + 0.3 * (k < n)  # into the next one, to leave no gap
            put(-0.9, COLUMNS / 2 * (1 + (k - 1) / n), length, '', color, 0.4)
        if k in shown:
            put(-1.2, 0, COLUMNS / 2, f'step {k} of {n}, {title}'[:COLUMNS // 2], 'white')
            yield image.copy()


def save_gif(r, path, about):
    """The canvas over time, at most FRAMES steps of it; the last stays for 4 seconds."""
    from PIL import Image
    frames = [*draw_steps(r, FRAMES, r.stood, about['title'], 10)]
    both = np.concatenate([np.asarray(frames[0]), np.asarray(frames[-1])])  # they have all colours
    palette = Image.fromarray(both).quantize(256)
    frames = [frame.quantize(palette=palette, dither=0) for frame in frames]
    pace = min(max(8000 // len(frames), 40), 300) // 10 * 10  # ms; GIFs count in hundredths of 1 s
    frames[0].save(path, save_all=True, append_images=frames[1:], loop=0,
                   duration=[pace] * (len(frames) - 1) + [4000])


def save_png(r, path, about):
    """ROWS of the steps one below the other, from masks to text; the first ROW_LINES of each."""
    from PIL import Image
    running = [[text.replace('⏎', ' ') for text in texts] for texts in r.stood]  # no line breaks
    rows = [np.asarray(image)[:20 * (2 * ROW_LINES + 3)]
            for image in draw_steps(r, ROWS, running, about['title'], 20)]
    Image.fromarray(np.concatenate(rows)).save(path)


def save_html(r, path, about):
    """One page that needs no other: a slider over the steps, and what the model predicted there."""
    n = len(r.steps) - 1
    steps, colors, changes = [], ramp(n), [-1] * len(r.stood)
    for step, color in zip(r.steps, ['', *colors]):
        steps.append({'label': f'step {step["step"]} of {n}, pass {step["nfe"]}, '
                               f'{r.progress(step["step"])}', 'new': []})
        for new in step['new']:
            i = new['i']
            changes[i] += 1
            first = 'a mask' if new['id'] == r.mask_id else 'given'
            came = f'from step {step["step"]} on' if changes[i] else first
            said = [f'“{visible(new["text"])}” at position {i}, {came}']
            if new['p'] is not None:
                said[0] += f', probability {new["p"]:.3f}'
            if changes[i] > 1:
                said[0] += f', change {changes[i]} here'
            for id, p, text in new['alternatives']:
                drawn = ' ◂' if id == new['id'] else ''
                said.append(f'{p:.3f} {"━" * round(20 * p):20} “{visible(text)}”{drawn}')
            steps[-1]['new'].append([i, *text_and_color(new, color, r.mask_id), '\n'.join(said)])
    data = {'title': about['title'], 'places': layout(r.stood, COLUMNS), 'colors': colors,
            'chosen': r.steps[0]['ids'].index(r.mask_id), 'steps': steps}
    page = Path(__file__).parent / 'data/steps.html'
    # all ASCII; and with no < in it, no text can end the script
    Path(path).write_text(page.read_text().replace('DATA', dumps(data).replace('<', '\\u003c')))


def save_jsonl(r, path, about):
    """The raw data: a header, then the given canvas and each step, as in Recorder.

    rewritten in the header: see Recorder.rewritten.
    """
    header = about | {'rewritten': r.rewritten()}
    Path(path).write_text(''.join(dumps(row) + '\n' for row in [header, *r.steps]))


SAVERS = {'.gif': save_gif, '.png': save_png, '.html': save_html, '.jsonl': save_jsonl}


if __name__ == '__main__':
    main()
