"""A run whose data and tokenizer exist on this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mellum2_megatron.config import Run
from mellum2_megatron.data.prepared_folder import PreparedData
from tests.training.test_train import small_corpus, small_run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return small_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(corpus: PreparedData, tmp_path: Path) -> Run:
    """Return a run that fits 2, 4, 6, 8 and 16 ranks, CPU or GPU."""
    schedule = {
        "batch_schedule": "[[0,48]]",
        "micro_batch_size": 1,
        "train_samples": 96,
        "decay_samples": 48,
    }
    overrides = [f"schedule.{key}={value}" for key, value in schedule.items()]
    return dataclasses.replace(
        small_run(corpus, tmp_path / "run", "backend=torch", *overrides), name="small"
    )
