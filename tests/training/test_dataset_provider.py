"""The dataset provider: samples of training, and the same validation samples each time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mellum2_megatron.data.feed.fixed_validation import FixedValidation
from mellum2_megatron.data.feed.sources import check_data
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.training.datasets import dataset_provider
from tests.training.test_train import small_run

PERIOD = 2 * 8  # logging.eval_iterations * the final batch


def rows(dataset: Any) -> list[tuple[int, ...]]:
    return [tuple(dataset[number]["tokens"].tolist()) for number in range(len(dataset))]


def test_validation_set_starts_over_after_its_period() -> None:
    inside = [{"tokens": torch.tensor([number])} for number in range(5)]

    class Samples(list[dict[str, torch.Tensor]]):
        index_split = SimpleNamespace(name="valid")

    dataset = FixedValidation(Samples(inside), period=3, length=8)  # type: ignore[arg-type]
    assert [row for (row,) in rows(dataset)] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert dataset.index_split is Samples.index_split


def test_each_validation_of_a_run_reads_the_same_samples(
    small_data: PreparedData, tmp_path: Path
) -> None:
    from mellum2_megatron.data.feed.datasets import build_datasets

    run = small_run(small_data, tmp_path / "run", f"data.cache={tmp_path / 'cache'}")
    loaded: list[str] = []
    handed: list[FixedValidation | None] = []
    provide = dataset_provider(run, lambda: loaded.append("called"), handed.append)
    train, valid, test = provide((40, 3 * PERIOD, 0))  # type: ignore[misc]
    assert (loaded, test) == (["called"], None)
    assert handed == [valid]
    assert (len(train) >= 40, len(valid)) == (True, 3 * PERIOD)
    given = rows(valid)
    assert given[:PERIOD] == given[PERIOD : 2 * PERIOD] == given[2 * PERIOD :]
    plain = build_datasets(run, (40, 3 * PERIOD, 0), cache=tmp_path / "cache")[1]
    assert given != rows(plain)[: 3 * PERIOD], "the samples would repeat by themselves"


def test_labels_belong_to_the_document_that_they_are_in(
    small_data: PreparedData, tmp_path: Path
) -> None:
    words = f"data.cache={tmp_path / 'cache'}", "logging.eval_iterations=20"
    run = small_run(small_data, tmp_path / "run", *words)
    provide = dataset_provider(run, lambda: None, lambda _: None)
    valid = provide((40, 160, 0))[1]  # type: ignore[index]
    eod = check_data(run).tokenizer.eod
    ends = 0
    for number in range(160):
        labels = valid[number]["labels"].numpy()
        corpus, starts, documents = valid.documents(int(valid[number]["sample"]))
        assert (corpus, starts[0]) == (0, 0)
        assert len(documents) == len(starts)
        # Each document ends with this token, and holds it nowhere else.
        inside = np.flatnonzero(labels == eod)
        assert (starts[1:] - 1).tolist() == [end for end in inside if end < len(labels) - 1]
        ends += len(inside)
    assert ends > 3


@pytest.mark.parametrize("first", [0, 12])
def test_training_reads_from_the_first_sample_of_the_phase(
    first: int, small_data: PreparedData, tmp_path: Path
) -> None:
    changes = [f"data.cache={tmp_path / 'cache'}"]
    given = small_run(small_data, tmp_path, *changes)
    whole = dataset_provider(given, lambda: None, lambda _: None)
    given = small_run(small_data, tmp_path, *changes, f"data.first_sample={first}")
    phase = dataset_provider(given, lambda: None, lambda _: None)
    expected = whole((28, PERIOD, 0))[0]  # type: ignore[index]
    found = phase((first + 28, PERIOD, 0))[0]  # type: ignore[index]
    for number in range(28):
        assert torch.equal(found[first + number]["tokens"], expected[number]["tokens"])
