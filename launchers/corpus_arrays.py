"""A corpus plan on a Slurm cluster: a job array for each stage, each waiting for the one before.

Every array task runs its slice of a stage's tasks with `mellum2 data run`. A submission skips the
stages that are done, so a plan whose job failed is submitted again as it is.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers import slurm
from launchers.profile import Profile
from launchers.sbatch import directives
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import write_text

LOGS_FOLDER = "logs"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageJob:
    """One job array.

    Attributes:
        stage: name of the stage; empty for the last job, which makes the phases' folders.
        slices: array tasks.
        script: batch script.
    """

    stage: str
    slices: int
    script: Path


def check_profile(profile: Profile) -> None:
    """Refuse profiles whose jobs cannot run a plan.

    Raises:
        InputError: no Slurm profile, or one with a container.
    """
    if profile.executor != "slurm":
        raise InputError(
            f"--profile {profile.name}",
            rule=f"it is for the executor {profile.executor}; arrays need Slurm",
            fix="leave --profile out to run on this machine",
        )
    if profile.container is not None:
        raise InputError(
            f"--profile {profile.name}",
            rule="a corpus plan runs in this Python environment, and the profile has a container",
            fix="name a profile without container",
        )


def write_scripts(
    plan_file: Path,
    results: Path,
    profile: Profile,
    stages: Sequence[tuple[str, int]],
    *,
    slices: int,
    code: Path,
) -> list[StageJob]:
    """Write the batch script of every stage.

    Args:
        plan_file: the plan.
        results: folder of its results.
        profile: site profile.
        stages: name and number of tasks of each stage to run; 0 tasks if not known yet.
        slices: largest number of array tasks of a stage.
        code: folder that holds this project's packages.

    Returns:
        The jobs, in order; the last makes the phases' folders.
    """
    jobs = []
    for stage, tasks in (*stages, ("", 1)):
        count = min(slices, tasks) if tasks else slices
        script = results / LOGS_FOLDER / f"{stage or 'phases'}.sbatch"
        text = "\n".join(_lines(plan_file, results, profile, stage, count, code)) + "\n"
        write_text(script, text)
        jobs.append(StageJob(stage=stage, slices=count, script=script))
    return jobs


def submit(jobs: Sequence[StageJob]) -> list[str]:
    """Submit jobs, each to start after the one before has succeeded; return their numbers.

    Raises:
        InputError: there is no Slurm here.
        WorkError: Slurm refuses one; the earlier ones stay submitted and are named.
    """
    numbers: list[str] = []
    for job in jobs:
        after = [f"afterok:{numbers[-1]}"] if numbers else []
        numbers.append(slurm.submit(job.script, dependency=after))
    return numbers


def _lines(
    plan_file: Path, results: Path, profile: Profile, stage: str, slices: int, code: Path
) -> Iterator[str]:
    """Yield the lines of one script."""
    # A % in the folder's own name would be read as a pattern.
    logs = str(results / LOGS_FOLDER).replace("%", "%%")
    yield "#!/bin/bash"
    yield from directives(
        {
            "job-name": f"{results.name}-{stage or 'phases'}",
            "account": None if profile.account == "none" else profile.account,
            "partition": profile.partition,
            "qos": profile.qos,
            "time": profile.time,
            "nodes": 1,
            "ntasks": 1,
            "cpus-per-task": profile.cpus_per_task,
            "mem": profile.memory,
            "array": f"0-{slices - 1}",
            "output": f"{logs}/%x-%A_%a.log",
            "open-mode": "append",
            # A task that is interrupted does what is missing when it runs again.
            "requeue": True,
            **profile.sbatch,
        }
    )
    if profile.modules:
        yield f"module load {shlex.join(profile.modules)}"
    yield from profile.setup
    yield "set -u"
    for name, value in profile.variables.items():
        yield f"export {name}={shlex.quote(value)}"
    yield f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    python = shlex.quote(profile.python or sys.executable)
    words = [f"exec {python} -m mellum2_megatron data run {shlex.quote(str(plan_file))}"]
    if stage:
        words += [f"--stage {stage}", f'--slice "$SLURM_ARRAY_TASK_ID/{slices}"']
    yield " ".join([*words, '--workers "${SLURM_CPUS_PER_TASK:-1}"'])


def project_folder() -> Path:
    """Return the folder that holds this project's packages."""
    import mellum2_megatron

    return Path(os.path.abspath(mellum2_megatron.__file__)).parents[1]
