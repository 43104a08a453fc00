"""Near-duplicates: MinHash over token 5-grams, bands, connected components, one survivor each.

Signatures are made on token ids instead of text, which is five times faster and sees the same
repetitions. A document's set of shingles is the set of its 5-grams of ids. Its signature holds 112
minima (Broder 1997); two signatures agree in one place with the probability of their sets' Jaccard
similarity. Documents that agree in all 8 rows of one of 14 bands are candidates: 77% of pairs at
similarity 0.75 are, 98% at 0.85, 3% at 0.5 (14 x 8 as FineWeb's and datatrove's).

Source code is compared per file over the whole source: the survivor of a component is its document
with the smallest hash. Web text is compared within a phase (report §3): a document goes where an
earlier one of the phase is its duplicate, earlier in the order in which phases take documents.
Signatures are a function of one document, components and places of the set of all, so survivors
depend neither on the order of documents nor on how the work was cut into tasks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mellum2_megatron.common.field_checks import require, require_not_negative, require_positive
from mellum2_megatron.common.splitmix import mix

Words = NDArray[np.uint64]
_ODD = np.uint64(0x9E3779B97F4A7C15)
_BASE = np.uint64(0xD6E8FEB86659FD93)


MOST_PERMUTATIONS = 4096
"""Largest signature; every document is hashed as many times."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NearDuplicateSettings:
    """Shape of the signatures, and what counts as a duplicate.

    Attributes:
        shingle: tokens of a shingle, default 5.
        bands, rows: bands of a signature and minima of a band, default 14 and 8.
        seed: seed of the permutations, default 1.
        verify: compare candidates by the exact Jaccard similarity of their shingles, default false:
            the signatures' agreement in one band decides.
        threshold: similarity from which on verified candidates are duplicates, default 0.7.

    Raises:
        InputError: a number below 1, too long signatures, or a threshold outside 0 to 1.
    """

    shingle: int = 5
    bands: int = 14
    rows: int = 8
    seed: int = 1
    verify: bool = False
    threshold: float = 0.7

    def __post_init__(self) -> None:
        for name in ("shingle", "bands", "rows"):
            require_positive(f"near_duplicates.{name}", getattr(self, name))
        require(
            self.permutations <= MOST_PERMUTATIONS,
            f"near_duplicates: {self.bands} bands of {self.rows} rows",
            rule=f"a signature has at most {MOST_PERMUTATIONS} minima",
            fix="use 14 bands of 8 rows",
        )
        require_not_negative("near_duplicates.seed", self.seed, fix="use 1")
        require(
            0 < self.threshold <= 1,
            f"near_duplicates.threshold={self.threshold}",
            rule="it must be a similarity above 0, up to 1",
            fix="use 0.7",
        )

    @property
    def permutations(self) -> int:
        """Minima of a signature."""
        return self.bands * self.rows


def shingles(ids: NDArray[np.integer], shingle: int) -> Words:
    """Return the sorted unique hashes of a document's n-grams."""
    return np.unique(ngrams(ids, shingle))


def ngrams(ids: NDArray[np.integer], shingle: int) -> Words:
    """Return hashes of all n-grams ``[n - shingle + 1]``; a shorter document is one n-gram."""
    if len(ids) == 0:
        return np.zeros(0, dtype=np.uint64)
    tokens = ids.astype(np.uint64)
    tokens += np.uint64(1)
    tokens *= _ODD
    tokens ^= tokens >> np.uint64(29)
    places = max(len(tokens) - shingle, 0) + 1
    # Horner's rule, at all places at once.
    hashes = tokens[:places].copy()
    for offset in range(1, min(shingle, len(tokens))):
        hashes *= _BASE
        hashes += tokens[offset : offset + places]
    mixed: Words = mix(hashes)
    return mixed


def has_rensa() -> bool:
    """Return true where rensa, 30 times faster than numpy here, is installed."""
    return importlib.util.find_spec("rensa") is not None


