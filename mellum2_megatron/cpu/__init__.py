"""Megatron-Core on a CPU with gloo: ``activate()`` before megatron is imported, then use Megatron
as on a GPU.

Nothing happens when this package is imported, and nothing else in the project imports it at module
level, so a process that trains on GPUs never sees it. What ``activate`` does, in order:

1. refuses beside a usable GPU, and after megatron or Transformer Engine have been imported;
2. hides Transformer Engine and apex from ``import`` (their kernels would be picked up and cannot
   run);
3. lets ``torch.cuda`` answer for the CPU (`device.py`), and ``torch.compile`` leave Megatron alone
   (`compiling.py`);
4. arranges for the named patches (`patches.py`) to be applied as Megatron's modules are imported.
"""

from __future__ import annotations

from mellum2_megatron.cpu.activation import activate, is_active
from mellum2_megatron.cpu.process import init_single_process, single_process, teardown

__all__ = ["activate", "init_single_process", "is_active", "single_process", "teardown"]
