"""Rows of JSON Lines and parquet files, one after the other, in constant memory.

A row that cannot be read is yielded as a :class:`BadRow`, so that the reader may go on behind it.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.data.corpus.left_out import printable
from mellum2_megatron.data.corpus.listing import SourceFile, unreadable

_BOM = b"\xef\xbb\xbf"
_LFS = b"version https://git-lfs"
_BATCH_BYTES = 8 << 20
# Few: rows may be sorted by length, so the average of their group says little about the longest.
_BATCH_ROWS = 256
# Small: a block may unpack to thousands of times its size.
_PACKED_BLOCK = 1 << 14
_SIGNATURES = {
    b"\x1f\x8b": "gzip data",
    b"\x28\xb5\x2f\xfd": "zstd data",
    b"PAR1": "parquet data",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
_EXPECTED = {"jsonl.gz": "gzip data", "jsonl.zst": "zstd data", "parquet": "parquet data"}

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        why: its fault, such as ``not UTF-8 (byte 0xe9 at 17)``.
        too_large: true if it is only longer than the limit.
    """

    why: str
    too_large: bool = False


def read_rows(
    file: SourceFile,
    *,
    columns: Callable[[Sequence[str]], Sequence[str]] | None = None,
    max_row_bytes: int | None = None,
    whole_numbers: bool = False,
) -> Iterator[tuple[int, Row | BadRow]]:
    """Yield each row of a file with its number from 1; for JSON Lines the line's number.

    Blank lines are passed over. A byte order mark at the start of a line is dropped.

    Args:
        file: a file whose format is not ``text``.
        columns: given the names of all columns of a parquet file, those to read; default all.
        max_row_bytes: longer rows are bad ones, and longer lines are never held in memory;
            default no limit.
        whole_numbers: keep whole numbers of JSON as such; default False: all become floats.

    Raises:
        InputError: the file is not of its format, is damaged or cut off, or a package that reads
            it is missing.
    """
    _check_signature(file)
    if file.format == "parquet":
        yield from _parquet_rows(file, columns, max_row_bytes)
        return
    number = 0
    try:
        with _open_lines(file) as stream:
            for number, line in _lines(stream, max_row_bytes):
                if isinstance(line, BadRow):
                    yield number, line
                elif line.strip():
                    yield number, _json_row(line, int if whole_numbers else float)
    except OSError as error:
        if error.errno is not None:
            raise unreadable(printable(file.path), error) from error
        raise _damaged(file, number + 1, error) from error
    except (EOFError, zlib.error) as error:
        raise _damaged(file, number + 1, error) from error


def place(file: SourceFile, number: int) -> str:
    """Return the name of a row in messages: ``in/a.jsonl line 3``, ``in/a.parquet row 3``."""
    kind = "row" if file.format == "parquet" else "line"
    return f"{printable(file.path)} {kind} {number}"


def _damaged(file: SourceFile, number: int, error: BaseException) -> InputError:
    return InputError(
        place(file, number),
        rule=f"the file is damaged or cut off ({first_line(error)})",
        fix="fetch or write the file again",
    )


def _check_signature(file: SourceFile) -> None:
    """Refuse a file whose first bytes are those of another format than its name says.

    Raises:
        InputError: as said, or the file is a Git LFS pointer.
    """
    try:
        with file.path.open("rb") as stream:
            head = stream.read(len(_LFS))
    except OSError as error:
        raise unreadable(printable(file.path), error) from error
    if head == _LFS:
        raise InputError(
            printable(file.path),
            rule="it is a Git LFS pointer, not the file itself",
            fix="fetch the file with `git lfs pull`",
        )
    found = next((name for start, name in _SIGNATURES.items() if head.startswith(start)), None)
    expected = _EXPECTED.get(file.format)
    if found != expected and (head or expected):
        raise InputError(
            printable(file.path),
            rule=f"by its name it is {expected or 'JSON Lines in UTF-8'}, "
            f"by its first bytes {found or ('empty' if not head else 'something else')}",
            fix="name the file after its content, or fetch it again",
        )


def _open_lines(file: SourceFile) -> io.BufferedIOBase:
    """Open a file of lines, unpacking it."""
    if file.format == "jsonl.gz":
        return gzip.open(file.path, "rb")
    if file.format == "jsonl.zst":
        return io.BufferedReader(_ZstdFile(file.path), 1 << 18)
    return file.path.open("rb")


