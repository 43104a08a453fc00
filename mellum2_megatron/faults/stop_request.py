"""SIGTERM or SIGUSR1 stops a run: it finishes its step, saves, and leaves with its own exit code.

Megatron does the rest: after each step it gathers from all ranks whether one of them got a signal,
then saves and leaves (megatron/training/training.py:3247, 0.19.2). Its own handler takes one
signal; schedulers send either.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from types import FrameType

STOPPED = os.EX_TEMPFAIL
"""Exit code 75 (sysexits.h): everything is saved, and the same command resumes from there."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Takes the place of Megatron's `DistributedSignalHandler` (``training/hooks.py``).

    Attributes:
        received: True once this process got a stop signal.
        agreed: True once the ranks have exchanged that at least one of them got one.
    """

    def __init__(self) -> None:
        self.received = False
        self.agreed = False

    def listen(self) -> None:
        """Handle the stop signals from now on; until this is called they end the process."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def signals_received(self) -> list[int]:
        """Return 1 for each rank that got a stop signal, else 0. A collective of all ranks."""
        import torch
        from megatron.training.dist_signal_handler import all_gather_item

        received: list[int] = all_gather_item(int(self.received), dtype=torch.int32)
        self.agreed = any(received)
        return received

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = True


def is_stop(exit_codes: Iterable[int], *, signalled: bool) -> bool:
    """Return True if ranks ended because they were stopped.

    Args:
        exit_codes: exit codes of the ranks that did not end with 0; minus the signal's number where
            a signal ended the rank.
        signalled: True if the launcher passed a stop signal on, which ends ranks that do not listen
            yet.
    """
    codes = set(exit_codes)
    stopped = {STOPPED, *(-number for number in STOP_SIGNALS)}
    return codes <= stopped and (STOPPED in codes or signalled)
