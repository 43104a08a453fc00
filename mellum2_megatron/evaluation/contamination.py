"""Items that the training data holds: n-grams of tokens that both share.

A run of `tokens` tokens that an item shares with the training data is hardly chance: 24 tokens are
about 13 words, the length used for GPT-3 (Brown et al. 2020, App. C). Tokens are compared, so data
and model must have the same tokenizer. FIM cuts and pack borders break a few n-grams, not all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.field_checks import require_positive_int
from mellum2_megatron.data.corpus.near_duplicates import shingles
from mellum2_megatron.data.tokens.pack_files import (
    PACKS_FILE,
    PackFolder,
    PackShard,
    read_pack_folder,
)
from mellum2_megatron.data.tokens.tokenizer import tokenizer_hash

_BLOCK = 1 << 20
"""Tokens of the training data that are hashed at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """What the items of one measure share with the training data.

    Attributes:
        measure: its name.
        items: number of items.
        shared: share of its n-grams that the data has, by the number of the item; others have none.
    """

    measure: str
    items: int
    shared: Mapping[int, float]

    def line(self, folder: Path, tokens: int) -> str:
        """Return one line for a reader."""
        if not self.shared:
            return f"{self.measure}: no item shares {tokens} tokens in a row with {folder}"
        numbers = ", ".join(str(item) for item in list(self.shared)[:10])
        more = ", .." if len(self.shared) > 10 else ""
        return (
            f"{self.measure}: {len(self.shared)} of {self.items} items share {tokens} tokens in a "
            f"row with {folder} (items {numbers}{more}): do not report this measure as unseen"
        )


def open_training_data(folder: Path, tokens: int) -> PackFolder:
    """Return a folder of packs that items are compared with.

    Raises:
        InputError: it is no folder of packs, or ``tokens`` is not positive.
    """
    require_positive_int("--overlap-tokens", tokens)
    if not (folder / PACKS_FILE).is_file():
        raise InputError(
            f"--training-data {folder}",
            rule=f"it is no folder of packs (there is no {PACKS_FILE})",
            fix="name a folder of `mellum2 data prepare`, or a phase of a corpus plan",
        )
    return read_pack_folder(folder, f"--training-data {folder}")


def check_tokenizer_of(data: PackFolder, tokenizer_folder: Path) -> None:
    """Refuse data that was encoded with another tokenizer than the model's.

    Raises:
        InputError: it was.
    """
    if tokenizer_hash(tokenizer_folder) != data.tokenizer["sha256"]:
        raise InputError(
            f"--training-data {data.path}",
            rule="it was encoded with another tokenizer than the model's",
            fix="name data that this model was trained on",
        )


def find_overlaps(
    encode: Callable[[str], Sequence[int]],
    texts: Mapping[str, Sequence[str]],
    data: PackFolder,
    *,
    tokens: int = 24,
) -> list[Overlap]:
    """Return what the items of each measure share with the training split.

    Args:
        encode: token ids of a text, of the tokenizer that made the data.
        texts: measure -> texts of its items.
        data: the training data.
        tokens: length of an n-gram, default 24. A shorter item is compared as a whole, which finds
            it only where another text is as short.
    """
    grams = {
        name: [shingles(np.asarray(encode(text), dtype=np.int64), tokens) for text in items]
        for name, items in texts.items()
    }
    every = [one for items in grams.values() for one in items]
    wanted = np.unique(np.concatenate(every)) if every else np.zeros(0, dtype=np.uint64)
    seen = np.zeros(len(wanted), dtype=np.bool_)
    for prefix in data.prefixes("train"):
        stream = np.asarray(PackShard(prefix).indexed.stream())
        for start in range(0, len(stream), _BLOCK):
            # The next block's first tokens end the n-grams that begin in this one.
            block = stream[start : start + _BLOCK + tokens - 1].astype(np.int64)
            seen |= np.isin(wanted, shingles(block, tokens))
    found = wanted[seen]
    overlaps = []
    for name, items in grams.items():
        shares = {
            number: float(np.isin(one, found).mean())
            for number, one in enumerate(items)
            if len(one)
        }
        overlaps.append(
            Overlap(
                measure=name,
                items=len(items),
                shared={number: share for number, share in shares.items() if share},
            )
        )
    return overlaps
