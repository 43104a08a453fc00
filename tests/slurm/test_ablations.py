"""A study as a job array on two nodes: folders by arm and seed, only what is missing again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ablations.running.results import task_folder
from mellum2_megatron.checkpoint.folder import tracked_iteration
from tests.ablations.small_study import write_study
from tests.cli.runner import mellum2
from tests.slurm.cluster import Cluster, wait_for
from tests.training.test_train import small_corpus

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]


def test_a_study_is_an_array_and_only_missing_tasks_are_submitted_again(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    study = write_study(tmp_path / "mine.py", small_corpus(tmp_path))
    profile = {"account": "none", "time": "30", "ranks_per_node": 1, "cpus_per_task": 1}
    profile |= {"variables": {"OMP_NUM_THREADS": "1"}, "tries": 1}  # type: ignore[dict-item]
    Path("site.yaml").write_text(json.dumps(profile))
    common = [str(study), "--results", "results", "--seeds", "1"]
    run = ["ablate", "run", *common, "--executor", "slurm", "--profile", "./site.yaml"]

    def rows() -> dict[str, dict[str, str]]:
        result = mellum2("ablate", "status", *common, "--json")
        assert result.code == 0, result
        return {row["arm"]: row for row in json.loads(result.out)}

    first = mellum2(*run, "--allow-dirty")
    assert first.code == 0, first
    assert "2 tasks submitted, 0 in the queue already" in first.out
    assert {row["todo"] for row in rows().values()} == {"wait"}
    # Nothing is left to submit while the array is in the queue.
    assert "0 tasks submitted, 2 in the queue already" in mellum2(*run, "--allow-dirty").out

    def logs() -> str:
        files = Path("results/mine/tiny/logs").glob("*.log")
        return "\n".join(file.read_text() for file in files) + slurm.log()

    wait_for(
        lambda: {row["state"] for row in rows().values()} == {"done"}, 600, "both tasks done", logs
    )
    # A job ends a moment after its last checkpoint.
    wait_for(lambda: not slurm.run("squeue", "--noheader").strip(), 120, "an empty queue", logs)
    adam = task_folder(Path("results"), "mine", "tiny", "adam", 1)
    assert tracked_iteration(adam) == 3
    # A task whose results are gone is submitted alone.
    shutil.rmtree(adam)
    assert {arm: row["todo"] for arm, row in rows().items()} == {"base": "nothing", "adam": "run"}
    again = mellum2(*run, "--allow-dirty")
    assert "1 tasks, adam seed 1" in again.out, again
    wait_for(lambda: rows()["adam"]["state"] == "done", 600, "the task done", logs)
