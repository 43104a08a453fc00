"""Time of one training step by part of the model, from torch.profiler.

The forward pass of each module that belongs to a part runs inside a named range. In the forward
pass a kernel counts for the innermost range around the operator that launched it. In the backward
pass it counts for the range of the forward operator with the same sequence number: autograd gives
an operator and its backward node one number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

PARTS = (
    "attention",
    "grouped GEMM",
    "router and permute",
    "norm",
    "vocabulary and loss",
    "optimizer",
    "communication",
    "other",
)
"""Parts of a step. ``attention`` includes its projections, ``grouped GEMM`` the experts'
activation."""

_PREFIX = "part::"
# The last name of a module's path, of Megatron's and of transformers' modules.
_MODULES = {
    "self_attention": "attention",
    "self_attn": "attention",
    "experts": "grouped GEMM",
    "router": "router and permute",
    "gate": "router and permute",
    "mlp": "router and permute",
    "embedding": "vocabulary and loss",
    "embed_tokens": "vocabulary and loss",
    "output_layer": "vocabulary and loss",
    "lm_head": "vocabulary and loss",
}
_NORM_MODULE = re.compile(r"(norm|layernorm)$")
# Operators and kernels told by their own names: communication belongs to no module, and Transformer
# Engine computes norms inside its linear layers.
_NAMES = (
    (
        re.compile(r"nccl|gloo|c10d|all_?reduce|reduce_?scatter|all_?gather|all_?to_?all", re.I),
        "communication",
    ),
    (re.compile(r"rms_?norm|layer_?norm", re.I), "norm"),
)
_LOSS = re.compile(r"cross_?entropy|log_?softmax|nll_loss", re.I)
_FUNCTIONS = {"_HeadLoss": "vocabulary and loss"}
"""Functions of this project that hold a part's operators; the chunked head is no module's forward
pass (``mellum2_megatron.model.chunked_head``)."""


@contextmanager
def named_parts(model: torch.nn.Module) -> Iterator[None]:
    """Put ``model``'s modules into the ranges of their parts while the block runs."""
    handles = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        part = "norm" if _NORM_MODULE.search(last) else _MODULES.get(last)
        if part is not None:
            handles += _range(module, part)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _range(module: torch.nn.Module, part: str) -> list[Any]:
    """Put the forward pass of ``module`` into a range; return the handles of the two hooks."""
    open_ranges: list[Any] = []

    def enter(*_: Any) -> None:
        open_ranges.append(torch.profiler.record_function(_PREFIX + part))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    return [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    ]


def in_part(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` inside the range of ``part``."""

    def ranged(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(_PREFIX + part):
            return function(*args, **kwargs)

    return ranged


def profiled(step: Callable[[], Any], *, cuda: bool, largest: int = 10) -> dict[str, Any]:
    """Run ``step`` once under the profiler.

    Returns:
        ``unit``: ``GPU kernels`` or ``CPU operators``; ``seconds``: the sum of their times;
        ``share``: each part's share of it, 0 to 1; ``top``: the ``largest`` kernels or operators,
        each with its share.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize()
    spent, names = _spent(list(profiler.events() or ()), cuda)
    total = sum(spent.values()) or 1.0
    return {
        "unit": "GPU kernels" if cuda else "CPU operators",
        "seconds": sum(spent.values()) / 1e6,
        "share": {part: spent[part] / total for part in PARTS},
        "top": {name: time / total for name, time in names.most_common(largest)},
    }


def _spent(events: list[Any], cuda: bool) -> tuple[Counter[str], Counter[str]]:
    """Return microseconds by part, and by kernel (operator on a CPU)."""
    on_cpu = [
        event
        for event in events
        if event.device_type == torch.autograd.DeviceType.CPU and not event.is_async
    ]
    on_cpu.sort(key=lambda event: event.time_range.start)
    # An operator that makes no backward node carries the number of the next node to come. The last
    # operator with a number is therefore the one that made its node.
    forward: dict[tuple[int, int], str] = {}
    for event in on_cpu:
        part = _enclosing(event)
        if part is not None and event.sequence_nr >= 0:
            forward[event.sequence_nr, event.thread] = part
    spent: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for event in on_cpu:
        part = _enclosing(event) or _of_backward(event, forward)
        if cuda:
            costs = [
                (kernel.name, kernel.duration)
                for kernel in event.kernels
                if not kernel.name.startswith(_PREFIX)
            ]
        else:
            costs = [(event.name, event.self_cpu_time_total)]
        for name, microseconds in costs:
            spent[_part(name, part)] += microseconds
            if not name.startswith(_PREFIX):
                names[name[:80]] += microseconds
    if cuda:
        # Kernels that the profiler attributes to no operator.
        on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        total = sum(
            event.time_range.elapsed_us() for event in on_gpu if not event.is_user_annotation
        )
        spent["other"] += max(0.0, total - sum(spent.values()))
    return spent, names


def _part(name: str, part: str | None) -> str:
    """Return the part of a kernel or operator inside the range of ``part``; None is outside all."""
    # The optimizer's own reductions (gradient norm, gathered weights) stay with it.
    if part == "optimizer":
        return part
    for pattern, named in _NAMES:
        if pattern.search(name):
            return named
    return part or ("vocabulary and loss" if _LOSS.search(name) else "other")


def _enclosing(event: Any) -> str | None:
    """Return the part of the innermost range around an operator, if any."""
    while event is not None:
        if event.name.startswith(_PREFIX):
            return str(event.name.removeprefix(_PREFIX))
        if event.name in _FUNCTIONS:
            return _FUNCTIONS[event.name]
        event = event.cpu_parent
    return None


def _of_backward(event: Any, forward: dict[tuple[int, int], str]) -> str | None:
    """Return the part of the forward operator that a backward operator belongs to, if any."""
    while event is not None:
        if event.scope == 1:  # BACKWARD_FUNCTION, as in torch/autograd/profiler_util.py:224 (2.15)
            return forward.get((event.sequence_nr, event.fwd_thread))
        event = event.cpu_parent
    return None
