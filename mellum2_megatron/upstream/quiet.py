"""Hides Megatron's own output below errors: a matter of taste, and no work-around."""

from __future__ import annotations

import builtins
import functools
import logging
import sys
import warnings
from collections.abc import Callable
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
    # It logs an error of a checkpoint's writer and then raises it
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
    # Megatron prints in some two hundred places, without a switch; print itself is one place.
    if not hasattr(builtins.print, "__wrapped__"):
        builtins.print = _print_unless_noisy(builtins.print)


def _print_unless_noisy(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def print_(*values: Any, **options: Any) -> None:
        caller = sys._getframe(1).f_globals.get("__name__") or ""
        if caller.partition(".")[0] in _NOISY and options.get("file") in (None, sys.stdout):
            logger.debug("%s: %s", caller, " ".join(map(str, values)))
        else:
            original(*values, **options)

    return print_
