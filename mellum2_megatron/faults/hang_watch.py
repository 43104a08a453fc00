"""Stops a hung run and names the rank that holds up the others.

When a rank hangs, the others wait for it in a collective. The collective's own time limit does not
name that rank, and with NCCL it kills processes without an exception. So a thread on each rank
checks that micro-batches still start; the first one has a limit of its own, because loading and
building of data sets come before it. When they do not, the ranks exchange their places in the code
through torch.distributed's store. The hung rank is the one that does not answer, or is not waiting,
or has started fewer micro-batches than the others.
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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from mellum2_megatron.checkpoint.folder import how_to_resume
from mellum2_megatron.common.errors import WorkError

_ANSWER_SECONDS = 10.0
"""Seconds that a rank has to answer."""

_WAITING_FILES = ("/torch/distributed/", "/torch/cuda/", "/torch/autograd/")
_WAITING_CALLS = (".wait(", "synchronize(", ".item(", ".tolist(", ".cpu(")
"""A line of Python in these files, or with these calls, is a wait for the device or other ranks."""

WORK: tuple[tuple[str, str, str], ...] = (
    ("megatron/training/initialize.py", "initialize_megatron", "setting up process groups"),
    ("megatron/training/checkpointing.py", "load_checkpoint", "loading the checkpoint"),
    ("megatron/training/checkpointing.py", "save_checkpoint", "saving a checkpoint"),
    ("megatron/training/training.py", "get_model", "building the model"),
    ("megatron/training/training.py", "setup_model_and_optimizer", "building the optimizer"),
    (
        "megatron/training/training.py",
        "build_train_valid_test_data_iterators",
        "building the data sets",
    ),
    ("megatron/training/training.py", "evaluate", "validating"),
    ("megatron/training/training.py", "train_step", "training"),
    ("<frozen importlib._bootstrap>", "_find_and_load", "importing modules"),
)
"""What a rank does while one of these functions runs: file, function, words. Megatron 0.19.2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Place of a rank in the code.

    Attributes:
        beats: number of micro-batches started.
        line: innermost line of the main thread, as "FILE:LINE in FUNCTION".
        waiting: True if that line waits for the device or other ranks.
        work: words of the innermost function of `WORK` that runs, default none of them.
    """

    beats: int
    line: str
    waiting: bool
    work: str = ""

    @property
    def shown(self) -> str:
        """The work, if known, and the line."""
        return f"{self.work}, at {self.line}" if self.work else f"at {self.line}"


class Store(Protocol):
    """Methods of torch.distributed's stores that the watch uses."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


