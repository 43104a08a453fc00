"""Weights drawn by name in Megatron's loop: for new runs only, and before the optimizer's copy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mellum2_megatron.config import Run, to_yaml
from mellum2_megatron.cpu import single_process
from mellum2_megatron.model.initial_weights import draw_by_name
from mellum2_megatron.model.provider import build_model
from tests.distributed import run_distributed
from tests.training.test_train import small_corpus, small_run, weights

pytestmark = pytest.mark.distributed

SETTINGS = [
    "layout.ep=1",
    "schedule.batch_schedule=[[0,2]]",
    "schedule.warmup_samples=0",
    "schedule.decay_samples=0",
    "schedule.train_samples=2",
    "logging.eval_iterations=0",
    "optimizer.lr=1e-7",
    "optimizer.min_lr=0",
    "seed=5",
    "seed_weights=by_name",
]
"""One step that moves no weight by more than the rounding of BF16."""


def draws(run: Run) -> int:
    output = Path(str(run.checkpoint.output))
    output.mkdir(parents=True, exist_ok=True)
    (output / "requested.yaml").write_text(to_yaml(run))
    file = str(output / "requested.yaml")
    (count,) = run_distributed("tests.training.train_worker:draws", 1, file, timeout=300)
    return count


def test_only_a_new_run_draws_and_its_optimizer_keeps_what_is_drawn(tmp_path: Path):
    data = small_corpus(tmp_path)
    run = small_run(data, tmp_path / "run", *SETTINGS)
    assert draws(run) == 1
    with single_process():
        model = build_model(run.architecture, backend="torch", params_dtype=torch.bfloat16)
        draw_by_name(model, model.config, run.seed)
    saved = weights(tmp_path / "run")
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        want = model.get_parameter(name).detach().float()
        assert torch.allclose(saved[name].float(), want, rtol=2**-7, atol=1e-5), name
    assert draws(run) == 0  # a resume, with nothing left to train
    other = [*SETTINGS, f"checkpoint.load={tmp_path / 'run'}", "seed=6"]
    assert draws(small_run(data, tmp_path / "other", *other)) == 0