def _lines(stream: io.BufferedIOBase, limit: int | None) -> Iterator[tuple[int, bytes | BadRow]]:
    """Yield the lines with their numbers from 1, a `BadRow` for one that is longer than `limit`."""
    number = 0
    size = -1 if limit is None else limit + 1
    while line := stream.readline(size):
        number += 1
        if limit is None or len(line) <= limit:
            yield number, line.removeprefix(_BOM)
            continue
        while not line.endswith(b"\n") and line:
            line = stream.readline(size)
        yield number, BadRow(f"longer than {limit:,} bytes", too_large=True)


def _json_row(line: bytes, number: Callable[[str], Any]) -> Row | BadRow:
    try:
        # float, where no number is used: an integer of 5,000 digits is then no error.
        value = json.loads(line.rstrip().decode("utf-8"), parse_int=number)
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 ({_byte(error)})")
    except ValueError as error:
        return BadRow(f"no JSON object: {error}")
    except RecursionError:
        return BadRow("JSON that is nested too deeply")
    if not isinstance(value, dict):
        return BadRow("no JSON object")
    return value


def _byte(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} at {error.start}"


def _parquet_rows(
    file: SourceFile,
    columns: Callable[[Sequence[str]], Sequence[str]] | None,
    max_row_bytes: int | None,
) -> Iterator[tuple[int, Row | BadRow]]:
    with needs_package("pyarrow", printable(file.path)):
        import pyarrow
        from pyarrow import parquet
    number = 0
    try:
        # Read as a stream: neither a mapping of the whole file nor a row group held at once.
        opened = parquet.ParquetFile(
            file.path, memory_map=False, pre_buffer=False, buffer_size=1 << 20
        )
        with opened:
            names = opened.schema_arrow.names
            wanted = list(names if columns is None else columns(names))
            for group in range(opened.num_row_groups):
                facts = opened.metadata.row_group(group)
                row_bytes = facts.total_byte_size // max(1, facts.num_rows)
                batches = opened.iter_batches(
                    batch_size=max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, row_bytes))),
                    row_groups=[group],
                    columns=wanted,
                    use_threads=False,
                )
                for batch in batches:
                    for row in _rows_of_batch(batch, max_row_bytes):
                        number += 1
                        yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(printable(file.path), error) from error
        raise _damaged(file, number + 1, error) from error


def _rows_of_batch(batch: Any, limit: int | None) -> Iterator[Row | BadRow]:
    """Yield the rows of a record batch.

    Bad ones have bytes that are no text, or are longer than ``limit`` and never become objects.
    """
    if limit is not None and batch.nbytes > limit:
        for index in range(batch.num_rows):
            row = batch.slice(index, 1)
            if row.nbytes > limit:
                yield BadRow(f"longer than {limit:,} bytes", too_large=True)
            else:
                yield from _rows_of_batch(row, None)
        return
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass  # to_pylist has yielded nothing: it makes the whole list first
    for index in range(batch.num_rows):
        try:
            yield batch.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield BadRow(f"not UTF-8 ({_byte(error)})")


@contextmanager
def needs_package(package: str, name: str) -> Iterator[None]:
    """Refuse what needs a package of the ``data`` extra that cannot be imported inside.

    Args:
        package: the package.
        name: the file that needs it, for the message.

    Raises:
        InputError: the package is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise InputError(
            name,
            rule=f"reading it needs the package {package}, which is not installed",
            fix="install the extra: pip install 'mellum2-megatron[data]'",
        ) from error


class _ZstdFile(io.RawIOBase):
    """An unpacked zstd file of any number of frames.

    zstandard's own reader ends without an error where a file is cut off.
    """

    def __init__(self, path: Path) -> None:
        with needs_package("zstandard", printable(path)):
            import zstandard
        self._error: type[Exception] = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._inside = False
        self._pending = memoryview(b"")
        self._file = path.open("rb")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            packed = self._file.read(_PACKED_BLOCK)
            if not packed:
                if self._inside:
                    raise EOFError("the last zstd frame has no end")
                return 0
            self._pending = memoryview(self._unpack(packed))
        size = min(len(buffer), len(self._pending))
        buffer[:size] = self._pending[:size]
        self._pending = self._pending[size:]
        return size

    def _unpack(self, packed: bytes) -> bytes:
        parts = []
        try:
            while packed:
                parts.append(self._frame.decompress(packed))
                self._inside = not self._frame.eof
                if self._inside:
                    break
                packed = self._frame.unused_data
                self._frame = self._decompressor.decompressobj()
        except self._error as error:
            raise EOFError(str(error)) from error
        return b"".join(parts)
