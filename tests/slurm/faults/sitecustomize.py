"""Hold or fail the ranks of a job before a step, for tests; put first on the job's PYTHONPATH.

The file ``gate`` in the run folder holds a step and a word. Before the first micro-batch of that
optimizer step each rank writes its process id to ``arrived.RANK``. With ``hold`` it then waits
until the file is gone or a stop signal comes; with ``fail`` it raises.
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

    # python -m mellum2_megatron.training RUN_FILE ..
    folder, signals = Path(sys.orig_argv[3]).parent, []
    on_signal, count = StopRequest._on_signal, HangWatch.count_micro_batches

    def note_signal(self: Any, *args: Any) -> None:
        signals.append(args)
        on_signal(self, *args)

    def gated(self: Any, forward_step: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            _wait(folder / "gate", signals)
            return forward_step(*args, **kwargs)

        return count(self, step)

    StopRequest._on_signal = note_signal  # type: ignore[method-assign]
    HangWatch.count_micro_batches = gated  # type: ignore[method-assign]


def _wait(gate: Path, signals: list[Any]) -> None:
    from megatron.training import get_args

    if not gate.is_file():
        return
    step, word = gate.read_text().split()
    if get_args().curr_iteration + 1 != int(step):
        return
    (gate.parent / f"arrived.{os.environ['RANK']}").write_text(str(os.getpid()))
    if word == "fail":
        raise RuntimeError("the test wants it so")
    while gate.exists() and not signals:
        time.sleep(0.05)


if "RANK" in os.environ and "mellum2_megatron.training" in sys.orig_argv:
    _install()
