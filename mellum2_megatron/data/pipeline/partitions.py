"""Temporary files of records, cut into parts that fit in memory.

What belongs together is in one part: equal keys, or one range of hashes. So a worker compares as
many records as it likes and holds one part of them. The files lie in the folder of the unfinished
result, on the disk that has room for it, and are gone before the result appears.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

RECORDS_IN_MEMORY = 1 << 22
"""Records of a part, on average: about 250 MB while they are sorted."""

_MOST_PARTS = 1 << 15


def number_type(count: int) -> np.dtype[Any]:
    """Return the smallest signed type that numbers ``count`` things."""
    return np.dtype("<i4" if count < 1 << 31 else "<i8")


def parts_for(records: int) -> int:
    """Return the number of parts for a number of records."""
    return min(max(1, -(-records // RECORDS_IN_MEMORY)), _MOST_PARTS)


class Partitions:
    """Records on disk, in parts.

    Args:
        folder: folder of the files.
        name: beginning of their names.
        dtype: type of a record.
        parts: number of parts.
    """

    def __init__(self, folder: Path, name: str, dtype: DTypeLike, parts: int) -> None:
        self._prefix, self._dtype, self.parts = folder / name, np.dtype(dtype), parts

    def add(self, parts: NDArray[Any], **columns: NDArray[Any]) -> None:
        """Append records.

        Args:
            parts: part of each record ``[n]``.
            columns: values of the record's fields ``[n]``, by name.
        """
        records = np.empty(len(parts), dtype=self._dtype)
        order = np.argsort(parts.astype(np.uint16), kind="stable")
        for name, values in columns.items():
            records[name] = values[order]
        ends = np.cumsum(np.bincount(parts[order].astype(np.int64), minlength=self.parts))
        start = 0
        for part, end in enumerate(ends.tolist()):
            if start < end:
                # Opened anew: a corpus may have more parts than a process may have files.
                with self._path(part).open("ab") as file:
                    file.write(records[start:end].view(np.uint8).data)
            start = end

    def take(self, part: int) -> NDArray[np.void]:
        """Return the records of a part, in the order in which they came, and remove their file."""
        records = self.read(part)
        self._path(part).unlink(missing_ok=True)
        return records

    def read(self, part: int) -> NDArray[np.void]:
        """Return the records of a part, in the order in which they came."""
        path = self._path(part)
        return np.fromfile(path, self._dtype) if path.is_file() else np.zeros(0, self._dtype)

    def _path(self, part: int) -> Path:
        return self._prefix.with_name(f"{self._prefix.name}-{part:05}.bin")


def in_hash_order(
    hashes: Iterable[NDArray[np.uint8]], documents: int, folder: Path
) -> Iterator[NDArray[np.void]]:
    """Yield all documents in the order of their hashes; of equal ones the first comes first.

    Args:
        hashes: hashes ``[n, 16]`` of one document after the other.
        documents: number of documents.
        folder: folder for temporary files.

    Yields:
        Records with ``first`` and ``second``, the halves of the hash, and ``document``, its number.
        Equal hashes are in the same array.
    """
    dtype = [("first", "<u8"), ("second", "<u8"), ("document", number_type(documents))]
    partitions = Partitions(folder, "hashes", dtype, parts_for(documents))
    begin = 0
    for block in hashes:
        words = np.ascontiguousarray(block).view(">u8").reshape(-1, 2).astype(np.uint64)
        parts = ((words[:, 0] >> np.uint64(32)) * np.uint64(partitions.parts)) >> np.uint64(32)
        numbers = np.arange(begin, begin + len(words))
        partitions.add(parts, first=words[:, 0], second=words[:, 1], document=numbers)
        begin += len(words)
    for part in range(partitions.parts):
        records = partitions.take(part)
        order = np.lexsort((records["document"], records["second"], records["first"]))
        yield records[order]
