"""NumPy files that are written and read by rows, so that all rows are never in memory together."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray

BLOCK_ROWS = 1 << 17
"""Rows that are read together."""


class RowFile:
    """Writes the bytes that `np.save` writes of all rows; use it as a context.

    Args:
        path: the file.
        dtype: type of an item.
        columns: items of a row; None for an array of one dimension.
    """

    def __init__(self, path: Path, dtype: DTypeLike, columns: int | None = None) -> None:
        self._dtype, self._rows = np.dtype(dtype), 0
        self._columns = () if columns is None else (columns,)
        self._file = path.open("wb")
        self._begin = self._header()

    def add(self, rows: NDArray[Any]) -> None:
        """Append rows ``[n, columns]``, or ``[n]``."""
        self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).data)
        self._rows += len(rows)

    def _header(self) -> int:
        """Write the header for the rows so far; return its length."""
        self._file.seek(0)
        npy.write_array_header_1_0(
            self._file,
            {
                "descr": npy.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": (self._rows, *self._columns),
            },
        )
        return self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # NumPy leaves room in a header for more digits of the first dimension.
        length = self._header()
        self._file.close()
        assert length == self._begin


def _shape(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the header of a file that `np.save` or `RowFile` has written."""
    npy.read_magic(file)
    shape, _, dtype = npy.read_array_header_1_0(file)
    return shape, dtype


def count_rows(path: Path) -> int:
    """Return the number of rows of a file."""
    with path.open("rb") as file:
        return int(_shape(file)[0][0])


def read_rows(path: Path, start: int, end: int) -> NDArray[Any]:
    """Return rows ``start`` to ``end - 1``.

    Read, not mapped: the pages of a map count as memory of the process, and each map holds a file
    open.
    """
    with path.open("rb") as file:
        shape, dtype = _shape(file)
        items = prod(shape[1:])
        file.seek(start * items * dtype.itemsize, 1)
        found = np.fromfile(file, dtype, (end - start) * items)
    return found.reshape(end - start, *shape[1:])


def row_ranges(rows: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of blocks of rows."""
    for start in range(0, rows, BLOCK_ROWS):
        yield start, min(start + BLOCK_ROWS, rows)
