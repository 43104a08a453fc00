"""Write the files that a job needs on the shared disk: run folder, log folder and batch script."""

from __future__ import annotations

from pathlib import Path

from launchers.job import LOGS_FOLDER, ClusterJob
from launchers.sbatch import render
from mellum2_megatron.checkpoint import write_run_folder
from mellum2_megatron.common.files import write_text

SCRIPT_FILE = "job.sbatch"


def write_job(job: ClusterJob) -> Path:
    """Write the run folders, the log folder and the batch script; return the script's path."""
    for run in job.runs:
        write_run_folder(run)
    # Slurm drops a job without any message if it cannot open the job's log.
    (job.folder / LOGS_FOLDER).mkdir(parents=True, exist_ok=True)
    write_text(job.folder / SCRIPT_FILE, render(job))
    return job.folder / SCRIPT_FILE
