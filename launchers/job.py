"""A cluster job: a run and its request to the scheduler, checked before anything is submitted."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.profile import Container, Profile
from mellum2_megatron.checkpoint import StartingPoint, check_run_folder, output_folder
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Device, Run, apply_overrides
from mellum2_megatron.data.corpus.selection import SPLITS
from mellum2_megatron.data.feed.entries import prefixes, tokenizer_folder
from mellum2_megatron.planning.execution_rules import deterministic_problems
from mellum2_megatron.planning.machine_rules import NODE_RULES
from mellum2_megatron.planning.rules import enforce
from mellum2_megatron.upstream.parser_check import require_parsed

LOGS_FOLDER = "logs"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterJob:
    """One submission to a scheduler, or one launch on this machine.

    Attributes:
        name: job name in the scheduler.
        run: resolved run with absolute paths; for an array, the run without its tasks' overrides.
        folder: run folder, absolute. Tasks of an array have folders below it.
        nodes: number of nodes.
        ranks_per_node: ranks on each node.
        device: device of the ranks.
        profile: site profile.
        code: folder put first on ``PYTHONPATH``; None, the default, runs the installed packages.
        tasks: runs of an array's tasks in order; default empty, for an ordinary job.
        task_folders: folders of the tasks below ``folder``, ``0``, ``1`` .. unless named; default
            empty, for an ordinary job.
        dependency: Slurm's conditions, such as ``afterok:123``; default none.
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
    task_folders: tuple[str, ...] = ()
    dependency: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Number of ranks on all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def array(self) -> str | None:
        """Value of Slurm's ``--array``; None for an ordinary job."""
        return f"0-{len(self.tasks) - 1}" if self.tasks else None

    @property
    def gpus_per_node(self) -> int:
        """GPUs to request on each node: the profile's number, or one per rank of a smaller run."""
        if self.device == "cpu":
            return 0
        fewer = self.ranks_per_node < self.profile.resolved_ranks_per_node
        return self.ranks_per_node if fewer else self.profile.gpus_per_node

    @property
    def python(self) -> str:
        """Interpreter of the job's commands."""
        return self.profile.python or (
            sys.executable if self.profile.container is None else "python"
        )

    @property
    def runs(self) -> tuple[Run, ...]:
        """Runs of the array's tasks, or the one run of an ordinary job."""
        return self.tasks or (self.run,)


def plan_job(
    run: Run,
    profile: Profile,
    *,
    name: str | None = None,
    nodes: int | None = None,
    time: str | None = None,
    code: Path | None = None,
    sweep: Sequence[Sequence[str]] = (),
    named_tasks: Mapping[str, Run] | None = None,
    dependency: Sequence[str] = (),
) -> ClusterJob:
    """Return the job of a run, checked by the run's rules. Reads no file; see `check_files`.

    Args:
        run: resolved run. Relative paths start from the current folder; without an output folder
            it gets ``profile.runs/NAME``.
        profile: site profile.
        name: job name, default the run's name.
        nodes: number of nodes, default from layout and profile.
        time: time limit as sbatch takes it, default the profile's.
        code: folder put first on ``PYTHONPATH``; None runs the installed packages.
        sweep: ``key=value`` overrides of each task of an array; empty for an ordinary job.
        named_tasks: runs of an array's tasks by their folder below the run folder, in place of
            ``sweep``; None (default): none.
        dependency: Slurm's conditions, such as ``afterok:123``.

    Raises:
        InputError: no account, a folder that Slurm cannot write in a log's name, a layout that does
            not fit the ranks, or a broken rule of the run.
    """
    if time is not None:
        profile = dataclasses.replace(profile, time=time)
    run = with_absolute_paths(run, profile)
    folder = output_folder(run)
    tasks = []
    for number, overrides in enumerate(sweep):
        task = apply_overrides(run, overrides)
        # An override may name another output folder: the number is appended to the task's own.
        output = str(output_folder(task) / str(number))
        checkpoint = dataclasses.replace(task.checkpoint, output=output)
        tasks.append(dataclasses.replace(task, checkpoint=checkpoint))
    names = list(map(str, range(len(tasks))))
    for name_of_task, task in (named_tasks or {}).items():
        task = with_absolute_paths(task, profile)
        checkpoint = dataclasses.replace(task.checkpoint, output=str(folder / name_of_task))
        tasks.append(dataclasses.replace(task, checkpoint=checkpoint))
        names.append(name_of_task)
    if profile.executor == "slurm" and profile.account is None:
        raise InputError(
            f"profile {profile.name} names no account",
            rule="Slurm charges a job to one",
            fix="set account (`sacctmgr show associations user=$USER` lists yours), "
            "or `account: none` where there are none",
        )
    if "\\" in str(folder):
        raise InputError(
            f"--output {folder}",
            rule="a name of Slurm's log files cannot hold a backslash",
            fix="choose a folder without it",
        )
    node_count, ranks_per_node = _world(run, profile, nodes)
    job = ClusterJob(
        # Slurm puts the job's name into the names of its logs (%x).
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", name or run.name).strip("-") or "mellum2",
        run=run,
        folder=folder,
        nodes=node_count,
        ranks_per_node=ranks_per_node,
        device=profile.resolved_device,
        profile=profile,
        code=None if code is None else Path(os.path.abspath(code)),
        tasks=tuple(tasks),
        task_folders=tuple(names),
        dependency=tuple(dependency),
    )
    if profile.gpu is not None and job.device == "cpu":
        raise InputError(
            f"gpu: {profile.gpu} with ranks on CPUs",
            rule="names the card of each rank",
            fix="drop it (--gpu, or gpu of the profile), or set gpus_per_node",
        )
    # machine=False: neither this machine's files nor its packages matter to the job.
    for task in job.runs:
        enforce(task, world_size=job.world_size, device=job.device, machine=False, gpu=profile.card)
        for problem in deterministic_problems(task, profile.variables):
            raise problem
    return job


def check_files(
    job: ClusterJob, starts: Sequence[StartingPoint], *, before: Path | None = None
) -> None:
    """Check that the files a job needs are on this machine's disks.

    Args:
        job: planned job.
        starts: starting points of the job's runs, in order.
        before: run folder of a job that this one waits for, default none. Its checkpoint may not
            exist yet.

    Raises:
        InputError: no such interpreter or image, a path outside the container's mounts, an output
            folder that cannot be used, or missing data or a missing checkpoint.
    """
    python, container = job.profile.python, job.profile.container
    # A bare name is looked up on the nodes' PATH, and a container has its own interpreter.
    if (
        container is None
        and python is not None
        and "/" in python
        and not os.access(python, os.X_OK)
    ):
        raise InputError(
            f"python: {python}",
            rule="there is no such program here",
            fix="name an interpreter on a disk that the nodes share, "
            "or leave it out for the one that submits",
        )
    if container is not None:
        _check_container(job, container)
    for run, start in zip(job.runs, starts, strict=True):
        # The packages are those of the nodes or the image; this machine only submits.
        enforce(
            run,
            world_size=job.world_size,
            device=job.device,
            start=start,
            without=[rule.name for rule in NODE_RULES],
        )
        require_parsed(run)
        origin = run.checkpoint.load or run.checkpoint.continue_from
        if (
            before is not None
            and origin is not None
            and Path(origin).is_relative_to(os.path.abspath(before))
        ):
            # The checkpoint does not exist yet: the job checks it before its first step.
            run = dataclasses.replace(
                run,
                checkpoint=dataclasses.replace(run.checkpoint, load=None, continue_from=None),
                data=dataclasses.replace(run.data, first_sample=0),
            )
            start = StartingPoint.of(run)
        check_run_folder(run, start)


def missing_variables(profile: Profile) -> tuple[str, ...]:
    """Return the variables of ``profile.environment`` that are not set in this shell."""
    return tuple(name for name in profile.environment if name not in os.environ)


def with_absolute_paths(run: Run, profile: Profile) -> Run:
    """Return the run with an output folder and absolute paths."""

    # A job starts in another folder, where relative paths would name other files.
    def absolute(path: str | None) -> str | None:
        return None if path is None else os.path.abspath(os.path.expanduser(path))

    def blend(pairs: tuple[tuple[float, str], ...]) -> tuple[tuple[float, str], ...]:
        return tuple(
            (weight, os.path.abspath(os.path.expanduser(entry))) for weight, entry in pairs
        )

    data = dataclasses.replace(
        run.data,
        path=os.path.abspath(os.path.expanduser(run.data.path)),
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
    """Return nodes and ranks per node; the run's rules check that they fit the layout."""
    ranks, wanted = profile.resolved_ranks_per_node, run.layout.world_size
    if nodes is not None:
        return nodes, ranks
    # A layout without dp fits several world sizes: the profile's nodes decide.
    if wanted is None and profile.nodes is not None:
        return profile.nodes, ranks
    # A small run takes a part of one node.
    if wanted is not None and wanted < ranks:
        return 1, wanted
    return math.ceil((wanted or run.layout.smallest_world_size) / ranks), ranks


def _check_container(job: ClusterJob, container: Container) -> None:
    """Check the image, and that every path of the job has the same name in the container."""
    image = container.image_file
    if image is not None and not image.exists():
        raise InputError(
            f"container.image={container.image}",
            rule="there is no such file",
            fix="name an image on a disk that the nodes share, "
            "or a registry's reference (docker://..)",
        )
    # run.yaml holds the host's paths, and the ranks read it in the container.
    paths = {"--output": job.folder, "the code": job.code}
    for run in job.runs:
        for split in SPLITS:
            for _, prefix in prefixes(run.data, split):
                paths[f"data {prefix}"] = Path(prefix)
        paths["the tokenizer"] = tokenizer_folder(run.data)
        for key in ("load", "continue_from"):
            value = getattr(run.checkpoint, key)
            if value is not None:
                paths[f"checkpoint.{key}"] = Path(value)
    for label, path in paths.items():
        if path is not None and not container.covers(path):
            disk = Path(*path.parts[:2])
            raise InputError(
                f"{label} {path}",
                rule="lies in none of container.mounts, or under another name inside",
                fix=f"add its disk to container.mounts under its own name, like {disk}",
            )
