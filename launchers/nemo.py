"""NeMo-Run: tasks, executors and a scheduler of its own kind, for `mellum2 launch` and for
anybody's `run.Experiment`.

::

    import nemo_run as run
    from launchers import nemo

    with run.Experiment("mellum2") as experiment:
        experiment.add(
            nemo.task("mellum2_tiny_pretrain", overrides=["optimizer.lr=1e-3"]),
            executor=nemo.slurm_executor("mycluster", nodes=2),
            name="tiny",
        )
        experiment.run(detach=True)

NeMo-Run keeps experiments, dependencies and status. The batch script is ours (`launchers.sbatch`),
the same as that of ``--render sbatch``: its own starts `srun` in a way that a preempted run does
not survive (docs/launching.md).

This is the only module that imports nemo_run.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nemo_run as run
import yaml
from nemo_run.run.torchx_backend.schedulers import api as nemo_schedulers
from torchx.schedulers.api import DescribeAppResponse, ListAppResponse, Scheduler
from torchx.specs import AppDef, AppDryRunInfo, AppState, Role

from launchers import slurm
from launchers.batch_job import write_job
from launchers.job import Job, make_job, with_absolute_paths
from launchers.launch_record import record_launch
from launchers.profile import Profile, profile_from_yaml, profile_names, read_profile
from launchers.sbatch import render
from launchers.submission import Submission, resolve
from mellum2_megatron.checkpoint import check_run_folder, output_folder, write_run_folder
from mellum2_megatron.checkpoint.folder import RUN_FILE
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.values import to_plain
from mellum2_megatron.config import Device, Run, from_yaml, to_yaml
from mellum2_megatron.planning.optional_packages import OLDEST_RESILIENCY, too_old_resiliency
from mellum2_megatron.recipes import recipe_names

SCHEDULER = "mellum2_slurm"
"""Name of our scheduler; pyproject.toml registers it with torchx (entry point
``torchx.schedulers``)."""

_RUN = "mellum2_run"
"""Key of a task's metadata: the resolved run, YAML."""

_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

_STATES = {
    "COMPLETED": AppState.SUCCEEDED,
    "CANCELLED": AppState.CANCELLED,
    "RUNNING": AppState.RUNNING,
    "COMPLETING": AppState.RUNNING,
    "STAGE_OUT": AppState.RUNNING,
    "SIGNALING": AppState.RUNNING,
}


def task(
    name: str,
    *,
    overrides: Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    device: str = "auto",
    nproc: int | None = None,
) -> run.Script:
    """Return a training as a task for `run.Experiment.add`.

    On `slurm_executor` it becomes a job with all nodes' ranks; on `run.LocalExecutor` it is
    ``mellum2 train``.

    Args:
        name: recipe, or a resolved run's YAML file.
        overrides: ``key=value`` words.
        output: folder of the run; the profile's ``runs/NAME`` if None and the run names none.
        device, nproc: for executors other than ours, as for ``mellum2 train``.

    Raises:
        InputError: an unknown recipe or key, or a value that cannot be.
    """
    folder = [] if output is None else ["--output", os.fspath(output)]
    ranks = [] if nproc is None else ["--nproc", str(nproc)]
    return _script(
        resolve(name, overrides, output), [name, *overrides, *folder, "--device", device, *ranks]
    )


def rank_task(
    name: str,
    *,
    overrides: Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    device: Device = "cuda",
) -> run.Script:
    """Return what one rank runs, for a launcher that starts the ranks itself: `run.Torchrun`,
    `fault_tolerance`.

    Writes the run's folder. Such a launcher brings its own way to go on after a failure, in place
    of ours.

    Raises:
        InputError: as for `task`; no data, no tokenizer, or a folder that cannot be used.
    """
    resolved = with_absolute_paths(
        resolve(name, overrides, output), Profile(name="here", executor="local")
    )
    check_run_folder(resolved)
    write_run_folder(resolved)
    words = [str(output_folder(resolved) / RUN_FILE), "--device", device]
    return run.Script(
        path="mellum2_megatron.training", entrypoint=sys.executable, m=True, args=words
    )


