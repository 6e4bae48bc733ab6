"""How tests start scripts. Tiny models are fastest on one thread; so are those of the scripts."""

import io
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import model

os.environ['OMP_NUM_THREADS'] = '1'
os.environ['HF_HUB_OFFLINE'] = '1'  # transformers reads folders, and asks nobody
os.environ['HF_MODULES_CACHE'] = tempfile.mkdtemp()  # where it copies code to, to run it
torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
FEATURES = {'float32': {}, 'bfloat16': {'avx512_bf16': True}}


def pytest_addoption(parser):
    parser.addoption('--auto_dtype', choices=FEATURES,
                     help='what dtype=auto takes on the CPU, whatever instructions this one has')


def pytest_configure(config):
    if config.getoption('--auto_dtype'):
        features = FEATURES[config.getoption('--auto_dtype')]
        model.pick_dtype.__defaults__ = lambda: features, lambda: False


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


PROSE = ' '.join(f'It is number {i}, said the {w}.' for i in range(40) for w in ('fox', 'crow'))
REMOTE = '''
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class LikeLLaDAConfig(PretrainedConfig):
    model_type = 'like_llada'
    num_hidden_layers, num_attention_heads = 1, 2

    def __init__(self, vocab_size=300, hidden_size=32, **more):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**more)


class LikeLLaDA(PreTrainedModel):
    config_class, _tied_weights_keys = LikeLLaDAConfig, {}

    def __init__(self, config):
        super().__init__(config)
        C = config.hidden_size
        self.wte = torch.nn.Embedding(config.vocab_size, C)
        self.layer = torch.nn.TransformerEncoderLayer(C, 2, 48, 0.0, batch_first=True)
        self.ff_out = torch.nn.Linear(C, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, new):
        self.wte = new

    def get_output_embeddings(self):
        return self.ff_out

    def set_output_embeddings(self, new):
        self.ff_out = new

    def forward(self, input_ids, **more):
        return CausalLMOutput(logits=self.ff_out(self.layer(self.wte(input_ids))))
'''


def save_hub_model(folder, like, **other):
    """A model with random weights, saved by transformers in a folder with its tokenizer."""
    import transformers
    small = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 4}
    wide = {'intermediate_size': 48, 'max_position_embeddings': 64, 'vocab_size': 90}
    if like == 'llada':
        folder.mkdir()
        (folder / 'modeling_like.py').write_text(REMOTE)
        sys.path.insert(0, str(folder))
        from modeling_like import LikeLLaDA, LikeLLaDAConfig
        sys.path.pop(0)
        network = LikeLLaDA(LikeLLaDAConfig(90, auto_map={
            'AutoConfig': 'modeling_like.LikeLLaDAConfig',
            'AutoModelForCausalLM': 'modeling_like.LikeLLaDA'}, mask_token_id=4))
    elif like == 'gpt2':
        network = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small | other | {
            'n_positions': 64, 'vocab_size': 300, 'bos_token_id': 0, 'eos_token_id': 0}))
    elif like == 'distilbert':
        network = transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(
            vocab_size=90, dim=32, n_layers=2, n_heads=4, hidden_dim=48))
    else:
        name = {'bert': 'Bert', 'roberta': 'Roberta', 'camembert': 'Camembert', 'mpnet': 'MPNet',
                'modernbert': 'ModernBert'}[like]
        ids = dict.fromkeys(('bos_token_id', 'eos_token_id', 'cls_token_id', 'sep_token_id'), 2)
        network = getattr(transformers, f'{name}ForMaskedLM')(getattr(
            transformers, f'{name}Config')(**small, **wide, pad_token_id=0, **ids))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    network.eval().save_pretrained(folder)
    save_tokenizer(folder, 'gpt2' if like == 'gpt2' else 'bert', [PROSE],
                   300 if like == 'gpt2' else 90)
    return network
