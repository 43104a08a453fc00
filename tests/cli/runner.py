"""Run the command line in this process or in one of its own."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import hashlib
import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mellum2_megatron.cli import app as cli
from tests import REPOSITORY
from tests.small import SMALL_MODEL

TINY = "mellum2_tiny_pretrain"
BIG = "mellum2_12b_pretrain_phase1"
SMALL = [
    *SMALL_MODEL,
    "schedule.batch_schedule=[[0,4]]",
    "schedule.decay_samples=4",
    "schedule.train_samples=12",
    "logging.eval_iterations=0",
    "checkpoint.save_interval=1",
]
PACK = ["--vocab-size", "360", "--workers", "1", "--valid-fraction", "0.2"]
"""Options of a small `data prepare`."""
PREPARE = [*PACK, "--format", "megatron"]


@dataclasses.dataclass
class Result:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    def refused(self, *named: str, code: int = 2) -> None:
        """Assert that it ended with one message of value, rule and fix, and printed nothing else.

        Args:
            named: texts that the message must contain.
            code: exit code; 2 for bad input, 1 for a failure at work.
        """
        assert self.code == code, self
        assert self.out == "", self
        assert self.err.startswith("error: "), self
        assert self.err.count("error:") == 1, self
        assert "Traceback" not in self.err, self
        assert " Fix: " in self.err, self
        for name in named:
            assert name in self.err, (name, self.err)


def mellum2(*words: str | Path) -> Result:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    # `quiet_upstream` changes loggers and `print` for the rest of a process: both are restored.
    levels = {
        logger: logger.level
        for logger in logging.root.manager.loggerDict.values()
        if isinstance(logger, logging.Logger)
    }
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(builtins, "print", builtins.print)
        patch.setattr(sys, "argv", ["mellum2", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
    for logger, level in levels.items():
        logger.setLevel(level)
    return Result(code, out.getvalue(), err.getvalue())


def process(*words: str | Path, module: bool = False, **options: Any) -> Result:
    """Run the installed command, or the module, in a process of its own."""
    script = [str(Path(sys.executable).with_name("mellum2"))]
    command = [sys.executable, "-m", "mellum2_megatron"] if module else script
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        **options,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def snapshot(folder: Path) -> dict[str, str]:
    """Return every path below a folder with the hash of its content."""
    return {
        str(path.relative_to(folder)): "folder"
        if path.is_dir()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }
