"""Keeps ``torch.compile`` away from Megatron's functions.

``megatron/core/jit.py:25`` (0.19.2) compiles some thirty small functions;
``megatron/core/transformer/moe/router.py:918`` and ``emerging_optimizers`` decorate theirs. On a
CPU each would call a C++ compiler at its first use: minutes spent to save microseconds. Other
libraries keep ``torch.compile``.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

_UNCOMPILED = ("megatron", "emerging_optimizers")


def install() -> None:
    """Replace ``torch.compile``; Megatron and emerging_optimizers get their functions unchanged."""
    compile_ = torch.compile

    @functools.wraps(compile_)
    def compile_unless_megatron(model: Any = None, **options: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] not in _UNCOMPILED:
            return compile_(model, **options)
        # Without a function it is used as a decorator with options: `@torch.compile(...)`.
        return (lambda function: function) if model is None else model

    torch.compile = compile_unless_megatron  # type: ignore[assignment]  # torch's is overloaded
