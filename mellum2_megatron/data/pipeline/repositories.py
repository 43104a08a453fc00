"""Stage ``repositories``: the files of every shard, sorted by repository.

::

    repositories/LABEL-HASH/keys.npy      key of each document's repository [n]; 0: it has none
    repositories/LABEL-HASH/frames.npy    key, run, place and size of each frame, sorted [f]
    repositories/LABEL-HASH/files.zst     frames: files of one repository, in order of path

A key is a keyed hash of the repository's name. Its first 12 bits are the bucket of all files of the
repository, so that a phase takes whole repositories. A pack task owns a range of keys. It reads the
frames of that range from every shard and merges them, one repository after the other.

Memory is bounded on both sides. A shard's files are sorted in runs of up to 64 MiB, as an external
sort does. A merge holds a frame of up to 256 KiB for each run of a repository, and one part of a
repository: up to 32 of its documents, or 4,096 files. A larger repository is taken in parts, in
order of path.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.data.corpus.rows import needs_package
from mellum2_megatron.data.pipeline.documents import Row, stored_documents
from mellum2_megatron.data.pipeline.ledger import BUCKETS
from mellum2_megatron.data.pipeline.row_file import count_rows, read_rows, row_ranges
from mellum2_megatron.data.pipeline.tasks import Task

FILES = "files.zst"
_FRAME = np.dtype([("key", "<u8"), ("run", "<i4"), ("place", "<i8"), ("size", "<i4")])
_RUN_BYTES = 64 << 20
_FRAME_BYTES = 256 << 10
_MOST_FILES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """A file of a repository, as a pack task reads it.

    Attributes:
        repository, path: names of the repository and of the file in it.
        language: lower-case name, or None.
        text: its text.
        shard: number of the shard in its source.
        row: row in the shard's result of stage ``tokens``.
        start, tokens: its ids in that result, without eod.
        digest: hash of the text, 128 bits.
    """

    repository: str
    path: str
    language: str | None
    text: str
    shard: int
    row: int
    start: int
    tokens: int
    digest: int


def repository_of(document: Row, folders: int) -> tuple[str, str] | None:
    """Return repository and path of a document, None if it has no repository.

    Args:
        document: the document.
        folders: leading folders of a path that name the repository, where the row names none.
    """
    if document.path is None:
        return None
    if document.repository:
        return document.repository, document.path
    parts = PurePosixPath(document.path).parts
    if not folders or len(parts) <= folders:
        return None
    return "/".join(parts[:folders]), "/".join(parts[folders:])


def repository_key(name: str, seed: int) -> int:
    """Return a repository's key, 1 to 2**64 - 1."""
    digest = hashlib.blake2b(name.encode(), digest_size=8, key=f"repository {seed}".encode()[:64])
    return int.from_bytes(digest.digest(), "little") or 1


def gather(task: Task, results: Path, folder: Path) -> dict[str, Any]:
    """Sort the files of one shard by repository."""
    settings = task.settings
    documents, tokens = (one.folder(results) for one in task.inputs)
    keys: list[NDArray[np.uint64]] = []
    # One for all blocks: each goes on where the one before has ended.
    stored = enumerate(stored_documents(documents))
    with (folder / FILES).open("wb") as out:
        runs = _Runs(out)
        for start, end in row_ranges(count_rows(tokens / "rows.npy")):
            keys.append(_gather_block(tokens, stored, start, end, settings, runs))
        frames = runs.finish()
    all_keys = np.concatenate([np.zeros(0, dtype=np.uint64), *keys])
    del keys
    np.save(folder / "keys.npy", all_keys)
    np.save(folder / "frames.npy", frames)
    return {
        "documents": len(all_keys),
        "repository_files": int((all_keys > 0).sum()),
        "repositories": len(np.unique(all_keys[all_keys > 0])),
    }


def _gather_block(
    tokens: Path,
    stored: Iterator[tuple[int, Row]],
    start: int,
    end: int,
    settings: dict[str, Any],
    runs: _Runs,
) -> NDArray[np.uint64]:
    """Add the files of some rows of a shard to the runs; return the keys of these rows.

    Args:
        tokens: the shard's result of stage ``tokens``.
        stored: documents of the shard behind the blocks so far, with their numbers.
        start, end: rows of the block.
        settings: settings of the task.
        runs: the runs.
    """
    offsets = read_rows(tokens / "offsets.npy", start, end + 1)
    hashes = read_rows(tokens / "hashes.npy", start, end)
    keys = np.zeros(end - start, dtype=np.uint64)
    for row, wanted in enumerate(read_rows(tokens / "rows.npy", start, end).tolist()):
        # Rows rise, so the document is behind the one before.
        document = next(one for number, one in stored if number == wanted)
        if (found := repository_of(document, settings["folders"])) is None:
            continue
        name, path = found
        keys[row] = key = repository_key(name, settings["seed"])
        facts = {
            "repository": name,
            "path": path,
            "language": document.language,
            "text": document.text,
            "row": start + row,
            "start": int(offsets[row]),
            "tokens": int(offsets[row + 1] - offsets[row]) - 1,
            "digest": int.from_bytes(hashes[row].tobytes(), "little"),
        }
        line = json.dumps(facts, ensure_ascii=False).encode() + b"\n"
        runs.add((key, name, path, start + row), line)
    return keys


