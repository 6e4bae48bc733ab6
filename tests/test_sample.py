"""sample.py against enumeration, numpy and naive loops, on tiny transformers with random weights.

A fresh Transformer has a zero head, so all its predictions are uniform and most errors would not
show: tiny_model draws every weight. Chi-square tests run with fixed seeds and fail below 1e-4.
"""

import ast
import base64
import collections
import io
import itertools
import json
import math
import re
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

import config
import prepare
import sample
from config import UserError
from model import LocalMixing, MaskedDiffusion, ModelConfig, Transformer, beside_clean, \
    make_objective
from sample import BlockCached, PrefixCached, filter_logits

REPOSITORY = Path(__file__).parents[1]
ORDERS = ('max_prob', 'margin', 'entropy', 'random')


def decoded(decoder, model, x, *, generator, eos_id=None, on_step=None, **settings):
    """(x, nfe) of run_decoder; on_step gets copies of x, to keep."""
    def watch_copies(x, *step):
        on_step(x.clone(), *step)

    return sample.run_decoder(partial(decoder, **settings), model, x, generator, eos_id,
                              watch_copies if on_step else None)


def blocks(model, x, to_generate, rng, *, inner, block_length, steps=None, prefix_cache=False,
           **settings):
    """decode_blocks with a decoder that is given its settings here."""
    cached = BlockCached if model.config.block_length else PrefixCached if prefix_cache else None
    settings |= {} if steps is None else {'steps': steps}
    return sample.decode_blocks(model, x, to_generate, rng, inner=partial(inner, **settings),
                                block_length=model.config.block_length or block_length,
                                steps=steps, cached=cached)


def guided(model, x, to_generate, rng, *, inner, guidance, **settings):
    """decode_guided with a decoder that is given its settings here."""
    return sample.decode_guided(model, x, to_generate, rng, inner=partial(inner, **settings),
                                guidance=guidance)


# The decoders, and each of them run to its end
ar, ancestral, confidence, threshold, remask, remdm, uniform = sample.DECODERS.values()
(decode_ar, decode_ancestral, decode_confidence, decode_threshold, decode_remask, decode_remdm,
 decode_uniform) = (partial(decoded, decoder) for decoder in sample.DECODERS.values())
decode_blocks, decode_guided = partial(decoded, blocks), partial(decoded, guided)

DECODERS = {'ar': lambda model, x, to_generate, rng, steps, **rest: ar(
                model, x, to_generate, rng, **rest),
            'ancestral-linear': partial(ancestral, noise_schedule='linear'),
            'ancestral-cosine': partial(ancestral, noise_schedule='cosine'),
            'remdm-linear': partial(remdm, eta=0.3),
            'remdm-cosine': partial(remdm, noise_schedule='cosine', eta=1.0),
            **{f'{name}-{order}-{counts}': partial(decoder, order=order, counts=counts)
               for name, decoder in (('confidence', confidence), ('remask', remask))
               for order in ORDERS for counts in ('linear', 'cosine')},
            **{f'threshold-{order}': lambda model, x, to_generate, rng, steps, order=order, **rest:
               threshold(model, x, to_generate, rng, threshold=0.4, order=order, **rest)
               for order in ORDERS}}
for name in ('ancestral-linear', 'remdm-linear', 'confidence-max_prob-linear',
             'remask-margin-cosine', 'threshold-max_prob'):
    DECODERS[f'block-{name}'] = partial(blocks, inner=DECODERS[name], block_length=3)
    DECODERS[f'cached-{name}'] = partial(blocks, inner=DECODERS[name], block_length=3,
                                         prefix_cache=True)
    DECODERS[f'guided-{name}'] = partial(guided, inner=DECODERS[name], guidance=1.5)
DECODERS['guided-block'] = partial(guided, guidance=0.5, inner=partial(
    blocks, inner=confidence, block_length=2))
TAKES_BACK = [name for name in DECODERS if 'remdm' in name or 'remask' in name]
repeatable = partial(settings, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    """The models are so small that threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_model(causal=False, V=5, T=8, seed=0, **shape):
    """A Transformer of V - 1 real tokens and the mask, context T, every weight drawn at random."""
    shape = {'n_layer': 2, 'n_head': 2, 'n_embd': 16} | shape
    model = Transformer(ModelConfig(V, T, causal, **shape)).eval()
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.normal_(0, 0.6, generator=generator)
    return model


def noise_source(seed=0):
    return torch.Generator().manual_seed(seed)


def predictions(model, x, t=None):
    """softmax of the logits (T, V) for one row x, a sequence of ids, by an ordinary full pass."""
    with torch.no_grad():
        logits = model(torch.tensor([list(x)]), None if t is None else torch.tensor([[t]]))
    return logits[0].double().softmax(-1).numpy()


def p_value(counts, p):
    """Of a chi-square test of counts against the probabilities p; both are dicts over outcomes."""
    n = sum(counts.values())
    assert all(p.get(outcome, 0) > 0 for outcome in counts), 'an impossible outcome was drawn'
    bins = [(counts.get(outcome, 0), n * q) for outcome, q in p.items() if n * q >= 5]
    rest = n - sum(seen for seen, _ in bins), n - sum(expected for _, expected in bins)
    bins += [rest] if rest[1] >= 5 else []
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in bins)
    return torch.special.gammaincc(torch.tensor((len(bins) - 1) / 2).double(),
                                   torch.tensor(statistic / 2).double()).item()


def tally(x):
    return collections.Counter(map(tuple, x.tolist()))


# sample_token


def draw(logits, seen=None, *, generator, **sampling):
    """A token and the model's probability of it; rows hold the tokens `seen` (M, V) and masks."""
    M, V = logits.shape
    x = torch.full((M, V), V - 1) if seen is None else torch.where(seen, torch.arange(V), V - 1)
    where = torch.arange(V).expand(M, V) == 0
    token = sample.sample_token(logits, x, where, generator, specials=[V - 1], **sampling)
    return token, sample.token_confidence('max_prob', logits, token, generator)



def distribution(logits, seen, temperature, top_k, top_p, repetition_penalty):
    """What sample_token samples from, in plain numpy: penalty, temperature, top_k, top_p."""
    z = np.array(logits, dtype=float)
    for i in np.flatnonzero(seen):
        z[i] = z[i] / repetition_penalty if z[i] > 0 else z[i] * repetition_penalty
    z /= temperature
    ranked = sorted(range(len(z)), key=lambda i: -z[i])[:top_k or None]
    p = np.exp(z[ranked] - z.max())
    p /= p.sum()
    n, held = 0, 0.0
    while n < len(ranked) and held < top_p:
        held, n = held + p[n], n + 1
    return dict(zip(ranked[:n], p[:n] / p[:n].sum()))


@pytest.mark.parametrize('sampling', [
    {}, {'temperature': 0.5}, {'temperature': 3.0}, {'top_k': 2}, {'top_k': 3, 'temperature': 2.0},
    {'top_p': 0.7}, {'top_p': 0.95, 'temperature': 0.3}, {'top_k': 4, 'top_p': 0.9},
    {'repetition_penalty': 1.8}, {'repetition_penalty': 0.6, 'temperature': 0.8},
    {'repetition_penalty': 2.5, 'top_k': 2, 'top_p': 0.99, 'temperature': 1.3}])
def test_frequencies_are_those_of_the_closed_form(sampling):
    logits, seen = [1.2, -0.4, 0.9, -8.0, 0.1, -math.inf], [True, True, False, False, True, False]
    sampling = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'repetition_penalty': 1.0} | sampling
    token, _ = draw(torch.tensor([logits] * 200_000),
                    torch.tensor([seen] * 200_000), generator=noise_source(), **sampling)
    expected = distribution(logits, seen, **sampling)
    assert p_value(collections.Counter(token.tolist()), expected) > 1e-4
    assert (3 in expected) == (5 not in expected and sampling['top_k'] == 0
                               and sampling['top_p'] == 1)  # the token of p = 5e-5 is there


def test_tokens_are_sampled_in_float64(monkeypatch):
    """A token of probability 1e-60 can win. float32 has no such number, and no noise below 6e-8."""
    def noise(self, generator):
        assert self.dtype == torch.float64
        return self.copy_(torch.tensor([1.0, 1e-61]))

    monkeypatch.setattr(torch.Tensor, 'exponential_', noise)
    logits = torch.tensor([[0.0, math.log(1e-60)]])
    assert draw(logits, generator=noise_source())[0].item() == 1


