"""Names the rank that holds up all others.

When a rank hangs, the others wait for it in a collective. Their own time limit tells nobody whom
they waited for; with NCCL it ends them without even an exception. So each rank has a thread that
watches whether micro-batches still begin. When they do not, each tells the others through the store
where it stands, and what each hears is enough to say who is behind: who does not answer, who is not
waiting, or who has begun fewer micro-batches.
"""

from __future__ import annotations

import functools
import json
import linecache
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, Protocol

from mellum2_megatron.common.errors import WorkError

_ANSWER_SECONDS = 10.0
_WAITING_FILES = ("/torch/distributed/", "/torch/cuda/", "/torch/autograd/")
_WAITING_CALLS = (".wait(", "synchronize(", ".item(", ".tolist(", ".cpu(")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a rank stands: micro-batches begun, the innermost line of its main thread, and whether
    that is a wait."""

    beats: int
    line: str
    waiting: bool


class Store(Protocol):
    """What is needed of torch.distributed's stores."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


class HangWatch:
    """Watches one rank's main thread.

    Args:
        rank, world_size: of this process.
        timeout: seconds without a new micro-batch.
        end: called with the error, from the watching thread; ends the process. The flag says that
            of all ranks that answered this one is the first, and speaks for them.
        step: returns the step in progress.
        store: returns a connection to the store of all ranks, for the watching thread alone.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        timeout: float,
        end: Callable[[WorkError, bool], None],
        step: Callable[[], int],
        store: Callable[[], Store],
    ) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self._end, self._step, self._store = end, step, store
        self._beats, self._since, self._pauses = 0, time.monotonic(), 0
        self._stopped = threading.Event()
        self._main = threading.get_ident()
        self._thread: threading.Thread | None = None

    def count_micro_batches(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a `forward_step` that tells the watch when it begins; the first one starts it."""

        @functools.wraps(forward_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            self._beats, self._since = self._beats + 1, time.monotonic()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
                self._thread.start()
            return forward_step(*args, **kwargs)

        return step

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Watch nothing inside: a save takes as long as the disk takes."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            self._since = time.monotonic()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(min(1.0, self.timeout / 10)):
            if self.is_overdue(time.monotonic()):
                self._tell()
                return

    def is_overdue(self, now: float) -> bool:
        """Whether a micro-batch should have begun by now, on the clock of `time.monotonic`."""
        return not self._pauses and now - self._since > self.timeout

    def _tell(self) -> None:
        here = _place(sys._current_frames().get(self._main), self._beats)
        try:
            places = self._gather(here)
        except RuntimeError:  # of torch: the store's own process does not answer
            places = {self.rank: here}
        first = self.rank == min(places)
        if not first and self._stopped.wait(
            _ANSWER_SECONDS / 2
        ):  # a rank that ends takes its peers' collectives along
            return
        message = blame(places, self.world_size)
        error = WorkError(
            f"step {self._step()}: no micro-batch has begun for {_duration(self.timeout)}: {message}",
            fix="look at that rank's machine; the same command resumes from the last checkpoint. If the work takes so "
            "long, raise timeout_minutes",
        )
        if not self._stopped.is_set():
            self._end(error, first)

    def _gather(self, here: Place) -> dict[int, Place]:
        store, places = self._store(), {self.rank: here}
        store.set(_key(self.rank), json.dumps(asdict(here)))
        end = time.monotonic() + _ANSWER_SECONDS
        while len(places) < self.world_size and time.monotonic() < end:
            for rank in range(self.world_size):
                if rank not in places and store.check([_key(rank)]):
                    places[rank] = Place(**json.loads(store.get(_key(rank))))
            time.sleep(0.1)
        return places


def blame(places: Mapping[int, Place], world_size: int) -> str:
    """Say which ranks the others wait for.

    >>> here = Place(beats=3, line="torch/distributed/x.py:1 in wait", waiting=True)
    >>> blame({0: here, 1: here}, 3)
    'rank 2 does not answer; ranks 0, 1 are at torch/distributed/x.py:1 in wait'
    """
    silent = [rank for rank in range(world_size) if rank not in places]
    most = max(place.beats for place in places.values())
    behind = [rank for rank, place in sorted(places.items()) if place.beats < most]
    busy = [rank for rank, place in sorted(places.items()) if not place.waiting]
    if silent:
        culprits, what = silent, "does not answer"
    elif busy and len(busy) < len(places):
        culprits, what = busy, "did not arrive"
    elif (
        behind
    ):  # later pipeline stages are behind a stage that hangs, but then they wait and it does not
        culprits, what = behind, "is behind"
    else:
        culprits, what = [], ""
    named = (
        [f"{_ranks(culprits)} {what if len(culprits) == 1 else _PLURAL[what]}"] if culprits else []
    )
    lines: dict[str, list[int]] = {}
    for rank in sorted(places, key=lambda rank: (rank not in culprits, rank)):
        lines.setdefault(places[rank].line, []).append(rank)
    standing = [
        f"{_ranks(at)} {'is' if len(at) == 1 else 'are'} at {line}" for line, at in lines.items()
    ]
    return "; ".join(named + standing)


_PLURAL = {
    "does not answer": "do not answer",
    "is behind": "are behind",
    "did not arrive": "did not arrive",
}


def default_store() -> Store:
    """Return another connection to torch.distributed's store; one that waits no longer than a rank
    needs to answer."""
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store().clone()
    store.set_timeout(timedelta(seconds=_ANSWER_SECONDS))
    return store  # type: ignore[no-any-return]


def _place(frame: FrameType | None, beats: int) -> Place:
    if frame is None:
        return Place(beats=beats, line="no line of Python", waiting=False)
    file = frame.f_code.co_filename
    short = (
        file.rpartition("/site-packages/")[2]
        if "/site-packages/" in file
        else os.path.relpath(file)
    )
    line = f"{short}:{frame.f_lineno} in {frame.f_code.co_name}"
    source = linecache.getline(file, frame.f_lineno)
    waiting = any(part in file for part in _WAITING_FILES) or any(
        call in source for call in _WAITING_CALLS
    )
    return Place(beats=beats, line=line, waiting=waiting)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} seconds"


def _key(rank: int) -> str:
    return f"mellum2/watch/{rank}"