def minhash_version() -> str:
    """Return the name of the algorithm, part of what a result is named by.

    Signatures of the two implementations, or of two versions of rensa, cannot be compared.
    """
    if not has_rensa():
        return "numpy-1"
    from rensa import RMinHash

    return f"rensa-{RMinHash.ALGORITHM_VERSION}"


def signatures(
    documents: Sequence[NDArray[np.integer]], settings: NearDuplicateSettings
) -> NDArray[np.uint32]:
    """Return the MinHash signatures ``[documents, bands * rows]`` of documents' token ids.

    A document without tokens gets the largest value everywhere.
    """
    # A minimum does not mind repeats, and making each hash unique would take half the time.
    sets = [ngrams(ids, settings.shingle) for ids in documents]
    offsets = np.zeros(len(sets) + 1, dtype=np.int64)
    np.cumsum([len(one) for one in sets], out=offsets[1:])
    flat = np.concatenate(sets) if sets else np.zeros(0, dtype=np.uint64)
    if not has_rensa():
        return numpy_signatures(flat, offsets, settings)
    from rensa import RMinHash

    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        flat, offsets.astype(np.uint64), settings.permutations, settings.seed
    )
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(-1, settings.permutations)


def numpy_signatures(
    flat: Words, offsets: NDArray[np.int64], settings: NearDuplicateSettings
) -> NDArray[np.uint32]:
    """Return signatures of documents' shingles, joined in ``flat`` and cut at ``offsets``."""
    # A keyed mix is a permutation of the 64-bit words; its upper half is the value compared.
    keys = mix(np.arange(1, settings.permutations + 1, dtype=np.uint64) * _ODD + settings.seed)
    result = np.full((len(offsets) - 1, settings.permutations), 0xFFFFFFFF, dtype=np.uint32)
    filled = np.flatnonzero(np.diff(offsets))
    if not len(filled):
        return result
    starts = offsets[:-1][filled]
    for place, key in enumerate(keys):
        values = (mix(flat ^ key) >> np.uint64(32)).astype(np.uint32)
        result[filled, place] = np.minimum.reduceat(values, starts)
    return result


def band_keys(signature: NDArray[np.uint32], settings: NearDuplicateSettings) -> NDArray[np.uint64]:
    """Return one key for each band ``[documents, bands]``; equal keys make candidates.

    The number of the band is part of the key, so that keys of all bands can share a table.
    """
    rows = signature.reshape(len(signature), settings.bands, settings.rows).astype(np.uint64)
    keys = np.broadcast_to(
        np.arange(settings.bands, dtype=np.uint64) + np.uint64(1), rows.shape[:2]
    ).copy()
    for place in range(settings.rows):
        keys = mix(keys * _ODD + rows[:, :, place])
    return keys


def shared_keys(
    keys: NDArray[np.uint64], documents: NDArray[np.integer]
) -> tuple[NDArray[np.uint64], NDArray[np.integer]]:
    """Return the rows whose key is in another row too, sorted by key.

    ``keys`` ``[m]`` are any rows' band keys, ``documents`` ``[m]`` the documents they belong to.
    """
    order = np.argsort(keys)
    in_turn = keys[order]
    equal = in_turn[1:] == in_turn[:-1]
    same = np.zeros(len(keys), dtype=bool)
    same[:-1] |= equal
    same[1:] |= equal
    return in_turn[same], documents[order[same]]