def fault_tolerance(**settings: Any) -> run.FaultTolerance:
    """Return NeMo-Run's fault-tolerance launcher for `rank_task`, with a port of its own; settings
    are its fields.

    NeMo-Run gives every job the same port, 29500 (nemo_run/core/execution/launcher.py:81, 0.11.1),
    so that two jobs on one node meet.

    Raises:
        InputError: NVIDIA's resiliency extension is not here, or one beside which Megatron does not
            import.
    """
    if (
        importlib.util.find_spec("nvidia_resiliency_ext") is None
        or shutil.which("ft_launcher", path=_PATH) is None
    ):
        raise InputError(
            "run.FaultTolerance",
            rule="starts ranks with ft_launcher, which is not installed",
            fix=f"pip install 'nvidia-resiliency-ext>={OLDEST_RESILIENCY}'",
        )
    found = too_old_resiliency()
    if found is not None:
        raise InputError(
            f"nvidia-resiliency-ext {found}",
            rule="is too old: beside it Megatron-Core 0.19.2 does not import, or not save "
            "(megatron/core/dist_checkpointing/strategies/nvrx.py, NVRX_MIN_VERSION)",
            fix=f"pip install 'nvidia-resiliency-ext>={OLDEST_RESILIENCY}', or remove it",
        )
    return run.FaultTolerance(**{"rdzv_port": 10_000 + secrets.randbelow(20_000), **settings})


def _script(resolved: Run, words: Sequence[str]) -> run.Script:
    return run.Script(
        path="mellum2_megatron",
        entrypoint=sys.executable,
        m=True,
        args=["train", *words],
        metadata={_RUN: to_yaml(resolved)},
    )


@dataclass(kw_only=True)
class Mellum2SlurmExecutor(run.SlurmExecutor):  # type: ignore[misc]
    """NeMo-Run's Slurm executor, with a site profile in place of its settings and our batch script.

    Attributes:
        profile_yaml: the site profile.
        nodes, time: instead of the profile's.
        code: folder put first on ``PYTHONPATH``.
        sweep: overrides of each task of an array.
        before: run folder of a task that this one waits for; its checkpoint need not be there yet.
        waits_for: Slurm's conditions on jobs outside of the experiment, such as ``afterok:123``.
    """

    account: str = ""
    profile_yaml: str = ""
    nodes: int | None = None
    time: str | None = None
    code: str | None = None
    sweep: list[list[str]] = field(default_factory=list)
    before: str | None = None
    waits_for: list[str] = field(default_factory=list)

    @property
    def profile(self) -> Profile:
        """The site profile."""
        return profile_from_yaml(self.profile_yaml, name="profile")

    def job(self, resolved: Run) -> Job:
        """Return the job of a run, checked.

        Raises:
            InputError: see `launchers.job.make_job`.
        """
        return make_job(
            resolved,
            self.profile,
            name=self.job_name,
            nodes=self.nodes,
            time=self.time,
            code=None if self.code is None else Path(self.code),
            sweep=self.sweep,
            dependency=self.waits_for,
            before=None if self.before is None else Path(self.before),
        )

    def nnodes(self) -> int:
        """Nodes, where NeMo-Run asks."""
        return self.nodes or self.profile.nodes or 1

    def info(self) -> str:
        """What NeMo-Run's status shows."""
        return f"Slurm, profile {self.profile.name}"


def slurm_executor(
    profile: str | Profile,
    *,
    nodes: int | None = None,
    time: str | None = None,
    code: str | os.PathLike[str] | None = None,
    sweep: Sequence[Sequence[str]] = (),
    before: str | os.PathLike[str] | None = None,
    waits_for: Sequence[str] = (),
) -> Mellum2SlurmExecutor:
    """Return an executor for `task` on Slurm; see `Mellum2SlurmExecutor`.

    Args:
        profile: name or file of a site profile, or one that was read.

    Raises:
        InputError: no such profile, or it is not Slurm's.
    """
    read = profile if isinstance(profile, Profile) else read_profile(profile)
    if read.executor != "slurm":
        raise InputError(
            f"profile {read.name}", rule="is not for Slurm", fix="use nemo_run.LocalExecutor()"
        )
    return Mellum2SlurmExecutor(
        account=read.account or "",
        partition=read.partition,
        profile_yaml=profile_text(read),
        nodes=nodes,
        time=time,
        code=None if code is None else os.fspath(code),
        sweep=[list(words) for words in sweep],
        before=None if before is None else os.fspath(before),
        waits_for=list(waits_for),
    )


def profile_text(profile: Profile) -> str:
    """Return a profile as YAML that `launchers.profile.profile_from_yaml` reads."""
    text: str = yaml.safe_dump(to_plain(profile), sort_keys=False)
    return text


