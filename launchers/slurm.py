"""Slurm's commands, with its words in one clear error where they fail. Nothing here needs
NeMo-Run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mellum2_megatron.common.errors import InputError, WorkError

FINISHED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT REVOKED".split()
)
"""States that a job does not leave by itself. A requeued job is PENDING again."""

_SECONDS = 60
_JOB = re.compile(r"(?P<job>\d+)(?:_(?P<task>\d+))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """What Slurm says about a job, or about one task of an array.

    Attributes:
        job_id: ``12``, or ``12_3`` for a task.
        state: Slurm's word, such as ``PENDING``.
        reason: why it waits or ended, if Slurm says so.
        name: of the job.
        nodes: where it runs or ran, as Slurm writes it (``n[1-4]``).
        elapsed: running time since its last start.
        restarts: how often it was requeued.
        exit_code: of the batch script; None while it has none.
        log: of the batch script.
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
        """Whether it will not change any more."""
        return self.state in FINISHED


def require(program: str = "sbatch") -> None:
    """Check that Slurm is on this machine.

    Raises:
        InputError: it is not.
    """
    if shutil.which(program) is None:
        raise InputError(
            f"{program} is not on PATH",
            rule="Slurm jobs are submitted and watched from a machine that has Slurm",
            fix="log in to the cluster and give the command there; `mellum2 launch ... --render sbatch` writes the "
            "script anywhere",
        )


def submit(script: Path, *, dependency: Sequence[str] = ()) -> str:
    """Submit a script and return the job's number.

    Raises:
        InputError: no Slurm here.
        WorkError: Slurm refuses, in its own words.
    """
    require()
    words = ["sbatch", "--parsable"]
    if dependency:  # what waits for a job that has failed would wait for ever
        words += [f"--dependency={','.join(dependency)}", "--kill-on-invalid-dep=yes"]
    words += [str(script)]
    return _output(words).strip().partition(";")[0]  # NUMBER;CLUSTER where there are several


def job_number(word: str) -> tuple[str, int | None]:
    """Split ``12`` or ``12_3`` into job and task.

    Raises:
        InputError: it is neither.
    """
    found = _JOB.fullmatch(word)
    if found is None:
        raise InputError(
            f"job {word!r}",
            rule="is no number of Slurm",
            fix="write it like 12, or 12_3 for a task",
        )
    return found["job"], None if found["task"] is None else int(found["task"])


def states(job_id: str) -> tuple[JobState, ...]:
    """Return the job, or each task of an array in order; nothing if Slurm no longer knows it.

    The controller forgets a job some minutes after its end (``MinJobAge``); where accounting is on,
    it is asked then.

    Raises:
        InputError: no Slurm here.
        WorkError: Slurm does not answer.
    """
    require("scontrol")
    done = _run(["scontrol", "--oneliner", "show", "job", job_id])
    if done.returncode == 0:
        found = [state for line in done.stdout.splitlines() for state in _parse(line)]
        # A task that ran is on a line of its own, and a task that has never run on the array's.
        return tuple(sorted(found, key=lambda state: job_number(state.job_id)[1] or 0))
    if "Invalid job id" in done.stderr:
        return _accounting(job_id)
    raise _failure(done)


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs or tasks; those that have ended are left in peace.

    Raises:
        InputError: no Slurm here.
        WorkError: Slurm refuses.
    """
    require("scancel")
    _output(["scancel", *job_ids])


def expand(tasks: str) -> tuple[int, ...]:
    """Return the tasks of Slurm's ``0-2,5%4``.

    >>> expand("0-2,5%4"), expand("7")
    ((0, 1, 2, 5), (7,))
    """
    found: list[int] = []
    for part in tasks.partition("%")[0].split(","):
        numbers, _, step = part.partition(":")
        first, _, last = numbers.partition("-")
        found += range(int(first), int(last or first) + 1, int(step or 1))
    return tuple(found)


def _parse(line: str) -> list[JobState]:
    """Read one line of ``scontrol --oneliner show job``."""
    values = dict(re.findall(r"(?:^|\s)([A-Za-z][A-Za-z:/_]*)=(\S*)", line))
    log = re.search(
        r"\sStdOut=(/.*?)(?=\s[A-Za-z][A-Za-z:/]*=|\s*$)", line
    )  # a path may have blanks
    if "JobState" not in values:
        return []
    job, tasks = values.get("ArrayJobId") or values["JobId"], values.get("ArrayTaskId")
    reason = values.get("Reason", "None")
    state = values["JobState"]
    numbers: tuple[int | None, ...] = expand(tasks) if tasks and tasks != "N/A" else (None,)
    return [
        JobState(
            job_id=job if task is None else f"{job}_{task}",
            state=state,
            reason=None if reason in ("None", "(null)") else reason,
            name=values.get("JobName", ""),
            nodes=_known(values.get("NodeList")),
            elapsed=values.get("RunTime", ""),
            restarts=int(values.get("Restarts", 0)),
            exit_code=int(values["ExitCode"].partition(":")[0])
            if state in FINISHED and "ExitCode" in values
            else None,
            log=None if log is None else Path(log[1]),
        )
        for task in numbers
    ]


def _known(value: str | None) -> str:
    return "" if value in (None, "(null)", "None", "None assigned") else str(value)


def _accounting(job_id: str) -> tuple[JobState, ...]:
    if shutil.which("sacct") is None:
        return ()
    fields = "JobID,State,Reason,JobName,NodeList,Elapsed,ExitCode"
    done = _run(
        [
            "sacct",
            "--noheader",
            "--parsable2",
            "--allocations",
            f"--jobs={job_id}",
            f"--format={fields}",
        ]
    )
    if done.returncode:  # accounting is off: nobody knows any more
        return ()
    found = []
    for line in done.stdout.splitlines():
        number, state, reason, name, nodes, elapsed, code = line.split("|")
        word = state.split()[0]  # `CANCELLED by 1000`
        found += [
            JobState(
                job_id=number,
                state=word,
                reason=None if reason == "None" else reason,
                name=name,
                nodes=_known(nodes),
                elapsed=elapsed,
                exit_code=int(code.partition(":")[0]) if word in FINISHED else None,
            )
        ]
    return tuple(found)


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
            timeout=_SECONDS,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise WorkError(
            f"{words[0]} did not answer in {_SECONDS} seconds",
            fix="look whether Slurm's controller is up: `scontrol ping`",
        ) from None


def _failure(done: subprocess.CompletedProcess[str]) -> WorkError:
    said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
    return WorkError(f"{done.args[0]}: {said.rstrip('.')}", fix=_fix(said))


def _fix(said: str) -> str:
    for words, fix in _FIXES.items():
        if words in said:
            return fix
    return "see what Slurm says; the profile holds what was asked for"


_FIXES = {
    "invalid account": "set account in the profile; `sacctmgr show associations user=$USER` lists yours",
    "Invalid account": "set account in the profile; `sacctmgr show associations user=$USER` lists yours",
    "invalid partition": "set partition in the profile; `sinfo -s` lists them",
    "Invalid qos": "set qos in the profile; `sacctmgr show associations user=$USER format=qos` lists yours",
    "node configuration is not available": "ask for less a node, or another partition; `sinfo -o '%P %D %c %m %G'` "
    "lists what nodes have",
    "More processors requested": "ask for fewer nodes or cores, or another partition",
    "time limit": "lower time in the profile; `sinfo -o '%P %l'` lists the limits",
    "Unable to contact slurm controller": "look whether Slurm's controller is up: `scontrol ping`",
}
