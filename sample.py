"""Turns a trained model into text: left to right, by unmasking, or into the blanks of a template.

    python sample.py --out_dir=out/shakespeare_mdm --start="ROMEO:" --steps=64
    python sample.py --out_dir=out/shakespeare_ar --start="ROMEO:"
    python sample.py --out_dir=out/shakespeare_mdm --template="To [___] or not to [___:9]"
    python sample.py --out_dir=out/shakespeare_mdm --prompt_file=prompts.txt --json
    python sample.py --out_dir=out/multi30k_mdm --start="A man is sleeping."
    python sample.py --corrupt="What's in a name?"

A decoder gets a canvas, (B, T) tokens with mask_id wherever text is wanted, and returns it filled.
Continuing a prompt, infilling and writing from nothing differ only in where the masks stand.
"""

import math
import os
import re
import shutil
import sys
import time
from collections import Counter
from functools import partial
from itertools import groupby
from json import dumps
from pathlib import Path
from unicodedata import east_asian_width

import numpy as np
import torch
import torch.nn.functional as F

import config
from config import UserError
from model import SCHEDULES, KVCache, first_to_hold, load_checkpoint, load_model, noise, \
    pick_device
from prepare import EOT, load_tokenizer

# what is read
out_dir = 'out/shakespeare_mdm'  # the run whose model is used
device = 'auto'        # cuda, mps, cpu; auto takes the first that is there
# what is wanted
start = ''             # the text to go on from
template = ''          # a text with blanks: [___] is 5 tokens wide, [___:9] is 9
prompt_file = ''       # a prompt or a template on every line; - reads them from stdin
corrupt = ''           # a text: show what the noise makes of it, and stop
num_samples = 1        # of each prompt
batch_size = 16        # rows at a time
gen_length = 0         # tokens to write after start; 0 fills the model's context
seed = 1337
# of runs on prompts and answers: start is a prompt, and what is written is the answer
length = 'auto'        # mdm, masks for it: full; fit, what training has on average for so long a
                       # prompt; ratio; auto is full if run with predict_pad, else fit. Predicted
                       # by one pass: argmax, quantile; regress, classify, encoder, which is what
                       # config/length_*.py train, and auto in their runs
length_ratio = 1.3     # ratio: so many for a token of the prompt
length_extra = 2       # ratio: and so many more
length_quantile = 0.9  # quantile, classify, encoder: the chance that an answer fits
length_candidates = 1  # fit, ratio, reference: lengths around it to try, for the surest answer
# to be seen: how the first sample came about
watch = False          # in the terminal, step by step; its time counts in the tokens/s printed
watch_delay = 0.05     # seconds for which watch shows a step
save = ''              # to a file: x.gif, x.png, x.html or x.jsonl
# how it is decoded
decoder = 'auto'       # ar, ancestral, confidence, threshold, remask, remdm, uniform, auto
steps = 128            # decoding steps; confidence, remask: 0 is one token a step
noise_schedule = 'linear'  # ancestral, remdm, uniform: how the steps are spread; cosine, polynomial
order = 'max_prob'     # confidence, threshold, remask: max_prob, margin, entropy, random
counts = 'linear'      # confidence, remask: linear (as many each step), cosine (few first)
threshold = 0.9        # threshold: a pass commits all that are not below it, and at least one
eta = 0.02             # remdm: largest chance per step that a written token is taken back
block_length = 0       # write blocks of so many tokens from left to right; 0: as the model learned
prefix_cache = False   # read what precedes a block once: faster, but an approximation
guidance = 0.0         # above 0: follow the given text more closely, at two passes a step
temperature = 0.7      # 0 takes the most likely token; measured choices, see README
top_k = 0              # draw among the k most likely tokens; 0 = all
top_p = 1.0            # draw among the most likely tokens that hold this probability together
repetition_penalty = 1.0  # above 1: tokens that the text has already become less likely
# how it is shown
cleanup = False        # drop words that repeat the one before them, in the text alone
json = False           # one JSON object a line for each sample

BLANK = re.compile(r'\[_+(?::(\d{1,6}))?\]')
BLANK_WIDTH = 5        # tokens of a [___] that does not say
MASK_SHOWN = '█'
ORDERS = ('max_prob', 'margin', 'entropy', 'random')
PREDICTED = ('argmax', 'quantile', 'regress', 'classify', 'encoder')
LENGTHS = ('full', 'fit', 'ratio', 'reference', *PREDICTED)


def chances(logits, seen=None, *, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0):
    """(M, V) float64, the distributions to draw from where the model's logits are (M, V).

    seen: a function that returns (M, V) bool, the tokens that repetition_penalty makes less likely
    [CTRL 1909.05858, sec. 4.1]; the table is large, so nobody makes it who does not need it.
    """
    logits = logits.double()
    if repetition_penalty != 1.0:
        less = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen().to(logits.device), less, logits)
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).double()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # none above 0: no overflow
    return filter_logits(logits, top_k, top_p).softmax(-1)


def race(p, generator):
    """One token (M,) for each row of p (M, V) float64, whose rows need not sum to 1.

    The draw is exact: argmax of p / e with e ~ Exponential(1) has the distribution p, and float64
    keeps its tails, which float32 noise cuts off [2409.02908].
    """
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)


def draw(logits, seen=None, *, generator, temperature=1.0, **drawing):
    """One token for each row of logits (M, V), and the model's own probability of it: 2 x (M,).

    The arguments are those of chances(). The probability is that of the untempered, unfiltered
    model: how sure it is does not depend on how we draw.
    """
    logits = logits.to(generator.device)  # mps has no float64: its generator is on the CPU
    p = chances(logits, seen, temperature=temperature, **drawing)  # (M, V)
    token = p.argmax(-1) if temperature == 0 else race(p, generator)  # (M,)
    return token, logits.double().softmax(-1).gather(-1, token[:, None])[:, 0]


def filter_logits(logits, top_k, top_p):
    """logits (M, V) with -inf for all but the top_k likeliest, and of those the nucleus of top_p.

    The nucleus [1904.09751] is the smallest set of likeliest tokens that holds at least top_p.
    """
    if 0 < top_k < logits.size(-1):
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ranked, index = logits.sort(dim=-1, descending=True)
        p = ranked.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p  # what stands before it holds top_p already
        logits = logits.masked_fill(outside.scatter(-1, index, outside), -torch.inf)
    return logits


def seen_tokens(x, where, V):
    """(M, V) bool: which tokens stand in the rows of the M positions of `where`, masks aside."""
    seen = torch.zeros(x.size(0), V, dtype=torch.bool, device=x.device)
    seen.scatter_(1, x, True)
    seen[:, -1] = False
    return seen[where.nonzero()[:, 0]]


def score_of(order, logits, probability, generator):
    """The confidence in each of M predictions, (M,) in [0, 1], float64; logits (M, V)."""
    if order == 'max_prob':
        return probability
    if order == 'random':
        return torch.rand(probability.shape, generator=generator, device=generator.device).double()
    p = logits.to(generator.device).double().softmax(-1)
    if order == 'margin':
        best, second = p.topk(2, dim=-1).values.unbind(-1)
        return best - second
    if order == 'entropy':
        return torch.special.xlogy(p, p).sum(-1).exp()  # 1 / perplexity, a probability again
    raise UserError(f'order is {order!r}, not one of {", ".join(ORDERS)}')


def guess(model, x, is_mask, order, generator, drawing):
    """Draws a token for every mask at once: x with them, how sure each is, the logits there.

    is_mask (B, T) bool. Returns (B, T) tokens, (B, T) scores, -inf where no mask is, and (M, V).
    A score is the logit of the confidence, log(p / (1 - p)): in float32 p itself is 1 from
    1 - p < 1e-7 on, and a confident model would have no order.
    """
    share = (x == model.mask_id).float().mean(1, keepdim=True)  # (B, 1), 1 - alpha_t of this canvas
    logits = model(x, share, where=is_mask)  # (M, V)
    logits[:, -1] = -torch.inf  # as it is, unless d3pm has learned to predict the mask
    token, probability = draw(logits, partial(seen_tokens, x, is_mask, logits.size(-1)),
                              generator=generator, **drawing)
    score = score_of(order, logits, probability, generator).logit().float().to(x.device)  # (M,)
    scores = torch.full(x.shape, -torch.inf, device=x.device).masked_scatter(is_mask, score)
    return x.masked_scatter(is_mask, token.to(x.device)), scores, logits


