"""sample.py against enumeration, numpy and naive loops, on tiny transformers with random weights.

A fresh Transformer has a zero head, so all its predictions are uniform and most errors would not
show: tiny_model draws every weight. Chi-square tests run with fixed seeds and fail below 1e-4.
"""

import base64
import collections
import itertools
import math
import re
import subprocess
import sys
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
from model import ModelConfig, Transformer
from sample import decode_ancestral, decode_ar, decode_confidence, draw

REPOSITORY = Path(__file__).parents[1]
ORDERS = ('max_prob', 'margin', 'entropy', 'random')
DECODERS = {'ar': lambda model, x, steps, **drawing: decode_ar(model, x, **drawing),
            'ancestral-linear': partial(decode_ancestral, schedule='linear'),
            'ancestral-cosine': partial(decode_ancestral, schedule='cosine'),
            **{f'confidence-{order}-{how}': partial(decode_confidence, order=order, **how_many)
               for order in ORDERS for how, how_many in (
                   ('linear', {'counts': 'linear'}), ('cosine', {'counts': 'cosine'}),
                   ('threshold', {'threshold': 0.4}))}}
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
    model = Transformer(ModelConfig(V, T, causal, n_layer=2, n_head=2, n_embd=16, **shape)).eval()
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


# draw


def distribution(logits, seen, temperature, top_k, top_p, repetition_penalty):
    """What draw should draw from, in plain numpy: penalty, temperature, top_k, top_p, in turn."""
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


@pytest.mark.parametrize('drawing', [
    {}, {'temperature': 0.5}, {'temperature': 3.0}, {'top_k': 2}, {'top_k': 3, 'temperature': 2.0},
    {'top_p': 0.7}, {'top_p': 0.95, 'temperature': 0.3}, {'top_k': 4, 'top_p': 0.9},
    {'repetition_penalty': 1.8}, {'repetition_penalty': 0.6, 'temperature': 0.8},
    {'repetition_penalty': 2.5, 'top_k': 2, 'top_p': 0.99, 'temperature': 1.3}])
def test_frequencies_are_those_of_the_closed_form(drawing):
    logits, seen = [1.2, -0.4, 0.9, -8.0, 0.1, -math.inf], [True, True, False, False, True, False]
    drawing = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'repetition_penalty': 1.0} | drawing
    token, _ = draw(torch.tensor([logits] * 200_000), torch.tensor([seen] * 200_000),
                    generator=noise_source(), **drawing)
    expected = distribution(logits, seen, **drawing)
    assert p_value(collections.Counter(token.tolist()), expected) > 1e-4
    assert (3 in expected) == (5 not in expected and drawing['top_k'] == 0
                               and drawing['top_p'] == 1)  # the token of p = 5e-5 is there


def test_the_race_is_run_in_float64(monkeypatch):
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
    token, _ = draw(logits, seen, generator=noise_source(), temperature=0,
                    repetition_penalty=penalty)
    for row, z in enumerate(logits.double().numpy()):
        z = np.where(seen[row], np.where(z > 0, z / penalty, z * penalty), z)
        assert token[row] == z.argmax()
    plain, _ = draw(logits, generator=noise_source(), temperature=0, top_k=2, top_p=0.1)
    assert torch.equal(plain, logits.argmax(-1))


def test_the_probability_is_the_models_own():
    """Confidence is read off it, so no setting of the draw may change it."""
    logits = torch.randn(50, 7, generator=noise_source(3))
    seen = torch.rand(50, 7, generator=noise_source(4)) < 0.5
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    for temperature in (0, 0.2, 1.0, 4.0):
        token, probability = draw(logits, seen, generator=noise_source(), temperature=temperature,
                                  top_k=4, top_p=0.8, repetition_penalty=1.7)
        assert probability.numpy() == pytest.approx(p[np.arange(50), token.numpy()], rel=1e-5)


# What holds for every decoder

# Learned positions: with rope every mask of an all-mask canvas gets the same prediction, so that
# which is the surest would be a matter of rounding.
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
@repeatable(max_examples=25)
@given(x=canvases(), steps=st.integers(1, 12), seed=st.integers(0, 999), drawing=st.sampled_from(
    [{}, {'temperature': 0}, {'repetition_penalty': 1.5, 'temperature': 0.7},
     {'top_k': 1}, {'top_k': 3, 'top_p': 0.8}]))
