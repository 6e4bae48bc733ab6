"""The transformer against torch's own, and the probability models against closed forms."""

import itertools
import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model
from config import UserError
from conftest import PROSE, save_hub_model, save_tokenizer
from model import D3PM, LENGTH_HEADS, OBJECTIVES, SCHEDULES, Autoregression, BlockDiffusion, \
    KVCache, LengthLoss, MaskedDiffusion, ModelConfig, Noised, Objective, Transformer, Uniform, \
    alpha_and_weight, attend, beside_clean, evaluate, export_model, first_to_hold, \
    flops_per_token, hub_settings, load_checkpoint, load_model, make_network, make_objective, \
    masks_by_count, model_config, noise_level, peak_memory, pick_device, pick_dtype, rope_angles, \
    rotate, time_features, uniform_token_loss
from prepare import hub_vocabulary, load_tokenizer, open_data
from train import MAY_DIFFER, attention_options, load_first_weights

GPT2_STYLE = dict(pos='learned', norm='layernorm', mlp='gelu', qk_norm=False, bias=True)


def tiny(seed=0, std=0.5, **shape):
    """A small Transformer with all weights random: a fresh one predicts uniformly."""
    shape = dict(vocab_size=12, block_size=16, n_layer=2, n_head=4, n_embd=32) | shape
    model = Transformer(ModelConfig(**shape)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


def tokens(B, T, V=12, seed=0):
    return torch.randint(0, V - 1, (B, T), generator=torch.Generator().manual_seed(seed))


def loss_with(name):
    """The loss of an objective, the settings of which are keywords."""
    def loss(model, x0, rng, given=None, **settings):
        given = x0 < 0 if given is None else given
        return OBJECTIVES[name](**settings).loss(model, x0, rng, given)
    return loss


def bound_with(name):
    def bound(model, x0, rng=None, given=None, **settings):
        return OBJECTIVES[name](**settings).bound(model, x0, rng, given)
    return bound


LOSSES, BOUNDS = ({name: of(name) for name in OBJECTIVES} for of in (loss_with, bound_with))
ar_loss, mdm_loss, d3pm_loss, uniform_loss, block_loss = LOSSES.values()
ar_nll, mdm_nelbo, d3pm_nelbo, uniform_nelbo, block_nelbo = BOUNDS.values()


def ar_token_nll(model, x0, given=None):
    return Autoregression().token_bounds(model, x0, None, given)


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stream(folder, ids, V=12, block_size=16):
    """A data set on disk whose training and validation text are these ids, opened."""
    (folder / 'data/ids').mkdir(parents=True, exist_ok=True)
    counts = {'tokens': len(ids), 'characters': len(ids), 'bytes': len(ids)}
    meta = {'name': 'ids', 'layout': 'stream', 'row_length': None, 'max_answer': None,
            'vocab_size': V - 1, 'mask_id': V - 1, 'eos_id': None, 'sep_id': None, 'pad_id': None,
            'tokenizer': {'kind': 'gpt2'}, 'source': '', 'sha256': '',
            'counts': {'train': counts, 'val': counts}}
    return write(folder, meta, ids, block_size)


def write(folder, meta, ids, block_size, **how):
    (folder / 'data/ids/meta.json').write_text(json.dumps(meta))
    for split in ('train', 'val'):
        np.asarray(ids, '<u2').tofile(folder / f'data/ids/{split}.bin')
    return open_data('ids', block_size, 2, **how)


class ContextFree(nn.Module):
    """A predictor with the same distribution everywhere, that remembers what it was asked."""

    def __init__(self, logits, T):
        super().__init__()
        self.always = torch.cat([logits, torch.tensor([-torch.inf])])
        self.mask_id = len(logits)
        self.config = SimpleNamespace(block_size=T, n_conv=0, vocab_size=len(logits) + 1,
                                      start_id=self.mask_id)
        self.embed = nn.Embedding(1, 1)
        self.asked = []

    def forward(self, x, level=None, where=None, cache=None, hidden=False, position=None,
                attn_mask=None, neighbours=None):
        self.asked.append((x, level))
        n = x.shape if where is None else (int(where.sum()),)
        h = torch.zeros(*n, 1)
        return h if hidden else self.logits(h)

    def logits(self, h):
        return self.always.expand(*h.shape[:-1], -1)


# ---------------------------------------------------------------------------- the transformer


@pytest.mark.parametrize('causal', [True, False])
def test_gpt2_style_equals_torchs_own_encoder(causal):
    model = tiny(causal=causal, std=0.2, **GPT2_STYLE)
    c = model.config
    layers = []
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(c.n_embd, c.n_head, 4 * c.n_embd, 0.0, 'gelu',
                                           batch_first=True, norm_first=True)
        a = block.attn
        layer.load_state_dict({
            'self_attn.in_proj_weight': torch.cat([a.q.weight, a.k.weight, a.v.weight]),
            'self_attn.in_proj_bias': torch.cat([a.q.bias, a.k.bias, a.v.bias]),
            'self_attn.out_proj.weight': a.proj.weight, 'self_attn.out_proj.bias': a.proj.bias,
            'linear1.weight': block.mlp.fc.weight, 'linear1.bias': block.mlp.fc.bias,
            'linear2.weight': block.mlp.proj.weight, 'linear2.bias': block.mlp.proj.bias,
            'norm1.weight': block.norm1.weight, 'norm1.bias': block.norm1.bias,
            'norm2.weight': block.norm2.weight, 'norm2.bias': block.norm2.bias})
        layers.append(layer.train())  # its fast path for inference is another implementation
    x = tokens(3, 10)
    h = model.embed(x) + model.embed_pos.weight[:10]
    mask = nn.Transformer.generate_square_subsequent_mask(10) if causal else None
    for layer in layers:
        h = layer(h, src_mask=mask)
    expected = model.norm(h) @ model.head.weight.T
    torch.testing.assert_close(model(x)[..., :-1], expected[..., :-1], atol=1e-5, rtol=1e-5)


def test_rope_is_complex_rotation_and_relative():
    T, D = 9, 8
    q, k = torch.randn(2, T, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cos, sin = (a.double() for a in rope_angles(T, D))
    i = np.arange(D // 2)
    turn = np.exp(1j * np.outer(np.arange(T), 10000.0 ** (-2 * i / D)))
    z = (q[:, :D // 2].numpy() + 1j * q[:, D // 2:].numpy()) * turn
    expected = torch.from_numpy(np.concatenate([z.real, z.imag], axis=1))
    torch.testing.assert_close(rotate(q[None, None], cos, sin)[0, 0], expected, atol=1e-6, rtol=0)
    # the same q and k at every position: their product depends on the distance alone
    q, k = (rotate(v[:1].expand(T, D)[None, None], cos, sin)[0, 0] for v in (q, k))
    product = q @ k.T
    for d in range(-T + 1, T):
        diagonal = product.diagonal(d)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)


@pytest.mark.parametrize('shape', [{}, GPT2_STYLE, dict(n_kv_head=2, mlp='swiglu', n_conv=5)])
def test_causal_logits_ignore_the_future_and_bidirectional_ones_do_not(shape):
    x = tokens(2, 12)
    for j in (0, 5, 11):
        y = x.clone()
        y[:, j] = (y[:, j] + 1) % 11
        causal, both = tiny(causal=True, **shape), tiny(causal=False, **shape)
        assert torch.equal(causal(x)[:, :j], causal(y)[:, :j])
        assert not torch.equal(causal(x)[:, j:], causal(y)[:, j:])
        changed = (both(x) != both(y)).any(-1)
        assert changed.all(), 'every position sees every other'


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(1, 3),
       st.sampled_from([1, 2, 4]), st.sampled_from(['rope', 'learned']), st.booleans(),
       st.sampled_from([0, 1, 2, 5]))
def test_cached_logits_equal_uncached_ones(chunks, B, n_kv_head, pos, qk_norm, n_conv):
    model = tiny(causal=True, n_kv_head=n_kv_head, pos=pos, qk_norm=qk_norm, n_conv=n_conv,
                 block_size=25, std=0.3)
    x = tokens(B, sum(chunks))
    cache = KVCache(model.config)
    parts = [model(part, cache=cache) for part in x.split(chunks, dim=1)]
    assert cache.length == x.size(1)
    torch.testing.assert_close(torch.cat(parts, 1), model(x), atol=1e-5, rtol=1e-5)


def test_where_selects_logits():
    model, x = tiny(), tokens(3, 8)
    where = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) < 0.4
    torch.testing.assert_close(model(x, where=where), model(x)[where])


@pytest.mark.parametrize('Hkv', [1, 2, 4])
@pytest.mark.parametrize('T, S, kind', [(5, 5, 'all'), (5, 5, 'causal'), (3, 7, 'mask'),
                                        (1, 4, 'all')])
def test_attention_written_out_is_torchs(Hkv, T, S, kind):
    """In bfloat16, against the fused kernel in float32 on the same numbers."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, H, n, 8, generator=rng).bfloat16()
               for H, n in ((4, T), (Hkv, S), (Hkv, S)))
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T) if kind == 'mask' else None
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask,
                                              is_causal=kind == 'causal', enable_gqa=True)
    found = attend(q, k, v, mask, kind == 'causal', 0.0)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.02)


@pytest.mark.parametrize('mlp', ['relu2', 'swiglu'])
def test_the_default_layer_is_that_of_its_formula(mlp):
    """RMS norms, queries and keys that are normed and turned, and both activations of our own."""
    m, x = tiny(n_layer=1, mlp=mlp, std=0.3), torch.randn(1, 6, 32, generator=torch.manual_seed(0))
    b, turn = m.blocks[0], torch.outer(torch.arange(6.), 1e4 ** -(torch.arange(4) / 4))  # (6, 4)

    def rms(v):
        return v / v.square().mean(-1, keepdim=True).sqrt()

    def turned(v):  # (6, 4, 8), by complex numbers
        v = rms(v.view(6, 4, 8))
        z = torch.complex(v[..., :4], v[..., 4:]) * torch.exp(1j * turn)[:, None]
        return torch.cat([z.real, z.imag], -1)

    h = rms(x) * b.norm1.weight
    p = torch.einsum('ihd,jhd->hij', turned(b.attn.q(h)), turned(b.attn.k(h))).div(8 ** 0.5)
    y = torch.einsum('hij,jhd->ihd', p.softmax(2), b.attn.v(h).view(6, 4, 8)).reshape(1, 6, 32)
    y = x + b.attn.proj(y)
    h = rms(y) * b.norm2.weight
    f = b.mlp.fc(h).clamp(min=0) ** 2 if mlp == 'relu2' else \
        b.mlp.fc(h) * b.mlp.gate(h) / (1 + (-b.mlp.gate(h)).exp())
    torch.testing.assert_close(b(x, m.rope[:, :6].unbind(), None, None, None, None),
                               y + b.mlp.proj(f), atol=1e-4, rtol=1e-4)


def test_dropout_is_on_the_embedding_and_on_both_branches():
    m, x = tiny(dropout=1.0, pos='learned').train(), torch.randn(2, 5, 32)
    assert torch.equal(m.blocks[0](x, None, None, None, None, None), x)
    m = Transformer(ModelConfig(12, 16, n_embd=32, dropout=1.0))  # its branches are zero
    assert not m(tokens(2, 5), hidden=True).any()


def test_matrices_begin_at_the_width_that_they_read():
    fc = Transformer(ModelConfig(12, 16, n_embd=64, n_layer=1)).blocks[0].mlp.fc.weight
    assert fc.std().item() == pytest.approx(1 / 8, rel=0.05)


def test_the_level_turns_circles_of_2_pi_in_1000_and_more():
    def z(level):
        return torch.complex(*time_features(level).chunk(2, -1))

    a, b = torch.rand(2, 5, 1, generator=torch.manual_seed(0))
    torch.testing.assert_close(z(a) * z(b), z(a + b), atol=1e-3, rtol=0)
    angles = z(torch.tensor([[math.pi / 1000], [1.0]])).angle()[:, 0]  # (2, 128)
    assert abs(angles[0, 0].item()) == pytest.approx(math.pi, abs=1e-3)
    assert angles[1, -1].item() == pytest.approx(0.1, rel=0.1)


def test_dropout_in_attention_keeps_the_mean():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4, 8).bfloat16() for _ in range(3))
    mean = torch.stack([attend(q, k, v, None, True, 0.3).float() for _ in range(4000)]).mean(0)
    expected = attend(q, k, v, None, True, 0.0).float()
    torch.testing.assert_close(mean, expected, atol=0.06, rtol=0)


def test_dropout_in_attention_is_for_training_alone():
    model, x = tiny(attn_dropout=0.5, std=0.2), tokens(2, 8)
    torch.testing.assert_close(model.eval()(x), tiny(std=0.2)(x))
    assert not torch.allclose(model.train()(x), model(x))


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('K', [1, 2, 5, 9])
def test_local_mixing_is_torchs_depthwise_convolution(causal, K):
    model, x = tiny(causal=causal, n_conv=K, std=0.3), torch.randn(3, 7, 32)
    mixing = model.blocks[1].mixing[1]
    conv = nn.Conv1d(32, 32, K, groups=32, bias=False)
    conv.weight.data = mixing.weight.data.T[:, None]
    past = K - 1 if causal else K // 2
    expected = x + conv(F.pad(x.mT, (past, K - 1 - past))).mT
    torch.testing.assert_close(mixing(x, None, None), expected, atol=1e-5, rtol=1e-5)


def test_local_mixing_starts_as_the_identity_and_then_matters():
    plain, mixed = (Transformer(ModelConfig(12, 16, n_embd=32, n_conv=K)) for K in (0, 5))
    mixed.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 8, 32)
    assert all(torch.equal(block.mix(i, x, None, None), x)
               for block in mixed.blocks for i in range(2))
    assert mixed.count_parameters() - plain.count_parameters() == 4 * 2 * 5 * 32
    assert not torch.equal(tiny(n_conv=5, std=0.2)(tokens(2, 8)), tiny(std=0.2)(tokens(2, 8)))


@pytest.mark.parametrize('shape', [{}, GPT2_STYLE, dict(tied=True), dict(n_kv_head=1, n_conv=5)])
def test_twins_have_equal_parameter_counts(shape):
    counts = {sum(p.numel() for p in tiny(causal=causal, **shape).parameters())
              for causal in (True, False)}
    assert counts == {tiny(**shape).count_parameters()}
    if shape == GPT2_STYLE:  # 12 C^2 + 13 C a layer [GPT-2], two norms' worth less at the end
        C, V, T = 32, 12, 16
        assert counts == {2 * V * C + T * C + 2 * (12 * C * C + 13 * C) + 2 * C}


def test_time_conditioning_starts_as_the_identity_and_then_matters():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(12, 16, n_embd=32, n_layer=2, time_cond=True)).eval()
    plain = Transformer(ModelConfig(12, 16, n_embd=32, n_layer=2)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'modulate' not in name and 'time' not in name:
                p.normal_(std=0.3)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    x, t = tokens(2, 8), torch.tensor([[0.3], [0.9]])
    torch.testing.assert_close(model(x, t), plain(x))
    with torch.no_grad():
        for block in model.blocks:
            block.modulate.weight.normal_(std=0.1)
    assert not torch.allclose(model(x, t), plain(x), atol=1e-3)
    assert not torch.allclose(model(x, t)[0], model(x, 1 - t)[0], atol=1e-4)


@torch.no_grad()
def test_adaln_scales_shifts_and_gates_each_sublayer_by_its_own():
    torch.manual_seed(0)
    c = ModelConfig(12, 16, n_embd=32, n_layer=1, time_cond=True, pos='learned')
    block = Transformer(c).eval().blocks[0]
    for p in block.parameters():
        p.normal_(std=0.3)
    x, time = torch.randn(2, 5, 32), torch.randn(2, 1, 32)
    scale1, shift1, gate1, scale2, shift2, gate2 = block.modulate(time).view(2, 1, 6, 32).unbind(2)
    y = x + (1 + gate1) * block.attn((1 + scale1) * block.norm1(x) + shift1, None, None, None)
    y = y + (1 + gate2) * block.mlp((1 + scale2) * block.norm2(y) + shift2)
    torch.testing.assert_close(block(x, None, None, None, None, time), y)


@pytest.mark.parametrize('tied, pos, time_cond', [
    (True, 'rope', False), (False, 'learned', False), (False, 'rope', True)])
def test_flops_are_those_that_torch_counts(tied, pos, time_cond):
    """Bidirectional: every product of an update, attention among them, in torch's own count.

    Half of the tokens are scored, as with this mask_range they are on average.
    """
    B, T, meta = 3, 24, {'vocab_size': 49, 'mask_id': 49}
    settings = dict(block_size=T, n_embd=32, n_layer=2, n_head=2, tied=tied, norm='layernorm',
                    pos=pos, time_cond=time_cond, objective='mdm', mask_range=(0.25, 0.75))
    m = Transformer(model_config(settings, meta))
    x, level = torch.randint(0, 50, (B, T)), torch.full((B, 1), 0.5)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if time_cond:
            time = m.time_mlp(time_features(level))
            sum(block.modulate(time).sum() for block in m.blocks).backward()
        once_a_row = counter.get_total_flops()
        m(x, level, where=torch.arange(T).expand(B, T) % 2 == 0).clamp(min=-9).sum().backward()
    vectors = sum(p.numel() for name, p in m.blocks.named_parameters()
                  if p.dim() < 2 and 'modulate' not in name)  # norms: no matrix products
    data = SimpleNamespace(meta=meta, mean_width=T, scored_share=1.0)
    ours = B * T * (flops_per_token(settings, data) - 6 * vectors)
    assert counter.get_total_flops() - 2 * once_a_row == pytest.approx(ours, rel=1e-6)


@pytest.mark.parametrize('name', ['ar', 'mdm', 'block'])
def test_flops_are_of_the_pairs_that_see_each_other(name):
    T, how = 16, dict(objective=name, block_length=4, n_embd=32, n_head=2, n_layer=2)
    data = SimpleNamespace(meta={'vocab_size': 9, 'mask_id': 9}, mean_width=T, scored_share=0.0)
    seen = {'ar': torch.ones(T, T).tril(), 'mdm': torch.ones(T, T),
            'block': beside_clean(T, 4, 0, 'cpu')['attn_mask']}[name]
    inside = sum(p.numel() for p in tiny(n_head=2).blocks.parameters())
    pairs = seen.sum().item() - T / 2 * (name == 'ar')  # of the diagonal a half, as in PaLM
    assert flops_per_token(how, data) == pytest.approx(
        (6 * inside * len(seen) + 12 * 2 * 32 * pairs) / T)


def test_the_work_of_a_length_head_is_not_counted():
    settings = {'objective': 'mdm', 'n_embd': 32, 'n_head': 2, 'length_head': 'classify'}
    assert math.isnan(flops_per_token(settings, SimpleNamespace(
        meta={'vocab_size': 9, 'mask_id': 9}, mean_width=9, scored_share=0.5)))


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('name', OBJECTIVES)
def test_the_head_is_counted_for_the_tokens_that_are_scored(name, schedule):
    settings = dict(objective=name, schedule=schedule, mask_range=(0.1, 0.7), n_embd=32, n_head=2)
    small, large = (flops_per_token(settings, SimpleNamespace(
        meta={'vocab_size': V, 'mask_id': V}, mean_width=9, scored_share=0.5)) for V in (50, 60))
    counted = (large - small) / (6 * 32 * 10)
    if name == 'ar':
        assert counted == 0.5
        return
    given = torch.arange(16).expand(4000, 16) < 8  # half of the tokens: see scored_share
    noised = make_objective(settings).corrupt(tiny(), tokens(4000, 16), given,
                                              torch.Generator().manual_seed(0))
    assert noised.scored.float().mean().item() == pytest.approx(counted, abs=0.01)


@pytest.mark.parametrize('wrong, said', [
    (dict(n_head=5), 'multiple of n_head'), (dict(n_kv_head=3), 'n_kv_head'),
    (dict(pos='alibi'), 'not one of rope, learned'), (dict(norm='batch'), 'rmsnorm'),
    (dict(mlp='silu'), 'swiglu'), (dict(n_embd=36, n_head=12), 'pairs of channels'),
    (dict(causal=True, time_cond=True), 'time_cond')])
def test_impossible_shapes_are_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        ModelConfig(**(dict(vocab_size=5) | wrong))


def test_context_too_long_is_refused():
    with pytest.raises(UserError, match='17 tokens do not fit'):
        tiny()(tokens(1, 17))


# ------------------------------------------------------------------------- the probability models


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_weight_is_the_derivative_of_the_schedule(schedule):
    t, eps = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1e-6
    alpha, w = alpha_and_weight(t, schedule)
    above, below = (alpha_and_weight(t + d, schedule)[0] for d in (eps, -eps))
    slope = (above - below) / (2 * eps)
    torch.testing.assert_close(w, -slope / (1 - alpha), atol=1e-6, rtol=1e-6)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(alpha_and_weight(ends, schedule)[0], 1 - ends, atol=1e-12, rtol=0)


@pytest.mark.parametrize('shape, std', [({}, 0.25), ({'tied': True}, 0.02)])
def test_embeddings_begin_at_a_quarter_or_at_what_a_tied_head_needs(shape, std):
    model = Transformer(ModelConfig(400, 200, n_embd=32, pos='learned', **shape))
    for embed in (model.embed, model.embed_pos):
        assert embed.weight.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize('shape, scale', [({}, 1.0), ({'tied': True}, 32 ** 0.5),
                                          ({'tied': True, 'embed_scale': 1.0}, 1.0)])
def test_a_tied_embedding_is_read_larger_than_the_head_needs_it(shape, scale):
    """Its layers, untrained, pass what they read: the hidden state is the scaled embedding."""
    model = Transformer(ModelConfig(40, 20, n_embd=32, pos='learned', **shape))
    x = tokens(2, 20, 40)
    read = (model.embed.weight[x] + model.embed_pos.weight) * scale
    torch.testing.assert_close(model(x, hidden=True), model.norm(read))


def test_unknown_schedule_is_refused():
    with pytest.raises(UserError, match='not one of linear, cosine'):
        alpha_and_weight(torch.ones(1, 1), 'quadratic')


@pytest.mark.parametrize('name', ['ar', 'mdm', 'd3pm', 'block'])
@pytest.mark.parametrize('shape', [{}, GPT2_STYLE])
def test_a_fresh_model_is_uniform_and_its_bound_is_log_v(name, shape):
    model = Transformer(ModelConfig(12, 16, causal=name == 'ar', n_embd=32, **shape)).eval()
    nats = BOUNDS[name](model, tokens(7, 16), torch.Generator().manual_seed(0))
    assert (nats / 16 - math.log(11)).abs().max() < 1e-6


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_nelbo_of_a_context_free_predictor_is_its_nll(schedule):
    """E[is_mask w(t)] = 1 under any schedule: the loss and the bound both find the exact nll."""
    logits = torch.tensor([1.0, 0.0, -2.0, 0.5])
    x0, generator = tokens(64, 20, V=5), torch.Generator().manual_seed(0)
    model = ContextFree(logits, 20)
    exact = -logits.log_softmax(0)[x0].sum().item() / x0.numel()
    losses = torch.tensor([float(torch.tensor(1.0) * nats / count) for nats, count in (
        mdm_loss(model, x0, generator, schedule=schedule) for _ in range(400))])
    bounds = torch.stack([mdm_nelbo(model, x0, generator).sum() / x0.numel() for _ in range(400)])
    for draws in (losses, bounds):
        assert abs(draws.mean() - exact) < 4 * draws.std() / 20
    assert bounds.std() < losses.std(), 'counts of masks vary less than their weights'


def enumerated_nelbo(model, x0):
    """The bound on -log p(x0) summed over every mask; x0 (T,).

    The integral over t of 1/t * t^m (1 - t)^(T - m) is the beta function B(m, T - m + 1).
    """
    T, total = len(x0), 0.0
    for mask in itertools.product([False, True], repeat=T):
        m = sum(mask)
        if m == 0:
            continue
        beta = math.factorial(m - 1) * math.factorial(T - m) / math.factorial(T)
        is_mask = torch.tensor([mask])
        logp = model(torch.where(is_mask, model.mask_id, x0[None]))[0].log_softmax(-1)
        total -= beta * sum(logp[i, x0[i]].item() for i in range(T) if mask[i])
    return total


def test_three_tokens_of_three_letters_enumerated():
    """Loss and bound against the closed form, the bound to 2e-3 nats per token."""
    model = tiny(vocab_size=4, block_size=3, n_layer=1, n_head=2, n_embd=8, std=0.7)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x0 in (torch.tensor([0, 1, 2]), torch.tensor([2, 2, 0])):
            exact = enumerated_nelbo(model, x0) / 3
            bound = mdm_nelbo(model, x0.expand(200_000, 3), generator)
            assert abs(bound.mean().item() / 3 - exact) < 2e-3
            for schedule in SCHEDULES:  # heavier tails, so within 4 standard errors
                losses = [mdm_loss(model, x0.expand(10_000, 3), generator, schedule=schedule)
                          for _ in range(16)]
                losses = np.array([(nats / count).item() for nats, count in losses])
                assert abs(losses.mean() - exact) < 4 * losses.std() / 16 ** 0.5 < 0.07


def test_nll_of_all_texts_sums_to_one():
    """exp(-nll) is a distribution over the 27 texts, and the chain rule of it is ar_nll."""
    model = tiny(vocab_size=4, block_size=3, causal=True)
    texts = torch.tensor(list(itertools.product(range(3), repeat=3)))
    with torch.no_grad():
        nats = ar_nll(model, texts)
        assert abs(torch.exp(-nats).sum().item() - 1) < 1e-5
        one_by_one = 0.0  # by hand: start token, then each prefix in a pass of its own
        for i in range(3):
            prefix = torch.tensor([[3, *texts[5][:i].tolist()]])
            one_by_one -= model(prefix)[0, -1].log_softmax(-1)[texts[5][i]].item()
    assert abs(nats[5].item() - one_by_one) < 1e-5


def test_nelbo_is_above_the_exact_any_order_likelihood():
    """For one order the chain rule is a distribution; the bound averages -log p over all orders."""
    model = tiny(vocab_size=4, block_size=3)
    x0 = torch.tensor([0, 1, 2])
    by_order = []
    for order in itertools.permutations(range(3)):
        xt, nats = torch.full((1, 3), 3), 0.0
        for i in order:
            nats -= model(xt)[0, i].log_softmax(-1)[x0[i]].item()
            xt[0, i] = x0[i]
        by_order.append(nats)
    assert abs(np.mean(by_order) - enumerated_nelbo(model, x0)) < 1e-5


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(0, 2 ** 31), st.sampled_from([(0.0, 1.0), (0.15, 0.99)]))
def test_noise_levels_are_stratified(B, seed, mask_range):
    model = ContextFree(torch.zeros(3), 4)
    mdm_loss(model, tokens(B, 4, V=4), torch.Generator().manual_seed(seed), mask_range=mask_range)
    lo, hi = mask_range
    t = ((model.asked[0][1] - lo) / (hi - lo)).flatten().sort().values
    assert 0 < t.min() + 1e-6 and t.max() <= 1 + 1e-6
    strata = torch.arange(B) / B
    assert (t >= strata - 1e-5).all() and (t <= strata + 1 / B + 1e-5).all()


def test_rows_of_a_bound_have_one_number_of_masks_each():
    given, rng = torch.zeros(16, 16, dtype=torch.bool), torch.Generator().manual_seed(0)
    assert sorted(masks_by_count(given, rng)[0].sum(1).tolist()) == [*range(1, 17)]
    level = D3PM(diffusion_steps=16).corrupt_evenly(tiny(), tokens(16, 16), given, rng).level
    assert sorted(level[:, 0].tolist()) == pytest.approx([k / 16 for k in range(1, 17)])


@pytest.mark.parametrize('name', OBJECTIVES)
def test_a_bound_reads_all_levels_however_training_weights_them(name):
    m, x0 = tiny(std=0.2), tokens(6, 16)
    one, other = (OBJECTIVES[name](**how).bound(m, x0, torch.Generator().manual_seed(0))
                  for how in ({}, {'loss_weight': 'flat', 'mask_range': (0.3, 0.4)}))
    assert torch.equal(one, other)


def test_share_of_masks_follows_the_level():
    model, x0 = ContextFree(torch.zeros(3), 1000), tokens(50, 1000, V=4)
    for schedule in SCHEDULES:
        model.asked.clear()
        mdm_loss(model, x0, torch.Generator().manual_seed(0), schedule=schedule)
        xt, share = model.asked[0]
        masked = (xt == 3).float().mean(1, keepdim=True)
        assert (masked - share).abs().max() < 4 * 0.5 / math.sqrt(1000)


def test_loss_weights_and_their_counts():
    model, x0 = ContextFree(torch.tensor([0.3, 0.0, -1.0]), 50), tokens(6, 50, V=4)
    found = {}
    for loss_weight in ('elbo', 'flat', 'clipped', 'masked_mean'):
        model.asked.clear()
        nats, count = mdm_loss(model, x0, torch.Generator().manual_seed(3),
                               loss_weight=loss_weight, w_max=2.0)
        xt, t = model.asked[0]
        found[loss_weight] = nats.item(), count.item()
    is_mask, nll = (xt == 3).double(), -model.always.double().log_softmax(-1)[x0]
    for loss_weight, w in (('elbo', 1 / t), ('flat', 1 + 0 * t), ('masked_mean', 1 + 0 * t),
                           ('clipped', (1 / t).clamp(max=2.0))):
        assert found[loss_weight][0] == pytest.approx((w * is_mask * nll).sum().item(), rel=1e-5)
        wanted = is_mask.sum() if loss_weight == 'masked_mean' else x0.numel()
        assert found[loss_weight][1] == wanted
    with pytest.raises(UserError, match='loss_weight'):
        mdm_loss(model, x0, torch.Generator(), loss_weight='heavy')


@pytest.mark.parametrize('fn', [mdm_loss, mdm_nelbo, d3pm_loss, d3pm_nelbo, block_loss,
                                block_nelbo])
def test_given_tokens_are_never_masked_nor_scored(fn):
    model, x0 = ContextFree(torch.zeros(3), 10), tokens(40, 10, V=4)
    given_tokens = torch.rand(40, 10, generator=torch.Generator().manual_seed(5)) < 0.5
    given_tokens[:, 0] = False  # something is wanted in every row
    found = fn(model, x0, torch.Generator().manual_seed(0), given_tokens)
    xt = model.asked[0][0][:, :10]  # in blocks the clean text follows
    assert not ((xt == 3) & given_tokens).any()
    assert torch.equal(xt[given_tokens], x0[given_tokens])
    if fn in BOUNDS.values():  # exact for uniform logits
        torch.testing.assert_close(found, (~given_tokens).sum(1) * math.log(3))
    else:
        assert found[1] == (~given_tokens).sum()


@pytest.mark.parametrize('fn', [mdm_loss, mdm_nelbo, d3pm_loss, d3pm_nelbo, uniform_loss,
                                uniform_nelbo])
def test_the_level_is_the_fraction_of_all_tokens_that_is_noise(fn):
    """Of all tokens, given ones too: a decoder can count it on its canvas."""
    model, x0 = ContextFree(torch.zeros(99), 60), tokens(2000, 60, V=100)
    known = torch.arange(60).expand(2000, 60) < 45
    fn(model, x0, torch.Generator().manual_seed(0), known)
    xt, t = model.asked[0]
    share = (xt != x0).float().mean(1)
    assert t.shape == (2000, 1) and 0 < t.min() < 0.02 and 0.23 < t.max() <= 0.25
    assert share.mean().item() == pytest.approx(t.mean().item(), abs=0.01)
    assert np.corrcoef(share, t[:, 0])[0, 1] > 0.8


def test_given_tokens_do_not_count_in_ar():
    model, x0 = ContextFree(torch.zeros(3), 10), tokens(4, 10, V=4)
    given_tokens = torch.arange(10).expand(4, 10) < 3
    nats, count = ar_loss(model, x0, None, given_tokens)
    assert count == 28 and nats.item() == pytest.approx(28 * math.log(3), rel=1e-6)
    torch.testing.assert_close(ar_nll(model, x0, None, given_tokens),
                               torch.full((4,), 7 * math.log(3)))


@pytest.mark.parametrize('name', ['mdm', 'd3pm', 'uniform', 'block'])
def test_gradients_are_finite_at_the_ends(name):
    for lo_hi in ((1e-7, 1e-7), (1.0, 1.0)):
        for schedule in SCHEDULES:
            model, x0 = tiny(subs=name != 'd3pm'), tokens(4, 16)
            nats, count = LOSSES[name](model, x0, torch.Generator().manual_seed(0),
                                       schedule=schedule, mask_range=lo_hi)
            (nats / count).backward()
            assert nats.isfinite()
            assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------ d3pm, uniform, block, given orders


def average(draw, n):
    """Mean of n calls of draw(), and the standard error of it."""
    with torch.no_grad():
        drawn = torch.tensor([float(draw()) for _ in range(n)], dtype=torch.float64)
    return drawn.mean().item(), (drawn.std() / n ** 0.5).item()


def divergence(true, ours):
    """KL of distributions along the last axis, each normalised here."""
    true, ours = (p / p.sum(-1, keepdims=True) for p in (true, ours))
    ratio = np.divide(true, ours, out=np.ones_like(true), where=true > 0)
    return (true * np.log(ratio)).sum(-1)


def enumerated_d3pm(predict, x0, alpha, V):
    """The bound in discrete steps on -log p(x0), by its definition: all steps, masks, outcomes.

    predict(xt, share (N,)) -> probabilities (N, T, V) of every token, the mask among them; x0 (T,).
    """
    T, total, a_t, a_s = len(x0), 0.0, alpha[1:], alpha[:-1]
    joint = np.zeros((len(a_t), V, V))  # P(xs, xt = mask | x0), x0 by column
    joint[:] = np.eye(V)
    joint *= np.where(np.arange(V) < V - 1, (a_s - a_t)[:, None], 1.0)[:, None]
    joint[:, -1, :-1] = (1 - a_s)[:, None]
    for mask in itertools.product([False, True], repeat=T):
        m = sum(mask)
        p = predict(torch.where(torch.tensor(mask), V - 1, x0), 1 - a_t)
        for j in np.flatnonzero(mask):
            kl = divergence(joint[:, :, x0[j]], np.einsum('nsx,nx->ns', joint, p[:, j]))
            total += ((1 - a_t) ** m * a_t ** (T - m) * kl).sum()
    return total


@pytest.mark.parametrize('subs', [True, False])
@pytest.mark.parametrize('schedule', ['linear', 'polynomial'])
def test_d3pm_is_the_sum_of_divergences_over_all_steps(subs, schedule):
    model = tiny(vocab_size=4, block_size=3, n_layer=1, n_head=2, n_embd=8, subs=subs,
                 time_cond=True)
    x0, generator = torch.tensor([0, 2, 1]), torch.Generator().manual_seed(0)

    def predict(xt, share):
        logits = model(xt.expand(len(share), -1), torch.tensor(share)[:, None].float())
        return logits.double().softmax(-1).numpy()

    how = dict(diffusion_steps=5, schedule=schedule)
    alpha = alpha_and_weight(torch.arange(6, dtype=torch.float64) / 5, schedule)[0].numpy()
    with torch.no_grad():
        exact = enumerated_d3pm(predict, x0, alpha, 4)
    for draw in (lambda: d3pm_nelbo(model, x0.expand(2000, 3), generator, **how).mean(),
                 lambda: d3pm_loss(model, x0.expand(2000, 3), generator, **how)[0] / 2000):
        mean, error = average(draw, 20)
        assert abs(mean - exact) < 4 * error < 0.03 * exact


@pytest.mark.parametrize('k, N', [(15, 100), (30, 50), (120, 200), (127, 1000)])
def test_d3pm_takes_a_level_of_its_grid_as_it_is(k, N):
    """In float32 k / N * N may be above k, which is rounded up."""
    objective = D3PM(diffusion_steps=N, mask_range=(k / N, k / N))
    nothing = torch.zeros(2, 16, dtype=torch.bool)
    m_t, *_ = objective.corrupt(tiny(), tokens(2, 16), nothing, torch.Generator()).extra
    assert m_t.flatten().tolist() == pytest.approx([k / N] * 2)


def test_d3pm_falls_to_the_entropy_as_steps_grow():
    """For the best prediction: in ever more steps, independent guesses at a time cost ever less."""
    joint = np.random.default_rng(0).dirichlet(np.full(27, 0.3)).reshape(3, 3, 3)

    def predict(xt, share):
        table = joint[tuple(slice(None) if j == 3 else slice(j, j + 1) for j in xt.tolist())]
        out = np.zeros((3, 4))
        for j in np.flatnonzero(xt == 3):
            out[j, :3] = table.sum(tuple(k for k in range(3) if k != j)) / table.sum()
        return np.broadcast_to(out, (len(share), 3, 4))

    entropy, found = -(joint * np.log(joint)).sum(), []
    for steps in (10, 100, 1000):
        alpha = 1 - np.arange(steps + 1) / steps
        found.append(sum(joint[x0] * enumerated_d3pm(predict, torch.tensor(x0), alpha, 4)
                         for x0 in np.ndindex(3, 3, 3)))
    gap = np.array(found) - entropy
    assert gap[0] > 5 * gap[1] > 25 * gap[2] > 0 and gap[2] < 1e-3, gap


def test_with_a_probability_of_the_mask_a_fresh_d3pm_is_log_v_in_the_mean():
    """Over one draw of every step; each row's own differs, by what telescopes in the sum."""
    model = Transformer(ModelConfig(12, 16, n_embd=32, subs=False)).eval()
    with torch.no_grad():
        logits = model(tokens(1, 16))
        nats = d3pm_nelbo(model, tokens(8, 16), torch.Generator().manual_seed(0), diffusion_steps=8)
    assert logits.isfinite().all() and nats.std() > 1
    assert nats.mean().item() / 16 == pytest.approx(math.log(12), abs=1e-5)
    assert tiny()(tokens(1, 16))[..., -1].max() == -math.inf


def uniform_integral(logits, x0):
    """E over xt and integral over alpha of uniform_token_loss, (K,) real logits, one token x0."""
    K, n = len(logits), 20_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    alpha, slope = 1 - u ** 3, 3 * u ** 2  # many points near alpha = 1, where log(1 - alpha) is
    total = 0.0
    logits = torch.cat([logits, torch.tensor([-torch.inf])]).double()
    for xt in range(K):
        cost = uniform_token_loss(logits.expand(n, -1), torch.full((n,), x0), torch.full((n,), xt),
                                  alpha)
        total += (cost * (alpha * (xt == x0) + (1 - alpha) / K) * slope).mean().item()
    return total


def test_uniform_nelbo_of_a_context_free_predictor_is_its_nll():
    """The reverse process of a distribution of one token is exact, so the bound is tight."""
    for logits in (torch.zeros(5), torch.tensor([1.0, 0.0, -2.0, 0.5])):
        for x0 in range(3):
            exact = -logits.double().log_softmax(0)[x0].item()
            assert uniform_integral(logits, x0) == pytest.approx(exact, abs=2e-5)


def test_uniform_cost_is_the_rate_of_divergences_of_small_steps():
    """For a network that changes its mind with t and xt: KL of posteriors [Duo eq. 5], V' = 4."""
    K, steps, x0, total, density = 4, 4000, 1, 0.0, 0.0
    table, drift = torch.randn(2, K, K, generator=torch.Generator().manual_seed(0)).double()
    i, eye = torch.arange(1, steps + 1, dtype=torch.float64)[:, None], torch.eye(K).double()
    a_t, a_s, a = 1 - i / steps, 1 - (i - 1) / steps, 1 - (i - 0.5) / steps  # 3 x (steps, 1)
    for xt in range(K):
        forward = a_t / a_s * eye[xt] + (1 - a_t / a_s) / K  # P(xt | xs), (steps, K)
        p = (table[xt] + (1 - a_t) * drift[xt]).softmax(-1)
        kl = divergence(*((forward * (a_s * x + (1 - a_s) / K)).numpy() for x in (eye[x0], p)))
        total += ((a_t * (xt == x0) + (1 - a_t) / K)[:, 0].numpy() * kl).sum()
        logits = F.pad(table[xt] + (1 - a) * drift[xt], (0, 1), value=-torch.inf)
        cost = uniform_token_loss(logits, *torch.tensor([[x0], [xt]]).expand(2, steps), a[:, 0])
        density += ((a * (xt == x0) + (1 - a) / K)[:, 0] * cost).mean().item()
    assert density == pytest.approx(total, abs=2e-3) and total > 1


class LeaveOneOut(ContextFree):
    """The best predictor under uniform noise: p(x0_i | xt without token i), of a known joint."""

    def __init__(self, joint):
        super().__init__(torch.zeros(joint.shape[0]), joint.ndim)
        self.joint = torch.from_numpy(joint)

    def forward(self, x, t=None, where=None, hidden=False):
        K, T = self.joint.size(0), self.joint.dim()
        eye = torch.eye(K, dtype=torch.float64)[x]  # (B, T, K)
        likely = (1 - t.double())[..., None] * eye + t.double()[..., None] / K
        logits = torch.full((*x.shape, K + 1), -torch.inf)
        for i in range(T):
            letters = 'abc'[:T]
            others = [j for j in range(T) if j != i]
            p = torch.einsum(','.join([letters, *('z' + letters[j] for j in others)])
                             + '->z' + letters[i], self.joint, *(likely[:, j] for j in others))
            logits[:, i, :K] = p.log().float()
        return logits[where]

    def logits(self, h):
        return h


def test_uniform_nelbo_of_the_best_predictor_is_the_entropy():
    """Three dependent tokens: loss and bound, drawn, in the mean over the distribution."""
    joint = np.random.default_rng(1).dirichlet(np.full(27, 0.3)).reshape(3, 3, 3)
    texts = torch.tensor(list(np.ndindex(3, 3, 3)))
    generator = torch.Generator().manual_seed(0)
    x0 = texts[torch.multinomial(torch.from_numpy(joint.flatten()), 6000, True,
                                 generator=generator)]
    model, entropy = LeaveOneOut(joint), -(joint * np.log(joint)).sum()
    exact = -np.log(joint[tuple(x0.T.numpy())]).mean()  # of these texts; the entropy is its mean
    assert abs(exact - entropy) < 0.05
    bound = average(lambda: uniform_nelbo(model, x0, generator).mean(), 90)
    assert abs(bound[0] - exact) < 0.04 and bound[1] < 0.015
    for schedule in SCHEDULES:
        loss = average(lambda: uniform_loss(model, x0, generator, schedule=schedule)[0] / len(x0),
                       50)
        assert abs(loss[0] - bound[0]) < 4 * math.hypot(loss[1], bound[1]) < 0.25


def test_uniform_noise_is_of_real_tokens_and_given_ones_stay():
    model, x0 = ContextFree(torch.zeros(5), 100), tokens(300, 100, V=6)
    given_tokens = torch.rand(300, 100, generator=torch.Generator().manual_seed(5)) < 0.5
    generator = torch.Generator().manual_seed(0)
    nats, count = uniform_loss(model, x0, generator, given_tokens, mask_range=(0.5, 0.5))
    xt, t = model.asked[0]
    assert torch.equal(xt[given_tokens], x0[given_tokens]) and xt.max() == 4
    assert count == (~given_tokens).sum()
    torch.testing.assert_close(t[:, 0], 0.5 * (~given_tokens).float().mean(1))
    changed = (xt != x0)[~given_tokens].float().mean().item()
    assert changed == pytest.approx(0.5 * 4 / 5, abs=4 * 0.5 / count.item() ** 0.5)
    counts = torch.bincount((xt - x0)[~given_tokens & (xt != x0)] % 5, minlength=5)[1:].double()
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 16.3  # chi-square, 3, 0.001
    mean, error = average(lambda: uniform_nelbo(model, x0, generator, given_tokens).sum() / count,
                          60)
    assert abs(mean - math.log(5)) < 4 * error < 0.05
    flat = uniform_loss(model, x0, torch.Generator().manual_seed(1), mask_range=(0.1, 0.1),
                        loss_weight='flat')[0]
    elbo = uniform_loss(model, x0, torch.Generator().manual_seed(1), mask_range=(0.1, 0.1))[0]
    torch.testing.assert_close(elbo, 10 * flat)


def test_uniform_cost_is_precise_in_float32():
    """At both ends and for predictions far from and close to the truth, as in float64."""
    generator = torch.Generator().manual_seed(0)
    for eps in (1e-6, 1e-4, 1e-2):
        for alpha in (eps, 1 - eps):
            alpha = torch.full((200,), alpha, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
            logits = torch.cat([torch.randn(200, 50, generator=generator) * 5,
                                torch.full((200, 1), -torch.inf)], dim=1)
            x0, xt = torch.randint(50, (2, 200), generator=generator)
            xt[:100] = x0[:100]
            exact = uniform_token_loss(logits.double(), x0, xt, alpha.double())
            found = uniform_token_loss(logits, x0, xt, alpha)
            torch.testing.assert_close(found.double(), exact, atol=2e-4, rtol=1e-3)


def beside(model, xt, x0, block_length, level=None):
    """The logits (B, T, V) of xt (B, T) in blocks, beside the clean x0."""
    T = x0.size(1)
    return model(torch.cat([xt, x0], dim=1), level, **beside_clean(
        T, block_length, model.config.n_conv, 'cpu'))[:, :T]


@pytest.mark.parametrize('time_cond, n_conv', [(False, 0), (True, 0), (True, 5)])
def test_one_block_is_mdm(time_cond, n_conv):
    model, x0 = tiny(std=0.2, time_cond=time_cond, n_conv=n_conv), tokens(4, 16)
    given_tokens = torch.arange(16).expand(4, 16) < torch.tensor([[0], [3], [15], [16]])
    for pair in ((mdm_loss, block_loss), (mdm_nelbo, block_nelbo)):
        one, block = (fn(model, x0, torch.Generator().manual_seed(0), given_tokens, **how)
                      for fn, how in zip(pair, ({}, {'block_length': 16})))
        torch.testing.assert_close(one, block, atol=1e-4, rtol=1e-5)
    assert one[3] == 0, 'nothing was wanted'


@pytest.mark.parametrize('shape', [dict(time_cond=True), dict(n_kv_head=2), GPT2_STYLE,
                                   dict(n_conv=5), dict(n_conv=2), dict(n_conv=9), dict(n_conv=1)])
@pytest.mark.parametrize('T, block_length', [(16, 4), (13, 4), (5, 8)])
def test_finished_blocks_in_a_cache_are_the_block_mask(shape, T, block_length):
    """Decoding, block after block, sees what training saw; each block at a level of its own."""
    model, x0 = tiny(std=0.2, **shape), tokens(3, T)
    generator = torch.Generator().manual_seed(0)
    xt = torch.where(torch.rand(3, T, generator=generator) < 0.5, model.mask_id, x0)
    t = torch.rand(3, math.ceil(T / block_length), generator=generator)
    levels = t.repeat_interleave(block_length, dim=1)[:, :T]
    both = beside(model, xt, x0, block_length, torch.cat([levels, torch.zeros(3, T)], dim=1))
    cache = KVCache(model.config)
    parts = []
    for n, (noisy, clean) in enumerate(zip(xt.split(block_length, 1), x0.split(block_length, 1))):
        done = cache.length
        parts.append(model(noisy, t[:, n:n + 1], cache=cache))
        cache.length = done
        model(clean, torch.zeros(3, 1), cache=cache)
    torch.testing.assert_close(torch.cat(parts, 1), both, atol=1e-5, rtol=1e-5)


def test_blocks_of_one_mask_are_clean_prefixes():
    """block_length = 1 at t = 1 is autoregression: -log p(x_i) behind x_<i, the mask in its place.

    The clean tokens see what precedes them alone, which is the network with causal = True.
    """
    model, x0 = tiny(), tokens(3, 10)
    causal = tiny(causal=True)
    nats, count = block_loss(model, x0, torch.Generator().manual_seed(0), block_length=1,
                             mask_range=(1.0, 1.0))
    by_hand = 0.0
    for i in range(10):
        prefix = torch.cat([x0[:, :i], torch.full((3, 1), 11)], dim=1)
        by_hand -= causal(prefix)[:, -1].log_softmax(-1).gather(1, x0[:, i:i + 1]).sum()
    assert count == 30
    torch.testing.assert_close(nats, by_hand)


def test_blocks_of_one_mask_mix_what_precedes_them():
    """As above with local mixing: a centred kernel of 5 has 2 clean neighbours and itself."""
    model, causal = tiny(n_conv=5), tiny(causal=True, n_conv=3)
    causal.load_state_dict({name: p[:3] if 'mixing' in name else p
                            for name, p in model.state_dict().items()})
    x0 = tokens(2, 6)
    xt = torch.full_like(x0, 11)
    logits = beside(model, xt, x0, 1)
    for i in range(6):
        prefix = torch.cat([x0[:, :i], xt[:, :1]], dim=1)
        torch.testing.assert_close(logits[:, i], causal(prefix)[:, -1], atol=1e-5, rtol=1e-5)


def test_block_bound_enumerated():
    """Two blocks, of two tokens and of one; loss and bound against all masks of each block."""
    model = tiny(vocab_size=4, block_size=3, n_layer=1, n_head=2, n_embd=8, std=0.7)
    x0, generator = torch.tensor([[0, 2, 1]]), torch.Generator().manual_seed(0)

    def nll(xt, where):
        logp = beside(model, torch.tensor([xt]), x0, 2)[0].log_softmax(-1)
        return -sum(logp[i, x0[0, i]].item() for i in where)

    with torch.no_grad():  # in a block of two, B(1, 2) = 1/2 for one mask and B(2, 1) = 1/2 for two
        exact = 0.5 * (nll([3, 2, 1], [0]) + nll([0, 3, 1], [1]) + nll([3, 3, 1], [0, 1])) \
            + nll([0, 2, 3], [2])
    x0s = x0.expand(2000, 3)
    for draw in (lambda: block_nelbo(model, x0s, generator, block_length=2).mean(),
                 lambda: block_loss(model, x0s, generator, block_length=2,
                                    schedule='polynomial')[0] / 2000):  # of finite variance
        mean, error = average(draw, 20)
        assert abs(mean - exact) < 4 * error < 0.15


@pytest.mark.parametrize('wrong', [(0.5, 0.2), (0.0, 0.0), (-0.1, 1.0), (0.0, 2.0),
                                   (0.0, 0.5, 1.0)])
def test_levels_outside_of_0_to_1_are_refused(wrong):
    with pytest.raises(UserError, match='mask_range is'):
        Objective(mask_range=wrong)


def test_settings_choose_the_objective():
    """Each takes what it needs; a run from before a setting existed has its default."""
    m, x0 = tiny(std=0.2), tokens(6, 16)
    for name, how in (('ar', {}), ('mdm', dict(loss_weight='flat', schedule='cosine')),
                      ('d3pm', dict(diffusion_steps=3, schedule='cosine')),
                      ('uniform', dict(loss_weight='flat')), ('block', dict(block_length=5))):
        objective = make_objective({'objective': name, 'n_layer': 2} | how)
        assert type(objective) is OBJECTIVES[name]
        with torch.no_grad():
            a, b, plain = (list(map(float, fn(m, x0, torch.Generator().manual_seed(0), x0 < 0)))
                           for fn in (objective.loss, partial(LOSSES[name], **how), LOSSES[name]))
        assert a == b and (a == plain) == (not how)
    with pytest.raises(UserError, match='objective is .gan., not one of ar, mdm'):
        make_objective({'objective': 'gan'})


def test_levels_are_one_for_each_block():
    """All tokens of a block have the weight of one level, and other blocks have others."""
    model, x0 = tiny(time_cond=True), tokens(3, 14)
    given_tokens = torch.zeros_like(x0, dtype=torch.bool)
    noised = BlockDiffusion(block_length=4).corrupt(model, x0, given_tokens,
                                                    torch.Generator().manual_seed(0))
    parts = noised.weight.split(4, dim=1)
    assert all((part == part[:, :1]).all() for part in parts)
    assert len({part[row, 0].item() for part in parts for row in range(3)}) == 12
    torch.testing.assert_close(noised.level[:, :14], 1 / noised.weight)
    assert not noised.level[:, 14:].any() and torch.equal(noised.xt[:, 14:], x0)
    evenly = BlockDiffusion(block_length=4).corrupt_evenly(model, x0, given_tokens,
                                                           torch.Generator().manual_seed(0))
    for part, is_mask in zip(evenly.level[:, :14].split(4, 1), evenly.scored.split(4, 1)):
        torch.testing.assert_close(part, is_mask.float().mean(1, keepdim=True).expand_as(part))


class Erasure(Objective):
    """A toy: every second token is a mask, whatever t; it costs what cross-entropy says, twice."""
    decoders = ('confidence',)

    def corrupt(self, model, x0, given, rng):
        return self.corrupt_evenly(model, x0, given, rng)

    def corrupt_evenly(self, model, x0, given, rng):
        is_mask = (torch.arange(x0.size(1)) % 2 == 0).expand_as(x0) & ~given
        xt = torch.where(is_mask, model.mask_id, x0)
        return Noised(xt, is_mask, torch.full((1, 1), 2.0), noise_level(0.5, given))


def test_an_objective_is_one_class_and_one_line_of_a_table(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, 'erasure', Erasure)
    objective = make_objective({'objective': 'erasure', 'mask_range': (0.0, 1.0)})
    model, x0 = ContextFree(torch.zeros(11), 16), tokens(3, 16)
    nats, count = objective.loss(model, x0, torch.Generator(), x0 < 0)
    assert count == 48 and nats.item() == pytest.approx(48 * math.log(11), rel=1e-6)
    bound = objective.bound(model, x0, torch.Generator(), torch.arange(16).expand(3, 16) < 4)
    torch.testing.assert_close(bound, torch.full((3,), 12 * math.log(11)))


# ------------------------------------------------------------ evaluation, devices, checkpoints


@pytest.mark.parametrize('length', [16, 33, 47, 5])
def test_evaluate_counts_every_token_once(length, in_tmp_path):
    model = tiny(causal=True)
    data = tokens(1, length)[0].numpy().astype(np.uint16)
    got, error = evaluate(model, Autoregression(), stream(in_tmp_path, data).batches('val', 2))
    with torch.no_grad():
        nats = sum(ar_nll(model, x[None]).item() for x in torch.from_numpy(data).long().split(16))
    assert got == pytest.approx(nats / length, rel=1e-5) and math.isnan(error)


ROWS = [([1, 2], [3]), ([4], [5, 6]), ([7, 7, 7], [1, 2, 3]), ([2], [6, 5]), ([1, 2], [4, 4])]
ROW_DATA = np.array([[*p, 9, *a, 8, *[10] * (7 - len(p) - len(a))] for p, a in ROWS], np.uint16)


def rows(folder, pad=False):
    counts = {'tokens': ROW_DATA.size, 'characters': 0, 'bytes': 0, 'rows': len(ROWS), 'scored': 13}
    meta = {'name': 'ids', 'layout': 'rows', 'row_length': 9, 'max_answer': 3, 'vocab_size': 11,
            'mask_id': 11, 'eos_id': 8, 'sep_id': 9, 'pad_id': 10, 'tokenizer': {'kind': 'gpt2'},
            'source': '', 'sha256': '', 'counts': {'train': counts, 'val': counts}}
    (folder / 'data/ids').mkdir(parents=True, exist_ok=True)
    return write(folder, meta, ROW_DATA.ravel(), 16, predict_pad=pad)


@pytest.mark.parametrize('pad', [False, True])
@pytest.mark.parametrize('batch_size', [1, 2, 16])
def test_evaluate_counts_every_answer_of_rows_once(pad, batch_size, in_tmp_path):
    """Against one row at a time, without its PAD or with it up to the longest answer's EOS."""
    model, seen, nats, n = tiny(causal=True), [], 0.0, 0

    class Spy(Autoregression):
        def bound(self, model, x0, rng, given):
            seen.extend(zip(x0.tolist(), given.sum(1).tolist()))
            return super().bound(model, x0, rng, given)

    got, _ = evaluate(model, Spy(), rows(in_tmp_path, pad).batches('val', batch_size))
    wanted = [([*p, 9, *a, 8, *[10] * (3 - len(a)) * pad], len(p) + 1) for p, a in ROWS]
    assert sorted(seen) == sorted(wanted)
    for ids, known in wanted:
        x = torch.tensor([model.mask_id, *ids[:-1]])[None]
        log_p = model(x)[0].log_softmax(-1).detach()
        nats -= sum(log_p[i, ids[i]].item() for i in range(known, len(ids)))
        n += len(ids) - known
    assert got == pytest.approx(nats / n, rel=1e-5)
    seen.clear()
    evaluate(model, Spy(), rows(in_tmp_path).batches('val', 2, limit=3))
    assert sorted(ids[0] for ids, _ in seen) == [1, 1, 7], 'evenly spread'


@pytest.mark.parametrize('objective', ['ar', 'mdm'])
@pytest.mark.parametrize('pad', [False, True])
def test_a_uniform_guess_costs_log_v_in_rows(objective, pad, in_tmp_path):
    model = Transformer(ModelConfig(12, 16, causal=objective == 'ar', n_embd=32))
    batches = rows(in_tmp_path, pad).batches('val', 2)
    got, _ = evaluate(model, OBJECTIVES[objective](), batches)
    assert got == pytest.approx(math.log(11), abs=1e-6)


def test_what_is_given_is_neither_scored_nor_masked():
    """So its own logits have no gradient, and only ids behind it go into the masked input."""
    x0, given = tokens(4, 8), torch.arange(8) < torch.tensor([[0], [3], [5], [7]])
    model = tiny(causal=True)
    nats, count = ar_loss(model, x0, None, given)
    all_nll = ar_token_nll(model, x0, None)
    torch.testing.assert_close(nats, all_nll[~given].sum())
    assert count == (~given).sum() == 17
    torch.testing.assert_close(ar_nll(model, x0, None, given), (all_nll * ~given).sum(1))
    spy = ContextFree(torch.zeros(11), 8)
    for loss in (mdm_loss, mdm_nelbo):
        loss(spy, x0, torch.Generator().manual_seed(0), given)
        x, _ = spy.asked[-1]
        assert torch.equal(x[given], x0[given]) and (x[~given] == 11).any()


def test_n_hidden_is_the_width_inside_the_mlp():
    mlps = [tiny(mlp='swiglu', n_hidden=n).blocks[0].mlp for n in (0, 100)]
    assert [mlp.fc.out_features for mlp in mlps] == [85, 100] == [mlp.gate.out_features
                                                                 for mlp in mlps]
    assert mlps[1].proj.in_features == 100


def test_standard_error_is_that_of_independent_repeats(in_tmp_path):
    """Over many seeds, the means scatter as much as the error says."""
    model, batches = tiny(), stream(in_tmp_path, tokens(1, 64)[0]).batches('val', 2)
    found = [evaluate(model, OBJECTIVES['mdm'](), batches, seed, repeats=16) for seed in range(40)]
    means, errors = np.array(found).T
    assert 0.6 < means.std(ddof=1) / errors.mean() < 1.5


def test_every_batch_and_repeat_has_noise_of_its_own(in_tmp_path):
    seeds = []

    class Spy(MaskedDiffusion):
        def bound(self, model, x0, rng, given):
            seeds.append(rng.initial_seed())
            assert not torch.is_grad_enabled()
            return super().bound(model, x0, rng, given)

    batches = stream(in_tmp_path, tokens(1, 64)[0]).batches('val', 2)
    evaluate(tiny(), Spy(), batches, repeats=3)
    assert len(set(seeds)) == len(seeds) == 3 * len(batches) > 3


def test_evaluate_leaves_the_mode_and_the_global_generator_alone(in_tmp_path):
    model = tiny(dropout=0.1).train()
    state = torch.get_rng_state()
    evaluate(model, OBJECTIVES['mdm'](), stream(in_tmp_path, range(10)).batches('val', 2))
    assert model.training and torch.equal(state, torch.get_rng_state())


def test_ids_outside_the_vocabulary_are_refused(in_tmp_path):
    with pytest.raises(UserError, match='id 11'):
        evaluate(tiny(), OBJECTIVES['mdm'](), stream(in_tmp_path, [1, 11, 2]).batches('val', 2))


@pytest.mark.parametrize('asked, cuda, mps, found', [
    ('auto', 1, True, 'cuda'), ('auto', 0, True, 'mps'), ('auto', 0, False, 'cpu'),
    ('cpu', 1, True, 'cpu'), ('cuda:1', 2, False, 'cuda:1'), ('mps', 0, True, 'mps')])
def test_devices_are_picked(asked, cuda, mps, found):
    assert pick_device(asked, lambda: cuda, lambda: mps) == found


def test_peak_memory_is_that_of_the_device_in_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', {'cuda:1': 3.2e9}.get)
    assert peak_memory('cuda:1') == ', 3.20 GB at most'


@pytest.mark.parametrize('asked, cuda', [('cuda', 0), ('mps', 2), ('tpu', 1), ('cuda:2', 2),
                                         ('cuda:x', 1)])
def test_absent_devices_are_refused(asked, cuda):
    with pytest.raises(UserError, match='there is only (cuda, cuda:0, )?(cuda:1, )?cpu'):
        pick_device(asked, lambda: cuda, lambda: False)


@pytest.mark.parametrize('device, features, found', [
    ('cuda:0', {'cuda': True}, 'bfloat16'), ('cuda', {'cuda': False}, 'float32'),
    ('mps', {'cuda': True}, 'float32'), ('cpu', {'cuda': True}, 'float32'),
    ('cpu', {'avx512_bf16': False, 'avx2': True}, 'float32'),
    ('cpu:0', {'avx512_bf16': True}, 'bfloat16'),
    ('cpu', {'amx_bf16': True}, 'bfloat16'), ('cpu', {'avx512_bf16': True}, 'bfloat16')])
def test_bfloat16_where_it_is_fast(device, features, found):
    ask = {'features': lambda: features, 'cuda': lambda: features.get('cuda')}
    assert pick_dtype('auto', device, **ask) == found
    assert pick_dtype('float32', device, **ask) == 'float32'
    with pytest.raises(UserError, match='dtype'):
        pick_dtype('int8', device)


def run_of(model, objective='mdm'):
    c = model.config
    shape = {k: v for k, v in vars(c).items() if k not in ('vocab_size', 'causal')}
    return {'model': model.state_dict(), 'optimizer': [],
            'config': shape | {'objective': objective},
            'meta': {'vocab_size': c.vocab_size - 1, 'mask_id': c.mask_id},
            'iter': 3, 'rng': 1, 'best': 2.0}


def test_checkpoints_come_back_and_damaged_ones_are_refused(tmp_path):
    model = tiny()
    with pytest.raises(UserError, match='is not a run'):
        load_checkpoint(tmp_path)
    path = tmp_path / 'ckpt.pt'
    torch.save(run_of(model), path)
    again = load_model(load_checkpoint(tmp_path), 'cpu')
    assert torch.equal(again(tokens(2, 8)), model(tokens(2, 8)))
    whole = path.read_bytes()
    for damaged in (whole[:len(whole) // 2], b'', b'not a checkpoint'):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match='damaged'):
            load_checkpoint(tmp_path)
    torch.save({'model': {}}, path)
    with pytest.raises(UserError, match='lacks best, config'):
        load_checkpoint(tmp_path)
    torch.save(run_of(model) | {'model': {'embed.weight': torch.zeros(1)}}, path)
    with pytest.raises(UserError, match='do not fit'):
        load_model(load_checkpoint(tmp_path), 'cpu')


def test_checkpoints_are_not_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ('this must never run',))
    torch.save({'model': Evil()}, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='damaged, or not a checkpoint'):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize('objective', LOSSES)
def test_sliced_cross_entropy_is_the_whole(objective, monkeypatch):
    """Losses and gradients, when the logits of a batch are made in slices, each made twice."""
    torch.manual_seed(0)
    m = Transformer(ModelConfig(30, 16, n_embd=32, n_layer=1, causal=objective == 'ar'))
    with torch.no_grad():
        m.head.weight.normal_(std=0.1)
    x0, found = torch.randint(0, 29, (6, 16)), []
    for at_once in (2 ** 25, 30 * 7, 1):  # all, 7 positions, one
        monkeypatch.setattr(model.in_slices, '__kwdefaults__', {'at_once': at_once})
        m.zero_grad()
        nats, count = LOSSES[objective](m, x0, torch.Generator().manual_seed(1))
        nats.backward()
        found.append([nats / count, *(p.grad / count for p in m.parameters())])
    for other in found[1:]:
        for a, b in zip(found[0], other):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_every_seed_draws_another_bound(in_tmp_path):
    m = Transformer(ModelConfig(8, 4, n_embd=8, n_layer=1, n_head=1))
    with torch.no_grad():
        m.head.weight.normal_()
    ids = np.random.default_rng(0).integers(0, 7, 100)
    batches = stream(in_tmp_path, ids, V=8, block_size=4).batches('val', 4)
    drawn = [evaluate(m, OBJECTIVES['mdm'](), batches, seed)[0] for seed in (0, 1, 2 ** 40)]
    assert len(set(drawn)) == 3


# The length of an answer: prompts of P tokens, SEP (8) the last; answers, EOS (9) and PAD (10) to W


def length_rows(N, P=5, W=8, seed=0):
    """Rows x0 (N, P + W), given, and the lengths n (N,), which are the ones in a prompt, plus 2."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, 3, (N, P - 1), generator=generator)
    n = (prompts == 1).sum(1) + 2
    answers = torch.randint(0, 8, (N, W), generator=generator)
    place = torch.arange(W)
    answers = answers.masked_fill(place == n[:, None] - 1, 9).masked_fill(place >= n[:, None], 10)
    x0 = torch.cat([prompts, torch.full((N, 1), 8), answers], dim=1)
    return x0, torch.arange(P + W).expand_as(x0) < P, n


class Head(nn.Module):
    """A length head that gives one output to all rows, and remembers what it was asked."""

    def __init__(self, kind, out):
        super().__init__()
        self.kind, self.out = kind, out

    def forward(self, model, x):
        self.asked = x
        return self.out.expand(len(x), *self.out.shape)


def loss_of_head(kind, out, x0, given, quantile=0.5):
    m = SimpleNamespace(mask_id=11, length_head=Head(kind, torch.as_tensor(out)))
    objective = LengthLoss(eos_id=9, length_quantile=quantile)
    pad_is_eos = objective.bound(m, torch.where(x0 == 10, 9, x0), None, given)  # as in LLaDA
    loss = objective.bound(m, x0, None, given)
    assert torch.equal(loss, pad_is_eos)
    assert torch.equal(m.length_head.asked, x0.where(given, torch.tensor(11))), 'no answer is seen'
    return loss


@pytest.mark.parametrize('quantile', [0.05, 0.3, 0.51, 0.95])
def test_the_pinball_loss_is_least_at_the_quantile(quantile):
    x0, given, n = length_rows(101)
    at = torch.linspace(0, 9, 901)
    losses = [loss_of_head('regress_mean', c, x0, given, quantile).sum().item() for c in at]
    assert at[np.argmin(losses)].item() == pytest.approx(
        np.quantile(n.numpy(), quantile, method='inverted_cdf'))
    row = loss_of_head('encoder_regress', 3.5, x0, given, quantile)
    for loss, length in zip(row.tolist(), n.tolist()):
        assert loss == pytest.approx(quantile * (length - 3.5) if length > 3.5 else
                                     (1 - quantile) * (3.5 - length))


def test_losses_of_classifiers_are_those_by_hand():
    x0, given, n = length_rows(20)
    out = torch.randn(8, generator=torch.Generator().manual_seed(1))
    p, ended = out.softmax(0).tolist(), out.sigmoid().tolist()
    found = zip(loss_of_head('encoder_classify', out, x0, given).tolist(),
                loss_of_head('classify', out, x0, given).tolist(), n.tolist())
    for whole, by_token, length in found:
        assert whole == pytest.approx(-math.log(p[length - 1]), rel=1e-5)
        assert by_token == pytest.approx(-sum(
            math.log(ended[i] if i + 1 >= length else 1 - ended[i]) for i in range(8)), rel=1e-5)


@pytest.mark.parametrize('share', [0.01, 0.4, 0.9, 1.0])
def test_first_to_hold_is_that_of_a_loop(share):
    """Also where it goes up and down, as a classifier's answers may."""
    cumulative = torch.rand(200, 6, generator=torch.Generator().manual_seed(2))
    cumulative[:50, -1] = 1.0
    for row, found in zip(cumulative.tolist(), first_to_hold(cumulative, share).tolist()):
        assert found == next((i + 1 for i, c in enumerate(row) if c >= share), 6)


@pytest.mark.parametrize('kind', LENGTH_HEADS)
def test_length_heads_learn_lengths_and_nothing_else_changes(kind):
    """Those that the prompt decides, on a model with random weights."""
    m, (steps, rate) = tiny(length_head=kind, pos='learned', n_layer=1), (150, 3e-2)
    torch.manual_seed(0)
    m.length_head.mlp[0].reset_parameters()
    if kind.startswith('encoder'):
        m.length_head.encoder.init_weights()
        steps, rate = 60, 3e-3
    before = {k: v.clone() for k, v in m.state_dict().items()}
    x0, given, _ = length_rows(96)
    adam = torch.optim.Adam(m.length_head.parameters())
    for step in range(steps):
        adam.param_groups[0]['lr'] = rate * (1 - step / steps)
        adam.zero_grad()
        LengthLoss(eos_id=9, length_quantile=0.9).loss(m, x0, None, given)[0].backward()
        adam.step()
    assert all(torch.equal(v, before[k]) and m.get_parameter(k).grad is None
               for k, v in m.state_dict().items() if 'length_head' not in k), 'bit by bit'
    x0, given, n = length_rows(200, seed=1)
    x = torch.where(given, x0, 11)
    with torch.no_grad():
        bound = m.length_head.predict(m, x, 0.9)
        torch.testing.assert_close(m.length_head.predict(m, x[7:8], 0.9), bound[7:8])
        shape = {'classify': (200, 8), 'encoder_classify': (200, 8)}
        assert m.length_head(m, x).shape == shape.get(kind, (200,))
    # 5, the best bound that does not look, is 1.7 tokens away
    assert (bound.ceil() >= n).float().mean() >= 0.95 and (bound - n).abs().mean() < 0.7


def test_regressions_pool_hidden_states_as_they_say():
    x = torch.where(length_rows(3)[1], length_rows(3)[0], 11)
    for kind in ('regress_mean', 'regress_concat', 'encoder_regress'):
        m = tiny(length_head=kind)
        h = m(x, hidden=True)
        if kind == 'encoder_regress':
            h = m.length_head.encoder(x[:, :5], hidden=True)
        pooled = [h[:, :5].mean(1), h[:, 5:].mean(1)] if kind == 'regress_concat' else [h.mean(1)]
        torch.testing.assert_close(m.length_head.mlp(torch.cat(pooled, 1))[:, 0],
                                   m.length_head(m, x), rtol=1e-4, atol=1e-4)


def test_a_head_has_64_channels_unless_it_is_said():
    assert [ModelConfig(8, n_embd=C).n_head for C in (32, 64, 128, 192, 768)] == [1, 1, 2, 3, 12]
    assert ModelConfig(8, n_embd=128, n_head=4).n_head == 4


def test_an_unknown_head_is_refused():
    with pytest.raises(UserError, match="length_head is 'regress', not one of regress_mean"):
        tiny(length_head='regress')


# ------------------------------------------------------------------- models of the Hugging Face hub

def imported(folder, objective, trust=False, vocabulary=None, **settings):
    """Our network with the weights of the folder, on a data set of its tokenizer; and its meta."""
    meta = (vocabulary or hub_vocabulary(folder, 'stream')) | {'name': 'prose'}
    s = {'objective': objective, 'block_size': 16, 'shift': False, 'init_from': f'hf:{folder}',
         'length_head': '', 'trust_remote_code': trust}
    shape = hub_settings(SimpleNamespace(**s))
    s = SimpleNamespace(
        **s | {k: v for k, v in shape.items() if k not in MAY_DIFFER} | settings)
    network = make_network(model_config(vars(s), meta), trust)
    load_first_weights(network, s, meta)
    return network.eval(), meta


@pytest.mark.parametrize('other', [{}, {'activation_function': 'gelu', 'n_inner': 40,
                                        'tie_word_embeddings': False}])
def test_gpt2_of_the_hub_has_its_logits_in_our_transformer(tmp_path, other):
    """With and without cache; AR scores a text as GPT-2 does behind its end-of-text."""
    theirs = save_hub_model(tmp_path / 'hub', 'gpt2', **other)
    ours, meta = imported(str(tmp_path / 'hub'), 'ar')
    x, wte = tokens(3, 16, 300), theirs.transformer.wte.weight
    with torch.no_grad():
        expected = theirs(x).logits  # (3, 16, 300)
        assert expected.std() > 1
        logits, cache = ours(x), KVCache(ours.config)
        steps = torch.cat([ours(part, cache=cache) for part in x.split([5, 1, 1, 9], 1)], 1)
        for found in (logits, steps):
            torch.testing.assert_close(found[..., :300], expected, atol=1e-4, rtol=0)
            assert (found[..., 300] == -torch.inf).all()
        behind = theirs(F.pad(x, (1, 0), value=theirs.config.eos_token_id)).logits[:, :-1]
        nll = -behind.log_softmax(-1).gather(2, x[..., None])[..., 0]
        torch.testing.assert_close(ar_token_nll(ours, x), nll, atol=1e-4, rtol=0)
    assert meta['mask_id'] == 300
    torch.testing.assert_close(ours.embed.weight[300], wte.mean(0), atol=1e-3, rtol=0)
    assert len(ours.embed_pos.weight) == 16 and ours.config.tied != bool(other)


@pytest.mark.parametrize('mask_inside', [False, True])
def test_diffugpt_predicts_what_its_own_code_does(tmp_path, mask_inside):
    """GPT-2 with names of its own, that sees all tokens and is shifted; its mask is a token."""
    from safetensors.torch import load_file, save_file
    theirs, folder = save_hub_model(tmp_path / 'hub', 'gpt2'), tmp_path / 'hub'
    weights = load_file(folder / 'model.safetensors')
    save_file({name.replace('transformer.wte', 'embed_tokens').replace(
        'transformer', 'denoise_model'): w for name, w in weights.items()},
        folder / 'model.safetensors', {'format': 'pt'})
    plain = hub_vocabulary(str(folder), 'stream')
    described = json.loads((folder / 'tokenizer_config.json').read_text())
    text = load_tokenizer(plain).library.id_to_token(290)
    (folder / 'tokenizer_config.json').write_text(json.dumps(described | {'mask_token': text}))
    with_mask = hub_vocabulary(str(folder), 'stream')
    assert (plain['mask_id'], with_mask['mask_id'], with_mask['vocab_size']) == (300, 290, 299)
    vocabulary = with_mask if mask_inside else plain | {'tokenizer': with_mask['tokenizer']}
    ours, _ = imported(str(folder), 'mdm', vocabulary=vocabulary, shift=True)
    x, is_mask = tokens(2, 16, 290), torch.rand(2, 16, generator=torch.manual_seed(3)) < 0.5
    with torch.no_grad():
        all_seen = torch.zeros(2, 1, 17, 17)
        behind = F.pad(x.masked_fill(is_mask, 290), (1, 0), value=0)
        expected = theirs(behind, attention_mask=all_seen).logits[:, :-1]  # (2, 16, 300)
        found = ours(x.masked_fill(is_mask, ours.mask_id))
        assert (found[..., ours.mask_id] == -torch.inf).all()
        keep = [i for i in range(300) if i != ours.mask_id]
        torch.testing.assert_close(found[..., keep], expected[..., keep], atol=1e-4, rtol=0)
        logp = expected[..., keep].log_softmax(-1)
        rng = torch.Generator().manual_seed(5)
        noised = OBJECTIVES['mdm']().corrupt_evenly(ours, x, x < 0, rng)
        bound = OBJECTIVES['mdm']().bound(ours, x, rng.manual_seed(5))
        logits = theirs(F.pad(noised.xt.masked_fill(noised.scored, 290), (1, 0)),
                        attention_mask=all_seen).logits[:, :-1]
        if not mask_inside:
            nll = -logits.log_softmax(-1).gather(2, x[..., None])[..., 0]
            torch.testing.assert_close((nll * noised.scored * noised.weight).sum(1), bound,
                                       atol=1e-2, rtol=0)
    assert logp.isfinite().all()


@pytest.mark.parametrize('like', ['bert', 'distilbert', 'roberta', 'camembert', 'mpnet',
                                  'modernbert', 'llada'])
def test_a_masked_model_of_the_hub_has_its_own_logits_behind_our_call(tmp_path, like):
    """Rows with PAD and without; and a checkpoint is read back without the folder's weights."""
    theirs, folder = save_hub_model(tmp_path / 'hub', like), str(tmp_path / 'hub')
    if like == 'llada':
        with pytest.raises(UserError, match='trust_remote_code'):
            imported(folder, 'mdm')
    ours, meta = imported(folder, 'mdm', like == 'llada')
    assert (ours.mask_id, ours.config.vocab_size, meta['vocab_size']) == (4, 90, 89)
    x = tokens(3, 16, 90).clamp(min=5)
    x[:, 3:6], x[1, 9:], keep = 4, 0, [i for i in range(90) if i != 4]
    with torch.no_grad():
        for rows in (x[:1], x):
            expected = theirs(rows, attention_mask=torch.ones_like(rows)).logits
            found = ours(rows)
            torch.testing.assert_close(found[..., keep], expected[..., keep], atol=1e-4, rtol=0)
            assert (found[..., 4] == -torch.inf).all() and expected.std() > 0.3
            where = rows == 4
            torch.testing.assert_close(ours(rows, where=where), found[where])
    with pytest.raises(UserError, match='17 tokens do not fit into the context'):
        ours(tokens(1, 17, 90))
    most = 62 if like in ('roberta', 'camembert', 'mpnet') else 64  # their positions begin at 2
    assert imported(folder, 'mdm', like == 'llada', block_size=most)[0](
        tokens(1, most, 90).clamp(min=5)).isfinite().any()
    if like not in ('distilbert', 'llada'):  # of 512 positions; without
        with pytest.raises(UserError, match=f'block_size is {most + 1}'):
            imported(folder, 'mdm', block_size=most + 1)
    checkpoint = {'model': ours.state_dict(), 'meta': meta, 'config': {
        'objective': 'mdm', **{key: getattr(ours.config, key) for key in (
            'block_size', 'n_layer', 'n_head', 'n_embd', 'tied', 'pos', 'hub')}}}
    (tmp_path / 'hub/model.safetensors').unlink()
    again = load_model(checkpoint, 'cpu', like == 'llada')
    assert torch.equal(again(x), ours(x))
    assert again.count_parameters() == sum(p.numel() for p in theirs.parameters())


def test_what_a_hub_model_cannot_be_is_one_line(tmp_path):
    save_hub_model(tmp_path / 'gpt2', 'gpt2')
    save_hub_model(tmp_path / 'bert', 'bert')
    save_hub_model(tmp_path / 'odd', 'gpt2', scale_attn_weights=False)
    mamba = str(tmp_path / 'mamba')
    pytest.importorskip('transformers').MambaConfig().save_pretrained(mamba)
    gpt2, bert, odd = (str(tmp_path / name) for name in ('gpt2', 'bert', 'odd'))
    other = hub_vocabulary(gpt2, 'stream')
    for message, broken in (
            ("dataset is 'prose', but it must be prepared with --tokenizer=hf:",
             lambda: imported(bert, 'mdm', False, other)),
            ('block_size is 65, but it must be 64 or less',
             lambda: imported(gpt2, 'ar', block_size=65)),
            ('must be trained by mdm or d3pm', lambda: imported(bert, 'ar')),
            ('must be trained by mdm or d3pm', lambda: imported(bert, 'block')),
            ('the dropout of its own config alone', lambda: imported(bert, 'mdm', dropout=0.1)),
            ('the mask is not the last id', lambda: imported(bert, 'uniform')),
            ('another qk_norm', lambda: imported(gpt2, 'ar', qk_norm=True)),
            ('a GPT-2 with its usual GELU, norms and attention', lambda: imported(odd, 'ar')),
            ('is a mamba of the hub, but it must be a GPT-2 or a masked', lambda: hub_settings(
                SimpleNamespace(init_from=f'hf:{mamba}', trust_remote_code=False))),
            ('dataset is', lambda: imported(gpt2, 'ar', vocabulary=other | {
                'tokenizer': {'kind': 'gpt2'}})),
            ('dataset is', lambda: imported(gpt2, 'mdm', vocabulary=other | {  # its mask: a token
                'mask_id': 290, 'vocab_size': 299})),
            ('another n_layer', lambda: imported(gpt2, 'ar', n_layer=3)),
            ('block_size is 64, but it must be 63 or less',
             lambda: imported(gpt2, 'mdm', block_size=64, shift=True)),
            ('prefix_cache or attn_anneal is True',
             lambda: imported(bert, 'mdm')[0](tokens(1, 4), cache=1))):
        with pytest.raises(UserError, match=message):
            broken()
    weights = tmp_path / 'bert/model.safetensors'
    from safetensors.torch import load_file, save_file
    kept = {name: w for name, w in load_file(weights).items() if 'layer.1.output.dense' not in name}
    save_file(kept, weights, {'format': 'pt'})
    with pytest.raises(UserError, match=r'lacks .*bert\.encoder\.layer\.1\.output\.dense\.bias'):
        imported(bert, 'mdm')
    torch.save(kept, tmp_path / 'bert/pytorch_model.bin')  # a pickle is never read
    weights.unlink()
    with pytest.raises(UserError, match=r'^hf:.*bert cannot be loaded .*safetensors'):
        imported(bert, 'mdm')


@pytest.mark.parametrize('shape', [{'tied': True, 'embed_scale': 1.0}, {'bias': False},
                                   {'mlp': 'gelu_tanh', 'n_hidden': 40}])
def test_an_exported_model_has_our_logits_in_transformers(tmp_path, shape):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    save_tokenizer(tmp_path, 'gpt2', [PROSE])
    meta, folder, shape = hub_vocabulary(str(tmp_path), 'stream'), tmp_path / 'out', {
        **GPT2_STYLE, **shape}
    ours, x = tiny(vocab_size=301, causal=True, std=0.2, **shape), tokens(2, 16, 302)
    run = SimpleNamespace(model=ours, meta=meta, tokenizer=load_tokenizer(meta),
                          objective=Autoregression())
    export_model(run, str(folder))
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(theirs).__name__ == 'GPT2LMHeadModel'
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits[..., :300], ours(x)[..., :300], atol=1e-4,
                                   rtol=0)
    assert theirs.generation_config.suppress_tokens == [ours.mask_id]
    assert theirs.config.bos_token_id == ours.mask_id and (folder / 'model.safetensors').exists()
    assert theirs.config.eos_token_id == meta['eos_id']
    assert theirs.config.sep_token_id == meta['sep_id']
    assert theirs.config.pad_token_id == meta['pad_id']
    again, _ = imported(str(folder), 'ar', vocabulary=meta | {'mask_id': 300, 'vocab_size': 300})
    assert again.config.start_id == ours.mask_id, 'and it reads this token first'
    ids = AutoTokenizer.from_pretrained(folder).encode('said the fox', add_special_tokens=False)
    assert ids == run.tokenizer.encode('said the fox')
    with pytest.raises(UserError, match='a folder that is not there yet'):
        export_model(run, str(folder))
    for other in ({'mlp': 'relu2'}, {'qk_norm': True}, {'n_conv': 3}, {'causal': False},
                  {'pos': 'rope'}, {'norm': 'rmsnorm'}, {'n_kv_head': 2}, {'embed_scale': 2.0}):
        run.model = tiny(**{'causal': True} | shape | other)
        run.objective = OBJECTIVES['mdm' if 'causal' in other else 'ar']()
        with pytest.raises(UserError, match='only ar models can be exported'):
            export_model(run, 'no')


@pytest.mark.parametrize('like', ['gpt2', 'bert'])
def test_an_exported_model_of_prompts_and_answers_comes_back_as_it_was(tmp_path, like):
    save_tokenizer(tmp_path, like, [PROSE])
    meta, folder = hub_vocabulary(str(tmp_path), 'pairs'), str(tmp_path / 'out')
    ours = tiny(vocab_size=meta['vocab_size'] + 1, mask_id=meta['mask_id'],
                start_id=meta['mask_id'], causal=True, std=0.2, **GPT2_STYLE)
    export_model(SimpleNamespace(model=ours, meta=meta, tokenizer=load_tokenizer(meta),
                                 objective=Autoregression()), folder)
    again, _ = imported(folder, 'ar', vocabulary=meta)
    assert torch.equal(again.embed.weight, ours.embed.weight)


def test_a_shifted_model_predicts_a_token_where_the_one_before_is_read():
    """The same weights on [start, x]; and a block is read again from a cache as without it."""
    from sample import PrefixCached
    for pos in ('rope', 'learned'):
        shifted = tiny(shift=True, pos=pos, start_id=3, std=0.2)
        plain = tiny(block_size=17, pos=pos, std=0.2)
        x = tokens(2, 16)
        with torch.no_grad():
            expected = plain(F.pad(x, (1, 0), value=3))[:, :16]
            torch.testing.assert_close(shifted(x), expected)
            where = torch.rand(2, 16, generator=torch.manual_seed(1)) < 0.5
            torch.testing.assert_close(shifted(x, where=where), expected[where])
            cached, where = PrefixCached(shifted), torch.zeros_like(where)
            where[:, 5:9] = True
            cached.enter(x, 5, 9)
            for _ in range(3):  # nothing has changed, so what the cache holds is exact
                torch.testing.assert_close(cached(x, where=where), expected[where])


def test_local_mixing_reads_later_neighbours_where_attention_is_still_closed():
    """Two mixings of a layer reach one token ahead each; n_conv = 1 reads no neighbour at all."""
    closed = {'attn_mask': torch.ones(16, 16, dtype=torch.bool).tril()}
    open_ = {'attn_mask': torch.ones(16, 16, dtype=torch.bool)}
    x = tokens(2, 16)
    torch.testing.assert_close(tiny(n_conv=1)(x, **closed), tiny(n_conv=1, causal=True)(x))
    model, changed = tiny(n_conv=3, n_layer=1), x.clone()
    torch.testing.assert_close(model(x, **open_), model(x))
    changed[:, 10] = (x[:, 10] + 1) % 11
    before, after = model(x, **closed), model(changed, **closed)
    assert torch.equal(before[:, :8], after[:, :8])
    assert (before[:, 8] != after[:, 8]).any(-1).all()


def test_attention_opens_from_causal_to_all():
    def opened(iteration, shift=False):
        return attention_options(SimpleNamespace(iteration=iteration, device='cpu'),
                                 SimpleNamespace(attn_anneal=10, shift=shift), x)

    model, causal, x, seen = tiny(), tiny(causal=True), tokens(2, 16), []
    torch.testing.assert_close(model(x, **opened(0)), causal(x))
    shifted = tiny(shift=True)  # reads a start token before the 16
    expected = shifted(x, attn_mask=torch.ones(17, 17, dtype=torch.bool).tril())
    torch.testing.assert_close(shifted(x, **opened(0, shift=True)), expected)
    assert opened(10) == {}
    everything = torch.ones(16, 16, dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('model.attend', lambda q, k, v, mask, *how: (
            seen.append(mask), attend(q, k, v, mask, *how))[1])
        torch.testing.assert_close(model(x, attn_mask=everything), model(x))
    assert [mask is everything for mask in seen] == [True, True, False, False]  # in both layers
    torch.manual_seed(0)
    masks = torch.stack([opened(3)['attn_mask'] for _ in range(100)])
    assert masks.tril().sum() == 100 * 16 * 17 / 2
    later = torch.ones(16, 16).triu(1).bool()
    assert masks[:, later].float().mean().item() == pytest.approx(0.3, abs=0.015)
    # a loss passes it on: of a mask alone at the first token, which then sees but itself
    x0, given = tokens(1, 16), torch.ones(1, 16, dtype=torch.bool)
    given[0, 0], xt, rng = False, x0.clone(), torch.Generator()
    xt[0, 0] = model.mask_id
    for name, how in (('mdm', {}), ('mdm', opened(0)), ('d3pm', opened(0))):
        objective = OBJECTIVES[name](loss_weight='flat', mask_range=(1.0, 1.0))
        nats, _ = objective.loss(model, x0, rng.manual_seed(1), given, **how)
        expected = (causal if how else model)(xt)[0, 0].log_softmax(-1)[x0[0, 0]]
        torch.testing.assert_close(nats, -expected)
