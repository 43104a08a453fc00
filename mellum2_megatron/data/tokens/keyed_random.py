"""Random numbers that depend on a key alone: same key, same numbers, in any order of calls.

Work that is split over processes, or repeated after a crash, needs draws that do not depend on what
was drawn before. Each document therefore owns a counter of a keyed generator (Philox 4x64, Salmon
et al. 2011): its draws are a function of (seed, phase, epoch, document), and of nothing else.
"""

from __future__ import annotations

import hashlib

import numpy as np

_WORD = 1 << 64


class KeyedRandom:
    """Draws for the documents of one (seed, phase, epoch).

    Only raw 64-bit words of numpy's Philox are used. Numpy keeps that stream fixed, but may change
    the methods of its ``Generator``.
    """

    def __init__(self, seed: int, *purpose: str | int) -> None:
        """Make the generator of a seed and a purpose, such as ``("fim", phase, epoch)``."""
        text = "\0".join([str(seed), *(str(part) for part in purpose)])
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        self._key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def words(self, document: int, count: int) -> list[int]:
        """Return ``count`` uniform 64-bit words of a document, given its hash of up to 128 bits."""
        # Draws advance the two low words of the counter; the document is the two high ones.
        counter = np.array([0, 0, document % _WORD, (document // _WORD) % _WORD], dtype=np.uint64)
        raw = np.random.Philox(key=self._key, counter=counter).random_raw(count)
        return [int(word) for word in np.atleast_1d(raw)]


def below(word: int, limit: int) -> int:
    """Map a uniform 64-bit word to 0 .. limit-1; the bias is below ``limit / 2**64``."""
    return word * limit >> 64


def happens(word: int, rate: float) -> bool:
    """Map a uniform 64-bit word to true with probability ``rate``."""
    return word < int(rate * _WORD)