def rank(scores):
    """(B, T): 0 for the highest score of a row, 1 for the next.

    Rounded to 1e-4, more than the noise of logits in float32, so that noise does not order equals:
    they go from the left, and a greedy row does not depend on the rest of its batch.
    """
    return scores.round(decimals=4).argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def masks_left(n, i, steps, counts):
    """How many of n (B,) masks are left after i of `steps` steps; steps = 0 is one token a step.

    'linear' gives what n / steps leaves over to the first steps, one each, as LLaDA's code does;
    'cosine' is MaskGIT's, a few tokens at first, when little is known, and ever more later.
    """
    if steps == 0:
        return (n - i).clamp(min=0)
    if counts == 'linear':
        return n - n // steps * i - (n % steps).clamp(max=i)
    return (n.cpu().double() * math.cos(math.pi / 2 * i / steps)).long().to(n.device)


def end_rows(x, wanted, mask_id, eos_id):
    """Ends the rows that wrote an eos_id with no mask before it: x and wanted after that.

    All that is wanted behind it becomes eos_id, and nothing more is wanted of such a row.
    """
    if eos_id is None:
        return x, wanted
    before = (x == mask_id).cumsum(1)  # masks up to here
    ended = wanted & (x == eos_id) & (before == 0)
    behind = ended.cumsum(1) > 0
    x = torch.where(behind & (wanted | (x == mask_id)), eos_id, x)
    return x, wanted & ~ended.any(1, keepdim=True)


# -------------------------------------------------------------------------------------- decoders
#
# decode_x(model, x, *, wanted, ..., eos_id, generator, on_step, **drawing) -> (x, nfe)
#
# x (B, T) int64 with mask_id where text is wanted; given tokens are never changed. wanted (B, T)
# bool: the masks to fill now, by default all; the others stay, and are read as masks. A row that
# has written eos_id with no mask before it is at its end: what follows becomes eos_id. nfe counts
# forward passes of the network. on_step(x, nfe, where, logits) is called after every step that
# changed something, with the positions (B, T) bool that its pass predicted and the logits (M, V)
# there; x may change after the call, so clone what is to be kept. drawing: the keywords of
# chances().


def ignore(*step):
    """The on_step of whoever does not look."""


