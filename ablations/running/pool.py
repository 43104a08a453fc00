"""The local executor: tasks as processes of `mellum2 train`, as many at a time as there are cores.

A task that fails is reported with its log and stops no other. Killed at any moment, the runner
leaves tasks that the next start continues: a training whose runner is gone keeps its lock and goes
on, and the next runner waits for it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from ablations.running.results import State, TaskRecord, read_task
from ablations.running.tasks import Progress, Task, examine, link_twin, try_lock
from mellum2_megatron.checkpoint.folder import RUN_FILE
from mellum2_megatron.common.console import console, print_line
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Device
from mellum2_megatron.faults.stop_request import STOPPED
from mellum2_megatron.metrics import read_metrics
from mellum2_megatron.metrics.log import METRICS_FILE, series

_POLL = 0.5
"""Seconds between two looks at the running tasks."""
_SECONDS_TO_SAVE = 120.0
"""Seconds that a task has to save after the runner was interrupted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slots:
    """Places for tasks on this machine.

    Attributes:
        tasks: tasks at a time.
        ranks: ranks of each.
        threads: threads of each rank on a CPU.
        gpus: GPUs of each place, as in ``CUDA_VISIBLE_DEVICES``; empty on a CPU.
    """

    tasks: int
    ranks: int
    threads: int
    gpus: tuple[str, ...] = ()

    @classmethod
    def on_this_machine(cls, ranks: int, device: Device, tasks: int | None) -> Slots:
        """Return the places for tasks of ``ranks`` ranks.

        Args:
            ranks: ranks of a task.
            device: device of the ranks.
            tasks: tasks at a time; None: as many as cores or GPUs allow.

        Raises:
            InputError: more ranks than cores or GPUs.
        """
        if device == "cuda":
            import torch

            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            names = visible.split(",") if visible else list(map(str, range(_count(torch))))
            have, noun = len(names), "GPUs"
        else:
            names, have, noun = [], len(os.sched_getaffinity(0)), "cores"
        wanted = tasks or max(1, have // ranks)
        if ranks * wanted > have:
            raise InputError(
                f"--parallel {wanted}" if tasks else f"a task of {ranks} ranks",
                rule=f"{wanted} task(s) of {ranks} rank(s) do not fit {have} {noun}",
                fix=f"use --parallel {have // ranks}"
                if have >= ranks
                else "use a larger machine, or --executor slurm",
            )
        return cls(
            tasks=wanted,
            ranks=ranks,
            threads=max(1, have // (ranks * wanted)),
            gpus=tuple(
                ",".join(names[place * ranks : (place + 1) * ranks]) for place in range(wanted)
            )
            if names
            else (),
        )

    def environment(self, place: int) -> dict[str, str]:
        """Return the environment of the task in a place."""
        if self.gpus:
            return {"CUDA_VISIBLE_DEVICES": self.gpus[place]}
        return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self.threads))}


@dataclass(kw_only=True)
class _Running:
    task: Task
    process: subprocess.Popen[bytes]
    lock: IO[bytes]
    place: int
    began: float
    early: str = ""


def train_command(task: Task, device: Device) -> list[str]:
    """Return the command that trains a task, or resumes it from its last checkpoint."""
    words = [sys.executable, "-m", "mellum2_megatron", "train", str(task.folder / RUN_FILE)]
    return [*words, "--device", device, "--nproc", str(task.ranks)]


