"""The process that writes checkpoints in the background, when its rank is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection

from mellum2_megatron.upstream.async_writer import end_with_parent

FORK = multiprocessing.get_context("fork")


def _write(told: Connection) -> None:
    end_with_parent()
    told.send(os.getpid())
    time.sleep(120)


def _rank(told: Connection) -> None:
    FORK.Process(target=_write, args=(told,)).start()
    time.sleep(120)


def test_the_writer_ends_with_a_rank_that_is_killed() -> None:
    seen, told = FORK.Pipe(duplex=False)
    rank = FORK.Process(target=_rank, args=(told,))
    rank.start()
    told.close()
    assert seen.poll(30)
    writer = seen.recv()
    assert rank.pid is not None
    os.kill(rank.pid, signal.SIGKILL)
    rank.join()
    # The pipe's other end is open as long as the writer lives.
    ended = seen.poll(30)
    if not ended:
        os.kill(writer, signal.SIGKILL)
    assert ended, "it outlives its rank"
