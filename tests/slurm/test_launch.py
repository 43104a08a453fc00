"""`mellum2 launch` on a real Slurm through NeMo-Run: runs, status, logs and cancel.

As in test_scenarios.py all jobs are submitted at the start and train side by side.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launchers.launch_record import read_launches
from launchers.outcome import read_attempts
from mellum2_megatron.checkpoint import read_run
from mellum2_megatron.checkpoint.folder import tracked_iteration
from mellum2_megatron.common.provenance import read_records
from mellum2_megatron.config import Run, apply_overrides, to_yaml
from mellum2_megatron.metrics.log import METRICS_FILE, read_metrics
from tests.cli.runner import Result, mellum2
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.test_scenarios import FAULTS, LONG
from tests.training.test_train import small_corpus, small_run

pytestmark = [
    pytest.mark.launch,
    pytest.mark.slurm,
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]

SHORT = ["logging.tensorboard=false", "logging.eval_iterations=0", "checkpoint.save_interval=1"]
SHORT += ["schedule.train_samples=24", "schedule.decay_samples=8"]
STEPS = 4
PROFILE: dict[str, Any] = {
    "account": "none",
    "time": "30",
    "ranks_per_node": 2,
    "cpus_per_task": 2,
    "variables": {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FAULTS)},
    "grace_seconds": 60,
    "tries": 1,
}
"""Profile with both ranks on one node. PYTHONPATH holds a run before a step (`slurm/faults`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """The folder of all launches, and the cluster."""

    folder: Path
    slurm: Cluster

    def launch(self, *words: str | Path) -> Result:
        """Run `mellum2 launch`; it must succeed."""
        result = mellum2("launch", *words)
        assert result.code == 0, result
        return result

    def status(self, *words: str | Path) -> list[dict[str, Any]]:
        """Return the output of `mellum2 launch status`."""
        statuses: list[dict[str, Any]] = json.loads(self.launch("status", *words, "--json").out)
        return statuses

    def states(self, *words: str | Path) -> list[str]:
        """Return the states of `mellum2 launch status`."""
        return [status["state"] for status in self.status(*words)]

    def wait(self, folder: Path, *states: str) -> None:
        """Wait until the jobs of a folder have these states."""
        wait_for(
            lambda: self.states(folder) == list(states),
            LONG,
            f"{folder.name} {states}",
            lambda: self.log(folder),
        )

    def log(self, folder: Path) -> str:
        """Return all logs, for the message of a failure."""
        logs = [
            f"--- {path.name} ---\n{path.read_text()}"
            for path in sorted((folder / "logs").glob("*.log"))
        ]
        return "\n".join([*logs, self.slurm.run("squeue"), self.slurm.log()])


@pytest.fixture(scope="module")
def site(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Launch everything."""
    if os.environ.get("MELLUM2_REQUIRE_SLURM") != "1":
        pytest.importorskip(
            "nemo_run", reason="NeMo-Run is not installed; `make setup-launch` installs it"
        )
    folder = tmp_path_factory.mktemp("launch site")
    corpus = small_corpus(tmp_path_factory.mktemp("launch data"))
    one = apply_overrides(small_run(corpus, folder / "x"), SHORT)
    one = dataclasses.replace(
        one, name="one", checkpoint=dataclasses.replace(one.checkpoint, output=None)
    )
    two = dataclasses.replace(
        one, name="two", checkpoint=dataclasses.replace(one.checkpoint, load="of one")
    )
    with pytest.MonkeyPatch.context() as patch, Path(os.devnull).open() as nothing:
        for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
            patch.delenv(name)
        for name, value in slurm.environment.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        patch.setattr("sys.stdin", nothing)  # invoke, which NeMo-Run runs commands with, reads it
        _write(folder, one, two)
        from nemo_run.config import get_nemorun_home, set_nemorun_home

        before = get_nemorun_home()
        set_nemorun_home(str(folder / "nemo home"))
        site = Site(folder=folder, slurm=slurm)
        _launch(site)
        yield site
        set_nemorun_home(before)


def _write(folder: Path, one: Run, two: Run) -> None:
    for run in (one, two):
        (folder / f"{run.name}.yaml").write_text(to_yaml(run))
    spare = {
        **PROFILE,
        "partition": "spare",
        "sbatch": {"gres": "seat:1"},
        "ranks_per_node": 1,
        "nodes": 2,
    }
    # JSON is YAML.
    (folder / "site.yaml").write_text(json.dumps(PROFILE))
    (folder / "spare.yaml").write_text(json.dumps(spare))


def _launch(site: Site) -> None:
    for name in ("runs/preempted", "runs/array/1"):
        (site.folder / name).mkdir(parents=True)
        (site.folder / name / "gate").write_text("3 hold")
    dirty = "--allow-dirty"  # tests run on uncommitted changes, too
    site.launch("one.yaml", "--profile", "./spare.yaml", "--output", "runs/preempted", dirty)
    site.launch(
        "pipeline",
        "one.yaml",
        "two.yaml",
        "--profile",
        "./site.yaml",
        "--output",
        "runs/chain",
        dirty,
    )
    tasks = ["--array", "seed=1", "--array", "seed=2 optimizer.lr=1e-4"]
    site.launch("one.yaml", "--profile", "./site.yaml", "--output", "runs/array", *tasks, dirty)


def losses(folder: Path) -> list[tuple[float, ...]]:
    """Losses, gradient norm and learning rate of every step."""
    names = ("step", "lm_loss", "mtp_loss", "grad_norm", "learning_rate")
    records = [record for record in read_metrics(folder / METRICS_FILE) if record.kind == "train"]
    return [
        tuple(record.step if name == "step" else record.values[name] for name in names)
        for record in records
    ]


def test_preempted_run_resumes_by_itself(site: Site) -> None:
    folder = site.folder / "runs/preempted"
    at_gate = [folder / f"arrived.{rank}" for rank in range(2)]
    wait_for(
        lambda: all(file.is_file() for file in at_gate),
        LONG,
        "at the gate",
        lambda: site.log(folder),
    )
    (before,) = site.status("runs/preempted")
    assert (before["state"], before["source"], before["step"], before["attempts"]) == (
        "RUNNING",
        "slurm",
        2,
        1,
    )
    assert before["nodes"] == "n[1-2]"

    urgent = [
        "sbatch",
        "--parsable",
        "--nodes=2",
        "--gres=seat:1",
        "--output=/dev/null",
        "--wrap=sleep 1",
    ]
    site.slurm.run(*urgent)
    wait_for(
        lambda: len(read_attempts(folder)) > 1, LONG, "started again", lambda: site.log(folder)
    )
    (folder / "gate").unlink()
    site.wait(folder, "COMPLETED")
    (after,) = site.status("runs/preempted")
    assert (after["job_id"], after["step"], after["attempts"]) == (before["job_id"], STEPS, 2)
    (launch,) = read_launches(folder)
    assert (launch.job_id, launch.profile, launch.nodes) == (after["job_id"], "spare", 2)
    events = [line["event"] for line in read_records(folder)]
    assert events == ["launch", "start", "end", "start", "end"]

    # The same run, undisturbed and on one node; world and seed are the same.
    chain = site.folder / "runs/chain/one"
    site.wait(chain, "COMPLETED")
    assert losses(folder) == losses(chain)
    assert len(losses(folder)) == STEPS


def test_a_chain_starts_each_stage_from_the_one_before(site: Site) -> None:
    one, two = site.folder / "runs/chain/one", site.folder / "runs/chain/two"
    site.wait(one, "COMPLETED")
    site.wait(two, "COMPLETED")
    assert read_run(two / "run.yaml").checkpoint.load == str(one)
    assert tracked_iteration(two) == STEPS
    assert losses(two)[0] != losses(one)[0]
    (waited,) = read_launches(two)
    assert waited.dependency == (f"afterok:{read_launches(one)[0].job_id}",)
    assert waited.experiment == read_launches(one)[0].experiment


def test_tasks_of_an_array_are_watched_and_cancelled_one_by_one(site: Site) -> None:
    folder = site.folder / "runs/array"
    number = read_launches(folder)[0].job_id
    held = folder / "1" / "arrived.0"
    wait_for(held.is_file, LONG, "at the gate", lambda: site.log(folder))
    wait_for(
        lambda: site.states(folder)[0] == "COMPLETED", LONG, "first task", lambda: site.log(folder)
    )
    assert [status["job_id"] for status in site.status(number)] == [f"{number}_0", f"{number}_1"]
    assert site.states(folder / "1") == ["RUNNING"]
    mellum2("launch", "logs", "runs/array").refused("2 tasks", f"{number}_0")

    site.launch("cancel", f"{number}_1")
    site.wait(folder, "COMPLETED", "CANCELLED")
    assert tracked_iteration(folder / "0") == STEPS
    assert tracked_iteration(folder / "1") == 3  # the step at the cancellation is saved
    assert [read_run(folder / task / "run.yaml").seed for task in "01"] == [1, 2]


def test_logs(site: Site) -> None:
    folder = site.folder / "runs/preempted"
    site.wait(folder, "COMPLETED")
    number = read_launches(folder)[0].job_id
    everything = site.launch("logs", folder).out
    assert everything.count("==> ") == 3  # logs of the batch script and of two nodes
    first = site.launch("logs", number, "--rank", "0").out
    second = site.launch("logs", number, "--rank", "1").out
    assert first in everything
    assert second in everything
    assert f"step {STEPS}/{STEPS}" in second  # the last rank has the losses
    mellum2("launch", "logs", number, "--rank", "2").refused("ranks 0 to 1")
    # For a job that has ended, --follow prints its log and its state.
    followed = site.launch("logs", folder, "--follow").out
    assert second.rstrip("\n") in followed
    assert "COMPLETED" in followed