@dataclass(kw_only=True)
class Request:
    """What is submitted: `launchers.job.Job` and its script, which NeMo-Run shows."""

    job: Job
    executor: Mellum2SlurmExecutor
    script: str

    def __repr__(self) -> str:
        return self.script


class Mellum2Scheduler(nemo_schedulers.SchedulerMixin, Scheduler):  # type: ignore[misc]
    """NeMo-Run's way to Slurm, with our script, and states from Slurm itself where its own asks
    ``sacct`` alone."""

    def __init__(self, session_name: str, experiment: Any = None) -> None:
        super().__init__(SCHEDULER, session_name)
        self.experiment = experiment

    def _submit_dryrun(self, app: AppDef, cfg: Mellum2SlurmExecutor) -> AppDryRunInfo[Request]:
        text = (app.metadata or {}).get(_RUN)
        if text is None:
            raise InputError(
                f"task {app.name}",
                rule="this executor runs trainings of this project",
                fix="make the task with launchers.nemo.task, or give it run.SlurmExecutor",
            )
        if not isinstance(cfg.tunnel, run.LocalTunnel):
            raise InputError(
                f"tunnel {cfg.tunnel.key}",
                rule="runs, data and code are checked on the disks of the cluster",
                fix="submit on a login node, without a tunnel",
            )
        job = cfg.job(from_yaml(text))
        request = Request(job=job, executor=cfg, script=render(job))
        Path(cfg.experiment_dir, f"{cfg.job_name}_sbatch.sh").write_text(
            request.script, encoding="utf-8"
        )
        return AppDryRunInfo(request, repr)

    def schedule(self, dryrun_info: AppDryRunInfo[Request]) -> str:
        """Write the run's folder, submit, record; return Slurm's number."""
        request = dryrun_info.request
        executor, job = request.executor, request.job
        slurm.require()
        earlier = executor.parse_deps() if executor.dependencies else []
        conditions = [
            *job.dependency,
            *([f"{executor.dependency_type}:{':'.join(earlier)}"] if earlier else []),
        ]
        script = write_job(job)
        number = slurm.submit(script, dependency=conditions)
        record_launch(
            job,
            job_id=number,
            experiment=executor.experiment_id,
            script=script,
            dependency=conditions,
        )
        return number

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """Return what Slurm says of a job; of an array, what is true of all its tasks."""
        found = slurm.states(app_id)
        if not found:
            return None
        roles = [Role(name=found[0].name, image="", num_replicas=len(found))]
        words = sorted({state.state for state in found})
        return DescribeAppResponse(
            app_id=app_id,
            roles=roles,
            state=overall(state.state for state in found),
            num_restarts=max(state.restarts for state in found),
            msg=", ".join(words),
        )

    def _cancel_existing(self, app_id: str) -> None:
        slurm.cancel([app_id])

    def list(self) -> list[ListAppResponse]:
        """NeMo-Run lists experiments by its own files."""
        return []


def overall(states: Iterable[str]) -> AppState:
    """Return one state for the tasks of a job: a running one first, then waiting, failed,
    cancelled, succeeded."""
    found = {
        _STATES.get(state, AppState.FAILED if state in slurm.FINISHED else AppState.PENDING)
        for state in states
    }
    order = (
        AppState.RUNNING,
        AppState.PENDING,
        AppState.FAILED,
        AppState.CANCELLED,
        AppState.SUCCEEDED,
    )
    return next(state for state in order if state in found)


def create_scheduler(session_name: str, **parameters: Any) -> Mellum2Scheduler:
    """Return our scheduler (entry point ``torchx.schedulers``)."""
    return Mellum2Scheduler(session_name, experiment=parameters.get("experiment"))


def submit(title: str, submissions: Sequence[Submission]) -> None:
    """Submit jobs to Slurm as one experiment, each after those that it names; `launch.json` of each
    says the rest.

    Raises:
        InputError, WorkError: a job is refused. Those before it are submitted by then.
    """
    with _experiment(title) as experiment:
        for each in submissions:
            executor = slurm_executor(
                each.job.profile,
                nodes=each.nodes,
                code=each.job.code,
                sweep=each.sweep,
                before=each.before,
                waits_for=each.job.dependency,
            )
            script = _script(each.job.run, [str(each.job.folder / RUN_FILE)])
            experiment.add(
                script, executor=executor, name=each.job.name, dependencies=list(each.after)
            )
        experiment.run(detach=True)


