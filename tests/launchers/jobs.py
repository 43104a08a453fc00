"""A job as a submission makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launchers.job import ClusterJob, check_files, plan_job
from launchers.profile import Profile
from mellum2_megatron.checkpoint import StartingPoint
from mellum2_megatron.config import Run


def make_job(
    run: Run, profile: Profile, *, before: Path | None = None, **options: Any
) -> ClusterJob:
    """Return the planned job, checked against the files of this machine."""
    job = plan_job(run, profile, **options)
    check_files(job, [StartingPoint.of(run) for run in job.runs], before=before)
    return job
