"""Hides Megatron's own output below errors. A matter of taste, not a work-around."""

from __future__ import annotations

import builtins
import functools
import logging
import sys
import warnings
from typing import Any

logger = logging.getLogger(__name__)

# Megatron imports modelopt, a package of Megatron-Bridge, where it is installed.
_NOISY = ("megatron", "emerging_optimizers", "modelopt")


def quiet_upstream() -> None:
    """Hide what Megatron prints, warns and logs below an error, for the rest of the process.

    Exceptions and logged errors are shown as before. Printed lines go to this module's logger at
    DEBUG level.
    """
    for name in (*_NOISY, "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # This module logs an error of a checkpoint's writer and then raises it too
    # (core/dist_checkpointing/strategies, 0.19.2).
    logging.getLogger("megatron.core.dist_checkpointing.strategies.filesystem_async").setLevel(
        logging.CRITICAL
    )
    warnings.filterwarnings("ignore", module=rf"(.*/)?({'|'.join(_NOISY)})([./]|$)")
    # Loading a checkpoint with the APIs that Megatron still calls (torch 2.15).
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint\.")
    # Scripted functions of modelopt and of Megatron's fused kernels (torch 2.15).
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
    warnings.filterwarnings(
        "ignore", message="'pin_memory' argument is set as true but no accelerator"
    )
    original = builtins.print
    if hasattr(original, "__wrapped__"):
        return  # replaced by an earlier call

    # Megatron prints in some two hundred places, without a switch; print itself is one place.
    @functools.wraps(original)
    def print_unless_noisy(*values: Any, **options: Any) -> None:
        caller = sys._getframe(1).f_globals.get("__name__") or ""
        if caller.partition(".")[0] in _NOISY and options.get("file") in (None, sys.stdout):
            logger.debug("%s: %s", caller, " ".join(map(str, values)))
        else:
            original(*values, **options)

    builtins.print = print_unless_noisy
