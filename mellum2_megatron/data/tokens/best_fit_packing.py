"""Best-fit packing of pieces into packs (Ding et al., "Fewer Truncations", ICML 2024).

The longest piece comes first, and each goes to the fullest pack it still fits. Only documents
longer than a pack are cut. Pure functions, arrays in and arrays out::

    pieces = cut_documents(lengths, capacity=8192, policy="cut")
    packs = best_fit(pieces.lengths, capacity=8192)
    order = shuffle(packs, seed=1234)      # pieces of pack p: order.pieces[order.starts[p]:...]

Exactly the greedy rule, in steps of whole groups. A pack of room k takes ``k // l`` pieces of
length l in a row: after the first it is still the fullest that fits, or fits none. So all packs of
one room are served at once, and the number of steps is that of pairs (length, room), not of pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Policy = Literal["cut", "drop", "pad"]
PieceOrder = Literal["random", "longest_first", "shortest_first"]
"""Order of the pieces in a pack; best fit by itself puts the longest first."""

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """Pieces of documents, in the order of the documents.

    Attributes:
        documents: number of each piece's document, `[n]`.
        starts: place of each piece in its document, in tokens, `[n]`; above 0 for a piece that
            continues a cut one.
        lengths: tokens of each piece, 1 to the capacity, `[n]`.
        dropped: numbers of the documents that are left out.
    """

    documents: Integers
    starts: Integers
    lengths: Integers
    dropped: Integers


@dataclass(frozen=True, kw_only=True, slots=True)
class PackOrder:
    """Pieces in the order in which packs are written.

    Attributes:
        pieces: number of each piece, `[n]`.
        starts: place in `pieces` at which each pack begins, then `n`, `[packs + 1]`.
    """

    pieces: Integers
    starts: Integers


def cut_documents(lengths: npt.ArrayLike, *, capacity: int, policy: Policy = "cut") -> Pieces:
    """Return the pieces of documents; empty documents have none.

    Args:
        lengths: tokens of each document.
        capacity: tokens of a pack.
        policy: ``cut``: a longer document becomes pieces of `capacity` and a rest. ``drop``: it is
            left out (the report's rule for SFT, §5.1). ``pad``: cut as well; with `pack` each piece
            then gets a pack of its own.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    if capacity < 1 or (tokens.size and tokens.min() < 0):
        raise ValueError(f"documents of {tokens.min()} tokens, packs of {capacity}")
    numbers = np.arange(tokens.size)
    dropped = numbers[tokens > capacity] if policy == "drop" else numbers[:0]
    counts = -(-tokens // capacity)
    counts[dropped] = 0
    documents = np.repeat(numbers, counts)
    first = np.cumsum(counts) - counts
    starts = (np.arange(documents.size) - first[documents]) * capacity
    return Pieces(
        documents=documents,
        starts=starts,
        lengths=np.minimum(tokens[documents] - starts, capacity),
        dropped=dropped,
    )


def pack(lengths: npt.ArrayLike, *, capacity: int, policy: Policy = "cut") -> Integers:
    """Return the number of each piece's pack: best fit, or for ``pad`` a pack for each piece."""
    if policy == "pad":
        return np.arange(np.asarray(lengths).size)
    return best_fit(lengths, capacity=capacity)


def best_fit(lengths: npt.ArrayLike, *, capacity: int) -> Integers:
    """Return the number of each piece's pack, `[n]`, from 0 without holes.

    Args:
        lengths: tokens of each piece, 1 to `capacity`; with padding between pieces, their rooms.
        capacity: tokens of a pack.

    Raises:
        ValueError: a length outside its range.
    """
    tokens = np.asarray(lengths)
    if not tokens.size:
        return np.empty(0, dtype=np.int64)
    if tokens.min() < 1 or tokens.max() > capacity:
        raise ValueError(f"pieces of {tokens.min()} to {tokens.max()} tokens, packs of {capacity}")
    # 16-bit keys are sorted by counting, several times faster.
    small = np.uint16 if capacity <= 0xFFFF else np.int32
    by_length = np.argsort((capacity - tokens).astype(small), kind="stable")
    counts = np.bincount(tokens, minlength=capacity + 1)
    packs = np.empty(tokens.size, dtype=np.int64)
    # Packs with each room left, and a bit for each room that has any.
    rooms: dict[int, list[Integers]] = {}
    present = 0
    done = opened = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            fitting = present >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                stack = rooms[room]
                numbers = stack.pop()
                if not stack:
                    present &= ~(1 << room)
            else:
                room = capacity
                new = -(-left // (capacity // length))
                numbers = np.arange(opened, opened + new)
                opened += new
            each = room // length
            full, rest = min(left // each, numbers.size), 0
            if full < numbers.size:
                rest = left - full * each
            taken = full * each + rest
            pieces = by_length[done : done + taken]
            packs[pieces[: full * each]] = np.repeat(numbers[:full], each)
            after = [(numbers[:full], room - each * length)]
            if full < numbers.size:
                packs[pieces[full * each :]] = numbers[full]
                after.append((numbers[full : full + 1], room - rest * length))
                after.append((numbers[full + 1 :], room))
            for group, remaining in after:
                if group.size and remaining:
                    rooms.setdefault(remaining, []).append(group)
                    present |= 1 << remaining
            done += taken
            left -= taken
    return packs


def shuffle(packs: Integers, *, seed: int, rank: Integers | None = None) -> PackOrder:
    """Return packs in a random order, and the pieces of each pack in a random order or by rank.

    Best fit leaves long pieces in early packs and first in their pack. Training would then see
    lengths, and so sources, in an order of their own.

    Args:
        packs: number of each piece's pack, from 0 without holes.
        seed: seed of both orders; the order of packs is that of the seed with any `rank`.
        rank: number of each piece by which those of a pack are sorted, `[n]`, equal ones at random.
            None (default): all equal.
    """
    # Raw words of a counter-based generator: NumPy keeps that stream fixed.
    generator = np.random.Philox(key=seed)
    count = int(packs.max()) + 1 if packs.size else 0
    place = np.empty(count, dtype=np.int64)
    place[np.argsort(generator.random_raw(count), kind="stable")] = np.arange(count)
    placed = place[packs]
    drawn = generator.random_raw(packs.size)
    pieces = np.lexsort((drawn, placed) if rank is None else (drawn, rank, placed))
    starts = np.concatenate(([0], np.cumsum(np.bincount(placed, minlength=count))))
    return PackOrder(pieces=pieces, starts=starts)
