"""`torch.save` without the CRC-32 of its zip records, which nothing reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_crc32() -> Iterator[None]:
    """Make `torch.save` leave out the zip records' CRC-32, process-wide, while the block runs.

    `torch.load` never compares it (torch/serialization.py:set_crc32_options, 2.15), and manifests
    hold a SHA-256 of every file.
    """
    import torch

    # torch holds the interpreter's lock meanwhile, so workers in threads wait for each other.
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def call_without_crc32(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function inside `without_crc32`; another process can unpickle it."""
    with without_crc32():
        return function(*args)
