"""Sums of a validation by document and by position, one file a validation.

``validation/step_0000100.npz`` in a run's folder holds, for each document of each validation set,
its tokens, its bytes and its sum of nats. From them come the loss, bits per byte, and intervals of
differences over documents. Only tokens count that the loss counts.
"""

from __future__ import annotations

import math
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.common.files import atomic_path

FOLDER = "validation"
FORMAT = 1

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_NAME = re.compile(r"step_(\d+)\.npz")
_DOCUMENTS: dict[str, type[np.generic]] = {
    "document": np.uint64,
    "corpus": np.int64,
    "tokens": np.int64,
    "bytes": np.int64,
    "nats": np.float64,
}
_POSITIONS: dict[str, type[np.generic]] = {
    "position_start": np.int64,
    "position_tokens": np.int64,
    "position_nats": np.float64,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationSums:
    """Sums of one validation; documents `[d]` in the order of corpus and document.

    Attributes:
        corpora: name of each validation set.
        document: hash of a document in packs, else its number in the files of its set.
        corpus: number of its set.
        tokens, bytes: size of the part of it that was scored.
        nats: sum of the loss of these tokens.
        position_start: first position of each bucket, see `position_starts`.
        position_tokens, position_nats: sums by corpus and position, `[corpora, buckets]`. Positions
            count as the model counts them: from the document's start where attention stays in it,
            else from the window's.
    """

    corpora: tuple[str, ...]
    document: npt.NDArray[np.uint64]
    corpus: Integers
    tokens: Integers
    bytes: Integers
    nats: Floats
    position_start: Integers
    position_tokens: Integers
    position_nats: Floats

    @property
    def loss(self) -> float:
        """Loss over all sets, nats a token; NaN without a token."""
        tokens = int(self.tokens.sum())
        return float(self.nats.sum()) / tokens if tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Loss over all sets, bits a byte of text; NaN without a byte."""
        size = int(self.bytes.sum())
        return float(self.nats.sum()) / math.log(2) / size if size else math.nan

    def loss_between(self, first: int, end: int) -> float | None:
        """Return the loss of the positions from `first` to before `end`, nats a token.

        None if a bucket crosses a bound, or has no token.
        """
        bounds = [*self.position_start.tolist(), end]
        if first not in bounds or end not in bounds:
            return None
        here = (self.position_start >= first) & (self.position_start < end)
        tokens = int(self.position_tokens[:, here].sum())
        return float(self.position_nats[:, here].sum()) / tokens if tokens else None

    def write(self, folder: Path, step: int) -> Path:
        """Write the file of a step into a run's folder; a file of that name is replaced."""
        path = folder / FOLDER / f"step_{step:07d}.npz"
        path.parent.mkdir(exist_ok=True)
        arrays = {name: getattr(self, name) for name in (*_DOCUMENTS, *_POSITIONS)}
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(
                stream, format=np.array(FORMAT), corpora=np.array(self.corpora), **arrays
            )
        return path


def position_starts(length: int) -> Integers:
    """Return the first position of each bucket: powers of two, and half-way between them.

    >>> position_starts(24).tolist()
    [0, 1, 2, 3, 4, 6, 8, 12, 16]
    """
    starts = [0, 1, *(step << k for k in range(length.bit_length()) for step in (2, 3))]
    return np.array([start for start in starts if start < length], dtype=np.int64)


def sums_files(folder: Path) -> dict[int, Path]:
    """Return the files of a run's validations by step, in order; none if it wrote none."""
    found = {}
    for path in (folder / FOLDER).glob("step_*.npz"):
        match = _NAME.fullmatch(path.name)
        if match:
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def drop_sums_after(folder: Path, step: int) -> None:
    """Remove the files of validations after a step, which a resume from it writes again."""
    for number, path in sums_files(folder).items():
        if number > step:
            path.unlink()


def read_sums(path: Path) -> ValidationSums:
    """Read the file of one validation.

    Raises:
        InputError: the file is missing, damaged, or of another format.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            if int(content["format"]) != FORMAT:
                raise ValueError(f"format {int(content['format'])}, this version reads {FORMAT}")
            corpora = tuple(str(name) for name in content["corpora"])
            arrays = {name: content[name] for name in (*_DOCUMENTS, *_POSITIONS)}
        for name, dtype in (_DOCUMENTS | _POSITIONS).items():
            if arrays[name].dtype != dtype:
                raise ValueError(f"{name} has type {arrays[name].dtype}")
        if len({arrays[name].shape for name in _DOCUMENTS}) != 1 or arrays["nats"].ndim != 1:
            raise ValueError("its columns have different lengths")
        buckets = arrays["position_nats"].shape
        if len(buckets) != 2 or buckets[0] != len(corpora):
            raise ValueError(f"{len(corpora)} corpora and positions {buckets}")
        if {arrays["position_tokens"].shape, (len(corpora), *arrays["position_start"].shape)} != {
            buckets
        }:
            raise ValueError("its positions have different shapes")
        numbers = arrays["corpus"]
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(corpora):
            raise ValueError("it names a corpus that it does not have")
        return ValidationSums(corpora=corpora, **arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            str(path),
            rule=f"it is not a readable file of validation sums ({first_line(error)})",
            fix="remove it, and validate again",
        ) from error