def test_every_decoder_keeps_its_promises(decoder, x, steps, seed, drawing):
    model, canvas, recorded, calls = model_for(decoder), x.clone(), [], []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    decode = partial(DECODERS[decoder], model, x, steps=steps, **drawing)
    y, nfe = decode(generator=noise_source(seed),
                    on_step=lambda x, nfe: recorded.append((x.clone(), nfe)))
    hook.remove()
    assert torch.equal(x, canvas), 'the canvas that came in is the caller\'s'
    assert torch.equal(y[x != MASK], x[x != MASK]), 'a given token was changed'
    assert y.shape == x.shape and y.min() >= 0 and y.max() < MASK, 'a mask is left'
    assert nfe == len(calls) and (nfe > 0) == bool((x == MASK).any())
    assert torch.equal(decode(generator=noise_source(seed))[0], y)

    assert [n for _, n in recorded] == list(range(1, nfe + 1))
    states = [x] + [step for step, _ in recorded]
    assert torch.equal(states[-1], y)
    for before, after in zip(states, states[1:]):
        was, still = before == MASK, after == MASK
        assert still.sum() < was.sum() and not (still & ~was).any()
        assert torch.equal(before[~was], after[~was]), 'a token was written twice'


@pytest.mark.parametrize('decoder', ['ar'] + [
    f'confidence-{order}-{how}' for order in ORDERS[:3]
    for how in ('linear', 'cosine', 'threshold')])
