"""The transformer, and the probability models that are made from it.

    Transformer     tokens in, logits out; one flag turns it from causal to bidirectional
    Objective       what training minimises and evaluation reports
    MaskedDiffusion masks are filled in; its nelbo, the negative evidence lower bound, is an upper
                    bound on the nll, the negative log-likelihood
    Autoregression  the next token is predicted: the nll itself
    evaluate        the mean of an objective over a split

A first reading ends at evaluate. Until there skip what says so, and take cache, position, attn_mask
and neighbours as None, shift and time_cond as False. What follows is for later; of it decode_ar
in sample.py needs KVCache:

    D3PM, Uniform, BlockDiffusion     objectives that corrupt text, or score a token, in other ways
    KVCache, LengthHead               options of the transformer: decoding that recomputes nothing,
                                      and the length of an answer before it is written
    load_model                        devices and checkpoints
    HubNetwork, load_hub              models of the Hugging Face hub: GPT-2 in our transformer, and
                                      masked models behind the same call

Letters here, and in the papers. A row is one sequence of a batch:

    B, T, C   batch, sequence length, channels (n_embd)
    H, D      attention heads, channels of one head: C = H * D; Hkv, heads of keys and values
    K         width of local mixing (n_conv): a token and its K - 1 neighbours
    M         tokens of a batch that are scored, i.e. have a loss
    V, V'     tokens with and without the mask: V = V' + 1. mask_id = V - 1, but an imported model
              may have it elsewhere. vocab_size is V in ModelConfig, V' in meta.json

    here                                                             in the papers
    x0        clean tokens (B, T) int64                              x, z_0 in MDLM, x_0 in LLaDA
    xt        corrupted tokens: each of x0 kept, or replaced; in     z_t, x_t
              ar x0 shifted by one
    t         time (B, 1) in (0, 1]; at t = 1 all is noise           t
    alpha     P(a token is kept at time t)                           alpha_t
    q         distributions of the noise: q(xt | x0) of xt given x0  q
    w(t)      weight of time t in the bound                          -alpha'_t / (1 - alpha_t)
    level     the fraction of ALL tokens of a row that is noise, (B, 1), see noise_level
    is_mask   (B, T) bool, True where xt is mask_id
    given     (B, T) bool, True in a prompt: never corrupted, never scored
    L, n      tokens of a row that are not given, and how many of them are masked

Three things are called blocks: a Block is a layer, block_size is the context, as in nanoGPT, and
block_length is the length of a block of text in block diffusion. Losses are in nats (natural
logarithms), summed over tokens unless a line says per token.

Papers: MDLM arXiv 2406.07524, LLaDA 2502.09992, RoFormer 2104.09864, DiT 2212.09748 (adaLN),
D3PM 2107.03006, UDLM 2412.10193, Duo 2506.10892, BD3-LM 2503.09573, autoregressive diffusion
2110.02037, VDM 2107.00630, PaLM 2204.02311, DDPM 2006.11239, BERT 1810.04805, DiffuLLaMA
2410.17891 (from AR to diffusion).
"""

import json
import math
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

# require(name, value, fine, wanted) raises UserError unless fine, one_of(name, value, names) unless
# the value is among the names
from config import UserError, as_user_error, one_of, require
from prepare import from_hub, hub_vocabulary, licence_of, load_tokenizer, mixed_seed, optional

# oneDNN keeps a kernel for each of its last 1,024 shapes, and every new number M of masked
# positions is a new shape: gigabytes of kernels that are hardly ever used again. It reads the
# variable at the first matrix product, so setting it after the import of torch still works.
os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '64')

# ---------------------------------------------------------------------------- the transformer


@dataclass
class ModelConfig:
    """The shape of a Transformer. train.py sets every field, and has defaults of its own."""
    vocab_size: int           # V = V' + 1: the real tokens and the mask
    block_size: int = 256     # context length, the largest T
    causal: bool = False      # position i sees 0..i (ar); False: every position sees all (mdm)
    n_layer: int = 4
    n_head: int = 0           # 0 = n_embd // 64, at least 1
    n_kv_head: int = 0        # heads of keys and values; 0 = n_head, fewer: grouped-query attention
    n_embd: int = 256
    pos: str = 'rope'         # rope, learned
    norm: str = 'rmsnorm'     # rmsnorm, layernorm
    mlp: str = 'relu2'        # relu2, swiglu, gelu, gelu_tanh (its approximation, GPT-2's)
    n_conv: int = 0           # kernel width K of local mixing, twice in a layer; 0 = none
    n_hidden: int = 0         # channels inside the mlp; 0 = 4 n_embd, for swiglu 8/3 n_embd
    qk_norm: bool = True      # normalise queries and keys, so that attention logits stay small
    bias: bool = False        # biases in linear layers and in layernorm
    tied: bool = False        # the head shares the embedding's matrix
    embed_scale: float = 0.0  # embeddings are multiplied by it when they are read; 0 = sqrt(n_embd)
                              # if tied [Attention is all you need 1706.03762, sec. 3.4], else 1
    time_cond: bool = False   # adaLN: scale and shift by the noise level. (Without it a network
                              # can tell the level from the number of masks.)
    dropout: float = 0.0      # on the outputs of attention and mlp, and on the embedding
    attn_dropout: float = 0.0  # on the weights of attention
    subs: bool = True         # MDLM's SUBS: the mask is never predicted; False: it may be (D3PM)
    block_length: int = 0     # tokens per block of block diffusion; 0 = none
    length_head: str = ''     # how the length of an answer is predicted, see LengthHead; '' = none
    mask_id: int = -1         # -1: V - 1
    start_id: int = -1        # read before the first token, by ar and with shift; -1: V - 1, a mask
    shift: bool = False       # mdm, d3pm: the output at token i - 1 predicts token i, as in ar
    hub: str = ''             # config.json, as text, of the hub's model that training began with

    def __post_init__(self):
        self.mask_id %= self.vocab_size  # -1 becomes V - 1
        self.start_id %= self.vocab_size
        self.n_head = self.n_head or max(1, self.n_embd // 64)
        self.n_kv_head = self.n_kv_head or self.n_head
        self.embed_scale = self.embed_scale or (self.n_embd ** 0.5 if self.tied else 1.0)
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            raise UserError(f'n_embd {self.n_embd} must be a multiple of n_head {self.n_head}, '
                            f'and that of n_kv_head {self.n_kv_head}')
        one_of('pos', self.pos, ('rope', 'learned'))
        one_of('norm', self.norm, ('rmsnorm', 'layernorm'))
        one_of('mlp', self.mlp, ('swiglu', *ACTIVATIONS))
        one_of('length_head', self.length_head, ('', *LENGTH_HEADS))
        if self.causal and self.time_cond:
            raise UserError('time_cond shows the network a noise level; causal models have none')
        if self.pos == 'rope' and self.n_embd // self.n_head % 2:
            raise UserError(f'pos=rope turns pairs of channels, but a head has '
                            f'{self.n_embd // self.n_head} of them (n_embd / n_head)')


def rope_angles(T, D, base=10000.0):
    """cos and sin, (2, T, D), of position * frequency, base^(-2i/D) [RoFormer eq. 15].

    Channel i is paired with i + D/2, as in GPT-NeoX: both halves have the same angles, and in the
    first one sin is negative, for rotate().
    """
    frequency = base ** (-torch.arange(0, D, 2) / D)
    angle = torch.outer(torch.arange(T).float(), frequency)  # (T, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)])


def rotate(x, cos, sin):
    """x (B, H, T, D), the halves (a, b) of D turned to (a cos - b sin, b cos + a sin).

    The product of a query at m and a key at n then depends on m - n only.
    """
    cos, sin = cos.type_as(x), sin.type_as(x)  # x is bfloat16 under autocast
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin  # roll swaps the halves


def attend(q, k, v, attn_mask, causal, dropout):
    """softmax(q k^T / sqrt(D)) v, (B, H, T, D); q (B, H, T, D), k and v (B, Hkv, S, D).

    S = T or, with a cache, more: the queries belong to the last T tokens. Each reads all keys, or
    those that attn_mask (T, S) allows, or if causal those up to its own. (attn_mask and causal
    never come together.)

    In bfloat16 on a CPU the products are written out, which holds all scores in memory but takes a
    fifth off a compiled update (not compiled, it adds 3%; RESULTS, Speed).
    """
    T, S, gqa = q.size(2), k.size(2), k.size(1) < q.size(1)  # gqa: heads of queries share keys
    by_torch = q.device.type != 'cpu' or q.dtype != torch.bfloat16
    # torch's is_causal is for S = T alone, and the products below need a mask in any case
    if causal and not (by_torch and S == T):
        attn_mask, causal = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T), False
    if by_torch:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=causal,
                                              dropout_p=dropout, enable_gqa=gqa)
    if gqa:
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(2, 3)  # (B, H, T, S)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return F.dropout(scores.softmax(-1).type_as(v), dropout) @ v


