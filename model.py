"""The transformer, and the probability models that are made from it.

    Transformer     tokens in, logits out; one flag turns it from causal to bidirectional
    Objective       what training minimises and evaluation reports. Autoregression has the negative
                    log-likelihood itself (nll); diffusion has an upper bound on it (nelbo).
                    MaskedDiffusion is the one to read first; D3PM, Uniform and BlockDiffusion
                    differ from it in how they corrupt text and in what a prediction costs
    evaluate        the mean of an objective over a split
    LengthHead      predicts how long an answer will be, before it is written

Letters, here and in the papers:

    B, T, C   batch, sequence length, channels (n_embd)
    H, D      attention heads, channels of one head (C = H * D)
    K         neighbours of local mixing (n_conv)
    N, M      diffusion steps of D3PM; tokens of a batch whose prediction is scored
    V         rows of the embedding: V' real tokens, then one row for the mask, mask_id = V - 1
    x0        clean tokens (B, T) int64                           x, z_0 in MDLM, x_0 in LLaDA
    t         noise level (B, 1) in (0, 1]; at t = 1 all tokens are masks
    alpha     P(a token is kept at level t)                       alpha_t
    w(t)      weight of level t in the bound                      -alpha'_t / (1 - alpha_t)
    xt        x0 with each token kept or replaced by mask_id      z_t, x_t
    is_mask   (B, T) bool, True where xt is mask_id
    given     (B, T) bool, True where a token is known (a prompt): never masked, never scored
    nats, nll, nelbo   natural logarithms throughout; per token where a line says so

Papers: MDLM arXiv 2406.07524, LLaDA 2502.09992, MaskGIT 2202.04200, GPT-2, RoFormer 2104.09864,
DiT 2212.09748 (adaLN), D3PM 2107.03006, UDLM 2412.10193, Duo 2506.10892, BD3-LM 2503.09573.
"""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from config import UserError, one_of
from prepare import mixed_seed

# ---------------------------------------------------------------------------- the transformer

NORMS, POSITIONS, MLPS = ('rmsnorm', 'layernorm'), ('rope', 'learned'), ('relu2', 'swiglu', 'gelu')
LENGTH_HEADS = ('regress_mean', 'regress_concat', 'classify', 'encoder_regress', 'encoder_classify')


@dataclass
class ModelConfig:
    """The shape of a Transformer; every field but the first is an ablation to run."""
    vocab_size: int           # V = V' + 1: the real tokens and, last, the mask
    block_size: int = 256     # context length, the largest T
    causal: bool = False      # True: position i sees 0..i (ar); False: it sees all (mdm)
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 0        # heads of keys and values; 0 = n_head, fewer = grouped queries
    n_embd: int = 256
    pos: str = 'rope'         # rope, learned
    norm: str = 'rmsnorm'     # rmsnorm, layernorm
    mlp: str = 'relu2'        # relu2, swiglu, gelu
    n_conv: int = 0           # local mixing over so many neighbours in every block; 0 = none
    n_hidden: int = 0         # channels inside the mlp; 0 = 4 n_embd, of swiglu 8/3 n_embd
    qk_norm: bool = True      # normalise queries and keys, so that attention logits stay small
    bias: bool = False        # biases in linear layers and in layernorm
    tied: bool = False        # the head shares the embedding's matrix
    time_cond: bool = False   # show the network the noise level (adaLN); masks show it already
    dropout: float = 0.0
    subs: bool = True         # the mask is never predicted; False: d3pm may predict it
    block_length: int = 0     # tokens per block of block diffusion; 0 = none
    length_head: str = ''     # how the length of an answer is predicted, see LengthHead; '' = not

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            raise UserError(f'n_embd {self.n_embd} must be a multiple of n_head {self.n_head}, '
                            f'and that of n_kv_head {self.n_kv_head}')
        one_of('pos', self.pos, POSITIONS)
        one_of('norm', self.norm, NORMS)
        one_of('mlp', self.mlp, MLPS)
        one_of('length_head', self.length_head, ('', *LENGTH_HEADS))
        if self.causal and self.time_cond:
            raise UserError('time_cond shows the network a noise level; causal models have none')
        if self.pos == 'rope' and self.n_embd // self.n_head % 2:
            raise UserError(f'pos=rope turns pairs of channels, but a head has '
                            f'{self.n_embd // self.n_head} of them (n_embd / n_head)')


class KVCache:
    """Keys and values of the tokens read so far, so that the next ones need not read them again.

    With local mixing also the inputs of every block, behind n_conv rows of zeros.
    """

    def __init__(self, config, B, device, dtype=torch.float32):
        c, how = config, {'device': device, 'dtype': dtype}
        self.kv = torch.zeros(c.n_layer, 2, B, c.n_kv_head, c.block_size, c.n_embd // c.n_head,
                              **how)
        self.inputs = torch.zeros(c.n_layer, B, c.n_conv + c.block_size, c.n_embd, **how)
        self.length = 0  # tokens held

    def extend(self, layer, k, v):
        """Stores k, v (B, Hkv, T, D) behind what `layer` holds; returns all of it, old and new."""
        end = self.length + k.size(2)
        self.kv[layer, 0, :, :, self.length:end] = k
        self.kv[layer, 1, :, :, self.length:end] = v
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]

    def neighbours(self, layer, x, n):
        """Stores x (B, T, C), the inputs of block `layer`; returns the n before them (B, n, C)."""
        begin = self.inputs.size(2) - self.kv.size(4) + self.length
        self.inputs[layer, :, begin:begin + x.size(1)] = x
        return self.inputs[layer, :, begin - n:begin]


def rope_angles(T, D, base=10000.0):
    """cos and sin (T, D) of position * frequency, frequencies base^(-2i/D) [RoFormer eq. 15].

    Both halves of the D channels have the same angles; sin is negative in the first half.
    """
    frequency = base ** (-torch.arange(0, D, 2) / D)
    angle = torch.outer(torch.arange(T).float(), frequency)  # (T, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)


def rotate(x, cos, sin):
    """x (B, H, T, D) with its channel pairs (i, i + D/2) turned by the angles of their position.

    A query at m and a key at n then meet in a product that depends on m - n alone.
    """
    cos, sin = cos.type_as(x), sin.type_as(x)  # not float32 where autocast is at work
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