@repeatable(max_examples=15)
@given(x=canvases(max_rows=4), steps=st.integers(1, 10))
def test_a_greedy_row_does_not_depend_on_the_others(decoder, x, steps):
    decode = partial(DECODERS[decoder], model_for(decoder), steps=steps, temperature=0,
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


def reverse_step(model, alpha_t, alpha_s, temperature, x):
    """{canvas: probability} of one reverse step: every mask is revealed or not, on its own."""
    p = predictions(model, x, 1 - alpha_t)[:, :LETTERS] ** (1 / temperature)
    p /= p.sum(1, keepdims=True)
    reveal = (alpha_s - alpha_t) / (1 - alpha_t)
    choices = [[(token, 1.0)] if token != LETTERS else
               [(LETTERS, 1 - reveal), *((v, reveal * p[i, v]) for v in range(LETTERS))]
               for i, token in enumerate(x)]
    return {tuple(v for v, _ in ys): math.prod(q for _, q in ys)
            for ys in itertools.product(*choices)}


def reverse_chain(model, N, schedule, temperature=1.0, start=BLANK_ROW):
    alpha = {'linear': lambda t: 1 - t, 'cosine': lambda t: 1 - math.sin(math.pi / 2 * t)}[schedule]
    return chain([partial(reverse_step, model, alpha(n / N), alpha((n - 1) / N), temperature)
                  for n in range(N, 0, -1)], start)


@pytest.mark.parametrize('time_cond', [False, True])
@pytest.mark.parametrize('N, schedule, temperature, start', [
    (1, 'linear', 1.0, BLANK_ROW), (2, 'linear', 1.0, BLANK_ROW), (3, 'linear', 0.6, BLANK_ROW),
    (3, 'cosine', 1.0, BLANK_ROW), (2, 'cosine', 1.0, (LETTERS, 1, LETTERS))])
def test_ancestral_follows_the_reverse_chain(time_cond, N, schedule, temperature, start):
    model = tiny_model(V=LETTERS + 1, T=LENGTH, seed=7, time_cond=time_cond)
    y, _ = decode_ancestral(model, torch.tensor([start] * ROWS), steps=N, schedule=schedule,
                            temperature=temperature, generator=noise_source(N))
    assert p_value(tally(y), reverse_chain(model, N, schedule, temperature, start)) > 1e-4
    if start == BLANK_ROW and N > 1:  # the test can tell this chain from its neighbours
        other = {'linear': 'cosine', 'cosine': 'linear'}[schedule]
        for wrong in (reverse_chain(model, N - 1, schedule, temperature),
                      *([reverse_chain(model, N, other, temperature)] if time_cond else [])):
            assert p_value(tally(y), wrong) < 1e-6


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


def surest_step(model, order, x):
    """{canvas: probability}: a token is drawn for every mask, and the surest of them stays."""
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
def test_confidence_draws_for_all_and_keeps_the_surest(order):
    """At temperature 1 max_prob scores the token that was drawn, not the likeliest one."""
    model = tiny_model(V=LETTERS + 1, T=LENGTH, seed=7, pos='learned')
    y, _ = decode_confidence(model, torch.tensor([BLANK_ROW] * ROWS), steps=LENGTH, order=order,
                             generator=noise_source())
    assert p_value(tally(y), chain([partial(surest_step, model, order)] * LENGTH)) > 1e-4
    assert p_value(tally(y), any_order_average(model)) < 1e-6


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


def naive_confidence(model, x, order, remaining=None, threshold=None, penalty=1.0):
    """One row; remaining: masks left after each step, or else the threshold. (x, passes)."""
    mask, x, passes = len(model.embed.weight) - 1, list(x), 0
    todo = iter(remaining or [])
    while mask in x:
        masked = [i for i, token in enumerate(x) if token == mask]
        n = len(masked) - next(todo) if remaining is not None else 1
        if n == 0:
            continue
        z, passes = naive_logits(model, x), passes + 1
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        tokens = [greedy_token(row, x, penalty) for row in z]
        score = naive_scores(p, order)
        if order == 'max_prob':
            score = p[np.arange(len(x)), tokens]  # of the token taken, which a penalty may change
        chosen = sorted(masked, key=lambda i: -score[i])[:n]
        chosen += [i for i in masked if threshold is not None and score[i] > threshold]
        for i in chosen:
            x[i] = tokens[i]
    return x, passes


WIDE = {'V': 12, 'T': 16}
WIDE_MASK = 11
SHAPES = [{}, {'pos': 'learned', 'norm': 'layernorm', 'mlp': 'gelu', 'bias': True, 'tied': True},
          {'n_kv_head': 1, 'mlp': 'swiglu', 'qk_norm': False}]


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
    """Masks left of n after steps 1..steps, as the docstring of decode_confidence has it."""
    if counts == 'linear':
        return [n * (steps - i) // steps for i in range(1, steps + 1)]
    return [math.floor(n * math.cos(math.pi / 2 * i / steps) + 1e-9) for i in range(1, steps + 1)]


@pytest.mark.parametrize('order', ORDERS[:3])
@pytest.mark.parametrize('counts', ['linear', 'cosine'])
@pytest.mark.parametrize('steps', [1, 3, 5, 16, 40])
def test_confidence_agrees_with_a_naive_loop(order, counts, steps):
    model = tiny_model(seed=5, time_cond=steps == 5, **WIDE)
    x = wide_canvas(3, steps, 0.7)
    for penalty in (1.0, 1.6):
        y, _ = decode_confidence(model, x, steps=steps, order=order, counts=counts, temperature=0,
                                 repetition_penalty=penalty, generator=noise_source())
        for row, result in zip(x.tolist(), y.tolist()):
            left = remaining(row.count(WIDE_MASK), steps, counts)
            assert result == naive_confidence(model, row, order, left, penalty=penalty)[0]


def test_ar_writes_nothing_after_eos():
    """Rows end apart; each is the row without an eos up to its first one, then eos only."""
    model = tiny_model(causal=True, seed=5, **WIDE)
    x = torch.full((6, 14), WIDE_MASK)
    x[:, 9] = 1  # given, behind where most rows end
    free, _ = decode_ar(model, x, generator=noise_source(2))
    eos = free[:, 3].mode().values.item()
    y, nfe = decode_ar(model, x, eos_id=eos, generator=noise_source(2))
    ends = []
    for row, same in zip(y.tolist(), free.tolist()):
        end = next((i for i, token in enumerate(row) if token == eos and i != 9), 14)
        ends.append(end)
        assert row[:end] == same[:end]
        assert all(token == (1 if i == 9 else eos) for i, token in enumerate(row) if i > end)
    assert len(set(ends)) > 1 and nfe <= 13
    greedy = x[:1].clone()
    first = decode_ar(model, greedy, temperature=0, generator=noise_source())[0][0, 0].item()
    assert decode_ar(model, greedy, eos_id=first, temperature=0, generator=noise_source())[1] == 1


@pytest.mark.parametrize('threshold', [0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize('order', ORDERS[:3])
def test_threshold_commits_all_above_it_and_at_least_one(order, threshold):
    model, x = tiny_model(seed=5, **WIDE), wide_canvas(4, 9, 0.8)
    y, nfe = decode_confidence(model, x, steps=2, order=order, threshold=threshold, temperature=0,
                               generator=noise_source())
    naive = [naive_confidence(model, row, order, threshold=threshold) for row in x.tolist()]
    assert y.tolist() == [result for result, _ in naive]
    assert nfe == max(passes for _, passes in naive)
    if threshold == 1.0:
        assert nfe == (x == WIDE_MASK).sum(1).max()


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
                      on_step=lambda x, nfe: recorded.append((x == WIDE_MASK).sum(1).tolist()))
    stated = [list(left) for left in zip(*(remaining(n, steps, counts) for n in masks))]
    changed = [b for a, b in zip([masks, *stated], stated) if a != b]
    assert recorded == changed


COUNTED = tiny_model(seed=6, **WIDE)


def test_linear_counts_differ_by_at_most_one_and_cosine_counts_grow():
    spent = {counts: -np.diff([16, *remaining(16, 6, counts)]) for counts in ('linear', 'cosine')}
    assert spent['linear'].sum() == spent['cosine'].sum() == 16
    assert np.ptp(spent['linear']) <= 1 and spent['cosine'][0] < spent['cosine'][-1]


def test_ancestral_passes_are_as_many_as_steps_that_reveal():
    """L masks in N linear steps: each is revealed at a uniform step, others need no pass."""
    model, x = tiny_model(V=LETTERS + 1, T=LENGTH, seed=7), torch.tensor([BLANK_ROW])
    N, runs, generator = 5, 400, noise_source()
    passes = [decode_ancestral(model, x, steps=N, generator=generator)[1] for _ in range(runs)]
    mean = N * (1 - (1 - 1 / N) ** LENGTH)
    assert np.mean(passes) == pytest.approx(mean, abs=5 * np.std(passes) / runs ** 0.5)


# Text in, text out

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
    ('To be', 'no blank'), ('To [___:0]', '0 tokens wide'), ('[]', 'no blank'),
    ('a [___:x] b', 'no blank'), ('a [___:-3] b', 'no blank'), ('Zounds [___]', 'does not know')])
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
        assert sample.show(ids, tokenizer, mask) == shown


def test_show_decodes_runs_of_tokens_together():
    """The bytes of a character may be tokens of their own."""
    ids = [*'é'.encode(), 257, *'€'.encode(), 257, 257]
    assert sample.show(ids, BYTES, 257) == 'é█€██'
    assert sample.show([257], BYTES, 257) == '█' and sample.show([], BYTES, 257) == ''


@pytest.mark.parametrize('seed', range(5))
def test_corruption_only_ever_grows(capsys, seed):
    text = 'To be or not to be ' * 60
    sample.show_corruption(text, CHARS, 10, seed)
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
    """A folder with the runs ar and mdm, damaged and foreign checkpoints, and an empty folder."""
    root = tmp_path_factory.mktemp('runs')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        (root / 'verse.txt').write_text(VERSE, encoding='utf-8')
        meta = prepare.prepare('verse.txt')
    shape = {'block_size': CONTEXT, 'n_layer': 2, 'n_head': 2, 'n_kv_head': 0, 'n_embd': 16,
             'pos': 'rope', 'norm': 'rmsnorm', 'mlp': 'relu2', 'qk_norm': True, 'bias': False,
             'tied': False, 'time_cond': False, 'dropout': 0.0}
    for objective in ('ar', 'mdm'):
        model = tiny_model(objective == 'ar', meta['vocab_size'] + 1, CONTEXT)
        (root / objective).mkdir()
        torch.save({'model': model.state_dict(), 'optimizer': [], 'meta': meta, 'iter': 7,
                    'config': shape | {'objective': objective}, 'rng': 0, 'best': 1.5},
                   root / objective / 'ckpt.pt')
    whole = (root / 'mdm' / 'ckpt.pt').read_bytes()
    misfit = torch.load(root / 'mdm' / 'ckpt.pt', weights_only=True)
    misfit['config']['n_layer'] = 3
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
        except UserError as e:  # what the interpreter does with it
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
    (['--out_dir=mdm'], range(1, 19)), (['--out_dir=mdm', '--steps=3'], [2, 3]),
    (['--out_dir=mdm', '--decoder=confidence'], [18]),
    (['--out_dir=mdm', '--decoder=confidence', '--steps=4', '--counts=cosine'], [3, 4]),
    (['--out_dir=mdm', '--decoder=confidence', '--threshold=0.3'], range(1, 19)),
    (['--out_dir=mdm', '--noise_schedule=cosine', '--top_k=3', '--top_p=0.9',
      '--repetition_penalty=1.2'], range(1, 19))])
