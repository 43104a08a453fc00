"""Files of a ``torch.distributed.checkpoint``, written at the disk's speed.

They are hashed while they are written, and get no second checksum.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mellum2_megatron.checkpoint.file_manifest import FileRecord


class HashingStream(io.RawIOBase):
    """A write-only stream that hashes a file while it is written.

    It cannot seek, which `torch.save` never does. Hashing a finished checkpoint instead would read
    many gigabytes once more.
    """

    def __init__(self, raw: io.FileIO) -> None:
        self._raw = raw
        self._size = 0
        self._digest = hashlib.sha256()

    @property
    def record(self) -> FileRecord:
        """Size and hash of everything written so far."""
        return FileRecord(size=self._size, sha256=self._digest.hexdigest())

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        # One system call may write only a part, at 2 GiB (man 2 write) or at a limit.
        while done < len(view):
            done += self._raw.write(view[done:]) or 0
        self._digest.update(view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()


@contextmanager
def hashed_file(path: Path) -> Iterator[HashingStream]:
    """Yield a stream that writes ``path`` anew; the file is on the disk when the block ends."""
    # Unbuffered: torch.save hands over whole tensors, and a buffer would only copy them.
    with path.open("wb", buffering=0) as raw:
        stream = HashingStream(raw)
        yield stream
        os.fsync(stream.fileno())