class Attention(nn.Module):

    def __init__(self, c, layer):
        super().__init__()
        self.c, self.layer = c, layer
        D = c.n_embd // c.n_head
        # three matrices, not one of 3C rows: Muon makes each orthogonal on its own
        self.q = nn.Linear(c.n_embd, c.n_head * D, bias=c.bias)
        self.k = nn.Linear(c.n_embd, c.n_kv_head * D, bias=c.bias)
        self.v = nn.Linear(c.n_embd, c.n_kv_head * D, bias=c.bias)
        self.proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)

    def forward(self, x, rope, cache, mask):
        B, T, C = x.shape
        c, D = self.c, C // self.c.n_head
        q = self.q(x).view(B, T, c.n_head, D).transpose(1, 2)     # (B, H, T, D)
        k = self.k(x).view(B, T, c.n_kv_head, D).transpose(1, 2)  # (B, Hkv, T, D)
        v = self.v(x).view(B, T, c.n_kv_head, D).transpose(1, 2)  # (B, Hkv, T, D)
        if c.qk_norm:
            q, k = F.rms_norm(q, (D,)), F.rms_norm(k, (D,))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, Hkv, S, D), S >= T
        S = k.size(2)
        causal = c.causal and T > 1  # the whole difference between AR and MDM; a lone query is last
        if causal and S > T:  # is_causal would align the first query with the first key, not last
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None,
            dropout_p=c.dropout if self.training else 0.0, enable_gqa=c.n_kv_head < c.n_head)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):

    def __init__(self, c):
        super().__init__()
        self.kind = c.mlp
        # swiglu has a third matrix, so 8/3 C wide it costs what the others do at 4 C
        hidden = c.n_hidden or (4 * c.n_embd if c.mlp != 'swiglu' else 8 * c.n_embd // 3)
        self.fc = nn.Linear(c.n_embd, hidden, bias=c.bias)
        self.gate = nn.Linear(c.n_embd, hidden, bias=c.bias) if c.mlp == 'swiglu' else None
        self.proj = nn.Linear(hidden, c.n_embd, bias=c.bias)

    def forward(self, x):
        h = self.fc(x)  # (B, T, hidden)
        if self.kind == 'relu2':
            h = F.relu(h)
            h = h * h  # [Primer 2109.08668]; .square() has a three times slower backward on CPUs
        elif self.kind == 'gelu':
            h = F.gelu(h)
        else:
            h = F.silu(self.gate(x)) * h  # [GLU variants 2002.05202]
        return self.proj(h)


class LocalMixing(nn.Module):
    """A depthwise convolution over neighbours, added to the residual stream; zero at init.

        y[i] = x[i] + sum over k of  w[k] * x[i + k - past],   past = K - 1 if causal else K // 2

    Attention has to learn where the neighbours of a token are, and from masks it learns that last:
    most of them are hidden. Here they are given [Primer 2109.08668; Canon layers, Allen-Zhu 2025].
    """

    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.past = layer, c.n_conv - 1 if c.causal else c.n_conv // 2
        self.weight = nn.Parameter(torch.zeros(c.n_conv, c.n_embd))

    def forward(self, x, cache, block_length):
        (B, T, C), n = x.shape, self.past
        if not block_length:
            before = x.new_zeros(B, n, C) if cache is None else cache.neighbours(self.layer, x, n)
            return x + self.mix(x, before)
        # [xt ; x0]: a token sees of its neighbours its own block, and the clean tokens before that
        T, N = T // 2, math.ceil(T / 2 / block_length)
        before = F.pad(x[:, T:], (0, 0, n, 0)).unfold(1, n, block_length)[:, :N]  # (B, N, C, n)
        before = before.mT[:, None].expand(B, 2, N, n, C).reshape(-1, n, C)
        blocks = F.pad(x.view(B, 2, T, C), (0, 0, 0, N * block_length - T))
        mixed = self.mix(blocks.view(-1, block_length, C), before).view(B, 2, -1, C)[:, :, :T]
        return x + mixed.reshape(x.shape)

    def mix(self, x, before):
        """The sum above (B, T, C) for x (B, T, C), before (B, past, C): zeros are behind it."""
        behind = x.new_zeros(len(x), len(self.weight) - 1 - self.past, x.size(2))
        h = torch.cat([before, x, behind], dim=1)  # (B, T + K - 1, C)
        return sum(w * h[:, k:k + x.size(1)] for k, w in enumerate(self.weight))


def block_mask(T, block_length, device):
    """(2T, 2T) bool, True where a token of [xt ; x0] sees another [BD3-LM].

    xt sees its own block, and the clean blocks before it; x0 its own block and those before it.
    """
    block = torch.arange(T, device=device) // block_length
    own, before = block[:, None] == block, block[:, None] > block  # 2 x (T, T)
    return torch.cat([torch.cat([own, before], dim=1),
                      torch.cat([torch.zeros_like(own), own | before], dim=1)])


def make_norm(c):
    return nn.RMSNorm(c.n_embd) if c.norm == 'rmsnorm' else nn.LayerNorm(c.n_embd, bias=c.bias)


class Block(nn.Module):
    """Local mixing, x + attention, x + mlp, these behind a norm; time modulates both [DiT]."""

    def __init__(self, c, layer):
        super().__init__()
        self.mixing = LocalMixing(c, layer) if c.n_conv else None
        self.norm1, self.attn = make_norm(c), Attention(c, layer)
        self.norm2, self.mlp = make_norm(c), MLP(c)
        self.drop = nn.Dropout(c.dropout)
        self.modulate = nn.Linear(c.n_embd, 6 * c.n_embd) if c.time_cond else None

    def forward(self, x, rope, cache, mask, block_length, time):
        if self.mixing is not None:
            x = self.mixing(x, cache, block_length)
        if self.modulate is None:
            x = x + self.drop(self.attn(self.norm1(x), rope, cache, mask))
            return x + self.drop(self.mlp(self.norm2(x)))
        # zero at init, and 1 + where DiT has the bare gate: a time-blind block until it learns
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulate(time).chunk(6, dim=-1)
        h = self.attn(self.norm1(x) * (1 + scale1) + shift1, rope, cache, mask)
        x = x + self.drop(h) * (1 + gate1)
        h = self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x + self.drop(h) * (1 + gate2)


class Transformer(nn.Module):
    """Logits over V tokens at every position; the last row is the mask's."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.mask_id = c.vocab_size - 1
        self.embed = nn.Embedding(c.vocab_size, c.n_embd)
        self.embed_pos = nn.Embedding(c.block_size, c.n_embd) if c.pos == 'learned' else None
        self.drop = nn.Dropout(c.dropout)
        self.time_mlp = nn.Sequential(nn.Linear(256, c.n_embd), nn.SiLU(),
                                      nn.Linear(c.n_embd, c.n_embd), nn.SiLU()) \
            if c.time_cond else None
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.norm = make_norm(c)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.embed.weight
        self.length_head = LengthHead(c) if c.length_head else None
        cos, sin = rope_angles(c.block_size, c.n_embd // c.n_head)
        self.register_buffer('cos', cos, persistent=False)
        self.register_buffer('sin', sin, persistent=False)
        self.init_weights()

    def forward(self, x, level=None, *, cache=None, where=None, hidden=False, clean=None,
                block_length=0, mixture=None):
        """Logits (B, T, V), or (M, V) at the M positions where `where` (B, T) bool is True.

        x (B, T) int64: tokens, mask_id among them.
        level (B, 1): the fraction of x that is noise, for time_cond alone; see noise_fraction.
        cache: a KVCache that holds the tokens before x; x is added to it.
        hidden: stop before the head, (B, T, C) or (M, C), of which logits() makes the rest.
        clean (B, T), block_length: read [x ; clean], where a block of x sees the clean blocks
        before its own; level may then be (B, T), one for each block [BD3-LM].
        mixture: (ids, weights), each (B, T, K): sum over k of weights[k] * embed(ids[k]) is read in
        the place of embed(x).
        """
        B, T = x.shape
        start = cache.length if cache is not None else 0
        if start + T > self.config.block_size:
            raise UserError(f'{start + T} tokens do not fit into the context of this model, '
                            f'block_size is {self.config.block_size}')
        position, mask = torch.arange(start, start + T, device=x.device), None
        if clean is not None:  # both halves stand at the same positions, and x0 has no noise
            position, mask = position.repeat(2), block_mask(T, block_length, x.device)
            level = None if level is None else torch.cat(
                [level.expand(B, T), torch.zeros_like(clean)], dim=1)
            x = torch.cat([x, clean], dim=1)
        if mixture is None:
            h = self.embed(x)  # (B, T, C)
        else:
            h = (self.embed(mixture[0]) * mixture[1][..., None]).sum(2)  # (B, T, C)
        rope = None
        if self.embed_pos is not None:
            h = h + self.embed_pos(position)
        else:
            rope = self.cos[position], self.sin[position]  # 2 x (T, D)
        h = self.drop(h)
        time = None if self.time_mlp is None else self.time_mlp(time_features(level))  # (B, 1, C)
        for block in self.blocks:
            h = block(h, rope, cache, mask, block_length, time)
        if cache is not None:
            cache.length += T
        h = h[:, :T]
        if where is not None:
            h = h[where]  # (M, C): with a large V the head is most of the work
        h = self.norm(h)
        return h if hidden else self.logits(h)

    def logits(self, h):
        """(..., V) of hidden states (..., C); with subs the mask's is -inf."""
        logits = self.head(h)
        if self.config.subs:  # a prediction is a real token [MDLM sec. 3.2]
            logits[..., self.mask_id] = -torch.inf
        return logits

    def init_weights(self):
        """Normal matrices; zero where a block joins the residual stream and in an untied head.

        So every block is the identity at first and, with an untied head, the first loss is log V'.
        """
        for name, p in self.named_parameters():
            if p.dim() < 2:
                nn.init.constant_(p, 1.0 if 'norm' in name and name.endswith('weight') else 0.0)
            elif name.endswith(('proj.weight', 'modulate.weight', 'mixing.weight', 'head.weight')):
                nn.init.zeros_(p)
            elif 'embed' in name:
                nn.init.normal_(p, std=0.02)
            else:
                nn.init.normal_(p, std=p.size(1) ** -0.5)

    @property
    def device(self):
        return self.embed.weight.device

    def count_parameters(self):
        """All numbers that are learned; a tied head is counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Multiplications and additions of an update for a token [PaLM 2204.02311, app. B].

        6 for every weight of a matrix, and 12 C in each layer for every position attended to, half
        of them on average if causal. Reading an embedding is none; the head is counted at all
        positions.
        """
        c = self.config
        weights = self.count_parameters() - (0 if c.tied else self.embed.weight.numel())
        attended = T / 2 if self.config.causal else T
        halves = 2 if c.block_length else 1  # [xt ; x0]
        return halves * (6 * weights + 12 * c.n_layer * c.n_embd * attended)


def time_features(t, size=256):
    """Sinusoids (B, 1, size) of t (B, 1) in [0, 1], wavelengths from 2 pi / 1000 up [DDPM, DiT]."""
    frequency = 1e4 ** (-torch.arange(size // 2, device=t.device) / (size // 2))
    angle = 1000 * t[..., None] * frequency  # (B, 1, size / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


# ------------------------------------------------------------------------- the probability models

SCHEDULES = ('linear', 'cosine', 'polynomial')
POWER = 2  # of the polynomial schedule
LOSS_WEIGHTS = ('elbo', 'clipped', 'flat', 'masked_mean')
DIVERGENCES = ('elbo', 'symmetric_kl', 'scaled_kl')
SOFT_RANGE = (0.25, 0.5)  # the fraction lam of Gaussian noise in soft tokens
SMOOTHING = 1e-3  # of targets, so that a divergence from them is finite
MASK_DECODERS = ('ancestral', 'confidence', 'threshold', 'remask', 'remdm')  # see sample.py


def noise(t, schedule):
    """alpha_t, the fraction of tokens kept at level t, and w(t) = -alpha'_t / (1 - alpha_t).

    The bound is the same under every schedule (substitute alpha for t); its variance is not.
    """
    one_of('schedule', schedule, SCHEDULES)
    if schedule == 'linear':
        return 1 - t, 1 / t
    if schedule == 'cosine':
        return 1 - torch.sin(math.pi / 2 * t), math.pi / 2 / torch.tan(math.pi / 2 * t)
    return 1 - t ** POWER, POWER / t


def low_discrepancy(n, rng, device, shuffled=False):
    """n numbers in [0, 1), one in each 1/n of it, all shifted by one draw [VDM 2107.00630].

    Each is uniform, but together they are spread more evenly than independent draws. In their
    order, or shuffled where each row counts by itself.
    """
    u = torch.rand(1, generator=rng, device=device)
    k = torch.randperm(n, generator=rng, device=device) if shuffled else \
        torch.arange(n, device=device)
    return (u + k / n) % 1


def noise_fraction(t, given, block_length=0):
    """Time conditioning: the fraction of ALL tokens that is noise, t * mean(~given).

    A decoder can count it on any canvas; it never sees t itself. (B, 1), or (B, T) by block.
    """
    parts = (~given).float().split(block_length or given.size(1), dim=1)
    noisy = torch.cat([part.mean(1, keepdim=True).expand_as(part) for part in parts], dim=1)
    return t * (noisy if block_length else noisy[:, :1])


def masks_by_count(given, block_length, rng):
    """is_mask (B, T): l of the L tokens of each block that are not given; and l/L of it, (B, T).

    l is uniform in 1..L, stratified over all blocks of the batch.
    """
    B, T = given.shape
    n = math.ceil(T / block_length)
    given = F.pad(given, (0, n * block_length - T), value=True).view(B, n, block_length)
    L = (~given).sum(2, keepdim=True)  # (B, n, 1)
    u = low_discrepancy(B * n, rng, given.device, shuffled=True).view(B, n, 1)
    n_mask = 1 + (u * L).long().clamp(max=L - 1)
    order = torch.rand(given.shape, generator=rng, device=given.device)
    is_mask = order.masked_fill(given, 2.0).argsort(2).argsort(2) < n_mask  # at random places
    fraction = (n_mask / L).nan_to_num(1.0).expand_as(order)  # 0 / 0 where all is given
    return is_mask.flatten(1)[:, :T], fraction.flatten(1)[:, :T]


def with_one(chosen, given, rng):
    """chosen (B, T) bool, and one token more in each row, drawn from all that are not given.

    A set of l tokens, E[l] of them expected, is then l / E[l] times as probable as before. Callers
    divide by that, which takes out the weights that are large where E[l] is small.
    """
    u = torch.rand(chosen.shape, generator=rng, device=chosen.device).masked_fill(given, -1.0)
    return chosen.scatter(1, u.argmax(1, keepdim=True), True) & ~given


def by_row(costs, where):
    """Sums (B,) of costs (M,), those of the tokens at which where (B, T) bool is True."""
    return torch.zeros(where.shape, device=costs.device).masked_scatter(where, costs).sum(1)


def cross_entropy(logits, target):
    """-log p(target) (M,) under logits (M, V)."""
    return F.cross_entropy(logits, target, reduction='none')


def in_slices(cost, model, h, *rows, at_once=2 ** 28):
    """cost(logits (M, V), *rows) (M,) of hidden states h (M, C) and rows, each of length M.

    In slices if M * V is more than `at_once`. A slice keeps none of its logits for the backward
    pass, which computes them anew: with GPT-2's 50,257 tokens the logits of one batch are
    gigabytes, and the rest of the network is not.
    """
    def costs(h, *rows):
        return cost(model.logits(h).float(), *rows)

    n = max(1, at_once // model.config.vocab_size)
    if len(h) <= n:
        return costs(h, *rows)
    return torch.cat([torch.utils.checkpoint.checkpoint(costs, *part, use_reentrant=False)
                      for part in zip(h.split(n), *(row.split(n) for row in rows))])


class Noised(NamedTuple):
    """One draw of the forward process q(xt | x0), and what its prediction is to cost."""
    xt: torch.Tensor      # (B, T) int64, what the network reads
    scored: torch.Tensor  # (B, T) bool, the M positions whose prediction is scored
    weight: torch.Tensor  # (B, T) or (B, 1), of each cost
    level: torch.Tensor   # (B, 1), or (B, T) if of each block: noise_fraction, for time_cond
    inputs: dict = {}     # what else the network reads: keywords of Transformer.forward
    extra: tuple = ()     # what else the cost reads: tensors (B, T) or (B, 1)


@dataclass
class Objective:
    """How text is corrupted, and what predicting it back costs. Its fields are settings.

        loss    what training minimises          loss_weight and mask_range choose its levels
        bound   what evaluation reports          all levels; the nll itself if exact

    A member says how it corrupts text (corrupt; corrupt_evenly: the same bound with less variance)
    and, if it is not cross-entropy, what a prediction costs. Everyone else asks the attributes.
    """
    schedule: str = 'linear'         # alpha_t: linear, cosine, polynomial
    loss_weight: str = 'elbo'        # elbo w(t), clipped min(w(t), w_max), flat 1, masked_mean
    w_max: float = 5.0
    mask_range: tuple = (0.0, 1.0)   # levels t that are trained; (0.15, 0.15) is BERT

    exact = False                # the bound is the nll
    causal = False               # the network sees no later token
    masks = True                 # noise is the mask: decoding begins at a canvas of masks
    any_order = False            # one token at a time, in any order, has an exact nll [2110.02037]
    block_length = 0             # tokens per block, if there are blocks
    decoders = MASK_DECODERS     # names in sample.py, the default first
    measured = 'nelbo <='        # a bound is called a bound wherever it is printed

    def __post_init__(self):
        one_of('schedule', self.schedule, SCHEDULES)
        one_of('loss_weight', self.loss_weight, LOSS_WEIGHTS)
        if len(self.mask_range) != 2 or not 0 <= self.mask_range[0] <= self.mask_range[1] > 0:
            raise UserError(f'mask_range is {self.mask_range!r}, but it must be (lo, hi) with '
                            '0 <= lo <= hi <= 1 and hi > 0')

    cost = staticmethod(cross_entropy)

    def loss(self, model, x0, rng, given=None, progress=0.0):
        """(nats, count): train.py divides the sum of the one by that of the other.

        So splitting a batch changes nothing. x0 (B, T) int64, clean tokens. rng: a Generator.
        progress: of training, in [0, 1]. With loss_weight='elbo' and the whole mask_range, nats per
        token are in expectation an upper bound on the nll; the other weights have the same optimum
        (every level's conditionals) but spend the network's effort elsewhere.
        """
        given = torch.zeros_like(x0, dtype=torch.bool) if given is None else given
        noised = self.corrupt(model, x0, given, rng, progress)
        nats = self.costs(model, x0, noised).sum()
        return nats, noised.scored.sum() if self.loss_weight == 'masked_mean' else (~given).sum()

    def bound(self, model, x0, rng, given=None):
        """An unbiased draw of the bound on -log p(x0) of every row, (B,), in nats."""
        given = torch.zeros_like(x0, dtype=torch.bool) if given is None else given
        noised = self.corrupt_evenly(model, x0, given, rng)
        return by_row(self.costs(model, x0, noised), noised.scored)

    def costs(self, model, x0, noised):
        """Weighted costs (M,) of predicting x0 from one draw of its corruption, in nats."""
        xt, scored, weight, level, inputs, extra = noised
        h = model(xt, level, where=scored, hidden=True, **inputs)  # (M, C)
        rows = [row.expand_as(x0)[scored] for row in (x0, *extra)]  # (M,) each
        return weight.expand_as(x0)[scored] * in_slices(self.cost, model, h, *rows)

    def draw_levels(self, n, rng, device):
        """n noise levels in (lo, hi] = mask_range, evenly spread."""
        lo, hi = self.mask_range
        return lo + (hi - lo) * (1 - low_discrepancy(n, rng, device))

    def training_weight(self, w):
        """What a loss puts in the place of w(t), the weight of a level in the bound."""
        if self.loss_weight == 'clipped':
            return w.clamp(max=self.w_max)
        return w if self.loss_weight == 'elbo' else torch.ones_like(w)


@dataclass
class MaskedDiffusion(Objective):
    """Masked diffusion, one t per row [MDLM eq. 11; LLaDA eq. 3].

        nelbo = mean over (b, i) of  is_mask[b, i] * w(t[b]) * -log p(x0[b, i] | xt[b])

    Evaluation draws how many tokens are masked in place of t [LLaDA eq. 14], which is the same
    bound, integrated over the levels that leave l masks, and exact for uniform logits:

        nelbo = E over l in 1..L, l of L tokens masked, of  L / l * sum of -log p(x0_i | xt)
    """
    any_order = True
    token_weight = None  # (V,): what a wrong guess at each kind of token counts in the loss

    def corrupt(self, model, x0, given, rng, progress=0.0):
        t = self.draw_levels(len(x0), rng, x0.device)[:, None]  # (B, 1)
        alpha, w = noise(t, self.schedule)  # linear: 1 - t and 1 / t
        is_mask = (torch.rand(x0.shape, generator=rng, device=x0.device) >= alpha) & ~given
        xt = torch.where(is_mask, model.mask_id, x0)
        weight = self.training_weight(w)  # (B, 1)
        if self.token_weight is not None:
            weight = weight * self.token_weight[x0]  # (B, T)
        return Noised(xt, is_mask, weight, noise_fraction(1 - alpha, given))

    def corrupt_evenly(self, model, x0, given, rng):
        is_mask, fraction = masks_by_count(given, x0.size(1), rng)  # 2 x (B, T)
        xt = torch.where(is_mask, model.mask_id, x0)
        return Noised(xt, is_mask, 1 / fraction, noise_fraction(fraction[:, :1], given))


@dataclass
class Autoregression(Objective):
    """Next-token prediction: nothing is corrupted, and loss and bound are the nll itself.

        nll = mean over (b, i) of  -log p(x0[b, i] | x0[b, :i])

    The network reads x0 shifted by one behind a start token, mask_id, so that all T tokens of a
    window are scored, with the same information as masked diffusion has at t = 1.
    """
    exact, causal, masks = True, True, False
    decoders, measured = ('ar',), 'nll'

    def loss(self, model, x0, rng=None, given=None, progress=0.0):
        return self.token_nll(model, x0, given).sum(), \
            torch.ones_like(x0).sum() if given is None else (~given).sum()

    def bound(self, model, x0, rng=None, given=None):
        return self.token_nll(model, x0, given).sum(1)

    def token_nll(self, model, x0, given=None):
        """-log p(x_i | x_<i) at every position, 0 where given, (B, T), from one causal pass."""
        scored = torch.ones_like(x0, dtype=torch.bool) if given is None else ~given
        start = torch.full_like(x0[:, :1], model.mask_id)
        h = model(torch.cat([start, x0[:, :-1]], dim=1), where=scored, hidden=True)  # (M, C)
        nll = in_slices(cross_entropy, model, h, x0[scored])  # (M,)
        return torch.zeros_like(x0, dtype=nll.dtype).masked_scatter(scored, nll)


@dataclass
class D3PM(Objective):
    """Masked diffusion in N discrete steps [D3PM, absorbing state].

        nelbo = mean over (b, i) of  is_mask[b, i] * N * c(t[b]) * cost[b, i]

    As MaskedDiffusion, but t stands on the grid 1/N, ..., 1, and N c(t) in the place of w(t), where
    c(t) = (alpha_s - alpha_t) / (1 - alpha_t), s = t - 1/N, is the probability that a step reveals
    a mask. Evaluation draws a step with probability alpha_s - alpha_t = c * (1 - alpha_t), and its
    masks as in with_one: exact for uniform logits if subs.
    """
    diffusion_steps: int = 1000

    def grid(self, device):
        """m = 1 - alpha at t = 0, 1/N, ..., 1, (N + 1,), and c (N + 1,), which is 0 at t = 0."""
        t = torch.arange(self.diffusion_steps + 1, dtype=torch.float64) / self.diffusion_steps
        m = 1 - noise(t, self.schedule)[0]
        c = F.pad(m.diff() / m[1:], (1, 0))
        return m.float().to(device), c.float().to(device)

    def corrupt(self, model, x0, given, rng, progress=0.0):
        t = self.draw_levels(len(x0), rng, x0.device)[:, None]  # (B, 1)
        step = (t * self.diffusion_steps).ceil().long()  # (B, 1), 1..N
        m, c = self.grid(x0.device)
        is_mask = (torch.rand(x0.shape, generator=rng, device=x0.device) < m[step]) & ~given
        xt = torch.where(is_mask, model.mask_id, x0)
        weight = self.training_weight(self.diffusion_steps * c[step])
        return Noised(xt, is_mask, weight, noise_fraction(m[step], given),
                      extra=(m[step], m[step - 1], c[step]))

    def corrupt_evenly(self, model, x0, given, rng):
        m, c = self.grid(x0.device)
        u = low_discrepancy(len(x0), rng, x0.device, shuffled=True)[:, None]  # (B, 1)
        step = torch.searchsorted(m, u, right=True).clamp(max=self.diffusion_steps)  # (B, 1), 1..N
        is_mask = torch.rand(x0.shape, generator=rng, device=x0.device) < m[step]
        is_mask = with_one(is_mask, given, rng)
        xt = torch.where(is_mask, model.mask_id, x0)
        weight = (~given).sum(1, keepdim=True) / is_mask.sum(1, keepdim=True).clamp(min=1)  # L / l
        return Noised(xt, is_mask, weight, noise_fraction(m[step], given),
                      extra=(m[step], m[step - 1], c[step]))

    @staticmethod
    def cost(logits, target, m_t, m_s, c):
        """1/c of the KL divergence of a masked token's step, (M,).

            -log p(x0) + g(alpha_t) + (1 - c) / c * (g(alpha_t) - g(alpha_s))
            g(alpha) = log(1 + alpha * p(mask) / (1 - alpha)),  m = 1 - alpha

        With subs p(mask) is 0, and so is g.
        """
        logp = logits.log_softmax(-1)
        p_mask = logp[:, -1].exp()
        g_t, g_s = (torch.log1p((1 - m) / m.clamp(min=1e-12) * p_mask) for m in (m_t, m_s))
        # at s = 0, where g_s is not finite, 1 - c is 0
        return -logp.gather(1, target[:, None])[:, 0] + g_t + (1 - c) / c * (g_t - g_s)


@dataclass
class Uniform(Objective):
    """Diffusion whose noise is random tokens, one t per row [UDLM, Duo].

        nelbo = mean over (b, i) of  w(t[b]) * (1 - alpha[b]) * uniform_cost[b, i]

    A token that is not kept becomes any of the V' real ones, perhaps itself: the network cannot
    know which are noise, so all are scored, and none is ever beyond correction. The best prediction
    is p(x0[b, i] | xt[b] without its i-th token).

    For training only: soft_inputs, where the network reads soft_tokens, of which xt is the argmax,
    with lam in SOFT_RANGE in the place of t and of the schedule, and tau annealed from 1e-3 to 1e-8
    [Duo]; and a divergence in the place of the weighted cost, 'symmetric_kl' or 'scaled_kl', which
    is that times lam / (V' (1 - lam) + lam). Without soft inputs lam is 1 - alpha.
    """
    divergence: str = 'elbo'
    soft_inputs: bool = False

    masks = False
    decoders = ('uniform',)

    def __post_init__(self):
        super().__post_init__()
        one_of('divergence', self.divergence, DIVERGENCES)

    def corrupt(self, model, x0, given, rng, progress=0.0):
        t, inputs = self.draw_levels(len(x0), rng, x0.device)[:, None], {}  # (B, 1)
        if self.soft_inputs:
            low, high = SOFT_RANGE
            lam = low + (high - low) * t
            alpha, slope = soft_noise(lam, model.mask_id)
            w = -slope * (high - low) / (1 - alpha)
            tau = 1e-3 * 1e-5 ** progress
            ids, weights = soft_tokens(x0, lam, tau, model.mask_id, rng)
            weights[given] = torch.tensor([1.0, 0.0, 0.0], device=x0.device)
            xt = ids.gather(2, weights.argmax(2, keepdim=True))[..., 0]
            inputs = {'mixture': (ids, weights)}
        else:
            alpha, w = noise(t, self.schedule)
            lam = 1 - alpha
            is_noise = (torch.rand(x0.shape, generator=rng, device=x0.device) >= alpha) & ~given
            xt = torch.where(is_noise, random_tokens(model, x0, rng), x0)
        level = noise_fraction(1 - alpha, given)
        if self.divergence == 'elbo':
            weight = self.training_weight(w) * (1 - alpha)  # (B, 1)
            return Noised(xt, ~given, weight, level, inputs, extra=(xt, alpha))
        weight = lam / (model.mask_id * (1 - lam) + lam) if self.divergence == 'scaled_kl' \
            else torch.ones_like(lam)
        return Noised(xt, ~given, weight, level, inputs)

    def corrupt_evenly(self, model, x0, given, rng):
        """The cost of a wrong token is about 1/t. So half of the draws, at random, have noise as in
        with_one, and all are weighted by the fraction of their own distribution in the mixture,
        at most 2."""
        L = (~given).sum(1, keepdim=True).clamp(min=1)  # (B, 1)
        u = 2 * low_discrepancy(len(x0), rng, x0.device, shuffled=True)[:, None]  # half and level
        t = 1 - u % 1  # (B, 1) in (0, 1]
        is_noise = (torch.rand(x0.shape, generator=rng, device=x0.device) < t) & ~given
        is_noise = torch.where(u < 1, is_noise, with_one(is_noise, given, rng))
        weight = 2 / (1 + is_noise.sum(1, keepdim=True) / (L * t))  # (B, 1)
        xt = torch.where(is_noise, random_tokens(model, x0, rng), x0)
        return Noised(xt, ~given, weight, noise_fraction(t, given), extra=(xt, 1 - t))

    @staticmethod
    def cost(logits, x0, xt=None, alpha=None):
        """uniform_cost, or symmetric_kl where the cost is not to know xt and its level."""
        return symmetric_kl(logits, x0) if xt is None else uniform_cost(logits, x0, xt, alpha)


def random_tokens(model, x0, rng):
    """Uniformly random real tokens, (B, T)."""
    return torch.randint(model.mask_id, x0.shape, generator=rng, device=x0.device)


def uniform_cost(logits, x0, xt, alpha):
    """How far the reverse rates at xt are from the true ones, (M,) [UDLM, Duo].

        1 / (V' alpha) * sum over j of  r_j * (y_j - 1 - log y_j),  y = s / r
        r_j = xbar_j / xbar_xt,  xbar   = V' alpha * onehot(x0) + 1 - alpha
        s_j = xbar_j / xbar_xt,  of the prediction, softmax(logits) in the place of onehot(x0)

    The papers' sum, with no two large terms that cancel: each term is 0 or more.
    """
    logits, alpha = logits[:, :-1], alpha.clamp(1e-6, 1 - 1e-6)[:, None]  # V' real tokens
    a = logits.size(1) * alpha
    xbar = a * F.one_hot(x0, logits.size(1)) + (1 - alpha)  # (M, V')
    xbar_p = a * logits.softmax(-1) + (1 - alpha)  # (M, V'); without () it would lose 1 - alpha
    r, s = (x / x.gather(1, xt[:, None]) for x in (xbar, xbar_p))
    y = s / r
    return (r * (y - 1 - y.log())).sum(1) / a[:, 0]


def symmetric_kl(logits, x0):
    """KL(p || q) + KL(q || p), (M,), of the prediction p and of q, onehot(x0) smoothed a little."""
    logp = logits[:, :-1].log_softmax(-1)  # (M, V')
    q = (1 - SMOOTHING) * F.one_hot(x0, logp.size(1)) + SMOOTHING / logp.size(1)
    return ((q - logp.exp()) * (q.log() - logp)).sum(1)


def soft_noise(lam, n_real):
    """P(x0 is the argmax of soft_tokens) as alpha, and its slope over lam, 2 x (B, 1).

        P = E over g ~ N(0, 1) of  Phi(g + (1 - lam) / lam)^(V' - 1),  alpha = (V' P - 1) / (V' - 1)

    [Duo, for this mixture]. The other tokens are as likely as each other, so that the argmax
    is uniform noise at the level of this alpha.
    """
    lam64, g = lam.cpu().double(), torch.linspace(-9, 9, 1001, dtype=torch.float64)  # mps has none
    normal = torch.distributions.Normal(0.0, 1.0)
    p, at = normal.log_prob(g).exp() * 18 / 1000, g + (1 - lam64) / lam64  # (1001,), (B, 1001)
    kept = (p * normal.cdf(at) ** (n_real - 1)).sum(1, keepdim=True)
    slope = (p * normal.cdf(at) ** (n_real - 2) * normal.log_prob(at).exp()).sum(1, keepdim=True)
    return (((n_real * kept - 1) / (n_real - 1)).to(lam), (-n_real * slope / lam64 ** 2).to(lam))


def soft_tokens(x0, lam, tau, n_real, rng):
    """softmax(((1 - lam) * onehot(x0) + lam * gauss) / tau) by ids and weights, 2 x (B, T, 3).

    Only x0 and the two others with the largest noise: tau is so small that a third has no weight.
    The two largest of n Gaussians are drawn as such: Phi of them are u^(1/n) and that of the first
    times v^(1/(n - 1)), u and v uniform. So it costs the same for any V'. Of two tokens, n = 1, the
    second is -inf: it has no weight.
    """
    how, n = {'generator': rng, 'device': x0.device}, n_real - 1
    log_u, log_v = torch.rand(2, *x0.shape, **how).log()
    first = -torch.special.ndtri(-torch.expm1(log_u / n))  # (B, T)
    second = -torch.special.ndtri(-torch.expm1(log_u / n + log_v / (n - 1)))
    one = 1 + torch.randint(n, x0.shape, **how)  # how far from x0 the first stands
    two = 1 + (one + torch.randint(max(1, n - 1), x0.shape, **how)) % n  # any other distance
    ids = (x0[..., None] + torch.stack([torch.zeros_like(x0), one, two], dim=2)) % n_real
    own = (1 - lam) / lam + torch.randn(x0.shape, **how)
    return ids, (torch.stack([own, first, second], dim=2) * lam[..., None] / tau).softmax(2)


@dataclass
class BlockDiffusion(Objective):
    """Blocks from left to right, masked diffusion in each [BD3-LM].

        nelbo = mean over (b, i) of  is_mask[b, i] * w(t[b, i]) * -log p(x0[b, i] | xt, x0 before)

    As MaskedDiffusion, but t is drawn for every block, and a block sees the clean ones before it:
    all in one pass over [xt ; x0]. With block_length = T it is MaskedDiffusion.
    """
    block_length: int = 16

    def corrupt(self, model, x0, given, rng, progress=0.0):
        (B, T), n = x0.shape, math.ceil(x0.size(1) / self.block_length)
        t = self.draw_levels(B * n, rng, x0.device).view(B, n)
        t = t.repeat_interleave(self.block_length, dim=1)[:, :T]  # (B, T)
        alpha, w = noise(t, self.schedule)
        is_mask = (torch.rand(B, T, generator=rng, device=x0.device) >= alpha) & ~given
        xt = torch.where(is_mask, model.mask_id, x0)
        return Noised(xt, is_mask, self.training_weight(w), *self.read(x0, 1 - alpha, given))

    def corrupt_evenly(self, model, x0, given, rng):
        is_mask, fraction = masks_by_count(given, self.block_length, rng)  # 2 x (B, T)
        xt = torch.where(is_mask, model.mask_id, x0)
        return Noised(xt, is_mask, 1 / fraction, *self.read(x0, fraction, given))

    def read(self, x0, t, given):
        """(level, inputs) of Noised: the noise of each block, and the clean text before it."""
        return noise_fraction(t, given, self.block_length), \
            {'clean': x0, 'block_length': self.block_length}


OBJECTIVES = {'ar': Autoregression, 'mdm': MaskedDiffusion, 'd3pm': D3PM, 'uniform': Uniform,
              'block': BlockDiffusion}


def fields_in(cls, settings):
    """{name: value} of the settings that are fields of a dataclass; it has defaults for others."""
    return {name: settings[name] for name in cls.__dataclass_fields__ if name in settings}


def make_objective(settings):
    """The Objective that a run's settings name, with what it needs of them."""
    one_of('objective', settings['objective'], OBJECTIVES)
    cls = OBJECTIVES[settings['objective']]
    return cls(**fields_in(cls, settings))


@torch.no_grad()
def evaluate(model, objective, batches, seed=0, repeats=1):
    """Mean of objective.bound over a split, nats per token, and the standard error of that mean.

    batches: functions that read (x0, given), of prepare.py's Stream or Rows; every token that is
    not given counts once. The error is that of the Monte Carlo draws, from `repeats` independent
    ones; nan with one repeat. The processes of a torchrun share the batches and all return the
    same.
    """
    was_training, device = model.training, model.device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model.eval()
    rng, means = torch.Generator(device), []
    for repeat in range(repeats):
        sums = torch.zeros(len(batches), 2, dtype=torch.float64)  # nats, tokens that count
        for i in range(rank, len(batches), world):
            x0, given = (part if part is None else part.to(device) for part in batches[i]())
            rng.manual_seed(mixed_seed(seed, repeat, i))  # the same on whichever process
            sums[i, 0] = objective.bound(model, x0, rng, given).sum()
            sums[i, 1] = x0.numel() if given is None else (~given).sum()
        if world > 1:  # every entry from one process, zero from the others: the sum is exact
            sums = sums.to(device)
            dist.all_reduce(sums)
        nats, count = sums.sum(0).tolist()
        means.append(nats / count)
    model.train(was_training)
    error = np.std(means, ddof=1) / repeats ** 0.5 if repeats > 1 else math.nan
    return float(np.mean(means)), float(error)


# ------------------------------------------------------------------------- the length of an answer


class LengthHead(nn.Module):
    """Predicts from a prompt how many tokens its answer has, EOS among them; the model is frozen.

        regress_mean      a number, from the mean of the model's hidden states
        regress_concat    the same, from their mean in the prompt beside that in the answer's masks
        classify          for every mask, whether the answer has ended there
        encoder_regress   a number, from the mean in the prompt of a small encoder of its own
        encoder_classify  a distribution over lengths, from the same
    """

    def __init__(self, c):
        super().__init__()
        self.kind, self.encoder, C = c.length_head, None, c.n_embd
        if self.kind.startswith('encoder'):
            self.encoder = Transformer(ModelConfig(c.vocab_size, c.block_size, n_layer=2, n_head=4,
                                                   n_embd=128, tied=True))
            C = 128
        self.mlp = nn.Sequential(nn.Linear(2 * C if self.kind == 'regress_concat' else C, C),
                                 nn.ReLU(), nn.Linear(C, c.block_size if self.kind ==
                                                      'encoder_classify' else 1))

    def forward(self, model, x):
        """x (B, P + W): prompts of P tokens, then W masks. classify: logits (B, W), that the answer
        ends there or before; encoder_classify: (B, W), of the lengths 1..W; else lengths (B,)."""
        P = int((x[0] != model.mask_id).sum())
        if self.encoder is not None:
            h = self.encoder(x[:, :P], hidden=True).mean(1)  # (B, C)
        else:
            fraction = (x == model.mask_id).float().mean(1, keepdim=True)  # (B, 1)
            with torch.no_grad():
                h = model(x, fraction, hidden=True)  # (B, P + W, C)
            if self.kind == 'classify':
                h = h[:, P:]
            elif self.kind == 'regress_mean':
                h = h.mean(1)
            else:
                h = torch.cat([h[:, :P].mean(1), h[:, P:].mean(1)], dim=1)
        out = self.mlp(h).squeeze(-1)
        return out[:, :x.size(1) - P] if self.kind == 'encoder_classify' else out

    def predict(self, model, x, quantile):
        """Lengths (B,) that answers exceed with probability 1 - quantile at most.

        A number was trained to be such a bound, at the length_quantile of training.
        """
        out = self(model, x)
        if not self.kind.endswith('classify'):
            return out
        return first_to_hold(out.sigmoid() if self.kind == 'classify' else
                             out.softmax(1).cumsum(1), quantile)


def first_to_hold(cumulative, p):
    """The first position, from 1, at which cumulative (B, W) is not below p, else W: (B,)."""
    below = (cumulative < p).long().cumprod(1).sum(1)
    return below.clamp(max=cumulative.size(1) - 1) + 1.0


@dataclass
class LengthLoss:
    """What trains a LengthHead, in an Objective's place: it corrupts nothing and decodes nothing.

    Nats: of a distribution over lengths; of W yes or no, if classify; and of a number those of an
    asymmetric Laplace distribution, a constant aside: the pinball loss [Koenker & Bassett 1978]

        max(q * (n - prediction), (q - 1) * (n - prediction)),  q = length_quantile

    whose minimum is the length n that is exceeded with probability 1 - q. The mean square has its
    minimum at the mean, for which about half of all answers are too long.
    """
    pad_id: int
    length_quantile: float = 0.95

    exact, measured = True, 'loss of the length'

    def loss(self, model, x0, rng=None, given=None, progress=0.0):
        return self.bound(model, x0, rng, given).sum(), (~given).sum()

    def bound(self, model, x0, rng=None, given=None):
        """The loss of every row, (B,)."""
        n = (~given & (x0 != self.pad_id)).sum(1)  # (B,), EOS among them
        kind = model.length_head.kind
        out = model.length_head(model, torch.where(given, x0, model.mask_id)).float()
        if kind == 'encoder_classify':
            return F.cross_entropy(out, n - 1, reduction='none')
        if kind == 'classify':
            ended = torch.arange(out.size(1), device=x0.device) >= n[:, None] - 1  # (B, W)
            return F.binary_cross_entropy_with_logits(out, ended.float(), reduction='none').sum(1)
        short, q = n - out, self.length_quantile
        return torch.maximum(q * short, (q - 1) * short)


# ------------------------------------------------------------------------- devices and checkpoints


def pick_device(device, cuda=torch.cuda.is_available, mps=torch.backends.mps.is_available):
    """'cuda', 'mps' or 'cpu': `device` itself, or for 'auto' the first of them that is there."""
    if device == 'auto':
        return 'cuda' if cuda() else 'mps' if mps() else 'cpu'
    there = {'cpu': True, 'cuda': cuda(), 'mps': mps()}
    kind = device.partition(':')[0]  # cuda:1 is a cuda
    if not there.get(kind, False):
        raise UserError(f'device is {device!r}, but here there is only '
                        f'{", ".join(name for name in there if there[name])} (or auto)')
    return device


def pick_dtype(dtype, device, features=getattr(torch.cpu, 'get_capabilities', dict)):
    """'float32' or 'bfloat16' for autocast: `dtype` itself, or for 'auto' what is fast on `device`.

    A CPU with bfloat16 instructions multiplies matrices several times faster in it; one without
    has to imitate them, which is slower than float32.
    """
    one_of('dtype', dtype, ('auto', 'float32', 'bfloat16'))
    if dtype != 'auto':
        return dtype
    if device == 'cpu':
        return 'bfloat16' if {'avx512_bf16', 'amx_bf16'} & {k for k, v in features().items() if v} \
            else 'float32'
    return 'bfloat16' if device.startswith('cuda') else 'float32'


def peak_memory(device):
    """', 1.23 GB at most': what this process has held so far, on the GPU if it computes there.

    Nothing on a platform that does not tell (Windows has no `resource`).
    """
    if device.startswith('cuda'):
        return f', {torch.cuda.max_memory_allocated() / 1e9:.2f} GB at most'
    try:
        import resource
    except ImportError:
        return ''
    unit = 1 if sys.platform == 'darwin' else 1024
    return f', {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB at most'


def load_checkpoint(out_dir, device='cpu'):
    """The dict that train.py saved in out_dir/ckpt.pt: model, optimizer, config, meta, iter, ..."""
    path = Path(out_dir) / 'ckpt.pt'
    if not os.path.isfile(path):  # Path.is_file raises for names that are too long
        raise UserError(f'{out_dir} is not a run: it holds no ckpt.pt (train.py writes one)')
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        missing = {'model', 'optimizer', 'config', 'meta', 'iter', 'rng', 'best'} - set(checkpoint)
    except Exception as e:  # torch raises half a dozen kinds for damaged zip archives
        raise UserError(f'{path} is damaged or no checkpoint ({type(e).__name__}); '
                        f'train again with --overwrite') from e
    if missing:
        raise UserError(f'{path} lacks {", ".join(sorted(missing))}: not written by train.py')
    return checkpoint


def model_config(settings, meta):
    """The ModelConfig that a run's settings and its data set's meta describe."""
    objective = make_objective(settings)
    return ModelConfig(vocab_size=meta['vocab_size'] + 1, **fields_in(ModelConfig, settings) | {
        'causal': objective.causal, 'block_length': objective.block_length})


def load_model(checkpoint, device):
    """The Transformer of a checkpoint, on `device`, in evaluation mode."""
    model = Transformer(model_config(checkpoint['config'], checkpoint['meta']))
    try:
        model.load_state_dict(checkpoint['model'])
    except RuntimeError as e:
        raise UserError('the weights of this checkpoint do not fit its own settings: '
                        + str(e).splitlines()[-1].strip()) from e
    return model.to(device).eval()
