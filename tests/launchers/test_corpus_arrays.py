"""Batch scripts of a corpus plan, and slices that cover a stage."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest

from launchers.corpus_arrays import check_profile, write_scripts
from launchers.profile import Container, Profile
from mellum2_megatron.cli.corpus_plan import _slice
from mellum2_megatron.common.errors import InputError

PROFILE = Profile(
    name="site",
    executor="slurm",
    account="a b",
    partition="cpu",
    time="01:00:00",
    cpus_per_task=4,
    modules=("python/3.12",),
    setup=("ulimit -c 0",),
    environment=(),
)


def test_scripts_name_stage_slice_and_plan(tmp_path: Path) -> None:
    jobs = write_scripts(
        Path("/data/my plan.yaml"),
        tmp_path / "results",
        PROFILE,
        [("documents", 100), ("exact", 1), ("packs", 0)],
        slices=8,
        code=Path("/code"),
    )
    assert [(job.stage, job.slices) for job in jobs] == [
        ("documents", 8),
        ("exact", 1),
        ("packs", 8),
        ("", 1),
    ]
    text = jobs[0].script.read_text()
    for line in (
        "#SBATCH --array=0-7",
        '#SBATCH --account="a b"',
        "#SBATCH --cpus-per-task=4",
        f"#SBATCH --output={tmp_path}/results/logs/%x-%A_%a.log",
        "module load python/3.12",
        "ulimit -c 0",
        "export PYTHONPATH=/code${PYTHONPATH:+:$PYTHONPATH}",
    ):
        assert f"{line}\n" in text
    assert text.rstrip().endswith(
        "-m mellum2_megatron data run '/data/my plan.yaml' --stage documents --slice "
        '"$SLURM_ARRAY_TASK_ID/8" --workers "${SLURM_CPUS_PER_TASK:-1}"'
    )
    assert "--stage" not in jobs[-1].script.read_text()
    for job in jobs:
        subprocess.run(["bash", "-n", str(job.script)], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", "-s", "bash", str(job.script)], check=True)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_slices_cover_a_stage(count: int) -> None:
    tasks = list(range(20))
    parts = [_slice(f"{number}/{count}", "documents") for number in range(count)]
    covered = sorted(task for start, step in parts for task in tasks[start::step])
    assert covered == tasks


@pytest.mark.parametrize(
    "text", ["4/4", "-1/4", "1", "a/b", "1/", "/", "1/0", "٣/٤", "0/99999999999"]
)
def test_bad_slices_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--slice"):
        _slice(text, "documents")
    with pytest.raises(InputError, match="add --stage"):
        _slice("0/4", None)


def test_other_profiles_are_refused() -> None:
    with pytest.raises(InputError, match="arrays need Slurm"):
        check_profile(Profile(name="local", executor="local"))
    container = Container(runtime="pyxis", image="/x.sqsh")
    with pytest.raises(InputError, match="has a container"):
        check_profile(dataclasses.replace(PROFILE, container=container))