@dataclass(kw_only=True)
class Pool:
    """Runs tasks on this machine.

    Attributes:
        results: folder of all results.
        slots: places for tasks.
        device: device of the ranks.
        environment: variables of every task, such as W&B's group; default none.
        command: command of a task on a device, default `train_command`.
    """

    results: Path
    slots: Slots
    device: Device
    environment: Mapping[str, str] = field(default_factory=dict)
    command: Callable[[Task, Device], Sequence[str]] = train_command
    _running: list[_Running] = field(default_factory=list)
    _failed: list[TaskRecord] = field(default_factory=list)

    def run(self, progress: Sequence[Progress]) -> list[TaskRecord]:
        """Do what is left of the tasks; return the records of those that failed.

        Raises:
            KeyboardInterrupt: interrupted; running tasks have saved and go on when run again.
        """
        waiting = [entry.task for entry in progress if entry.todo != "nothing"]
        total, finished = len(waiting), 0
        handler = signal.signal(signal.SIGTERM, _interrupt)
        try:
            with console.status("") as status:
                while waiting or self._running:
                    for task in list(waiting):
                        if self._begin(task, waiting):
                            waiting.remove(task)
                    finished = total - len(waiting) - len(self._running)
                    status.update(self._line(finished, total))
                    time.sleep(_POLL)
                    self._collect()
        except BaseException:
            self._interrupt_all()
            raise
        finally:
            signal.signal(signal.SIGTERM, handler)
        return self._failed

    def _begin(self, task: Task, waiting: Sequence[Task]) -> bool:
        """Start a task, or settle it without a start; return false if it must wait."""
        after = task.after
        if after is not None and (
            after in waiting or any(one.task is after for one in self._running)
        ):
            return False
        free = set(range(self.slots.tasks)) - {one.place for one in self._running}
        if not free:
            return False  # before any look at the disk, where other studies may lie by thousands
        lock = try_lock(self.results, task.record.hash)
        if lock is None:
            return False  # another runner trains it
        # While it waited, another runner may have finished it, or its twin in another study.
        now = examine([task], self.results, locked=True)[0]
        if now.todo == "nothing":
            lock.close()
            return True
        if now.twin is not None:
            link_twin(task, now.twin)
            lock.close()
            print_line(f"{task.label}: is {now.twin}")
            return True
        if after is not None and examine([after], self.results)[0].todo != "nothing":
            lock.close()
            self._end(task, "failed", f"{after.label}, which it starts from, has failed")
            return True
        self._start(task, lock, min(free))
        return True

    def _start(self, task: Task, lock: IO[bytes], place: int) -> None:
        task.prepare()
        task.record.replace(state="running", started=_now()).write(task.folder)
        with task.log.open("ab") as log:
            process = subprocess.Popen(
                self.command(task, self.device),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.slots.environment(place), **self.environment},
                # The training holds the lock too, and an interrupt reaches it through us alone.
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )
        self._running.append(
            _Running(task=task, process=process, lock=lock, place=place, began=time.monotonic())
        )
        print_line(f"{task.label}: started, hash {task.record.hash}, log {task.log}")

    def _collect(self) -> None:
        """Settle the tasks that have ended, and apply the stop rule to the others."""
        for one in list(self._running):
            code = one.process.poll()
            if code is None:
                if one.task.limit is not None and not one.early:
                    one.early = one.task.limit.verdict(one.task.folder) or ""
                    if one.early:
                        one.process.send_signal(signal.SIGTERM)
                continue
            self._running.remove(one)
            one.lock.close()
            seconds = time.monotonic() - one.began
            if one.early and code in (0, STOPPED):
                self._end(one.task, "early", one.early, code)
            elif code == 0:
                self._end(one.task, "done", "", code, seconds)
            elif code == STOPPED:
                self._end(one.task, "stopped", "told to stop, and saved", code)
            else:
                self._end(one.task, "failed", _reason(one.task.log, code), code)

    def _end(
        self, task: Task, state: State, message: str, code: int | None = None, seconds: float = 0.0
    ) -> None:
        """Write and report the end of a task."""
        started = read_task(task.folder)
        record = (started or task.record).replace(
            state=state, message=message, ended=_now(), exit_code=code, seconds=round(seconds, 1)
        )
        record.write(task.folder)
        if state == "failed":
            self._failed.append(record)
        line = f"{task.label}: {state}" + (f" in {seconds:,.0f} s" if seconds else "")
        if message:
            line += f": {message}"
        print_line(line + (f"; log {task.log}" if state == "failed" else ""))

    def _line(self, finished: int, total: int) -> str:
        parts = [f"{one.task.label} {_step(one.task)}" for one in self._running]
        return f"{finished} of {total} tasks; " + (", ".join(parts) or "waiting for other runners")

    def _interrupt_all(self) -> None:
        """Have the running tasks save and end."""
        for one in self._running:
            one.process.send_signal(signal.SIGTERM)
        for one in self._running:
            try:
                code = one.process.wait(_SECONDS_TO_SAVE)
            except subprocess.TimeoutExpired:
                one.process.kill()
                code = one.process.wait()
            one.lock.close()
            done = code == 0
            self._end(one.task, "done" if done else "stopped", "" if done else "interrupted", code)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _count(torch: object) -> int:
    return int(torch.cuda.device_count())  # type: ignore[attr-defined]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _step(task: Task) -> str:
    try:
        steps, _ = series(read_metrics(task.folder / METRICS_FILE), "lm_loss")
    except (InputError, OSError):
        steps = []  # not there yet, or half a line is being written
    return f"{steps[-1] if steps else 0}/{task.run.schedule.train_steps}"


def _reason(log: Path, code: int) -> str:
    """Return the error in a log, or the exit code."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else f"exit code {code}"
