"""The Slurm executor: the tasks of a study as one job array, through the launcher.

Each array task is an ordinary job of a run: it saves at the time limit, is queued again, and
resumes. The array's folder is that of the study at its scale.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ablations.asking.planned import Plan
from ablations.running.tasks import Progress, link_twin
from launchers import slurm
from launchers.batch_job import write_job
from launchers.job import check_files, plan_job
from launchers.launch_record import read_launches, record_launch
from launchers.packaging import Package, package
from launchers.profile import Profile
from launchers.status import task_folder
from launchers.submission import choose_profile
from mellum2_megatron.checkpoint import StartingPoint


def study_folder(plan: Plan, results: Path) -> Path:
    """Return the folder of a study at its scale, which is its arrays' run folder."""
    return Path(os.path.abspath(results)) / plan.name / plan.scale


def folders_in_queue(plan: Plan, results: Path) -> set[Path]:
    """Return the folders of the study's tasks that wait or run on the cluster."""
    root = study_folder(plan, results)
    launches = [launch for launch in read_launches(root) if launch.executor == "slurm"]
    # Results that were copied to a machine without Slurm are still read there.
    if not launches or shutil.which("scontrol") is None:
        return set()
    folders = set()
    for launch in launches:
        for state in slurm.states(launch.job_id):
            number, task = slurm.job_number(state.job_id)
            if not state.finished and task is not None:
                folders.add(root / task_folder(root, number, task))
    return folders


def submit_tasks(
    plan: Plan,
    progress: Sequence[Progress],
    results: Path,
    profile: str | None,
    variables: Mapping[str, str],
    *,
    allow_dirty: bool = False,
) -> list[str]:
    """Submit what is left of a study's tasks as a job array; return lines about it.

    Args:
        plan: the study at a scale.
        progress: its tasks, as they are on disk and in the queue.
        results: folder of all results.
        profile: site profile, name or file.
        variables: variables of every task, such as W&B's group.
        allow_dirty: accept uncommitted changes, default false.

    Raises:
        InputError: no Slurm profile, uncommitted changes, files that a job could not use, or no
            Slurm here.
        WorkError: Slurm refuses.
    """
    site = choose_profile("slurm", profile)
    slurm.require()
    site = dataclasses.replace(site, variables={**site.variables, **variables})
    left = [entry for entry in progress if entry.todo == "run"]
    code = package(study_folder(plan, results), site.packager, allow_dirty=allow_dirty)
    lines = list(code.notes)
    for entry in progress:
        if entry.twin is not None:
            link_twin(entry.task, entry.twin)
            lines.append(f"{entry.task.label}: is {entry.twin}")
    starts = [entry for entry in left if entry.task.record.arm.startswith("_")]
    arms = [entry for entry in left if entry not in starts]
    after: list[str] = []
    for part in (starts, arms):
        if part:
            number = _submit(plan, part, results, site, code, after)
            after = [f"afterok:{number}"]
            lines.append(
                f"job {number}: {len(part)} tasks, {part[0].task.label} to {part[-1].task.label}"
            )
    waiting = sum(entry.todo == "wait" for entry in progress)
    lines.append(f"{len(left)} tasks submitted, {waiting} in the queue already")
    return lines


def _submit(
    plan: Plan,
    part: Sequence[Progress],
    results: Path,
    site: Profile,
    code: Package,
    after: Sequence[str],
) -> str:
    """Submit one array; return its job number."""
    root = study_folder(plan, results)
    runs = {str(entry.task.folder.relative_to(root)): entry.task.run for entry in part}
    first = part[0].task.run
    job = plan_job(
        dataclasses.replace(
            first, checkpoint=dataclasses.replace(first.checkpoint, output=str(root), load=None)
        ),
        site,
        name=f"{plan.name}-{plan.scale}",
        # The nodes import an installed package without PYTHONPATH too.
        code=None if code.code.origin == "package" else code.folder,
        named_tasks=runs,
        dependency=after,
    )
    if not after:
        # Weights that an earlier array makes do not exist yet; its tasks check them.
        check_files(job, [StartingPoint.of(run) for run in job.runs])
    for entry in part:
        entry.task.prepare()
    script = write_job(job)
    number = slurm.submit(script, dependency=after)
    record_launch(job, job_id=number, experiment=None, script=script, dependency=after)
    return number
