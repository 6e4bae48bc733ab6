"""Turns a trained model into text: left to right, by unmasking, or into the blanks of a template.

    python sample.py --out_dir=out/shakespeare_mdm --start="ROMEO:" --steps=64
    python sample.py --out_dir=out/shakespeare_ar --start="ROMEO:"
    python sample.py --out_dir=out/shakespeare_mdm --template="To [___] or not to [___:9]"
    python sample.py --corrupt="What's in a name?"

A decoder gets a canvas, (B, T) tokens with mask_id wherever text is wanted, and returns it filled.
Continuing a prompt, infilling and writing from nothing differ only in where the masks stand.
"""

import math
import re
import time
from functools import partial
from pathlib import Path

import torch

import config
from config import UserError
from model import SCHEDULES, KVCache, load_checkpoint, load_model, noise, pick_device
from prepare import load_tokenizer

# what is read
out_dir = 'out/shakespeare_mdm'  # the run whose model is used
device = 'auto'        # cuda, mps, cpu; auto takes the first that is there
# what is wanted
start = ''             # the text to go on from
template = ''          # a text with blanks: [___] is 5 tokens wide, [___:9] is 9
corrupt = ''           # a text: show what the noise makes of it, and stop
num_samples = 1
gen_length = 0         # tokens to write after start; 0 fills the model's context
seed = 1337
# how it is decoded
decoder = 'auto'       # ar, ancestral, confidence; auto is ar for ar models, else ancestral
steps = 128            # decoding steps of ancestral and confidence
noise_schedule = 'linear'  # ancestral: linear, cosine; how the steps are spread
order = 'max_prob'     # confidence: what goes first; max_prob, margin, entropy, random
counts = 'linear'      # confidence: linear (as many each step), cosine (few first, then more)
threshold = 0.0        # confidence: commit all above it and at least one; 0 commits by counts
temperature = 0.7      # 0 takes the most likely token; measured choices, see README
top_k = 0              # draw among the k most likely tokens; 0 = all
top_p = 1.0            # draw among the most likely tokens that hold this probability together
repetition_penalty = 1.0  # above 1: tokens that the text has already become less likely

BLANK = re.compile(r'\[_+(?::(\d{1,6}))?\]')
BLANK_WIDTH = 5        # tokens of a [___] that does not say
MASK_SHOWN = '█'
ORDERS = ('max_prob', 'margin', 'entropy', 'random')


def draw(logits, seen=None, *, generator, temperature=1.0, top_k=0, top_p=1.0,
         repetition_penalty=1.0):
    """One token for each row of logits (N, V), and the model's own probability of it: 2 x (N,).

    seen (N, V) bool: tokens that repetition_penalty makes less likely [CTRL 1909.05858, sec. 4.1].
    The draw is exact: argmax of p / e with e ~ Exponential(1) has the distribution p, and float64
    keeps its tails, which float32 noise cuts off [2409.02908]. The probability is that of the
    untempered, unfiltered model: how sure it is does not depend on how we draw.
    """
    if generator.device.type != logits.device.type:  # mps has no float64: draw on the CPU
        logits, seen = logits.cpu(), seen if seen is None else seen.cpu()
    probability = logits.float().softmax(-1)  # (N, V)
    logits = logits.double()
    if repetition_penalty != 1.0:
        less = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, less, logits)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # none above 0: no overflow
        p = filter_logits(logits, top_k, top_p).softmax(-1)
        token = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)  # (N,)
    return token, probability.gather(-1, token[:, None])[:, 0]