class HangWatch:
    """Watches one rank's main thread.

    Args:
        rank: rank of this process.
        world_size: number of ranks.
        timeout: seconds without a new micro-batch after which the run counts as hung.
        setup_timeout: the same for the first micro-batch, from the moment at which all ranks have
            arrived in the store; and for that moment, from now.
        end: called from the watching thread with the error; must end the process. Its second
            argument is True on the first of the ranks that answered, which reports for all.
        step: returns the step in progress.
        output: run folder, for the message.
        store: returns a new connection to the store of all ranks, for the watching thread alone;
            None before this rank has one. May raise RuntimeError, as torch does.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        timeout: float,
        setup_timeout: float,
        end: Callable[[WorkError, bool], None],
        step: Callable[[], int],
        output: Path,
        store: Callable[[], Store | None],
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.timeout, self.setup_timeout = timeout, setup_timeout
        self._end, self._step, self._store = end, step, store
        self._output = output
        self._beats, self._since, self._pauses = 0, time.monotonic(), 0
        self._own_store: Store | None = None
        self._met = False
        self._stopped = threading.Event()
        self._main = threading.get_ident()

    def start(self) -> None:
        """Start the watching thread."""
        # A daemon: it must not keep a process alive whose main thread has ended.
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def count_micro_batches(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a `forward_step`: each call is a sign of life."""

        @functools.wraps(forward_step)
        def counted_step(*args: Any, **kwargs: Any) -> Any:
            self._beats, self._since = self._beats + 1, time.monotonic()
            return forward_step(*args, **kwargs)

        return counted_step

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Turn the watch off inside: a save takes as long as the disk takes."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            self._since = time.monotonic()

    def stop(self) -> None:
        """End the watching thread."""
        self._stopped.set()

    @property
    def limit(self) -> float:
        """Seconds until the next micro-batch must start."""
        return self.timeout if self._beats else self.setup_timeout

    def is_overdue(self, now: float) -> bool:
        """Return True if a micro-batch should have started by `now` (`time.monotonic` seconds)."""
        return not self._pauses and now - self._since > self.limit

    def _run(self) -> None:
        while not self._stopped.wait(min(1.0, self.timeout / 10)):
            if not self._met:
                # The store's process may be gone, or not answer yet: the watch goes on without it.
                with suppress(RuntimeError):
                    self._meet()
            if self.is_overdue(time.monotonic()):
                self._end_run()
                return

    def _meet(self) -> None:
        """Tell the other ranks that this one is here; start the time again when all of them are.

        A process group is no sign of the others: torch waits for nobody when it makes one of NCCL
        (torch/distributed/distributed_c10d.py:2770, 2.15). The time begins at one moment on all
        ranks, however late one of them was started, because a rank that is not overdue itself does
        not answer.
        """
        if self._own_store is None:
            self._own_store = self._store()
            if self._own_store is None:
                return
        self._own_store.set(_arrival(self.rank), "")
        self._met = self._own_store.check(list(map(_arrival, range(self.world_size))))
        if self._met and not self._beats:
            self._since = time.monotonic()

    def _end_run(self) -> None:
        own = _place(sys._current_frames().get(self._main), self._beats)
        places, missing = {self.rank: own}, list[int]()
        # A RuntimeError is torch's: the process that holds the store does not answer.
        with suppress(RuntimeError):
            store = self._store()
            if store is not None and (self._met or self._beats):
                places = self._exchange(own, store)
            elif store is not None:
                missing = [
                    rank for rank in range(self.world_size) if not store.check([_arrival(rank)])
                ]
        is_first = self.rank == min(places)
        # A rank that exits breaks its peers' collectives: let the first one report before that.
        if not is_first and self._stopped.wait(_ANSWER_SECONDS / 2):
            return
        error = self._error(places, missing)
        if not self._stopped.is_set():
            self._end(error, is_first)

    def _error(self, places: Mapping[int, Place], missing: list[int]) -> WorkError:
        limit = self.limit
        shown = f"{limit / 60:g} minutes" if limit >= 60 else f"{limit:g} seconds"
        if self._beats:
            return WorkError(
                f"step {self._step()}: no micro-batch has begun for {shown}: "
                f"{blame(places, self.world_size)}",
                fix=f"look at that rank's machine; {how_to_resume(self._output)}. "
                "If a micro-batch needs more time than that, raise timeout_minutes",
            )
        if self._met:
            cause = blame(places, self.world_size)
        elif missing:
            cause = (
                f"{_ranks(missing)} {'has' if len(missing) == 1 else 'have'} not arrived; "
                f"rank {self.rank} is {places[self.rank].shown}"
            )
        else:
            cause = (
                f"rank {self.rank} is {places[self.rank].shown}; the ranks have not met yet, so "
                "this one cannot ask the others"
            )
        # Nothing is read from the run folder here: its disk may be what does not answer.
        return WorkError(
            f"set-up: no micro-batch has begun for {shown}: {cause}",
            fix="look at that rank's machine, and at the disks that it reads; the same command "
            "starts the run again. If set-up needs more time than that, raise "
            "setup_timeout_minutes",
        )

    def _exchange(self, own: Place, store: Store) -> dict[int, Place]:
        """Publish this rank's place; return those of the ranks that answered in time, by rank."""
        places = {self.rank: own}
        store.set(_key(self.rank), json.dumps(asdict(own)))
        deadline = time.monotonic() + _ANSWER_SECONDS
        while len(places) < self.world_size and time.monotonic() < deadline:
            for rank in range(self.world_size):
                # `check` first: `get` would wait for a key that is missing.
                if rank not in places and store.check([_key(rank)]):
                    places[rank] = Place(**json.loads(store.get(_key(rank))))
            time.sleep(0.1)
        return places