def test_start_is_continued_to_the_end_of_the_context(run_main, words, passes):
    status, out, err = run_main('--start=ROMEO:', '--device=cpu', *words)
    (text,), (written, nfe) = texts(out)
    assert (status, err) == (0, '')
    assert text.startswith('ROMEO:') and len(text) == CONTEXT and set(text) <= set(VERSE)
    assert written == CONTEXT - 6 and nfe in passes
    assert texts(run_main('--start=ROMEO:', '--device=cpu', *words)[1])[0] == [text]


def test_num_samples_gen_length_and_seed(run_main):
    words = ('--out_dir=ar', '--start=a', '--gen_length=40', '--num_samples=3')
    found, (written, nfe) = texts(run_main(*words)[1])
    assert [len(text) for text in found] == [41] * 3 and len(set(found)) == 3
    assert (written, nfe) == (120, 40)
    assert texts(run_main(*words, '--seed=1')[1])[0] != found


def test_nothing_given_fills_the_context(run_main):
    for name in ('ar', 'mdm'):
        (text,), (written, _) = texts(run_main(f'--out_dir={name}')[1])
        assert len(text) == written == CONTEXT


def test_a_start_with_an_equals_sign_reaches_the_tokenizer_whole(run_main):
    status, _, err = run_main('--out_dir=mdm', '--start=a=b')
    assert status == 2 and err == "error: the tokenizer does not know '='\n"


