"""How tests start scripts. Tiny models are fastest on one thread; so are those of the scripts."""

import io
import os
import runpy
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import model

os.environ['OMP_NUM_THREADS'] = '1'
os.environ['HF_HUB_OFFLINE'] = '1'  # transformers reads folders, and asks nobody
torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
FEATURES = {'float32': {}, 'bfloat16': {'avx512_bf16': True}}


def pytest_addoption(parser):
    parser.addoption('--auto_dtype', choices=FEATURES,
                     help='what dtype=auto takes on the CPU, whatever instructions this one has')


def pytest_configure(config):
    if config.getoption('--auto_dtype'):
        features = FEATURES[config.getoption('--auto_dtype')]
        model.pick_dtype.__defaults__ = (lambda: features,)


def run_alone(script, *words, cwd):
    """A script as a user starts it, with args, returncode, stdout and stderr."""
    return subprocess.run([sys.executable, ROOT / script, *words], cwd=cwd, capture_output=True,
                          text=True, timeout=240)


def run(script, *words, cwd):
    """The same in this process: a new one spends most of its time on importing torch."""
    out, err = io.StringIO(), io.StringIO()
    argv, hook, folder = sys.argv, sys.excepthook, Path.cwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [script, *map(str, words)]
    os.chdir(cwd)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            try:
                runpy.run_path(str(ROOT / script), run_name='__main__')
            except Exception:
                sys.excepthook(*sys.exc_info())
                sys.exit(1)
        status = 0
    except SystemExit as e:
        status = e.code or 0
    finally:
        os.chdir(folder)
        sys.argv, sys.excepthook = argv, hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def save_tokenizer(folder, like, texts, size=300):
    """A tokenizer like GPT-2's or BERT's, learned from texts; saved by transformers in a folder."""
    from transformers import PreTrainedTokenizerFast
    if like == 'gpt2':
        made, specials = Tokenizer(models.BPE()), ['<|endoftext|>']
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        learn, roles = trainers.BpeTrainer, {'eos_token': specials[0], 'bos_token': specials[0]}
        how = {'initial_alphabet': pre_tokenizers.ByteLevel.alphabet()}
    else:
        specials = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
        made, how = Tokenizer(models.WordPiece(unk_token='[UNK]')), {}
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder, learn = decoders.WordPiece(), trainers.WordPieceTrainer
        roles = {f'{text[1:-1].lower()}_token': text for text in specials}
    made.train_from_iterator(texts, learn(vocab_size=size, special_tokens=specials,
                                          show_progress=False, **how))
    PreTrainedTokenizerFast(tokenizer_object=made, **roles).save_pretrained(folder)
    return str(folder)
