"""The process that writes a rank's checkpoints in the background (`checkpoint.async_save`).

megatron-core 0.19.2 assumes that it and its rank live equally long. If it is killed, the rank waits
for it without end (core/dist_checkpointing/strategies/async_utils.py:424, 462). If its rank is
killed, or leaves without clean-up, it stays: it holds memory of the GPU, and may still write into
a checkpoint that the next start removes.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from mellum2_megatron.common.errors import WorkError

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.strategies.async_utils import (
        AsyncRequest,
        PersistentAsyncCaller,
    )

_POLL_S = 0.1
"""Seconds between two looks at the writer, as upstream has between two looks at its queue."""


def loop_of_rank(original: Callable[..., None]) -> staticmethod[..., None]:
    """Replace `async_loop`, what the process runs, by `write_while_rank_lives`."""
    return staticmethod(write_while_rank_lives)


def write_while_rank_lives(*args: Any) -> None:
    """Run Megatron's `async_loop` in this process, which ends when its rank does."""
    end_with_parent()
    # Spawned: upstream's own loop has not been replaced here.
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop(*args)


def end_with_parent() -> None:
    """End this process of `multiprocessing` at once when its parent has ended, for any reason."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "the main process has no parent to end with"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end-with-rank", daemon=True).start()


def hand_over_to_living(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `schedule_async_call`: raise WorkError if the process is gone, or ends meanwhile."""

    @functools.wraps(original)
    def schedule_async_call(self: PersistentAsyncCaller, async_req: AsyncRequest) -> None:
        _require_writer(self)
        with _released_when_killed(self):
            original(self, async_req)
        _require_writer(self)

    return schedule_async_call


def wait_for_living(original: Callable[..., bool]) -> Callable[..., bool]:
    """Wrap `is_current_async_call_done`: raise WorkError if the process is gone."""

    @functools.wraps(original)
    def is_current_async_call_done(
        self: PersistentAsyncCaller, blocking: bool = False, no_dist: bool = False
    ) -> bool:
        while self.process and self.cur_item is None:
            # Asked first: what a living process has finished since then is still in the queue.
            lives = self.process.is_alive()
            try:
                self.cur_item = self._persistent_comp_q.get(timeout=_POLL_S if blocking else 0)
            except queue.Empty:
                if not lives:
                    _require_writer(self)
                if not blocking:
                    break
        return original(self, blocking, no_dist)

    return is_current_async_call_done


def close_without_waiting(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `close`: do not wait for a process that is gone."""

    @functools.wraps(original)
    def close(self: PersistentAsyncCaller, abort: bool = False) -> None:
        gone = self.process is not None and not self.process.is_alive()
        if gone:
            # Nobody takes what was handed over; at its exit this process would wait for that.
            self._persistent_queue.cancel_join_thread()
            self._persistent_preload_q.cancel_join_thread()
        original(self, abort or gone)

    return close


@contextmanager
def _released_when_killed(caller: PersistentAsyncCaller) -> Iterator[None]:
    """Answer for a process that ends while its rank waits for the copy of its tensors."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_S):
            process = caller._persistent_process
            if process is not None and not process.is_alive():
                # Answered already: it ended right after the copy.
                with suppress(ValueError):
                    caller._persistent_preload_q.task_done()
                return

    thread = threading.Thread(target=watch, name="watch-of-writer", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _require_writer(caller: PersistentAsyncCaller) -> None:
    """Raise WorkError if the process has been started and has ended."""
    process = caller._persistent_process
    if process is None or process.is_alive():
        return
    code = process.exitcode
    raise WorkError(
        "the process that writes this rank's checkpoints in the background has ended "
        + (f"by signal {-code}" if code and code < 0 else f"with exit code {code}")
        + "; its checkpoint is incomplete",
        fix="if the kernel killed it, give the node more main memory or set "
        "checkpoint.async_save=false; the same command resumes the last complete checkpoint",
    )