@repeatable(max_examples=100)
@given(logits=st.lists(st.integers(-500, 500), min_size=2, max_size=9, unique=True),
       top_k=st.integers(0, 10), top_p=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_top_k_and_top_p_keep_exactly_the_right_set(logits, top_k, top_p, seed):
    logits = [z / 100 for z in logits]
    right = distribution(logits, [], 1.0, top_k, top_p, 1.0)
    for nearly in (top_p - 1e-9, top_p + 1e-9):  # on the edge both answers are right
        other = distribution(logits, [], 1.0, top_k, min(nearly, 1.0), 1.0)
        assume(other.keys() == right.keys())
    kept = sample.filter_logits(torch.tensor([logits]).double(), top_k, top_p)[0]
    assert set(kept.isfinite().nonzero().flatten().tolist()) == right.keys()
    assert all(kept[i].item() == pytest.approx(logits[i]) for i in right)
    token, _ = draw(torch.tensor([logits] * 300), generator=noise_source(seed), top_k=top_k,
                    top_p=top_p)
    assert set(token.tolist()) <= right.keys()


@repeatable(max_examples=50)
@given(seed=st.integers(0, 10_000), penalty=st.floats(0.3, 4.0))
def test_temperature_0_takes_the_likeliest_token_after_the_penalty(seed, penalty):
    logits = torch.randn(4, 6, generator=noise_source(seed))
    seen = torch.rand(4, 6, generator=noise_source(seed + 1)) < 0.5
    seen[:, -1] = False  # the mask's row
    token, _ = draw(logits, seen, generator=noise_source(), temperature=0,
                    repetition_penalty=penalty)
    for row, z in enumerate(logits.double().numpy()):
        z = np.where(seen[row], np.where(z > 0, z / penalty, z * penalty), z)
        assert token[row] == z.argmax()
    plain, _ = draw(logits, generator=noise_source(), temperature=0, top_k=2, top_p=0.1)
    assert torch.equal(plain, logits.argmax(-1))


def test_specials_are_not_repeated_text():
    """Neither less likely where the row has them, nor anything else where it has not."""
    logits = torch.randn(40, 7, generator=noise_source(5))
    seen = torch.rand(40, 7, generator=noise_source(6)) < 0.7
    x, where = torch.where(seen, torch.arange(7), 6), torch.arange(7).expand(40, 7) == 0
    p = sample.probabilities(logits, x, where, repetition_penalty=1.7, specials=[2, 4, 6])
    for row in range(40):
        punished = [i in (0, 1, 3, 5) and bool(seen[row, i]) for i in range(7)]
        wanted = distribution(logits[row], punished, 1.0, 0, 1.0, 1.7)
        assert p[row].tolist() == pytest.approx([wanted[i] for i in range(7)])


def test_the_probability_is_the_models_own():
    """Confidence is read off it, so no setting of the draw may change it."""
    logits = torch.randn(50, 7, generator=noise_source(3))
    seen = torch.rand(50, 7, generator=noise_source(4)) < 0.5
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    for temperature in (0, 0.2, 1.0, 4.0):
        token, probability = draw(logits, seen, generator=noise_source(), top_k=4,
                                  temperature=temperature, top_p=0.8, repetition_penalty=1.7)
        assert probability.numpy() == pytest.approx(p[np.arange(50), token.numpy()], rel=1e-5)


# What holds for every decoder

# Learned positions: with rope every mask of an all-mask canvas gets the same prediction, so that
# which is the most confident would be a matter of rounding.
TOKEN_MODELS = {'ar': tiny_model(causal=True, seed=1), 'mdm': tiny_model(seed=2, pos='learned')}
MASK = 4


def model_for(decoder):
    return TOKEN_MODELS['ar' if decoder == 'ar' else 'mdm']


@st.composite
def canvases(draw_from, max_rows=3):
    """x (B, T): masks anywhere, everywhere or nowhere."""
    B, T = draw_from(st.integers(1, max_rows)), draw_from(st.integers(1, 8))
    ids = draw_from(st.sampled_from([st.integers(0, MASK - 1), st.integers(0, MASK),
                                     st.sampled_from([MASK, MASK, 0, 1, 2, 3]), st.just(MASK)]))
    return torch.tensor(draw_from(st.lists(st.lists(ids, min_size=T, max_size=T),
                                           min_size=B, max_size=B)))


@pytest.mark.parametrize('decoder', DECODERS)
@repeatable(max_examples=20)
@given(x=canvases(), steps=st.integers(1, 12), seed=st.integers(0, 999), sampling=st.sampled_from(
    [{}, {'temperature': 0}, {'repetition_penalty': 1.5, 'temperature': 0.7},
     {'top_k': 1}, {'top_k': 3, 'top_p': 0.8}]))
def test_every_decoder_keeps_its_promises(decoder, x, steps, seed, sampling):
    model, canvas, recorded, calls = model_for(decoder), x.clone(), [], []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    decode = partial(decoded, DECODERS[decoder], model, x, steps=steps, **sampling)
    y, nfe = decode(generator=noise_source(seed),
                    on_step=lambda x, nfe, where, logits: recorded.append((x.clone(), nfe, where)))
    hook.remove()
    assert torch.equal(x, canvas), 'the canvas that came in is the caller\'s'
    assert torch.equal(y[x != MASK], x[x != MASK]), 'a given token was changed'
    assert y.shape == x.shape and y.min() >= 0 and y.max() < MASK, 'a mask is left'
    assert nfe == len(calls) and (nfe > 0) == bool((x == MASK).any())
    assert torch.equal(decode(generator=noise_source(seed))[0], y)

    passes = [n for _, n, _ in recorded]
    each = 2 if decoder.startswith('guided') else 1
    if 'remdm' in decoder:  # its steps may take back only, without a pass
        assert sorted(set(passes)) == list(range(each, nfe + 1, each)) and passes == sorted(passes)
    else:
        assert passes == list(range(each, nfe + 1, each))
    states = [x] + [step for step, *_ in recorded]
    assert torch.equal(states[-1], y)
    for before, after, (*_, where) in zip(states, states[1:], recorded):
        was, still = before == MASK, after == MASK
        assert not (where & ~was).any() and not (was & ~still & ~where).any()
        assert torch.equal(after[x != MASK], x[x != MASK])
        if decoder not in TAKES_BACK:
            assert still.sum() < was.sum() and not (still & ~was).any()
            assert torch.equal(before[~was], after[~was]), 'a token was written twice'


@pytest.mark.parametrize('decoder', [name for name in DECODERS if 'cached' not in name])
def test_watch_gets_what_was_predicted(decoder):
    """where and logits (N, V), in row-major order: those of a full pass over the canvas before."""
    model, seen = model_for(decoder), 0
    x = torch.tensor([[4, 0, 4, 4, 2, 4, 4], [1, 4, 4, 0, 4, 4, 3], [1, 0, 2, 0, 3, 3, 3]])
    states = [x]

    def check(x, nfe, where, logits):
        nonlocal seen
        assert (where.shape, where.dtype) == (x.shape, torch.bool)
        assert logits.shape == (where.sum(), MASK + 1)
        before = states[-1]
        states.append(x.clone())
        seen += len(logits)
        if decoder == 'ar':
            before = torch.cat([torch.full_like(x[:, :1], MASK), before[:, :-1]], dim=1)
        whole = model(before)
        if decoder.startswith('guided'):
            blind = model(torch.where(states[0] != MASK, MASK, before))
            whole = blind + (1.5 if decoder != 'guided-block' else 0.5) * (whole - blind) + (
                whole - blind)
        assert torch.allclose(logits[:, :MASK], whole[where][:, :MASK], atol=1e-4)
        assert (logits[:, MASK] == -torch.inf).all()

    decoded(DECODERS[decoder], model, x, steps=5, generator=noise_source(), on_step=check)
    assert seen >= (x == MASK).sum()


@pytest.mark.parametrize('decoder', ['ar'] + [
    name for name in DECODERS if re.match('(.*-)?(confidence|threshold|remask)', name)
    and 'random' not in name])
@repeatable(max_examples=12)
@given(x=canvases(max_rows=4), steps=st.integers(0, 10))
def test_a_greedy_row_does_not_depend_on_the_others(decoder, x, steps):
    if re.match('block|cached', decoder):  # rows of a batch share their blocks
        x[:, 0] = x[:, -1] = MASK
    decode = partial(decoded, DECODERS[decoder], model_for(decoder), steps=steps, temperature=0,
                     repetition_penalty=1.2, generator=noise_source())
    together, _ = decode(x)
    alone = torch.cat([decode(row[None])[0] for row in x])
    assert torch.equal(together, alone)


# The distribution of the text, by enumeration: 3 positions, 2 letters, 20,000 rows

ROWS, LENGTH, LETTERS = 20_000, 3, 2
BLANK_ROW = (LETTERS,) * LENGTH


def chain(steps, start=BLANK_ROW):
    """{text: probability} after a Markov chain; a step maps a canvas to {canvas: probability}."""
    states = {start: 1.0}
    for step in steps:
        after = collections.defaultdict(float)
        for x, p in states.items():
            for y, q in step(x).items():
                after[y] += p * q
        states = after
    assert sum(states.values()) == pytest.approx(1)
    return dict(states)


def reverse_step(model, alpha_t, alpha_s, temperature, x, eta=0.0, fillable=range(LENGTH), t=None):
    """{canvas: probability} of one reverse step: every fillable position moves on its own."""
    p = predictions(model, x, 1 - alpha_t if t is None else t)[:, :LETTERS] ** (1 / temperature)
    p /= p.sum(1, keepdims=True)
    sigma = min(eta, 1.0, (1 - alpha_s) / alpha_t if alpha_t else 1.0)
    reveal = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
    choices = [[(token, 1.0)] if i not in fillable else
               [(LETTERS, 1 - reveal), *((v, reveal * p[i, v]) for v in range(LETTERS))]
               if token == LETTERS else [(token, 1 - sigma), (LETTERS, sigma)]
               for i, token in enumerate(x)]
    after = collections.defaultdict(float)
    for ys in itertools.product(*choices):
        after[tuple(v for v, _ in ys)] += math.prod(q for _, q in ys)
    return {y: q for y, q in after.items() if q > 0}


ALPHA = {'linear': lambda t: 1 - t, 'cosine': lambda t: 1 - math.sin(math.pi / 2 * t)}


def reverse_chain(model, N, schedule, temperature=1.0, start=BLANK_ROW, eta=0.0, steps=None,
                  cool=0.0):
    """After `steps` of N steps, by default all of them."""
    alpha, fillable = ALPHA[schedule], [i for i, token in enumerate(start) if token == LETTERS]
    return chain([partial(reverse_step, model, alpha(n / N), alpha((n - 1) / N),
                          temperature * (1 + cool - 2 * cool * alpha(n / N)),
                          eta=eta, fillable=fillable,
                          t=(1 - alpha(n / N)) * len(fillable) / len(start))
                  for n in range(N, N - (steps or N), -1)], start)


@pytest.mark.parametrize('time_cond', [False, True])
@pytest.mark.parametrize('N, schedule, temperature, start', [
    (1, 'linear', 1.0, BLANK_ROW), (2, 'linear', 1.0, BLANK_ROW), (3, 'linear', 0.6, BLANK_ROW),
    (3, 'cosine', 1.0, BLANK_ROW), (2, 'cosine', 1.0, (LETTERS, 1, LETTERS))])
def test_ancestral_follows_the_reverse_chain(time_cond, N, schedule, temperature, start):
    model = tiny_model(V=LETTERS + 1, T=LENGTH, seed=7, time_cond=time_cond)
    y, _ = decode_ancestral(model, torch.tensor([start] * ROWS), steps=N, noise_schedule=schedule,
                            temperature=temperature, generator=noise_source(N))
    assert p_value(tally(y), reverse_chain(model, N, schedule, temperature, start)) > 1e-4
    if start == BLANK_ROW and N > 1:  # the test can tell this chain from its neighbours
        other = {'linear': 'cosine', 'cosine': 'linear'}[schedule]
        for wrong in (reverse_chain(model, N - 1, schedule, temperature),
                      *([reverse_chain(model, N, other, temperature)] if time_cond else [])):
            assert p_value(tally(y), wrong) < 1e-6


@pytest.mark.parametrize('N, schedule, eta, start, cool', [
    (3, 'linear', 0.0, BLANK_ROW, 0.0), (3, 'linear', 0.3, BLANK_ROW, 0.0),
    (4, 'linear', 1.0, BLANK_ROW, 0.0), (4, 'cosine', 0.4, BLANK_ROW, 0.6),
    (4, 'linear', 0.7, (LETTERS, 1, LETTERS), 0.9)])
def test_remdm_follows_its_chain_step_by_step(N, schedule, eta, start, cool):
    """After every step; and the share of masks is 1 - alpha, whatever eta is."""
    model = tiny_model(V=LETTERS + 1, T=LENGTH, seed=7, time_cond=True)
    recorded = [torch.tensor([start] * ROWS)]
    y, _ = decode_remdm(model, recorded[0], steps=N, noise_schedule=schedule, eta=eta, cool=cool,
                        generator=noise_source(N + 1), on_step=lambda x, *_: recorded.append(x))
    assert len(recorded) == N + 1 and torch.equal(recorded[-1], y)
    moves = [tally(torch.cat(pair, dim=1)) for pair in zip(recorded, recorded[1:])]

    def expected(n, eta, cool=cool):  # of the canvases before and after step n, put together
        before = {start: 1.0}
        if n > 1:
            before = reverse_chain(model, N, schedule, 1.0, start, eta, n - 1, cool)
        alpha, masks = ALPHA[schedule], [i for i, v in enumerate(start) if v == LETTERS]
        return {x + y: p * q for x, p in before.items() for y, q in reverse_step(
            model, alpha(1 - (n - 1) / N), alpha(1 - n / N),
            1 + cool - 2 * cool * alpha(1 - (n - 1) / N), x, eta, masks,
            (1 - alpha(1 - (n - 1) / N)) * len(masks) / LENGTH).items()}

    for n, seen in enumerate(moves, 1):
        assert p_value(seen, expected(n, eta)) > 1e-4
        share = sum(p * pair[LENGTH:].count(LETTERS) for pair, p in expected(n, eta).items())
        assert share == pytest.approx(start.count(LETTERS) * (1 - ALPHA[schedule](1 - n / N)))
    if cool:
        assert min(p_value(moves[n - 1], expected(n, eta, 0.0)) for n in range(1, N + 1)) < 1e-6
    if eta:
        assert min(p_value(moves[n - 1], expected(n, eta / 2)) for n in range(2, N + 1)) < 1e-6
        assert any((a != LETTERS).logical_and(b == LETTERS).any()
                   for a, b in zip(recorded, recorded[1:]))


@pytest.mark.parametrize('eta', [0.0, 0.5])
def test_blocks_of_the_reverse_process_follow_their_chains(eta):
    """Blocks of 2 and 1, with 3 and 2 of 5 steps; t is of the canvas, with the masks to come."""
    model = tiny_model(V=LETTERS + 1, T=LENGTH, seed=7, time_cond=True)
    y, _ = decode_blocks(model, torch.tensor([BLANK_ROW] * ROWS), inner=remdm, eta=eta,
                        block_length=2, steps=5, generator=noise_source(3))
    steps = [partial(reverse_step, model, 1 - n / 3, 1 - (n - 1) / 3, 1.0, eta=eta,
                     fillable=(0, 1), t=1 - (1 - n / 3) * 2 / 3) for n in (3, 2, 1)]
    steps += [partial(reverse_step, model, 1 - n / 2, 1 - (n - 1) / 2, 1.0, eta=eta, fillable=(2,),
                      t=n / 2 / 3) for n in (2, 1)]
    assert p_value(tally(y), chain(steps)) > 1e-4
    whole = reverse_chain(model, 5, 'linear', eta=eta)
    assert p_value(tally(y), whole) < 1e-6


def whole_posterior(alpha_t, alpha_s, i, p, noise):
    """q(xs | xt = i, x0 ~ p) by Bayes' rule, from matrices; noise (V,): what corrupts a token."""
    stay, V = alpha_t / alpha_s, len(p)
    step = stay * np.eye(V) + (1 - stay) * np.ones((V, 1)) * noise  # q(xt | xs), rows sum to 1
    joint = (alpha_s * p + (1 - alpha_s) * noise) * step[:, i]
    return joint / joint.sum()


def posterior_step(model, alpha_t, alpha_s, temperature, noise, x, fillable, share=1.0):
    """{canvas: probability} of one reverse step by the whole posterior, whatever the noise is."""
    p, V = predictions(model, x, share * (1 - alpha_t)), len(noise)
    p = p[:, :V] ** (1 / temperature)
    p /= p.sum(1, keepdims=True)
    choices = [[(token, 1.0)] if i not in fillable else
               list(enumerate(whole_posterior(alpha_t, alpha_s, token, p[i], noise)))
               for i, token in enumerate(x)]
    after = collections.defaultdict(float)
    for ys in itertools.product(*choices):
        after[tuple(v for v, _ in ys)] += math.prod(q for _, q in ys)
    return after


def may_predict_masks(model):
    """The model with a finite logit of the mask, as d3pm trains it with subs=False."""
    model.config.subs, model.logits = False, lambda h: model.head(h)
    return model


def only_letters(states):
    """Given that no mask is left: {text: probability}."""
    real = {x: p for x, p in states.items() if LETTERS not in x}
    return {x: p / sum(real.values()) for x, p in real.items()}


@pytest.mark.parametrize('time_cond', [False, True])
@pytest.mark.parametrize('N, schedule', [(1, 'linear'), (3, 'linear'), (4, 'cosine')])
def test_d3pm_may_predict_the_mask(time_cond, N, schedule):
    """Each step by Bayes' rule with a prediction that includes the mask, the last one without."""
    model = may_predict_masks(tiny_model(V=LETTERS + 1, T=LENGTH, seed=7, time_cond=time_cond))
    recorded = []
    y, _ = decode_ancestral(model, torch.tensor([BLANK_ROW] * ROWS), steps=N,
                            noise_schedule=schedule, generator=noise_source(N),
                            on_step=lambda x, *_: recorded.append(x))
    states, alpha = {BLANK_ROW: 1.0}, ALPHA[schedule]
    for n in range(N, 0, -1):
        after = collections.Counter()
        for x, q in states.items():
            fillable = [i for i, v in enumerate(x) if v == LETTERS]
            moved = posterior_step(model, alpha(n / N), alpha((n - 1) / N), 1.0,
                                   np.eye(LETTERS + 1)[LETTERS], x, fillable)
            for z, r in (only_letters(moved) if n == 1 else moved).items():
                after[z] += q * r
        states = after
        assert p_value(tally(recorded[N - n]), states) > 1e-4
    assert torch.equal(y, recorded[-1]) and (y != LETTERS).all()
    if N > 1:  # the test can tell: by p(x0 | xt) alone fewer masks would be left
        model.config.subs = True
        first = []
        decode_ancestral(model, torch.tensor([BLANK_ROW] * ROWS), steps=N, noise_schedule=schedule,
                         generator=noise_source(N), on_step=lambda x, *_: first.append(x))
        assert (first[-2] == LETTERS).sum() < (recorded[-2] == LETTERS).sum()


@pytest.mark.parametrize('subs', [True, False])
def test_remdm_without_remasking_is_ancestral(subs):
    model, x = tiny_model(seed=2, time_cond=True), torch.full((20, 8), MASK)
    model = model if subs else may_predict_masks(model)
    once, again = (decoder(model, x, steps=6, generator=noise_source(), **eta) for decoder, eta in (
        (decode_ancestral, {}), (decode_remdm, {'eta': 0.0})))
    assert torch.equal(once[0], again[0]) and once[1] == again[1]


def test_the_temperature_falls_without_remasking_too(monkeypatch):
    used, real = [], sample.sample_token
    monkeypatch.setattr(sample, 'sample_token', lambda *args, temperature, **how: (
        used.append(temperature), real(*args, temperature=temperature, **how))[1])
    decode_remdm(tiny_model(), torch.full((20, 8), MASK), steps=5, eta=0.0, cool=0.5,
                 temperature=0.8, generator=noise_source())
    assert used == pytest.approx([0.8 * (1.5 - n / 5) for n in range(5)])


@pytest.mark.parametrize('decoder', [
    partial(decode_confidence, steps=4), partial(decode_threshold, threshold=0.5),
    partial(decode_remask, steps=4), partial(decode_remdm, steps=6, eta=0.3),
    partial(decode_ancestral, steps=6), partial(decode_guided, guidance=1.0, inner=partial(
        ancestral, steps=6)), partial(decode_blocks, inner=ancestral, steps=6,
                                             block_length=2, prefix_cache=True)])
def test_no_mask_is_left_where_the_mask_may_be_predicted(decoder):
    model = may_predict_masks(tiny_model(seed=2))
    model.head.weight.data[-1] *= 5
    x = torch.full((20, 8), MASK)
    x[:, 3] = 1
    for temperature in (0, 1.0):
        y, _ = decoder(model, x, temperature=temperature, generator=noise_source(),
                       on_step=lambda *step: step[3][:, MASK].max() == -torch.inf or 1 / 0)
        assert (y != MASK).all() and (y[:, 3] == 1).all()


def test_guidance_leaves_the_mask_its_probability_where_it_may_be_predicted():
    """decode_ancestral reads it off, to reveal as many masks as D3PM does."""
    model, x = may_predict_masks(tiny_model(seed=2)), torch.tensor([[1, MASK, 2, MASK]])
    guided_model = sample.Guided(model, x != MASK, 0.0)
    with torch.no_grad():
        expected = model(x, where=x == MASK)
        assert torch.allclose(guided_model(x, where=x == MASK), expected, atol=1e-5)
    assert expected[:, MASK].isfinite().all()


@pytest.mark.parametrize('decoder', [
    partial(decode_confidence, steps=0), partial(decode_confidence, steps=2),
    partial(decode_threshold, threshold=0.5), partial(decode_remask, steps=2)])
def test_a_model_that_is_confident_of_nothing_fills_its_canvas_too(decoder):
    """The logits of a fresh model tie, so that all margins are 0, and 0 has the logit -inf."""
    model = tiny_model(seed=2)
    model.head.weight.data.zero_()
    x = torch.tensor([[1, MASK, MASK, 2, MASK], [MASK, 0, MASK, MASK, 3]])
    y, nfe = decoder(model, x, order='margin', generator=noise_source())
    assert (y != MASK).all() and nfe <= 3


# Uniform noise

UNIFORM_K = 3


@pytest.mark.parametrize('N, schedule, temperature, given', [
    (1, 'linear', 1.0, None), (2, 'linear', 1.0, None), (3, 'cosine', 0.6, None),
    (4, 'linear', 1.0, None), (3, 'linear', 1.0, 2)])
def test_uniform_follows_the_reverse_chain(N, schedule, temperature, given):
    """T = 2, V' = 3, after every step: from uniform noise on, all that is generated moves."""
    model, recorded = tiny_model(V=UNIFORM_K + 1, T=2, seed=7, time_cond=True), []
    x = torch.full((ROWS, 2), UNIFORM_K)
    generated = [0, 1] if given is None else [0]
    x[:, 1] = UNIFORM_K if given is None else given
    y, nfe = decode_uniform(model, x, steps=N, noise_schedule=schedule, temperature=temperature,
                            generator=noise_source(N), on_step=lambda x, *_: recorded.append(x))
    assert nfe == N == len(recorded) and torch.equal(recorded[-1], y)
    letters = range(UNIFORM_K)
    texts = list(itertools.product(letters, letters if given is None else [given]))
    states, alpha = dict.fromkeys(texts, 1 / len(texts)), ALPHA[schedule]
    for n in range(N, 0, -1):
        after = collections.Counter()
        for z, q in states.items():
            for z2, r in posterior_step(model, alpha(n / N), alpha((n - 1) / N), temperature,
                                        np.full(UNIFORM_K, 1 / UNIFORM_K), z, generated,
                                        len(generated) / 2).items():
                after[z2] += q * r
        states = after
        assert p_value(tally(recorded[N - n]), states) > 1e-4


class Optimal:
    """The best predictor for known texts: p(x0_i | the other corrupted tokens), by enumeration.

    The one whose reverse chain is exact in the limit of many steps: it leaves its own token to the
    posterior [Duo's and UDLM's bound is least there].
    """

    def __init__(self, p):
        self.p, self.mask_id = p, UNIFORM_K  # p (K, K), of texts of two tokens
        self.config, self.embed = ModelConfig(UNIFORM_K + 1, 2), None

    def __call__(self, x, t, *, where):
        alpha, both = 1 - t[0, 0].item(), torch.empty(len(x), 2, UNIFORM_K + 1)
        keep = alpha * torch.eye(UNIFORM_K) + (1 - alpha) / UNIFORM_K  # (x0, xt)
        both[:, 0, :UNIFORM_K] = (self.p @ keep).T[x[:, 1]].log()
        both[:, 1, :UNIFORM_K] = (self.p.T @ keep).T[x[:, 0]].log()
        both[:, :, UNIFORM_K] = -torch.inf
        return both[where]


def test_the_best_uniform_model_writes_the_texts_it_knows():
    """Chi-square against the data itself; tokens that do not match are mended along the way."""
    p = torch.tensor([[0.3, 0.01, 0.02], [0.02, 0.25, 0.05], [0.01, 0.04, 0.3]])
    x, recorded = torch.full((8000, 2), UNIFORM_K), []
    y, _ = decode_uniform(Optimal(p), x, steps=150, generator=noise_source(),
                          on_step=lambda x, *_: recorded.append(x))
    data = {(i, j): p[i, j].item() for i in range(UNIFORM_K) for j in range(UNIFORM_K)}
    assert p_value(tally(y), data) > 1e-4
    at_once, _ = decode_uniform(Optimal(p), x, steps=1, generator=noise_source())
    assert p_value(tally(at_once), data) < 1e-6
    halfway = recorded[75]
    assert ((halfway != y).any(1) & (halfway[:, 0] != halfway[:, 1])).float().mean() > 0.1


def test_a_penalty_is_not_for_the_token_that_is_sampled_anew():
    """What a place holds while it may still change is no token that the text holds already."""
    class Sure(Optimal):
        def __call__(self, x, t, *, where):  # of the token i at place i
            logits = torch.full((2, UNIFORM_K + 1), -5.0)
            logits[0, 0] = logits[1, 1] = 4.0
            logits[:, 2] = 3.0
            return logits.expand(len(x), 2, UNIFORM_K + 1)[where].clone()

    y, _ = decode_uniform(Sure(None), torch.full((200, 2), UNIFORM_K), steps=20, temperature=0,
                          repetition_penalty=2.0, generator=noise_source())
    assert torch.equal(y, torch.tensor([[0, 1]]).expand(200, 2))


def test_corrupting_a_text_of_no_tokens_is_refused():
    run = types.SimpleNamespace(objective=sample.MaskedDiffusion(),
                                model=types.SimpleNamespace(device='cpu'),
                                tokenizer=types.SimpleNamespace(encode=lambda text: []))
    with pytest.raises(UserError, match='a text that has tokens'):
        sample.show_corruption(run, ' ', 1)


@repeatable(max_examples=30)
@given(x=canvases(), steps=st.integers(1, 8), seed=st.integers(0, 999), eos=st.sampled_from(
    [None, 2]), sampling=st.sampled_from([{}, {'temperature': 0}, {'top_k': 1},
                                         {'repetition_penalty': 1.5, 'top_p': 0.8}]))
def test_uniform_keeps_its_promises(x, steps, seed, eos, sampling):
    model, canvas, recorded, calls = model_for('mdm'), x.clone(), [], []
    hook = model.register_forward_hook(
        lambda _, words, out: calls.append(([word.clone() for word in words], out)))
    decode = partial(decode_uniform, model, x, steps=steps, eos_id=eos, **sampling)
    y, nfe = decode(generator=noise_source(seed), on_step=lambda *step: recorded.append(step))
    hook.remove()
    assert torch.equal(x, canvas) and torch.equal(y[x != MASK], x[x != MASK])
    assert y.shape == x.shape and y.min() >= 0 and y.max() < MASK, 'a mask is left'
    assert nfe == len(calls) == len(recorded) == steps * bool((x == MASK).any())
    assert torch.equal(decode(generator=noise_source(seed))[0], y)
    for n, (((read, t), out), (after, count, where, logits)) in enumerate(zip(calls, recorded)):
        assert torch.equal(where, x == MASK) and count == n + 1 and logits is out
        share = (x == MASK).float().mean(1, keepdim=True)
        torch.testing.assert_close(t, share * (1 - n / steps), atol=1e-6, rtol=0)
        assert torch.equal(read[x != MASK], x[x != MASK]) and (read != MASK).all()
        assert n == 0 or torch.equal(read, recorded[n - 1][0])
    if recorded:
        assert torch.equal(recorded[-1][0], y)
    if eos is not None:
        assert torch.equal(y, ended(y, x, eos, MASK))
    if sampling == {'temperature': 0} and recorded and eos is None:
        best = recorded[-1][3].argmax(-1)
        assert torch.equal(y[x == MASK], best), 'the last step is greedy'


def test_uniform_rows_read_only_themselves():
    """The other row's given text changes nothing: the random numbers of a row are its own."""
    model, x = model_for('mdm'), torch.full((2, 8), MASK)
    x[:, :2] = torch.tensor([[1, 2], [3, 0]])
    other = x.clone()
    other[1, :2] = torch.tensor([0, 0])
    for temperature in (0, 0.8):
        a, b = (decode_uniform(model, rows, steps=6, temperature=temperature,
                               generator=noise_source(1))[0] for rows in (x, other))
        assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])


