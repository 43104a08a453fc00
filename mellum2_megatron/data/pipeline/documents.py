"""Stages ``documents`` and ``exact``: read and filter every input, then find exact duplicates.

::

    documents/LABEL-HASH/documents.jsonl.zst   a row for each kept document: text, language,
                                               repository, path, origin
    documents/LABEL-HASH/hashes.npy            SHA-256 of each text, its first 16 bytes [n, 16]
    exact/all-HASH/dropped-NNNNN.npy           rows of duplicates, one file for each result above
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.corpus.left_out import LeftOut, printable
from mellum2_megatron.data.corpus.listing import SourceFile, unreadable
from mellum2_megatron.data.corpus.quality_filters import Content, reason_to_drop
from mellum2_megatron.data.corpus.rows import needs_package
from mellum2_megatron.data.corpus.sources import Document, ReadOptions, read_documents
from mellum2_megatron.data.pipeline.partitions import Partitions, in_hash_order, parts_for
from mellum2_megatron.data.pipeline.plan import Source
from mellum2_megatron.data.pipeline.row_file import RowFile, count_rows, read_rows, row_ranges
from mellum2_megatron.data.pipeline.tasks import Task

HASH_BYTES = 16
DOCUMENTS_FILE = "documents.jsonl.zst"
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 256, 4 << 20


@dataclass(slots=True)
class Dropped:
    """Documents that one filter dropped: their number, bytes, and the first as an example."""

    documents: int = 0
    bytes: int = 0
    example: str = ""

    def add(self, size: int, example: str) -> None:
        """Count a document."""
        self.documents += 1
        self.bytes += size
        self.example = self.example or example


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One kept document as it is stored."""

    text: str
    language: str | None
    repository: str | None
    path: str | None
    origin: str


def filter_documents(task: Task, results: Path, folder: Path) -> dict[str, Any]:
    """Read the task's files, apply the source's filters, and store what is kept."""
    settings = task.settings
    filters = Source(
        kind=settings["kind"], inputs=("-",), filters=settings["filters"]
    ).chosen_filters()
    options = ReadOptions(
        text_key=settings["text_key"],
        skip_bad_rows=settings["skip_bad_rows"],
        max_document_bytes=settings["max_document_bytes"],
    )
    left_out = LeftOut()
    dropped: dict[str, Dropped] = {}
    languages: dict[str, list[int]] = {}
    read = read_bytes = kept = kept_bytes = 0
    path = folder / DOCUMENTS_FILE
    with needs_package("zstandard", str(path)):
        import zstandard
    with path.open("wb") as file, RowFile(folder / "hashes.npy", np.uint8, HASH_BYTES) as hashes:
        compressor = zstandard.ZstdCompressor(level=3)
        with (
            compressor.stream_writer(file) as binary,
            io.TextIOWrapper(binary, encoding="utf-8") as out,
        ):
            for origin, document in _documents(task, options, left_out):
                content = Content(document.text, document.language or "")
                size = len(content.bytes)
                read += 1
                read_bytes += size
                if (fault := reason_to_drop(content, filters)) is not None:
                    name, reason = fault
                    dropped.setdefault(name, Dropped()).add(size, f"{origin}: {reason}")
                    continue
                digest = hashlib.sha256(content.bytes).digest()[:HASH_BYTES]
                hashes.add(np.frombuffer(digest, dtype=np.uint8).reshape(1, -1))
                kept += 1
                kept_bytes += size
                counts = languages.setdefault(document.language or "unknown", [0, 0])
                counts[0] += 1
                counts[1] += size
                row = {
                    "text": document.text,
                    "language": document.language,
                    "repository": document.repository,
                    "path": document.path,
                    "origin": origin,
                }
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return {
        "documents_read": read,
        "bytes_read": read_bytes,
        "documents": kept,
        "bytes": kept_bytes,
        "dropped": {
            name: {"documents": one.documents, "bytes": one.bytes, "example": one.example}
            for name, one in dropped.items()
        },
        "left_out": {
            reason: {"count": count, "first": left_out.first[reason]}
            for reason, count in left_out.counts.items()
        },
        "languages": {
            name: {"documents": counts[0], "bytes": counts[1]}
            for name, counts in sorted(languages.items())
        },
    }


