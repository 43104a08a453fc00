"""Jobs: every possible check comes before the submission."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from launchers.batch_job import write_job
from launchers.job import missing_variables
from launchers.local import few_cores, rank_environment
from launchers.profile import Container, Mount, Profile
from mellum2_megatron.checkpoint import read_run
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Layout, Run, apply_overrides
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.planning.rules import enforce
from tests.launchers.jobs import make_job
from tests.training.test_train import small_run

CPU = Profile(name="site", account="none", ranks_per_node=2)
GPU = Profile(name="site", account="none", gpus_per_node=8)


def changed(run: Run, *overrides: str) -> Run:
    return apply_overrides(run, overrides)


def test_nothing_is_written_before_write_job(run: Run, tmp_path: Path):
    job = make_job(run, CPU, nodes=2)
    assert (job.world_size, job.device, job.python) == (4, "cpu", sys.executable)
    assert not job.folder.exists()
    script = write_job(job)
    assert script == tmp_path / "run" / "job.sbatch"
    assert (job.folder / "logs").is_dir()
    assert read_run(job.folder / "run.yaml") == job.run


def test_paths_become_absolute(
    corpus: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    os.symlink(corpus.path, "corpus")
    run = small_run(
        corpus, Path("runs/x"), "data.path=corpus", "data.train=[[1.0,corpus/train_document]]"
    )
    job = make_job(run, CPU)
    assert job.folder == tmp_path / "runs" / "x"
    assert job.run.checkpoint.output == str(job.folder)
    assert job.run.data.path == str(tmp_path / "corpus")
    assert job.run.data.train == ((1.0, str(tmp_path / "corpus" / "train_document")),)
    nameless = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, output=None))
    profile = dataclasses.replace(CPU, runs=str(tmp_path / "all"))
    assert make_job(nameless, profile).folder == tmp_path / "all" / run.name


@pytest.mark.parametrize(
    ("layout", "profile", "nodes", "world"),
    [
        ({"dp": 4}, {}, None, (2, 2)),
        ({"dp": 2}, {"ranks_per_node": 8}, None, (1, 2)),  # fewer ranks than a node has
        ({}, {}, None, (1, 2)),
        ({}, {"nodes": 4}, None, (4, 2)),
        ({}, {"nodes": 4}, 3, (3, 2)),
    ],
)
def test_world(
    run: Run,
    layout: dict[str, Any],
    profile: dict[str, Any],
    nodes: int | None,
    world: tuple[int, int],
):
    run = dataclasses.replace(run, layout=Layout(ep=2, **layout))
    job = make_job(run, dataclasses.replace(CPU, **profile), nodes=nodes)
    assert (job.nodes, job.ranks_per_node) == world


def test_gpus_of_a_node(run: Run):
    assert make_job(run, GPU).gpus_per_node == 8
    # A job with fewer ranks than a node has GPUs leaves the others to other jobs.
    assert make_job(changed(run, "layout.dp=2"), GPU).gpus_per_node == 2
    # A profile may take all GPUs of a node for fewer ranks.
    assert make_job(run, dataclasses.replace(GPU, ranks_per_node=4)).gpus_per_node == 8


def test_packages_are_those_of_the_nodes(run: Run, monkeypatch: pytest.MonkeyPatch):
    run = changed(run, "backend=te", "logging.wandb_project=x")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="wandb is not installed here"):
        enforce(run, world_size=8, device="cuda")
    make_job(run, GPU)


def test_tasks_of_an_array(run: Run):
    job = make_job(run, CPU, sweep=[["seed=1"], ["seed=2", "optimizer.lr=1e-4"]])
    assert job.array == "0-1"
    assert [(task.seed, task.checkpoint.output) for task in job.tasks] == [
        (1, str(job.folder / "0")),
        (2, str(job.folder / "1")),
    ]
    write_job(job)
    assert read_run(job.folder / "1" / "run.yaml").optimizer.lr == 1e-4
    with pytest.raises(InputError, match="there is no key 'sed'"):
        make_job(run, CPU, sweep=[["sed=1"]])


def refused(run: Run, profile: Profile, **more: Any) -> str:
    before = set(Path(str(run.checkpoint.output)).parent.rglob("*"))
    with pytest.raises(InputError) as error:
        make_job(run, profile, **more)
    assert set(Path(str(run.checkpoint.output)).parent.rglob("*")) == before
    return str(error.value)


def test_no_account(run: Run):
    profile = dataclasses.replace(CPU, account=None)
    assert "profile site names no account: Slurm charges a job to one. Fix: set account" in refused(
        run, profile
    )
    make_job(run, dataclasses.replace(profile, executor="local"))


def test_layout_that_does_not_fit(run: Run):
    message = refused(changed(run, "layout.ep=4"), CPU, nodes=3)
    assert "ep * etp * pp = 4 must divide the number of ranks" in message
    assert "start 4 or 8 ranks" in message
    assert "layout.dp=4 on 2 ranks" in refused(changed(run, "layout.dp=4"), CPU, nodes=1)


def test_folders(run: Run, tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(changed(run, f"checkpoint.output={tmp_path}/file/run"), CPU)
    bad = changed(run, f"checkpoint.output={tmp_path}/a\\b")
    assert "a name of Slurm's log files cannot hold" in refused(bad, CPU)


def test_data_that_is_not_there(run: Run):
    assert "data.path=/nowhere" in refused(changed(run, "data.path=/nowhere"), CPU)


def test_checkpoint_of_a_job_before(run: Run, tmp_path: Path):
    """A stage's starting checkpoint may be absent if the job before writes it."""
    first = tmp_path / "first"
    for key in ("load", "continue_from"):
        second = changed(run, f"checkpoint.{key}={first}")
        assert str(first) in refused(second, CPU)
        assert make_job(second, CPU, before=first).run == second
        assert str(first) in refused(second, CPU, before=tmp_path / "another")