def blame(places: Mapping[int, Place], world_size: int) -> str:
    """Name the ranks that the others wait for, and every rank's place.

    >>> place = Place(beats=3, line="torch/distributed/x.py:1 in wait", waiting=True)
    >>> blame({0: place, 1: place}, 3)
    'rank 2 does not answer; ranks 0, 1 are at torch/distributed/x.py:1 in wait'
    """
    silent = [rank for rank in range(world_size) if rank not in places]
    busy = [rank for rank, place in sorted(places.items()) if not place.waiting]
    most = max(place.beats for place in places.values())
    behind = [rank for rank, place in sorted(places.items()) if place.beats < most]
    culprits: list[int] = []
    singular = plural = ""
    if silent:
        culprits, singular, plural = silent, "does not answer", "do not answer"
    elif busy and len(busy) < len(places):
        culprits, singular, plural = busy, "did not arrive", "did not arrive"
    elif behind:
        # Last: later pipeline stages are behind a stage that hangs too, but it does not wait.
        culprits, singular, plural = behind, "is behind", "are behind"
    parts = []
    if culprits:
        parts.append(f"{_ranks(culprits)} {singular if len(culprits) == 1 else plural}")
    ranks_at: dict[str, list[int]] = {}
    for rank in sorted(places, key=lambda rank: (rank not in culprits, rank)):
        ranks_at.setdefault(places[rank].shown, []).append(rank)
    for shown, ranks in ranks_at.items():
        parts.append(f"{_ranks(ranks)} {'is' if len(ranks) == 1 else 'are'} {shown}")
    return "; ".join(parts)


def default_store() -> Store | None:
    """Return another connection to torch.distributed's store, with the time limit of an answer.

    None before this rank has joined it. Nothing is imported: the main thread may hang in an
    import, which would then hold this thread too.
    """
    module = sys.modules.get("torch.distributed.distributed_c10d")
    is_initialized = getattr(module, "is_initialized", None)
    if is_initialized is None or not is_initialized():
        return None
    # A clone: a call that waits locks its connection, and the main thread may be in one.
    store = module._get_default_store().clone()  # type: ignore[union-attr]  # it is initialised
    store.set_timeout(timedelta(seconds=_ANSWER_SECONDS))
    return store  # type: ignore[no-any-return]  # torch's function has no types


def _place(frame: FrameType | None, beats: int) -> Place:
    if frame is None:
        return Place(beats=beats, line="no line of Python", waiting=False)
    file = frame.f_code.co_filename
    if "/site-packages/" in file:
        shown = file.rpartition("/site-packages/")[2]
    else:
        shown = os.path.relpath(file)
    source = linecache.getline(file, frame.f_lineno)
    waiting = any(part in file for part in _WAITING_FILES) or any(
        call in source for call in _WAITING_CALLS
    )
    line = f"{shown}:{frame.f_lineno} in {frame.f_code.co_name}"
    return Place(beats=beats, line=line, waiting=waiting, work=_work(frame))


def _work(frame: FrameType | None) -> str:
    """Return the words of the innermost function of `WORK` among a frame and its callers."""
    while frame is not None:
        for file, function, words in WORK:
            if frame.f_code.co_name == function and frame.f_code.co_filename.endswith(file):
                return words
        frame = frame.f_back
    return ""


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"


def _arrival(rank: int) -> str:
    return f"mellum2/watch/arrived/{rank}"


def _key(rank: int) -> str:
    return f"mellum2/watch/{rank}"
