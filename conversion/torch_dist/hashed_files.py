"""Files of a ``torch.distributed.checkpoint``, written at the disk's speed: hashed on the way, no
second checksum."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from mellum2_megatron.checkpoint.file_manifest import FileRecord


class HashingFileSystem(FileSystem):
    """DCP's file system; what it has written by `create_stream` is in ``records``, by name, once
    the stream is closed.

    Reading a checkpoint of many gigabytes again for its manifest would cost as much as writing it.
    """

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open ``path``; only ``wb`` and ``rb`` occur in DCP
        (torch/distributed/checkpoint/filesystem.py, 2.15)."""
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with Path(path).open("wb", buffering=0) as raw:
            hashing = _HashingStream(raw)
            yield hashing
            self.records[Path(path).name] = FileRecord(
                size=hashing.tell(), sha256=hashing.digest.hexdigest()
            )


class _HashingStream(io.RawIOBase):
    """Passes everything on in order, as `torch.save` writes it: it never goes back."""

    def __init__(self, raw: io.FileIO) -> None:
        self._raw = raw
        self._size = 0
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            done += self._raw.write(view[done:]) or 0
        self.digest.update(view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()


@contextmanager
def without_crc32() -> Iterator[None]:
    """Let `torch.save` leave out the zip records' CRC-32, process-wide, while the block runs.

    torch computes it a byte at a time while it holds the interpreter: one thread at 100 to 250
    MB/s, whatever the number of workers. `torch.load` never looks at it
    (torch/serialization.py:set_crc32_options, 2.15); every tensor and every file have a SHA-256 in
    a manifest.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
