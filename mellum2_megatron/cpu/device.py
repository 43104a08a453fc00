"""``torch.cuda`` as Megatron uses it, answered by the CPU.

Megatron-Core 0.19.2 calls ``torch.cuda.current_device()`` in 206 places and writes
``device="cuda"`` in some eighty more. Two things make those run on a CPU:

* the functions and classes of ``torch.cuda`` that Megatron's training path calls get stand-ins
  (`FACADE`): one device, number 0; streams and events that have nothing to wait for; the CPU's
  default generator as the device's;
* the functions that make tensors, and ``Tensor.to``, ``Tensor.cuda`` and friends, read the device
  ``cuda`` as ``cpu``. Only these are wrapped: some 0.4 microseconds a call, 444 calls in a training
  step of a two-layer test model, 0.2 % of its time. A ``TorchFunctionMode`` would do it in one
  place, but adds 1.5 microseconds to every one of the 10,293 operations of that step, 11 %.

``torch.cuda.is_available()`` stays false: other libraries ask it, and must not be told otherwise.
"""

from __future__ import annotations

import functools
import types
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

# ---------------------------------------------------------------------------------------------------------------------
# Streams and events: work on a CPU is done when the call returns, so there is never anything to
# wait for.
# ---------------------------------------------------------------------------------------------------------------------


class Stream:
    """The one stream: everything on it has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Return the range of legal priorities, least and greatest."""
        return 0, 0

    def wait_stream(self, stream: Any) -> None:
        """Return at once."""

    def wait_event(self, event: Any) -> None:
        """Return at once."""

    def record_event(self, event: Event | None = None) -> Event:
        """Return ``event``, or a new one, which has already happened."""
        return event or Event()

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Return True: all work is done."""
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


class Event:
    """An event that has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None:
        """Return at once."""

    def wait(self, stream: Any = None) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Return True: it has happened."""
        return True


_STREAM = Stream()


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing: the CPU has no such state."""


def _no_context(*_: Any, **__: Any) -> AbstractContextManager[None]:
    return nullcontext()


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    # Not torch.manual_seed: that one calls torch.cuda.manual_seed_all, which is this function.
    torch.default_generator.manual_seed(int(seed))


def _memory_stats(device: Any = None) -> dict[str, int]:
    return defaultdict(int)  # every counter Megatron may log is there, and is zero


def _capability(device: Any = None) -> tuple[int, int]:
    # Megatron compares it with 8 (BF16), 9 and 10 (kernels that no CPU has).
    return 8, 0


def _properties(device: Any = None) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        name="cpu", major=8, minor=0, total_memory=0, multi_processor_count=1
    )


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"torch.cuda.{name} has no counterpart on a CPU")

    return refuse


FACADE: dict[str, Any] = {
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "set_device": _nothing,
    "device": _no_context,
    "synchronize": _nothing,
    "empty_cache": _nothing,
    "Stream": Stream,
    "Event": Event,
    "current_stream": lambda device=None: _STREAM,
    "default_stream": lambda device=None: _STREAM,
    "set_stream": _nothing,
    "stream": _no_context,
    "is_current_stream_capturing": lambda: False,
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
    "manual_seed": _manual_seed,
    "manual_seed_all": _manual_seed,
    "random.get_rng_state": _get_rng_state,
    "random.set_rng_state": _set_rng_state,
    "memory_stats": _memory_stats,
    "memory_allocated": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "max_memory_reserved": lambda device=None: 0,
    "reset_peak_memory_stats": _nothing,
    "get_device_capability": _capability,
    "get_device_properties": _properties,
    "get_device_name": lambda device=None: "cpu",
    "nvtx.range_push": _nothing,
    "nvtx.range_pop": _nothing,
    "nvtx.range": _no_context,
    "graph": _refuse("graph"),
}

# ---------------------------------------------------------------------------------------------------------------------
# device="cuda" means the CPU
# ---------------------------------------------------------------------------------------------------------------------

FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones",
    "ones_like", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm", "tensor", "zeros",
    "zeros_like",
)  # fmt: skip
NEW_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")
_CPU = torch.device("cpu")


def _is_cuda(device: Any) -> bool:
    """Whether ``device`` (a torch.device, a string or an index) is what Megatron calls its GPU."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _factory(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs:
            device = kwargs.get("device")
            if device is not None and _is_cuda(device):
                kwargs["device"] = _CPU
            kwargs.pop(
                "pin_memory", None
            )  # page-locked memory serves copies to a GPU, and asks for a driver
        return original(*args, **kwargs)

    return make


def _tensor_to(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        elif "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        return original(self, *args, **kwargs)

    return to


def _tensor_cuda(
    self: torch.Tensor, device: Any = None, non_blocking: bool = False, **_: Any
) -> torch.Tensor:
    """Return the tensor itself, as ``Tensor.cuda`` does for a tensor that is on the device
    already."""
    return self


def _is_pinned(self: torch.Tensor, device: Any = None) -> bool:
    return False


def _pin_memory(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    """Return the tensor itself."""
    return self


def _copy(value: Any) -> Any:
    """A function object of its own: torch._dynamo (trace_rules.py:3119, torch 2.15) refuses one
    under two names."""
    if not isinstance(value, types.FunctionType):
        return value
    copy = types.FunctionType(
        value.__code__, value.__globals__, value.__name__, value.__defaults__, value.__closure__
    )
    copy.__kwdefaults__ = value.__kwdefaults__
    return copy


_installed = False


def install() -> None:
    """Put the stand-ins in place, once, for the rest of the process."""
    global _installed
    if _installed:
        return
    # `with torch.device("meta")` recognises factories by identity, in a table that is built at
    # first use: have it built of the originals, which are what reaches it.
    from torch.utils import _device

    _device._device_constructors()
    for name, value in FACADE.items():
        owner: Any = torch.cuda
        *path, last = name.split(".")
        for step in path:
            owner = getattr(owner, step)
        setattr(owner, last, _copy(value))
    for name in FACTORIES:
        setattr(torch, name, _factory(getattr(torch, name)))
    for name in NEW_METHODS:
        setattr(torch.Tensor, name, _factory(getattr(torch.Tensor, name)))
    tensor: Any = torch.Tensor
    tensor.to = _tensor_to(tensor.to)
    tensor.cuda = _tensor_cuda
    tensor.pin_memory = _pin_memory
    tensor.is_pinned = _is_pinned
    tensor.record_stream = _nothing
    _installed = True
