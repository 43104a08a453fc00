"""A job: a run with everything that a scheduler must know of it, checked before anything is
submitted."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.profile import Profile
from mellum2_megatron.checkpoint import check_run_folder, output_folder
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Device, Run, apply_overrides
from mellum2_megatron.planning.rules import enforce

LOGS_FOLDER = "logs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is submitted.

    Attributes:
        name: as the scheduler shows it.
        run: what is trained; of an array, what its tasks have in common.
        folder: of the run, absolute. The tasks of an array have the folders ``folder/0``,
            ``folder/1`` ..
        nodes, ranks_per_node: the world.
        device: what ranks compute on.
        profile: of the site.
        code: put first on ``PYTHONPATH``; None runs what is installed.
        tasks: runs of an array's tasks, 0 and on; empty if the job is none.
        dependency: Slurm's conditions, such as ``afterok:123``.
    """

    name: str
    run: Run
    folder: Path
    nodes: int
    ranks_per_node: int
    device: Device
    profile: Profile
    code: Path | None = None
    tasks: tuple[Run, ...] = ()
    dependency: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def array(self) -> str | None:
        """Slurm's ``--array``, or None."""
        return f"0-{len(self.tasks) - 1}" if self.tasks else None

    @property
    def gpus_per_node(self) -> int:
        """GPUs to ask for: the profile's, or fewer where the run needs fewer ranks than the profile
        has."""
        if self.device == "cpu":
            return 0
        fewer = self.ranks_per_node < self.profile.resolved_ranks_per_node
        return self.ranks_per_node if fewer else self.profile.gpus_per_node

    @property
    def python(self) -> str:
        """The interpreter of its commands."""
        return self.profile.python or (
            sys.executable if self.profile.container is None else "python"
        )

    @property
    def runs(self) -> tuple[Run, ...]:
        """The run, or those of the array's tasks."""
        return self.tasks or (self.run,)


def make_job(
    run: Run,
    profile: Profile,
    *,
    name: str | None = None,
    nodes: int | None = None,
    time: str | None = None,
    code: Path | None = None,
    sweep: Sequence[Sequence[str]] = (),
    dependency: Sequence[str] = (),
    before: Path | None = None,
) -> Job:
    """Return the job of a run, checked as far as that is possible before it is submitted. Writes
    nothing.

    Args:
        run: a resolved run. Its relative paths are taken from the current folder; its output folder
            is ``profile.runs/NAME`` if it names none.
        profile: of the site.
        name: of the job; the run's if None.
        nodes: instead of what layout and profile say.
        time: limit, instead of the profile's.
        code: folder put first on ``PYTHONPATH``.
        sweep: overrides of each task of an array; an ordinary job if empty.
        dependency: Slurm's conditions.
        before: run folder of a job that this one waits for; its checkpoint need not be there yet.

    Raises:
        InputError: no account, a layout that does not fit the ranks, an output folder that cannot
            be used, data or a checkpoint that is not there, a missing image, a path that the
            container does not see, or whatever else the run's rules say.
    """
    job = plan_job(
        run,
        profile,
        name=name,
        nodes=nodes,
        time=time,
        code=code,
        sweep=sweep,
        dependency=dependency,
    )
    check_place(job, before=before)
    return job


def plan_job(
    run: Run,
    profile: Profile,
    *,
    name: str | None = None,
    nodes: int | None = None,
    time: str | None = None,
    code: Path | None = None,
    sweep: Sequence[Sequence[str]] = (),
    dependency: Sequence[str] = (),
) -> Job:
    """Return the job of a run, checked without a look at this machine's files; arguments as for
    `make_job`.

    Raises:
        InputError: no account, a layout that does not fit the ranks, or what else the run's own
            rules say.
    """
    if time is not None:
        profile = dataclasses.replace(profile, time=time)
    run = with_absolute_paths(run, profile)
    size, ranks = _world(run, profile, nodes)
    job = Job(
        name=_job_name(name or run.name),
        run=run,
        folder=output_folder(run),
        nodes=size,
        ranks_per_node=ranks,
        device=profile.resolved_device,
        profile=profile,
        code=None if code is None else Path(os.path.abspath(code)),
        tasks=tuple(_task(run, number, overrides) for number, overrides in enumerate(sweep)),
        dependency=tuple(dependency),
    )
    _check_account(job)
    _check_folder_name(job.folder)
    for each in job.runs:
        enforce(each, world_size=job.world_size, device=job.device, machine=False)
    return job


def check_place(job: Job, *, before: Path | None = None) -> None:
    """Check that what a job needs is on this machine's disks; ``before`` as for `make_job`.

    Raises:
        InputError: it is not.
    """
    _check_python(job)
    _check_container(job)
    for each in job.runs:
        _check_run(each, job, before)


def missing_variables(profile: Profile) -> tuple[str, ...]:
    """Return the variables that the profile's jobs take from the submitting shell and that are not
    set in it."""
    return tuple(name for name in profile.environment if name not in os.environ)


