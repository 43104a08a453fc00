"""Reinforcement learning in Megatron's loop: ranks, ages, resumes, and the band that acts."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from mellum2_megatron.checkpoint.folder import TRACKER_FILE
from mellum2_megatron.config import Run, apply_overrides
from mellum2_megatron.metrics.log import METRICS_FILE, read_metrics
from mellum2_megatron.recipes import recipe
from tests.data.chats import write_rows, write_tokenizer
from tests.faults.test_faults import ranks
from tests.faults.test_stability import events
from tests.small import SMALL_MODEL
from tests.training.test_train import train

pytestmark = pytest.mark.distributed

STEPS = 4
VOWELS: dict[str, Any] = {"verifier": "form", "arguments": {"pattern": "(?s).*[aeiou].*"}}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def write_tasks(folder: Path, verifier: dict[str, Any] = VOWELS) -> Path:
    write_tokenizer(folder / "tokenizer")
    for split, numbers in (("train", range(40)), ("valid", range(900, 906))):
        rows = [{"messages": [{"role": "user", "content": f"{i}?"}], **verifier} for i in numbers]
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


def run_on(tasks: Path, output: Path, *words: str, steps: int = STEPS) -> Run:
    settings = [
        *SMALL_MODEL,
        "checkpoint.load=null",
        f"data.path={tasks}",
        f"data.tokenizer={tasks / 'tokenizer'}",
        "layout.ep=1",
        "rl.objective.prompts=4",
        "rl.objective.group_size=4",
        "rl.objective.max_tokens=6",
        "rl.objective.overlong_tokens=2",
        "schedule.batch_schedule=[[0,16]]",
        f"schedule.train_samples={16 * steps}",
        f"schedule.horizon_samples={16 * STEPS}",
        "schedule.warmup_samples=0",
        "schedule.micro_batch_size=4",
        "optimizer.lr=1e-3",
        "logging.eval_interval=2",
        "checkpoint.save_interval=2",
        f"checkpoint.output={output}",
        *words,
    ]
    return apply_overrides(recipe("mellum2_tiny_rlvr_instruct"), settings)


def numbers(output: Path, kind: str = "train") -> dict[int, dict[str, float]]:
    """Numbers of each step that no clock makes."""
    clocks = ("second", "tflops")
    found = {
        record.step: {
            name: value
            for name, value in record.values.items()
            if not any(clock in name for clock in clocks)
        }
        for record in read_metrics(output / METRICS_FILE)
        if record.kind == kind
    }
    assert found
    return found


def test_two_ranks_learn_as_one(tasks: Path, tmp_path: Path) -> None:
    """The same answers, rewards and loss at the first update, and nearly so after it."""
    one = numbers(train(run_on(tasks, tmp_path / "one", steps=2), 1))
    two = numbers(train(run_on(tasks, tmp_path / "two", steps=2), 2))
    for name in ("rl/reward", "rl/answer_tokens", "rl/groups_dropped_share", "rl/age"):
        assert one[1][name] == two[1][name]
    assert one[1]["lm_loss"] == pytest.approx(two[1]["lm_loss"], rel=1e-3, abs=1e-5)
    assert one[1]["grad_norm"] == pytest.approx(two[1]["grad_norm"], rel=2e-2)
    assert one[1]["grad_norm"] > 0
    assert one[1]["rl/kl"] < 1e-3  # engine and training hold the same weights
    assert one[1]["rl/outside_band_share"] == 0


def test_an_asynchronous_run_resumes_exactly_and_its_stale_answers_meet_the_band(
    tasks: Path, tmp_path: Path
) -> None:
    ahead = ["rl.ahead=2", "optimizer.lr=0.02", "optimizer.min_lr=0.02"]
    straight = train(run_on(tasks, tmp_path / "straight", *ahead), 1)
    # As a run that was killed after its save at step 2.
    killed = shutil.copytree(straight, tmp_path / "killed")
    shutil.rmtree(killed / "iter_0000004")
    (killed / TRACKER_FILE).write_text("2")
    resumed = train(run_on(tasks, killed, *ahead), 1)
    assert numbers(resumed) == numbers(straight)
    assert numbers(resumed, "valid")[STEPS] == numbers(straight, "valid")[STEPS]
    steps = numbers(straight)
    assert sorted(steps) == [1, 2, 3, 4]
    assert (steps[1]["rl/age"], steps[1]["rl/outside_band_share"]) == (0, 0)
    assert max(step["rl/age_max"] for step in steps.values()) == 2
    assert max(step["rl/outside_band_share"] for step in steps.values()) > 0
    for step in steps.values():
        assert all(map(math.isfinite, step.values()))


def test_weights_that_have_diverged_are_no_bad_input(tasks: Path, tmp_path: Path) -> None:
    """A NaN of the training model is skipped where the run says so, as in any training."""
    run = run_on(tasks, tmp_path, "stability.not_finite=skip", "rl.eval_answers=0", steps=2)
    assert ranks("bad_steps", run, 1, [2], "loss") == [True, True]
    (event,) = events(tmp_path)
    assert (event.step, event.note) == (2, "the loss is nan on rank 1: the update is skipped")
    assert [math.isfinite(step["lm_loss"]) for step in numbers(tmp_path).values()] == [True, False]
