"""The transformer, and the two probability models that are made from it.

    first half    Transformer: tokens in, logits out; one flag turns it from causal to bidirectional
    second half   ar and mdm: the loss that train.py minimises and the number that eval.py reports,
                  exact for autoregression (nll), an upper bound for masked diffusion (nelbo)

Letters, here and in the papers:

    B, T, C   batch, sequence length, channels (n_embd)
    H, D      attention heads, channels of one head (C = H * D)
    V         rows of the embedding: V' real tokens, then one row for the mask, mask_id = V - 1
    x0        clean tokens (B, T) int64                           x, z_0 in MDLM, x_0 in LLaDA
    t         noise level (B, 1) in (0, 1], t = 1 is all masks    t
    alpha     P(a token is kept at level t)                       alpha_t
    w(t)      weight of level t in the bound                      -alpha'_t / (1 - alpha_t)
    xt        x0 with each token kept or replaced by mask_id      z_t, x_t
    is_mask   (B, T) bool, True where xt is mask_id
    given     (B, T) bool, True where a token is known (a prompt): never masked and never scored

Papers: MDLM arXiv 2406.07524, LLaDA 2502.09992, MaskGIT 2202.04200, GPT-2, RoFormer 2104.09864,
DiT 2212.09748 (adaLN). Everything is in nats per token.
"""

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from config import UserError
from prepare import gather, gather_rows, row_batches, row_widths

# ---------------------------------------------------------------------------- the transformer


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
    n_hidden: int = 0         # channels inside the mlp; 0 = 4 n_embd, of swiglu 8/3 n_embd
    qk_norm: bool = True      # normalise queries and keys, so that attention logits stay small
    bias: bool = False        # biases in linear layers and in layernorm
    tied: bool = False        # the head shares the embedding's matrix
    time_cond: bool = False   # tell the network t (adaLN); xt shows it already for masked noise
    dropout: float = 0.0

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            raise UserError(f'n_embd {self.n_embd} must be a multiple of n_head {self.n_head}, '
                            f'and that of n_kv_head {self.n_kv_head}')
        for name, known in (('pos', ('rope', 'learned')), ('norm', ('rmsnorm', 'layernorm')),
                            ('mlp', ('relu2', 'swiglu', 'gelu'))):
            if getattr(self, name) not in known:
                raise UserError(f'{name} is {getattr(self, name)!r}, not one of {", ".join(known)}')
        if self.causal and self.time_cond:
            raise UserError('time_cond shows the network a noise level; causal models have none')
        if self.pos == 'rope' and self.n_embd // self.n_head % 2:
            raise UserError(f'pos=rope turns pairs of channels, but a head has '
                            f'{self.n_embd // self.n_head} of them (n_embd / n_head)')


class KVCache:
    """Keys and values of the tokens read so far, so that the next ones need not read them again."""

    def __init__(self, config, B, device, dtype=torch.float32):
        c = config
        self.kv = torch.zeros(c.n_layer, 2, B, c.n_kv_head, c.block_size, c.n_embd // c.n_head,
                              device=device, dtype=dtype)
        self.length = 0  # tokens held

    def extend(self, layer, k, v):
        """Stores k, v (B, Hkv, T, D) behind what `layer` holds; returns all of it, old and new."""
        end = self.length + k.size(2)
        self.kv[layer, 0, :, :, self.length:end] = k
        self.kv[layer, 1, :, :, self.length:end] = v
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]


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

    def forward(self, x, rope, cache):
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
        mask = None
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


def make_norm(c):
    return nn.RMSNorm(c.n_embd) if c.norm == 'rmsnorm' else nn.LayerNorm(c.n_embd, bias=c.bias)