class Attention(nn.Module):

    def __init__(self, c):
        super().__init__()
        self.c = c
        D = c.n_embd // c.n_head
        # three matrices, not one of 3C rows: Muon orthogonalises the update of each by itself
        self.q = nn.Linear(c.n_embd, c.n_head * D, bias=c.bias)
        self.k = nn.Linear(c.n_embd, c.n_kv_head * D, bias=c.bias)
        self.v = nn.Linear(c.n_embd, c.n_kv_head * D, bias=c.bias)
        self.proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)

    def forward(self, x, rope, cache, attn_mask):
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
            k, v = cache.extend(self.k, k), cache.extend(self.v, v)  # (B, Hkv, S, D), S >= T
        causal = c.causal and T > 1  # a single query is the last token: it needs no mask
        y = attend(q, k, v, attn_mask, causal, c.attn_dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


ACTIVATIONS = {'relu2': lambda h: F.relu(h).square(), 'gelu': F.gelu,  # [Primer 2109.08668]
               'gelu_tanh': partial(F.gelu, approximate='tanh')}


class MLP(nn.Module):
    """Two matrices with an activation between them; swiglu has a gate [GLU variants 2002.05202]."""

    def __init__(self, c):
        super().__init__()
        self.kind = c.mlp
        # the gate is a third matrix: with a width of 8/3 C there are as many parameters as with 4 C
        hidden = c.n_hidden or (4 * c.n_embd if c.mlp != 'swiglu' else 8 * c.n_embd // 3)
        self.fc = nn.Linear(c.n_embd, hidden, bias=c.bias)
        self.gate = nn.Linear(c.n_embd, hidden, bias=c.bias) if c.mlp == 'swiglu' else None
        self.proj = nn.Linear(hidden, c.n_embd, bias=c.bias)

    def forward(self, x):
        h = self.fc(x)  # (B, T, hidden)
        h = ACTIVATIONS[self.kind](h) if self.gate is None else F.silu(self.gate(x)) * h
        return self.proj(h)


def make_norm(c):
    return nn.RMSNorm(c.n_embd) if c.norm == 'rmsnorm' else nn.LayerNorm(c.n_embd, bias=c.bias)


class LocalMixing(nn.Module):
    """A depthwise convolution over neighbours, added to the residual stream; zero at init.

        y[i] = x[i] + sum over k of  w[k] * x[i + k - past],   past = K - 1 if causal else K // 2

    Attention has to learn which positions are neighbours, and in masked diffusion it learns that
    late, because most neighbours are masked. The convolution knows them from the start
    [Primer 2109.08668; Canon layers, Allen-Zhu 2025].
    """

    def __init__(self, c):
        super().__init__()
        self.past = c.n_conv - 1 if c.causal else c.n_conv // 2
        self.weight = nn.Parameter(torch.zeros(c.n_conv, c.n_embd))

    def forward(self, x, cache, neighbours):
        """x (B, T, C). Skip at first: the cache, which holds what precedes x, and neighbours, which
        only block diffusion has (see beside_clean)."""
        T, K = x.size(1), len(self.weight)
        if neighbours is not None:
            copies = [x[:, j].where(found, 0) for j, found in neighbours]
        else:
            # x, with a cache up to `past` positions before it, and zeros for all that are not there
            h = x if cache is None else cache.extend(self, x)[:, -(self.past + T):]
            h = F.pad(h, (0, 0, self.past + T - h.size(1), K - 1 - self.past))  # (B, T + K - 1, C)
            copies = [h[:, k:k + T] for k in range(K)]  # K x (B, T, C)
        return x + sum(w * h for w, h in zip(self.weight, copies))  # (B, T, C)


def time_features(level, size=256):
    """Sinusoids (..., size) of level (...), wavelengths from 2 pi / 1000 up [DDPM, DiT]."""
    frequency = 1e4 ** (-torch.arange(size // 2, device=level.device) / (size // 2))
    angle = 1000 * level[..., None] * frequency  # (B, 1, size / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Block(nn.Module):
    """A layer: x + attention(norm(x)), then x + mlp(norm(x)); with n_conv local mixing before each.

    With time_cond the noise level scales, shifts and gates both branches (adaLN) [DiT].
    condition: with time_cond (B, 1, C), in block diffusion (B, 2T, C). neighbours: see LocalMixing.
    """

    def __init__(self, c):
        super().__init__()
        self.mixing = nn.ModuleList(LocalMixing(c) for _ in range(2) if c.n_conv)
        self.norm1, self.attn = make_norm(c), Attention(c)
        self.norm2, self.mlp = make_norm(c), MLP(c)
        self.drop = nn.Dropout(c.dropout)
        self.modulate = nn.Linear(c.n_embd, 6 * c.n_embd) if c.time_cond else None

    def forward(self, x, rope, cache, attn_mask, neighbours, condition):
        x = self.mix(0, x, cache, neighbours)
        if self.modulate is None:
            x = x + self.drop(self.attn(self.norm1(x), rope, cache, attn_mask))
            x = self.mix(1, x, cache, neighbours)
            return x + self.drop(self.mlp(self.norm2(x)))
        # The same with scales, shifts and gates, which are zero at init as in DiT. There a branch
        # is multiplied by its gate; here by 1 + gate, so that the layer begins as the one above.
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulate(condition).chunk(6, dim=-1)
        h = self.attn(self.norm1(x) * (1 + scale1) + shift1, rope, cache, attn_mask)
        x = self.mix(1, x + self.drop(h) * (1 + gate1), cache, neighbours)
        h = self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x + self.drop(h) * (1 + gate2)

    def mix(self, i, x, cache, neighbours):
        return self.mixing[i](x, cache, neighbours) if self.mixing else x


def after_start(model, x):
    """x (B, T) after a start token, (B, T + 1): the output at its position i predicts x[:, i].

    AR reads text in this way. So does masked diffusion with shift, and then a network that was AR
    first still predicts each token at the position where it learned to [DiffuLLaMA].
    """
    return F.pad(x, (1, 0), value=model.config.start_id)


def check_context(c, n):
    """Raises UserError if n tokens are too many; with shift n counts the start token."""
    if n > c.block_size + c.shift:
        raise UserError(f'{n - c.shift} tokens do not fit into the context of this model, '
                        f'block_size is {c.block_size}')


class Transformer(nn.Module):
    """Logits over V tokens, one of them the mask, at every position."""

    def __init__(self, config):
        super().__init__()
        c, C = config, config.n_embd
        self.config, self.mask_id = c, c.mask_id
        places = c.block_size + c.shift  # with shift, all of x is read after the start token
        self.embed = nn.Embedding(c.vocab_size, C)
        self.embed_pos = nn.Embedding(places, C) if c.pos == 'learned' else None
        self.drop = nn.Dropout(c.dropout)
        self.time_mlp = nn.Sequential(nn.Linear(256, C), nn.SiLU(), nn.Linear(C, C), nn.SiLU()) \
            if c.time_cond else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = make_norm(c)
        self.head = nn.Linear(C, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.embed.weight
        self.length_head = LengthHead(c) if c.length_head else None
        self.register_buffer('rope', rope_angles(places, C // c.n_head), persistent=False)
        self.init_weights()

    def forward(self, x, level=None, *, where=None, hidden=False, cache=None, position=None,
                attn_mask=None, neighbours=None):
        """Logits (B, T, V), or (M, V) at the M positions where `where` (B, T) bool is True.

        x (B, T) int64: tokens, mask_id among them.
        level (B, 1): noise_level, for time_cond. None: the fraction of x that is masks.
        hidden: return the normed hidden states (B, T, C) or (M, C), from which in_slices() computes
        logits part by part.

        Skip at first:
        cache: a KVCache of the tokens that x continues.
        attn_mask (T, T) bool, of train.py's attn_anneal and, (2T, 2T), of block diffusion: the
        tokens (columns) that each token (row) may see, with shift the start token among them. None:
        all, or with causal those up to itself.
        position, neighbours: what beside_clean() returns, in block diffusion, where x is [xt ; x0];
        `where` then has columns for xt alone.

        With shift a start token is read before x, since the output at a token predicts the next
        one; the last output, which predicts the token after x, is dropped. With a cache only the
        first pass does so. Later the first token of x takes the place of the start token: its
        output predicts the second, and so on, and `where` is (B, T - 1).
        """
        # for options alone: the noise level, a start token, positions that go on after a cache or,
        # in blocks, come twice
        if self.time_mlp and level is None:
            level = (x == self.mask_id).float().mean(1, keepdim=True)
        n_before = 0 if cache is None else cache.length  # tokens that were read before x
        read = after_start(self, x) if self.config.shift and n_before == 0 else x
        T = read.size(1) if position is None else read.size(1) // 2  # in blocks x is [xt ; x0]
        check_context(self.config, n_before + T)
        if position is None:
            position = torch.arange(n_before, n_before + T, device=x.device)  # (T,)

        h = self.embed(read)  # (B, T, C)
        if self.embed_pos is not None:
            h = h + self.embed_pos(position)
        h = self.drop(h * self.config.embed_scale)
        # cos and sin, (T, D) each
        rope = self.rope[:, position].unbind() if self.embed_pos is None else None
        condition = self.time_mlp(time_features(level)) if self.time_mlp else None  # (B, 1, C)
        for block in self.blocks:
            h = block(h, rope, cache, attn_mask, neighbours, condition)
        if cache is not None:
            cache.length += read.size(1)
        h = h[:, :read.size(1) - self.config.shift]  # with shift the last predicts what follows x
        if where is not None:  # in blocks it has columns for the half of xt
            h = h[:, :where.size(1)][where]  # (M, C): with a large V the head is most of the work
        h = self.norm(h)
        return h if hidden else self.logits(h)

    def logits(self, h):
        """Logits (..., V) of hidden states (..., C); with subs the mask's is -inf [MDLM sec. 3.2].

        The other half of SUBS, to copy the tokens that are no masks, needs no code: masks alone are
        scored.
        """
        logits = self.head(h)
        if self.config.subs:
            logits[..., self.mask_id] = -torch.inf
        return logits

    def init_weights(self):
        """Random matrices; zero at the end of a branch, in local mixing, adaLN and an untied head.

        So every layer is the identity at first and, with an untied head, the first loss is log V'
        (without subs log V). Embeddings have a standard deviation of 0.25. If they are the head,
        too, it is 0.02, so that the first logits are small; embed_scale then makes it 0.02
        sqrt(n_embd), 0.28 at 192. (The encoder of a length head has the same standard deviations.)
        """
        for name, p in self.named_parameters():
            if p.dim() < 2:
                nn.init.constant_(p, 1.0 if 'norm' in name and name.endswith('weight') else 0.0)
            elif 'mixing' in name or \
                    name.endswith(('proj.weight', 'modulate.weight', 'head.weight')):
                nn.init.zeros_(p)
            elif 'embed' in name:  # a tied head is listed under this name alone
                nn.init.normal_(p, std=0.02 if self.config.tied else 0.25)
            else:
                nn.init.normal_(p, std=p.size(1) ** -0.5)

    @property
    def device(self):
        return self.embed.weight.device

    def count_parameters(self):
        """All numbers that are learned; a tied head is counted once."""
        return sum(p.numel() for p in self.parameters())


# ------------------------------------------------------------------------- the probability models

SCHEDULES = ('linear', 'cosine', 'polynomial')


def alpha_and_weight(t, schedule):
    """alpha_t, the fraction of tokens kept at t, and the weight w(t) = -alpha'_t / (1 - alpha_t).

    In the reverse process, while t falls by dt, a masked token is revealed with probability w(t)
    dt, and the bound adds up its -log p. Since w(t) dt = -dalpha / (1 - alpha), the bound does not
    depend on the schedule, which is how t is mapped to alpha; the variance of its estimates does.
    """
    one_of('schedule', schedule, SCHEDULES)
    if schedule == 'linear':
        return 1 - t, 1 / t
    if schedule == 'cosine':
        return 1 - torch.sin(math.pi / 2 * t), math.pi / 2 / torch.tan(math.pi / 2 * t)
    return 1 - t ** 2, 2 / t  # polynomial


def low_discrepancy(n, rng):
    """(n, 1) stratified numbers: one in each interval of length 1/n of [0, 1), with one offset u.

    Each is uniform, but together they cover (0, 1) more evenly than independent ones [VDM]. Their
    order is random: else rows that are neighbours in the text would get neighbouring numbers.
    """
    u = torch.rand(1, generator=rng, device=rng.device)
    k = torch.randperm(n, generator=rng, device=rng.device)[:, None]
    return (u + k / n) % 1  # (n, 1)


def noise_level(p_noise, given):
    """For networks with time_cond alone: the fraction of ALL tokens of a row that is noise, (B, 1).

        p_noise * mean over i of ~given[i],   p_noise (B, 1) = P(a token that is not given is noise)

    The network is shown this and not t, since some decoders have no t, but all can count masks. (In
    block diffusion it is called for one block of every row: p_noise and the level are then
    (B, block_length).)
    """
    return p_noise * (~given).float().mean(1, keepdim=True)


def spread(values, where):
    """values (M,) at the M positions where `where` (B, T) bool is True, 0 elsewhere: (B, T)."""
    return torch.zeros(where.shape, device=values.device).masked_scatter(where, values)


def cross_entropy(logits, target):
    """-log p(target) (M,) under logits (M, V)."""
    return F.cross_entropy(logits, target, reduction='none')


def in_slices(token_loss, model, h, target, *extra, at_once=2 ** 28):
    """token_loss(logits of h, target, *extra), (M,), for hidden states h (M, C).

    Where there are more than at_once logits, M * V of them, only those of a slice are in memory at
    a time: they are computed slice by slice, and once more in the backward pass. With GPT-2's
    50,257 tokens all of them would take gigabytes.
    """
    def of_slice(h, target, *extra):
        return token_loss(model.logits(h).float(), target, *extra)

    n = max(1, at_once // model.config.vocab_size)  # tokens in a slice
    if len(h) <= n:
        return of_slice(h, target, *extra)
    slices = zip(*(tensor.split(n) for tensor in (h, target, *extra)))
    recomputed = partial(torch.utils.checkpoint.checkpoint, of_slice, use_reentrant=False)
    return torch.cat([recomputed(*part) for part in slices])


class Noised(NamedTuple):
    """What the network reads, a sample of q(xt | x0), and how the network's prediction is scored.

    The last three have other values than these in D3PM, Uniform and BlockDiffusion alone.
    """
    xt: torch.Tensor      # (B, T) int64, what the network reads; in blocks [xt ; x0], (B, 2T)
    scored: torch.Tensor  # (B, T) bool, the M positions that have a loss
    weight: torch.Tensor  # of the losses; (B, T), (B, 1) or (1, 1)
    level: torch.Tensor   # for time_cond alone: noise_level (B, 1), in blocks (B, 2T); None in ar
    token_loss: Callable = cross_entropy  # (logits (M, V), x0 (M,), *extra (M,)) -> (M,)
    extra: tuple = ()     # what else token_loss reads: tensors (B, T) or (B, 1)
    inputs: dict = {}     # in blocks: what beside_clean() returns, for Transformer.forward


@dataclass
class Objective:
    """How text is corrupted, and how the prediction of it is scored.

    loss() in training and bound() in evaluation both corrupt, read and score. For masked diffusion
    all of it comes to

        alpha, w = alpha_and_weight(t)    # t (B, 1) random                   # corrupt()
        is_mask = (rand(B, T) >= alpha) & ~given
        logits = model(where(is_mask, mask_id, x0), where=is_mask)  # (M, V)  # weighted_losses()
        weight = w.expand(B, T)[is_mask]  # (M,)
        nats = (weight * cross_entropy(logits, x0[is_mask])).sum()

    A Noised says what is read, and which positions are scored, by which token_loss, with which
    weights. loss() gets it from corrupt(), with t from mask_range and the weights of loss_weight.
    bound() gets it from corrupt_evenly(), with t from all of (0, 1] and the weights w(t), or from
    another distribution with the same expectation and less variance. A subclass defines corrupt,
    and may define corrupt_evenly.
    """
    # with a type: fields of the dataclass, filled from the settings of a run
    schedule: str = 'linear'         # alpha_t: linear, cosine, polynomial
    loss_weight: str = 'elbo'        # elbo: w(t); clipped: min(w(t), w_max); flat: 1;
                                     # masked_mean: 1, and loss() counts masks alone
    w_max: float = 5.0
    mask_range: tuple = (0.0, 1.0)   # the least and the largest t in training; BERT's is
                                     # (0.15, 0.15)

    # without a type: constants, which a subclass may replace. (BlockDiffusion gives block_length a
    # type, and so makes it a setting.)
    exact = False                # True: bound() is no estimate; that of ar is the nll itself
    causal = False               # True: the network sees no later token
    reads_masks = True           # the network is shown unknown text as masks; ar, uniform: False
    any_order = False            # True: eval.py can compute the nll of revealing in a chosen order
    block_length = 0             # tokens per block, if there are blocks
    # names in sample.py, the default first; these are for networks that read masks
    decoders = ('ancestral', 'confidence', 'threshold', 'remask', 'remdm')
    measured = 'nelbo <='        # printed before the number, which is an upper bound
    unit = ' nats/token'         # of the bound

    def __post_init__(self):
        one_of('schedule', self.schedule, SCHEDULES)
        one_of('loss_weight', self.loss_weight, ('elbo', 'clipped', 'flat', 'masked_mean'))
        require('mask_range', self.mask_range, len(self.mask_range) == 2 and self.mask_range[1] > 0
                and 0 <= self.mask_range[0] <= self.mask_range[1] <= 1,
                '(lo, hi) with 0 <= lo <= hi <= 1 and hi > 0')

    @property
    def masks_anywhere(self):
        """True for mdm and d3pm; a block model sees masks in one block alone, after clean ones."""
        return self.reads_masks and not self.block_length

    def loss(self, model, x0, rng, given, **more):
        """(nats, count): the sum of weighted losses, and the number of tokens to divide it by.

        count: L of all rows, since the nelbo is a mean over all tokens that are not given, masked
        or not; with masked_mean, tokens that are scored. train.py adds nats and counts up over all
        batches of an update and divides once, so that every token counts the same.

        x0 (B, T) int64, clean tokens; rng: a torch.Generator; more: attn_mask, for the network.
        With loss_weight='elbo' and the whole mask_range, nats / count is in expectation the nelbo
        per token. Others give no bound: they change which t count most, but not the best prediction
        at any t, p(x0[i] | xt).
        """
        noised = self.corrupt(model, x0, given, rng)
        nats = self.weighted_losses(model, x0, noised, **more).sum()
        counted = noised.scored if self.loss_weight == 'masked_mean' else ~given
        return nats, counted.sum()

    def bound(self, model, x0, rng, given=None):
        """An unbiased one-sample estimate of the nelbo of every row, (B,), in nats."""
        return self.token_bounds(model, x0, rng, given).sum(1)

    def token_bounds(self, model, x0, rng, given=None):
        """The terms of that estimate, (B, T), 0 at tokens that this sample does not score."""
        given = torch.zeros_like(x0, dtype=torch.bool) if given is None else given
        noised = self.corrupt_evenly(model, x0, given, rng)
        return spread(self.weighted_losses(model, x0, noised), noised.scored)

    def corrupt_evenly(self, model, x0, given, rng):
        """As corrupt, but for bound(). Objectives with masks have their own, of less variance."""
        everywhere = replace(self, loss_weight='elbo', mask_range=(0.0, 1.0))
        return everywhere.corrupt(model, x0, given, rng)

    def weighted_losses(self, model, x0, noised, **more):
        """Weighted losses (M,) of predicting x0 from one sample of its corruption."""
        where = noised.scored
        # (M, C)
        h = model(noised.xt, noised.level, where=where, hidden=True, **noised.inputs, **more)
        weight, *extra = (part.expand_as(x0)[where] for part in (noised.weight, *noised.extra))
        return weight * in_slices(noised.token_loss, model, h, x0[where], *extra)

    def draw_t(self, n, rng):
        """(n, 1) stratified values of t in mask_range, never 0."""
        lo, hi = self.mask_range
        return lo + (hi - lo) * (1 - low_discrepancy(n, rng))

    def training_weight(self, w):
        """The weight of t in training, in place of w(t), its weight in the bound."""
        if self.loss_weight == 'clipped':
            return w.clamp(max=self.w_max)
        return w if self.loss_weight == 'elbo' else torch.ones_like(w)


def masks_by_count(given, rng):
    """Masks exactly n of the L tokens of a row that are not given, n uniform in 1..L.

    Returns is_mask (B, T), and n / L (B, 1), which is stratified over the rows.
    """
    L = (~given).sum(1, keepdim=True)  # (B, 1)
    u = low_discrepancy(len(given), rng)  # (B, 1)
    n = (1 + (u * L).long()).minimum(L)  # u * L may round up to L; n = L = 0 where all is given
    random = torch.rand(given.shape, generator=rng, device=given.device).masked_fill(given, 2.0)
    rank = random.argsort(1).argsort(1)  # of each token in its row; given tokens are last
    return rank < n, (n / L).nan_to_num(1.0)  # 0 / 0 where all is given


@dataclass
class MaskedDiffusion(Objective):
    """Masked diffusion [MDLM eq. 11; LLaDA eq. 3, 14; autoregressive diffusion].

    Training samples t for each row, uniform in mask_range, and masks each token that is not given
    with probability 1 - alpha_t. With t from all of (0, 1], and weighted by w(t), the loss is

    (1)  nelbo per token = E over t, xt of  w(t) / L * sum over masks i of  -log p(x0[i] | xt)

    where the logits at position i are for token i. Evaluation samples the number of masks instead.
    Let f(n) be the expected sum over masks i of -log p(x0[i] | xt) where n of the L tokens, drawn
    at random, are masked. With n uniform in 1..L

    (2)  nelbo per token = E over n of  f(n) / n = 1/L * sum over n of  f(n) / n

    Why it is a bound: write a row token by token, in a random order. Where n masks are left, a
    random one of them is written next: its expected nll is the mean over the masks, f(n) / n.
    Summed over n = L, ..., 1 that is L times (2), so the nelbo of a row is the mean over all orders
    of the nll of writing it in that order. The probability of the row is the mean over all orders
    of its probability in that order, and -log of a mean is at most the mean of -log (Jensen).

    Why (1) is (2): with the linear schedule w(t) = 1/t, and n of the L tokens are masked with
    probability (L choose n) t^n (1 - t)^(L - n). So (1) is 1/L * sum over n of f(n) times

        (L choose n) * (the integral over t of  t^(n - 1) (1 - t)^(L - n))
            = (L choose n) * (n - 1)! (L - n)! / L! = 1/n

    Other schedules substitute t. Samples of (2) vary less than those of (1): with uniform logits
    f(n) is n log V', and every sample is log V'.

    In code the weight of (2) is L / n: bound() is of a row, so L times (2), and evaluate() divides
    by the tokens of all rows. To a network with time_cond (1) and (2) differ a little: its level is
    made from 1 - alpha_t and from n / L.
    """
    any_order = True
    decoders = ('remdm', 'ancestral', 'confidence', 'threshold', 'remask')  # another default

    def corrupt(self, model, x0, given, rng):
        t = self.draw_t(len(x0), rng)  # (B, 1)
        alpha, w = alpha_and_weight(t, self.schedule)  # linear: 1 - t and 1 / t
        is_mask = (torch.rand(x0.shape, generator=rng, device=x0.device) >= alpha) & ~given
        xt = torch.where(is_mask, model.mask_id, x0)
        return Noised(xt, is_mask, self.training_weight(w), noise_level(1 - alpha, given))

    def corrupt_evenly(self, model, x0, given, rng):
        is_mask, fraction = masks_by_count(given, rng)  # (B, T); n / L, (B, 1)
        xt = torch.where(is_mask, model.mask_id, x0)
        return Noised(xt, is_mask, 1 / fraction, noise_level(fraction, given))  # weight L / n


@dataclass
class Autoregression(Objective):
    """Next-token prediction: nothing is noise, and loss and bound are the nll itself.

        nll per token = mean over (b, i), not given, of  -log p(x0[b, i] | x0[b, :i])

    The network reads x0 after a start token (the mask, or the one that a model of the hub was
    trained with), so that the first token is scored too: AR and diffusion are measured on the same
    T tokens of a window.
    """
    exact, causal, reads_masks = True, True, False
    decoders, measured = ('ar',), 'nll'

    def corrupt(self, model, x0, given, rng):
        xt = after_start(model, x0[:, :-1])
        return Noised(xt, ~given, weight=torch.ones(1, 1, device=x0.device), level=None)


def on_device(batch, device):
    """The tensors of a batch, (x0, given), on the device."""
    return [x.to(device) for x in batch]


@torch.no_grad()
def evaluate(model, objective, batches, seed=0, repeats=1):
    """Mean of objective.bound over a split, nats per token, and the standard error of that mean.

    batches: a list of functions without arguments, each of which returns a batch (x0, given) of
    prepare.py's Stream or Rows; every token that is not given counts once. The same seed draws the
    same noise, so that evaluations of a run can be compared. The error is that of the mean of
    `repeats` independent draws of the noise (nan for one), and leaves out the size of the split.
    The processes of a torchrun share the batches and all return the same.
    """
    was_training, device = model.training, model.device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model.eval()
    rng, means = torch.Generator(device), []
    for repeat in range(repeats):
        # nats, tokens that count; on the CPU, since MPS has no float64
        sums = torch.zeros(len(batches), 2, dtype=torch.float64)
        for i in range(rank, len(batches), world):
            x0, given = on_device(batches[i](), device)
            rng.manual_seed(mixed_seed(seed, repeat, i))  # a hash: the same on whichever process
            sums[i, 0] = objective.bound(model, x0, rng, given).sum().item()
            sums[i, 1] = (~given).sum().item()
        if world > 1:  # every entry from one process, zero from the others: the sum is exact
            sums = sums.to(device)
            dist.all_reduce(sums)
        nats, count = sums.sum(0).tolist()
        means.append(nats / count)
    model.train(was_training)
    return fmean(means), (stdev(means) / repeats ** 0.5 if repeats > 1 else math.nan)


# --------------------------------------------------------------------------- further objectives


@dataclass
class D3PM(Objective):
    """Masked diffusion in N discrete steps [D3PM, absorbing state].

        nelbo per token
            = E over t, xt of  1/L * sum over i of  is_mask[i] * N * c(t) * d3pm_token_loss[i]

    As MaskedDiffusion, but t lies on the grid 1/N, ..., 1, and N c(t) replaces w(t), where
    c(t) = (alpha_s - alpha_t) / (1 - alpha_t), s = t - 1/N, is the probability that a step reveals
    a mask. m = 1 - alpha: m_t at t, m_s at s.
    """
    diffusion_steps: int = 1000

    def grid(self, device):
        """m at t = 0, 1/N, ..., 1, (N + 1,), and c (N + 1,), which is 0 at t = 0."""
        t = torch.arange(self.diffusion_steps + 1, dtype=torch.float64) / self.diffusion_steps
        m = 1 - alpha_and_weight(t, self.schedule)[0]
        c = F.pad(m.diff() / m[1:], (1, 0))
        return m.float().to(device), c.float().to(device)

    def corrupt(self, model, x0, given, rng):
        t = self.draw_t(len(x0), rng)  # (B, 1)
        # less 2e-7: if t is k/N, as parts and corrupt ask for it, t * N may be above k in float32
        step = (t * (self.diffusion_steps * (1 - 2e-7))).ceil().long()  # (B, 1), 1..N
        m, c = self.grid(x0.device)
        is_mask = (torch.rand(x0.shape, generator=rng, device=x0.device) < m[step]) & ~given
        weight = self.training_weight(self.diffusion_steps * c[step])
        return self.as_noised(model, x0, given, is_mask, weight, m[step], m[step - 1], c[step])

    def corrupt_evenly(self, model, x0, given, rng):
        """Importance sampling: no row lacks masks, and with uniform logits (and subs) no variance.

                                   corrupt()                     here
            P(step)                1/N                           m_t - m_s = c m_t
            P(a set of n masks)    m_t^n (1 - m_t)^(L - n)       n/L m_t^(n - 1) (1 - m_t)^(L - n)

        Here a step is drawn with probability m_t - m_s, then one token, any of the L, is masked for
        sure, and every other with probability m_t. (Each of n masks may be the sure one: hence n/L
        in the table.) The weight N c, times the ratios of corrupt()'s probabilities to these, is
        N c * 1 / (N c m_t) * m_t L / n = L / n.
        """
        m, c = self.grid(x0.device)
        u = low_discrepancy(len(x0), rng)  # (B, 1)
        step = torch.searchsorted(m, u, right=True)  # (B, 1), 1..N, since u < 1 = m at t = 1
        u = torch.rand(x0.shape, generator=rng, device=x0.device)
        sure = torch.rand(x0.shape, generator=rng, device=x0.device).masked_fill(given, -1.0)
        is_mask = (u < m[step]).scatter(1, sure.argmax(1, keepdim=True), True) & ~given
        weight = (~given).sum(1, keepdim=True) / is_mask.sum(1, keepdim=True).clamp(min=1)  # L / n
        return self.as_noised(model, x0, given, is_mask, weight, m[step], m[step - 1], c[step])

    def as_noised(self, model, x0, given, is_mask, weight, m_t, m_s, c):
        xt = torch.where(is_mask, model.mask_id, x0)
        return Noised(xt, is_mask, weight, noise_level(m_t, given),
                      partial(d3pm_token_loss, mask_id=model.mask_id), (m_t, m_s, c))


def d3pm_token_loss(logits, target, m_t, m_s, c, mask_id):
    """KL divergence of the model's step from the true one at a masked token, divided by c, (M,).

        from t to s a mask     in truth    by the model, Z = m + alpha * p(mask)
        becomes x0             c           c m_t p(x0) / Z_t
        stays a mask           1 - c       Z_s / Z_t

    By Bayes' rule: what is a mask at t was x0 at s with a weight of (alpha_s - alpha_t) p(x0),
    which is c m_t p(x0), and a mask with m_s + alpha_s p(mask) = Z_s. The weights of all tokens sum
    to Z_t. With g = log(Z / m) and m_s = (1 - c) m_t the divergence, over c, is

        -log p(x0) + g_t + (1 - c) / c * (g_t - g_s)

    With subs p(mask) is 0, and so is g.
    """
    logp = logits.log_softmax(-1)
    p_mask = logp[:, mask_id].exp()
    # at s = 0 g_s would be infinite (hence the clamp), and its factor 1 - c is 0
    g_t, g_s = (torch.log1p((1 - m) / m.clamp(min=1e-12) * p_mask) for m in (m_t, m_s))
    return -logp.gather(1, target[:, None])[:, 0] + g_t + (1 - c) / c * (g_t - g_s)


@dataclass
class Uniform(Objective):
    """Diffusion whose noise is random tokens [UDLM, Duo].

        nelbo per token
            = E over t, xt of  1/L * sum over i of  w(t) * (1 - alpha_t) * uniform_token_loss[i]

    A token that is not kept becomes any of the V' real ones, perhaps itself. The network cannot
    know which tokens are noise, so all are scored, and any of them may still change in decoding.
    The best prediction is p(x0[i] | xt without its i-th token), since the rates that are learned
    are ratios of P(the i-th token of xt is j | the others).
    """
    reads_masks = False
    decoders = ('uniform',)

    def corrupt(self, model, x0, given, rng):
        t = self.draw_t(len(x0), rng)  # (B, 1)
        alpha, w = alpha_and_weight(t, self.schedule)
        is_noise = (torch.rand(x0.shape, generator=rng, device=x0.device) >= alpha) & ~given
        # of the V' real tokens: here mask_id = V', which model_config() makes sure of
        random = torch.randint(model.mask_id, x0.shape, generator=rng, device=x0.device)  # (B, T)
        xt = torch.where(is_noise, random, x0)
        weight = self.training_weight(w) * (1 - alpha)  # (B, 1)
        return Noised(xt, ~given, weight, noise_level(1 - alpha, given), uniform_token_loss,
                      (xt, alpha))


def uniform_token_loss(logits, x0, xt, alpha):
    """Divergence of the model's reverse rates at xt from the true ones, (M,) [UDLM, Duo].

    The rate from xt to j is proportional to the ratio xbar_j / xbar_xt, where

        xbar = V' alpha * onehot(x0) + 1 - alpha          for the true rates,
        xbar = V' alpha * softmax(logits) + 1 - alpha     for those of the model,

    and with y_j = (ratio of the model)_j / (true ratio)_j the divergence is

        1 / (V' alpha) * sum over j of  (true ratio)_j * (y_j - 1 - log y_j),

    which is the sum of UDLM's and Duo's bound, rearranged so that no two large terms cancel: each
    term is 0 or more.
    """
    logits, alpha = logits[:, :-1], alpha.clamp(1e-6, 1 - 1e-6)[:, None]  # V' real tokens
    a = logits.size(1) * alpha
    xbar = a * F.one_hot(x0, logits.size(1)) + (1 - alpha)  # (M, V')
    xbar_p = a * logits.softmax(-1) + (1 - alpha)  # (M, V'); adding 1 first would lose digits
    true, learned = (x / x.gather(1, xt[:, None]) for x in (xbar, xbar_p))
    y = learned / true
    return (true * (y - 1 - y.log())).sum(1) / a[:, 0]


@dataclass
class BlockDiffusion(Objective):
    """Blocks from left to right, masked diffusion inside each [BD3-LM].

        nelbo per token = E of  1/L * sum over i of  is_mask[i] * w(t of its block)
                                      * -log p(x0[i] | xt of its block, x0 of the blocks before)

    As MaskedDiffusion, but t is sampled for every block, and a block sees the clean blocks before
    it: all in one pass over [xt ; x0]. With block_length = T it is MaskedDiffusion.
    """
    block_length: int = 16

    def corrupt(self, model, x0, given, rng):
        (B, T), n_blocks = x0.shape, math.ceil(x0.size(1) / self.block_length)
        t = self.draw_t(B * n_blocks, rng).view(B, n_blocks)
        t = t.repeat_interleave(self.block_length, dim=1)[:, :T]  # (B, T)
        alpha, w = alpha_and_weight(t, self.schedule)
        is_mask = (torch.rand(B, T, generator=rng, device=x0.device) >= alpha) & ~given
        return self.as_noised(model, x0, given, is_mask, self.training_weight(w), 1 - alpha)

    def corrupt_evenly(self, model, x0, given, rng):
        (B, T), size = x0.shape, self.block_length
        # every block a row; padding counts as given, so that it is never masked
        blocks = F.pad(given, (0, -T % size), value=True).view(-1, size)
        is_mask, fraction = (part.expand_as(blocks).reshape(B, -1)[:, :T]  # 2 x (B, T)
                             for part in masks_by_count(blocks, rng))
        return self.as_noised(model, x0, given, is_mask, 1 / fraction, fraction)

    def as_noised(self, model, x0, given, is_mask, weight, p_noise):
        """p_noise (B, T), the same for all tokens of a block, as is the level made from it."""
        xt, size = torch.where(is_mask, model.mask_id, x0), self.block_length
        levels = map(noise_level, p_noise.split(size, dim=1), given.split(size, dim=1))  # of blocks
        level = torch.cat([*levels, torch.zeros_like(x0)], dim=1)  # (B, 2T): x0 has no noise
        return Noised(torch.cat([xt, x0], dim=1), is_mask, weight, level,
                      inputs=beside_clean(x0.size(1), size, model.config.n_conv, x0.device))


def beside_clean(T, block_length, K, device):
    """How [xt ; x0] is read [BD3-LM]: position (2T,), attn_mask (2T, 2T), neighbours.

    Both halves stand at positions 0..T-1. A token sees its own block in its own half, and the clean
    blocks before that. neighbours: for each offset k - K // 2 of local mixing a pair (j, found).
    j (2T,): the column, in [xt ; x0], of each token's neighbour at this offset. Two columns have
    that position; j is the one that attn_mask shows. found (2T, 1): False where it shows neither,
    and the neighbour counts as 0.
    """
    position = torch.arange(T, device=device).repeat(2)  # (2T,)
    block, is_clean = position // block_length, torch.arange(2 * T, device=device) >= T
    own = (block[:, None] == block) & (is_clean[:, None] == is_clean)  # (2T, 2T)
    before = (block[:, None] > block) & is_clean
    attn_mask = own | before
    offset = position - position[:, None]  # (2T, 2T)
    visible = [attn_mask & (offset == k - K // 2) for k in range(K)]  # at most one in a row
    neighbours = [(here.int().argmax(1), here.any(1, keepdim=True)) for here in visible]
    return {'position': position, 'attn_mask': attn_mask, 'neighbours': neighbours}


OBJECTIVES = {'ar': Autoregression, 'mdm': MaskedDiffusion, 'd3pm': D3PM, 'uniform': Uniform,
              'block': BlockDiffusion}


def fields_in(cls, settings):
    """{name: value} of the settings that a dataclass has as fields."""
    return {name: settings[name] for name in cls.__dataclass_fields__ if name in settings}


def make_objective(settings):
    """The Objective that a run's settings name, built from those settings."""
    one_of('objective', settings['objective'], OBJECTIVES)
    cls = OBJECTIVES[settings['objective']]
    return cls(**fields_in(cls, settings))


# ----------------------------------------------------------------- options of the transformer


class KVCache:
    """What layers have computed of the tokens read so far, so that later tokens need not recompute
    it: keys and values of attention, and inputs of LocalMixing.

    length: tokens held, with the start token of ar and of shift. Transformer.forward advances it;
    setting it back drops the newest tokens.
    """

    def __init__(self, config):
        self.places = config.block_size + config.shift  # with shift, the start token has one, too
        self.length, self.held = 0, {}

    def extend(self, owner, x):
        """Appends x (..., T, D) to what the module `owner` has appended: all of it, (..., S, D)."""
        if owner not in self.held:
            self.held[owner] = x.new_zeros(*x.shape[:-2], self.places, x.size(-1))
        held = self.held[owner][..., :self.length + x.size(-2), :]
        held[..., self.length:, :] = x
        return held


LENGTH_HEADS = ('regress_mean', 'regress_concat', 'classify', 'encoder_regress', 'encoder_classify')


class LengthHead(nn.Module):
    """Predicts from a prompt how many tokens its answer has, EOS among them.

    The model itself is not trained. All prompts of a batch have the same length.

        regress_mean      a number, from the mean of the model's hidden states
        regress_concat    the same, from the mean over the prompt and the mean over the masks
        classify          for every mask, whether the answer has ended there
        encoder_regress   a number, from the mean over the prompt of a small separate encoder
        encoder_classify  a distribution over lengths, from the same
    """

    def __init__(self, c):
        super().__init__()
        self.kind, self.encoder, C = c.length_head, None, c.n_embd
        if self.kind.startswith('encoder'):
            self.encoder = Transformer(ModelConfig(c.vocab_size, c.block_size, n_layer=2, n_head=4,
                                                   n_embd=128, tied=True, embed_scale=1.0))
            C = 128
        n_in = 2 * C if self.kind == 'regress_concat' else C
        n_out = c.block_size if self.kind == 'encoder_classify' else 1
        self.mlp = nn.Sequential(nn.Linear(n_in, C), nn.ReLU(), nn.Linear(C, n_out))

    def forward(self, model, x):
        """x (B, P + W): prompts of P tokens, then W masks. classify: logits (B, W) that the answer
        has ended at or before each position; encoder_classify: (B, W) of the lengths 1..W; else
        lengths (B,)."""
        P = int((x[0] != model.mask_id).sum())
        if self.encoder is not None:
            h = self.encoder(x[:, :P], hidden=True).mean(1)  # (B, C)
        else:
            with torch.no_grad():
                h = model(x, hidden=True)  # (B, P + W, C)
            prompt, masks = h[:, :P], h[:, P:]
            h = {'regress_mean': h.mean(1),
                 'regress_concat': torch.cat([prompt.mean(1), masks.mean(1)], dim=1),
                 'classify': masks}[self.kind]
        out = self.mlp(h).squeeze(-1)
        return out[:, :x.size(1) - P] if self.kind == 'encoder_classify' else out

    def predict(self, model, x, quantile):
        """Lengths (B,) that an answer exceeds with probability at most 1 - quantile.

        For classifiers; a regressor predicts the length_quantile that it was trained for.
        """
        out = self(model, x)
        if self.kind == 'classify':
            return first_to_hold(out.sigmoid(), quantile)
        if self.kind == 'encoder_classify':
            return first_to_hold(out.softmax(1).cumsum(1), quantile)
        return out


def first_to_hold(cumulative, p):
    """First position (from 1) where cumulative (B, W) >= p, or W if there is none: (B,)."""
    below = (cumulative < p).long().cumprod(1).sum(1)
    return below.clamp(max=cumulative.size(1) - 1) + 1.0


@dataclass
class LengthLoss:
    """What trains a LengthHead: an Objective's loss and bound, but no corrupt and no decoders.

    Of a row: cross-entropy over lengths (encoder_classify); the sum of W binary cross-entropies
    (classify); for the regressors the pinball loss [Koenker & Bassett 1978], in tokens:

        max(q * (n - prediction), (q - 1) * (n - prediction)),  q = length_quantile

    Its minimiser is the q-quantile of the length n; that of the squared error is the mean, which
    about half of the answers exceed. Printed is the loss of a row divided by the W tokens of its
    answer with PAD.
    """
    eos_id: int
    length_quantile: float = 0.95

    exact, measured, unit = True, 'loss of the length', ''  # of three kinds: no unit fits them all

    def loss(self, model, x0, rng, given):
        return self.bound(model, x0, rng, given).sum(), (~given).sum()

    def bound(self, model, x0, rng, given):
        """The loss of every row, (B,)."""
        ended = (~given & (x0 == self.eos_id)).cumsum(1) > 0  # (B, T); PAD may be EOS
        n = (~given & ~ended).sum(1) + 1  # (B,), with EOS
        kind = model.length_head.kind
        out = model.length_head(model, torch.where(given, x0, model.mask_id)).float()
        if kind == 'encoder_classify':
            return F.cross_entropy(out, n - 1, reduction='none')
        if kind == 'classify':
            target = torch.arange(out.size(1), device=x0.device) >= n[:, None] - 1  # (B, W)
            return F.binary_cross_entropy_with_logits(out, target.float(), reduction='none').sum(1)
        short, q = n - out, self.length_quantile
        return torch.maximum(q * short, (q - 1) * short)


# ------------------------------------------------------------------------- devices and checkpoints


def pick_device(device, cuda=torch.cuda.device_count, mps=torch.backends.mps.is_available):
    """'cuda', 'mps' or 'cpu': `device` itself, or for 'auto' the first that is available."""
    there = [name for kind, n in (('cuda', cuda()), ('mps', mps()), ('cpu', 1)) if n
             for name in (kind, *(f'{kind}:{i}' for i in range(n)))]
    if device != 'auto' and device not in there:
        raise UserError(f'device is {device!r}, but there is only {", ".join(there)} (or auto)')
    return there[0] if device == 'auto' else device


def pick_dtype(dtype, device, features=getattr(torch.cpu, 'get_capabilities', dict),
               cuda=partial(torch.cuda.is_bf16_supported, including_emulation=False)):
    """'float32' or 'bfloat16' for autocast: `dtype` itself, or for 'auto' what is fast on `device`.

    With bfloat16 instructions a CPU or GPU multiplies matrices several times faster in it; without
    (a T4, a V100) it imitates them, more slowly than float32.
    """
    one_of('dtype', dtype, ('auto', 'float32', 'bfloat16'))
    if dtype != 'auto':
        return dtype
    if device.startswith('cpu'):
        fast = features().get('avx512_bf16') or features().get('amx_bf16')
    else:
        fast = device.startswith('cuda') and cuda()
    return 'bfloat16' if fast else 'float32'


def peak_memory(device):
    """', 1.23 GB at most': peak memory of this process, of the GPU if one is used.

    '' on a platform that does not say (Windows has no `resource`).
    """
    if device.startswith('cuda'):
        return f', {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB at most'
    try:
        import resource
    except ImportError:
        return ''
    unit = 1 if sys.platform == 'darwin' else 1024
    return f', {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB at most'


def load_checkpoint(out_dir, ckpt='last'):
    """The dict that train.py saved in out_dir, on the CPU: model, optimizer, config, iter, ...

    ckpt: last, that of ckpt.pt; best, that of the lowest validation loss (keep_best), in best.pt.
    """
    one_of('ckpt', ckpt, ('last', 'best'))
    path = Path(out_dir) / ('best.pt' if ckpt == 'best' else 'ckpt.pt')
    if not os.path.isfile(path):  # Path.is_file raises for names that are too long
        raise UserError(f'{out_dir} is not a run{" with keep_best" * (ckpt == "best")}: it holds '
                        f'no {path.name} (train.py writes one)')
    # torch raises half a dozen kinds of errors for damaged zip archives
    with as_user_error(Exception, f'{path} is damaged, or not a checkpoint',
                       '; train again with --overwrite'):
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        missing = {'model', 'optimizer', 'config', 'meta', 'iter', 'rng', 'best'} - set(checkpoint)
    if missing:
        raise UserError(f'{path} lacks {", ".join(sorted(missing))}: not written by train.py')
    checkpoint['meta'] = {'dtype': 'uint16'} | checkpoint['meta']  # of ids; older runs lack it
    older = {'n_conv': 0, 'attn_dropout': checkpoint['config'].get('dropout', 0.0),
             'embed_scale': 1.0}
    checkpoint['config'] = older | checkpoint['config']  # older runs lack them
    return checkpoint


def model_config(settings, meta):
    """The ModelConfig that a run's settings and its data set's meta describe."""
    objective = make_objective(settings)
    # uniform draws ids below mask_id, which must all be tokens
    require('objective', settings['objective'], objective.reads_masks or objective.exact
            or meta['mask_id'] == meta['vocab_size'], 'another: here the mask is not the last id')
    # a model of the hub begins after its own start token: GPT-2 after an end of text
    start = json.loads(settings.get('hub') or '{}').get('bos_token_id')
    # V = V' + 1: meta counts the real tokens
    return ModelConfig(vocab_size=meta['vocab_size'] + 1, **fields_in(ModelConfig, settings) | {
        'causal': objective.causal, 'block_length': objective.block_length,
        'mask_id': meta['mask_id'], 'start_id': meta['mask_id'] if start is None else start})


def flops_per_token(settings, data):
    """Multiplications and additions of one update of a run, per token that is read [PaLM app. B].

    6 for every weight of the layers, and of the head for the fraction of tokens that is scored;
    12 C per layer and position attended to: all T; half of them if causal; in block diffusion a
    token's own block and half of the rest. Left out are embeddings, which are looked up, and time
    conditioning, once for a row (in blocks, for every token). A masked model of the hub is counted
    as a Transformer of its width and depth; with a length head it is nan. data: a Stream or Rows.
    """
    with torch.device('meta'):  # shapes without numbers
        model = Transformer(model_config(settings, data.meta))
    c, T, objective = model.config, data.mean_width, make_objective(settings)
    t = torch.linspace(*objective.mask_range, 1001)
    masked = (1 - alpha_and_weight(t, objective.schedule)[0]).mean().item()  # fraction of tokens
    layers = sum(p.numel() for name, p in model.blocks.named_parameters() if 'modulate' not in name)
    attended = (T + c.block_length) / 2 if model.config.causal or c.block_length else T
    halves = 2 if c.block_length else 1  # [xt ; x0], of which the head reads xt alone
    scored = data.scored_share * (masked if objective.reads_masks else 1.0)
    flops = halves * (6 * layers + 12 * c.n_layer * c.n_embd * attended) \
        + 6 * scored * model.head.weight.numel()
    return math.nan if c.length_head else flops


def load_model(checkpoint, device, trust=False):
    """The network of a checkpoint, on `device`, in evaluation mode; trust: trust_remote_code."""
    model = make_network(model_config(checkpoint['config'], checkpoint['meta']), trust)
    with as_user_error(RuntimeError, 'the weights of this checkpoint do not fit its own settings'):
        model.load_state_dict(checkpoint['model'])
    return model.to(device).eval()


# ------------------------------------------------------------------- models of the Hugging Face hub

# {GPT-2's name of a part: ours}, replaced in this order; of DiffuGPT {its name: GPT-2's}
GPT2_NAMES = {'transformer.': '', 'wte': 'embed', 'wpe': 'embed_pos', 'h.': 'blocks.',
              'ln_f': 'norm', 'ln_': 'norm', 'c_attn': 'qkv', 'c_proj': 'proj', 'c_fc': 'fc',
              'lm_head': 'head'}
DIFFUGPT = {'^denoise_model': 'transformer', '^embed_tokens': 'transformer.wte'}
GELUS = {'gelu_new': 'gelu_tanh', 'gelu': 'gelu'}


def hub_settings(s):
    """{setting: value} of s.init_from, a model hf:...: its shape and, in `hub`, what it is."""
    name = s.init_from[3:]
    c = from_hub('AutoConfig', name, trust_remote_code=s.trust_remote_code)
    causal = c.model_type == 'gpt2' or 'AutoModelForCausalLM' in getattr(c, 'auto_map', ())
    # LLaDA, though masked, registers in its auto_map as a causal model
    c.update({'name': name, 'class': f'AutoModelFor{"Causal" if causal else "Masked"}LM',
              'licence': licence_of(name if Path(name).is_dir() else f'hf://{name}'),
              'revision': getattr(c, '_commit_hash', None) or 'of a folder'})
    # positions of RoBERTa and its kin begin at 2
    places = getattr(c, 'max_position_embeddings', 1 << 20) - 2 * any(
        kin in c.model_type for kin in ('roberta', 'camembert', 'mpnet', 'data2vec'))
    with as_user_error(AttributeError, f'init_from is a {c.model_type} of the hub, but it must be '
                       'a GPT-2 or a masked model'):
        found = {'n_layer': c.num_hidden_layers, 'n_head': c.num_attention_heads, 'pos': 'learned',
                 'n_embd': c.hidden_size, 'tied': getattr(c, 'tie_word_embeddings', False),
                 'block_size': places, 'n_conv': 0, 'shift': False, 'embed_scale': 1.0,
                 'hub': c.to_json_string()}
    if c.model_type != 'gpt2':
        return found
    usual = c.activation_function in GELUS and c.layer_norm_epsilon == 1e-5 and \
        c.scale_attn_weights and not (c.scale_attn_by_inverse_layer_idx or c.add_cross_attention)
    require('init_from', s.init_from, usual, 'a GPT-2 with its usual GELU, norms and attention')
    return found | {'norm': 'layernorm', 'mlp': GELUS[c.activation_function], 'bias': True,
                    'n_hidden': c.n_inner or 0, 'qk_norm': False}


def make_network(config, trust=False):
    """The network of a ModelConfig, with its first weights: a Transformer, or a HubNetwork."""
    hub, how = json.loads(config.hub or '{}'), {'trust_remote_code': trust}
    if hub.get('model_type', 'gpt2') == 'gpt2':  # it says no type: a model of ours
        return Transformer(config)
    transformers = optional('transformers', extra='hf')
    theirs = from_hub('AutoConfig', hub['name'], **how) if 'auto_map' in hub else \
        transformers.AutoConfig.for_model(**hub)
    with as_user_error(ValueError, f'init_from is a {hub["model_type"]} of the hub, but it must be '
                       'a GPT-2 or a masked model'):
        network = getattr(transformers, hub['class']).from_config(
            theirs, dtype=torch.float32, **how)
    return HubNetwork(config, network)


class HubNetwork(nn.Module):
    """A masked language model of transformers behind the call that Transformer answers.

    It computes its logits at all positions: they are what `hidden` returns.
    """

    def __init__(self, config, network):
        super().__init__()
        c = self.config = config
        plain = not (config.causal or c.block_length or c.shift or c.time_cond or c.length_head
                     or c.dropout or c.attn_dropout)
        require('init_from', 'a masked model', plain, 'trained by mdm or d3pm, without shift, '
                'time_cond and length_head, and with the dropout of its own config alone')
        network.resize_token_embeddings(c.vocab_size)
        self.network, self.embed = network, network.get_input_embeddings()
        self.mask_id, self.length_head = c.mask_id, None
        self.head = torch.clone  # of logits, in which that of the mask is then overwritten

    def forward(self, x, level=None, *, where=None, hidden=False, **other):
        require('prefix_cache or attn_anneal', True, not other, 'off for a masked model of the hub')
        check_context(self.config, x.size(1))
        h = self.network(x).logits  # (B, T, V)
        h = h if where is None else h[where]  # (M, V)
        return h if hidden else self.logits(h)

    logits, device = Transformer.logits, Transformer.device
    count_parameters = Transformer.count_parameters


def by_our_names(gpt2):
    """{our name: weight} of a GPT2LMHeadModel: views, to be read or written."""
    found = {}
    for name, p in gpt2.state_dict().items():
        for theirs, ours in GPT2_NAMES.items():
            name = name.replace(theirs, ours)
        p = p.t() if 'blocks.' in name else p  # its linear layers hold (inputs, outputs)
        for part, piece in zip('qkv', p.chunk(3)) if 'qkv' in name else [('', p)]:
            found[name.replace('qkv', part)] = piece
    return found


@torch.no_grad()
def load_hub(s, meta):
    """Like load_checkpoint(), of the model hf:... that the settings s begin with. Raises UserError.

    resize_token_embeddings makes a row that it lacks, such as the mask's in GPT-2, about the mean
    of the others: such a token is read as an average one. DiffuGPT's mask is a token of GPT-2's:
    our mask gets a copy of its row.
    """
    settings = vars(s) | hub_settings(s)
    hub, c = json.loads(settings['hub']), model_config(settings, meta)
    vocabulary, is_gpt2 = hub_vocabulary(hub['name'], 'stream'), hub['model_type'] == 'gpt2'
    theirs = vocabulary['mask_id']  # the id after all tokens, where their tokenizer has no mask
    network, report = from_hub(
        hub['class'], hub['name'], dtype=torch.float32, use_safetensors=True, key_mapping=DIFFUGPT,
        output_loading_info=True, trust_remote_code=s.trust_remote_code)
    missing = sorted(report['missing_keys'])
    # data in GPT-2's tokens fit every model with these tokens
    also = {'kind': 'gpt2'} if load_tokenizer(vocabulary).encode('It is') == [1026, 318] else None
    fits = meta['tokenizer'] in (vocabulary['tokenizer'], also) and theirs < c.vocab_size
    require('init_from', s.init_from, not missing, f'a whole model, but this lacks {missing[:1]}')
    require('dataset', meta['name'], fits, f'prepared with --tokenizer={s.init_from}')
    print('hf:{name}: licence {licence}, revision {revision}'.format(**hub))
    rows = network.resize_token_embeddings(c.vocab_size).weight
    rows[c.mask_id] = rows[theirs if theirs < vocabulary['vocab_size'] else c.mask_id]
    return {'config': settings, 'meta': meta, 'model': by_our_names(network) if is_gpt2 else
            HubNetwork(c, network).state_dict()}


@torch.no_grad()
def export_model(run, folder):
    """Writes the model of a Run (sample.py) of ar to a new folder, as a GPT-2 of transformers.

    The start token is bos_token_id there. The mask is never generated, but theirs gives it some
    probability. A bias that ours lacks is 0. A tokenizer of the hub goes with the model. A model of
    Llama's shape (rope, rmsnorm, swiglu) is not exported. Raises UserError.
    """
    c, transformers = run.model.config, optional('transformers', extra='hf')
    require('export', folder, not Path(folder).exists(), 'a folder that is not there yet')
    shape = (c.pos, c.norm, c.qk_norm, c.n_conv, c.n_kv_head, c.embed_scale)
    if not run.objective.exact or c.mlp not in GELUS.values() \
            or shape != ('learned', 'layernorm', False, 0, c.n_head, 1.0):
        raise UserError('only ar models can be exported that are a GPT-2: pos=learned, qk_norm='
                        'False, norm=layernorm, mlp=gelu or gelu_tanh, n_conv=0, n_kv_head=0, '
                        'embed_scale=1')
    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, n_inner=c.n_hidden or None, tie_word_embeddings=c.tied,
        activation_function='gelu' if c.mlp == 'gelu' else 'gelu_new',
        bos_token_id=c.start_id, eos_token_id=run.meta['eos_id'],
        sep_token_id=run.meta['sep_id'], pad_token_id=run.meta['pad_id']))
    weights = run.model.state_dict()
    for name, w in by_our_names(network).items():
        w.copy_(weights.get(name, torch.zeros(1)))
    network.generation_config.suppress_tokens = [c.mask_id]  # ours never predicts it
    network.save_pretrained(folder)
    if run.meta['tokenizer']['kind'] == 'hf':
        # the roles in which hub_vocabulary() reads them back
        roles = {'eos': 'eos_id', 'cls': 'sep_id', 'pad': 'pad_id', 'mask': 'mask_id'}
        tokens = {f'{role}_token': run.tokenizer.library.id_to_token(run.meta[key])  # or None
                  for role, key in roles.items() if run.meta[key] is not None}
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=run.tokenizer.library, **tokens).save_pretrained(folder)
