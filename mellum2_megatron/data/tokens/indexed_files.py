"""Reads the header of a Megatron indexed dataset, and looks at its tokens, without Megatron.

``PREFIX.idx``: magic, version, type of a token, numbers of sequences and document ends, then a
length (int32) and a place in bytes (int64) of each sequence, and the document ends (int64).
``PREFIX.bin``: the tokens. Layout of megatron/core/datasets/indexed_dataset.py:229-320 (0.19.2).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mellum2_megatron.common.errors import InputError, first_line

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""Megatron's code of a token type -> NumPy's name; its two float types hold no ids."""

_MOST_SEQUENCES = 2**31 - 1
"""Megatron numbers them with int32 (megatron/core/datasets/gpt_dataset.py:720, 0.19.2)."""

_READ_WHOLE = 2**20
_WINDOWS, _WINDOW = 64, 2**14
"""A larger file is looked at in windows of `_WINDOW` tokens, evenly spaced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexedFiles:
    """An indexed dataset, as its header describes it.

    Attributes:
        prefix: path without ``.bin`` or ``.idx``.
        sequences: number of sequences.
        tokens: number of tokens.
        dtype: type of a token in the file.
    """

    prefix: Path
    sequences: int
    tokens: int
    dtype: np.dtype[np.generic]

    def lengths(self) -> npt.NDArray[np.int32]:
        """Return the tokens of each sequence, mapped from the index file."""
        return np.memmap(
            f"{self.prefix}.idx",
            dtype=np.int32,
            mode="r",
            offset=_HEADER.size,
            shape=(self.sequences,),
        )

    def stream(self) -> npt.NDArray[np.generic]:
        """Return all tokens, mapped from the file."""
        return np.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r", shape=(self.tokens,))

    def id_range(self) -> tuple[int, int]:
        """Return the lowest and the highest id; of a large file, those of an even sample."""
        tokens = self.stream()
        if self.tokens <= _READ_WHOLE:
            return int(tokens.min()), int(tokens.max())
        starts = np.linspace(0, self.tokens - _WINDOW, _WINDOWS).astype(np.int64)
        looked_at = np.concatenate([tokens[start : start + _WINDOW] for start in starts])
        return int(looked_at.min()), int(looked_at.max())


def read_indexed(prefix: Path, name: str) -> IndexedFiles:
    """Read and check the header and the sizes of an indexed dataset.

    Args:
        prefix: path without ``.bin`` or ``.idx``.
        name: the user's name for it (``data.train: web``), for messages.

    Raises:
        InputError: a file is missing, unreadable, no indexed dataset, or cut short.
    """
    bin_file, idx_file = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for file in (bin_file, idx_file):
        if not file.is_file():
            fix = "name a folder of `mellum2 data prepare`, or correct the prefix"
            if prefix.suffix in (".bin", ".idx"):
                fix = f"leave the suffix out: {prefix.with_suffix('')}"
            raise InputError(
                name,
                rule=f"{file} does not exist; a prefix is the common path of a .bin and an .idx "
                "file",
                fix=fix,
            )
    again = "write the dataset again, with Megatron's tools or `mellum2 data prepare`"
    try:
        idx_size, bin_size = idx_file.stat().st_size, bin_file.stat().st_size
        with bin_file.open("rb"), idx_file.open("rb") as stream:
            header = stream.read(_HEADER.size)
            if len(header) < _HEADER.size or not header.startswith(_MAGIC):
                raise InputError(name, rule=f"{idx_file} is not a Megatron index", fix=again)
            _, version, code, sequences, ends = _HEADER.unpack(header)
            if version != 1 or code not in _TYPES:
                raise InputError(
                    name,
                    rule=f"{idx_file} has version {version} and token type {code}; "
                    f"version 1 and the types {sorted(_TYPES)} are read",
                    fix=again,
                )
            dtype = np.dtype(_TYPES[code])
            needed = _HEADER.size + 12 * sequences + 8 * ends
            if idx_size < needed:
                raise InputError(
                    name,
                    rule=f"{idx_file} has {idx_size:,} bytes, its header describes {needed:,}",
                    fix=again,
                )
            if sequences > _MOST_SEQUENCES:
                raise InputError(
                    name,
                    rule=f"{idx_file} has {sequences:,} sequences, and Megatron numbers at most "
                    f"{_MOST_SEQUENCES:,} of one set",
                    fix="write several sets and blend them (data.train)",
                )
            tokens = 0
            if sequences:
                stream.seek(_HEADER.size + 4 * (sequences - 1))
                (last_length,) = struct.unpack("<i", stream.read(4))
                stream.seek(_HEADER.size + 12 * sequences - 8)
                (last_place,) = struct.unpack("<q", stream.read(8))
                tokens = last_place // dtype.itemsize + last_length
    except OSError as error:
        raise InputError(
            name, rule=f"it cannot be read ({first_line(error)})", fix="make it readable"
        ) from None
    if not sequences or not tokens:
        raise InputError(
            name, rule=f"{prefix} holds no tokens", fix="leave it out, or prepare it with documents"
        )
    if bin_size != tokens * dtype.itemsize:
        raise InputError(
            name,
            rule=f"{bin_file} has {bin_size:,} bytes, its index describes "
            f"{tokens * dtype.itemsize:,}",
            fix=again,
        )
    return IndexedFiles(prefix=prefix, sequences=sequences, tokens=tokens, dtype=dtype)
