"""Packs: written, read by this project and by Megatron, and given to training."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Layout
from mellum2_megatron.data.feed.datasets import build_datasets
from mellum2_megatron.data.feed.packed_dataset import PackedDataset
from mellum2_megatron.data.feed.sources import DatasetTokenizer, check_amounts, check_data
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.data.tokens.pack_files import PackShard, PieceFlag, read_pack_folder
from mellum2_megatron.training.step import documents_of_stream
from tests.data.packs import PAD, entry_of, random_documents, write_folder, write_pieces
from tests.data.test_datasets import LENGTH, run_of


@pytest.fixture
def folder(prepared: PreparedData, tmp_path: Path) -> Path:
    return write_folder(tmp_path / "packs", prepared.tokenizer_dir)


def dataset_of(*shards: PackShard, **options: Any) -> PackedDataset:
    given: dict[str, Any] = {"samples": None, "key": 5, "index_split": None}
    return PackedDataset(
        list(map(entry_of, shards)), **given | {"document_attention": True} | options
    )


@pytest.mark.parametrize("align", [1, 4])
def test_pieces_come_back_as_they_were_written(align: int, tmp_path: Path) -> None:
    documents = random_documents(1, count=200, longest=150, vocabulary=90)
    facts, table = write_pieces(
        tmp_path / "shard", documents, length=64, vocabulary=90, align=align
    )
    shard = PackShard(tmp_path / "shard")
    assert (len(shard), shard.sequence_length, shard.align) == (facts.packs, 64, align)
    found: dict[int, list[tuple[int, list[int]]]] = {}
    covered = 0
    for pack in range(len(shard)):
        tokens, pieces, end = shard.tokens(pack), shard.pieces(pack), 0
        for start, length, flags, source, document in zip(
            pieces.starts,
            pieces.lengths,
            pieces.flags,
            pieces.sources,
            pieces.documents,
            strict=True,
        ):
            assert start % align == 0
            assert (tokens[end:start] == PAD).all()
            end = start + length
            number = int(document) - 1000
            assert source == number % 2
            found.setdefault(number, []).append((int(flags), tokens[start:end].tolist()))
            covered += int(length)
        assert (tokens[end:] == PAD).all()
    assert covered == facts.tokens == sum(map(len, documents))
    assert facts.padding == len(shard) * 64 - covered
    for number, document in enumerate(documents):
        parts = [document[start : start + 64] for start in range(0, len(document), 64)]
        flags = [
            (PieceFlag.CONTINUED if part else 0) | (PieceFlag.CUT if part + 1 < len(parts) else 0)
            for part in range(len(parts))
        ]
        assert sorted(found[number]) == sorted(zip(map(int, flags), parts, strict=True))
    assert table.lengths.size == sum(map(len, found.values())) == facts.pieces


@pytest.mark.parametrize("vocabulary", [90, 98_304])
def test_stock_megatron_trains_on_the_same_packs(vocabulary: int, tmp_path: Path) -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
    from megatron.core.datasets.utils import Split

    documents = random_documents(2, count=100, longest=100, vocabulary=vocabulary)
    facts, _ = write_pieces(tmp_path / "shard", documents, length=64, vocabulary=vocabulary)
    shard = PackShard(tmp_path / "shard")
    packs = [tuple(shard.tokens(pack).tolist()) for pack in range(len(shard))]
    indexed = IndexedDataset(str(tmp_path / "shard"))
    assert [tuple(indexed[pack].tolist()) for pack in range(len(indexed))] == packs
    assert indexed.index.dtype == DType.optimal_dtype(vocabulary)
    assert indexed.document_indices.tolist() == list(range(facts.packs + 1))
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        blend_per_split=[([str(tmp_path / "shard")], None), None, None],
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=DatasetTokenizer(vocab_size=vocabulary, eod=1, eos=1, bos=0),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        add_extra_token_to_sequence=False,
    )
    stock = GPTDataset(
        indexed,
        str(tmp_path / "shard"),
        np.arange(facts.packs, dtype=np.int32),
        None,
        Split.train,
        config,
    )
    assert Counter(tuple(stock[i]["tokens"].tolist()) for i in range(len(stock))) == Counter(packs)


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_labels_stay_within_their_piece(align: int, masked: bool, tmp_path: Path) -> None:
    documents = random_documents(3, count=80, longest=90, vocabulary=90)
    random = np.random.default_rng(0)
    counts = [(random.random(len(document)) < 0.6).tolist() for document in documents]
    write_pieces(
        tmp_path / "shard",
        documents,
        length=64,
        vocabulary=90,
        align=align,
        counts=counts if masked else None,
    )
    shard = PackShard(tmp_path / "shard")
    dataset = dataset_of(shard)
    for index in range(len(dataset)):
        sample, place = dataset[index], dataset.place(index)
        tokens, pieces = shard.tokens(place.pack).tolist(), shard.pieces(place.pack)
        assert sample["tokens"].tolist() == tokens
        expected = [(0, 0.0)] * 64
        bounds, places = [0], []
        for start, length, document in zip(
            pieces.starts.tolist(), pieces.lengths.tolist(), pieces.documents.tolist(), strict=True
        ):
            # Random tokens tell which piece of its document it is.
            own, text = documents[document - 1000], tokens[start : start + length]
            first = next(at for at in range(0, len(own), 64) if own[at : at + length] == text)
            for token in range(length - 1):
                if not masked or counts[document - 1000][first + token + 1]:
                    expected[start + token] = (tokens[start + token + 1], 1.0)
            bounds.append(bounds[-1] + length)
            places.append(start)
        assert list(zip(sample["labels"].tolist(), sample["loss_mask"].tolist(), strict=True)) == (
            expected
        )
        most = shard.max_pieces + 1
        assert sample["cu_seqlens"].tolist() == (bounds + [bounds[-1]] * most)[:most]
        assert sample["cu_seqlens_padded"].tolist() == (places + [64] * most)[:most]
        positions = [
            place - max(start for start in places if start <= place) for place in range(64)
        ]
        assert sample["position_ids"].tolist() == positions
        flat = dataset_of(shard, document_attention=False)[index]
        assert set(flat) == {"tokens", "labels", "loss_mask", "position_ids"}
        assert flat["position_ids"].tolist() == list(range(64))
        for name in ("tokens", "labels", "loss_mask"):
            assert torch.equal(flat[name], sample[name])


def test_documents_of_a_micro_batch_form_one_stream(tmp_path: Path) -> None:
    documents = random_documents(4, count=80, longest=60, vocabulary=90)
    write_pieces(tmp_path / "shard", documents, length=64, vocabulary=90, align=4)
    dataset = dataset_of(PackShard(tmp_path / "shard"), max_pieces=40)
    samples = [dataset[index] for index in range(3)]
    real, padded = (
        torch.stack([sample[name] for sample in samples])
        for name in ("cu_seqlens", "cu_seqlens_padded")
    )
    lengths, starts = [], []
    for row, sample in enumerate(samples):
        place = dataset.place(row)
        pieces = dataset.shard(0).pieces(place.pack)
        lengths += pieces.lengths.tolist()
        starts += (pieces.starts + 64 * row).tolist()
        assert len(sample["cu_seqlens"]) == 41
    bounds = documents_of_stream(real, padded)
    assert bounds[1].tolist() == [*starts, 192]
    assert bounds[0].diff().tolist() == lengths


def test_every_epoch_holds_every_pack_once_in_another_order(folder: Path) -> None:
    record = read_pack_folder(folder, "x")
    shards = [PackShard(prefix) for prefix in record.prefixes("train")]
    total = record.packs("train")
    dataset = dataset_of(*shards, samples=3 * total + 5)
    places = [dataset.place(index) for index in range(len(dataset))]
    orders = []
    for epoch in range(3):
        part = places[epoch * total : (epoch + 1) * total]
        assert {place.epoch for place in part} == {epoch}
        orders.append([(place.shard, place.pack) for place in part])
        assert sorted(orders[-1]) == [
            (shard, pack) for shard in range(2) for pack in range(len(shards[shard]))
        ]
    assert len({tuple(order) for order in orders}) == 3
    # Any other process, asked in another order and for a longer run, names the same packs.
    other = dataset_of(*shards, samples=100 * total)
    assert [other.place(index) for index in reversed(range(len(places)))] == places[::-1]


def test_the_order_is_the_contents_and_not_the_paths(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "moved")
    first, second = (build_datasets(run_of(path), [50, 5, 0])[0] for path in (folder, moved))
    assert all(torch.equal(first[i]["tokens"], second[i]["tokens"]) for i in range(50))
    other = build_datasets(run_of(folder, seed=6), [50, 5, 0])[0]
    assert any(not torch.equal(first[i]["tokens"], other[i]["tokens"]) for i in range(50))
    assert not (folder / "cache").exists()


def test_packs_blend(folder: Path, prepared: PreparedData, tmp_path: Path) -> None:
    second = write_folder(tmp_path / "second", prepared.tokenizer_dir, seed=1, count=200)
    run = run_of(folder, train=((1.0, str(folder)), (3.0, str(second))))
    train, valid, _ = build_datasets(run, [128, 8, 0])
    assert Counter(train.locate(index)[0] for index in range(128)) == {0: 32, 1: 96}
    assert len({len(train[index]["cu_seqlens"]) for index in range(128)}) == 1
    assert [int(valid[index]["source"]) for index in range(8)] == [0] * 3 + [1] * 5
    for number, path in enumerate((folder, second)):
        alone = build_datasets(run_of(path), [128, 1, 0])[0]
        drawn = [index for index in range(128) if train.locate(index)[0] == number]
        for place, index in enumerate(drawn):
            assert torch.equal(train[index]["tokens"], alone[place]["tokens"])


def refused(run: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_amounts(run, check_data(run))


def whole_run(path: Path, *, cp: int = 1, pp: int = 1, micro: int = 1, **data: Any) -> Any:
    run = run_of(path, **data)
    run.layout = Layout(cp=cp, pp=pp)
    run.schedule = SimpleNamespace(train_samples=100, micro_batch_size=micro)
    run.logging = SimpleNamespace(eval_iterations=1, validation_documents=False)
    run.eval_batch_size = 2
    return run


def test_packs_that_do_not_fit_the_run_are_refused(
    folder: Path, prepared: PreparedData, tmp_path: Path
) -> None:
    training, _ = check_amounts(run := whole_run(folder), check_data(run))
    packs = read_pack_folder(folder, "x").packs("train")
    assert training == (f"training data: packs 100 of 100 sequences ({100 / packs:.2f} epochs)")
    refused(whole_run(folder, cp=2), "pack the data with align=4")
    refused(whole_run(folder, pp=2, micro=2), "set schedule.micro_batch_size=1")
    check_amounts(run := whole_run(folder, cp=2, document_attention=False), check_data(run))
    mixed = ((1.0, str(folder)), (1.0, str(prepared.path)))
    refused(whole_run(folder, train=mixed), "set data.document_attention=false, or pack")
    assert not check_data(
        whole_run(folder, train=mixed, document_attention=False)
    ).document_attention
    refused(whole_run(prepared.path, document_attention=True), "does not record where its doc")
    longer = write_folder(tmp_path / "longer", prepared.tokenizer_dir, length=128)
    refused(whole_run(longer), f"128 tokens, data.sequence_length is {LENGTH}")
    only = write_folder(tmp_path / "only", prepared.tokenizer_dir, splits=("train",))
    refused(whole_run(only), "the packs have no validation split")
    run = whole_run(only)
    run.logging.eval_iterations = 0
    assert build_datasets(run, [10, 0, 0])[1] is None
    check_amounts(run, check_data(run))


def test_damaged_packs_are_refused(folder: Path) -> None:
    pieces = folder / "train-00001.pieces"
    content = pieces.read_bytes()
    pieces.write_bytes(content[:-1])
    refused(whole_run(folder), "train-00001.pieces: it should have")
    pieces.write_bytes(b"X" + content[1:])
    refused(whole_run(folder), "train-00001.pieces is not a record of packs")
    pieces.write_bytes((folder / "train-00000.pieces").read_bytes().ljust(len(content), b"\0"))
    refused(whole_run(folder), r"it should have|its other files")
    pieces.write_bytes(content)
    record = json.loads((folder / "packs.json").read_text())
    (folder / "packs.json").write_text(json.dumps(record | {"format": 9}))
    refused(whole_run(folder), "its format is 9, this version reads 1")
    (folder / "packs.json").write_text(json.dumps(record | {"splits": 9}))
    refused(whole_run(folder), r"packs.json: it is damaged")
    tokenizer = record["tokenizer"] | {"sha256": "0" * 64}
    (folder / "packs.json").write_text(json.dumps(record | {"tokenizer": tokenizer}))
    refused(whole_run(folder), "made with another tokenizer")


def test_pieces_that_fit_no_pack_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ids 2 to 99, not below 90"):
        write_pieces(tmp_path / "shard", [[3, 99]], length=64, vocabulary=90)
    with pytest.raises(ValueError, match="padded with"):
        write_pieces(tmp_path / "shard", [[3]], length=65, vocabulary=90, align=4)
    assert list(tmp_path.iterdir()) == []
