"""Counts over packs: pieces by source and kind, padding, masked labels."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from mellum2_megatron.data.tokens.pack_files import PackFolder, PackShard, PieceFlag

KINDS = {
    PieceFlag.PSM: "FIM prefix-suffix-middle",
    PieceFlag.SPM: "FIM suffix-prefix-middle",
    PieceFlag.REPOSITORY: "repository",
    PieceFlag.CONTINUED: "continues a cut document",
    PieceFlag.CUT: "goes on in another piece",
}
"""Each flag of a piece in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackReport:
    """Counts over the packs of a split.

    Attributes:
        packs, places: number of packs, and of places in them.
        pieces, tokens: number of pieces by source, and of their tokens.
        kinds: number of pieces by `KINDS`.
        labels: number of labels that count in the loss.
    """

    packs: int
    places: int
    pieces: dict[str, int]
    tokens: dict[str, int]
    kinds: dict[str, int]
    labels: int

    @property
    def padding(self) -> int:
        """Number of padded places."""
        return self.places - sum(self.tokens.values())


def report_packs(folder: PackFolder, split: str) -> PackReport:
    """Count the pieces of a split."""
    packs = labels = 0
    pieces, tokens, kinds = Counter[str](), Counter[str](), Counter[str]()
    for prefix in folder.prefixes(split):
        shard = PackShard(prefix)
        packs += len(shard)
        all_pieces = shard.all_pieces()
        counts = np.bincount(all_pieces.sources, minlength=len(folder.sources))
        weights = np.bincount(all_pieces.sources, all_pieces.lengths, len(folder.sources))
        for name, count, weight in zip(folder.sources, counts, weights, strict=True):
            pieces[name] += int(count)
            tokens[name] += int(weight)
        for flag, words in KINDS.items():
            kinds[words] += int(np.count_nonzero(all_pieces.flags & flag))
        labels += sum(int(shard.counted_labels(pack).sum()) for pack in range(len(shard)))
    return PackReport(
        packs=packs,
        places=packs * folder.sequence_length,
        pieces=dict(pieces),
        tokens=dict(tokens),
        kinds=dict(kinds),
        labels=labels,
    )


def find_pack(folder: PackFolder, split: str, pack: int) -> tuple[PackShard, int]:
    """Return the shard of a split's pack, counted over all shards, and its number there.

    Raises:
        IndexError: there is no such pack.
    """
    if pack < 0:
        raise IndexError(pack)
    for prefix in folder.prefixes(split):
        shard = PackShard(prefix)
        if pack < len(shard):
            return shard, pack
        pack -= len(shard)
    raise IndexError(pack)
