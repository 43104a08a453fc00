"""A piece of the check: its outcome, and the place and tools that it works with."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from mellum2_megatron.common.json_files import load_json

Status = Literal["passed", "failed", "skipped"]

LIMIT = 600.0
"""Longest time of a piece, in seconds."""


class PieceError(Exception):
    """A command of a piece failed or took too long; the message is one line."""


class SkipPiece(Exception):  # noqa: N818  # not an error
    """This machine cannot run a piece; the message is the reason, in one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Result of a piece.

    Attributes:
        status: ``passed``, ``failed`` or ``skipped``.
        reason: what failed or is missing here; empty (default) for a piece that passed.
        figures: measured values by name, of JSON types; default none.
        decides: lines on settings that the figures decide, default none.
    """

    status: Status
    reason: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    decides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Workplace:
    """The machine, and the folders and processes of the check.

    Attributes:
        folder: folder of the results for this machine and code.
        rehearsal: a tiny model on a CPU in place of the 12B's slice on a GPU.
        machine: facts of `machine.facts`.
        checkout: root of the repository; None if the package is installed without it.
        deadline: value of `time.monotonic` at which the running piece must end.
    """

    folder: Path
    rehearsal: bool
    machine: dict[str, Any]
    checkout: Path | None
    deadline: float

    @property
    def gpus(self) -> int:
        """Number of GPUs; 0 in a rehearsal."""
        return 0 if self.rehearsal else len(self.machine["gpus"])

    @property
    def deterministic_lacks(self) -> str | None:
        """What deterministic mode lacks on these GPUs; None if nothing is known to be missing."""
        hopper = [9, 0]
        if self.rehearsal or all(gpu["capability"] >= hopper for gpu in self.machine["gpus"]):
            return None
        if importlib.util.find_spec("flash_attn") is not None:
            return None
        return "before Hopper deterministic attention is FlashAttention's, which is not installed"

    @property
    def work(self) -> Path:
        """Folder of runs, checkpoints and scores, which later pieces use."""
        return self.folder / "work"

    def mellum2(self, name: str, *words: str) -> str:
        """Run a command of mellum2; arguments, result and errors as for `run`."""
        return self.run(name, [sys.executable, "-m", "mellum2_megatron", *words])

    def run(
        self,
        name: str,
        command: Sequence[str],
        *,
        accepted: tuple[int, ...] = (0,),
        environment: dict[str, str] | None = None,
    ) -> str:
        """Run a command until the deadline, with its output in ``logs/NAME.log``.

        Args:
            name: name of the log.
            command: program and arguments; it runs in the checkout, if there is one.
            accepted: exit codes of a success, default 0 alone.
            environment: variables to add, default none.

        Returns:
            The output, standard error included.

        Raises:
            PieceError: another exit code, or not done at the deadline.
        """
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.rehearsal else {}
        with log.open("w", encoding="utf-8") as stream:
            # A group of its own, so that what a command leaves behind ends with it.
            process = subprocess.Popen(
                command,
                cwd=self.checkout or self.folder,
                env=os.environ | hidden | (environment or {}),
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(max(1.0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise PieceError(f"{name}: not done in time (see {log})") from None
            finally:
                _end_group(process)
        text = log.read_text(encoding="utf-8", errors="replace")
        if code not in accepted:
            raise PieceError(f"{name}: exit code {code}: {cause(text)} (see {log})")
        return text


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One part of the check.

    Attributes:
        name: name of its result, and of ``--only``.
        title: question that it answers.
        run: the work; may raise `PieceError` or `SkipPiece`.
        needs: pieces that must have passed before, default none.
        leaves: file or folder below `Workplace.work` that other pieces need; empty (default): none.
        always: run it at every call, because it reads results of other pieces; default false.
        limit: longest time in seconds, default `LIMIT`.
    """

    name: str
    title: str
    run: Callable[[Workplace], Outcome]
    needs: tuple[str, ...] = ()
    leaves: str = ""
    always: bool = False
    limit: float = LIMIT


def result_file(folder: Path, piece: str) -> Path:
    """Return the file of a piece's result."""
    return folder / "pieces" / f"{piece}.json"


def stored_result(folder: Path, piece: str) -> dict[str, Any] | None:
    """Return the stored result of a piece: `Outcome`'s fields and ``seconds``; None without one."""
    file = result_file(folder, piece)
    return load_json(file) if file.is_file() else None


def passed_figures(folder: Path, piece: str) -> dict[str, Any]:
    """Return the figures of a piece; empty if it has not passed."""
    stored = stored_result(folder, piece)
    if stored is None or stored["status"] != "passed":
        return {}
    return dict(stored["figures"])


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a command and the ranks that it has left behind, which have sessions of their own."""
    ranks: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        ranks = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()
    process.wait()


def cause(text: str) -> str:
    """Return the line of an output that tells most about a failure."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    causes = [line for line in lines if line.startswith("error:") or "Error" in line]
    return (causes or lines or ["no output"])[-1][:300]
