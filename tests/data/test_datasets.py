"""Megatron's datasets over a prepared folder: tokens of a sample, and refused data."""

from __future__ import annotations

import io
import multiprocessing
import shutil
import time
import zlib
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
from mellum2_megatron.data.feed.datasets import build_datasets
from mellum2_megatron.data.feed.entries import tokenizer_folder
from mellum2_megatron.data.feed.sources import check_data
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


def test_token_zero_counts_in_the_loss_like_any_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no role here: Megatron itself drops a padding id that is another role's too."""

    def other_roles(run: Any) -> Any:
        data = check_data(run)
        return replace(data, tokenizer=replace(data.tokenizer, eod=5, eos=5, bos=6))

    monkeypatch.setattr("mellum2_megatron.data.feed.datasets.check_data", other_roles)
    shutil.copyfile(folder / "train_document.idx", tmp_path / "web.idx")
    tokens = np.fromfile(folder / "train_document.bin", dtype=np.uint16)
    tokens[:: LENGTH // 4] = 0
    tokens.tofile(tmp_path / "web.bin")
    blend = ((1.0, str(tmp_path / "web")),)
    train, _, _ = build_datasets(
        run_of(folder, train=blend, valid=blend, tokenizer=str(folder / "tokenizer")),
        [None, None, None],
    )
    assert Counter(token for row in samples(train) for token in row)[0] > 100


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


def test_validation_reads_the_same_part_of_its_set_whatever_the_seed(folder: Path) -> None:
    first = build_datasets(run_of(folder), [40, 5, 0])
    other = build_datasets(run_of(folder, seed=6), [40, 5, 0])
    assert samples(other[0]) != samples(first[0])
    assert samples(other[1])[:5] == samples(first[1])[:5]


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


def other_corpus(folder: Path, text_folder: Path, output: Path) -> Path:
    """Prepare another corpus with the tokenizer of `folder`."""
    options: dict[str, Any] = {"workers": 1, "progress": False, "seed": 9, "valid_fraction": 0.5}
    prepare(output, inputs=[text_folder], tokenizer=folder / "tokenizer", **options)
    return output


def test_blends_draw_by_weight_and_read_each_source_in_its_own_order(
    folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    other = other_corpus(folder, text_folder, tmp_path / "other")
    blend = ((3.0, str(folder / "train_document")), (1.0, str(other)))
    train, valid, _ = build_datasets(run_of(folder, train=blend), [128, 6, 0])
    rows = samples(train)
    sources = [train.locate(index)[0] for index in range(128)]
    assert Counter(sources[:64]) == Counter(sources[64:]) == {0: 48, 1: 16}
    for number, (path, count) in enumerate(((folder, 96), (other, 32))):
        alone, _, _ = build_datasets(run_of(path), [count, 1, 0])
        drawn = [row for row, source in zip(rows, sources, strict=True) if source == number]
        assert drawn == samples(alone)[:count]
    # Only the second is a folder with a validation split of its own.
    assert samples(valid)[:6] == samples(build_datasets(run_of(other), [1, 6, 0])[1])[:6]


def test_folders_of_a_blend_bring_tokenizer_and_validation(
    folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    other = other_corpus(folder, text_folder, tmp_path / "other")
    run = run_of(Path("nowhere"), train=((0.7, str(folder)), (0.3, str(other))))
    data = check_data(run)
    assert [source.name for source in data.valid] == ["corpus", "other"]
    assert [source.prefix for source in data.valid] == [
        folder / "valid_document",
        other / "valid_document",
    ]
    assert data.tokenizer == check_data(run_of(folder)).tokenizer
    assert tokenizer_folder(run.data) == folder / "tokenizer"
    _, valid, _ = build_datasets(run, [10, 10, 0])
    assert [int(valid[index]["source"]) for index in range(10)] == [0] * 7 + [1] * 3
    other_set = build_datasets(run_of(other), [1, 3, 0])[1]
    for index in range(3):
        assert torch.equal(valid[7 + index]["tokens"], other_set[index]["tokens"])


def test_no_run_touches_the_indices_of_another(
    folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    other = other_corpus(folder, text_folder, tmp_path / "other")
    blend = ((0.5, str(folder)), (0.5, str(other)))
    build_datasets(run_of(folder, train=blend), [40, 5, 0])
    build_datasets(run_of(folder), [30, 5, 0])

    def files() -> dict[str, tuple[int, int]]:
        found = [*(folder / "cache").iterdir(), *(other / "cache").iterdir()]
        return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in found}

    before = files()
    build_datasets(run_of(folder, train=blend), [40, 5, 0])
    build_datasets(run_of(folder), [30, 5, 0])
    assert files() == before
    build_datasets(run_of(folder), [20, 5, 0])
    assert files().items() > before.items()


def start_run(folder: str, count: int, first: bool, half_written: Any, result: Any) -> None:
    """Build a dataset; the first run stops for a while in the middle of its last array."""

    def save(path: str, array: np.ndarray[Any, Any], **_: Any) -> None:
        stream = io.BytesIO()
        write(stream, array)
        content = stream.getvalue()
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            if path.endswith("train-shuffle_index.npy"):
                half_written.set()
                time.sleep(3)
            file.write(content[len(content) // 2 :])

    write = np.save
    if first:
        np.save = save  # type: ignore[assignment]
    else:
        assert half_written.wait(180)
    train, _, _ = build_datasets(run_of(Path(folder)), [count, 5, 0])
    result.put((count, zlib.crc32(str(samples(train)[:count]).encode())))


def test_runs_that_start_at_the_same_time_load_whole_indices(folder: Path, tmp_path: Path) -> None:
    counts = (40, 40, 40, 30)
    # Not forked: a process of a whole test session has threads, whose locks a fork would inherit.
    context = multiprocessing.get_context("spawn")
    half_written, results = context.Event(), context.Queue()
    processes = [
        context.Process(
            target=start_run, args=(str(folder), count, number == 0, half_written, results)
        )
        for number, count in enumerate(counts)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        assert process.exitcode == 0
    for _ in counts:
        count, found = results.get(timeout=5)
        alone, _, _ = build_datasets(run_of(folder), [count, 5, 0], cache=tmp_path / "cache")
        assert found == zlib.crc32(str(samples(alone)[:count]).encode())
    assert not list((folder / "cache").glob(".*.partial"))


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