def any_order_average(model):
    """Mean over all orders of prod p(x_i | the x before it in this order)."""
    average = collections.defaultdict(float)
    for order in itertools.permutations(range(LENGTH)):
        for text in itertools.product(range(LETTERS), repeat=LENGTH):
            x, p = list(BLANK_ROW), 1 / math.factorial(LENGTH)
            for i in order:
                p *= predictions(model, x)[i, text[i]]
                x[i] = text[i]
            average[text] += p
    return dict(average)


def test_one_token_at_a_time_is_the_average_over_all_orders():
    """Exactly so for random order, and in the limit of many steps for ancestral sampling."""
    model = tiny_model(V=LETTERS + 1, T=LENGTH, seed=7)
    average = any_order_average(model)
    y, nfe = decode_confidence(model, torch.tensor([BLANK_ROW] * ROWS), steps=LENGTH,
                               order='random', generator=noise_source())
    assert nfe == LENGTH and p_value(tally(y), average) > 1e-4
    y, _ = decode_ancestral(model, torch.tensor([BLANK_ROW] * 5000), steps=100,
                            generator=noise_source())
    assert p_value(tally(y), average) > 1e-4
    at_once, _ = decode_ancestral(model, torch.tensor([BLANK_ROW] * 5000), steps=1,
                                  generator=noise_source())
    assert p_value(tally(at_once), average) < 1e-6


def confident_step(model, order, x):
    """{canvas: probability}: a token for every mask, of which the most confident stays."""
    p, masked = predictions(model, x), [i for i, token in enumerate(x) if token == LETTERS]
    after = collections.defaultdict(float)
    for tokens in itertools.product(range(LETTERS), repeat=len(masked)):
        drawn = dict(zip(masked, tokens))
        score = {'max_prob': lambda i: p[i, drawn[i]], 'margin': lambda i: np.ptp(p[i, :LETTERS]),
                 'entropy': lambda i: np.exp(p[i, :LETTERS] @ np.log(p[i, :LETTERS]))}[order]
        best = max(masked, key=score)
        y = x[:best] + (drawn[best],) + x[best + 1:]
        after[y] += math.prod(p[i, v] for i, v in drawn.items())
    return after


@pytest.mark.parametrize('order', ORDERS[:3])
def test_confidence_draws_for_all_and_keeps_the_most_confident(order):
    """At temperature 1 max_prob scores the token that was drawn, not the likeliest one."""
    model = tiny_model(V=LETTERS + 1, T=LENGTH, seed=7, pos='learned')
    y, _ = decode_confidence(model, torch.tensor([BLANK_ROW] * ROWS), steps=LENGTH, order=order,
                             generator=noise_source())
    assert p_value(tally(y), chain([partial(confident_step, model, order)] * LENGTH)) > 1e-4
    assert p_value(tally(y), any_order_average(model)) < 1e-6


def remask_step(model, keep, state):
    """One step over {(token, its probability when drawn) at each position: probability}."""
    p = predictions(model, tuple(token for token, _ in state))
    masked, after = [i for i, (v, _) in enumerate(state) if v == LETTERS], collections.Counter()
    for tokens in itertools.product(range(LETTERS), repeat=len(masked)):
        new = list(state)
        for i, v in zip(masked, tokens):
            new[i] = v, p[i, v]
        for i in sorted(range(LENGTH), key=lambda i: -new[i][1])[keep:]:
            new[i] = LETTERS, 0.0
        after[tuple(new)] += math.prod(p[i, v] for i, v in zip(masked, tokens))
    return after


def test_remask_keeps_the_most_confident_of_old_and_new():
    """Three steps, the distribution after each; what was kept before may be masked again."""
    model, recorded = tiny_model(V=LETTERS + 1, T=LENGTH, seed=14, pos='learned'), []
    decode_remask(model, torch.tensor([BLANK_ROW] * ROWS), steps=3, generator=noise_source(1),
                  on_step=lambda x, *_: recorded.append(x))
    for n in (1, 2, 3):
        right = collections.Counter()
        states = chain([partial(remask_step, model, keep) for keep in range(1, n + 1)],
                       ((LETTERS, 0.0),) * LENGTH)
        for state, q in states.items():
            right[tuple(token for token, _ in state)] += q
        assert p_value(tally(recorded[n - 1]), right) > 1e-4
    assert ((recorded[0] != LETTERS) & (recorded[1] == LETTERS)).any()
    for_good = chain([partial(confident_step, model, 'max_prob')] * LENGTH)
    assert p_value(tally(recorded[2]), for_good) < 1e-6, 'decode_confidence does something else'


def test_ar_draws_from_the_product_of_its_conditionals():
    model = tiny_model(causal=True, V=LETTERS + 1, T=LENGTH, seed=7)
    y, _ = decode_ar(model, torch.tensor([BLANK_ROW] * ROWS), generator=noise_source())
    expected = {text: math.prod(predictions(model, (LETTERS, *text[:i]))[i, text[i]]
                                for i in range(LENGTH))
                for text in itertools.product(range(LETTERS), repeat=LENGTH)}
    assert p_value(tally(y), expected) > 1e-4


# Greedy decoding against naive loops: one row, one full pass per token, numpy


def naive_logits(model, x):
    """(T, V) from one full pass over the row x; t, where the model reads it, is its mask share."""
    t = torch.tensor([[x.count(len(model.embed.weight) - 1) / len(x)]])
    with torch.no_grad():
        return model(torch.tensor([x]), t)[0].double().numpy()


def greedy_token(z, text, penalty):
    """argmax of the logits z (V,), those of the tokens in `text` weakened by the penalty."""
    z = z.copy()
    for v in {v for v in text if v != len(z) - 1}:
        z[v] = z[v] / penalty if z[v] > 0 else z[v] * penalty
    return int(z.argmax())


def naive_ar(model, x, begin_of=lambda i: 0, penalty=1.0):
    """One row, read anew from the start token for every token."""
    mask, x = len(model.embed.weight) - 1, list(x)
    for i in [i for i, token in enumerate(x) if token == mask]:
        z = naive_logits(model, [mask] + x[begin_of(i):i])[-1]
        x[i] = greedy_token(z, x[:i], penalty)
    return x


def naive_scores(p, order):
    """(T,) how sure the greedy choice is."""
    if order == 'max_prob':
        return p.max(1)
    if order == 'margin':
        return np.sort(p, 1)[:, -1] - np.sort(p, 1)[:, -2]
    return np.exp((p * np.log(np.where(p > 0, p, 1))).sum(1))


def naive_confidence(model, x, order, remaining=None, threshold=None, penalty=1.0, take_back=False,
                     span=None, logits=naive_logits):
    """One row; remaining: masks left after each step, or else the threshold. (x, passes).

    take_back: what is already written competes with its old score. span: only masks in there.
    """
    mask, x, passes = len(model.embed.weight) - 1, list(x), 0
    fillable = [i for i in range(*(span or (0, len(x)))) if x[i] == mask]
    todo, old = iter(remaining or []), {}
    while any(x[i] == mask for i in fillable):
        masked = [i for i in fillable if x[i] == mask]
        left = next(todo) if remaining is not None else len(masked) - 1
        n = len(fillable) - left if take_back else len(masked) - left
        if n == 0:
            continue
        z, passes = logits(model, x), passes + 1
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        tokens = [greedy_token(row, x, penalty) for row in z]
        score = naive_scores(p, order)
        if order == 'max_prob':
            score = p[np.arange(len(x)), tokens]  # of the token taken, which a penalty may change
        new = {i: (score[i], tokens[i]) for i in masked}
        pool = {**old, **new} if take_back else new
        odds = {i: math.log(s / (1 - s)) if s < 1 else math.inf for i, (s, _) in pool.items()}
        chosen = sorted(pool, key=lambda i: (-round(odds[i], 4), i))[:n]
        chosen += [i for i in masked if threshold is not None and score[i] >= threshold]
        old = {i: pool[i] for i in chosen}
        for i in (fillable if take_back else chosen):
            x[i] = pool[i][1] if i in chosen else mask
    return x, passes


WIDE = {'V': 12, 'T': 16}
WIDE_MASK = 11
SHAPES = [{}, {'pos': 'learned', 'norm': 'layernorm', 'mlp': 'gelu', 'bias': True, 'tied': True},
          {'n_kv_head': 1, 'mlp': 'swiglu', 'qk_norm': False, 'n_conv': 5}]


def wide_canvas(rows, seed, share):
    """(rows, 16) with a `share` of masks."""
    generator = noise_source(seed)
    x = torch.randint(0, WIDE_MASK, (rows, 16), generator=generator)
    return x.masked_fill(torch.rand(x.shape, generator=generator) < share, WIDE_MASK)


@pytest.mark.parametrize('penalty', [1.0, 1.6])
@pytest.mark.parametrize('shape', SHAPES)
def test_ar_agrees_with_reading_everything_anew(shape, penalty):
    """Prompts of other lengths in every row, blanks in the middle, blanks at the start."""
    model = tiny_model(causal=True, seed=3, **WIDE, **shape)
    prompts = wide_canvas(4, 1, 0.0)
    for row, n in enumerate((0, 1, 7, 15)):
        prompts[row, n:] = WIDE_MASK
    for x in (prompts, wide_canvas(4, 2, 0.5), wide_canvas(3, 3, 0.1)):
        y, nfe = decode_ar(model, x, temperature=0, repetition_penalty=penalty,
                           generator=noise_source())
        assert y.tolist() == [naive_ar(model, row, penalty=penalty) for row in x.tolist()]
        assert nfe == (x == WIDE_MASK).any(0).sum()


def test_ar_does_not_see_what_follows_a_blank():
    model = tiny_model(causal=True, seed=3, **WIDE)
    x = wide_canvas(1, 5, 0.0).expand(WIDE_MASK, -1).clone()
    x[:, 4:9] = WIDE_MASK
    x[:, 9] = torch.arange(WIDE_MASK)
    y, _ = decode_ar(model, x, temperature=0, generator=noise_source())
    assert (y[:, :9] == y[0, :9]).all()
    x[:, 3] = torch.arange(WIDE_MASK)
    y, _ = decode_ar(model, x, temperature=0, generator=noise_source())
    assert not (y[:, 4:9] == y[0, 4:9]).all()  # but what stands before it


