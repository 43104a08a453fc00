"""A site profile in the form of a NeMo-Run executor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nemo_run
import yaml

from launchers.job import ClusterJob, check_files, plan_job
from launchers.profile import Profile, profile_from_yaml, read_profile
from mellum2_megatron.checkpoint import StartingPoint
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.values import to_plain
from mellum2_megatron.config import Run


@dataclass(kw_only=True)
class Mellum2SlurmExecutor(nemo_run.SlurmExecutor):  # type: ignore[misc]
    """NeMo-Run's Slurm executor with our batch script, and with a site profile for its settings.

    NeMo-Run stores executors on disk and rebuilds them, so fields hold plain values only.

    Attributes:
        profile_yaml: site profile as YAML.
        nodes: number of nodes, default the profile's.
        time: time limit, default the profile's.
        code: folder put first on ``PYTHONPATH``; None, the default, runs the installed packages.
        sweep: overrides of each task of an array; default empty, for an ordinary job.
        before: run folder of a task that this one waits for, default none. Its checkpoint may not
            exist yet.
        waits_for: Slurm's conditions on jobs outside the experiment, such as ``afterok:123``;
            default none.
    """

    # NeMo-Run's class requires an account; here the profile may have none.
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
        """Site profile."""
        return profile_from_yaml(self.profile_yaml, name="profile")

    def job(self, run: Run) -> ClusterJob:
        """Return the job of a run, planned and checked against this machine's files.

        Raises:
            InputError: see `launchers.job.plan_job` and `launchers.job.check_files`.
        """
        job = plan_job(
            run,
            self.profile,
            # Set by NeMo-Run: the task's name in the experiment.
            name=self.job_name,
            nodes=self.nodes,
            time=self.time,
            code=None if self.code is None else Path(self.code),
            sweep=self.sweep,
            dependency=self.waits_for,
        )
        starts = [StartingPoint.of(run) for run in job.runs]
        check_files(job, starts, before=None if self.before is None else Path(self.before))
        return job

    def nnodes(self) -> int:
        """Number of nodes, for NeMo-Run's displays."""
        return self.nodes or self.profile.nodes or 1

    def info(self) -> str:
        """One line for NeMo-Run's status."""
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
    """Return an executor for `launchers.nemo.task` on Slurm.

    Args:
        profile: name or file of a site profile, or the profile itself.
        nodes, time, code, sweep, before, waits_for: see `Mellum2SlurmExecutor`.

    Raises:
        InputError: no such profile, or one that is not for Slurm.
    """
    site = profile if isinstance(profile, Profile) else read_profile(profile)
    if site.executor != "slurm":
        raise InputError(
            f"profile {site.name}", rule="is not for Slurm", fix="use nemo_run.LocalExecutor()"
        )
    return Mellum2SlurmExecutor(
        account=site.account or "",
        partition=site.partition,
        profile_yaml=profile_text(site),
        nodes=nodes,
        time=time,
        code=None if code is None else os.fspath(code),
        sweep=[list(overrides) for overrides in sweep],
        before=None if before is None else os.fspath(before),
        waits_for=list(waits_for),
    )


def profile_text(profile: Profile) -> str:
    """Return a profile as YAML for `launchers.profile.profile_from_yaml`."""
    text: str = yaml.safe_dump(to_plain(profile), sort_keys=False)
    return text