class Block(nn.Module):
    """x + attention, then x + mlp, each behind a norm; time modulates both [DiT, adaLN]."""

    def __init__(self, c, layer):
        super().__init__()
        self.norm1, self.attn = make_norm(c), Attention(c, layer)
        self.norm2, self.mlp = make_norm(c), MLP(c)
        self.drop = nn.Dropout(c.dropout)
        self.modulate = nn.Linear(c.n_embd, 6 * c.n_embd) if c.time_cond else None

    def forward(self, x, rope, cache, time):
        if self.modulate is None:
            x = x + self.drop(self.attn(self.norm1(x), rope, cache))
            return x + self.drop(self.mlp(self.norm2(x)))
        # zero at init, and 1 + where DiT has the bare gate: a time-blind block until it learns
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulate(time).chunk(6, dim=-1)
        h = self.attn(self.norm1(x) * (1 + scale1) + shift1, rope, cache)
        x = x + self.drop(h) * (1 + gate1)
        h = self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x + self.drop(h) * (1 + gate2)


class Transformer(nn.Module):
    """Logits over V tokens at every position; the last row, the mask, is never predicted."""

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
        cos, sin = rope_angles(c.block_size, c.n_embd // c.n_head)
        self.register_buffer('cos', cos, persistent=False)
        self.register_buffer('sin', sin, persistent=False)
        self.init_weights()

    def forward(self, x, t=None, *, cache=None, where=None, hidden=False):
        """Logits (B, T, V), or (N, V) at the N positions where `where` (B, T) bool is True.

        x (B, T) int64: tokens, mask_id among them. t (B, 1): noise level, for time_cond alone;
        all callers pass 1 - alpha_t, the expected share of masks, which every schedule agrees on.
        cache: a KVCache that holds the tokens before x; x is added to it.
        hidden: stop before the head, (B, T, C) or (N, C), of which logits() makes the rest.
        """
        B, T = x.shape
        start = cache.length if cache is not None else 0
        if start + T > self.config.block_size:
            raise UserError(f'{start + T} tokens do not fit into the context of this model, '
                            f'block_size is {self.config.block_size}')
        h = self.embed(x)  # (B, T, C)
        rope = None
        if self.embed_pos is not None:
            h = h + self.embed_pos(torch.arange(start, start + T, device=x.device))
        else:
            rope = self.cos[start:start + T], self.sin[start:start + T]  # 2 x (T, D)
        h = self.drop(h)
        time = None if self.time_mlp is None else self.time_mlp(time_features(t))  # (B, 1, C)
        for block in self.blocks:
            h = block(h, rope, cache, time)
        if cache is not None:
            cache.length += T
        if where is not None:
            h = h[where]  # (N, C): with a large V the head is most of the work
        h = self.norm(h)
        return h if hidden else self.logits(h)

    def logits(self, h):
        """(..., V) from hidden states (..., C): what the head says, but never the mask."""
        logits = self.head(h)
        logits[..., self.mask_id] = -torch.inf  # a prediction is a real token [MDLM sec. 3.2, SUBS]
        return logits

    def init_weights(self):
        """Normal matrices; zero where a block joins the residual stream and in an untied head.

        So every block is the identity at first, and the first loss is exactly log V'.
        """
        for name, p in self.named_parameters():
            if p.dim() < 2:
                nn.init.constant_(p, 1.0 if 'norm' in name and name.endswith('weight') else 0.0)
            elif name.endswith('proj.weight') or 'modulate' in name or name == 'head.weight':
                nn.init.zeros_(p)
            elif 'embed' in name:
                nn.init.normal_(p, std=0.02)
            else:
                nn.init.normal_(p, std=p.size(1) ** -0.5)

    def count_parameters(self):
        """All numbers that are learned; a tied head is counted once."""
        return sum(p.numel() for p in self.parameters())


def time_features(t, size=256):
    """Sinusoids (B, 1, size) of t (B, 1) in (0, 1], wavelengths from 2 pi / 1000 up [DDPM, DiT]."""
    frequency = 1e4 ** (-torch.arange(size // 2, device=t.device) / (size // 2))
    angle = 1000 * t[..., None] * frequency  # (B, 1, size / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


# ------------------------------------------------------------------------- the probability models
#
# Every loss(model, x0, generator, given) returns (nats, count): train.py divides the sum of the one
# by the sum of the other over all micro-batches, so that splitting a batch changes nothing.
# Every bound(model, x0, generator, given) returns (B,) nats per row: what eval.py reports.


def noise(t, schedule):
    """alpha_t, the share of tokens kept at level t, and w(t) = -alpha'_t / (1 - alpha_t).

    The bound is the same under every schedule (substitute alpha for t); its variance is not.
    """
    if schedule == 'linear':
        return 1 - t, 1 / t
    if schedule == 'cosine':
        return 1 - torch.sin(math.pi / 2 * t), math.pi / 2 / torch.tan(math.pi / 2 * t)
    raise UserError(f'schedule is {schedule!r}, not one of {", ".join(SCHEDULES)}')


def token_nll(model, h, target, at_once=2 ** 28):
    """-log p(target) (N,) from hidden states h (N, C), in slices if N * V is more than `at_once`.

    A slice keeps none of its logits for the backward pass, which computes them anew: with GPT-2's
    50,257 tokens the logits of one batch are gigabytes, and the rest of the network is not.
    """
    def nll(h, target):
        return F.cross_entropy(model.logits(h).float(), target, reduction='none')

    rows = max(1, at_once // model.config.vocab_size)
    if len(h) <= rows:
        return nll(h, target)
    return torch.cat([torch.utils.checkpoint.checkpoint(nll, *part, use_reentrant=False)
                      for part in zip(h.split(rows), target.split(rows))])


def ar_token_nll(model, x0, given):
    """-log p(x_i | x_<i) at every position, 0 where given, (B, T), from one causal pass.

    The input is x0 shifted by one behind a start token, mask_id, so that all T tokens of a window
    are scored, with the same information as masked diffusion has at t = 1.
    """
    start = torch.full_like(x0[:, :1], model.mask_id)
    h = model(torch.cat([start, x0[:, :-1]], dim=1), hidden=True)  # (B, T, C)
    if given is None:
        return token_nll(model, h.flatten(0, 1), x0.flatten()).view_as(x0)
    nll = token_nll(model, h[~given], x0[~given])  # (N,)
    return torch.zeros_like(x0, dtype=nll.dtype).masked_scatter(~given, nll)


def ar_loss(model, x0, generator=None, given=None):
    """Negative log-likelihood of the next token, exact.

        nll = mean over (b, i) of  -log p(x0[b, i] | x0[b, :i])

    x0 (B, T) int64, clean tokens. Returns (nats, count), nats per token is the one by the other.
    """
    count = torch.ones_like(x0).sum() if given is None else (~given).sum()
    return ar_token_nll(model, x0, given).sum(), count


def mdm_loss(model, x0, generator, given=None, *, schedule='linear', loss_weight='elbo',
             w_max=5.0, mask_range=(0.0, 1.0)):
    """Negative ELBO of masked diffusion, one t per row [MDLM eq. 11; LLaDA eq. 3].

        nelbo = mean over (b, i) of  is_mask[b, i] * w(t[b]) * -log p(x0[b, i] | xt[b])

    x0 (B, T) int64, clean tokens. Returns (nats, count), nats per token is the one by the other.
    With loss_weight='elbo' and the whole mask_range that is, in expectation, an upper bound on the
    nll; the other weights have the same optimum (every level's conditionals) but spend the
    network's effort elsewhere: 'flat' w = 1, 'clipped' w = min(w(t), w_max), and 'masked_mean',
    w = 1 with the mean over masked tokens in place of all. Low-discrepancy t: one in each 1/B of
    (0, 1].
    mask_range=(lo, hi) squeezes t into (lo, hi]; (0.15, 0.15) is BERT.
    """
    B, T = x0.shape
    given = torch.zeros_like(x0, dtype=torch.bool) if given is None else given
    u = torch.rand(1, generator=generator, device=x0.device)
    t = 1 - (u + torch.arange(B, device=x0.device) / B)[:, None] % 1  # (B, 1) in (0, 1]
    t = mask_range[0] + (mask_range[1] - mask_range[0]) * t
    alpha, w = noise(t, schedule)
    if loss_weight == 'clipped':
        w = w.clamp(max=w_max)
    elif loss_weight in ('flat', 'masked_mean'):
        w = torch.ones_like(w)
    elif loss_weight != 'elbo':
        raise UserError(f'loss_weight is {loss_weight!r}, not one of {", ".join(LOSS_WEIGHTS)}')

    is_mask = (torch.rand(B, T, generator=generator, device=x0.device) >= alpha) & ~given
    xt = torch.where(is_mask, model.mask_id, x0)
    h = model(xt, 1 - alpha, where=is_mask, hidden=True)  # (N, C), N masked tokens
    nll = token_nll(model, h, x0[is_mask])  # (N,)
    nats = (w.expand(B, T)[is_mask] * nll).sum()
    return nats, is_mask.sum() if loss_weight == 'masked_mean' else (~given).sum()


def ar_nll(model, x0, generator=None, given=None):
    """-log p(x0) of every row, (B,), in nats: exact."""
    return ar_token_nll(model, x0, given).sum(1)


def mdm_nelbo(model, x0, generator, given=None):
    """An unbiased draw of the bound on -log p(x0) of every row, (B,), in nats [LLaDA eq. 14].

        nelbo = E over l in 1..L, l of L tokens masked, of  L / l * sum of -log p(x0_i | xt)

    The same bound as mdm_loss's, integrated over the noise that leaves l masks; its variance is
    lower, and it is exact for uniform logits. The l of a batch are stratified over 1..L.
    """
    B, T = x0.shape
    given = torch.zeros_like(x0, dtype=torch.bool) if given is None else given
    L = (~given).sum(1, keepdim=True)  # (B, 1)
    u = torch.rand(1, generator=generator, device=x0.device)
    u = (u + torch.randperm(B, generator=generator, device=x0.device) / B)[:, None] % 1
    n_mask = 1 + (u * L).long().clamp(max=L - 1)  # l, (B, 1)
    order = torch.rand(B, T, generator=generator, device=x0.device).masked_fill(given, 2.0)
    is_mask = order.argsort(dim=1).argsort(dim=1) < n_mask  # l of the tokens not given, at random

    xt = torch.where(is_mask, model.mask_id, x0)
    h = model(xt, n_mask / L, where=is_mask, hidden=True)  # (N, C), N masked tokens
    nll = token_nll(model, h, x0[is_mask])  # (N,)
    nll = torch.zeros(B, T, device=x0.device).masked_scatter(is_mask, nll)
    return nll.sum(1) * (L / n_mask).squeeze(1)


LOSS_WEIGHTS = ('elbo', 'clipped', 'flat', 'masked_mean')
SCHEDULES = ('linear', 'cosine')
LOSSES = {'ar': ar_loss, 'mdm': mdm_loss}
BOUNDS = {'ar': ar_nll, 'mdm': mdm_nelbo}
BOUND_NAMES = {'ar': 'nll', 'mdm': 'nelbo <='}  # a bound is called a bound wherever it is printed


def mixed_seed(*numbers):
    """One seed of 32 bits from several numbers, all of which count [numpy's SeedSequence].

    Generators on the CPU take no more than 32 bits, and neighbouring seeds are not independent
    enough: bounds drawn under the seeds 0, 1, 2, ... spread three times wider than they should.
    """
    return int(np.random.SeedSequence([n % 2 ** 64 for n in numbers]).generate_state(1)[0])


def evaluation_windows(data, T, batch_size, vocab_size, max_windows):
    """[function that reads a batch of windows: x0 (B, T) int64, and nothing given]."""
    T = min(T, len(data))
    starts = np.arange(0, len(data) - T + 1, T)
    tail = len(data) - len(starts) * T
    if max_windows is not None and max_windows < len(starts):
        starts = starts[torch.linspace(0, len(starts) - 1, max_windows).long().numpy()]
        tail = 0
    parts = [(starts[i:i + batch_size], T) for i in range(0, len(starts), batch_size)]
    if tail:
        parts.append((np.array([len(data) - tail]), tail))
    return [lambda part=part: (gather(data, *part, vocab_size), None) for part in parts]


def evaluation_rows(data, meta, batch_size, predict_pad, max_rows):
    """[function that reads a batch of rows of one width: x0 (B, T) int64, given (B, T) bool]."""
    rows = data.reshape(-1, meta['row_length'])
    if max_rows is not None and max_rows < len(rows):
        rows = rows[torch.linspace(0, len(rows) - 1, max_rows).long().numpy()]
    batches = row_batches(row_widths(rows, meta, predict_pad), batch_size)
    return [partial(gather_rows, rows.reshape(-1), batch, meta, predict_pad) for batch in batches]


@torch.no_grad()
def evaluate(model, bound, data, batch_size, seed=0, repeats=1, max_windows=None, meta=None,
             predict_pad=False):
    """Mean of bound(model, ...) over a split, nats per token, and the standard error of that mean.

    data: a memmap of tokens, cut into windows of block_size, the last one as short as it comes, so
    that every token counts once (max_windows: that many, evenly spread). Under a meta whose layout
    is rows: the rows, each read alone, in which all that is behind the prompt counts once, PAD
    among it if predict_pad. The error is that of the Monte Carlo draws, from `repeats` independent
    ones; nan with one repeat. The processes of a torchrun share the batches and all return the
    same.
    """
    was_training, device = model.training, model.embed.weight.device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model.eval()
    generator = torch.Generator(device)
    if meta is not None and meta['layout'] == 'rows':
        reads = evaluation_rows(data, meta, batch_size, predict_pad, max_windows)
    else:
        reads = evaluation_windows(data, model.config.block_size, batch_size, model.mask_id,
                                   max_windows)
    means = []
    for repeat in range(repeats):
        sums = torch.zeros(len(reads), 2, dtype=torch.float64)  # nats, tokens that count
        for i in range(rank, len(reads), world):
            x0, given = (torch.from_numpy(part).to(device) if part is not None else None
                         for part in reads[i]())
            # a batch's noise does not depend on which process draws it
            generator.manual_seed(mixed_seed(seed, repeat, i))
            sums[i, 0] = bound(model, x0, generator, given).sum()
            sums[i, 1] = x0.numel() if given is None else (~given).sum()
        if world > 1:  # every entry from one process, zero from the others: the sum is exact
            sums = sums.to(device)
            dist.all_reduce(sums)
        nats, count = sums.sum(0).tolist()
        means.append(nats / count)
    model.train(was_training)
    error = np.std(means, ddof=1) / repeats ** 0.5 if repeats > 1 else math.nan
    return float(np.mean(means)), float(error)


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
    if dtype not in ('auto', 'float32', 'bfloat16'):
        raise UserError(f'dtype is {dtype!r}, not one of auto, float32, bfloat16')
    if dtype != 'auto':
        return dtype
    if device == 'cpu':
        return 'bfloat16' if {'avx512_bf16', 'amx_bf16'} & {k for k, v in features().items() if v} \
            else 'float32'
    return 'bfloat16' if device.startswith('cuda') else 'float32'


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
    shape = {name: settings[name] for name in ModelConfig.__dataclass_fields__ if name in settings}
    shape['causal'] = settings['objective'] == 'ar'
    return ModelConfig(vocab_size=meta['vocab_size'] + 1, **shape)


def load_model(checkpoint, device):
    """The Transformer of a checkpoint, on `device`, in evaluation mode."""
    model = Transformer(model_config(checkpoint['config'], checkpoint['meta']))
    try:
        model.load_state_dict(checkpoint['model'])
    except RuntimeError as e:
        raise UserError('the weights of this checkpoint do not fit its own settings: '
                        + str(e).splitlines()[-1].strip()) from e
    return model.to(device).eval()
