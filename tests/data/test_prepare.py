"""The prepared folder against a plain encoding of the same files, and interrupted preparation."""

from __future__ import annotations

import gzip
import json
import math
import multiprocessing
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mellum2_megatron.common import ordered_pool
from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.data.corpus.discovery import given_sources
from mellum2_megatron.data.corpus.left_out import LeftOut
from mellum2_megatron.data.corpus.selection import Selection, read_selected, select
from mellum2_megatron.data.prepare import prepare
from mellum2_megatron.data.prepared_folder import PreparedData, load_prepared
from mellum2_megatron.data.tokens import encode


def read_indexed(prefix: Path) -> list[list[int]]:
    """Return the documents of a Megatron indexed dataset, parsed by hand from its two files."""
    index = prefix.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\0\0"
    version, code, sequences, boundaries = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    lengths = np.frombuffer(index, np.int32, sequences, 34)
    offsets = np.frombuffer(index, np.int64, sequences, 34 + 4 * sequences)
    ends = np.frombuffer(index, np.int64, boundaries, 34 + 12 * sequences)
    assert ends.tolist() == list(range(sequences + 1))
    tokens = np.fromfile(prefix.with_suffix(".bin"), {4: np.int32, 8: np.uint16}[code])
    assert len(tokens) == lengths.sum()
    starts = offsets // tokens.itemsize
    return [
        tokens[start : start + length].tolist()
        for start, length in zip(starts, lengths, strict=True)
    ]


def selected(folder: Path) -> Selection:
    """Return the documents that `prepare` takes from a folder with the tests' options."""
    sources = given_sources([folder], LeftOut())
    return select(sources, seed=1234, valid_fraction=0.2, max_bytes=None)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_tokens_equal_a_plain_encoding_of_every_document(
    prepared: PreparedData, text_folder: Path
) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(prepared.tokenizer_dir, split_special_tokens=True)
    selection = selected(text_folder)
    for split in ("train", "valid"):
        expected = [
            [*plain(text)["input_ids"], 0]
            for _, text in read_selected(selection, selection.of(split))
        ]
        assert read_indexed(prepared.prefix(split)) == expected
        statistics = prepared.splits[split]
        assert (statistics.documents, statistics.tokens) == (len(expected), sum(map(len, expected)))
        assert statistics.bytes == sum(document.size for document in selection.of(split))


def test_megatron_reads_the_same_documents(prepared: PreparedData) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prepared.prefix("valid")))
    assert [dataset[index].tolist() for index in range(len(dataset))] == read_indexed(
        prepared.prefix("valid")
    )


def test_entropy_is_that_of_the_validation_tokens(prepared: PreparedData) -> None:
    counts = Counter(
        token for document in read_indexed(prepared.prefix("valid")) for token in document
    )
    total = sum(counts.values())
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    assert prepared.valid_unigram_entropy_nats == pytest.approx(entropy, rel=1e-12)
    assert 0 < entropy < math.log(360)


def test_two_workers_write_the_same_bytes_as_one(
    prepared: PreparedData, text_folder: Path, tmp_path: Path
) -> None:
    monkeypatched = pytest.MonkeyPatch()
    with monkeypatched.context() as patch:
        patch.setattr(
            encode, "_BATCH_LENGTH", 2000
        )  # dozens of batches, more than may be in flight
        again = prepare(
            tmp_path / "out",
            inputs=[text_folder],
            vocab_size=360,
            workers=2,
            valid_fraction=0.2,
            progress=False,
        )
    assert files(again.path) == files(prepared.path)
    assert again.corpus["sources"][0]["documents"] == 54


