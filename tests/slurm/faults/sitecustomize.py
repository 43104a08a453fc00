"""Put first on a job's PYTHONPATH: lets a test stop a rank in front of a step, and do something to
it there.

A file ``gate`` in the run's folder holds a number and a word. Before the first micro-batch of that
optimizer step each rank leaves its process number in ``arrived.RANK`` and then, for ``hold``, waits
until the file is gone or the rank is told to stop; for ``fail`` it raises.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any


def _install() -> None:
    from mellum2_megatron.faults.hang_watch import HangWatch
    from mellum2_megatron.faults.stop_request import StopRequest

    folder, heard = Path(sys.orig_argv[3]).parent, []
    on_signal, count = StopRequest._on_signal, HangWatch.count_micro_batches

    def note_signal(self: Any, *args: Any) -> None:
        heard.append(args)
        on_signal(self, *args)

    def gated(self: Any, forward_step: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            _wait(folder / "gate", heard)
            return forward_step(*args, **kwargs)

        return count(self, step)

    StopRequest._on_signal, HangWatch.count_micro_batches = note_signal, gated  # type: ignore[method-assign]


def _wait(gate: Path, heard: list[Any]) -> None:
    from megatron.training import get_args

    if not gate.is_file():
        return
    at, word = gate.read_text().split()
    if get_args().curr_iteration + 1 != int(at):
        return
    (gate.parent / f"arrived.{os.environ['RANK']}").write_text(str(os.getpid()))
    if word == "fail":
        raise RuntimeError("the test wants it so")
    while gate.exists() and not heard:
        time.sleep(0.05)


if "RANK" in os.environ and "mellum2_megatron.training" in sys.orig_argv:
    _install()
