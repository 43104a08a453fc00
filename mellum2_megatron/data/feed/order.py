"""The order of samples, computed on the fly: keyed permutations and the schedule of a blend.

Nothing is built at the start of a run and nothing is stored. Any process can name the sample of any
step from the seed, the weights and the sizes alone. The results are those of integer arithmetic
written out here, so no library's random numbers can change them.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from mellum2_megatron.common.splitmix import MASK, Integers, mix

_ROUNDS = 8
_SORTED_BELOW = 4096
"""Counts below it are permuted by sorting hashes: a network of so few bits mixes badly."""

BLOCK = 64
"""Samples of a blend after which every source has its exact share."""


def key_of(*parts: int | str) -> int:
    """Return a 64-bit key of some numbers and names, the same on every machine."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little")


class Permutation:
    """A keyed permutation of `0 ... count - 1`, without a table.

    A Feistel network permutes the numbers of `2 h` bits, of which there are fewer than four times
    `count`. A result outside the range is permuted again until it lies inside (cycle walking),
    which leaves a permutation of the range.

    Args:
        count: number of items, 1 or more.
        key: 64-bit key, see `key_of`; another key gives another order.
    """

    def __init__(self, count: int, key: int) -> None:
        if count < 1:
            raise ValueError(f"a permutation of {count} items")
        self.count = count
        self._table: npt.NDArray[np.int64] | None = None
        if count < _SORTED_BELOW:
            numbers = np.arange(count, dtype=np.uint64)
            self._table = np.argsort(mix(mix(numbers ^ np.uint64(key))), kind="stable")
            return
        self._half = ((count - 1).bit_length() + 1) // 2
        self._keys = [mix((key + number * 0x9E3779B97F4A7C15) & MASK) for number in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Return the item at place `index`."""
        if not 0 <= index < self.count:
            raise IndexError(f"item {index} of {self.count}")
        if self._table is not None:
            return int(self._table[index])
        value: int = self._network(index)
        while value >= self.count:
            value = self._network(value)
        return value

    def many(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the items at several places, `[n]`; the same as one by one."""
        if self._table is not None:
            return self._table[indices]
        values = self._network(indices.astype(np.uint64))
        outside = np.flatnonzero(values >= self.count)
        while outside.size:
            values[outside] = self._network(values[outside])
            outside = outside[values[outside] >= self.count]
        items: npt.NDArray[np.int64] = values.astype(np.int64)
        return items

    def _network(self, value: Integers) -> Integers:
        mask = (1 << self._half) - 1
        left, right = value >> self._half, value & mask
        for key in self._keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        return (left << self._half) | right


class BlendSchedule:
    """The source of each sample of a blend, and the sample's number in that source.

    Of the first n samples every source gets the share of Sainte-Laguë's method: n split in
    proportion to the weights, rounded so that a longer run only adds to each share. This holds
    after every `BLOCK` samples; within a block the sources come in a keyed order. The schedule
    depends on weights and key, not on the length of the run.

    Args:
        weights: weight of each source, positive; their decimal digits count exactly.
        key: 64-bit key, see `key_of`.
    """

    def __init__(self, weights: Sequence[float], key: int) -> None:
        fractions = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(fraction.denominator for fraction in fractions))
        self._weights = [int(fraction * scale) for fraction in fractions]
        if not self._weights or min(self._weights) <= 0:
            raise ValueError(f"weights {list(weights)}")
        self._key = key
        self._block: tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None

    def shares(self, samples: int) -> list[int]:
        """Return the number of samples of each source among `samples` (a multiple of `BLOCK`).

        For another number it is the share that the method gives; see `counts`.
        """
        weights, total = self._weights, sum(self._weights)
        counts = [(2 * samples * weight + total) // (2 * total) for weight in weights]
        # All tickets (2 m + 1) / weight up to one value are in. Single ones are then added or
        # taken back in their order, ties by number.
        missing = samples - sum(counts)
        if missing > 0:
            heap = [
                (Fraction(2 * count + 1, weight), number)
                for number, (count, weight) in enumerate(zip(counts, weights, strict=True))
            ]
            heapq.heapify(heap)
            for _ in range(missing):
                number = heap[0][1]
                counts[number] += 1
                heapq.heapreplace(heap, (Fraction(2 * counts[number] + 1, weights[number]), number))
        for _ in range(-missing):
            number = max(
                (number for number, count in enumerate(counts) if count),
                key=lambda number: (Fraction(2 * counts[number] - 1, weights[number]), number),
            )
            counts[number] -= 1
        return counts

    def counts(self, samples: int) -> list[int]:
        """Return the exact number of samples of each source among the first `samples`."""
        block, rest = divmod(samples, BLOCK)
        counts = self.shares(block * BLOCK)
        if rest:
            sources, _ = self._of_block(block)
            for number in sources[:rest].tolist():
                counts[number] += 1
        return counts

    def locate(self, sample: int) -> tuple[int, int]:
        """Return the source of a sample, and the sample's number among those of its source."""
        block, place = divmod(sample, BLOCK)
        sources, numbers = self._of_block(block)
        return int(sources[place]), int(numbers[place])

    def _of_block(self, block: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return source and number of each sample of a block, `[BLOCK]` each; the last is kept."""
        if self._block is not None and self._block[0] == block:
            return self._block[1:]
        before, after = self.shares(block * BLOCK), self.shares((block + 1) * BLOCK)
        order = Permutation(BLOCK, key_of(self._key, block)).many(np.arange(BLOCK))
        sources = np.repeat(np.arange(len(before)), np.subtract(after, before))[order]
        numbers = np.empty(BLOCK, dtype=np.int64)
        for source in np.unique(sources):
            places = np.flatnonzero(sources == source)
            numbers[places] = before[source] + np.arange(places.size)
        self._block = block, sources, numbers
        return sources, numbers
