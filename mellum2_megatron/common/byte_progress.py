"""Progress in bytes on standard error: a bar on a terminal, a line every 30 seconds in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mellum2_megatron.common.console import error_console
from mellum2_megatron.common.files import size_text

SECONDS_BETWEEN_LINES = 30.0
"""Seconds between two progress lines when standard error is not a terminal."""


@contextmanager
def byte_progress(what: str, total: int, *, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances a progress display by a number of bytes, from any thread.

    The display shows bytes done, speed and time left.

    Args:
        what: label, such as ``import``.
        total: bytes of the whole work.
        done: bytes that an earlier attempt finished, default 0.
    """
    # A bar would fill a log file with control characters.
    if not error_console.is_terminal:
        yield LineProgress(what, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=error_console) as progress:
        task = progress.add_task(what, total=total, completed=done)
        yield lambda nbytes: progress.advance(task, nbytes)


class LineProgress:
    """Writes ``import: 3.20 of 24.30 GB, 310 MB/s, 68 s left`` every `SECONDS_BETWEEN_LINES`.

    Args:
        what, total, done: as for `byte_progress`.
        clock: function that returns seconds, default the monotonic clock.
    """

    def __init__(
        self, what: str, total: int, done: int = 0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._total, self._clock = what, total, clock
        self._before = self._done = done
        self._start = self._last = clock()
        self._lock = threading.Lock()  # hashing and copying threads report at the same time

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            now = self._clock()
            if now - self._last < SECONDS_BETWEEN_LINES:
                return
            self._last = now
            # Bytes of an earlier attempt took no time in this one, so they do not count as speed.
            speed = (self._done - self._before) / (now - self._start)
            left = (self._total - self._done) / speed
            sys.stderr.write(
                f"{self._what}: {size_text(self._done)} of {size_text(self._total)}, "
                f"{speed / 1e6:,.0f} MB/s, {left:,.0f} s left\n"
            )
