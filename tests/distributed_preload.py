"""Imported once by the server that `tests/distributed.py` forks its processes from."""

from __future__ import annotations

import importlib
import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: a forked process cannot use its parent's thread pool

import torch

from mellum2_megatron import cpu

torch.set_num_threads(1)
cpu.activate()

for name in (
    "emerging_optimizers.orthogonalized_optimizers",
    "megatron.training",
    # What a first training run would import at work:
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.tokenizers.text",
    "torch._dynamo",
    "torch.distributed.checkpoint",
):
    importlib.import_module(name)