def with_absolute_paths(run: Run, profile: Profile) -> Run:
    """Return the run with an output folder, and every path of it absolute: jobs start elsewhere."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else os.path.abspath(os.path.expanduser(path))

    def blend(pairs: tuple[tuple[float, str], ...]) -> tuple[tuple[float, str], ...]:
        return tuple((weight, os.path.abspath(prefix)) for weight, prefix in pairs)

    data = dataclasses.replace(
        run.data,
        path=os.path.abspath(run.data.path),
        tokenizer=absolute(run.data.tokenizer),
        train=blend(run.data.train),
        valid=blend(run.data.valid),
        cache=absolute(run.data.cache),
    )
    output = run.checkpoint.output or str(Path(profile.runs) / run.name)
    checkpoint = dataclasses.replace(
        run.checkpoint,
        output=absolute(output),
        load=absolute(run.checkpoint.load),
        continue_from=absolute(run.checkpoint.continue_from),
    )
    return dataclasses.replace(run, data=data, checkpoint=checkpoint)


def _world(run: Run, profile: Profile, nodes: int | None) -> tuple[int, int]:
    """Return nodes and ranks a node; that they fit the layout is for the rules to say."""
    ranks, wanted = profile.resolved_ranks_per_node, run.layout.world_size
    if nodes is not None:
        return nodes, ranks
    if wanted is None and profile.nodes is not None:
        return profile.nodes, ranks
    if wanted is not None and wanted < ranks:
        return 1, wanted
    return math.ceil((wanted or run.layout.smallest_world_size) / ranks), ranks


def _task(run: Run, number: int, overrides: Sequence[str]) -> Run:
    run = apply_overrides(run, overrides)
    folder = str(output_folder(run) / str(number))
    return dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, output=folder))


def _job_name(name: str) -> str:
    """Return a name that log files can have: Slurm puts it into theirs."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") or "mellum2"


def _check_account(job: Job) -> None:
    if job.profile.executor == "slurm" and job.profile.account is None:
        raise InputError(
            f"profile {job.profile.name} names no account",
            rule="Slurm charges a job to one",
            fix="set account (`sacctmgr show associations user=$USER` lists yours), or `account: none` where there are "
            "none",
        )


def _check_folder_name(folder: Path) -> None:
    bad = re.search(r"[\\\x00-\x1f\x7f]", str(folder))
    if bad:
        raise InputError(
            f"--output {str(folder)!r}",
            rule=f"a name of Slurm's log files cannot hold {bad.group()!r}",
            fix="choose a folder without it",
        )


def _check_python(job: Job) -> None:
    python = job.profile.python
    if (
        job.profile.container is None
        and python is not None
        and "/" in python
        and not os.access(python, os.X_OK)
    ):
        raise InputError(
            f"python: {python}",
            rule="there is no such program here",
            fix="name an interpreter on a disk that the nodes share, or leave it out for the one that submits",
        )


def _check_container(job: Job) -> None:
    container = job.profile.container
    if container is None:
        return
    image = container.image_file
    if image is not None and not image.exists():
        raise InputError(
            f"container.image={container.image}",
            rule="there is no such file",
            fix="name an image on a disk that the nodes share, or a registry's reference (docker://..)",
        )
    paths = {"--output": job.folder, "the code": job.code}
    for run in job.runs:
        prefixes = [prefix for _, prefix in (*run.data.train_blend, *run.data.valid_blend)]
        paths |= {f"data {prefix}": Path(prefix) for prefix in prefixes}
        paths |= {"the tokenizer": Path(run.data.tokenizer_folder)}
        for key in ("load", "continue_from"):
            value = getattr(run.checkpoint, key)
            paths |= {} if value is None else {f"checkpoint.{key}": Path(value)}
    for what, path in paths.items():
        if path is not None and not container.covers(path):
            raise InputError(
                f"{what} {path}",
                rule="lies in none of container.mounts, or under another name inside",
                fix=f"add its disk to container.mounts under its own name, like {Path(*path.parts[:2])}",
            )


def _check_run(run: Run, job: Job, before: Path | None) -> None:
    # Packages are the nodes' or the image's; this machine only submits.
    enforce(run, world_size=job.world_size, device=job.device, without=("packages-present",))
    if before is None or not _starts_from(run, before):
        check_run_folder(run)
        return
    # What it starts from is not there yet. The job checks again, before its first step.
    checkpoint = dataclasses.replace(run.checkpoint, load=None, continue_from=None)
    check_run_folder(
        dataclasses.replace(
            run, checkpoint=checkpoint, data=dataclasses.replace(run.data, first_sample=0)
        )
    )


def _starts_from(run: Run, folder: Path) -> bool:
    start = run.checkpoint.load or run.checkpoint.continue_from
    return start is not None and Path(start).is_relative_to(os.path.abspath(folder))
