"""The switch to the CPU: after `activate`, Megatron-Core runs on it in this process."""

from __future__ import annotations

import logging
import os
import sys

from mellum2_megatron.common.errors import InputError

HIDDEN = ("transformer_engine", "transformer_engine_torch", "apex", "modelopt")
"""Packages that Megatron picks up if they import.

The kernels of the first three run on a GPU only. Megatron imports modelopt where Megatron-Bridge
has installed it, and then leaves it unused, because the wheel has no `megatron.post_training`
(megatron/training/checkpointing.py:70-76, 0.19.2): six seconds of a process's start.
"""

_active = False


def is_active() -> bool:
    """Return True once `activate` was called in this process."""
    return _active


def activate() -> None:
    """Make Megatron-Core run on the CPU for the rest of the process; a second call does nothing.

    Raises:
        InputError: a GPU is usable, or megatron or Transformer Engine has been imported, or an
            installed version is not one that the patches were written for. Nothing has been changed
            then.
    """
    global _active
    if _active:
        return
    imported = sorted(
        name for name in sys.modules if name.startswith("megatron.") or name in HIDDEN
    )
    if imported:
        raise InputError(
            f"cpu.activate() after {imported[0]} was imported",
            rule="Megatron decides at import time what it compiles and which kernels it uses",
            fix="call mellum2_megatron.cpu.activate() before anything imports megatron or "
            "transformer_engine",
        )
    import torch

    if torch.cuda.is_available():
        raise InputError(
            f"device=cpu with {torch.cuda.get_device_name()} present",
            rule="the CPU backend replaces parts of torch.cuda and refuses to do so where a GPU is "
            "usable",
            fix="use device=cuda, or hide the GPUs with CUDA_VISIBLE_DEVICES=''",
        )
    from mellum2_megatron import upstream
    from mellum2_megatron.cpu import compiling, device
    from mellum2_megatron.cpu.patches import PATCHES
    from mellum2_megatron.upstream import patching

    patching.check_versions(PATCHES)
    upstream.activate()
    for name in HIDDEN:
        # `import` then raises, and `find_spec` returns None.
        sys.modules[name] = None  # type: ignore[assignment]  # typed as a dict of modules
    # Megatron asserts this variable (arguments.py:1437, 0.19.2), though a CPU has no such queues.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device.install()
    compiling.install()
    patching.install(PATCHES)
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_not_about_shared_rng)
    _active = True


def _not_about_shared_rng(record: logging.LogRecord) -> bool:
    """Drop a warning of ``tensor_parallel/random.py:329`` (0.19.2).

    Here the device's random generator *is* the CPU's.
    """
    return "CPU RNG state changed" not in record.getMessage()
