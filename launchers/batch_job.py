"""Writes what a job needs on the shared disk: run folder, log folder and batch script."""

from __future__ import annotations

from pathlib import Path

from launchers.job import LOGS_FOLDER, Job
from launchers.sbatch import render
from mellum2_megatron.checkpoint import write_run_folder
from mellum2_megatron.common.files import write_text

SCRIPT_FILE = "job.sbatch"


def write_job(job: Job) -> Path:
    """Write the run folder, the folder of the logs and the script; return the script's path.

    ``sbatch`` drops a job without a word whose log it cannot open, so the folders must be there
    first.
    """
    for run in job.runs:
        write_run_folder(run)
    (job.folder / LOGS_FOLDER).mkdir(parents=True, exist_ok=True)
    write_text(job.folder / SCRIPT_FILE, render(job))
    return job.folder / SCRIPT_FILE