def run_here(job: Job) -> bool:
    """Train on this machine as an experiment of NeMo-Run, its log on the terminal; return whether
    it succeeded."""
    write_run_folder(job.run)
    words = [str(job.folder / RUN_FILE), "--device", job.device, "--nproc", str(job.ranks_per_node)]
    variables = dict(job.profile.variables)
    if job.code is not None:
        variables["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(job.code), os.environ.get("PYTHONPATH")])
        )
    with _experiment(job.name) as experiment:
        experiment.add(
            _script(job.run, words),
            executor=run.LocalExecutor(env_vars=variables),
            name=job.name,
            tail_logs=True,
        )
        experiment.run()
        handle = experiment.jobs[0].handle
        record_launch(job, job_id=handle.rpartition("/")[2], experiment=experiment._id, script=None)
    return bool(experiment.jobs[0].state == AppState.SUCCEEDED)


def _experiment(title: str) -> run.Experiment:
    return run.Experiment(
        title,
        log_level="ERROR",
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
    )


def register_executor() -> None:
    """Make NeMo-Run accept our executor.

    It looks executors up by their very class: ``EXECUTOR_MAPPING[executor.__class__]``
    (nemo_run/run/torchx_backend/schedulers/api.py:57, 0.11.1), and so does ``Experiment.run``
    (nemo_run/run/experiment.py, ``_PARALLEL_SUPPORTED_EXECUTORS`` and the like), so a subclass is
    nothing to it.
    """
    nemo_schedulers.EXECUTOR_MAPPING[Mellum2SlurmExecutor] = SCHEDULER
    nemo_schedulers.REVERSE_EXECUTOR_MAPPING[SCHEDULER] = Mellum2SlurmExecutor
    for what in ("PARALLEL", "DETACH", "DEPENDENCY"):
        known = f"_{what}_SUPPORTED_EXECUTORS"
        classes = getattr(run.Experiment, known)
        if Mellum2SlurmExecutor not in classes:
            setattr(run.Experiment, known, (*classes, Mellum2SlurmExecutor))


register_executor()


# ---------------------------------------------------------------------------------------------------------------------
# NeMo-Run's own command line
# ---------------------------------------------------------------------------------------------------------------------


def register_factories() -> None:
    """Make every recipe a factory of tasks and every profile one of executors, by their names."""
    for name in recipe_names():
        run.cli.factory(_task_factory(name), target=run.Script, name=name)
    for name in profile_names():
        for target in (run.Executor, run.SlurmExecutor):
            run.cli.factory(_executor_factory(name), target=target, name=name)


def _task_factory(name: str) -> Any:
    # One text for all overrides: NeMo-Run's command line cuts the arguments of a factory at every
    # comma, lists too.
    def make(overrides="", output="", device="auto"):  # type: ignore[no-untyped-def]
        made = task(name, overrides=shlex.split(overrides), output=output or None, device=device)
        fields = ("path", "entrypoint", "m", "args", "metadata")
        return run.Config(run.Script, **{field: getattr(made, field) for field in fields})

    return _annotated(make, run.Config[run.Script], overrides=str, output=str, device=str)


def _executor_factory(name: str) -> Any:
    def make(nodes=0, time=""):  # type: ignore[no-untyped-def]
        return slurm_executor(name, nodes=nodes or None, time=time or None).to_config()

    return _annotated(make, run.Config[Mellum2SlurmExecutor], nodes=int, time=str)


def _annotated(function: Any, returned: Any, **parameters: Any) -> Any:
    """Annotate with types, not with their names: NeMo-Run's command line refuses those as
    "Unsupported type"."""
    function.__annotations__ = {**parameters, "return": returned}
    return function


register_factories()


def launch(ctx, training, executor, name="mellum2"):  # type: ignore[no-untyped-def]
    """Submit a training: nemo mellum2 launch training=RECIPE executor=PROFILE."""
    with run.Experiment(name, enable_goodbye_message=False) as experiment:
        experiment.add(training, executor=executor, name=name)
        experiment.run(detach=True)


_annotated(
    launch, None, ctx=run.cli.RunContext, training=run.Script, executor=run.Executor, name=str
)
run.cli.entrypoint(launch, namespace="mellum2", type="experiment")
