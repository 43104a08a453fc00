"""Bytes of tensors that exist while code runs, and bytes that autograd keeps, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveMemory(TorchDispatchMode):
    """Counts the storages that operators make or touch, from their first sight to their end.

    Attributes:
        now: bytes at present.
        peak: most bytes so far; may be set back to `now`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        pytree.tree_map_only(torch.Tensor, self._see, result)
        self.peak = max(self.peak, self.now)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size

        def ended() -> None:
            self._known.discard(key)
            self.now -= size

        weakref.finalize(storage, ended)


@contextmanager
def saved_by_module(model: torch.nn.Module) -> Iterator[dict[str, int]]:
    """Collect the bytes that autograd saves inside, by the name of the module that saves them.

    A storage counts once, for the first module that saves it; weights and buffers do not count.
    The bytes are there when the context ends.
    """
    names = {module: name for name, module in model.named_modules()}
    running: list[str] = []
    # Held, because a freed storage's place could be taken by another: a router replaces a buffer.
    own = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    seen = {storage._cdata for storage in own}
    kept: list[tuple[str, torch.UntypedStorage]] = []
    found: dict[str, int] = {}

    def enter(module: torch.nn.Module, _: Any) -> None:
        running.append(names[module])

    def leave(module: torch.nn.Module, *_: Any) -> None:
        running.pop()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept.append((running[-1] if running else "", storage))
        return tensor

    handles = [module.register_forward_pre_hook(enter) for module in model.modules()]
    handles += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield found
    finally:
        for handle in handles:
            handle.remove()
        # At the end, because outputs that will be computed again are emptied after their use.
        for name, storage in kept:
            found[name] = found.get(name, 0) + storage.nbytes()
