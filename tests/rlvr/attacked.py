"""The hostile programs at work, and what they attack."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from mellum2_megatron.rlvr.rewards.code_tests import CodeTests
from mellum2_megatron.rlvr.rewards.sandbox import Limits, Outcome, find_sandbox
from mellum2_megatron.rlvr.rewards.verdict import Answer, Verdict
from tests.rlvr.hostile_programs import CHEATS, ESCAPES, EXHAUSTING, PORT, SECRET_PATH

MARKER = str(86_400 + os.getpid())
"""Seconds that a process sleeps which must not be there afterwards: found by its command line."""

TIGHT = Limits(
    seconds=5.0,
    cpu_seconds=2,
    memory_bytes=256 << 20,
    processes=24,
    file_bytes=8 << 20,
    disk_bytes=32 << 20,
    files=500,
    output_bytes=1 << 16,
)
TASK = {
    "tests": [
        {"assert": "assert add(2, 3) == 5"},
        {"call": "add(10, -4)", "equals": "6"},
        {"call": "add(987654300, 21)", "equals": "987654321"},
        {"call": "add(0.5, 0.25)", "equals": "0.75", "tolerance": 1e-6},
    ],
    "seconds": 4,
}


class Attacked:
    """What outsiders see: a file, a listener, and the futures of all programs, run side by side.

    Args:
        folder: folder of the file.
        names: the programs to run, default all.
    """

    def __init__(self, folder: Path, names: Collection[str] = ()) -> None:
        self.secret = folder / "secret"
        self.secret.write_text("of the user")
        self.secret.chmod(0o644)
        self.listener = socket.create_server(("127.0.0.1", 0))
        port = str(self.listener.getsockname()[1])
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind("\0mellum2-test-" + port)
        self.abstract.listen()
        self.pool = ThreadPoolExecutor(6)
        self.runs: dict[str, Future[Outcome]] = {}
        self.verdicts: dict[str, Future[Verdict]] = {}
        programs = ESCAPES | {name: program for name, (program, _) in EXHAUSTING.items()}
        for name, program in programs.items():
            if names and name not in names:
                continue
            text = program.replace(SECRET_PATH, str(self.secret)).replace(PORT, port)
            text = text.replace("@MARKER@", MARKER)
            # On a busy machine five seconds may be over before another limit is reached.
            waits = EXHAUSTING.get(name, ("", ""))[1].startswith("time")
            limits = TIGHT if waits else dataclasses.replace(TIGHT, seconds=60.0)
            self.runs[name] = self.pool.submit(find_sandbox().run, text, limits=limits)
        for name, program in CHEATS.items():
            if names and name not in names:
                continue
            answer = Answer(text=f"```python\n{program}\n```")
            self.verdicts[name] = self.pool.submit(CodeTests().score, answer, TASK, [])

    def close(self) -> None:
        self.pool.shutdown()
        self.listener.close()
        self.abstract.close()