def test_a_given_tokenizer_is_used_and_copied(
    prepared: PreparedData, text_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for path in prepared.tokenizer_dir.iterdir():
        shutil.copy(path, tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").write_bytes(b"not a tokenizer file")
    out = prepare(
        tmp_path / "out",
        inputs=[text_folder],
        tokenizer=tmp_path / "in",
        workers=1,
        valid_fraction=0.2,
        max_bytes=30_000,
        progress=False,
    )
    assert out.tokenizer_sha256 == prepared.tokenizer_sha256
    assert files(out.tokenizer_dir) == files(prepared.tokenizer_dir)
    assert out.splits["train"].bytes + out.splits["valid"].bytes <= 30_000


def test_wide_vocabularies_are_stored_in_four_bytes(
    prepared: PreparedData, text_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(prepared.tokenizer_dir, tmp_path / "wide")
    path = tmp_path / "wide" / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["vocab"] |= {f"filler {index}": index for index in range(360, 70_000)}
    path.write_text(json.dumps(value))
    out = prepare(
        tmp_path / "out",
        inputs=[text_folder],
        tokenizer=tmp_path / "wide",
        workers=1,
        valid_fraction=0.2,
        progress=False,
    )
    assert out.vocab_size == 70_000
    assert out.corpus["dtype"] == "int32"
    assert read_indexed(out.prefix("train")) == read_indexed(prepared.prefix("train"))


def test_a_failure_in_the_middle_leaves_nothing(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def fail(error: type[BaseException], match: str) -> None:
        with pytest.raises(error, match=match):
            prepare(
                tmp_path / "out",
                inputs=[text_folder],
                vocab_size=360,
                workers=1,
                valid_fraction=0.2,
                progress=False,
            )
        assert list(tmp_path.iterdir()) == []

    with monkeypatch.context() as patch:
        patch.setattr(IndexedDatasetBuilder, "finalize", full_disk)
        fail(WorkError, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(encode, "_encode", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        fail(KeyboardInterrupt, "")


def test_a_killed_worker_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mellum2_megatron.data.tokens.tokenizer import train_tokenizer

    train_tokenizer(["some text, some text"], tmp_path, vocab_size=270)

    def killing() -> Iterator[str]:
        yield "x" * encode._BATCH_LENGTH
        (worker,) = multiprocessing.active_children()
        worker.kill()
        yield from ["y" * encode._BATCH_LENGTH] * 10

    monkeypatch.setattr(ordered_pool, "_BATCHES_IN_FLIGHT", 1)
    with pytest.raises(WorkError, match="worker was killed") as error:
        list(encode.encode_texts(killing(), tmp_path, eod=0, engine="tokenizers", workers=2))
    assert "fewer --workers" in error.value.fix


def test_an_existing_folder_is_replaced_only_when_asked_and_only_if_it_is_a_corpus(
    prepared: PreparedData, text_folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "corpus"
    shutil.copytree(prepared.path, target)

    def again(**options: bool) -> PreparedData:
        return prepare(
            target,
            inputs=[text_folder],
            vocab_size=340,
            workers=1,
            valid_fraction=0.2,
            progress=False,
            **options,
        )

    with pytest.raises(InputError, match="--overwrite"):
        again()
    assert files(target) == files(prepared.path)
    assert again(overwrite=True).vocab_size == 340
    (target / "corpus.json").unlink()
    with pytest.raises(InputError, match="only a prepared corpus may be replaced"):
        again(overwrite=True)


def test_an_empty_split_is_refused_with_a_line_for_each_reason(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one document")
    (tmp_path / "in" / "b.txt").write_text("")
    (tmp_path / "in" / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="split is empty") as error:
        prepare(tmp_path / "out", inputs=[tmp_path / "in"], vocab_size=300, workers=1)
    lines = [line for line in str(error.value).splitlines() if line.startswith("left out: 1 ")]
    assert len(lines) == 2
    assert "--valid-fraction" in str(error.value).splitlines()[0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"workers": 0}, "workers=0"),
        ({"valid_fraction": 0.0}, "--valid-fraction 0.0"),
        ({"valid_fraction": 0.6}, "--valid-fraction 0.6"),
        ({"max_bytes": -1}, "max_bytes=-1"),
        ({"max_bytes": 5}, r"the train split is empty|the valid split is empty"),
        ({"vocab_size": 100}, "--vocab-size 100"),
        ({"vocab_size": 50_000}, "--vocab-size 50000"),
        ({"tokenizer": "/nowhere"}, "tokenizer /nowhere"),
        ({"inputs": ["/nowhere/x.txt"]}, "--input /nowhere/x.txt"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(
    text_folder: Path, tmp_path: Path, options: dict[str, object], named: str
) -> None:
    arguments = {
        "inputs": [text_folder],
        "vocab_size": 360,
        "workers": 1,
        "valid_fraction": 0.2,
    } | options
    with pytest.raises(InputError, match=named):
        prepare(tmp_path / "out", progress=False, **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def change(path: Path) -> None:
    path.write_text(path.read_text() + " ")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("corpus.json", Path.unlink, "mellum2 data prepare --output"),
        ("corpus.json", truncate, "damaged"),
        ("train_document.bin", Path.unlink, "is missing"),
        ("train_document.bin", truncate, "should have .* bytes and has"),
        ("valid_document.idx", truncate, "should have .* bytes and has"),
        ("tokenizer/tokenizer.json", Path.unlink, "not the tokenizer"),
        ("tokenizer/tokenizer.json", change, "not the tokenizer"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_fix(
    prepared: PreparedData, tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    copy = shutil.copytree(prepared.path, tmp_path / "copy")
    assert load_prepared(copy).splits == prepared.splits
    damage(copy / name)
    with pytest.raises(InputError, match=message) as error:
        load_prepared(copy)
    assert "mellum2 data prepare" in error.value.fix


def test_the_output_lies_apart_from_every_input(text_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(text_folder, tmp_path / "texts"))
    (tmp_path / "link").symlink_to(copy)
    for output in (copy, copy / "corpus", tmp_path / "link" / "deep" / "corpus", tmp_path):
        with pytest.raises(InputError, match="neither inside the other"):
            prepare(output, inputs=[copy], workers=1, overwrite=True, progress=False)
    assert files(copy) == files(text_folder)


def test_training_and_validation_hold_disjoint_documents(text_folder: Path, tmp_path: Path) -> None:
    """Copies of every text, in another format and under other names, change nothing."""
    texts = [
        text for _, text in read_selected(selected(text_folder), selected(text_folder).documents)
    ]
    copy = Path(shutil.copytree(text_folder, tmp_path / "texts"))
    lines = [json.dumps({"content": text}) for text in [*reversed(texts), *texts]]
    (copy / "copies.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    out = prepare(
        tmp_path / "out",
        inputs=[copy],
        vocab_size=360,
        workers=1,
        valid_fraction=0.2,
        progress=False,
    )
    train, valid = (
        {tuple(ids) for ids in read_indexed(out.prefix(split))} for split in ("train", "valid")
    )
    assert not train & valid
    assert len(train) + len(valid) == len(texts) == len(set(texts))
    assert out.corpus["documents_left_out"] == {"duplicate": 2 * len(texts)}


def test_a_new_tokenizer_is_trained_on_training_documents_alone(
    prepared: PreparedData, text_folder: Path, tmp_path: Path
) -> None:
    from mellum2_megatron.data.tokens.tokenizer import train_tokenizer

    selection = selected(text_folder)
    for name, documents in (("train", selection.of("train")), ("all", selection.documents)):
        texts = [text for _, text in read_selected(selection, documents)]
        train_tokenizer(texts, tmp_path / name, vocab_size=360)
    assert files(tmp_path / "train") == files(prepared.tokenizer_dir)
    assert files(tmp_path / "all") != files(prepared.tokenizer_dir)
