"""A NeMo-Run scheduler: submits our batch script to Slurm and reads states from Slurm itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nemo_run
from nemo_run.run.torchx_backend.schedulers.api import SchedulerMixin
from torchx.schedulers.api import DescribeAppResponse, ListAppResponse, Scheduler
from torchx.specs import AppDef, AppDryRunInfo, AppState, Role

from launchers import slurm
from launchers.batch_job import write_job
from launchers.job import ClusterJob
from launchers.launch_record import record_launch
from launchers.nemo.executor import Mellum2SlurmExecutor
from launchers.nemo.tasks import RUN_KEY
from launchers.sbatch import render
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import from_yaml

SCHEDULER = "mellum2_slurm"
"""Name of the scheduler; pyproject.toml registers it (entry point ``torchx.schedulers``)."""


@dataclass(kw_only=True)
class Request:
    """A job ready to submit.

    Attributes:
        job: checked job.
        executor: NeMo-Run's executor of the task.
        script: text of the batch script.
    """

    job: ClusterJob
    executor: Mellum2SlurmExecutor
    script: str

    def __repr__(self) -> str:
        # NeMo-Run shows a request by its repr.
        return self.script


class Mellum2Scheduler(SchedulerMixin, Scheduler):  # type: ignore[misc]
    """Scheduler for `Mellum2SlurmExecutor`.

    States come from Slurm's controller (``scontrol``). NeMo-Run's own scheduler reads ``sacct``
    only, which has no data on clusters without accounting.
    """

    def __init__(self, session_name: str, experiment: Any = None) -> None:
        super().__init__(SCHEDULER, session_name)
        self.experiment = experiment

    # torchx calls this before `schedule`, and alone for a dry run.
    def _submit_dryrun(self, app: AppDef, cfg: Mellum2SlurmExecutor) -> AppDryRunInfo[Request]:
        run_yaml = (app.metadata or {}).get(RUN_KEY)
        if run_yaml is None:
            raise InputError(
                f"task {app.name}",
                rule="this executor runs trainings of this project",
                fix="make the task with launchers.nemo.task, or give it run.SlurmExecutor",
            )
        if not isinstance(cfg.tunnel, nemo_run.LocalTunnel):
            raise InputError(
                f"tunnel {cfg.tunnel.key}",
                rule="runs, data and code are checked on the disks of the cluster",
                fix="submit on a login node, without a tunnel",
            )
        job = cfg.job(from_yaml(run_yaml))
        request = Request(job=job, executor=cfg, script=render(job))
        # NeMo-Run keeps every job's script under this name in the experiment's folder.
        Path(cfg.experiment_dir, f"{cfg.job_name}_sbatch.sh").write_text(
            request.script, encoding="utf-8"
        )
        return AppDryRunInfo(request, repr)

    def schedule(self, dryrun_info: AppDryRunInfo[Request]) -> str:
        """Write the run folder, submit the script and record it; return Slurm's job number."""
        request = dryrun_info.request
        executor, job = request.executor, request.job
        slurm.require()
        conditions = list(job.dependency)
        if executor.dependencies:
            # Earlier tasks of the experiment; they are submitted, so they have job numbers.
            numbers = ":".join(executor.parse_deps())
            conditions.append(f"{executor.dependency_type}:{numbers}")
        script = write_job(job)
        job_id = slurm.submit(script, dependency=conditions)
        record_launch(
            job,
            job_id=job_id,
            experiment=executor.experiment_id,
            script=script,
            dependency=conditions,
        )
        return job_id

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """Return the state of a job, one for all tasks of an array; None if Slurm has none."""
        states = slurm.states(app_id)
        if not states:
            return None
        return DescribeAppResponse(
            app_id=app_id,
            roles=[Role(name=states[0].name, image="", num_replicas=len(states))],
            state=overall(state.state for state in states),
            num_restarts=max(state.restarts for state in states),
            msg=", ".join(sorted({state.state for state in states})),
        )

    # torchx calls this from `cancel`, after `describe` has found the job.
    def _cancel_existing(self, app_id: str) -> None:
        slurm.request_cancel(app_id)

    def list(self) -> list[ListAppResponse]:
        """Return nothing: NeMo-Run lists experiments by its own files."""
        return []


_APP_STATES = {
    "COMPLETED": AppState.SUCCEEDED,
    "CANCELLED": AppState.CANCELLED,
    "RUNNING": AppState.RUNNING,
    "COMPLETING": AppState.RUNNING,
    "STAGE_OUT": AppState.RUNNING,
    "SIGNALING": AppState.RUNNING,
}
"""Slurm's state -> torchx's. Any other state is FAILED if final (`slurm.FINISHED`), else
PENDING."""

_PRECEDENCE = (
    AppState.RUNNING,
    AppState.PENDING,
    AppState.FAILED,
    AppState.CANCELLED,
    AppState.SUCCEEDED,
)
"""An array has the first of these states that any of its tasks has."""


def overall(states: Iterable[str]) -> AppState:
    """Return one torchx state for the Slurm states of a job's tasks."""
    task_states = {
        _APP_STATES.get(state, AppState.FAILED if state in slurm.FINISHED else AppState.PENDING)
        for state in states
    }
    return next(state for state in _PRECEDENCE if state in task_states)


def create_scheduler(session_name: str, **parameters: Any) -> Mellum2Scheduler:
    """Return our scheduler (entry point ``torchx.schedulers``)."""
    return Mellum2Scheduler(session_name, experiment=parameters.get("experiment"))
