"""Imports of the server from which `tests/distributed.py` forks its processes."""

from __future__ import annotations

import importlib
import os

# Before torch is imported: a forked process cannot use its parent's thread pool.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from mellum2_megatron import cpu

torch.set_num_threads(1)
cpu.activate()

for name in (
    "emerging_optimizers.orthogonalized_optimizers",
    "megatron.training",
    # Imported by a run's first save, first tokenizer and first compiled function.
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.tokenizers.text",
    "torch._dynamo",
    "torch.distributed.checkpoint",
):
    importlib.import_module(name)
