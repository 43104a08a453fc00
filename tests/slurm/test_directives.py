"""The ``#SBATCH`` lines of a script as Slurm itself reads them, and what it says to cancel."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from launchers import slurm as commands
from launchers.sbatch import render
from tests.launchers.golden_jobs import golden_jobs
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120)]

COMMENTS = ["a b", "it's", 'say "hi"', "a#b", "# x", "a\\b", "\\", "x\\", "$HOME `date`", "a,b;c"]


def test_slurm_reads_values_as_they_were(slurm: Cluster, tmp_path: Path) -> None:
    job = golden_jobs()["bare"]
    for number, comment in enumerate(COMMENTS):
        profile = dataclasses.replace(
            job.profile,
            account=None,
            partition=None,
            qos=None,
            time=None,
            cpus_per_task=1,
            memory=None,
            gpu_request="none",
            exclusive=False,
            sbatch={"comment": comment, "begin": "now+1hour"},
        )
        script = tmp_path / f"{number}.sbatch"
        small = dataclasses.replace(job, profile=profile, nodes=1, folder=tmp_path)
        script.write_text(render(small))
        number_of_job = slurm.run("sbatch", "--parsable", str(script)).strip()
        shown = slurm.run("scontrol", "show", "job", number_of_job)
        slurm.run("scancel", number_of_job)
        assert f"Comment={comment}\n" in f"{shown}\n".replace(" \n", "\n"), shown
        assert f"StdOut={tmp_path}/logs/" in shown


def test_cancel_tells_what_slurm_confirms(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    job = slurm.run("sbatch", "--parsable", "--begin=now+1hour", "--wrap=true").strip()
    assert commands.cancel(job).note == "cancelled: CANCELLED"
    assert commands.cancel(job).note == "had already ended: CANCELLED"
    unknown = commands.cancel("999999")
    assert (unknown.done, unknown.note) == (False, "not found: Slurm has no such job")
