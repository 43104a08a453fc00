"""Reinforcement learning in each parallel layout: answers, loss and update of a single process.

Weights are drawn by their names and the engine writes in float32, so every layout learns from the
same answers. Adam with an epsilon far above the gradients moves each weight in proportion to its
gradient, so the weights after a step compare the gradients.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.rlvr.test_training import numbers, run_on, write_tasks
from tests.training.test_train import train, weights

pytestmark = pytest.mark.distributed

SETTINGS = [
    "seed_weights=by_name",
    "optimizer.adam_eps=1.0",
    "optimizer.weight_decay=0.0",
    "checkpoint.save_interval=1",
]
LAYOUTS = {
    "ep2": ["layout.ep=2"],
    "tp2": ["layout.tp=2", "layout.sp=true"],
    "cp2": ["layout.cp=2"],
    "pp2": ["layout.pp=2"],
}


def first_step(tasks: Path, output: Path, *words: str, lr: str = "100", nproc: int = 1) -> Path:
    rate = [f"optimizer.lr={lr}", f"optimizer.min_lr={lr}"]
    return train(run_on(tasks, output, *SETTINGS, *rate, *words, steps=1), nproc)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def single(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a run of one process, and the same one without an update."""
    folder = tmp_path_factory.mktemp("single")
    still = first_step(tasks, folder / "still", lr="1e-20")
    return first_step(tasks, folder / "one"), still


@pytest.mark.parametrize(
    "layout",
    ["ep2", "tp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cp2", "pp2"))],
)
def test_a_layout_learns_as_one_process(
    layout: str, tasks: Path, single: tuple[Path, Path], tmp_path: Path
) -> None:
    divided = first_step(tasks, tmp_path / "run", *LAYOUTS[layout], nproc=2)
    one, two = numbers(single[0])[1], numbers(divided)[1]
    for name in ("rl/reward", "rl/answer_tokens", "rl/groups_dropped_share"):
        assert one[name] == two[name]
    assert two["rl/entropy"] == pytest.approx(one["rl/entropy"], rel=1e-6)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-3)
    assert two["lm_loss"] == pytest.approx(one["lm_loss"], abs=5e-4)
    assert two["rl/kl"] < 1e-4
    before, after, other = weights(single[1]), weights(single[0]), weights(divided)
    moved = 0
    for name, start in before.items():
        update = after[name].float() - start.float()
        difference = other[name].float() - after[name].float()
        if not torch.any(update):
            assert not torch.any(difference), name
            continue
        moved += 1
        assert difference.norm() < 0.1 * update.norm(), name  # BF16's rounding; 0.05 was seen
    assert moved >= 15
