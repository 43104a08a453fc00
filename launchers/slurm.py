"""Slurm's commands: submit, cancel and read states. Errors quote Slurm's own message.

This module needs no NeMo-Run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mellum2_megatron.common.errors import InputError, WorkError

FINISHED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL "
    "OUT_OF_MEMORY PREEMPTED TIMEOUT REVOKED".split()
)
"""Final states of a job. A requeued job is PENDING again."""

_TIMEOUT = 60
"""Seconds to wait for a command of Slurm."""
_CONFIRM_SECONDS = 10.0
"""Seconds to wait until Slurm shows that a job is cancelled."""
_JOB = re.compile(r"(?P<job>\d+)(?:_(?P<task>\d+))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """Slurm's record of a job, or of one task of an array.

    Attributes:
        job_id: ``12``, or ``12_3`` for a task.
        state: Slurm's state, such as ``PENDING``.
        reason: reason for waiting or for the end; None without one.
        name: name of the job.
        nodes: nodes in Slurm's notation (``n[1-4]``); empty without any.
        elapsed: running time since the last start, ``[D-]HH:MM:SS``.
        restarts: number of requeues.
        exit_code: exit code of the batch script; None until it has ended.
        log: log of the batch script; None if unknown.
    """

    job_id: str
    state: str
    reason: str | None = None
    name: str = ""
    nodes: str = ""
    elapsed: str = ""
    restarts: int = 0
    exit_code: int | None = None
    log: Path | None = None

    @property
    def finished(self) -> bool:
        """True in a final state."""
        return self.state in FINISHED


def require(program: str = "sbatch") -> None:
    """Check that a program of Slurm, by default sbatch, is on this machine.

    Raises:
        InputError: it is not on PATH.
    """
    if shutil.which(program) is None:
        raise InputError(
            f"{program} is not on PATH",
            rule="Slurm jobs are submitted and watched from a machine that has Slurm",
            fix="log in to the cluster and give the command there; "
            "`mellum2 launch ... --render sbatch` writes the script anywhere",
        )


def submit(script: Path, *, dependency: Sequence[str] = ()) -> str:
    """Submit a script and return the job number.

    Args:
        script: batch script.
        dependency: conditions, such as ``afterok:123``; default none.

    Raises:
        InputError: no Slurm on this machine.
        WorkError: Slurm refuses.
    """
    require()
    words = ["sbatch", "--parsable"]
    if dependency:
        # Without --kill-on-invalid-dep a job waits for ever for one that has failed.
        words += [f"--dependency={','.join(dependency)}", "--kill-on-invalid-dep=yes"]
    words += [str(script)]
    # --parsable prints NUMBER, or NUMBER;CLUSTER on a site with several clusters.
    return _output(words).strip().partition(";")[0]


def job_number(word: str) -> tuple[str, int | None]:
    """Split ``12`` or ``12_3`` into job and task.

    Raises:
        InputError: it is neither.
    """
    match = _JOB.fullmatch(word)
    if match is None:
        raise InputError(
            f"job {word!r}",
            rule="is no number of Slurm",
            fix="write it like 12, or 12_3 for a task",
        )
    return match["job"], None if match["task"] is None else int(match["task"])


def states(job_id: str) -> tuple[JobState, ...]:
    """Return the state of a job, or of each task of an array in order.

    The result is empty if Slurm has forgotten the job. The controller forgets it some minutes after
    its end (``MinJobAge``), and accounting may be off.

    Raises:
        InputError: no Slurm on this machine.
        WorkError: Slurm does not answer.
    """
    require("scontrol")
    done = _run(["scontrol", "--oneliner", "show", "job", job_id])
    if done.returncode == 0:
        # A started task has a line of its own; the others share the line of the array.
        job_states = [state for line in done.stdout.splitlines() for state in _parse(line)]
        return tuple(sorted(job_states, key=lambda state: job_number(state.job_id)[1] or 0))
    if "Invalid job id" in done.stderr:
        return _accounting(job_id)
    raise _failure(done)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cancellation:
    """What Slurm confirms about a job after ``scancel``.

    Attributes:
        job_id: job or task as it was named.
        done: true if the job is cancelled or had already ended.
        note: the outcome in words, with Slurm's own message if it refused.
    """

    job_id: str
    done: bool
    note: str


def request_cancel(job_id: str) -> None:
    """Ask Slurm to cancel a job or task, and do not wait for it.

    Raises:
        InputError: no Slurm on this machine.
        WorkError: Slurm refuses.
    """
    require("scancel")
    _output(["scancel", job_id])


def cancel(job_id: str) -> Cancellation:
    """Cancel a job or task and return what Slurm shows afterwards; ended jobs are no error.

    Raises:
        InputError: no Slurm on this machine.
        WorkError: Slurm does not answer.
    """
    require("scancel")
    before = states(job_id)
    if not before:
        return Cancellation(job_id=job_id, done=False, note="not found: Slurm has no such job")
    if all(state.finished for state in before):
        return Cancellation(
            job_id=job_id, done=True, note=f"had already ended: {_state_words(before)}"
        )
    asked = _run(["scancel", job_id])
    # scancel returns before the job has left its nodes, and in some versions with 0 when refused.
    end = time.monotonic() + _CONFIRM_SECONDS
    after = states(job_id)
    while not _is_leaving(after) and not asked.returncode and time.monotonic() < end:
        time.sleep(0.5)
        after = states(job_id)
    said = " ".join(asked.stderr.split())
    if _is_leaving(after):
        return Cancellation(job_id=job_id, done=True, note=f"cancelled: {_state_words(after)}")
    return Cancellation(
        job_id=job_id,
        done=False,
        note=f"not cancelled: Slurm shows {_state_words(after)}" + (f" ({said})" if said else ""),
    )


def _is_leaving(job_states: Sequence[JobState]) -> bool:
    return all(state.finished or state.state == "COMPLETING" for state in job_states)


def _state_words(job_states: Sequence[JobState]) -> str:
    return ", ".join(dict.fromkeys(state.state for state in job_states)) or "nothing"


def expand(tasks: str) -> tuple[int, ...]:
    """Return the task numbers in Slurm's notation of an array; ``%4`` only limits tasks at a time.

    >>> expand("0-2,5%4"), expand("7")
    ((0, 1, 2, 5), (7,))
    """
    expanded: list[int] = []
    # Slurm shortens a long list with "...".
    for part in tasks.partition("%")[0].replace("...", "").strip(",").split(","):
        numbers, _, step = part.partition(":")
        first, _, last = numbers.partition("-")
        expanded += range(int(first), int(last or first) + 1, int(step or 1))
    return tuple(expanded)


def _parse(line: str) -> list[JobState]:
    """Read one line of ``scontrol --oneliner show job``."""
    values = dict(re.findall(r"(?:^|\s)([A-Za-z][A-Za-z:/_]*)=(\S*)", line))
    if "JobState" not in values:
        return []
    # The log's path is the one value that may hold blanks: it ends before the next key.
    log = re.search(r"\sStdOut=(/.*?)(?=\s[A-Za-z][A-Za-z:/]*=|\s*$)", line)
    # Users name a task ARRAY_TASK; its JobId is another number.
    job, tasks = values.get("ArrayJobId") or values["JobId"], values.get("ArrayTaskId")
    numbers: tuple[int | None, ...] = expand(tasks) if tasks and tasks != "N/A" else (None,)
    state = values["JobState"]
    reason = values.get("Reason", "None")
    exit_code = None
    if state in FINISHED and "ExitCode" in values:
        # CODE:SIGNAL, which is 0:0 until the job has ended.
        exit_code = int(values["ExitCode"].partition(":")[0])
    return [
        JobState(
            job_id=job if task is None else f"{job}_{task}",
            state=state,
            reason=None if reason in ("None", "(null)") else reason,
            name=values.get("JobName", ""),
            nodes=_known(values.get("NodeList")),
            elapsed=values.get("RunTime", ""),
            restarts=int(values.get("Restarts", 0)),
            exit_code=exit_code,
            log=None if log is None else Path(log[1]),
        )
        for task in numbers
    ]


def _known(value: str | None) -> str:
    # scontrol and sacct write an absent value in different ways.
    return "" if value in (None, "(null)", "None", "None assigned") else str(value)


def _accounting(job_id: str) -> tuple[JobState, ...]:
    """Return states from the accounting database; empty if accounting is off or has no such job.

    Raises:
        WorkError: accounting is on and does not answer.
    """
    if shutil.which("sacct") is None:
        return ()
    # --allocations: one row per job or task, none for its steps.
    words = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}"]
    # The name comes last, because it may hold the separator.
    done = _run([*words, "--format=JobID,State,Reason,NodeList,Elapsed,ExitCode,JobName"])
    if done.returncode:
        if "accounting storage is disabled" in done.stderr.lower():
            return ()
        raise _failure(done)
    states = []
    for line in done.stdout.splitlines():
        fields = line.split("|", 6)
        if len(fields) != 7:
            raise WorkError(
                f"sacct: {line!r} has not the seven fields that were asked for",
                fix=f"see `sacct --jobs={job_id}`",
            )
        number, state_text, reason, nodes, elapsed, code, name = fields
        state = (state_text.split() or ["UNKNOWN"])[0].rstrip("+")  # `CANCELLED by 1000`
        code = code.partition(":")[0]
        states.append(
            JobState(
                job_id=number,
                state=state,
                reason=None if reason in ("", "None") else reason,
                name=name,
                nodes=_known(nodes),
                elapsed=elapsed,
                exit_code=int(code) if state in FINISHED and code.isdigit() else None,
            )
        )
    return tuple(states)


def _output(words: Sequence[str]) -> str:
    done = _run(words)
    if done.returncode:
        raise _failure(done)
    return done.stdout


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            words,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT,
            # Messages in English: `_FIXES` and `states` look for words in them.
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise WorkError(
            f"{words[0]} did not answer in {_TIMEOUT} seconds",
            fix="check that Slurm's controller is up: `scontrol ping`",
        ) from None


def _failure(done: subprocess.CompletedProcess[str]) -> WorkError:
    # Slurm may write several lines; the error is one sentence.
    message = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
    fixes = (fix for words, fix in _FIXES.items() if words in message)
    return WorkError(
        f"{done.args[0]}: {message.rstrip('.')}",
        fix=next(fixes, "see what Slurm says; the profile holds what was asked for"),
    )


_ACCOUNT_FIX = "set account in the profile; `sacctmgr show associations user=$USER` lists yours"
_FIXES = {
    "invalid account": _ACCOUNT_FIX,
    "Invalid account": _ACCOUNT_FIX,
    "invalid partition": "set partition in the profile; `sinfo -s` lists them",
    "Invalid qos": "set qos in the profile; "
    "`sacctmgr show associations user=$USER format=qos` lists yours",
    "node configuration is not available": "ask for less per node, or another partition; "
    "`sinfo -o '%P %D %c %m %G'` lists what nodes have",
    "More processors requested": "ask for fewer nodes or cores, or another partition",
    "time limit": "lower time in the profile; `sinfo -o '%P %l'` lists the limits",
    "Unable to contact slurm controller": "check that Slurm's controller is up: `scontrol ping`",
}
"""Words of Slurm's message -> fix."""
