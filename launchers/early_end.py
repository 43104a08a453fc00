"""A limit on a run's loss that ends it early; it lies in the run folder before the job starts.

::

    RUN/loss_limit.json    {"step": 30, "train_loss_above": 6.0}
    RUN/ended_early.json   {"reason": "stop rule: loss 7.100 at step 30 > 6"}

Node 0's agent applies it: the ranks save and leave, and the job is not started again. The runner of
ablations on one machine applies the same limit itself.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import write_json
from mellum2_megatron.common.json_files import load_json, read_record
from mellum2_megatron.common.values import to_plain
from mellum2_megatron.metrics import read_metrics
from mellum2_megatron.metrics.log import METRICS_FILE, series

LIMIT_FILE = "loss_limit.json"
ENDED_FILE = "ended_early.json"

_SECONDS = 5.0
"""Seconds between two looks at the metrics."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossLimit:
    """A run ends early if the first training loss logged at a step or later is above a bound.

    Attributes:
        step: optimizer step from which on the limit holds. It decides once.
        train_loss_above: bound, nats a token.
    """

    step: int
    train_loss_above: float

    def write(self, folder: Path) -> None:
        """Write the limit into a run folder."""
        write_json(folder / LIMIT_FILE, to_plain(self))

    def verdict(self, folder: Path) -> str | None:
        """Return the reason to end a run; empty: it goes on for good; None: not decided yet."""
        try:
            steps, losses = series(read_metrics(folder / METRICS_FILE), "lm_loss")
        except (InputError, OSError):
            return None  # not there yet, or half a line is being written
        for step, loss in zip(steps, losses, strict=True):
            if step >= self.step:
                # `not <=`, because a loss that is no number is above every bound.
                if not loss <= self.train_loss_above:
                    return f"stop rule: loss {loss:.3f} at step {step} > {self.train_loss_above:g}"
                return ""
        return None


def read_limit(folder: Path) -> LossLimit | None:
    """Return the limit in a run folder; None without one.

    Raises:
        InputError: the file is damaged.
    """
    return read_record(
        LossLimit,
        folder / LIMIT_FILE,
        what="limit of a loss",
        fix="submit the task again, which writes it anew",
    )


def ended_early(folder: Path) -> str:
    """Return the reason why a run was ended early; empty: it was not."""
    try:
        return str(load_json(folder / ENDED_FILE)["reason"])
    except (OSError, ValueError, KeyError):
        return ""


@contextmanager
def watching_loss(folder: Path) -> Iterator[None]:
    """Apply the limit of a run folder, if it has one, to the ranks that this process runs.

    The process signals itself, as Slurm does before the time limit, and passes the signal on.

    Raises:
        InputError: the file of the limit is damaged.
    """
    limit = read_limit(folder)
    if limit is None:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_SECONDS):
            reason = limit.verdict(folder)
            if reason:
                write_json(folder / ENDED_FILE, {"reason": reason})
                os.kill(os.getpid(), signal.SIGTERM)
            if reason is not None:
                return

    thread = threading.Thread(target=watch, name="loss limit", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
