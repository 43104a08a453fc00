"""Imported once by the server that `tests/distributed.py` forks its processes from."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a forked process cannot use its parent's thread pool

import torch

torch.set_num_threads(1)

from mellum2_megatron import cpu

cpu.activate()

import emerging_optimizers.orthogonalized_optimizers  # noqa: E402,F401
import megatron.training  # noqa: E402,F401
# What a first training run would import at work.
import megatron.core.dist_checkpointing.strategies.filesystem_async  # noqa: E402,F401
import megatron.core.tokenizers.text  # noqa: E402,F401
import torch._dynamo  # noqa: E402,F401
import torch.distributed.checkpoint  # noqa: E402,F401
