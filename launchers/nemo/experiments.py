"""The NeMo-Run experiments of `mellum2 launch`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import nemo_run
from torchx.specs import AppState

from launchers.job import ClusterJob
from launchers.launch_record import record_launch
from launchers.nemo.executor import slurm_executor
from launchers.nemo.tasks import train_script
from launchers.submission import Submission
from mellum2_megatron.checkpoint import write_run_folder
from mellum2_megatron.checkpoint.folder import RUN_FILE


def submit(title: str, submissions: Sequence[Submission]) -> None:
    """Submit jobs to Slurm as one experiment.

    The scheduler writes each job's number and script to ``launch.json`` of its run folder.

    Args:
        title: name of the experiment.
        submissions: checked jobs, each after the jobs that it waits for.

    Raises:
        InputError, WorkError: a job is refused. The jobs before it are already submitted.
    """
    with _experiment(title) as experiment:
        for submission in submissions:
            job = submission.job
            executor = slurm_executor(
                # No `time`: the profile already holds the time limit of the command line.
                job.profile,
                nodes=submission.nodes,
                code=job.code,
                sweep=submission.sweep,
                before=submission.before,
                waits_for=job.dependency,
            )
            experiment.add(
                train_script(job.run, [str(job.folder / RUN_FILE)]),
                executor=executor,
                name=job.name,
                dependencies=list(submission.after),
            )
        # Slurm keeps the jobs: nothing has to run on this machine while they wait.
        experiment.run(detach=True)


def run_here(job: ClusterJob) -> bool:
    """Train on this machine as an experiment, with the log on the terminal.

    Returns:
        True if the training succeeded.
    """
    write_run_folder(job.run)
    words = [str(job.folder / RUN_FILE), "--device", job.device, "--nproc", str(job.ranks_per_node)]
    variables = dict(job.profile.variables)
    if job.code is not None:
        variables["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(job.code), os.environ.get("PYTHONPATH")])
        )
    with _experiment(job.name) as experiment:
        experiment.add(
            train_script(job.run, words),
            executor=nemo_run.LocalExecutor(env_vars=variables),
            name=job.name,
            tail_logs=True,
        )
        experiment.run()
        # The handle reads SCHEDULER://SESSION/APP.
        handle = experiment.jobs[0].handle
        record_launch(job, job_id=handle.rpartition("/")[2], experiment=experiment._id, script=None)
    return bool(experiment.jobs[0].state == AppState.SUCCEEDED)


def _experiment(title: str) -> nemo_run.Experiment:
    # Without NeMo-Run's messages: `mellum2 launch` prints one line for each job itself.
    return nemo_run.Experiment(
        title,
        log_level="ERROR",
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
    )