@pytest.mark.parametrize('block_size', [1, 2, 5, 8])
@pytest.mark.parametrize('shape', SHAPES[:2])
def test_ar_slides_its_window_beyond_the_context(block_size, shape):
    """Full at block_size tokens and the start token among them, it drops the older half."""
    model = tiny_model(causal=True, V=12, T=block_size, seed=4, **shape)
    dropped = (block_size + 1) // 2

    def begin_of(i):
        return 0 if i < block_size else dropped * (1 + (i - block_size) // dropped)

    x = torch.full((2, 4 * block_size + 3), WIDE_MASK)
    x[1, :block_size // 2] = torch.arange(block_size // 2)
    y, nfe = decode_ar(model, x, temperature=0, generator=noise_source())
    assert y.tolist() == [naive_ar(model, row, begin_of) for row in x.tolist()]
    assert nfe == x.size(1)


@pytest.mark.parametrize('prompt', [8, 9, 30])
def test_ar_goes_on_from_a_prompt_longer_than_the_context(prompt):
    """Only the newest tokens count, at least half a context of them and less than a whole one."""
    model = tiny_model(causal=True, V=12, T=8, seed=4)
    x = torch.randint(0, WIDE_MASK, (1, prompt + 1), generator=noise_source(1))
    x[0, prompt] = WIDE_MASK
    y, nfe = decode_ar(model, x, temperature=0, generator=noise_source())
    possible = [naive_ar(model, x[0].tolist(), lambda i: i - n)[-1] for n in range(4, 8)]
    assert nfe == 1 and y[0, prompt].item() in possible


def test_ar_rows_are_independent_beyond_the_context_too():
    model = tiny_model(causal=True, V=12, T=8, seed=4)
    x = torch.randint(0, WIDE_MASK, (2, 30), generator=noise_source(0))
    x[0, 18:22], x[1, 20:30] = WIDE_MASK, WIDE_MASK
    decode = partial(decode_ar, model, temperature=0, generator=noise_source())
    assert torch.equal(decode(x)[0][1:], decode(x[1:])[0])


def remaining(n, steps, counts):
    """Masks left of n after steps 1, 2, ..., as masks_left has it, in other words."""
    if steps == 0:
        return list(range(n - 1, -1, -1))
    if counts == 'linear':  # LLaDA's get_num_transfer_tokens
        spent = [n // steps] * steps
        for i in range(n % steps):
            spent[i] += 1
        return (n - np.cumsum(spent)).tolist()
    return [math.floor(n * math.cos(math.pi / 2 * i / steps) + 1e-9) for i in range(1, steps + 1)]


@pytest.mark.parametrize('decoder', [decode_confidence, decode_remask])
@pytest.mark.parametrize('order', ORDERS[:3])
@pytest.mark.parametrize('counts', ['linear', 'cosine'])
@pytest.mark.parametrize('steps', [0, 1, 3, 5, 16, 40])
def test_confidence_and_remask_agree_with_a_naive_loop(decoder, order, counts, steps):
    model = tiny_model(seed=5, time_cond=steps == 5, **WIDE)
    x = wide_canvas(3, steps, 0.7)
    for penalty in (1.0, 1.6):
        y, nfe = decoder(model, x, steps=steps, order=order, counts=counts, temperature=0,
                         repetition_penalty=penalty, generator=noise_source())
        naive = [naive_confidence(model, row, order, remaining(row.count(WIDE_MASK), steps, counts),
                                  penalty=penalty, take_back=decoder is decode_remask)
                 for row in x.tolist()]
        assert y.tolist() == [row for row, _ in naive]
        if steps == 0:
            assert nfe == (x == WIDE_MASK).sum(1).max()


# Blocks, the prefix cache and guidance


@pytest.mark.parametrize('steps', [0, 2, 7, 11, 40])
@pytest.mark.parametrize('block_length', [1, 3, 4, 16, 99])
def test_blocks_agree_with_a_naive_loop(block_length, steps):
    """They begin at the first mask; each has its share of the steps, one at least."""
    model, x = tiny_model(seed=5, **WIDE), wide_canvas(2, 4, 0.6)
    x[:, :3], x[:, [3, 14]], x[:, 15] = 1, WIDE_MASK, 2
    y, _ = decode_blocks(model, x, inner=confidence, block_length=block_length, steps=steps,
                        temperature=0, generator=noise_source())
    shares = np.diff([steps * min(i * block_length, 12) // 12 for i in range(99)])
    for row, result in zip(x.tolist(), y.tolist()):
        for start, share in zip(range(3, 15, block_length), shares):
            span = start, min(start + block_length, 15)
            left = remaining(row[slice(*span)].count(WIDE_MASK),
                             max(1, int(share)) if steps else 0, 'linear')
            row, _ = naive_confidence(model, row, 'max_prob', left, span=span)
        assert result == row


@repeatable(max_examples=60)
@given(T=st.integers(1, 16), block_length=st.integers(1, 20), steps=st.integers(1, 40))
def test_the_steps_of_blocks_add_up(T, block_length, steps):
    spent, wholes = [], []

    def inner(model, x, to_generate, rng, *, steps):
        spent.append(steps)
        wholes.append(to_generate[0].nonzero()[:, 0].tolist())
        logits = model(x, where=to_generate)
        x[to_generate] = 0
        yield to_generate, logits

    y, nfe = decode_blocks(COUNTED, torch.full((2, T), WIDE_MASK), inner=inner, steps=steps,
                           block_length=block_length, generator=None)
    n = math.ceil(T / block_length)
    assert not y.any() and nfe == len(spent) == n
    assert wholes == [list(range(T))[i:i + block_length] for i in range(0, T, block_length)]
    assert min(spent) >= 1 and sum(spent) == max(steps, n) or steps < n


@pytest.mark.parametrize('shape', [{'n_layer': 1}, {'causal': True}, *SHAPES[1:]])
@pytest.mark.parametrize('inner', [
    partial(confidence, steps=9),
    partial(threshold, threshold=0.4), partial(remdm, steps=9, eta=0.2)])
def test_the_prefix_cache_is_exact_where_a_prefix_does_not_see_what_follows(shape, inner):
    """With one layer, or a causal model; with two it is an approximation, but for first passes."""
    model = tiny_model(seed=6, **WIDE, **shape)
    x, seen = wide_canvas(3, 1, 0.0), []
    x[:, 2:15] = WIDE_MASK
    hook = model.register_forward_hook(lambda _, words, out: seen.append((words[0].size(1), out)))
    results = []
    for cached in (False, True):
        results.append(decode_blocks(model, x, inner=inner, block_length=5, prefix_cache=cached,
                                    generator=noise_source()))
    hook.remove()
    (y, nfe), (same, n) = results
    plain, fast = seen[:nfe], seen[nfe:]
    whole = [i for i, (width, _) in enumerate(fast) if width == 16]
    assert len(whole) == 3 and {width for width, _ in fast} == {16, 14, 9, 4}
    assert torch.allclose(plain[0][1], fast[0][1], atol=1e-5), 'the first pass is exact'
    if 'n_layer' in shape or 'causal' in shape:
        assert torch.equal(y, same) and n == nfe
        assert all(torch.allclose(a, b, atol=1e-4) for (_, a), (_, b) in zip(plain, fast))
    else:
        assert not all(a.shape == b.shape and torch.allclose(a, b, atol=1e-3)
                       for (_, a), (_, b) in zip(plain, fast))


def test_the_first_pass_of_every_block_is_exact():
    model, x, passes = tiny_model(seed=6, pos='learned', **WIDE), wide_canvas(1, 1, 0.9), []
    decode_blocks(model, x, inner=partial(confidence, steps=12), block_length=4,
                 prefix_cache=True, generator=noise_source(),
                 on_step=lambda x, nfe, where, logits: passes.append((x.clone(), where, logits)))
    before, exact = [x, *(y for y, *_ in passes)], []
    for y, (_, where, logits) in zip(before, passes):
        exact.append(torch.allclose(model(y, where=where), logits, atol=1e-4))
    starts = [i for i, (_, where, _) in enumerate(passes)
              if i == 0 or not (where & passes[i - 1][1]).any()]
    assert len(starts) == 4 and all(exact[i] for i in starts) and not all(exact)


# Models that were trained on blocks


def block_model(L, V=12, T=16, seed=6, **shape):
    return tiny_model(V=V, T=T, seed=seed, **shape, block_length=L)


def block_logits(model, x, L, window=(0, None)):
    """(B, T, V) of one pass without a cache over the blocks in the window: a token sees no later
    block, its position is that in the window, and t is 0 but for the share of masks in the last.
    """
    x, attention = x[:, slice(*window)], torch.nn.functional.scaled_dot_product_attention
    block = torch.arange(x.size(1)) // L
    share = (x[:, block == block[-1]] == WIDE_MASK).float().mean(1, keepdim=True)  # (B, 1)
    t = torch.where(block == block[-1], share, 0.0)  # (B, T)

    def blockwise(q, k, v, *_):
        return attention(q, k, v, attn_mask=block[:, None] >= block, enable_gqa=True)

    def mixed(self, x, *_):
        y = x.clone()
        for i, (k, w) in itertools.product(range(x.size(1)), enumerate(self.weight)):
            j = i + k - self.past
            if 0 <= j < x.size(1) and block[j] <= block[i]:
                y[:, i] += w * x[:, j]
        return y

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr('model.attend', blockwise)
        patch.setattr(LocalMixing, 'forward', mixed)
        return model(x, t)


def block_window(start, L, context):
    """Where the blocks begin that are read with the one at `start`, by walking there."""
    begin, n = 0, context // L
    for k in range(start // L + 1):
        if k - begin >= n:
            begin += (n + 1) // 2
    return begin * L


INNER = {'ancestral': ancestral, 'confidence': confidence,
         'threshold': lambda *canvas, steps, **rest: threshold(*canvas, threshold=0.3, **rest)}


@pytest.mark.parametrize('shape', [{'time_cond': True}, *SHAPES[1:]])
@pytest.mark.parametrize('inner', INNER)
@pytest.mark.parametrize('L, T', [(4, 16), (1, 9), (3, 14), (4, 43), (16, 40)])
def test_a_block_model_reads_as_if_there_were_no_cache(shape, inner, L, T):
    """All logits by full passes, windows and prompts too; nothing that follows a block counts."""
    model, steps, calls = block_model(L, **shape), [], []
    x = torch.cat([wide_canvas(3, k, 0.7) for k in range(3)], dim=1)[:, :T]
    x[:, 0], x[:, 1], x[:, L + 2:L + 3], before = 1, WIDE_MASK, 3, [x]
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    y, nfe = decode_blocks(model, x, inner=INNER[inner], block_length=0, steps=2 * T // L + 2,
                          generator=noise_source(), on_step=lambda *step: steps.append(
                              [a.clone() if torch.is_tensor(a) else a for a in step]))
    hook.remove()
    assert nfe == len(calls) and (y != WIDE_MASK).all()
    assert torch.equal(y[x != WIDE_MASK], x[x != WIDE_MASK]) and torch.equal(steps[-1][0], y)
    for after, count, where, logits in steps:
        columns = where.any(0).nonzero()[:, 0].tolist()
        start = columns[0] // L * L
        begin, stop = block_window(start, L, 16), min(start + L, T)
        assert columns[-1] < stop and (before[-1][:, :start] != WIDE_MASK).all()
        full = block_logits(model, before[-1], L, (begin, stop))
        assert torch.allclose(full[where[:, begin:stop]], logits, atol=1e-5, rtol=1e-5)
        before.append(after)
    held, reads, last = 0, 0, 0  # finished blocks that are in the cache, each read once in a window
    for start in range(0, T, L):
        if (x[:, start:start + L] == WIDE_MASK).any():
            begin = block_window(start, L, 16)
            reads += (start - (held if begin == last else begin)) // L
            held, last = start, begin
    assert nfe == len(steps) + reads


def test_a_block_model_reads_the_rest_of_its_block_and_nothing_behind_it():
    model, x = block_model(4), wide_canvas(1, 3, 0.0).expand(WIDE_MASK, -1).clone()
    x[:, 5] = WIDE_MASK
    behind, beside = x.clone(), x.clone()
    behind[:, 8] = beside[:, 7] = torch.arange(WIDE_MASK)
    decode = partial(decode_blocks, model, inner=confidence, block_length=4, steps=0,
                     generator=noise_source())
    logits = []
    for canvas in (behind, beside):
        decode(canvas, on_step=lambda *step: logits.append(step[3]))
    assert (logits[0] == logits[0][0]).all() and not torch.allclose(logits[1], logits[1][:1])


def test_blocks_of_a_block_model_follow_their_chains():
    """Blocks of 2 and 1, each a reverse process of its own, with 3 and 2 of 5 steps."""
    model = block_model(2, V=LETTERS + 1, T=LENGTH, seed=7)
    y, _ = decode_blocks(model, torch.tensor([BLANK_ROW] * ROWS), inner=ancestral, steps=5,
                        block_length=2, generator=noise_source(3))

    class Whole:  # for reverse_step: the first block alone, then all
        def __call__(self, x, t):
            alone = model(x[:, :2])
            return alone.new_zeros(1, LENGTH, LETTERS + 1).index_copy_(
                1, torch.arange(2), alone).index_copy_(
                1, torch.tensor([2]), block_logits(model, x, 2)[:, 2:])

    steps = [partial(reverse_step, Whole(), 1 - n / k, 1 - (n - 1) / k, 1.0, fillable=fillable)
             for k, fillable in ((3, (0, 1)), (2, (2,))) for n in range(k, 0, -1)]
    assert p_value(tally(y), chain(steps)) > 1e-4
    other = block_model(0, V=LETTERS + 1, T=LENGTH, seed=7)
    y, _ = decode_blocks(other, torch.tensor([BLANK_ROW] * ROWS), inner=ancestral, steps=5,
                        block_length=2, generator=noise_source(3))
    assert p_value(tally(y), chain(steps)) < 1e-6


@repeatable(max_examples=25)
@given(x=canvases(max_rows=4), L=st.sampled_from([1, 2, 3, 8]), repeats=st.integers(1, 3),
       inner=st.sampled_from([confidence, remask, threshold]))
def test_rows_of_a_block_model_are_independent_when_greedy(x, L, repeats, inner):
    """Of any length; with an eos, a row is as without it up to its end."""
    x = x.repeat(1, repeats)
    x[:, 0] = x[:, -1] = MASK
    rest = {'threshold': 0.4} if inner is threshold else {'steps': 0}
    inner = partial(inner, temperature=0, **rest)
    decode = partial(decode_blocks, block_model(L, V=5, T=8, seed=2, pos='learned'), inner=inner,
                     block_length=L, generator=noise_source())
    together, nfe = decode(x)
    assert torch.equal(together, torch.cat([decode(row[None])[0] for row in x]))
    assert torch.equal(together[x != MASK], x[x != MASK]) and (together != MASK).all()
    shorter, fewer = decode(x, eos_id=2)
    if inner.func is not remask:
        assert torch.equal(shorter, ended(together, x, 2, MASK))
    assert fewer <= nfe


@pytest.mark.parametrize('guidance', [0.7, 3.0])
@pytest.mark.parametrize('time_cond', [False, True])
def test_guidance_agrees_with_a_naive_loop(guidance, time_cond):
    model, x = tiny_model(seed=5, time_cond=time_cond, **WIDE), wide_canvas(3, 8, 0.5)
    x[2] = WIDE_MASK
    y, nfe = decode_guided(model, x, inner=confidence, guidance=guidance, steps=6,
                           temperature=0, generator=noise_source())
    assert nfe == 12
    for row, result in zip(x.tolist(), y.tolist()):
        def guided(model, y, row=row):
            blind = naive_logits(model, [WIDE_MASK if given != WIDE_MASK else token
                                         for given, token in zip(row, y)])[:, :-1]
            z = (1 + guidance) * naive_logits(model, y)[:, :-1] - guidance * blind
            return np.pad(z, ((0, 0), (0, 1)), constant_values=-np.inf)
        left = remaining(row.count(WIDE_MASK), 6, 'linear')
        assert result == naive_confidence(model, row, 'max_prob', left, logits=guided)[0]
    plain, n = decode_confidence(model, x, steps=6, temperature=0, generator=noise_source())
    assert n == 6 and torch.equal(plain[2], y[2]), 'nothing is given, so nothing is to be followed'
    assert not torch.equal(plain[:2], y[:2])
    for name in ('ancestral-linear', 'remdm-linear'):  # their levels are expected, not counted
        found = [decode_guided(model, x[2:], inner=partial(DECODERS[name], steps=6),
                               guidance=strength, generator=noise_source())[0]
                 for strength in (0.0, 50.0)]
        assert torch.equal(*found)


# Where a text ends


def ended(free, x, eos, mask=WIDE_MASK):
    """The rows of free with eos from the first on that was written behind all given tokens."""
    rows = free.clone()
    for row, was in zip(rows, x == mask):
        for i in range(len(row)):
            if was[i:].all() and row[i] == eos:
                row[i:] = eos
                break
    return rows


@pytest.mark.parametrize('decoder', [
    partial(decode_confidence, steps=7), partial(decode_confidence, steps=0),
    partial(decode_threshold, threshold=0.3),
    partial(decode_blocks, inner=confidence, block_length=4, steps=8),
    partial(decode_guided, inner=partial(confidence, steps=9), guidance=1.0)])
def test_masked_decoders_stop_at_eos(decoder):
    """Each row is as without an eos up to its first one behind what is given."""
    model, x = tiny_model(seed=8, pos='learned', **WIDE), torch.full((6, 16), WIDE_MASK)
    x[:, 0], x[:, 2] = torch.arange(6), 1
    decode = partial(decoder, model, x, temperature=0)
    free, passes = decode(generator=noise_source())
    eos = next(v for v in free[:, 3:8].flatten().tolist() if v != 1)
    y, nfe = decode(eos_id=eos, generator=noise_source())
    assert torch.equal(y, ended(free, x, eos)) and not torch.equal(y, free)
    assert nfe <= passes
    alone, early = decoder(model, x[(y != free).any(1)][:1], temperature=0, eos_id=eos,
                           generator=noise_source())
    assert early <= nfe


@pytest.mark.parametrize('decoder', [
    partial(decode_ancestral, steps=12), partial(decode_remdm, steps=12, eta=0.0),
    partial(decode_threshold, threshold=0.5),
    partial(decode_blocks, inner=ancestral, steps=12, block_length=4, prefix_cache=True)])
def test_nothing_is_drawn_after_the_end(decoder):
    """Once an eos stands behind what is given, and no mask before it, a row stays as it is."""
    model, stopped = tiny_model(seed=9, pos='learned', **WIDE), 0
    for seed in range(30):
        x, steps = torch.full((2, 16), WIDE_MASK), []
        x[:, 0], x[:, 3] = 3, 3  # 3 is the eos: those that are given do not end a text
        y, _ = decoder(model, x, eos_id=3, generator=noise_source(seed),
                       on_step=lambda x, nfe, where, _: steps.append((x.clone(), where)))
        assert torch.equal(y, ended(y, x, 3)) and (y != WIDE_MASK).all()
        finished = torch.zeros(2, dtype=torch.bool)
        for canvas, where in steps:
            assert not where[finished].any()
            if finished.any():
                assert torch.equal(canvas[finished], y[finished])
            is_end = (canvas == 3) & (torch.arange(16) > 3) & (
                (canvas == WIDE_MASK).cumsum(1) == 0)
            finished = is_end.any(1)
            assert not (canvas[finished] == WIDE_MASK).any()
        stopped += (finished & (y != WIDE_MASK).all(1)).sum().item()
    assert stopped > 5


def test_only_the_first_batch_is_watched():
    seen, run_ = [], run_of(tiny_model(V=12, T=8), objective='mdm')
    how = sample.defaults() | {'decoder': 'confidence', 'steps': 4, 'batch_size': 1}
    sample.complete(run_, [[1] + [11] * 4] * 3, how, on_step=lambda *step: seen.append(step))
    assert len(seen) == 4


@pytest.mark.parametrize('decoder', [
    partial(decode_remdm, steps=12, eta=0.3), partial(decode_remask, steps=14, order='random'),
    partial(decode_remask, steps=0, order='random'), partial(decode_uniform, steps=6),
    partial(decode_guided, inner=partial(remdm, steps=9, eta=0.3), guidance=0.5),
    partial(decode_blocks, inner=partial(remask, order='random'), steps=16, block_length=8),
    partial(decode_blocks, inner=remdm, eta=0.3, steps=24, block_length=4, prefix_cache=True)])
def test_no_row_ends_at_an_eos_that_may_still_change(decoder):
    """The same text with an eos_id and without, up to its first EOS: none is cut short."""
    model, changed, short = tiny_model(seed=9, pos='learned', **WIDE), 0, 0
    x = torch.full((1, 16), WIDE_MASK)
    x[:, 0], x[:, 3] = 3, 3  # 3 is the eos
    for seed in range(30):
        states = []
        free, _ = decoder(model, x, generator=noise_source(seed),
                          on_step=lambda x, *_: states.append(x.clone()))
        y, _ = decoder(model, x, eos_id=3, generator=noise_source(seed))
        assert torch.equal(y, ended(free, x, 3))
        ends = [(state == 3) & ((state == WIDE_MASK).cumsum(1) == 0) for state in states]
        changed += any((end & (y != 3)).any() for end in ends)  # EOS with no mask before it
        short += not torch.equal(y, free)
    assert changed > 0 and short > 5


def test_ar_writes_nothing_after_eos():
    """Rows end apart; each is the row without an eos up to its first one, then eos only."""
    model = tiny_model(causal=True, seed=5, **WIDE)
    x = torch.full((6, 14), WIDE_MASK)
    x[:, 2] = 1  # given: no row ends before it
    free, _ = decode_ar(model, x, generator=noise_source(2))
    eos = free[:, 3].mode().values.item()
    y, nfe = decode_ar(model, x, eos_id=eos, generator=noise_source(2))
    ends = []
    for row, same in zip(y.tolist(), free.tolist()):
        end = next((i for i, token in enumerate(row) if token == eos and i > 2), 14)
        ends.append(end)
        assert row[:end] == same[:end]
        assert all(token == eos for token in row[end:])
    assert len(set(ends)) > 1 and nfe <= 13
    greedy = torch.full((1, 14), WIDE_MASK)
    first = decode_ar(model, greedy, temperature=0, generator=noise_source())[0][0, 0].item()
    assert decode_ar(model, greedy, eos_id=first, temperature=0, generator=noise_source())[1] == 1


# A decoder is a generator and a line in DECODERS


def leftmost(model, x, to_generate, rng, *, order, **sampling):
    """Writes the leftmost mask of every row: all that a decoder needs to say."""
    while (is_mask := to_generate & (x == model.mask_id)).any():
        first = is_mask & (is_mask.cumsum(1) == 1)
        logits = model(x, is_mask.float().mean(1, keepdim=True), where=first)
        x[first] = sample.sample_token(logits, x, first, rng, **sampling)
        yield first, logits


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(sample.DECODERS, 'leftmost', leftmost)
    monkeypatch.setattr(MaskedDiffusion, 'decoders', ('leftmost',))


@pytest.mark.parametrize('settings', [{}, {'block_length': 5}, {'guidance': 0.8},
                                      {'block_length': 3, 'prefix_cache': True},
                                      {'block_length': 4, 'guidance': 2.0}])
def test_a_new_decoder_works_with_all_that_stands_around_one(toy, settings):
    """Blocks, guidance, EOS, watching and the count of passes, none of which it knows about."""
    model, x = tiny_model(seed=8, pos='learned', **WIDE), torch.full((6, 16), WIDE_MASK)
    x[:, 0], x[:, 2] = torch.arange(6), 1
    run, steps = run_of(model), []
    how = sample.defaults() | {'temperature': 0.0} | settings
    free, passes, _ = sample.decode_batch(
        run, x.tolist(), how,
        on_step=lambda x, nfe, where, logits: steps.append((x.clone(), nfe, where, logits)))
    each = 2 if 'guidance' in settings else 1
    assert passes == 14 * each and torch.equal(steps[-1][0], free)
    for k, (canvas, nfe, where, logits) in enumerate(steps, 1):
        assert nfe == each * k and where.sum(1).tolist() == [1] * 6
        assert torch.equal(canvas[where], logits.argmax(-1))
    eos = next(v for v in free[:, 3:8].flatten().tolist() if v != 1)
    y, fewer, _ = sample.decode_batch(run, x.tolist(), how, eos)
    assert torch.equal(y, ended(free, x, eos)) and not torch.equal(y, free) and fewer <= passes
    for row in range(6):
        alone, _, _ = sample.decode_batch(run, x[row:row + 1].tolist(), how, eos)
        assert torch.equal(alone[0], y[row]), 'a greedy row does not depend on the others'


def test_a_new_decoder_works_from_the_command_line(toy, run_main):
    words = ('--out_dir=mdm', '--start=ROMEO:', '--gen_length=9', '--block_length=4', '--watch')
    status, out, err = run_main(*words)
    shown = re.findall(r'^pass (\d+): (\d+) masks left', out, re.MULTILINE)
    assert (status, err) == (0, '') and shown == [(str(k), str(9 - k)) for k in range(1, 10)]


# How much is written at a step


@pytest.mark.parametrize('threshold', [0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize('order', ORDERS[:3])
def test_threshold_commits_all_above_it_and_at_least_one(order, threshold):
    model, x = tiny_model(seed=5, **WIDE), wide_canvas(4, 9, 0.8)
    y, nfe = decode_threshold(model, x, order=order, threshold=threshold, temperature=0,
                              generator=noise_source())
    naive = [naive_confidence(model, row, order, threshold=threshold) for row in x.tolist()]
    assert y.tolist() == [result for result, _ in naive]
    assert nfe == max(passes for _, passes in naive)
    if threshold == 1.0:
        assert nfe == (x == WIDE_MASK).sum(1).max()


class Certain:
    """A model whose prediction of token i has the given log odds, however high."""

    def __init__(self, log_odds):
        self.mask_id, self.embed = 2, None
        self.config = types.SimpleNamespace(vocab_size=3, subs=True)
        self.logits = torch.stack([log_odds, 0 * log_odds, 0 * log_odds - torch.inf], dim=1)

    def __call__(self, x, level, where):
        return self.logits.expand(len(x), -1, -1)[where].clone()


def test_confident_models_keep_their_order():
    """As LLaDA's generate has it, where 1 - p is far below what float32 can tell from 0."""
    log_odds = torch.tensor([14.0, 25.0, 18.0, 30.0, 16.0])
    seen, x = [], torch.full((1, 5), 2)
    decode_confidence(Certain(log_odds), x, steps=0, temperature=0, generator=noise_source(),
                      on_step=lambda x, *_: seen.append((x[0] != 2).tolist()))
    written = [sum(step) for step in zip(*seen)]  # in how many of the 5 steps each stood there
    assert np.argsort(written)[::-1].tolist() == log_odds.argsort(descending=True).tolist()


def test_a_threshold_of_one_takes_what_is_certain():
    """Fast-dLLM's >=: what has probability 1 in float64 is committed at once, with the best."""
    x = torch.full((1, 4), 2)
    for log_odds, passes in ((50.0, 1), (20.0, 4)):
        _, nfe = decode_threshold(Certain(torch.full((4,), log_odds)), x, threshold=1.0,
                                  temperature=0, generator=noise_source())
        assert nfe == passes


@pytest.mark.parametrize('top_p, kept', [(0.5, 1), (0.75, 2), (0.7500001, 3), (1.0, 3)])
def test_a_nucleus_that_holds_exactly_top_p_is_enough(top_p, kept):
    logits = torch.tensor([[2.0, 1.0, 1.0]], dtype=torch.float64) * math.log(2)  # exact in softmax
    assert filter_logits(logits, 0, top_p).isfinite().sum() == kept


@repeatable(max_examples=40)
@given(masks=st.lists(st.integers(0, 16), min_size=1, max_size=4), steps=st.integers(1, 40),
       counts=st.sampled_from(['linear', 'cosine']))
def test_confidence_leaves_as_many_masks_as_stated(masks, steps, counts):
    x = torch.zeros(len(masks), 16, dtype=torch.long)
    for row, n in enumerate(masks):
        x[row, 16 - n:] = WIDE_MASK
    recorded = []
    decode_confidence(COUNTED, x, steps=steps, order='random', counts=counts,
                      generator=noise_source(),
                      on_step=lambda x, *_: recorded.append((x == WIDE_MASK).sum(1).tolist()))
    stated = [list(left) for left in zip(*(remaining(n, steps, counts) for n in masks))]
    changed = [b for a, b in zip([masks, *stated], stated) if a != b]
    assert recorded == changed


COUNTED = tiny_model(seed=6, **WIDE)


def test_linear_counts_differ_by_at_most_one_and_cosine_counts_grow():
    n = torch.tensor([16])
    spent = {counts: -np.diff([16, *(sample.masks_left(n, i, 6, counts).item()
                                     for i in range(1, 7))]) for counts in ('linear', 'cosine')}
    assert spent['linear'].tolist() == [3, 3, 3, 3, 2, 2] and spent['cosine'].sum() == 16
    assert (np.diff(spent['cosine']) >= -1).all() and spent['cosine'][0] < spent['cosine'][-1]


def test_ancestral_passes_are_as_many_as_steps_that_reveal():
    """L masks in N linear steps: each is revealed at a uniform step, others need no pass."""
    model, x = tiny_model(V=LETTERS + 1, T=LENGTH, seed=7), torch.tensor([BLANK_ROW])
    N, runs, generator = 5, 400, noise_source()
    passes = [decode_ancestral(model, x, steps=N, generator=generator)[1] for _ in range(runs)]
    mean = N * (1 - (1 - 1 / N) ** LENGTH)
    assert np.mean(passes) == pytest.approx(mean, abs=5 * np.std(passes) / runs ** 0.5)


# Text in, text out


def run_of(model, meta=None, **settings):
    """A Run of a model that was trained with these settings."""
    settings = {'objective': 'mdm', 'predict_pad': True, 'block_size': 20} | settings
    tokenizer = prepare.load_tokenizer(meta) if meta else None
    meta = meta or dict.fromkeys(prepare.SPECIALS)
    return sample.Run('run', model, make_objective(settings), meta, tokenizer, settings, 7, 'run')


CHARS = prepare.load_tokenizer({'eos_id': None,
                                'tokenizer': {'kind': 'char', 'chars': ' Tabenortu'}})
BYTES = prepare.load_tokenizer({'eos_id': 256, 'tokenizer': {  # a token per byte
    'kind': 'bpe', 'pattern': prepare.GPT2_PATTERN, 'ranks': [
        base64.b64encode(bytes([i])).decode() for i in range(256)]}})


@pytest.mark.parametrize('tokenizer, mask', [(CHARS, 10), (BYTES, 257)])
@pytest.mark.parametrize('template, expected', [
    ('To [___] or', ['To ', 5, ' or']), ('[_]', [5]), ('[___:3][___:1]be', [3, 1, 'be']),
    ('To [___] or not to [___:9]', ['To ', 5, ' or not to ', 9]),
    ('a[___:0]b[__:12]', ['a', 'b', 12]), ('To [_____:02] be', ['To ', 2, ' be'])])
def test_templates(tokenizer, mask, template, expected):
    ids = []
    for piece in expected:
        ids += [mask] * piece if isinstance(piece, int) else tokenizer.encode(piece)
    assert sample.template_canvas(template, tokenizer, mask) == ids


@pytest.mark.parametrize('template, problem', [
    ('To be', 'with a blank'), ('To [___:0]', '0 tokens wide'), ('[]', 'with a blank'),
    ('a [___:x] b', 'with a blank'), ('a [___:-3] b', 'with a blank'),
    ('Zounds [___]', 'does not know')])
def test_templates_that_cannot_be_filled(template, problem):
    with pytest.raises(UserError, match=problem):
        sample.template_canvas(template, CHARS, 10)


@repeatable(max_examples=100)
@given(st.lists(st.text(' Tabenortu', max_size=4) | st.integers(0, 9), max_size=6))
def test_a_canvas_shows_its_template(pieces):
    """Text comes back letter by letter, and a blank as so many blocks."""
    assume(any(piece for piece in pieces if isinstance(piece, int)))
    template = ''.join(f'[___:{p}]' if isinstance(p, int) else p for p in pieces)
    shown = ''.join('█' * p if isinstance(p, int) else p for p in pieces)
    for tokenizer, mask in ((CHARS, 10), (BYTES, 257)):
        ids = sample.template_canvas(template, tokenizer, mask)
        assert sample.text_of(ids, tokenizer, mask) == shown


def test_text_of_decodes_runs_of_tokens_together():
    """The bytes of a character may be tokens of their own."""
    ids = [*'é'.encode(), 257, *'€'.encode(), 257, 257]
    assert sample.text_of(ids, BYTES, 257) == 'é█€██'
    assert sample.text_of([257], BYTES, 257) == '█' and sample.text_of([], BYTES, 257) == ''


@pytest.mark.parametrize('seed', range(5))
def test_corruption_only_ever_grows(capsys, seed):
    text = ('To be or not to be ' * 60).strip()
    sample.show_corruption(None, text, seed)
    lines = re.findall(r'^t = (\d\.\d)  (.*)$', capsys.readouterr().out, re.MULTILINE)
    assert [float(t) for t, _ in lines] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert lines[0][1] == text and lines[-1][1] == '█' * len(text)
    for t, shown in lines:  # alpha_t = 1 - t, within 5 standard errors
        assert all(a in (b, '█') for a, b in zip(shown, text))
        assert abs(shown.count('█') / len(text) - float(t)) <= 5 * (0.25 / len(text)) ** 0.5
    for (_, before), (_, after) in zip(lines, lines[1:]):
        assert all(b == '█' for a, b in zip(before, after) if a == '█')


# The command line

CONTEXT = 24
VERSE = 3 * "ROMEO:\nTo be, or not to be? What's in a name!\n\nJULIET:\nThat we call a rose.\n"


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A folder with a run of every objective, damaged and foreign checkpoints, an empty folder."""
    root = tmp_path_factory.mktemp('runs')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        (root / 'verse.txt').write_text(VERSE, encoding='utf-8')
        meta = prepare.prepare('verse.txt')
    shape = {'block_size': CONTEXT, 'n_layer': 2, 'n_head': 2, 'n_kv_head': 0, 'n_embd': 16,
             'pos': 'rope', 'norm': 'rmsnorm', 'mlp': 'relu2', 'qk_norm': True, 'bias': False,
             'tied': False, 'time_cond': False, 'dropout': 0.0}
    new = {'subs': False, 'block_length': 4}  # settings that the runs before did not have
    for objective, more in (('ar', {}), ('mdm', {}), ('d3pm', new),
                            ('uniform', new | {'subs': True}), ('block', new | {'subs': True})):
        model = tiny_model(objective == 'ar', meta['vocab_size'] + 1, CONTEXT)
        (root / objective).mkdir()
        torch.save({'model': model.state_dict(), 'optimizer': [], 'meta': meta, 'iter': 7,
                    'config': shape | {'objective': objective} | more, 'rng': 0, 'best': 1.5},
                   root / objective / 'ckpt.pt')
    whole = (root / 'mdm' / 'ckpt.pt').read_bytes()
    misfit = torch.load(root / 'mdm' / 'ckpt.pt', weights_only=True)
    misfit['config']['n_layer'] = 3
    (root / 'blank.txt').write_text('\n  \n')
    (root / 'latin.txt').write_bytes('Zoë'.encode('latin-1'))
    for name in ('cut', 'empty', 'garbled', 'foreign', 'misfit', 'folder'):
        (root / name).mkdir()
    (root / 'cut' / 'ckpt.pt').write_bytes(whole[:len(whole) // 2])
    (root / 'empty' / 'ckpt.pt').write_bytes(b'')
    (root / 'garbled' / 'ckpt.pt').write_bytes(b'no checkpoint at all\n' * 99)
    torch.save({'model': {}}, root / 'foreign' / 'ckpt.pt')
    torch.save(misfit, root / 'misfit' / 'ckpt.pt')
    return root


@pytest.fixture
def run_main(runs, monkeypatch, capsys):
    """main() as if started with these words: (exit status, stdout, stderr)."""
    monkeypatch.chdir(runs)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    before = dict(vars(sample))

    def run(*words):
        monkeypatch.setattr(sys, 'argv', ['sample.py', *words])
        try:
            sample.main()
            status = 0
        except SystemExit as e:
            status = e.code
        except (UserError, OSError) as e:  # what the interpreter does with it
            with pytest.raises(SystemExit) as leaving:
                config.show_one_line(type(e), e, e.__traceback__)
            status = leaving.value.code
        finally:
            vars(sample).update(before)  # main sets the module's globals
        return status, *capsys.readouterr()

    return run


def texts(out):
    """The samples on stdout, and (tokens, passes) from the last line."""
    *found, last = out.split('\n' + '-' * 80 + '\n')
    numbers = re.fullmatch(r'(\d+) tokens in (\d+) passes and [\d.]+ s, [\d,]+ tokens/s\n', last)
    return found, tuple(map(int, numbers.groups()))


@pytest.mark.parametrize('words, passes', [
    (['--out_dir=ar'], [18]), (['--out_dir=ar', '--temperature=0', '--decoder=ar'], [18]),
    (['--out_dir=mdm'], range(18, 129)), (['--out_dir=mdm', '--steps=3'], [2, 3]),
    (['--out_dir=mdm', '--decoder=ancestral'], range(1, 19)),
    (['--out_dir=mdm', '--decoder=confidence'], [18]),
    (['--out_dir=mdm', '--decoder=confidence', '--steps=4', '--counts=cosine'], [3, 4]),
    (['--out_dir=mdm', '--decoder=confidence', '--steps=0', '--temperature=0'], [18]),
    (['--out_dir=mdm', '--decoder=threshold', '--threshold=0.3'], range(1, 19)),
    (['--out_dir=mdm', '--decoder=remask', '--steps=9'], [9]),
    (['--out_dir=mdm', '--decoder=remdm', '--steps=9', '--eta=0.5'], range(3, 10)),
    (['--out_dir=mdm', '--decoder=remdm', '--block_length=7', '--prefix_cache'], range(3, 99)),
    (['--out_dir=mdm', '--decoder=confidence', '--block_length=4', '--steps=10'], [10]),
    (['--out_dir=mdm', '--decoder=confidence', '--guidance=0.5', '--steps=10'], [20]),
    (['--out_dir=mdm', '--noise_schedule=cosine', '--top_k=3', '--top_p=0.9',
      '--repetition_penalty=1.2'], range(18, 129)),
    (['--out_dir=d3pm', '--steps=9'], range(1, 10)),
    (['--out_dir=d3pm', '--decoder=threshold', '--threshold=0.3'], range(1, 19)),
    (['--out_dir=uniform', '--steps=9'], [9]),
    (['--out_dir=uniform', '--temperature=0', '--repetition_penalty=1.2', '--steps=3'], [3]),
    (['--out_dir=block'], range(10, 24)),
    (['--out_dir=block', '--block_length=4', '--decoder=confidence', '--steps=10'], [15]),
    (['--out_dir=block', '--decoder=threshold', '--threshold=0.3'], range(10, 24))])
def test_start_is_continued_to_the_end_of_the_context(run_main, words, passes):
    status, out, err = run_main('--start=ROMEO:', '--device=cpu', *words)
    (text,), (written, nfe) = texts(out)
    assert (status, err) == (0, '')
    assert text.startswith('ROMEO:') and len(text) == CONTEXT and set(text) <= set(VERSE)
    assert written == CONTEXT - 6 and nfe in passes
    assert texts(run_main('--start=ROMEO:', '--device=cpu', *words)[1])[0] == [text]


def test_a_block_model_writes_on_beyond_its_context(run_main):
    """Longer than the context by a prompt, by what is generated, and by the two together."""
    for start, length in (('R' * 60, 3), ('', 70), ('To be, or not to be', 50)):
        words = ('--out_dir=block', f'--start={start}', f'--gen_length={length}', '--steps=40')
        (text,), (written, nfe) = texts(run_main(*words)[1])
        assert text.startswith(start) and len(text) == len(start) + length and written == length
        assert nfe > length / 4


def test_num_samples_gen_length_and_seed(run_main):
    words = ('--out_dir=ar', '--start=a', '--gen_length=40', '--num_samples=3')
    found, (written, nfe) = texts(run_main(*words)[1])
    assert [len(text) for text in found] == [41] * 3 and len(set(found)) == 3
    assert (written, nfe) == (120, 40)
    assert texts(run_main(*words, '--seed=1')[1])[0] != found


def objects(out):
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.parametrize('name', ['ar', 'mdm'])
def test_a_prompt_file_is_answered_in_its_order(run_main, runs, monkeypatch, name):
    """Prompts of other lengths, a template, an empty line; each num_samples times, in batches.

    A byte order mark, as some editors write it, is not part of the first."""
    lines = ['ROMEO:', 'a', 'JULI', 'To [___:3] a [_:2]', 'rose. ', 'b']
    (runs / 'prompts.txt').write_text('\n'.join([*lines[:2], '', *lines[2:]]) + '\n', 'utf-8-sig')
    words = (f'--out_dir={name}', '--num_samples=2', '--gen_length=7', '--batch_size=3')
    found, (written, _) = texts(run_main('--prompt_file=prompts.txt', *words)[1])
    patterns = [re.escape(line) + '.{7}' if '[' not in line else 'To .{3} a .{2}'
                for line in lines for _ in range(2)]
    assert len(found) == 12 and written == 10 * 7 + 2 * 5
    assert all(re.fullmatch(pattern, text, re.S) for pattern, text in zip(patterns, found))
    assert found[0] != found[1]
    monkeypatch.setattr(sys, 'stdin', io.StringIO('\n'.join(lines)))
    assert texts(run_main('--prompt_file=-', *words)[1])[0] == found
    greedy = [*words, '--temperature=0']  # each as if it had been asked for alone
    greedy += ['--decoder=confidence'] * (name == 'mdm')
    found, _ = texts(run_main('--prompt_file=prompts.txt', *greedy)[1])
    for line, text in list(zip(lines, found[::2])):
        alone = ['--gen_length=0', f'--template={line}'] if '[' in line else [f'--start={line}']
        assert texts(run_main(*greedy, *alone)[1])[0] == [text, text]


def test_masked_canvases_go_together_only_if_they_are_alike():
    canvases = [[0, 9, 9], [9, 9], [0, 9, 9], [9, 9, 9], [9, 9], [0, 9, 9]]
    model = types.SimpleNamespace(mask_id=9)
    ar, mdm, block = (run_of(model, objective=name) for name in ('ar', 'mdm', 'block'))
    assert sample.group_canvases(ar, canvases, 4, False) == [[0, 1, 2, 3], [4, 5]]
    assert sample.group_canvases(mdm, canvases, 2, False) == [[0, 2], [3, 5], [1, 4]]
    assert sample.group_canvases(mdm, canvases, 4, True) == [[0, 2, 5], [1, 4], [3]]
    assert sample.group_canvases(block, canvases, 4, False) == [[0, 2, 5], [1, 4], [3]]


def test_json_lines_say_what_was_done(run_main, runs):
    words = ('--start=ROMEO:', '--gen_length=10', '--num_samples=5', '--json', '--batch_size=2')
    for name, how, decoder, passes in (
            ('ar', [], 'ar', [10]), ('mdm', ['--seed=4'], 'remdm', range(5, 129)),
            ('mdm', ['--decoder=confidence', '--guidance=1'], 'confidence', [20]),
            ('uniform', ['--steps=7'], 'uniform', [7]), ('block', [], 'ancestral', range(5, 25)),
            ('d3pm', [], 'ancestral', range(5, 21))):
        status, out, err = run_main(f'--out_dir={name}', *words, *how)
        rows = objects(out)
        assert (status, err, len(rows)) == (0, '', 5)
        meta = torch.load(runs / name / 'ckpt.pt', weights_only=True)['meta']
        tokenizer = prepare.load_tokenizer(meta)
        for row in rows:
            assert set(row) == {'prompt', 'text', 'tokens', 'nfe', 'seconds', 'tokens_per_second',
                                'ended', 'seed', 'decoder'}
            assert row['prompt'] == 'ROMEO:' and row['text'] == tokenizer.decode(row['tokens'])
            assert row['decoder'] == decoder and row['nfe'] in passes
            assert row['seed'] == (4 if how == ['--seed=4'] else 1337)
        for row, rows_in_batch in zip(rows, (2, 2, 2, 2, 1)):
            assert row['tokens_per_second'] * row['seconds'] == pytest.approx(10 * rows_in_batch)
        plain = [word for word in words if word != '--json']
        assert texts(run_main(f'--out_dir={name}', *plain, *how)[1])[0] == [r['text'] for r in rows]
    row, = objects(run_main('--out_dir=mdm', '--template=To [_]', '--json')[1])
    assert row['template'] == 'To [_]' and 'prompt' not in row


def test_what_follows_a_written_eos_is_not_shown():
    model = tiny_model(causal=True, V=12, T=8, seed=4)
    # the eos is 3; those that are given end nothing, nor do those that are written before them
    canvas = [3, 11, 11, 3, 11, 11]
    done, (written, nfe, _) = sample.complete(run_of(model, objective='ar'), [canvas] * 200,
                                              sample.defaults(), eos_id=3)
    whole = [ids for ids, _ in done if len(ids) == 6]
    cut = [ids for ids, _ in done if len(ids) < 6]
    assert len(whole) > 50 and {len(ids) for ids in cut} == {4, 5}
    assert written == 4 * len(whole) + sum({4: 3, 5: 4}[len(ids)] for ids in cut)
    assert all(ids[0] == ids[3] == 3 and 3 not in ids[4:] for ids in whole + cut)
    assert any(3 in ids[1:3] for ids in whole + cut)
    for objective in ('ar', 'mdm'):  # a template that ends in given text is filled, and not cut
        run_, canvases = run_of(model, objective=objective), [[3, 11, 11, 5, 3]] * 5
        free = [ids for ids, _ in sample.complete(run_, canvases, sample.defaults())[0]]
        done, _ = sample.complete(run_, canvases, sample.defaults(), eos_id=free[0][1])
        assert [ids for ids, _ in done] == free and {*map(len, free)} == {5}


@pytest.mark.parametrize('text, clean', [
    ('the the cat', 'the cat'), ('The the\nTHE end', 'The end'), ("don't don't don", "don't don"),
    ('the theme', 'the theme'), ('bathe the', 'bathe the'), ("the the's", "the the's"),
    ('no, no', 'no, no'), ('7 7 7', '7 7 7'), ('a a b b a', 'a b a'), ('aba ba ba', 'aba ba'),
    ("o' the the", "o' the"), ('', '')])
def test_cleanup_drops_repeated_words(text, clean):
    assert sample.without_repeated_words(text) == clean


def test_cleanup_is_of_the_text_alone(run_main, monkeypatch):
    words = ('--out_dir=mdm', '--template=a a a [_:3]', '--json')
    (plain,), (clean,) = (objects(run_main(*words, *how)[1]) for how in ([], ['--cleanup']))
    assert clean['tokens'] == plain['tokens'] and plain['text'].startswith('a a a ')
    assert clean['text'] == sample.without_repeated_words(plain['text']) != plain['text']


def test_the_settings_of_decoding_stand_together():
    """In the order of DECODING, so that eval.py can show them as a block of its own."""
    names = [node.targets[0].id for node in ast.parse(Path(sample.__file__).read_text()).body
             if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    first = names.index('decoder')
    assert tuple(names[first:first + len(sample.DECODING)]) == sample.DECODING
    assert sample.defaults().keys() >= {*sample.DECODING, 'seed', 'batch_size'}


def test_nothing_given_fills_the_context(run_main):
    for name in ('ar', 'mdm', 'd3pm', 'uniform', 'block'):
        (text,), (written, _) = texts(run_main(f'--out_dir={name}')[1])
        assert len(text) == written == CONTEXT


def test_a_start_with_an_equals_sign_reaches_the_tokenizer_whole(run_main):
    status, _, err = run_main('--out_dir=mdm', '--start=a=b')
    assert status == 2 and err == "error: the tokenizer does not know '='\n"


def test_corrupt_without_a_run_needs_no_vocabulary(run_main):
    text = 'Zoë €5'
    status, out, err = run_main(f'--corrupt={text}', '--out_dir=nowhere')
    lines = out.splitlines()
    assert (status, err, len(lines)) == (0, '', 6)
    assert lines[0] == f't = 0.0  {text}' and lines[5] == f't = 1.0  {"█" * len(text)}'
    status, out, err = run_main('--out_dir=mdm', '--corrupt=Zoë')
    assert (status, out) == (2, '') and 'does not know' in err


@pytest.mark.parametrize('name', ['mdm', 'd3pm', 'uniform', 'block'])
def test_corrupt_shows_the_noise_of_the_run_and_what_it_makes_of_it(run_main, runs, name):
    """Against the forward process, written out, and the argmax of a pass over its result."""
    text = "What's in a name"
    status, out, err = run_main(f'--corrupt={text}', f'--out_dir={name}')
    header, *lines = out.splitlines()
    assert (status, err, len(lines)) == (0, '', 5) and header.split()[0] == 'original'
    run, T = sample.load_run(runs / name, 'cpu'), len(text)
    masks, block_length = run.objective.reads_masks, run.objective.block_length
    x0, rng = torch.tensor([run.tokenizer.encode(text)]), torch.Generator()
    mask_id = run.model.mask_id
    for k, line in enumerate(lines, 1):
        shown, corrupted, guess = (line[9 + 24 * i:31 + 24 * i].ljust(T)[:T] for i in range(3))
        assert line.startswith(f't = {k / 5}  ') and shown == text
        assert len(line) <= 80
        rng.manual_seed(1337)
        torch.rand(1, generator=rng)  # the common shift of the levels, and their order
        torch.randperm(-(-T // (block_length or T)), generator=rng)
        u = torch.rand(1, T, generator=rng)
        is_noise = u < k / 5 if name == 'd3pm' else u >= 1 - k / 5  # schedule linear
        noise = mask_id if masks else torch.randint(mask_id, (1, T), generator=rng)
        xt = torch.where(is_noise, noise, x0)
        assert corrupted == sample.visible(sample.text_of(xt[0].tolist(), run.tokenizer, mask_id))
        if block_length:  # behind it the clean text, of level 0
            reads = torch.cat([xt, x0], dim=1), torch.tensor([[k / 5, 0.0]]).repeat_interleave(T, 1)
            more = beside_clean(T, block_length, run.model.config.n_conv, 'cpu')
        else:
            reads, more = (xt, torch.full((1, 1), k / 5)), {}
        with torch.no_grad():
            logits = run.model(*reads, **more)[:, :T]
        best = torch.where(is_noise | (not masks), logits[..., :-1].argmax(-1), xt)
        assert guess == sample.visible(run.tokenizer.decode(best[0].tolist())).ljust(T)


@pytest.mark.parametrize('asked', ['--corrupt=What', '--export=x'])
def test_what_reads_no_text_refuses_settings_of_texts(run_main, asked):
    status, out, err = run_main('--out_dir=ar', asked, '--save=x.gif')
    assert (status, out) == (2, '') and 'but it must be alone: leave out save' in err
    assert not Path('x.gif').exists() and not Path('x').exists()


def test_noise_is_shown_without_a_run_even_beside_export(run_main):
    alone = run_main('--corrupt=What', '--out_dir=none')
    assert alone[0] == 0 and run_main('--corrupt=What', '--out_dir=none', '--export=x') == alone


def test_ar_learns_to_undo_no_noise(run_main):
    status, out, err = run_main('--out_dir=ar', '--corrupt=What')
    assert (status, out) == (2, '') and 'undoes no noise' in err


BAD = [
    (['--stepz=3'], 'did you mean steps?'), (['--zzz=3'], '--help'),
    (['--steps=many'], "steps is 'many'"), (['--steps=1.5'], 'of type int'),
    (['--temperature=hot'], 'of type float'), (['nofile.py'], 'no config file'),
    (['--out_dir=nowhere'], 'is not a run'), (['--out_dir=folder'], 'is not a run'),
    (['--out_dir=cut'], 'damaged'), (['--out_dir=empty'], 'damaged'),
    (['--out_dir=garbled'], 'damaged'), (['--out_dir=foreign'], 'lacks'),
    (['--out_dir=misfit'], 'do not fit'), (['--device=tpu'], 'device'),
    (['--start=100€'], "'€'"), (['--start=' + 'a' * CONTEXT], 'fills the context'),
    (['--start=a', f'--gen_length={CONTEXT}'], f'block_size is {CONTEXT}'),
    (['--start=' + 'a' * 99], 'fills the context'),
    (['--out_dir=mdm', '--corrupt=' + 'a' * 25], f'block_size is {CONTEXT}'),
    (['--out_dir=block', '--corrupt=' + 'a' * 25], f'block_size is {CONTEXT}'),
    (['--template=To be'], 'with a blank'), (['--template=To [___:0]'], '0 tokens wide'),
    (['--template=[___:25]'], f'block_size is {CONTEXT}'), (['--template=€[_]'], "'€'"),
    (['--template=[_]', '--start=a'], 'leave out start'),
    (['--template=[_]', '--gen_length=3'], 'leave out start'),
    (['--steps=-1'], 'steps is -1'), (['--steps=0'], 'steps is 0'),
    (['--steps=0', '--decoder=remdm'], 'steps is 0'),
    (['--num_samples=0'], 'num_samples'), (['--batch_size=0'], 'batch_size'),
    (['--gen_length=-5'], 'gen_length'), (['--gen_length=1_000_000'], '999999'),
    (['--gen_length=999_999'], 'do not fit'), (['--temperature=-0.5'], 'temperature'),
    (['--top_k=-1'], 'top_k'), (['--top_p=0'], 'top_p'), (['--top_p=1.1'], 'top_p'),
    (['--top_p=nan'], 'top_p'),
    (['--threshold=1.1'], 'threshold'), (['--threshold=0'], 'threshold'),
    (['--eta=-0.1'], 'eta is'), (['--eta=1.5'], 'eta is'), (['--guidance=-1'], 'guidance is'),
    (['--block_length=-1'], 'block_length is -1'),
    (['--prefix_cache'], 'off unless block_length is set'),
    (['--out_dir=block', '--prefix_cache'], 'has an exact cache'),
    (['--out_dir=block', '--prefix_cache', '--block_length=4'], 'has an exact cache'),
    (['--prefix_cache', '--block_length=4', '--guidance=1'], '0 with a cache'),
    (['--out_dir=ar', '--block_length=4'], 'off for ar, which reads no masks'),
    (['--out_dir=ar', '--guidance=1'], 'guidance is 1.0, but it must be off for ar'),
    (['--prompt_file=nowhere.txt'], 'No such file'), (['--prompt_file=mdm'], 'Is a directory'),
    (['--prompt_file=blank.txt'], 'a prompt or a template on each'),
    (['--prompt_file=latin.txt'], 'UTF-8'),
    (['--prompt_file=verse.txt', '--start=a'], 'leave out start'),
    (['--prompt_file=verse.txt', '--template=[_]'], 'leave out start'),
    (['--repetition_penalty=0'], 'repetition_penalty'),
    (['--counts=square'], 'not one of linear, cosine'),
    (['--decoder=greedy'], 'not one of auto, remdm, ancestral, confidence, threshold, remask'),
    *(([f'--out_dir={name}', f'--decoder={other}'], f"decoder is '{other}', not one of auto, "
      f"{'remdm' if name == 'mdm' else 'ancestral'}")
      for name in ('mdm', 'd3pm', 'block') for other in ('ar', 'uniform')),
    *(([f'--out_dir={name}', f'--decoder={other}'], f"'{other}', not one of auto, {name}\n")
      for name in ('ar', 'uniform')
      for other in ('ancestral', 'confidence', 'threshold', 'remask', 'remdm')),
    (['--out_dir=uniform', '--steps=0'], '1 or more: 0, one token a step, is for conf'),
    (['--out_dir=uniform', '--block_length=4'], 'off for uniform'),
    (['--out_dir=uniform', '--guidance=1'], 'off for uniform'),
    (['--out_dir=uniform', '--template=[___:25]'], f'block_size is {CONTEXT}'),
    (['--out_dir=block', '--block_length=5'], 'this model learned blocks of 4'),
    (['--out_dir=block', '--guidance=1'], 'a cache reads it once'),
    (['--decoder=confidence', '--order=best'], 'max_prob, margin, entropy, random'),
    (['--noise_schedule=square'], 'noise_schedule is'), (['--order=best'], 'order is'),
    (['--temperature=1e999'], 'temperature is inf'), (['--repetition_penalty=1e999'], 'penalty is'),
    (['--seed=' + '9' * 25], 'seed is'), (['--template=[___:' + '9' * 20 + ']'], 'with a blank')]


@pytest.mark.parametrize('words, problem', BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line_and_status_2(run_main, words, problem):
    status, out, err = run_main('--out_dir=mdm', *words)
    assert (status, out) == (2, '')
    assert re.fullmatch(r'error: [^\n]+\n', err) and problem in err


def test_the_smallest_temperature_is_still_greedy():
    logits = torch.tensor([[0.0, 3.0, 1.0, -math.inf]] * 9)
    token, _ = draw(logits, generator=noise_source(), temperature=1e-310)
    assert token.tolist() == [1] * 9


def shell(cwd, *words):
    return subprocess.run([sys.executable, str(REPOSITORY / 'sample.py'), *words], text=True,
                          encoding='utf-8', capture_output=True, cwd=cwd)


def test_a_template_is_filled_from_the_shell(runs):
    done = shell(runs, '--out_dir=mdm', '--template=To [___] or [___:9]', '--num_samples=2')
    assert (done.returncode, done.stderr) == (0, '')
    found, (written, _) = texts(done.stdout)
    assert written == 2 * 14 and len(found) == 2
    for text in found:
        assert re.fullmatch(r'(?s)To .{5} or .{9}', text) and set(text) <= set(VERSE)


def test_an_error_in_the_shell_is_one_line_and_status_2(runs):
    done = shell(runs, '--out_dir=cut', '--start=a')
    assert (done.returncode, done.stdout) == (2, '')
    assert re.fullmatch(r'error: [^\n]+damaged[^\n]+\n', done.stderr)


def test_help_in_the_shell_shows_every_setting(runs):
    done = shell(runs, '--help')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.startswith(sample.__doc__.splitlines()[0])
    shown = re.findall(r'^(\w+) = .*#|^(num_samples|gen_length|seed) = ', done.stdout, re.MULTILINE)
    expected = ('out_dir', 'device', 'start', 'template', 'corrupt', 'num_samples', 'gen_length',
              'seed', 'decoder', 'steps', 'threshold', 'temperature', 'top_k', 'top_p')
    assert {a or b for a, b in shown} >= set(expected)
    assert 'def ' not in done.stdout


# Rows: prompts and answers


ALPHABET = 'abcdefgh '
META = {'name': 'rows', 'layout': 'rows', 'row_length': 16, 'max_answer': 7, 'vocab_size': 12,
        'mask_id': 12, 'eos_id': 9, 'sep_id': 10, 'pad_id': 11, 'source': 'a test', 'sha256': '',
        'tokenizer': {'kind': 'char', 'chars': ALPHABET},
        'counts': {'train': {'answer_line': [1.5, 1.2], 'rows': 4, 'scored': 19}}}
BOOK = {'ab': 'ba', 'abc': 'cab b', 'h': 'h', 'a b a': 'aaaaaaa', 'dd': 'hh', 'g g g g': 'fed'}


def encoded(text):
    return prepare.load_tokenizer(META).encode(text)


class Phrasebook:
    """Stands in for a model that knows the answers to some prompts by heart, {prompt: answer}."""

    def __init__(self, book, block_size=20):
        self.book = {tuple(encoded(prompt)): [*encoded(answer), META['eos_id']]
                     for prompt, answer in book.items()}
        self.config = ModelConfig(13, block_size, n_layer=1, n_head=1, n_embd=2)
        self.mask_id, self.device = META['mask_id'], torch.device('cpu')

    def __call__(self, x, t=None, *, cache=None, where):
        """Logits (N, V) that know what stands there; those of a cache, what stands next."""
        if cache is not None:
            x = cache.read = x if cache.length == 0 else torch.cat([cache.read, x], dim=1)
            cache.length = x.size(1)
            x, rows, columns = x[:, 1:], range(len(x)), [x.size(1) - 1] * len(x)
        else:
            rows, columns = where.nonzero().T.tolist()
        logits = torch.zeros(len(columns), 13)
        for n, (row, column) in enumerate(zip(rows, columns)):
            ids = x[row].tolist()
            if META['sep_id'] not in ids:  # still inside the prompt: nobody asks
                continue
            middle = ids.index(META['sep_id'])
            answer = self.book[tuple(ids[:middle])] + [META['pad_id']] * 99
            logits[n, answer[column - middle - 1]] = 20 + 7 * column % 5  # not from the left
        logits[:, self.mask_id] = -math.inf
        return logits


class Undecided(Phrasebook):
    """Holds EOS, SEP and PAD for a little more likely than 'a', and 'a' than all else."""

    def __call__(self, x, t=None, *, cache=None, where):
        logits = torch.zeros(int(where.sum()), 13)
        for i, logit in ((0, 1.0), *((META[key], 1.1) for key in prepare.SPECIALS)):
            logits[:, i] = logit
        return logits


@pytest.mark.parametrize('objective, settings', [
    ('ar', {'decoder': 'ar'}), ('uniform', {'decoder': 'uniform', 'steps': 3}),
    *(('mdm', {'decoder': name, 'steps': 3} | more)
      for name in ('ancestral', 'confidence', 'threshold', 'remask', 'remdm')
      for more in ({}, {'block_length': 2}, {'guidance': 0.5}))])
def test_no_decoder_punishes_specials(objective, settings):
    run = row_run(Undecided({}), objective=objective)
    how = row_settings(repetition_penalty=2.0, **settings)
    given = [META['eos_id'], META['sep_id'], META['pad_id']]
    x, _, _ = sample.decode_batch(run, [given + [12] * 4], how)
    assert set(x[0].tolist()) <= set(given), "with the penalty 'a' would be more likely"
    x, _, _ = sample.decode_batch(run, [[1, 1, 1] + [12] * 4], how)
    assert set(x[0].tolist()) <= {1, *given}, 'as in a row without them'


def row_settings(**settings):
    return sample.defaults() | {'temperature': 0.0, 'decoder': 'confidence',
                                'batch_size': 2} | settings


def row_run(model=None, meta=META, **settings):
    return run_of(model or Phrasebook(BOOK), meta, **settings)


@pytest.mark.parametrize('objective, settings', [
    ('ar', {'decoder': 'ar'}), ('mdm', {}), ('mdm', {'length': 'reference', 'steps': 3}),
    ('mdm', {'block_length': 2, 'steps': 5}), ('mdm', {'decoder': 'threshold'}),
    ('mdm', {'length': 'ratio', 'length_line': (1.0, 8.0), 'steps': 0}),
    ('mdm', {'decoder': 'ancestral', 'steps': 4})])
def test_a_model_that_knows_the_answers_gives_them(objective, settings):
    prompts, answers = (list(map(encoded, texts)) for texts in (BOOK, BOOK.values()))
    how = row_settings(**settings)
    run = row_run(objective=objective)
    canvases, *_ = sample.answer_canvases(run, prompts, how, answers)
    done, (written, _, _) = sample.complete(run, canvases, how, 9)
    assert [prepare.split_row(ids, META) for ids, _ in done] == list(zip(prompts, answers))
    assert written == sum(len(answer) + 1 for answer in answers), 'each with its EOS'
    assert all(ids == prompt + [10] + answer for (ids, _), prompt, answer in
               zip(done, prompts, answers)), 'nothing is left behind EOS'


def masks(canvases):
    assert all(canvas[-1] == 12 for canvas in canvases)
    return [canvas.count(12) for canvas in canvases]


@pytest.fixture
def uncropped(monkeypatch):
    """Canvases as they are before a prediction crops them."""
    monkeypatch.setattr(sample, 'crop_to_predicted', lambda run, canvases, name, settings: (
        canvases, None, 1, 0.0))


def test_how_many_masks_an_answer_gets(uncropped):
    prompts, answers = [[1], [1] * 6, [2] * 12], [[3], [3] * 4, []]

    def widths(run, **settings):
        canvases, *_ = sample.answer_canvases(run, prompts, row_settings(**settings), answers)
        assert [canvas[:len(ids) + 1] for canvas, ids in zip(canvases, prompts)] == \
            [[*ids, 10] for ids in prompts]
        return masks(canvases)

    padded, wide = row_run(), row_run(block_size=99)
    assert widths(padded) == widths(padded, length='full') == [8, 8, 7], 'the window, if it fits'
    assert widths(wide, length='ratio') == [3, 9, 17]  # int(1.3 n + 2)
    fit = [3, 10, 19]  # 1.5 n + 1.2
    assert widths(row_run(predict_pad=False, block_size=99)) == fit
    assert widths(wide, length='fit', length_line=(7.0, 0.0)) == fit
    older = META | {'counts': {'train': {}}}  # prepared before lines were fitted: the ratio then
    assert widths(row_run(meta=older, block_size=99), length='fit') == [3, 10, 18]
    assert widths(padded, length='ratio', length_line=(0.5, 1.0)) == [1, 4, 7]
    assert widths(padded, length='ratio', length_line=(0.0, 0.0)) == [1, 1, 1]
    assert widths(padded, length='reference') == [2, 5, 1]
    assert widths(row_run(objective='ar')) == [18, 13, 7], 'all of the context'
    assert widths(padded, length='argmax') == [8, 8, 7], 'to be cut when it is predicted'


def test_of_the_right_answer_no_more_than_its_length_is_known(uncropped):
    prompts = [[1, 2], [3]]
    for name in sample.LENGTHS:
        how = row_settings(length=name)
        run = row_run(length_head=f'{name}_x')
        one, other, longer = (sample.answer_canvases(run, prompts, how, answers)[0]
                              for answers in ([[4, 5], [6]], [[7, 0], [1]], [[4, 5, 5], [6, 6]]))
        assert one == other and (one != longer) == (name == 'reference')


class Ends:
    """Stands in for a model with known P(EOS), (rows, W), after prompts of 2 tokens."""
    mask_id = META['mask_id']

    def __init__(self, p):
        self.p, self.device = p, torch.device('cpu')

    def __call__(self, x, t=None, *, where):
        B, W = self.p.shape
        assert where.tolist() == [[False] * 3 + [True] * W] * B
        assert t is None  # a Transformer counts the masks
        p = torch.full((B, W, 13), 0.0)
        p[..., 9], p[..., 2] = self.p, 1 - self.p
        return (p.log() + torch.randn(B, W, 1, generator=noise_source())).flatten(0, 1)


@pytest.mark.parametrize('quantile', [0.1, 0.5, 0.9, 1.0])
def test_lengths_are_read_off_the_probabilities_of_an_eos(quantile):
    """By a loop, and with all of them as small as they are where a PAD is likelier."""
    p_eos = torch.rand(40, 6, generator=noise_source(1)) ** 3 / 50
    x = torch.tensor([[1, 2, 10] + [12] * 6] * 40)
    predict = partial(sample.predict_lengths, Ends(p_eos), x, quantile=quantile, eos_id=9)
    for row, likeliest, held in zip(p_eos.tolist(), predict(name='argmax').tolist(),
                                    predict(name='quantile').tolist()):
        assert likeliest == 1 + row.index(max(row))
        sums = [math.fsum(row[:i + 1]) / math.fsum(row) for i in range(6)]
        if min(abs(s - quantile) for s in sums) > 1e-6:
            assert held == 1 + sum(s < quantile for s in sums)
        assert 1 <= held <= 6


def test_canvases_are_cut_to_powers_of_two(monkeypatch):
    """Whatever is predicted, for prompts of three lengths, of which one hardly fits."""
    lengths = dict(zip('abcdefgh', (1.0, 2.0, 2.1, 4.0, 5.0, -3.0, 1e9, 3.999)))
    prompts = [encoded(p) for p in 'abcdefgh'] + [encoded('ac'), encoded('aaaaaaaaaaaacb')]
    asked = []

    def predict(model, x, name, quantile, eos_id):
        asked.append(x.tolist())
        assert (name, quantile, eos_id) == ('quantile', 0.8, 9)
        return torch.tensor([lengths[ALPHABET[row[row.index(10) - 1]]] for row in asked[-1]])

    monkeypatch.setattr(sample, 'predict_lengths', predict)
    how = row_settings(length='quantile', length_quantile=0.8, batch_size=3)
    run = row_run()
    full, *nothing = sample.answer_canvases(run, prompts, how | {'length': 'full'})
    assert nothing == [None, 0, 0.0]
    canvases, predicted, passes, seconds = sample.answer_canvases(run, prompts, how)
    assert masks(canvases) == [1, 2, 4, 4, 8, 1, 8, 4, 4, 2]
    assert masks(full) == [8] * 9 + [5]
    assert all(new == old[:len(new)] for new, old in zip(canvases, full))
    assert predicted == pytest.approx([*lengths.values(), 2.1, 2.0])
    assert passes == len(asked) == 5 and seconds > 0
    assert sorted(row for batch in asked for row in batch) == sorted(full)
    for objective, name in (('mdm', 'full'), ('mdm', 'ratio'), ('ar', 'auto')):
        _, *nothing = sample.answer_canvases(row_run(objective=objective), prompts,
                                             row_settings(length=name))
        assert nothing == [None, 0, 0.0] and len(asked) == 5


@pytest.mark.parametrize('name', ['argmax', 'quantile'])
def test_no_length_is_read_off_an_eos_that_is_also_pad(name):
    """EOS is then likely everywhere behind the answer, and not at its end alone."""
    same = row_run()._replace(meta=META | {'pad_id': META['eos_id']})
    with pytest.raises(UserError, match='PAD is EOS in this vocabulary'):
        sample.length_name(name, same)


@pytest.mark.parametrize('name', ['argmax', 'quantile'])
@pytest.mark.parametrize('settings', [{}, {'block_length': 3}, {'decoder': 'threshold'}])
def test_a_canvas_that_was_cut_gives_the_same_answer(name, settings):
    """Of a model that knows where to end in any canvas."""
    prompts, answers = (list(map(encoded, texts)) for texts in (BOOK, BOOK.values()))
    how = row_settings(length=name, length_quantile=0.99, **settings)
    run = row_run()
    canvases, predicted, _, _ = sample.answer_canvases(run, prompts, how)
    assert predicted == [len(answer) + 1 for answer in answers]
    assert masks(canvases) == [4, 8, 2, 8, 4, 4]
    done, _ = sample.complete(run, canvases, how, 9)
    assert [prepare.split_row(ids, META) for ids, _ in done] == list(zip(prompts, answers))


def sequential_nll(model, x0, order):
    """(B,) -log p of the tokens of x0 in the order 1, 2, ... of their positions; 0 is given."""
    nll = torch.zeros(len(x0))
    for k in range(1, order.max() + 1):
        with torch.no_grad():
            logits = model(torch.where(order >= k, model.mask_id, x0))
        nll -= (logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0] * (order == k)).sum(1)
    return nll


@pytest.mark.parametrize('objective, decoder', [('ar', 'ar'), ('mdm', 'confidence')])
def test_log_p_is_the_likelihood_of_what_was_written(objective, decoder):
    """A token a pass: what the passes add up to is log p of the text in that order."""
    model = tiny_model(causal=objective == 'ar', V=12, seed=7)
    canvases = [[1, 2, 11, 11, 11, 11, 11], [3, 4, 5, 11, 11, 11, 11], [0, 6, 6, 11, 11, 11, 11]]
    x, orders = torch.tensor(canvases), torch.zeros(3, 7, dtype=torch.long)
    how = row_settings(decoder=decoder, steps=0, temperature=1.0, batch_size=3)

    def on_step(x, nfe, where, logits):
        orders[(orders == 0) & (x != torch.tensor(canvases))] = nfe

    run = run_of(model, objective=objective)
    done, _ = sample.complete(run, canvases, how, on_step=on_step)
    again, _ = sample.complete(run, canvases, how, with_log_p=True)
    assert [ids for ids, _ in done] == [ids for ids, _ in again]
    x0, given = torch.tensor([ids for ids, _ in done]), x != 11
    if objective == 'ar':
        nll = run.objective.bound(model, x0, None, given)
    else:
        nll = sequential_nll(model, x0, orders.masked_fill(given, 0))
    log_p = torch.tensor([figures['log_p'] for _, figures in again])
    torch.testing.assert_close(log_p * (~given).sum(1), -nll, rtol=1e-4, atol=1e-5)
    assert all('log_p' not in figures for _, figures in done)


def test_a_row_is_not_written_beyond_its_own_canvas():
    """AR takes canvases of any lengths together: a pass for each column that any of them asks."""
    run = run_of(tiny_model(causal=True, V=12, T=20), objective='ar')
    short, long = [1, 2] + [11] * 3, list(range(10)) + [11] * 4
    how, seen = row_settings(decoder='ar', temperature=0.0, batch_size=2), []
    done, (written, nfe, _) = sample.complete(run, [short, long], how, eos_id=3,
                                              on_step=lambda x, *_: seen.append(x[0].tolist()))
    assert nfe <= 3 + 4 and written <= 7
    assert len({*map(tuple, seen)}) <= 1 + 3 and all(x[5:] == [11] * 9 for x in seen)
    for (ids, _), canvas in zip(done, (short, long)):
        ((alone, _),), _ = sample.complete(run, [canvas], how, eos_id=3)
        assert ids == alone


class Counting(Phrasebook):
    """Knows its answers, repeats them if there is room, and is the surer the better they fit."""

    def __call__(self, x, t=None, *, where):
        logits = torch.zeros(int(where.sum()), 13)
        for n, (row, column) in enumerate(where.nonzero().tolist()):
            middle = x[row].tolist().index(META['sep_id'])
            answer, room = self.book[tuple(x[row, :middle].tolist())], x.size(1) - middle - 1
            written = (answer[:-1] * room)[:room - 1] + answer[-1:]
            logits[n, written[column - middle - 1]] = 20 - 2 * abs(room - len(answer))
        logits[:, self.mask_id] = -math.inf
        return logits


def test_the_most_confident_of_several_lengths():
    """Of a model that is sure of the right one: whatever is among the candidates, or next to it."""
    prompts, answers = (list(map(encoded, texts)) for texts in (BOOK, BOOK.values()))
    run = row_run(Counting(BOOK, 11), predict_pad=False, block_size=11)
    for n, reach in ((1, (0, 0)), (2, (1, 0)), (3, (1, 1)), (5, (2, 2)), (6, (3, 2))):
        how = row_settings(length='fit', length_candidates=n)
        canvases, *_ = sample.answer_canvases(run, prompts, how)
        done, (written, nfe, _) = sample.complete_best(run, canvases, how)
        assert len(done) == len(prompts) and done[0][1]['nfe'] <= nfe
        assert n == 1 or done[0][1]['nfe'] > n, 'the passes of all that was tried'
        for (ids, _), canvas, prompt, answer in zip(done, canvases, prompts, answers):
            width = canvas.count(12)
            low, high = max(width - reach[0], 1), min(width + reach[1], 10 - len(prompt))
            best = min(max(len(answer) + 1, low), high)
            assert ids == prompt + [10] + (answer * 9)[:best - 1], (n, prompt)
    assert canvases == sample.answer_canvases(run, prompts, how)[0], 'those are as they were'


@pytest.mark.parametrize('settings, run, message', [
    ({'length_candidates': 3, 'length': 'full'}, {}, 'unless masks are filled'),
    ({'length_candidates': 3}, {'predict_pad': True}, 'unless masks are filled'),
    ({'length_candidates': 3}, {'objective': 'ar'}, 'unless masks are filled'),
    ({'length_candidates': 3}, {'objective': 'uniform'}, 'unless masks are filled')])
def test_where_there_are_no_candidates(settings, run, message):
    run = row_run(**{'predict_pad': False} | run)
    with pytest.raises(UserError, match=f'length_candidates is .*{message}'):
        sample.complete_best(run, [[1, 10, 12]], row_settings(**settings))


def test_auto_is_the_head_that_was_trained():
    for head, name in (('regress_concat', 'regress'), ('classify', 'classify'), ('', 'full'),
                       ('encoder_classify', 'encoder')):
        assert sample.length_name('auto', row_run(length_head=head)) == name
    assert sample.length_name('auto', row_run()) == 'full', 'of an older run'
    for objective in ('uniform', 'block'):  # which never see masks alone
        run = row_run(objective=objective)
        assert sample.length_name('auto', run) == 'full'
        with pytest.raises(UserError, match='all masks'):
            sample.length_name('quantile', run)


@pytest.mark.parametrize('ids, prompt, answer', [
    ([1, 10, 2, 3, 9, 11, 11], [1], [2, 3]), ([1, 1, 10, 9, 5], [1, 1], []), ([10, 4], [], [4]),
    ([1, 10, 2, 11, 3, 10, 4, 9, 9], [1], [2, 3, 4]), ([1, 10, 11, 11], [1], []),
    ([9, 10, 2, 9], [9], [2])])
def test_an_answer_is_what_stands_between_sep_and_eos(ids, prompt, answer):
    assert prepare.split_row(ids, META) == (prompt, answer)


@pytest.fixture(scope='module')
def row_runs(runs):
    """The runs row_ar, row_mdm, row_pad, row_head, row_docs, random weights, with the others."""
    settings = torch.load(runs / 'mdm' / 'ckpt.pt', weights_only=True)['config']
    trained = {'objective': 'mdm', 'predict_pad': True, 'block_size': 20}
    for name, more in (('row_ar', {'objective': 'ar'}), ('row_mdm', {'predict_pad': False}),
                       ('row_pad', {}), ('row_head', {'length_head': 'classify'}),
                       ('row_docs', {})):
        run = trained | more
        model = tiny_model(run['objective'] == 'ar', 13, 20, seed=3,
                           length_head=run.get('length_head', ''))
        (runs / name).mkdir()
        meta = META if name != 'row_docs' else META | {'sep_id': None, 'eos_id': 10, 'tokenizer': {
            'kind': 'char', 'chars': ALPHABET + 'i'}}
        torch.save({'model': model.state_dict(), 'optimizer': [], 'meta': meta, 'iter': 7,
                    'config': settings | run, 'rng': 0, 'best': 1.5}, runs / name / 'ckpt.pt')
    return runs


def test_batches_of_one_seed_are_not_those_of_the_next_seeds(runs, run_main):
    """torch's generators are not independent under neighbouring seeds."""
    words = ('--out_dir=mdm', '--start=a', '--json', '--temperature=1', '--steps=5')
    texts = {seed: [row['text'] for row in objects(run_main(
        *words, '--num_samples=8', '--batch_size=4', f'--seed={seed}')[1])] for seed in (1, 5)}
    assert texts[1][4:] != texts[5][:4] and len(set(texts[1] + texts[5])) == 16
    (alone,) = objects(run_main(*words, '--seed=1')[1])
    assert objects(run_main(*words, '--seed=1', '--num_samples=2', '--batch_size=1')[1])[0][
        'text'] == alone['text'], 'one batch has the seed as it is'


def test_a_template_of_documents_keeps_what_is_given_behind_an_eos(row_runs, run_main):
    words = ('--out_dir=row_docs', '--num_samples=40', '--json', '--temperature=1')
    given = [encoded('ab'), encoded('cd')]
    rows = objects(run_main('--template=ab[___]cd', *words)[1])
    assert all([row['tokens'][:2], row['tokens'][7:]] == given for row in rows)
    assert any(10 in row['tokens'] for row in rows), 'an EOS'
    rows = objects(run_main('--start=ab', *words)[1])  # a text ends, and has no PAD
    assert all(set(row['tokens']) <= set(range(10)) for row in rows)
    assert min(len(row['tokens']) for row in rows) < 8


@pytest.mark.parametrize('settings, text, wanted, width', [
    ({}, '', 0, 8),  # with EOS as many as the longest, 7
    ({'predict_pad': False}, '', 0, 5),  # 19 tokens, EOS among them, of 4 documents
    ({'predict_pad': False, 'objective': 'uniform'}, '', 0, 5),
    ({'predict_pad': False}, 'abcabc', 0, 7), ({}, 'abc', 9, 12), ({}, 'ab' * 12, 0, None),
    ({'objective': 'ar'}, '', 0, 20), ({'objective': 'block', 'block_length': 4}, '', 0, 20)])
def test_a_masked_model_of_documents_gets_a_canvas_as_wide_as_in_training(settings, text, wanted,
                                                                          width):
    run = run_of(tiny_model(V=13, T=20), META | {'sep_id': None}, **settings)
    if width is None:
        with pytest.raises(UserError, match='fills the context of 20'):
            sample.text_canvas(run, 'prompt', text, {'gen_length': wanted})
    else:
        canvas = sample.text_canvas(run, 'prompt', text, {'gen_length': wanted})
        assert (len(canvas), canvas.count(12)) == (width, width - len(text))


@pytest.mark.parametrize('name, width', [('row_ar', 14), ('row_mdm', 9), ('row_pad', 8)])
def test_prompts_are_answered_from_the_command_line(row_runs, run_main, name, width):
    (row_runs / 'questions.txt').write_text('abc h\n\n  ab\n')
    words = (f'--out_dir={name}', '--num_samples=8', '--temperature=1', '--batch_size=8')
    status, out, err = run_main('--start= abc h ', '--json', *words)
    rows = objects(out)
    assert (status, err, len(rows)) == (0, '', 8)
    assert {len(row['tokens']) for row in rows} != {width}, 'some end'
    for row in rows:
        assert row['prompt'] == ' abc h ' and set(row['tokens']) <= set(range(9))
        assert row['text'] == ''.join(ALPHABET[i] for i in row['tokens'])
        assert len(row['tokens']) <= width
    assert len({row['text'] for row in rows}) > 4
    found, _ = texts(run_main('--prompt_file=questions.txt', *words)[1])
    assert len(found) == 16 and set(''.join(found)) <= set(ALPHABET)
    assert found[:8] == [row['text'] for row in rows], 'spaces around a prompt mean nothing'


@pytest.mark.parametrize('name', ['row_ar', 'row_mdm', 'row_head'])
def test_a_chat_answers_line_by_line_until_an_empty_one(row_runs, run_main, monkeypatch, name):
    words = (f'--out_dir={name}', '--temperature=1')
    answers = [texts(run_main(f'--start={line}', *words)[1])[0][0] for line in ('abc h', 'ab')]
    for given, lines in ((' abc h\nab\n\nb\n', answers), ('ab', answers[1:]), ('', [])):
        monkeypatch.setattr(sys, 'stdin', io.StringIO(given))
        assert run_main('--chat', *words) == (0, ''.join(line + '\n' for line in lines), '')
    monkeypatch.setattr(sys, 'stdin', io.StringIO('ab\nx\n'))
    status, out, err = run_main('--chat', *words)
    assert (status, out) == (2, answers[1] + '\n') and err.count('\n') == 1 and "know 'x'" in err


@pytest.mark.parametrize('max_answer, kept', [(9, 5), (40, 3), (190, 1)])
def test_a_chat_reads_the_turns_as_training_did_the_latest_that_fit(monkeypatch, max_answer, kept):
    """Against the rows that prepare.py makes of the same conversation."""
    turns = ['hi', 'Hello.', 'how  are you?', 'Well, and you?', 'fine, thanks']
    whole = [{'role': ('user', 'assistant')[i % 2], 'content': turn}
             for i, turn in enumerate([*turns, 'Good.'])]
    chars = ''.join(map(chr, range(32, 127))) + '\n'
    ids = {'eos_id': 96, 'sep_id': 97, 'pad_id': 98}
    meta = {'tokenizer': {'kind': 'char', 'chars': chars}, 'max_answer': max_answer, **ids}
    tokenizer = prepare.load_tokenizer(meta)
    answers, asked = iter(turns[1::2] + ['Good.']), []

    def answer(run, prompts, settings):
        asked.append(tokenizer.decode(prompts[0]))
        return [tokenizer.encode(next(answers))], {}, None

    monkeypatch.setattr(sample, 'answer', answer)
    run = types.SimpleNamespace(meta=meta | {'is_chat': True}, tokenizer=tokenizer,
                                settings={'block_size': 120})
    sample.chat_with(run, {}, [turn + '\n' for turn in turns[::2]])
    rows = prepare.unfold_turns([json.dumps(whole[-1 - kept:])])
    assert asked[-1] == rows[-1][0]
    if kept == 5:
        assert asked == [prompt for prompt, _ in rows]


def test_the_most_confident_of_several_lengths_from_the_command_line(row_runs, run_main):
    words = ('--out_dir=row_mdm', '--start=abc h', '--decoder=confidence', '--temperature=0')
    words += ('--length=ratio', '--json')
    single = {width: objects(run_main(*words, f'--length_line=(0,{width})')[1])[0]['text']
              for width in range(3, 8)}
    row, = objects(run_main(*words, '--length_line=(0,5)', '--length_candidates=5')[1])
    assert row['text'] in single.values() and row['log_p'] < 0


def test_a_predicted_length_costs_a_pass_and_cuts_the_canvas(row_runs, run_main):
    """What the head says of a prompt is what is written: no EOS is, at these weights, but masks."""
    words = ('--out_dir=row_head', '--start=abc h', '--decoder=confidence', '--steps=0')
    full, (_, passes) = texts(run_main(*words, '--length=full')[1])
    assert passes <= 8
    model = sample.load_run(row_runs / 'row_head', 'cpu').model
    x = torch.tensor([encoded('abc h') + [10] + [12] * 8])
    for quantile in (0.01, 0.5, 0.99):
        length = int(model.length_head.predict(model, x, quantile))
        bound = next(n for n in (1, 2, 4, 8) if n >= length)
        _, (written, passes) = texts(run_main(*words, f'--length_quantile={quantile}')[1])
        assert written <= bound and passes <= bound + 1
        if written == bound:
            assert passes == bound + 1


@pytest.mark.parametrize('words, problem', [
    (['--start='], 'ask it by start'), (['--start=  '], 'ask it by start'),
    (['--template=a [_]'], 'is no prompt'), (['--start=ab', '--gen_length=3'], 'length says'),
    (['--start=' + 'a' * 19], 'no room for an answer'),
    (['--start=ab', '--length=long'], 'auto, full, fit, ratio'), (['--start=x'], "know 'x'"),
    (['--start=ab', '--length=reference'], 'no reference is known'),
    (['--start=ab', '--length=ratio', '--length_line=(1e999,2)'], 'length_line is (inf, 2)'),
    (['--start=ab', '--length=ratio', '--length_line=(1,-1)'], 'length_line is (1, -1)'),
    (['--start=ab', '--length=ratio', '--length_line=(1e308,2)'], 'length_line is (1e+308, 2)'),
    (['--start=ab', '--length_line=(1,2,3)'], 'must be two numbers'),
    (['--start=ab', '--length_ratio=1'], "no setting is called 'length_ratio'"),
    (['--start=ab', '--length=full', '--out_dir=row_ar'], 'until it is done'),
    (['--start=a', '--length=full', '--out_dir=mdm'], 'without answers'),
    (['--start=a', '--length=argmax', '--out_dir=mdm'], 'without answers'),
    (['--start=ab', '--length=argmax', '--out_dir=row_ar'], 'until it is done'),
    (['--start=ab', '--length=quantile'], 'train with predict_pad'),
    (['--start=ab', '--length=regress', '--out_dir=row_pad'], 'config/length_regress.py trains'),
    (['--start=ab', '--length=encoder', '--out_dir=row_head'], 'config/length_encoder.py trains'),
    (['--start=ab', '--length=argmax', '--out_dir=row_pad', '--length_quantile=0'],
     'length_quantile is 0.0'),
    (['--start=ab', '--length_candidates=0'], 'length_candidates is 0'),
    (['--start=ab', '--length_candidates=3', '--watch'], '1 with watch or save'),
    (['--start=ab', '--watch', '--json'], 'False with json'),
    (['--chat', '--start=ab'], 'chat is True, but it must be alone'),
    (['--chat', '--cleanup'], 'chat is True, but it must be alone'),
    (['--chat', '--gen_length=3'], 'chat is True, but it must be alone'),
    (['--chat', '--num_samples=2'], 'chat is True, but it must be alone'),
    (['--save=nowhere/x.gif'], 'in a folder that is there'),
    (['--chat', '--out_dir=mdm'], 'False for a run without answers'),
    (['--chat', '--length=full', '--out_dir=row_ar'], 'until it is done'),
    (['--start=ab', '--length_candidates=3', '--out_dir=row_pad'], 'unless masks are filled'),
    (['--start=a', '--length_candidates=3', '--out_dir=mdm'], 'without answers')])
def test_bad_questions_are_one_line(row_runs, run_main, words, problem, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', io.StringIO('ab\n'))
    status, out, err = run_main('--out_dir=row_mdm', *words)
    assert (status, out) == (2, '')
    assert re.fullmatch(r'error: [^\n]+\n', err) and problem in err
