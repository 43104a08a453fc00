"""Megatron-Core on a CPU over gloo: call ``activate()`` before megatron is imported.

Nothing happens when this package is imported, and the rest of the project imports it only where
the device is "cpu": a process that trains on GPUs never loads it. ``activate``, in this order:

1. refuses beside a usable GPU, and after megatron or Transformer Engine have been imported;
2. hides Transformer Engine and apex from ``import``: Megatron would pick up their kernels, which
   cannot run; modelopt too, whose import takes seconds;
3. makes ``torch.cuda`` answer for the CPU (`device.py`), and ``torch.compile`` leave Megatron's
   functions as they are (`compiling.py`);
4. installs the named patches (`patches.py`), each applied when its module is imported.
"""

from __future__ import annotations

from mellum2_megatron.cpu.activation import activate, is_active
from mellum2_megatron.cpu.process import init_single_process, single_process, teardown

__all__ = ["activate", "init_single_process", "is_active", "single_process", "teardown"]
