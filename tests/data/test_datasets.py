"""Megatron's datasets over a prepared folder: tokens of a sample, and refused data."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Data
from mellum2_megatron.data.feed.datasets import build_datasets, check_data
from mellum2_megatron.data.prepare import prepare
from mellum2_megatron.data.prepared_folder import PreparedData
from tests.data.test_prepare import read_indexed

LENGTH = 64


def run_of(
    path: Path, *, seed: int = 5, architecture: dict[str, Any] | None = None, **data: Any
) -> Any:
    tiny = replace(Mellum2Architecture.preset("mellum2-tiny"), **(architecture or {}))
    return SimpleNamespace(
        architecture=tiny, seed=seed, data=Data(path=str(path), sequence_length=LENGTH, **data)
    )


@pytest.fixture
def folder(prepared: PreparedData, tmp_path: Path) -> Path:
    """Return a copy of the prepared folder: Megatron writes its index cache into it."""
    return shutil.copytree(prepared.path, tmp_path / "corpus")


def samples(dataset: Any) -> list[tuple[int, ...]]:
    """Return each sample's ``LENGTH + 1`` tokens, after checking shift, mask and positions."""
    rows = []
    for index in range(len(dataset)):
        item = dataset[index]
        assert set(item) == {"tokens", "labels", "loss_mask", "position_ids"}
        assert torch.equal(item["tokens"][1:], item["labels"][:-1])
        assert torch.equal(item["loss_mask"], torch.ones(LENGTH))
        assert torch.equal(item["position_ids"], torch.arange(LENGTH))
        rows.append((*item["tokens"].tolist(), int(item["labels"][-1])))
    return rows


def windows(documents: list[list[int]], order: np.ndarray[Any, Any]) -> Counter[tuple[int, ...]]:
    """Count the samples of a stream of documents, cut by the definition."""
    stream = [token for index in order for token in documents[index]]
    return Counter(
        tuple(stream[start : start + LENGTH + 1])
        for start in range(0, len(stream) - LENGTH, LENGTH)
    )


def test_one_epoch_holds_every_document_once_in_windows_of_the_stream(folder: Path) -> None:
    train, valid, test = build_datasets(run_of(folder), [None, None, None])
    assert test is None
    for dataset, split in ((train, "train"), (valid, "valid")):
        documents = read_indexed(folder / f"{split}_document")
        assert sorted(dataset.document_index) == list(range(len(documents)))
        assert Counter(samples(dataset)) == windows(documents, dataset.document_index)


def test_more_samples_than_one_epoch_come_from_further_epochs(folder: Path) -> None:
    one_epoch = len(build_datasets(run_of(folder), [None, None, None])[0])
    train, valid, _ = build_datasets(run_of(folder), [3 * one_epoch, 7, 0])
    assert len(train) >= 3 * one_epoch
    assert len(valid) >= 7
    documents = read_indexed(folder / "train_document")
    assert Counter(samples(train)) == windows(documents, train.document_index)


def test_the_order_depends_on_the_seed_alone_and_data_seed_overrides_it(
    folder: Path, tmp_path: Path
) -> None:
    first = samples(build_datasets(run_of(folder), [40, 5, 0])[0])
    moved = shutil.copytree(folder, tmp_path / "moved", ignore=shutil.ignore_patterns("cache"))
    assert samples(build_datasets(run_of(moved), [40, 5, 0])[0]) == first
    assert samples(build_datasets(run_of(folder, seed=6), [40, 5, 0])[0]) != first
    own_seed = run_of(folder, seed=6)
    own_seed.data = replace(own_seed.data, seed=5)
    assert samples(build_datasets(own_seed, [40, 5, 0])[0]) == first


def test_new_data_at_the_same_path_never_meets_old_indices(
    folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    build_datasets(run_of(folder), [40, 5, 0])
    kept = shutil.copytree(folder / "cache", tmp_path / "cache")
    prepare(
        folder,
        inputs=[text_folder],
        vocab_size=340,
        workers=1,
        valid_fraction=0.4,
        overwrite=True,
        progress=False,
    )
    assert not (folder / "cache").exists()
    fresh = samples(build_datasets(run_of(folder), [40, 5, 0], cache=tmp_path / "other")[0])
    assert samples(build_datasets(run_of(folder), [40, 5, 0], cache=kept)[0]) == fresh


@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_indices_that_a_killed_run_left_incomplete_are_built_again(
    folder: Path, damage: str
) -> None:
    expected = samples(build_datasets(run_of(folder), [40, 5, 0])[0])
    (broken,) = (folder / "cache").glob("*-train-shuffle_index.npy")
    if damage == "truncate":
        broken.write_bytes(broken.read_bytes()[:-8])
    else:
        broken.unlink()
    assert samples(build_datasets(run_of(folder), [40, 5, 0])[0]) == expected


def test_blends_draw_by_weight(folder: Path, text_folder: Path, tmp_path: Path) -> None:
    other = prepare(
        tmp_path / "other",
        inputs=[text_folder],
        tokenizer=folder / "tokenizer",
        seed=9,
        workers=1,
        valid_fraction=0.5,
        progress=False,
    )
    blend = ((3.0, str(folder / "train_document")), (1.0, str(other.prefix("valid"))))
    train, valid, _ = build_datasets(run_of(folder, train=blend), [40, 5, 0])
    assert np.bincount(train.dataset_index[:40]).tolist() == [30, 10]
    assert len(valid) >= 5


def test_misfitting_data_is_refused_before_anything_is_built(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mellum2 data prepare --output"):
        check_data(run_of(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"360 entries, architecture.vocab_size is 256"):
        check_data(run_of(folder, architecture={"vocab_size": 256}))
    with pytest.raises(InputError, match=r"its eos id is 1, architecture.eos_token_id is 28"):
        check_data(run_of(folder, architecture={"eos_token_id": 28}))
    with pytest.raises(InputError, match=r"absent.bin does not exist"):
        check_data(run_of(folder, train=((1.0, str(tmp_path / "absent")),)))
    (folder / "train_document.bin").write_bytes(b"")
    with pytest.raises(InputError, match="should have"):
        build_datasets(run_of(folder), [1, 1, 0])
    assert not (folder / "cache").exists()