def test_corrupt_with_a_run_and_without(run_main):
    cases = ((['--out_dir=mdm'], "What's in a name"), (['--out_dir=nowhere'], 'Zoë €5'))
    for words, text in cases:
        status, out, err = run_main(f'--corrupt={text}', *words)
        lines = out.splitlines()
        assert (status, err, len(lines)) == (0, '', 6)
        assert lines[0] == f't = 0.0  {text}' and lines[5] == f't = 1.0  {"█" * len(text)}'
    status, out, err = run_main('--out_dir=mdm', '--corrupt=Zoë')
    assert (status, out) == (2, '') and 'does not know' in err


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
    (['--template=To be'], 'no blank'), (['--template=To [___:0]'], '0 tokens wide'),
    (['--template=[___:25]'], f'block_size is {CONTEXT}'), (['--template=€[_]'], "'€'"),
    (['--template=[_]', '--start=a'], 'leave out start'),
    (['--template=[_]', '--gen_length=3'], 'leave out start'),
    (['--steps=-1'], 'steps is -1'), (['--steps=0'], 'steps is 0'),
    (['--num_samples=0'], 'num_samples'),
    (['--gen_length=-5'], 'gen_length'), (['--temperature=-0.5'], 'temperature'),
    (['--top_k=-1'], 'top_k'), (['--top_p=0'], 'top_p'), (['--top_p=1.1'], 'top_p'),
    (['--threshold=2'], 'threshold'), (['--repetition_penalty=0'], 'repetition_penalty'),
    (['--counts=square'], 'linear or cosine'),
    (['--decoder=greedy'], 'ancestral or confidence'),
    (['--decoder=ar'], 'ancestral or confidence'),
    (['--out_dir=ar', '--decoder=ancestral'], 'decode by ar'),
    (['--decoder=confidence', '--order=best'], 'max_prob, margin, entropy, random'),
    (['--noise_schedule=square'], 'noise_schedule is'), (['--order=best'], 'order is'),
    (['--temperature=1e999'], 'temperature is inf'), (['--repetition_penalty=1e999'], 'penalty is'),
    (['--seed=' + '9' * 25], 'seed is'), (['--template=[___:' + '9' * 20 + ']'], 'no blank')]


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
    wanted = ('out_dir', 'device', 'start', 'template', 'corrupt', 'num_samples', 'gen_length',
              'seed', 'decoder', 'steps', 'threshold', 'temperature', 'top_k', 'top_p')
    assert {a or b for a, b in shown} >= set(wanted)
    assert 'def ' not in done.stdout
