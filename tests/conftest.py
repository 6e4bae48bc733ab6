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

import model

os.environ['OMP_NUM_THREADS'] = '1'
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
