"""Names, sizes and counts of a run's sample indices, against the files that a start writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import data_index
from mellum2_megatron.config import Run, apply_overrides
from mellum2_megatron.data.feed import index_plan
from mellum2_megatron.data.feed.datasets import build_datasets, open_documents
from mellum2_megatron.data.feed.index_plan import ARRAYS, FILES, SampleIndex, run_indices
from mellum2_megatron.data.feed.sources import check_data
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.data.tokens.indexed_files import read_indexed
from mellum2_megatron.recipes import recipe
from tests.small import SMALL_MODEL


def run_of(folder: Path, *words: str) -> Run:
    small = [*SMALL_MODEL, "schedule.batch_schedule=[[0,4]]", "schedule.decay_samples=4"]
    small += ["logging.eval_iterations=2"]
    return apply_overrides(recipe("mellum2_tiny_pretrain"), [*small, f"data.path={folder}", *words])


@pytest.mark.parametrize(
    "words",
    [
        ["schedule.train_samples=12"],
        ["schedule.train_samples=4000", "data.seed=7"],
        ["schedule.train_samples=400", "data.train=[[3,FOLDER],[1,FOLDER/train_document]]"],
    ],
    ids=["part", "epochs", "blend"],
)
def test_a_start_writes_the_files_of_the_plan_with_its_sizes(
    prepared: PreparedData, tmp_path: Path, words: list[str]
) -> None:
    given = [word.replace("FOLDER", str(prepared.path)) for word in words]
    run = run_of(prepared.path, f"data.cache={tmp_path / 'cache'}", *given)
    planned = run_indices(run, check_data(run))
    assert not any(index.is_complete() for index in planned)
    build_datasets(run, (run.schedule.train_samples, 8, 0), cache=tmp_path / "cache")
    assert {index.file(kind) for index in planned for kind in FILES} == {
        *(tmp_path / "cache").iterdir()
    }
    for index in planned:
        for kind in ARRAYS:
            assert index.file(kind).stat().st_size == index.sizes[kind], kind
    if words[0].endswith("4000"):
        assert planned[0].epochs > 2


def test_arrays_are_those_of_megatrons_own_dataset(prepared: PreparedData, tmp_path: Path) -> None:
    """Two passes, the last one shuffled by itself, and one."""
    from megatron.core.datasets.gpt_dataset import GPTDataset

    for samples in (12, 2000):
        run = run_of(
            prepared.path, f"schedule.train_samples={samples}", f"data.cache={tmp_path / 'ours'}"
        )
        index = run_indices(run, check_data(run))[0]
        ours = open_documents(index)
        own = dataclasses.replace(ours.config, path_to_cache=str(tmp_path / "stock"))
        documents = np.arange(index.source.documents, dtype=np.int32)
        split = ours.index_split
        stock = GPTDataset(ours.dataset, ours.dataset_path, documents, samples, split, own)
        for name in ("document_index", "sample_index", "shuffle_index"):
            assert getattr(ours, name).dtype == getattr(stock, name).dtype
            assert np.array_equal(getattr(ours, name), getattr(stock, name))


def test_the_same_files_from_every_working_folder(
    prepared: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names(path: str) -> list[str]:
        run = run_of(Path(path), "schedule.train_samples=12")
        return [index.name for index in run_indices(run, check_data(run))]

    there = names(str(prepared.path))
    monkeypatch.chdir(prepared.path.parent)
    assert names(prepared.path.name) == there


def test_two_billion_documents_take_the_bytes_that_their_types_have(
    prepared: PreparedData,
) -> None:
    run = run_of(prepared.path, "schedule.train_samples=12", "data.sequence_length=8192")
    index = run_indices(run, check_data(run))[0]

    def of(documents: int, samples: int) -> SampleIndex:
        source = dataclasses.replace(index.source, documents=documents, tokens=samples * 8192 + 1)
        return dataclasses.replace(index, source=source, samples=None)

    big = of(2**31 - 1, 63_000_000)
    assert big.entries == (2**31 - 1, 63_000_000)
    assert sum(big.sizes.values()) - 3 * 128 == 4 * (2**31 - 1) + 8 * 63_000_001 + 4 * 63_000_000
    # Beyond int32 Megatron takes int64 for the places of the samples.
    twice = dataclasses.replace(big, samples=63_000_001)
    assert twice.sizes["sample_index.npy"] - 128 == 16 * (126_000_000 + 1)
    assert big.memory > 8 * 2**31


def test_a_large_missing_index_is_said_with_its_command(
    prepared: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(prepared.path, "schedule.train_samples=12", f"data.cache={tmp_path / 'cache'}")
    data = check_data(run)
    command = index_plan.index_command(["r", "data.path=my data"])

    def notes() -> Any:
        return index_plan.index_notes(run, data, command)

    assert notes() == []
    monkeypatch.setattr(index_plan, "LARGE", 1)
    (note,) = notes()
    assert "2 of 2 are missing" in note
    assert note.endswith("mellum2 data index r 'data.path=my data'")
    build_datasets(run, (12, 8, 0), cache=tmp_path / "cache")
    assert notes() == []


def test_the_benchmarks_sets_have_the_documents_and_samples_that_they_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_index, "_BLOCK", 300)  # several blocks
    for index in data_index.indices_of(tmp_path, 2, 2000, 400):
        assert index.entries == (1000, 200)
        lengths = read_indexed(index.source.prefix, "set").lengths()
        assert (lengths.min() > 0, int(lengths.sum())) == (True, 200 * 8192 + 1)
        assert np.array_equal(np.sort(open_documents(index).document_index), np.arange(1000))