def test_container(run: Run, corpus: PreparedData, tmp_path: Path):
    image = tmp_path / "image.sqsh"
    image.write_text("")
    disk = Mount(source="/tmp", target="/tmp")
    fine = Container(image=str(image), runtime="pyxis", mounts=(disk,))

    def with_container(**changes: Any) -> Profile:
        return dataclasses.replace(CPU, container=dataclasses.replace(fine, **changes))

    if tmp_path.is_relative_to("/tmp"):
        assert make_job(run, with_container()).python == "python"
        assert make_job(run, with_container(image="registry.site#nvidia/pytorch:25.10-py3"))
    missing = with_container(
        image=str(tmp_path / "gone.sqsh"), mounts=(Mount(source="/", target="/"),)
    )
    assert "there is no such file. Fix: name an image on a disk that the nodes share" in refused(
        run, missing
    )
    message = refused(
        run, with_container(mounts=(Mount(source=str(tmp_path), target=str(tmp_path)),))
    )
    assert str(corpus.path) in message
    assert "lies in none of container.mounts" in message
    assert "--output" in refused(
        run, with_container(mounts=(Mount(source="/tmp", target="/data"),))
    )


def test_interpreter(run: Run):
    assert "there is no such program here" in refused(
        run, dataclasses.replace(CPU, python="/no/python")
    )
    assert make_job(run, dataclasses.replace(CPU, python=sys.executable)).python == sys.executable


def test_job_names_are_safe_in_log_paths(run: Run):
    assert make_job(run, CPU, name="phase 1: a/b%c").name == "phase-1-a-b-c"
    assert make_job(run, CPU, name="%%").name == "mellum2"


def test_variables_that_are_not_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HERE", "1")
    monkeypatch.delenv("GONE", raising=False)
    assert missing_variables(dataclasses.replace(CPU, environment=("HERE", "GONE"))) == ("GONE",)


def test_variables_of_a_profile_that_a_deterministic_run_cannot_have(run: Run) -> None:
    """Else all ranks of all nodes would refuse them, hours later."""
    tree = dataclasses.replace(CPU, variables={"NCCL_ALGO": "Tree"})
    make_job(run, tree)
    with pytest.raises(InputError, match=r"NCCL_ALGO=Tree with execution\.deterministic=true"):
        make_job(changed(run, "execution.deterministic=true"), tree)
    ring = dataclasses.replace(CPU, variables={"NCCL_ALGO": "Ring"})
    make_job(changed(run, "execution.deterministic=true"), ring)


def test_ranks_on_gpus_share_the_cores_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(96)))
    assert rank_environment(8, "cuda")["OMP_NUM_THREADS"] == "12"
    assert "CUDA_VISIBLE_DEVICES" not in rank_environment(8, "cuda")
    assert few_cores(8) == ""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    assert "8 ranks share 1 core: set cpus_per_task" in few_cores(8)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert rank_environment(8, "cuda")["OMP_NUM_THREADS"] == "3"
