"""Tiny models are fastest on one thread; so are the scripts that tests start."""

import os

import torch

os.environ['OMP_NUM_THREADS'] = '1'
torch.set_num_threads(1)
