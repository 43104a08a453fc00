"""SIGTERM and SIGUSR1 ask a run to stop: it finishes its step, saves, and leaves with an exit code
of its own.

Megatron has the rest: after each step all ranks ask whether one of them was told to stop, and then
save and leave (megatron/training/training.py:3247, 0.19.2). Its own handler hears one signal;
schedulers send either.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from types import FrameType

STOPPED = os.EX_TEMPFAIL
"""Exit code 75 (sysexits.h): everything is saved, and the same command goes on from there."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Stands where Megatron expects its `DistributedSignalHandler`.

    Attributes:
        heard: this process was told to stop.
        agreed: all ranks know that one of them was.
    """

    def __init__(self) -> None:
        self.heard = False
        self.agreed = False

    def listen(self) -> None:
        """Take the signals from now on; what ends a process without this ends it still before
        this."""
        for each in STOP_SIGNALS:
            signal.signal(each, self._hear)

    def attach(self) -> None:
        """Become what Megatron asks. Called when its arguments are there and its loaders' processes
        are not."""
        from megatron.training import get_args, global_vars

        get_args().exit_signal_handler = True
        global_vars._GLOBAL_SIGNAL_HANDLER = self

    def signals_received(self) -> list[int]:
        """Return which ranks were told to stop. A collective of all ranks."""
        import torch
        from megatron.training.dist_signal_handler import all_gather_item

        told: list[int] = all_gather_item(int(self.heard), dtype=torch.int32)
        self.agreed = any(told)
        return told

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = True


def is_stop(exit_codes: Iterable[int], *, told: bool) -> bool:
    """Whether ranks ended because they were to stop.

    Args:
        exit_codes: of the ranks that did not end with 0; minus a signal's number where one ended
            the rank.
        told: the launcher passed a stop signal on, which ends ranks that do not listen yet.
    """
    codes = set(exit_codes)
    return codes <= {STOPPED, *(-each for each in STOP_SIGNALS)} and (STOPPED in codes or told)
