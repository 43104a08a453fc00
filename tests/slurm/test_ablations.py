"""A study as a job array on two nodes: folders by arm and seed, only what is missing again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from ablations.running.results import task_folder
from launchers.early_end import LossLimit, read_limit
from launchers.outcome import read_attempts
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


def test_a_stop_rule_ends_a_task_of_an_array_for_good(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One arm starts with a loss far above the rule, and would train for an hour without it."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    wild = ("architecture.initializer_range=1.0", "schedule.train_samples=40000")
    study = write_study(
        tmp_path / "mine.py",
        small_corpus(tmp_path),
        arms=f'Arm("base"), Arm("wild", {wild!r})',
        more="stop=StopRule(after=0.0002, train_loss_above=12), matched=(),",
        common=("logging.log_interval=1",),
    )
    profile = {"account": "none", "time": "30", "ranks_per_node": 1, "cpus_per_task": 1}
    profile |= {"variables": {"OMP_NUM_THREADS": "1"}, "tries": 1}  # type: ignore[dict-item]
    Path("site.yaml").write_text(json.dumps(profile))
    common = [str(study), "--results", "results", "--seeds", "1"]
    run = ["ablate", "run", *common, "--executor", "slurm", "--profile", "./site.yaml"]

    def states() -> dict[str, str]:
        result = mellum2("ablate", "status", *common, "--json")
        assert result.code == 0, result
        return {row["arm"]: row["state"] for row in json.loads(result.out)}

    def logs() -> str:
        files = Path("results/mine/tiny/logs").glob("*.log")
        return "\n".join(file.read_text() for file in files) + slurm.log()

    submitted = mellum2(*run, "--allow-dirty")
    assert "2 tasks submitted" in submitted.out, submitted
    wait_for(lambda: states() == {"base": "done", "wild": "early"}, 600, "the rule", logs)
    wait_for(lambda: not slurm.run("squeue", "--noheader").strip(), 120, "an empty queue", logs)
    ended = task_folder(Path("results"), "mine", "tiny", "wild", 1)
    limit = read_limit(ended)
    assert limit == LossLimit(step=2, train_loss_above=12)
    attempts = read_attempts(ended)
    assert [attempt.kind for attempt in attempts] == ["early"]
    reason = attempts[0].reason
    assert re.fullmatch(r"stop rule: loss [0-9.]+ at step 2 > 12", reason), reason
    # It saved before it left, and is not started again.
    assert 2 <= tracked_iteration(ended) < 10_000
    shown = mellum2("ablate", "status", *common)
    assert re.search(r"wild +early", shown.out), shown
    assert "2 tasks, 0 to run" in shown.out
    (row,) = (
        row
        for row in json.loads(mellum2("ablate", "status", *common, "--json").out)
        if row["arm"] == "wild"
    )
    assert (row["message"], row["todo"]) == (reason, "nothing")
    again = mellum2(*run, "--allow-dirty")
    assert again.code == 0, again
    assert not slurm.run("squeue", "--noheader").strip()
    assert len(read_attempts(ended)) == 1