def window(i, size):
    """Where the window of `size` tokens begins in which token i is written.

    It drops its older half whenever it is full: a function of i, not of what was read before.
    """
    half = (size + 1) // 2
    return 0 if i < size else ((i - size) // half + 1) * half


@torch.no_grad()
def decode_ar(model, x, *, wanted=None, eos_id=None, generator, on_step=ignore, **drawing):
    """Left to right, each token given those before it; a filled blank has not seen what follows.

    One pass per token, over that token alone: what was read before is in a KV cache. Rows may have
    their masks at different places. A canvas longer than the context is read through a window that
    holds the start token and the newest tokens, and drops its older half whenever it is full.
    """
    x, c, nfe = x.clone(), model.config, 0
    wanted = x == model.mask_id if wanted is None else wanted
    cache = KVCache(c, x.size(0), x.device, model.embed.weight.dtype)
    begin = 0  # canvas token behind the start token in the window
    for i in wanted.any(0).nonzero()[:, 0].tolist():
        where = torch.zeros_like(wanted)
        where[:, i] = wanted[:, i]
        if not where.any():  # rows have ended since
            continue
        if window(i, c.block_size) > begin:
            begin, cache.length = window(i, c.block_size), 0
        unread = x[:, begin + max(cache.length - 1, 0):i]  # behind the start token, up to i
        if cache.length == 0:
            unread = torch.cat([torch.full_like(x[:, :1], model.mask_id), unread], dim=1)
        last = torch.zeros_like(unread, dtype=torch.bool)
        last[:, -1] = True
        logits = model(unread, cache=cache, where=last)  # (B, V)
        nfe += 1
        token, _ = draw(logits, partial(seen_tokens, x[:, :i], last[:, -1:], c.vocab_size),
                        generator=generator, **drawing)
        x[:, i] = torch.where(wanted[:, i], token.to(x.device), x[:, i])
        x, wanted = end_rows(x, wanted, model.mask_id, eos_id)
        on_step(x, nfe, where, logits[where[:, i]])
    return x, nfe


@torch.no_grad()
def decode_ancestral(model, x, *, wanted=None, steps, noise_schedule='linear', eta=0.0, eos_id=None,
                     generator, on_step=ignore, **drawing):
    """The reverse process of masked diffusion in `steps` steps from t = 1 to 0 [MDLM eq. 7].

        a masked token is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t),
        s = t - 1/steps, and then drawn from p(x0 | xt)

    Whether a token is revealed does not depend on the network, so that is drawn first: a step that
    reveals nothing needs no pass, one that does needs the head only where it does.

    With eta > 0 the process also takes tokens back, to draw them anew [ReMDM 2503.00307, 'cap'].
    The expected share of masks at each t stays what it was:

        a written token is masked again with probability sigma = min(eta, (1 - alpha_s) / alpha_t),
        a masked one is revealed with (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)

    A d3pm model with subs=False gives the mask a probability p too. Of its masked tokens fewer are
    revealed, before the last step: the posterior q(xs | xt, x0) at the prediction for x0 reveals
    one with probability (alpha_s - alpha_t) * (1 - p) / (1 - alpha_t * (1 - p)).
    """
    x, nfe = x.clone(), 0
    wanted = x == model.mask_id if wanted is None else wanted
    now, later = (part.float().mean(1, keepdim=True) for part in
                  (wanted, (x == model.mask_id) & ~wanted))  # 2 x (B, 1), shares of the canvas
    alpha = noise(torch.linspace(1, 0, steps + 1, dtype=torch.float64), noise_schedule)[0].tolist()
    for alpha_t, alpha_s in zip(alpha, alpha[1:]):
        u = torch.rand(x.shape, generator=generator, device=generator.device).to(x.device)
        sigma = min(eta, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 0.0  # at t = 1 all are masks
        is_mask = wanted & (x == model.mask_id)
        reveal = is_mask & (u < (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t))
        remask = wanted & ~is_mask & (u < sigma)
        if not (reveal | remask).any():
            continue
        if reveal.any():
            logits = model(x, now * (1 - alpha_t) + later, where=reveal)  # (M, V), M to reveal
            nfe += 1
            if not model.config.subs and eta == 0 and alpha_s < 1:
                p = logits.float().softmax(-1)[:, -1]  # (M,), of the mask
                chance = (alpha_s - alpha_t) * (1 - p) / (1 - alpha_t * (1 - p))
                remask[reveal] = u[reveal] >= chance
            logits[:, -1] = -torch.inf
            token, _ = draw(logits, partial(seen_tokens, x, reveal, logits.size(-1)),
                            generator=generator, **drawing)
            x = x.masked_scatter(reveal, token.to(x.device))
        x = torch.where(remask, model.mask_id, x)
        x, wanted = end_rows(x, wanted, model.mask_id, eos_id)
        # nothing is taken back before something was revealed: logits exist
        on_step(x, nfe, reveal, logits if reveal.any() else logits[:0])
    return x, nfe


@torch.no_grad()
def decode_uniform(model, x, *, wanted=None, steps, noise_schedule='linear', eos_id=None,
                   generator, on_step=ignore, **drawing):
    """The reverse process of uniform-state diffusion in `steps` steps from t = 1 to 0.

    All that is wanted starts as uniformly random tokens, and all of it may change at every step, so
    that errors are mended. With s = t - 1/steps, V' real tokens and p_j = p(x0 = j | xt), a token i
    becomes j with a probability proportional to q(xt = i | xs = j) * q(xs = j | x0), where the
    prediction stands for x0 [D3PM 2107.03006; Duo 2506.10892]:

        (alpha_t / alpha_s * [i = j] + (1 - alpha_t / alpha_s) / V') * (alpha_s * p_j
                                                                        + (1 - alpha_s) / V')

    Temperature and the filters shape p. At temperature 0 it is all on the likeliest token: so ends
    the last step, where alpha_s = 1, while the steps before it still draw noise.
    """
    x, nfe, n = x.clone(), 0, model.mask_id  # V'
    wanted = x == model.mask_id if wanted is None else wanted
    share = wanted.float().mean(1, keepdim=True)  # (B, 1)
    start = torch.randint(n, x.shape, generator=generator, device=generator.device).to(x.device)
    x = torch.where(wanted, start, x)
    alpha = noise(torch.linspace(1, 0, steps + 1, dtype=torch.float64), noise_schedule)[0].tolist()
    for alpha_t, alpha_s in zip(alpha, alpha[1:]):
        if not wanted.any():
            continue
        logits = model(x, share * (1 - alpha_t), where=wanted)  # (M, V)
        nfe += 1
        p = chances(logits.to(generator.device), partial(seen_tokens, x, wanted, n + 1),
                    **drawing)[:, :n]  # (M, V')
        keep, now = alpha_t / alpha_s, F.one_hot(x[wanted], n).to(p)  # now (M, V')
        p = (keep * now + (1 - keep) / n) * (alpha_s * p + (1 - alpha_s) / n)
        x = x.masked_scatter(wanted, race(p, generator).to(x.device))
        x, _ = end_rows(x, wanted, model.mask_id, eos_id if alpha_s == 1 else None)
        on_step(x, nfe, wanted, logits)
    return x, nfe


@torch.no_grad()
def decode_confidence(model, x, *, wanted=None, steps, order='max_prob', counts='linear',
                      eos_id=None, generator, on_step=ignore, **drawing):
    """The surest tokens first, for good [MaskGIT sec. 3.2; LLaDA sec. 2.4].

    Each pass draws a token for every mask and commits those with the highest score: by `order`,
    the probability of the drawn token, the margin of the best over the second, the entropy of the
    distribution (as 1 / perplexity), or at random. `counts` says how many masks of each row remain
    after i of `steps` steps. The simplest decoder of all is this one with steps = 0 and temperature
    = 0: write the one token that the model is surest of, look again, until no mask is left.
    """
    x, nfe = x.clone(), 0
    wanted = x == model.mask_id if wanted is None else wanted
    n_masks = wanted.sum(1)  # (B,)
    for i in range(1, (steps or x.size(1)) + 1):
        is_mask = wanted & (x == model.mask_id)
        quota = is_mask.sum(1) - masks_left(n_masks, i, steps, counts)  # (B,)
        if not (quota > 0).any():
            continue
        filled, scores, logits = guess(model, x, is_mask, order, generator, drawing)
        nfe += 1
        commit = is_mask & (rank(scores) < quota[:, None])
        x = torch.where(commit, filled, x)
        x, wanted = end_rows(x, wanted, model.mask_id, eos_id)
        on_step(x, nfe, is_mask, logits)
    return x, nfe


@torch.no_grad()
def decode_threshold(model, x, *, wanted=None, threshold, order='max_prob', eos_id=None,
                     generator, on_step=ignore, **drawing):
    """All tokens that are sure enough, in as many passes as that takes [Fast-dLLM 2505.22618].

    Each pass draws a token for every mask and commits those whose score, as in decode_confidence,
    is not below the threshold, and the surest of each row in any case: with threshold = 1 that is
    one token a pass and those of probability 1 (in float64).
    """
    x, nfe = x.clone(), 0
    threshold = torch.tensor(threshold).double().logit().item()  # as the scores are
    wanted = x == model.mask_id if wanted is None else wanted
    while (wanted & (x == model.mask_id)).any():
        is_mask = wanted & (x == model.mask_id)
        filled, scores, logits = guess(model, x, is_mask, order, generator, drawing)
        nfe += 1
        commit = is_mask & ((scores >= threshold) | (rank(scores) == 0))
        x = torch.where(commit, filled, x)
        x, wanted = end_rows(x, wanted, model.mask_id, eos_id)
        on_step(x, nfe, is_mask, logits)
    return x, nfe


@torch.no_grad()
def decode_remask(model, x, *, wanted=None, steps, order='max_prob', counts='linear', eos_id=None,
                  generator, on_step=ignore, **drawing):
    """The surest tokens first, but none for good before the last step [Mask-Predict 1904.09324].

    As decode_confidence, but every token keeps the score it had when it was drawn, and each step
    keeps the surest of all, old and new, as many as `counts` allows; the others are masked again.
    """
    x, nfe = x.clone(), 0
    wanted = x == model.mask_id if wanted is None else wanted
    n_masks, sure = wanted.sum(1), torch.full(x.shape, -torch.inf, device=x.device)
    for i in range(1, (steps or x.size(1)) + 1):
        is_mask = wanted & (x == model.mask_id)
        keep = n_masks - masks_left(n_masks, i, steps, counts)  # (B,)
        if not (is_mask.any(1) & (keep > 0)).any():
            continue
        filled, scores, logits = guess(model, x, is_mask, order, generator, drawing)
        nfe += 1
        sure = torch.where(is_mask, scores, sure)
        x = torch.where(wanted & (rank(sure) >= keep[:, None]), model.mask_id, filled)
        x, wanted = end_rows(x, wanted, model.mask_id, eos_id)
        on_step(x, nfe, is_mask, logits)
    return x, nfe


# ------------------------------------------------------- around the masked decoders: inner is one
#
# All hand inner another model, called the same way: model(x, t, where=...), with mask_id, config.


class PrefixCached:
    """A model that reads what precedes `start` at its first call only [Fast-dLLM 2505.22618].

    An approximation if the model is bidirectional: the tokens before `start` would see what is
    written behind them, so their keys and values change, but here they stay as they were.
    """

    def __init__(self, model, start):
        self.model, self.start, self.cache = model, start, None
        self.config, self.mask_id = model.config, model.mask_id

    def __call__(self, x, t=None, *, where):
        begin = self.start
        if self.cache is None:
            begin = 0
            self.cache = KVCache(self.config, x.size(0), x.device, self.model.embed.weight.dtype)
        self.cache.length = begin
        return self.model(x[:, begin:], t, cache=self.cache, where=where[:, begin:])


class BlockCached:
    """A model that was trained on blocks: it reads one block, and those before it from a cache.

    Exact: a finished block has not seen what follows it, so its keys and values stay as they are.
    Where the canvas is longer than the context, a window of whole blocks slides over it.
    """

    def __init__(self, model, B):
        self.model, self.config, self.mask_id = model, model.config, model.mask_id
        weight = model.embed.weight
        self.cache, self.begin = KVCache(model.config, B, weight.device, weight.dtype), 0

    def enter(self, x, start, stop):
        """Goes to the block x[:, start:stop], and returns how many passes what precedes it took."""
        c, self.block = self.config, slice(start, stop)
        if stop - self.begin > c.block_size:
            begin = window(start // c.block_length, c.block_size // c.block_length or 1)
            self.begin, self.cache.length = begin * c.block_length, 0
        unread = range(self.begin + self.cache.length, start, c.block_length)
        for k in unread:  # one at a time: the tokens of a block see no later block
            self.model(x[:, k:k + c.block_length], x.new_zeros(len(x), 1).float(), hidden=True,
                       cache=self.cache)
        return len(unread)

    def __call__(self, x, t=None, *, where):
        x = x[:, self.block]
        share = (x == self.mask_id).float().mean(1, keepdim=True)  # (B, 1), of this block
        logits = self.model(x, share, where=where[:, self.block], cache=self.cache)  # (M, V)
        self.cache.length -= x.size(1)  # only finished blocks stay
        return logits


@torch.no_grad()
def decode_block(model, x, *, wanted=None, inner, block_length, steps=None, prefix_cache=False,
                 generator, on_step=ignore, **drawing):
    """Block by block from left to right, each by the decoder `inner` (semi-autoregressive).

    Blocks of block_length columns begin at the first column that is wanted, and the last ends with
    the last; the rows of a batch share them. What follows a block stays masked, and is read as
    masks. The steps (None: inner takes none) are spread over the blocks by their lengths, and
    each has one at least.
    prefix_cache: the first pass of a block reads all, the others only the block and what follows
    it. That is an approximation, see PrefixCached.
    A model that was trained on blocks [BD3-LM 2503.09573] has its blocks from the beginning of the
    canvas on, and reads nothing that follows a block; nfe counts the pass over each finished block.
    """
    x, nfe = x.clone(), 0
    wanted = x == model.mask_id if wanted is None else wanted
    columns = wanted.any(0).nonzero()[:, 0].tolist()
    first, end = (columns[0], columns[-1] + 1) if columns else (0, 0)
    if model.config.block_length:
        if block_length not in (0, model.config.block_length):
            raise UserError(f'block_length is {block_length}, but this model learned blocks of '
                            f'{model.config.block_length} and reads no others: leave it out')
        block_length = model.config.block_length
        first -= first % block_length
        end = min(end + -end % block_length, x.size(1))
        model, prefix_cache = BlockCached(model, x.size(0)), False

    def counted(x, passes, where, logits):
        on_step(x, nfe + passes, where, logits)

    for start in range(first, end, block_length):
        stop = min(start + block_length, end)
        block = wanted & (x == model.mask_id)  # no mask is left in rows that have ended
        block[:, :start] = False
        block[:, stop:] = False
        if not block.any():
            continue
        pace = {}
        if steps is not None:
            spent, due = (steps * (column - first) // (end - first) for column in (start, stop))
            pace['steps'] = max(1, due - spent) if steps else 0
        if model.config.block_length:
            nfe += model.enter(x, start, stop)
        x, passes = inner(PrefixCached(model, start) if prefix_cache else model, x, wanted=block,
                          generator=generator, on_step=counted, **pace, **drawing)
        nfe += passes
    return x, nfe


class Guided:
    """A model that follows the given tokens more closely, at two passes a call.

    Unsupervised classifier-free guidance [2410.18514; cfg_scale of LLaDA's code]:

        logits = blind + (guidance + 1) * (seeing - blind)

    seeing reads the canvas, blind the same with the given tokens masked too.
    """

    def __init__(self, model, given, guidance):
        self.model, self.given, self.guidance = model, given, guidance
        self.config, self.mask_id = model.config, model.mask_id

    def __call__(self, x, t=None, *, where):
        xt = torch.where(self.given, self.mask_id, x)
        share = (xt == self.mask_id).float().mean(1, keepdim=True)  # (B, 1)
        blind, seeing = self.model(xt, share, where=where), self.model(x, t, where=where)
        logits = blind + (self.guidance + 1) * (seeing - blind)
        logits[..., self.mask_id] = -torch.inf  # inf - inf is nan
        return logits


@torch.no_grad()
def decode_guided(model, x, *, wanted=None, inner, guidance, generator, on_step=ignore, **drawing):
    """By the decoder `inner` and a Guided model; nfe counts both passes of each call."""
    def both(x, nfe, where, logits):
        on_step(x, 2 * nfe, where, logits)

    guided = Guided(model, x != model.mask_id, guidance)
    x, nfe = inner(guided, x, wanted=wanted, generator=generator, on_step=both, **drawing)
    return x, 2 * nfe


# ------------------------------------------------------------------------------------ to be seen
#
# A Recorder is an on_step that keeps how a text came about. A Screen shows it meanwhile, and the
# save_x(recorder, path, about) write it down, about['title'] above it.

TOP = 5                # alternatives kept of each token
COLUMNS = 80           # characters in a line of a picture
FRAMES = 120           # of a GIF, at most
ROWS, ROW_LINES = 9, 8  # of a PNG: steps shown, and lines of each, at most
# Colours from the first step to the last are the upper half of viridis: lightness grows along it,
# black ink is legible on all of it, and masks are darker, so that it works in grey as well.
RAMP_256 = (31, 37, 36, 72, 71, 77, 113, 149, 185, 221)  # the like in a terminal's 256 colours
MASK_COLOR, MASK_256 = '#3d4454', 240


class Recorder:
    """Keeps how row 0 of a canvas changed, whatever the decoder; called as its on_step.

    steps: the canvas as it was given, then for each step {'step': 0, 1, ..., 'nfe': passes so far,
    'ids': the canvas then, 'new': what changed}, a list of {'i': position, 'id': what came there,
    mask_id if a token was taken back, 'text': that id decoded, 'p': the model's probability of it,
    'alternatives': [[id, p, text], ...], the TOP likeliest}. Where the pass predicted nothing, p is
    None and there are no alternatives. stood: for each position the texts it had, as shown.
    """

    def __init__(self, canvas, tokenizer, mask_id, show=None):
        self.tokenizer, self.mask_id, self.show = tokenizer, mask_id, show
        self.steps, self.stood = [], [[] for _ in canvas]
        self.keep([None] * len(canvas), list(canvas), 0, {})

    def __call__(self, x, nfe, where, logits):
        predicted = where[0].nonzero()[:, 0].tolist()
        self.keep(self.steps[-1]['ids'], x[0].tolist()[:len(self.stood)], nfe,
                  dict(zip(predicted, logits[:len(predicted)])))
        if self.show is not None:
            self.show(self)

    def keep(self, before, ids, nfe, logits):
        """Adds a step; logits[i] (V,) are those of position i."""
        new = []
        for i, id in enumerate(ids):
            if id == before[i]:
                continue
            p, alternatives = None, []
            if i in logits and id != self.mask_id:
                p_all = logits[i].float().softmax(-1).cpu()  # (V,)
                p, best = round(p_all[id].item(), 6), p_all.topk(min(TOP, len(p_all) - 1))
                alternatives = [[k, round(p_k, 6), self.tokenizer.decode([k])]
                                for k, p_k in zip(best.indices.tolist(), best.values.tolist())]
            text = MASK_SHOWN if id == self.mask_id else self.tokenizer.decode([id])
            new.append({'i': i, 'id': id, 'text': text, 'p': p, 'alternatives': alternatives})
            self.stood[i].append(visible(text))
        self.steps.append({'step': len(self.steps), 'nfe': nfe, 'ids': ids, 'new': new})

    def progress(self, k):
        """How many masks step k left or, where none was left before it, how many tokens changed."""
        before, step = self.steps[max(k - 1, 0)], self.steps[k]
        if self.mask_id not in before['ids'] + step['ids']:
            return f'{len(step["new"])} tokens changed'
        return f'{step["ids"].count(self.mask_id)} masks left'

    def rewritten(self):
        """The share of the wanted tokens that were written more than once: how much is mended."""
        times = Counter(new['i'] for step in self.steps[1:] for new in step['new']
                        if new['id'] != self.mask_id)
        return sum(n > 1 for n in times.values()) / self.steps[0]['ids'].count(self.mask_id)


def visible(text):
    """The text on one line, and with nothing in it that a terminal would obey."""
    return ''.join('⏎' if c == '\n' else c if c.isprintable() else ' ' if c.isspace() else '�'
                   for c in text.replace(EOT, '∎'))


def layout(stood, columns):
    """(line, column, width) of each token on a page, which breaks where the text does.

    stood: for each position what stands there in turn, the last of it in the end. There is room for
    the widest, so that nothing moves when masks become tokens.
    """
    places, line, column = [], 0, 0
    for texts in stood:
        width = max(sum(1 + (east_asian_width(c) in 'WF') for c in text) for text in texts)
        if 0 < column > columns - width:
            line, column = line + 1, 0
        places.append((line, column, width))
        column += width
        if '⏎' in texts[-1]:
            line, column = line + texts[-1].count('⏎'), 0
    return places


class Screen:
    """Shows a Recorder's canvas in the terminal, each step over the one before.

    The colour of a token tells how much of the canvas stood when it came: was no mask and, if there
    was none, did not change then. Where there is no terminal, each step is a line of text.
    """

    def __init__(self, delay):
        self.delay, self.height, self.colors = delay, 0, {}

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
        sys.stdout.write('\x1b[?25l' + f'\x1b[{self.height}A' * (self.height > 0)
                         + ''.join(f'\x1b[2K{line}\n' for line in lines) + '\x1b[J\x1b[?25h')
        sys.stdout.flush()
        self.height = len(lines)
        time.sleep(self.delay)


def ramp(n):
    """n colours, #rrggbb."""
    from matplotlib import colormaps, colors
    return [colors.to_hex(color) for color in colormaps['viridis'](np.linspace(0.5, 1, n))]


def draw_steps(r, shown, stood, title, size):
    """PIL images of the canvas after each of the steps `shown`, a character being size x 2 size.

    Above it are the title and a bar with the colours of the steps so far.
    """
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont  # comes with matplotlib
    places, n, images = layout(stood, COLUMNS), len(r.steps) - 1, []
    font = ImageFont.truetype(f'{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf', size * 5 // 3)
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
            is_mask = new['id'] == r.mask_id
            put(*places[new['i']], '' if is_mask else visible(new['text']),
                MASK_COLOR if is_mask else color)
        if k > 0:
            put(-0.9, COLUMNS / 2 * (1 + (k - 1) / n), COLUMNS / 2 / n + 0.3, '', color, 0.4)
        if k in shown:
            put(-1.2, 0, COLUMNS / 2, f'{title}, step {k} of {n}', 'white')
            images.append(image.copy())
    return images


def save_gif(r, path, about):
    """The canvas over time, at most FRAMES steps of it; the last stays for 4 seconds."""
    from PIL import Image
    shown = np.linspace(0, len(r.steps) - 1, min(len(r.steps), FRAMES)).round()
    frames = draw_steps(r, shown, r.stood, about['title'], 10)
    both = np.concatenate([np.asarray(frames[0]), np.asarray(frames[-1])])  # they have all colours
    palette = Image.fromarray(both).quantize(256)
    frames = [frame.quantize(palette=palette, dither=0) for frame in frames]
    pace = min(max(8000 // len(frames), 40), 300) // 10 * 10  # ms; GIFs count in hundredths of 1 s
    frames[0].save(path, save_all=True, append_images=frames[1:], loop=0,
                   duration=[pace] * (len(frames) - 1) + [4000])


def save_png(r, path, about):
    """ROWS of the steps one below the other, from masks to text; the first ROW_LINES of each."""
    from PIL import Image
    shown = np.linspace(0, len(r.steps) - 1, min(len(r.steps), ROWS)).round()
    running = [[text.replace('⏎', ' ') for text in texts] for texts in r.stood]  # no line breaks
    rows = [np.asarray(image)[:40 * (ROW_LINES + 2)]
            for image in draw_steps(r, shown, running, about['title'], 20)]
    Image.fromarray(np.concatenate(rows)).save(path)


HTML = """<!doctype html><html lang="en"><meta charset="utf-8"><title>nanoMDM</title>
<meta name="viewport" content="width=device-width">
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 48rem; margin: 2rem auto; padding: 0 1rem }
nav { display: flex; gap: 1rem; align-items: center }
input { flex: 1 }
pre { overflow-x: auto; padding: 3px; font: 15px/1.5 "DejaVu Sans Mono", Menlo, monospace }
span { display: inline-block; height: 1.4em; line-height: 1.4; vertical-align: top }
pre span { box-shadow: inset -1px 0 Canvas }
span:focus, span:hover { outline: 2px solid #d55e00 }
#ramp { width: 8rem }
#card { position: sticky; bottom: 0; min-height: 9em; background: Canvas; white-space: pre-wrap }
</style>
<h2 id="head"></h2>
<nav><button id="button">Play</button><input id="slider" type="range" min="0" aria-label="step">
<output id="label"></output></nav>
<pre id="page"></pre>
<p>Colour: the step at which a token came, first <span id="ramp"></span> last. Grey: masks. Plain:
given. Point at a token, or go there by Tab and arrow keys, to see what it was drawn from.</p>
<pre id="card"></pre>
<script type="application/json" id="data">DATA</script>
<script>
const d = JSON.parse(data.textContent), last = d.steps.length - 1
let chosen = d.chosen, before = 0, playing = false
document.title = head.textContent = d.title
ramp.style.background = `linear-gradient(90deg, ${d.colors}, ${d.colors.at(-1)})`
const spans = d.places.map(([line, column, width], i) => {
  const span = document.createElement('span')
  span.style.width = width + 'ch'
  span.tabIndex = -1
  span.onpointerenter = span.onfocus = () => tell(i)
  page.append('\\n'.repeat(line - before), span)
  before = line
  return span
})
function tell(i) {  // what the token at i was drawn from
  card.textContent = spans[i].ariaLabel
  spans[chosen].tabIndex = -1
  spans[chosen = i].tabIndex = 0
}
function draw() {  // the canvas after as many steps as the slider says
  const steps = d.steps.slice(0, +slider.value + 1)
  for (const [i, text, color, said] of steps.flatMap(step => step.new)) {
    spans[i].textContent = text
    spans[i].style.background = color
    spans[i].style.color = color && 'black'
    spans[i].ariaLabel = said
  }
  label.textContent = steps.at(-1).label
  tell(chosen)
}
page.onkeydown = ({key}) => spans[chosen + {ArrowLeft: -1, ArrowRight: 1}[key]]?.focus()
button.onclick = () => {
  playing = !playing
  if (+slider.value === last) slider.value = 0
}
setInterval(() => {
  if (playing) {
    slider.stepUp()
    draw()
  }
  playing = playing && +slider.value < last
  button.textContent = playing ? 'Pause' : 'Play'
}, Math.min(300, Math.max(40, 8000 / last)))
slider.max = slider.value = last
slider.oninput = draw
draw()
</script>
"""


def save_html(r, path, about):
    """One page that needs no other: a slider over the steps, and what each token was drawn from."""
    n = len(r.steps) - 1
    steps, colors, changes = [], ramp(n), [-1] * len(r.stood)
    for step, color in zip(r.steps, ['', *colors]):
        steps.append({'label': f'step {step["step"]} of {n}, pass {step["nfe"]}, '
                               f'{r.progress(step["step"])}', 'new': []})
        for new in step['new']:
            i, is_mask = new['i'], new['id'] == r.mask_id
            changes[i] += 1
            first = 'a mask' if is_mask else 'given'
            came = f'from step {step["step"]} on' if changes[i] else first
            said = [f'“{visible(new["text"])}” at position {i}, {came}']
            if new['p'] is not None:
                said[0] += f', probability {new["p"]:.3f}'
            if changes[i] > 1:
                said[0] += f', change {changes[i]} here'
            for id, p, text in new['alternatives']:
                drawn = ' ◂' if id == new['id'] else ''
                said.append(f'{p:.3f} {"━" * round(20 * p):20} “{visible(text)}”{drawn}')
            steps[-1]['new'].append([i, '' if is_mask else visible(new['text']),
                                     MASK_COLOR if is_mask else color, '\n'.join(said)])
    data = {'title': about['title'], 'places': layout(r.stood, COLUMNS), 'colors': colors,
            'chosen': r.steps[0]['ids'].index(r.mask_id), 'steps': steps}
    # all ASCII; and with no < in it, no text can end the script
    Path(path).write_text(HTML.replace('DATA', dumps(data).replace('<', '\\u003c')))


def save_jsonl(r, path, about):
    """The raw data: a header, then the given canvas and each step, as in Recorder.

    rewritten in the header: the share of the wanted tokens that were written more than once.
    """
    header = about | {'rewritten': r.rewritten()}
    Path(path).write_text(''.join(dumps(row) + '\n' for row in [header, *r.steps]))


SAVERS = {'.gif': save_gif, '.png': save_png, '.html': save_html, '.jsonl': save_jsonl}


# ------------------------------------------------------------------------------ text in, text out

DECODERS = {  # name: the function, and its settings beside those of draw()
    'ar': (decode_ar, ()),
    'ancestral': (decode_ancestral, ('steps', 'noise_schedule')),
    'confidence': (decode_confidence, ('steps', 'order', 'counts')),
    'threshold': (decode_threshold, ('threshold', 'order')),
    'remask': (decode_remask, ('steps', 'order', 'counts')),
    'remdm': (decode_ancestral, ('steps', 'noise_schedule', 'eta')),
    'uniform': (decode_uniform, ('steps', 'noise_schedule'))}
MASKED = ('ancestral', 'confidence', 'threshold', 'remask', 'remdm')
SERVED_BY = {  # objective: its decoders, the usual one first, and why there are no others
    'ar': (('ar',), 'read only what stands before a token, and never learned what a mask is'),
    'uniform': (('uniform',), 'may change every token at every step, and none is ever a mask'),
    **dict.fromkeys(('mdm', 'd3pm', 'block'), (
        MASKED, 'predict what masks hide; ar and uniform read texts without any'))}


def decoder_name(name, objective):
    """`name`, or for 'auto' the usual decoder of this objective, if the objective can serve it."""
    if name not in ('auto', *DECODERS):
        raise UserError(f'decoder is {name!r}, not one of auto, {", ".join(DECODERS)}')
    known, reason = SERVED_BY[objective]
    if name not in ('auto', *known):
        raise UserError(f'decoder is {name!r}, but {objective} models decode by {", ".join(known)} '
                        f'alone: they {reason}')
    return known[0] if name == 'auto' else name


def pick_decoder(objective, settings, eos_id):
    """decode(model, x, generator=..., on_step=...) as the settings ask for."""
    s, name = settings, decoder_name(settings['decoder'], objective)
    function, takes = DECODERS[name]
    if name not in MASKED and (s['block_length'] or s['guidance']):
        raise UserError(f'block_length and guidance are for masks, and {objective} models have '
                        f'none: they {SERVED_BY[objective][1]}')
    if objective == 'block' and s['guidance']:
        raise UserError('guidance is for models that read the whole text twice, once with its '
                        'beginning hidden; a block model reads what is finished only once')
    if name in ('ancestral', 'remdm', 'uniform') and s['steps'] == 0:
        raise UserError(f'steps is 0, one token a step, but {name} leaves to chance how many '
                        'tokens a step writes: it must be 1 or more')
    drawing = {k: s[k] for k in ('temperature', 'top_k', 'top_p', 'repetition_penalty')}
    decode = partial(function, eos_id=eos_id, **{k: s[k] for k in takes}, **drawing)
    if s['block_length'] or objective == 'block':
        decode = partial(decode_block, inner=decode, block_length=s['block_length'],
                         steps=s['steps'] if 'steps' in takes else None,
                         prefix_cache=s['prefix_cache'])
    if s['guidance']:
        decode = partial(decode_guided, inner=decode, guidance=s['guidance'])
    return decode


def require(settings, *rules):
    """Raises UserError for the first of the rules (name, fine, wanted) that is not kept."""
    for name, fine, wanted in rules:
        if not fine:
            raise UserError(f'{name} is {settings[name]!r}, but it must be {wanted}')


def check_decoding(s):
    """Raises UserError for values that no decoder can use."""
    require(s, ('steps', s['steps'] >= 0, '1 or more, or 0 for one token a step'),
            ('temperature', 0 <= s['temperature'] < math.inf, '0 or more'),
            ('top_k', s['top_k'] >= 0, '1 or more, or 0 for all'),
            ('top_p', 0 < s['top_p'] <= 1, 'in (0, 1]'),
            ('threshold', 0 < s['threshold'] <= 1, 'in (0, 1]'),
            ('eta', 0 <= s['eta'] <= 1, 'in [0, 1]'),
            ('block_length', s['block_length'] >= 0, '1 or more, or 0 for all at once'),
            ('guidance', 0 <= s['guidance'] < math.inf, 'above 0, or 0 for none'),
            ('repetition_penalty', 0 < s['repetition_penalty'] < math.inf, 'above 0'),
            ('seed', abs(s['seed']) < 2 ** 63, 'of at most 63 bits'),
            ('order', s['order'] in ORDERS, f'one of {", ".join(ORDERS)}'),
            ('noise_schedule', s['noise_schedule'] in SCHEDULES, f'one of {", ".join(SCHEDULES)}'),
            ('counts', s['counts'] in ('linear', 'cosine'), 'linear or cosine'),
            ('prefix_cache', not s['prefix_cache'] or s['block_length'] > 0,
             'off where block_length is 0: with no blocks, nothing precedes one'),
            ('prefix_cache', not (s['prefix_cache'] and s['guidance']),
             'off where guidance is on, which masks the very text that the cache would hold'))


def template_canvas(template, tokenizer, mask_id):
    """The ids of a template, mask_id in its blanks.

    The text between the blanks is tokenised piece by piece: with a BPE tokenizer a word that
    touches a blank may get other tokens than inside a text, so put blanks at spaces.
    """
    if not BLANK.search(template):
        raise UserError(f'the template {template!r} has no blank: write [___], or [___:9] for 9 '
                        'tokens')
    ids, end = [], 0
    for blank in BLANK.finditer(template):
        width = int(blank[1]) if blank[1] else BLANK_WIDTH
        ids += tokenizer.encode(template[end:blank.start()]) + [mask_id] * width
        end = blank.end()
    ids += tokenizer.encode(template[end:])
    if mask_id not in ids:
        raise UserError(f'all blanks of the template {template!r} are 0 tokens wide')
    return ids


def show(ids, tokenizer, mask_id):
    """The text of ids, with a block for every mask."""
    runs = ([*run] for _, run in groupby(ids, key=mask_id.__eq__))
    return ''.join(MASK_SHOWN * len(run) if run[0] == mask_id else tokenizer.decode(run)
                   for run in runs)


def show_corruption(text, out_dir, seed):
    """The forward process on one text: ever more of its tokens become masks, none comes back.

    Its tokens are those of the run out_dir; where there is none, its letters will do.
    """
    chars = ''.join(sorted(set(text)))
    meta = {'tokenizer': {'kind': 'char', 'chars': chars}, 'eos_id': None, 'mask_id': len(chars)}
    if (Path(out_dir) / 'ckpt.pt').is_file():
        meta = load_checkpoint(out_dir)['meta']
    tokenizer, mask_id = load_tokenizer(meta), meta['mask_id']
    ids = torch.tensor(tokenizer.encode(text))
    u = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    for t in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        xt = torch.where(u < t, mask_id, ids)  # alpha_t = 1 - t
        print(f't = {t:.1f}  {show(xt.tolist(), tokenizer, mask_id)}')


def make_canvas(model, tokenizer, kind, text, gen_length):
    """The ids of one canvas: a 'template', or a 'prompt' with gen_length masks behind it."""
    T, mask_id = model.config.block_size, model.mask_id
    if kind == 'template':
        return template_canvas(text, tokenizer, mask_id)
    given = tokenizer.encode(text)
    length = gen_length or T - len(given)
    if length <= 0:
        raise UserError(f'the prompt {text[:20]!r}... is {len(given)} tokens long and fills the '
                        f'context of {T}: shorten it, or set gen_length (ar and block models)')
    return given + [mask_id] * length


def what_is_asked(settings):
    """[(kind, text)], kind 'prompt' or 'template': of start, template or the lines of prompt_file.

    A line with a blank is a template; empty lines are skipped.
    """
    start, template, path = (settings[k] for k in ('start', 'template', 'prompt_file'))
    if not path:
        if template and (start or settings['gen_length']):
            raise UserError('a template says itself what is given and how much is wanted: '
                            'leave out start and gen_length')
        return [('template', template) if template else ('prompt', start)]
    if start or template:
        raise UserError('prompt_file says what is given: leave out start and template')
    if path != '-' and not os.path.isfile(path):
        raise UserError(f'there is no prompt_file {path!r} (- reads prompts from stdin)')
    try:
        text = sys.stdin.read() if path == '-' else Path(path).read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as e:
        raise UserError(f'prompt_file {path!r} is not a text in UTF-8 ({e.reason})') from e
    lines = [line for line in text.split('\n') if line.strip()]
    if not lines:
        raise UserError(f'prompt_file {path!r} is empty: write a prompt or a template on each line')
    return [('template' if BLANK.search(line) else 'prompt', line) for line in lines]


def check_asked(asked, settings, objective):
    """Raises UserError for what a model of prompts and answers cannot be asked."""
    require(settings, ('gen_length', settings['gen_length'] == 0,
                       '0 for a run on prompts and answers: length says how long an answer is'),
            ('length', objective != 'ar' or settings['length'] == 'auto',
             'auto for an ar model, which writes until it is done'))
    for kind, text in asked:
        if kind == 'template':
            raise UserError(f'{text[:20]!r}... is a template, but this run is on prompts and '
                            'answers: give it a prompt')
        if not text.strip():
            raise UserError('this run is on prompts and answers: ask it by start or prompt_file')


def split_row(ids, meta):
    """(prompt, answer) of a row: the ids before SEP, and those behind it up to EOS, without PAD."""
    middle, special = ids.index(meta['sep_id']), (meta['sep_id'], meta['pad_id'])
    answer = ids[middle + 1:]
    answer = answer[:answer.index(meta['eos_id'])] if meta['eos_id'] in answer else answer
    return ids[:middle], [i for i in answer if i not in special]


def length_name(name, run):
    """`name`, or for 'auto' the `length` that suits `run`, the settings of training."""
    if name not in ('auto', *LENGTHS):
        raise UserError(f'length is {name!r}, not one of auto, {", ".join(LENGTHS)}')
    head = run.get('length_head', '').partition('_')[0]  # older runs have no such setting
    if name in PREDICTED[2:] and name != head:
        raise UserError(f'length is {name!r}, but this run has no such head: '
                        f'config/length_{name}.py trains one')
    if name in PREDICTED and not run['predict_pad']:
        raise UserError(f'length is {name!r}, but this run never saw more masks than its answer '
                        'needed: train with predict_pad')
    if name in PREDICTED and run['objective'] in ('uniform', 'block'):
        raise UserError(f'length is {name!r}, but a run of {run["objective"]} never saw an answer '
                        'that is all masks: it cannot say where that ends')
    return head or ('full' if run['predict_pad'] else 'fit') if name == 'auto' else name


def row_canvases(prompts, run, meta, settings, answers=None):
    """prompt SEP and masks for the answer and its EOS, for each of prompts, lists of ids.

    run: the settings of training. Autoregression has the rest of the context and writes its own
    end. Masked diffusion is told how many tokens it can write, and only if it was trained to
    predict PAD does it know what to do with more than the answer needs. `length` is 'full', the
    number in training; 'ratio' or 'fit', by the length of the prompt, fit as training has it on
    average; or 'reference', what the right answer needs, which is all that answers, lists of ids,
    are read for. Where it is to be predicted, it is that of 'full', for shortened() to cut.
    """
    name = length_name(settings['length'], run)
    ratio, extra = settings['length_ratio'], settings['length_extra']
    line = meta['counts']['train'].get('answer_line', (ratio, extra))  # older data have none
    require(settings, ('length_ratio', 0 <= ratio < math.inf, '0 or more'),
            ('length', name != 'reference' or answers is not None,
             'another where no right answer is known'))
    canvases = []
    for i, prompt in enumerate(prompts):
        room = width = run['block_size'] - len(prompt) - 1
        if room < 1:
            raise UserError(f'a prompt of {len(prompt)} tokens leaves no room for an answer: '
                            f'block_size is {run["block_size"]}')
        if run['objective'] != 'ar':
            width = {'ratio': int(ratio * len(prompt)) + extra,
                     'fit': round(line[0] * len(prompt) + line[1]),
                     'reference': len(answers[i]) + 1 if answers else 0}.get(
                         name, meta['max_answer'] + 1)
        masks = [meta['mask_id']] * max(1, min(width, room))
        canvases.append([*prompt, meta['sep_id'], *masks])
    return canvases


@torch.no_grad()
def predict_lengths(model, x, name, quantile, eos_id):
    """How many tokens answers will have, EOS among them, (B,) float, from one pass over a canvas.

    x (B, P + W): prompts of P tokens, then W masks. 'argmax': up to the mask whose chance to become
    an EOS is the largest; 'quantile': up to where the chances, made to sum to 1 over the W masks,
    have summed to quantile; else what the length_head of the model says.
    """
    if name not in ('argmax', 'quantile'):
        return model.length_head.predict(model, x, quantile)
    is_mask = x == model.mask_id
    logits = model(x, is_mask.float().mean(1, keepdim=True), where=is_mask)  # (B * W, V)
    eos = logits.float().log_softmax(-1)[:, eos_id].view(len(x), -1)  # (B, W)
    return eos.argmax(1) + 1.0 if name == 'argmax' else \
        first_to_hold(eos.softmax(1).cumsum(1), quantile)


def shortened(model, canvases, run, meta, settings):
    """canvases of row_canvases with no more masks than their answers are predicted to need.

    That is a power of two, or all; of lengths that differ, few could be decoded together. Returns
    (canvases, predicted, passes, seconds); predicted, how many tokens, is None if `length` does
    not predict.
    """
    name, mask_id = length_name(settings['length'], run), model.mask_id
    require(settings, ('length_quantile', 0 < settings['length_quantile'] <= 1, 'in (0, 1]'))
    if run['objective'] == 'ar' or name not in PREDICTED:
        return canvases, None, 0, 0.0
    canvases, predicted, began = list(canvases), [None] * len(canvases), time.perf_counter()
    groups = batches(canvases, run['objective'], mask_id, settings['batch_size'], block_length=1)
    for batch in groups:
        x = torch.tensor([canvases[i] for i in batch], device=model.embed.weight.device)
        lengths = predict_lengths(model, x, name, settings['length_quantile'], meta['eos_id'])
        for i, length in zip(batch, lengths.tolist()):
            n_masks = canvases[i].count(mask_id)
            bound = math.ceil(min(max(length, 1.0), n_masks))
            extra = n_masks - min(1 << (bound - 1).bit_length(), n_masks)
            canvases[i], predicted[i] = canvases[i][:len(canvases[i]) - extra], length
    return canvases, predicted, len(groups), time.perf_counter() - began


def canvases_of(asked, model, tokenizer, checkpoint, settings):
    """Canvases, one for each (kind, text) of asked; passes and seconds that their lengths took."""
    run, meta = checkpoint['config'], checkpoint['meta']
    if meta['sep_id'] is None:
        require(settings, *((name, settings[name] == usual, f'{usual} for a run without answers')
                            for name, usual in (('length', 'auto'), ('length_candidates', 1))))
        return [make_canvas(model, tokenizer, kind, text, settings['gen_length'])
                for kind, text in asked], 0, 0.0
    check_asked(asked, settings, run['objective'])
    prompts = [tokenizer.encode(text.strip()) for _, text in asked]
    canvases = row_canvases(prompts, run, meta, settings)
    canvases, _, *cost = shortened(model, canvases, run, meta, settings)
    return canvases, *cost


def generate(model, objective, rows, settings, eos_id=None, on_step=ignore):
    """The fillings of rows, canvases of one length: x (rows, T), nfe, and the seconds it took.

    With an eos_id, a row ends there; without, it goes on to the end of the canvas.
    """
    check_decoding(settings)
    if objective not in ('ar', 'block') and len(rows[0]) > model.config.block_size:
        raise UserError(f'{len(rows[0])} tokens do not fit into the context of this model, '
                        f'block_size is {model.config.block_size}')
    device = model.embed.weight.device
    generator = torch.Generator('cpu' if device.type == 'mps' else device)
    generator.manual_seed(settings['seed'])
    decode = pick_decoder(objective, settings, eos_id)
    began = time.perf_counter()
    x, nfe = decode(model, torch.tensor(rows, device=device), generator=generator, on_step=on_step)
    return x.cpu(), nfe, time.perf_counter() - began


def batches(canvases, objective, mask_id, batch_size, block_length):
    """Lists of the indices of canvases that are decoded together, batch_size of them at most.

    AR takes canvases of any lengths together. Masked canvases have one length, since masks added
    to one would change the text; in blocks, they are wanted in the same columns too.
    """
    groups = {}
    for i, canvas in enumerate(canvases):
        key = None
        if objective != 'ar':
            span = canvas.index(mask_id), canvas[::-1].index(mask_id)
            key = len(canvas), span if block_length or objective == 'block' else None
        groups.setdefault(key, []).append(i)
    return [group[k:k + batch_size] for group in groups.values()
            for k in range(0, len(group), batch_size)]


def end_of(ids, canvas, eos_id, mask_id):
    """How many of ids stand before the first eos_id that was written in place of a mask."""
    pairs = list(zip(ids, canvas))
    return pairs.index((eos_id, mask_id)) if (eos_id, mask_id) in pairs else len(pairs)


class Certainty:
    """An on_step that keeps log p (B, T) of each token, as the pass that wrote it last had it."""

    def __init__(self, rows):
        self.x = torch.tensor(rows)
        self.log_p = torch.zeros(self.x.shape)

    def __call__(self, x, nfe, where, logits):
        x, where = x.cpu(), where.cpu()
        new = where & (x != self.x)
        logits = logits[new[where].to(logits.device)].float().cpu()  # (M, V)
        self.log_p[new] = logits.log_softmax(-1).gather(-1, x[new][:, None])[:, 0]
        self.x = x.clone()


def complete(model, objective, canvases, settings, eos_id=None, on_step=ignore, certainty=False):
    """Fills canvases of any lengths, batch by batch: [(ids, figures)] in their order, and totals.

    on_step sees the first batch, whose row 0 is the first canvas.
    ids ends before an eos_id that was written. figures: nfe, seconds and tokens_per_second of the
    batch it was in; and with certainty, instead of on_step, whether it ended, and log_p, the mean
    over what was written.
    totals: tokens written, each row's first eos_id among them; nfe; seconds.
    """
    done, totals, mask_id = [None] * len(canvases), (0, 0, 0.0), model.mask_id
    for batch in batches(canvases, objective, mask_id, settings['batch_size'],
                         settings['block_length']):
        T = max(len(canvases[i]) for i in batch)
        rows = [canvases[i] + [mask_id] * (T - len(canvases[i])) for i in batch]
        how = settings | {'seed': settings['seed'] + batch[0]}
        watcher = Certainty(rows) if certainty else on_step if batch[0] == 0 else ignore
        x, nfe, seconds = generate(model, objective, rows, how, eos_id, watcher)
        ends = [end_of(ids, canvases[i], eos_id, mask_id) for i, ids in zip(batch, x.tolist())]
        written = [canvases[i][:end + 1].count(mask_id) for i, end in zip(batch, ends)]
        figures = {'nfe': nfe, 'seconds': seconds, 'tokens_per_second': sum(written) / seconds}
        for k, (i, ids, end) in enumerate(zip(batch, x.tolist(), ends)):
            done[i] = ids[:end], figures | ({} if not certainty else {
                'ended': end < len(canvases[i]),
                'log_p': watcher.log_p[k, :end + 1].sum().item() / written[k]})
        totals = tuple(a + b for a, b in zip(totals, (sum(written), nfe, seconds)))
    return done, totals


def complete_rows(model, run, canvases, settings, eos_id, on_step=ignore):
    """As complete(), of canvases of row_canvases: each is tried with length_candidates lengths.

    The answer with the highest log_p stays: it says more about the right length than that of the
    prompt does [Mask-Predict 1904.09324, sec. 3.3]. nfe and the totals are of all that was tried.
    """
    n, mask_id = settings['length_candidates'], model.mask_id
    require(settings, ('length_candidates', n >= 1, '1 or more'))
    if n == 1:
        return complete(model, run['objective'], canvases, settings, eos_id, on_step)
    told = run['objective'] not in ('ar', 'uniform') and \
        length_name(settings['length'], run) in ('fit', 'ratio', 'reference')
    require(settings, ('length_candidates', on_step is ignore, '1 to watch or save how one came'),
            ('length_candidates', told, '1 but for masks of a length that is not the '
             "model's to say: fit, ratio, reference"))
    owners, tried = [], []
    for i, canvas in enumerate(canvases):
        least, T = canvas.index(mask_id) + 1, len(canvas)
        sizes = {min(max(T + k - n // 2, least), run['block_size']) for k in range(n)}
        owners += [i] * len(sizes)
        tried += [canvas[:size] + [mask_id] * (size - T) for size in sizes]
    done, totals = complete(model, run['objective'], tried, settings, eos_id, certainty=True)
    best, passes = {}, Counter()
    for i, answer in zip(owners, done):
        passes[i] += answer[1]['nfe']
        if i not in best or answer[1]['log_p'] > best[i][1]['log_p']:
            best[i] = answer
    return [(ids, figures | {'nfe': passes[i]}) for i, (ids, figures) in best.items()], totals


def without_repeated_words(text):
    """text with one of each word that stands twice or more in a row, in capitals or not."""
    word = r"[^\W\d_]+(?:['’][^\W\d_]+)*"
    return re.sub(rf"(?i)(?<![\w'’])({word})(?:\s+\1(?!['’]?\w))+", r'\1', text)


def main():
    settings = config.override(globals())
    check_decoding(settings)
    require(settings, *((name, settings[name] >= 1, '1 or more')
                        for name in ('num_samples', 'batch_size')),
            ('gen_length', 0 <= gen_length < 10 ** 6, '1 to 999,999, as for a blank of a template, '
             'or 0 to fill the context'))
    require(settings, ('save', not save or Path(save).suffix in SAVERS,
                       f'a file ending in one of {", ".join(SAVERS)}'),
            ('watch', not (watch and json), 'False with json'))
    if corrupt:
        return show_corruption(corrupt, out_dir, seed)
    place = pick_device(device)
    checkpoint = load_checkpoint(out_dir, place)
    model, meta = load_model(checkpoint, place), checkpoint['meta']
    tokenizer, objective = load_tokenizer(meta), checkpoint['config']['objective']
    asked = [question for question in what_is_asked(settings) for _ in range(num_samples)]
    canvases, passes, took = canvases_of(asked, model, tokenizer, checkpoint, settings)
    recorder = Recorder(canvases[0], tokenizer, model.mask_id,
                        Screen(watch_delay) if watch else None)
    done, (written, nfe, seconds) = complete_rows(model, checkpoint['config'], canvases, settings,
                                                  meta['eos_id'],
                                                  recorder if watch or save else ignore)
    nfe, seconds = nfe + passes, seconds + took
    for (kind, given), (ids, figures) in zip(asked, done):
        ids = ids if meta['sep_id'] is None else split_row(ids, meta)[1]
        text = tokenizer.decode(ids)
        text = without_repeated_words(text) if cleanup else text
        if json:
            print(dumps({kind: given, 'text': text, 'tokens': ids, **figures, 'seed': seed,
                         'nfe': figures['nfe'] + (passes > 0),  # with the one that predicts
                         'decoder': decoder_name(decoder, objective)}))
        else:
            print(text, '-' * 80, sep='\n')
    if not json:
        print(f'{written} tokens in {nfe} passes and {seconds:.2f} s, '
              f'{written / seconds:,.0f} tokens/s')
    if save:
        name = decoder_name(decoder, objective)
        about = {'title': f'{Path(out_dir).name}, {name}', 'objective': objective, **settings}
        SAVERS[Path(save).suffix](recorder, save, about | {'decoder': name})


if __name__ == '__main__':
    main()