class _Runs:
    """Lines that are sorted in memory up to a limit, and written as frames of one repository."""

    def __init__(self, out: Any) -> None:
        self._out = out
        self._lines: list[tuple[tuple[int, str, str, int], bytes]] = []
        self._bytes = 0
        self._run = 0
        self._frames: list[tuple[int, int, int, int]] = []
        with needs_package("zstandard", FILES):
            import zstandard
        self._compressor = zstandard.ZstdCompressor(level=3)

    def add(self, key: tuple[int, str, str, int], line: bytes) -> None:
        """Add a file; its key begins with the repository's."""
        self._lines.append((key, line))
        self._bytes += len(line)
        if self._bytes >= _RUN_BYTES:
            self._write()

    def finish(self) -> NDArray[np.void]:
        """Write what is left, and return the table of frames."""
        self._write()
        table = np.array(self._frames, dtype=_FRAME)
        return table[np.lexsort((table["place"], table["run"], table["key"]))]

    def _write(self) -> None:
        self._lines.sort(key=lambda one: one[0])
        for key, group in groupby(self._lines, key=lambda one: one[0][0]):
            frame: list[bytes] = []
            size = 0
            for _, line in group:
                frame.append(line)
                size += len(line)
                if size >= _FRAME_BYTES:
                    self._write_frame(key, frame)
                    frame, size = [], 0
            if frame:
                self._write_frame(key, frame)
        self._lines, self._bytes = [], 0
        self._run += 1

    def _write_frame(self, key: int, lines: list[bytes]) -> None:
        content = self._compressor.compress(b"".join(lines))
        self._frames.append((key, self._run, self._out.tell(), len(content)))
        self._out.write(content)


def read_repositories(
    folders: Sequence[Path], buckets: Sequence[Path], first: int, last: int, most_tokens: int
) -> Iterator[tuple[int, int, list[StoredFile]]]:
    """Yield key, number of the part, and files, of every repository of a range, in order of path.

    Args:
        folders: results of stage ``repositories``, shard by shard.
        buckets: files with the bucket of each document, shard by shard; files that are no training
            documents are left out.
        first, last: range of keys, the last not in it.
        most_tokens: tokens of a part, which may end with a larger file.
    """

    @lru_cache(maxsize=256)
    def places(shard: int) -> NDArray[np.integer]:
        mapped: NDArray[np.integer] = np.load(buckets[shard], mmap_mode="r")
        return mapped

    found, shards = [], []
    for shard, folder in enumerate(folders):
        table = np.load(folder / "frames.npy", mmap_mode="r")
        keys = np.ascontiguousarray(table["key"])
        start = int(np.searchsorted(keys, np.uint64(first)))
        # 2**64 is no 64-bit number.
        end = len(keys) if last >> 64 else int(np.searchsorted(keys, np.uint64(last)))
        if start < end:
            found.append(np.array(table[start:end]))
            shards.append(np.full(end - start, shard))
    if not found:
        return
    frames, owners = np.concatenate(found), np.concatenate(shards)
    order = np.lexsort((frames["place"], frames["run"], owners, frames["key"]))
    frames, owners = frames[order], owners[order]
    ends = np.flatnonzero(np.append(frames["key"][1:] != frames["key"][:-1], True)) + 1
    for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        streams = [
            _files(folders[shard], shard, [frames[n] for n in numbers])
            for (shard, _), numbers in groupby(
                range(start, end), key=lambda n: (int(owners[n]), int(frames["run"][n]))
            )
        ]
        merged = heapq.merge(
            *streams, key=lambda one: (one.repository, one.path, one.shard, one.row)
        )
        key = int(frames["key"][start])
        # Two names may have one key.
        for _, files in groupby(
            (one for one in merged if places(one.shard)[one.row] < BUCKETS),
            key=lambda one: one.repository,
        ):
            for part, some in enumerate(_parts(files, most_tokens)):
                yield key, part, some


def _files(folder: Path, shard: int, frames: Sequence[np.void]) -> Iterator[StoredFile]:
    """Yield the files of one run of a repository."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    for frame in frames:
        with (folder / FILES).open("rb") as file:
            file.seek(int(frame["place"]))
            content = file.read(int(frame["size"]))
        try:
            lines = decompressor.decompress(content).splitlines()
        except zstandard.ZstdError as error:
            raise WorkError(
                f"{folder / FILES}: {error}", fix=f"remove {folder} and run the plan again"
            ) from error
        for line in lines:
            yield StoredFile(shard=shard, **json.loads(line))


def _parts(files: Iterator[StoredFile], most_tokens: int) -> Iterator[list[StoredFile]]:
    part: list[StoredFile] = []
    tokens = 0
    for file in files:
        part.append(file)
        tokens += file.tokens
        if tokens >= most_tokens or len(part) == _MOST_FILES:
            yield part
            part, tokens = [], 0
    if part:
        yield part