def filter_logits(logits, top_k, top_p):
    """logits (N, V) with -inf for all but the top_k likeliest, and of those the nucleus of top_p.

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
    """(N, V) bool: which tokens stand in the rows of the N positions of `where`, masks aside."""
    seen = torch.zeros(x.size(0), V, dtype=torch.bool, device=x.device)
    seen.scatter_(1, x, True)
    seen[:, -1] = False
    return seen[where.nonzero()[:, 0]]


# -------------------------------------------------------------------------------------- decoders
#
# decode_x(model, x, *, ..., generator, on_step, **drawing) -> (x, nfe)
#
# x (B, T) int64 with mask_id where text is wanted; given tokens are never changed. nfe counts
# forward passes of the network. on_step(x, nfe) is called after every step that changed something;
# x may change after the call, so clone what is to be kept. drawing: the keywords of draw().


@torch.no_grad()
def decode_ar(model, x, *, eos_id=None, generator, on_step=None, **drawing):
    """Left to right, each token given those before it; a filled blank has not seen what follows.

    One pass per token, over that token alone: what was read before is in a KV cache. Rows may have
    their masks at different places. A row that has written eos_id writes nothing else after it. A
    canvas longer than the context is read through a window that holds the start token and the
    newest tokens, and drops its older half whenever it is full.
    """
    x, c, nfe = x.clone(), model.config, 0
    B, T = x.shape
    is_mask = x == model.mask_id
    ended = ~is_mask.any(1)  # (B,)
    cache = KVCache(c, B, x.device, model.embed.weight.dtype)
    begin, half = 0, (c.block_size + 1) // 2  # canvas token behind the start token in the window
    for i in is_mask.any(0).nonzero()[:, 0].tolist():
        if i - begin >= c.block_size:  # a function of i, not of which rows had masks before it
            begin, cache.length = ((i - c.block_size) // half + 1) * half, 0
        unread = x[:, begin + max(cache.length - 1, 0):i]  # behind the start token, up to i
        if cache.length == 0:
            unread = torch.cat([torch.full_like(x[:, :1], model.mask_id), unread], dim=1)
        last = torch.zeros_like(unread, dtype=torch.bool)
        last[:, -1] = True
        logits = model(unread, cache=cache, where=last)  # (B, V)
        nfe += 1
        token, _ = draw(logits, seen_tokens(x[:, :i], last[:, -1:], c.vocab_size),
                        generator=generator, **drawing)
        x[:, i] = torch.where(is_mask[:, i], token.to(x.device), x[:, i])
        if eos_id is not None:
            x[ended & is_mask[:, i], i] = eos_id
            ended |= is_mask[:, i] & (x[:, i] == eos_id)
        if on_step is not None:
            on_step(x, nfe)
        if ended.all():
            x[x == model.mask_id] = eos_id
            break
    return x, nfe


@torch.no_grad()
def decode_ancestral(model, x, *, steps, schedule='linear', generator, on_step=None, **drawing):
    """The reverse process of masked diffusion in `steps` steps from t = 1 to 0 [MDLM eq. 7].

        a masked token is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t),
        s = t - 1/steps, and then drawn from p(x0 | xt)

    Whether a token is revealed does not depend on the network, so that is drawn first: a step that
    reveals nothing needs no pass, one that does needs the head only where it does.
    """
    x, nfe = x.clone(), 0
    alpha = noise(torch.linspace(1, 0, steps + 1, dtype=torch.float64), schedule)[0].tolist()
    for alpha_t, alpha_s in zip(alpha, alpha[1:]):
        u = torch.rand(x.shape, generator=generator, device=generator.device).to(x.device)
        reveal = (x == model.mask_id) & (u < (alpha_s - alpha_t) / (1 - alpha_t))
        if not reveal.any():
            continue
        t = torch.full((x.size(0), 1), 1 - alpha_t, device=x.device)
        logits = model(x, t, where=reveal)  # (N, V), N tokens to reveal
        nfe += 1
        token, _ = draw(logits, seen_tokens(x, reveal, model.config.vocab_size),
                        generator=generator, **drawing)
        x[reveal] = token.to(x.device)
        if on_step is not None:
            on_step(x, nfe)
    return x, nfe


@torch.no_grad()
def decode_confidence(model, x, *, steps, order='max_prob', counts='linear', threshold=0.0,
                      generator, on_step=None, **drawing):
    """The surest tokens first [MaskGIT sec. 3.2; LLaDA sec. 2.4; Fast-dLLM 2505.22618].

    Each pass draws a token for every mask and commits those with the highest score: by `order`,
    the probability of the drawn token, the margin of the best over the second, the entropy of the
    distribution (as 1 / perplexity), or at random. `counts` says how many masks of each row remain
    after i of `steps` steps; with a threshold, a row commits all drawn tokens above it instead, and
    at least one, for as many passes as that takes.
    """
    x, nfe = x.clone(), 0
    n_masks = (x == model.mask_id).sum(1)  # (B,)
    for i in range(1, (x.size(1) if threshold else steps) + 1):
        is_mask = x == model.mask_id
        if threshold:
            quota = is_mask.any(1).long()
        else:
            left = n_masks * (steps - i) // steps if counts == 'linear' else \
                (n_masks * math.cos(math.pi / 2 * i / steps)).long()
            quota = is_mask.sum(1) - left  # (B,)
        if not quota.any():
            continue
        share = is_mask.float().mean(1, keepdim=True)  # (B, 1), 1 - alpha_t of this canvas
        logits = model(x, share, where=is_mask)  # (N, V)
        nfe += 1
        token, probability = draw(logits, seen_tokens(x, is_mask, model.config.vocab_size),
                                  generator=generator, **drawing)
        score = score_of(order, logits, probability.to(x.device), generator).float()  # (N,)
        scores = torch.full(x.shape, -torch.inf, device=x.device).masked_scatter(is_mask, score)
        # rounded, so that noise in the last bits does not order equals: they go from the left
        rank = scores.round(decimals=5).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        commit = is_mask & (rank < quota[:, None])
        if threshold:
            commit |= is_mask & (scores > threshold)
        x = torch.where(commit, x.masked_scatter(is_mask, token.to(x.device)), x)
        if on_step is not None:
            on_step(x, nfe)
    return x, nfe


def score_of(order, logits, probability, generator):
    """How sure each of N predictions is, (N,), the higher the surer; logits (N, V)."""
    if order == 'max_prob':
        return probability
    if order == 'random':
        return torch.rand(probability.shape, generator=generator,
                          device=generator.device).to(logits.device)
    p = logits.float().softmax(-1)
    if order == 'margin':
        best, second = p.topk(2, dim=-1).values.unbind(-1)
        return best - second
    if order == 'entropy':
        return torch.special.xlogy(p, p).sum(-1).exp()  # 1 / perplexity, a probability again
    raise UserError(f'order is {order!r}, not one of {", ".join(ORDERS)}')


# ------------------------------------------------------------------------------ text in, text out


def pick_decoder(name, objective, settings, eos_id):
    """decode(model, x, generator=..., on_step=...) of that name, with the settings that it uses."""
    known = {'ar': ('ar',), 'mdm': ('ancestral', 'confidence')}[objective]
    name = known[0] if name == 'auto' else name
    if name not in known:
        raise UserError(f'decoder is {name!r}, but {objective} models decode by '
                        f'{" or ".join(known)}')
    s = settings
    drawing = {k: s[k] for k in ('temperature', 'top_k', 'top_p', 'repetition_penalty')}
    if name == 'ar':
        return partial(decode_ar, eos_id=eos_id, **drawing)
    if name == 'ancestral':
        return partial(decode_ancestral, steps=s['steps'], schedule=s['noise_schedule'], **drawing)
    return partial(decode_confidence, steps=s['steps'], order=s['order'], counts=s['counts'],
                   threshold=s['threshold'], **drawing)


def check_settings(s):
    """Raises UserError for values that no decoder can use."""
    for name, fine, wanted in (
            ('steps', s['steps'] >= 1, '1 or more'),
            ('num_samples', s['num_samples'] >= 1, '1 or more'),
            ('gen_length', s['gen_length'] >= 0, '1 or more, or 0 to fill the context'),
            ('temperature', 0 <= s['temperature'] < math.inf, '0 or more'),
            ('top_k', s['top_k'] >= 0, '1 or more, or 0 for all'),
            ('top_p', 0 < s['top_p'] <= 1, 'in (0, 1]'),
            ('threshold', 0 <= s['threshold'] <= 1, 'in (0, 1], or 0 for none'),
            ('repetition_penalty', 0 < s['repetition_penalty'] < math.inf, 'above 0'),
            ('seed', abs(s['seed']) < 2 ** 63, 'of at most 63 bits'),
            ('order', s['order'] in ORDERS, f'one of {", ".join(ORDERS)}'),
            ('noise_schedule', s['noise_schedule'] in SCHEDULES, f'one of {", ".join(SCHEDULES)}'),
            ('counts', s['counts'] in ('linear', 'cosine'), 'linear or cosine')):
        if not fine:
            raise UserError(f'{name} is {s[name]!r}, but it must be {wanted}')


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
    text, run = '', []
    for i in [*ids, mask_id]:
        if i != mask_id:
            run.append(i)
            continue
        text += tokenizer.decode(run) + MASK_SHOWN
        run = []
    return text[:-1]


def show_corruption(text, tokenizer, mask_id, seed):
    """The forward process on one text: ever more of its tokens become masks, none comes back."""
    ids = torch.tensor(tokenizer.encode(text))
    u = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    for t in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        xt = torch.where(u < t, mask_id, ids)  # alpha_t = 1 - t
        print(f't = {t:.1f}  {show(xt.tolist(), tokenizer, mask_id)}')


def make_canvas(model, tokenizer, settings):
    """The ids of one canvas: a template, or start with gen_length times mask_id behind it."""
    T, mask_id = model.config.block_size, model.mask_id
    if settings['template']:
        if settings['start'] or settings['gen_length']:
            raise UserError('a template says itself what is given and how much is wanted: '
                            'leave out start and gen_length')
        return template_canvas(settings['template'], tokenizer, mask_id)
    given = tokenizer.encode(settings['start'])
    length = settings['gen_length'] or T - len(given)
    if length <= 0:
        raise UserError(f'start is {len(given)} tokens long and fills the context of {T}: '
                        'shorten it, or set gen_length (ar models only)')
    return given + [mask_id] * length


def generate(model, objective, canvas, settings, eos_id=None, on_step=None):
    """num_samples fillings of one canvas: x (num_samples, T), nfe, and the seconds that it took.

    With an eos_id, AR decoding stops there; without, it goes on to the end of the canvas.
    """
    check_settings(settings)
    if objective != 'ar' and len(canvas) > model.config.block_size:
        raise UserError(f'{len(canvas)} tokens do not fit into the context of this model, '
                        f'block_size is {model.config.block_size}')
    device = model.embed.weight.device
    generator = torch.Generator('cpu' if device.type == 'mps' else device)
    generator.manual_seed(settings['seed'])
    x = torch.tensor([canvas] * settings['num_samples'], device=device)
    decode = pick_decoder(settings['decoder'], objective, settings, eos_id)
    began = time.perf_counter()
    x, nfe = decode(model, x, generator=generator, on_step=on_step)
    return x.cpu(), nfe, time.perf_counter() - began


def main():
    settings = config.override(globals())
    check_settings(settings)
    if corrupt and not (Path(out_dir) / 'ckpt.pt').is_file():  # letters will do
        chars = ''.join(sorted(set(corrupt)))
        tokenizer = load_tokenizer({'tokenizer': {'kind': 'char', 'chars': chars}, 'eos_id': None})
        return show_corruption(corrupt, tokenizer, len(chars), seed)
    place = pick_device(device)
    checkpoint = load_checkpoint(out_dir, place)
    model, meta = load_model(checkpoint, place), checkpoint['meta']
    tokenizer = load_tokenizer(meta)
    if corrupt:
        return show_corruption(corrupt, tokenizer, model.mask_id, seed)
    canvas = make_canvas(model, tokenizer, settings)
    objective, eos_id = checkpoint['config']['objective'], meta['eos_id']
    x, nfe, seconds = generate(model, objective, canvas, settings, eos_id)
    for ids in x.tolist():
        print(tokenizer.decode(ids[:ids.index(eos_id)] if eos_id in ids else ids))
        print('-' * 80)
    written = num_samples * canvas.count(model.mask_id)
    print(f'{written} tokens in {nfe} passes and {seconds:.2f} s, '
          f'{written / seconds:,.0f} tokens/s')


if __name__ == '__main__':
    main()
