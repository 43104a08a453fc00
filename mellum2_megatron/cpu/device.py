"""Makes ``torch.cuda``, as Megatron uses it, answer for the CPU.

Megatron-Core 0.19.2 calls ``torch.cuda.current_device()`` in 206 places and writes
``device="cuda"`` in some eighty more. Two changes make those run on a CPU:

* functions and classes of ``torch.cuda`` on Megatron's training path get stand-ins (`FACADE`): one
  device, number 0; streams and events with nothing to wait for; the CPU's default random generator
  as the device's;
* functions that make tensors, and ``Tensor.to``, ``Tensor.cuda`` and their like, read the device
  ``cuda`` as ``cpu``. Only these are wrapped. That costs some 0.4 microseconds a call, with 444
  calls in a training step of a two-layer test model: 0.2 % of its time. A ``TorchFunctionMode``
  would be one place, but adds 1.5 microseconds to each of that step's 10,293 operations: 11 %.

``torch.cuda.is_available()`` stays false, since other libraries read it too.
"""

from __future__ import annotations

import functools
import types
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

# ------------------------------------------------------------------------------------------------
# Streams and events: on a CPU work is done when the call returns, so there is nothing to wait for
# ------------------------------------------------------------------------------------------------


class Stream:
    """Stand-in for a CUDA stream: all work on it is done."""

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
        """Return ``event``, or a new one; it has happened."""
        return event or Event()

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Return True: all work is done."""
        return True

    # Megatron compares streams; there is one, however many objects stand for it.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


class Event:
    """Stand-in for a CUDA event: it has happened."""

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


def _graph(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("torch.cuda.graph has no counterpart on a CPU")


FACADE: dict[str, Any] = {
    # Devices.
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "set_device": _nothing,
    "device": _no_context,
    "synchronize": _nothing,
    "empty_cache": _nothing,
    # Streams, events and graphs.
    "Stream": Stream,
    "Event": Event,
    "current_stream": lambda device=None: _STREAM,
    "default_stream": lambda device=None: _STREAM,
    "set_stream": _nothing,
    "stream": _no_context,
    "is_current_stream_capturing": lambda: False,
    "graph": _graph,
    # Random numbers.
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
    "manual_seed": _manual_seed,
    "manual_seed_all": _manual_seed,
    "random.get_rng_state": _get_rng_state,
    "random.set_rng_state": _set_rng_state,
    # Memory: every counter that Megatron may log is there, and is 0.
    "memory_stats": lambda device=None: defaultdict(int),
    "memory_allocated": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "max_memory_reserved": lambda device=None: 0,
    "reset_peak_memory_stats": _nothing,
    # Properties. Megatron compares the capability with 8 (BF16), 9 and 10 (kernels of no CPU).
    "get_device_capability": lambda device=None: (8, 0),
    "get_device_properties": lambda device=None: types.SimpleNamespace(
        name="cpu", major=8, minor=0, total_memory=0, multi_processor_count=1
    ),
    "get_device_name": lambda device=None: "cpu",
    # Profiler ranges.
    "nvtx.range_push": _nothing,
    "nvtx.range_pop": _nothing,
    "nvtx.range": _no_context,
}
"""Name in ``torch.cuda`` -> stand-in."""

# ------------------------------------------------------------------------------------------------
# device="cuda" means the CPU
# ------------------------------------------------------------------------------------------------

FACTORIES = tuple(
    "arange as_tensor empty empty_like empty_strided eye full full_like linspace ones ones_like "
    "rand rand_like randint randint_like randn randn_like randperm tensor zeros zeros_like".split()
)
"""Functions of ``torch`` that take a device."""

NEW_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")
_CPU = torch.device("cpu")


def _is_cuda(device: Any) -> bool:
    """Return True if a torch.device, a string or an index is what Megatron calls its GPU."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    # Python counts a bool as an int, but it is no device index.
    return isinstance(device, int) and not isinstance(device, bool)


def _factory(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs:
            device = kwargs.get("device")
            if device is not None and _is_cuda(device):
                kwargs["device"] = _CPU
            # Page-locked memory serves copies to a GPU, and needs its driver.
            kwargs.pop("pin_memory", None)
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


def _itself(self: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Return the tensor, as ``Tensor.cuda`` does for one that is on the device already."""
    return self


def _copy(value: Any) -> Any:
    """Copy a function: torch._dynamo refuses one under two names (trace_rules.py:3119, 2.15)."""
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
    # first use. Build it now, from the originals: those are what the wrappers call.
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
    tensor.cuda = _itself
    tensor.pin_memory = _copy(_itself)
    tensor.is_pinned = lambda self, device=None: False
    tensor.record_stream = _nothing
    _installed = True