def candidate_pairs(keys: NDArray[np.uint64], documents: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return pairs ``[n, 2]`` of documents with a key in common; see `shared_keys`.

    Documents of one key make a chain and not all pairs, which is enough for components and keeps a
    key of a million documents cheap. A task may join the keys of one hash prefix alone.
    """
    keys, documents = shared_keys(keys, documents)
    order = np.lexsort((documents, keys))
    keys, documents = keys[order], documents[order]
    same = (keys[1:] == keys[:-1]) & (documents[1:] != documents[:-1])
    pairs = np.stack((documents[:-1][same], documents[1:][same]), axis=1)
    return np.unique(pairs, axis=0)


def all_candidate_pairs(
    keys: NDArray[np.uint64], documents: NDArray[np.integer]
) -> Iterator[NDArray[np.int64]]:
    """Yield pairs ``[n, 2]`` of every two documents of a key, for exact comparison.

    An array holds the pairs of one document in one key. The work is quadratic in the documents of a
    key, the memory is not.
    """
    keys, documents = shared_keys(keys, documents)
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    for start, end in pairwise([*starts.tolist(), len(keys)]):
        members = np.unique(documents[start:end]).astype(np.int64)
        for place in range(len(members) - 1):
            others = members[place + 1 :]
            yield np.stack((np.full_like(others, members[place]), others), axis=1)


def jaccard(one: Words, other: Words) -> float:
    """Return the exact similarity of two sorted unique shingle sets; two empty sets are equal."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    union = len(one) + len(other) - common
    return common / union if union else 1.0


def verified(
    pairs: NDArray[np.int64], sets: Callable[[int], Words], settings: NearDuplicateSettings
) -> NDArray[np.int64]:
    """Return the pairs whose exact similarity reaches the threshold."""
    keep = [jaccard(sets(int(a)), sets(int(b))) >= settings.threshold for a, b in pairs]
    chosen: NDArray[np.int64] = pairs[np.array(keep, dtype=bool)]
    return chosen


class Components:
    """Connected components of documents, as their pairs come; 4 bytes for each document.

    Documents are numbered in the order in which they would stay. The first of a component survives.

    Args:
        count: number of documents.
    """

    def __init__(self, count: int) -> None:
        # A document further to the front of its component; the first has itself.
        self._ahead = np.arange(count, dtype=np.int32 if count < 1 << 31 else np.int64)

    def first(self, documents: NDArray[np.integer]) -> NDArray[np.integer]:
        """Return the first document of each one's component ``[n]``."""
        found: NDArray[np.integer] = self._ahead[documents]
        while not ((ahead := self._ahead[found]) == found).all():
            found = ahead
        self._ahead[documents] = found
        return found

    def join(self, pairs: NDArray[np.int64]) -> None:
        """Make one component of the components of each pair ``[n, 2]``."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        ends = self.first(pairs.ravel()).reshape(-1, 2)
        ends = ends[ends[:, 0] != ends[:, 1]]
        if not len(ends):
            return
        members, places = np.unique(ends, return_inverse=True)
        one, other = places.reshape(-1, 2).T
        links = coo_matrix((np.ones(len(one), bool), (one, other)), shape=(len(members),) * 2)
        _, labels = connected_components(links, directed=False)
        # Members are in order, so a label's first place is that of its first document.
        _, firsts = np.unique(labels, return_index=True)
        self._ahead[members] = members[firsts[labels]]

    def apart(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the pairs whose documents are in two components."""
        ends = self.first(pairs.ravel()).reshape(-1, 2)
        chosen: NDArray[np.int64] = pairs[ends[:, 0] != ends[:, 1]]
        return chosen

    def survive(self, documents: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Return true for each document that is the first of its component ``[n]``."""
        kept: NDArray[np.bool_] = self._ahead[documents] == documents
        return kept


def later_ones(
    keys: NDArray[np.uint64], documents: NDArray[np.integer], places: NDArray[np.int64]
) -> NDArray[np.integer]:
    """Return the documents that share a key with a document of an earlier place.

    Args:
        keys, documents: rows as `shared_keys` returns them.
        places: place of each row's document ``[m]``, another for each document.
    """
    if not len(keys):
        return documents
    starts = np.append(True, keys[1:] != keys[:-1])
    earliest = np.minimum.reduceat(places, np.flatnonzero(starts))
    later: NDArray[np.integer] = documents[places != earliest[np.cumsum(starts) - 1]]
    return later
