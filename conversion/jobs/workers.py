"""Independent units of work on a few threads.

Threads are enough: reading, copying, hashing and writing all release the interpreter's lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from mellum2_megatron.common.errors import InputError

# Each worker holds a tensor in memory, and few disks get faster with more workers.
MOST_BY_DEFAULT = 8


class CancelledError(Exception):
    """Another unit has failed, so this one ends early; never leaves `run_units`."""


class Stop:
    """A flag for all workers, set once a unit has failed; work calls `check` between its steps."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Make `check` raise from now on."""
        self._event.set()

    def check(self) -> None:
        """Raise CancelledError if another unit has failed."""
        if self._event.is_set():
            raise CancelledError


def worker_count(wanted: int | None) -> int:
    """Return the number of workers.

    Args:
        wanted: the caller's choice; None: one per core that this process may use, at most
            `MOST_BY_DEFAULT`.

    Raises:
        InputError: ``wanted`` is less than 1.
    """
    if wanted is None:
        # Not os.cpu_count(): a container or a Slurm job may own a few cores of a large machine.
        return min(len(os.sched_getaffinity(0)), MOST_BY_DEFAULT)
    if wanted < 1:
        raise InputError(
            f"--workers {wanted}", rule="must be 1 or more", fix="leave it out to take one per core"
        )
    return wanted


def run_units[Unit](
    units: Sequence[Unit], work: Callable[[Unit], None], *, workers: int, stop: Stop
) -> None:
    """Call ``work(unit)`` for every unit, ``workers`` at a time.

    The first error sets ``stop`` and is raised once the running units have ended.
    """
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="convert") as pool:
        try:
            for future in as_completed([pool.submit(work, unit) for unit in units]):
                future.result()
        # Ctrl-C too. `stop` ends the running units, the pool drops the waiting ones.
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
