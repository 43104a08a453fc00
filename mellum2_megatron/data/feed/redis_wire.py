"""Samples as bytes in Redis, and the names of the keys.

Data are a pure function of the sample's index, so Redis is a look-ahead cache and no queue: a key
for each sample, the same bytes from whoever writes it. ::

    {RUN}:{PLAN}:s:INDEX     one sample, see `encode`
    {RUN}:{PLAN}:want        hash: reader -> the sample that it reads next
    {RUN}:{PLAN}:missing     set: indices that a reader looked for in vain
    {RUN}:{PLAN}:state       hash: the streamer's process, host, place and last sign of life
    {RUN}:{PLAN}:lease       name of the streamer at work; it expires
    {RUN}:plan               the PLAN that a streamer at work serves; it expires

Byte layout of a sample, little-endian: magic, CRC-32 of all that follows, index, length of the
description, description, the arrays' bytes. The description has for each array the length of its
name, its name, the length of NumPy's type string, that string, dimensions and their sizes. It is
the same for almost all samples of a run, so both sides keep what they have made of it.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_MAGIC = b"M2S2"
_HEAD = struct.Struct("<4sIQI")
_COUNTED = struct.Struct("<QI")
"""Part of the head that the checksum covers."""
_KINDS = frozenset("biuf")
_MOST_DIMENSIONS = 4

Sample = Mapping[str, NDArray[np.generic]]
"""Arrays of one sample by name, as a dataset's item has them."""


class WireError(ValueError):
    """Bytes that are not the wanted sample."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Names of the keys of one run's stream of one data plan."""

    run: str
    plan: str

    @property
    def prefix(self) -> str:
        """Common beginning of the keys of this plan."""
        return f"{self.run_prefix}{self.plan}:"

    @property
    def run_prefix(self) -> str:
        """Common beginning of all keys of the run; the access rules cover it."""
        return f"{{{self.run}}}:"

    @property
    def plan_in_use(self) -> str:
        """Key of the plan that a streamer at work serves."""
        return f"{self.run_prefix}plan"

    def sample(self, index: int) -> str:
        """Key of a sample."""
        return f"{self.prefix}s:{index}"

    @property
    def want(self) -> str:
        """Key of the readers' places."""
        return f"{self.prefix}want"

    @property
    def missing(self) -> str:
        """Key of the indices looked for in vain."""
        return f"{self.prefix}missing"

    @property
    def state(self) -> str:
        """Key of the streamer's state."""
        return f"{self.prefix}state"

    @property
    def lease(self) -> str:
        """Key of the streamer at work."""
        return f"{self.prefix}lease"


def encode(index: int, sample: Sample) -> bytes:
    """Return a sample's bytes.

    Raises:
        ValueError: an array holds other things than numbers, or has more than four dimensions.
    """
    arrays = [
        (name, np.asarray(array, _little(array.dtype), order="C")) for name, array in sample.items()
    ]
    description = _description(tuple((name, array.dtype, array.shape) for name, array in arrays))
    # Arrays as bytes without a copy; `join` copies them once.
    contents = [array.data for _, array in arrays]
    counted = _COUNTED.pack(index, len(description))
    checksum = zlib.crc32(description, zlib.crc32(counted))
    for content in contents:
        checksum = zlib.crc32(content, checksum)
    head = _HEAD.pack(_MAGIC, checksum, index, len(description))
    return b"".join((head, description, *contents))


@lru_cache(maxsize=256)
def _little(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """Return the little-endian form of a type."""
    return dtype.newbyteorder("<")


@lru_cache(maxsize=256)
def _description(arrays: tuple[tuple[str, np.dtype[np.generic], tuple[int, ...]], ...]) -> bytes:
    """Return names, types and shapes as bytes."""
    described = bytearray()
    for name, dtype, shape in arrays:
        if dtype.kind not in _KINDS or len(shape) > _MOST_DIMENSIONS:
            raise ValueError(f"{name}: {dtype} {shape}")
        label, kind = name.encode(), dtype.str.encode()
        described += bytes((len(label),)) + label + bytes((len(kind),)) + kind
        described += struct.pack(f"<B{len(shape)}Q", len(shape), *shape)
    return bytes(described)


@lru_cache(maxsize=256)
def _layout(
    description: bytes,
) -> tuple[tuple[str, np.dtype[np.generic], tuple[int, ...], int], ...]:
    """Return name, type, shape and number of items of each array."""
    arrays = []
    place = 0
    while place < len(description):
        size = description[place]
        name = description[place + 1 : place + 1 + size].decode()
        place += 1 + size
        size = description[place]
        kind = np.dtype(description[place + 1 : place + 1 + size].decode())
        place += 1 + size
        dimensions = description[place]
        shape = struct.unpack_from(f"<{dimensions}Q", description, place + 1)
        place += 1 + 8 * dimensions
        arrays.append((name, kind, shape, math.prod(shape)))
    return tuple(arrays)


def decode(index: int, data: bytes) -> dict[str, NDArray[np.generic]]:
    """Return the arrays of a sample; they share memory with ``data`` and cannot be written.

    Raises:
        WireError: damaged bytes, or those of another sample.
    """
    if len(data) < _HEAD.size:
        raise WireError(f"{len(data)} bytes")
    magic, checksum, stored, described = _HEAD.unpack_from(data)
    if magic != _MAGIC or zlib.crc32(memoryview(data)[8:]) != checksum:
        raise WireError("damaged bytes")
    if stored != index:
        raise WireError(f"sample {stored} under the key of {index}")
    # The checksum holds, so what follows was written by `encode`.
    place = _HEAD.size + described
    sample: dict[str, NDArray[np.generic]] = {}
    for name, kind, shape, items in _layout(data[_HEAD.size : place]):
        sample[name] = np.frombuffer(data, kind, items, place).reshape(shape)
        place += items * kind.itemsize
    return sample