def _documents(
    task: Task, options: ReadOptions, left_out: LeftOut
) -> Iterator[tuple[str, Document]]:
    """Yield every document of the task's files with its origin.

    That is ``RELATIVE``, ``RELATIVE:ROW``, or with a path in the row ``PATH (RELATIVE:ROW)``. It is
    a path below the input's folder: a corpus that lies elsewhere gives the same bytes.
    """
    for facts in task.settings["files"]:
        file = SourceFile(
            path=Path(task.places[facts["key"]]),
            relative=facts["relative"],
            format=facts["format"],
            size=facts["size"],
            given=facts["given"],
        )
        _check_unchanged(file)
        for document in read_documents(file, options, left_out):
            name = printable(file.relative)
            origin = f"{name}:{document.row}" if document.row else name
            if document.row and document.path:
                origin = f"{document.path} ({origin})"
            yield origin, document


def _check_unchanged(file: SourceFile) -> None:
    """Refuse a file that is not the one that was hashed: the result has the name of its hash.

    Raises:
        InputError: it is gone, or has another size.
    """
    try:
        size = file.path.stat().st_size
    except OSError as error:
        raise unreadable(printable(file.path), error) from None
    if size != file.size:
        raise InputError(
            printable(file.path),
            rule=f"it has {size:,} bytes now, and had {file.size:,} when this run began",
            fix="run the plan again when nothing writes to the file",
        )


def stored_documents(folder: Path) -> Iterator[Row]:
    """Yield the documents of a result of stage ``documents``, in order."""
    path = folder / DOCUMENTS_FILE
    with needs_package("zstandard", str(path)):
        import zstandard
    with path.open("rb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(file)
        for line in io.TextIOWrapper(reader, encoding="utf-8", newline="\n"):
            yield Row(**json.loads(line))


def batches(documents: Iterable[tuple[int, Row]]) -> Iterator[list[tuple[int, Row]]]:
    """Yield documents in lists that bound memory: 256 of them, or 4 million characters."""
    batch: list[tuple[int, Row]] = []
    characters = 0
    for number, document in documents:
        if batch and (
            len(batch) == _BATCH_DOCUMENTS or characters + len(document.text) > _BATCH_CHARACTERS
        ):
            yield batch
            batch, characters = [], 0
        batch.append((number, document))
        characters += len(document.text)
    if batch:
        yield batch


def drop_exact(task: Task, results: Path, folder: Path) -> dict[str, Any]:
    """Find documents with equal text; the first in the order of the plan stays.

    Neither the hashes nor the duplicates of a corpus are in memory together.
    """
    files = [one.folder(results) / "hashes.npy" for one in task.inputs]
    starts = np.concatenate(([0], np.cumsum([count_rows(file) for file in files]))).astype(np.int64)
    count = int(starts[-1])
    with TemporaryDirectory(prefix="temporary-", dir=folder) as name:
        scratch = Path(name)
        # Neighbouring shards share a part.
        groups = starts[:-1] * parts_for(count) // max(count, 1)
        repeats = Partitions(scratch, "repeats", [("document", "<i8")], parts_for(count))
        hashes = (
            read_rows(file, *block) for file in files for block in row_ranges(count_rows(file))
        )
        for found in in_hash_order(hashes, count, scratch):
            same = (found["first"][1:] == found["first"][:-1]) & (
                found["second"][1:] == found["second"][:-1]
            )
            repeated = found["document"][1:][same]
            owners = np.searchsorted(starts, repeated, side="right") - 1
            repeats.add(groups[owners], document=repeated)
        by_source: dict[str, int] = {}
        for group, members in groupby(range(len(files)), key=groups.__getitem__):
            repeated = np.sort(repeats.take(int(group))["document"])
            for number in members:
                start, end = np.searchsorted(repeated, starts[number : number + 2])
                np.save(folder / f"dropped-{number:05}.npy", repeated[start:end] - starts[number])
                source = task.inputs[number].source
                by_source[source] = by_source.get(source, 0) + int(end - start)
    return {"documents": count, "duplicates": by_source}
