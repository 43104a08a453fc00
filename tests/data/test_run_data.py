"""The data of a run, checked before it starts; see `tests/data/test_datasets.py` for samples."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.feed.sources import (
    Source,
    check_amounts,
    check_data,
    validation_shares,
)
from mellum2_megatron.data.prepare import prepare
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.data.tokens.indexed_files import read_indexed
from tests.data.test_datasets import run_of
from tests.data.test_prepare import read_indexed as megatrons_documents


@pytest.fixture
def folder(prepared: PreparedData, tmp_path: Path) -> Path:
    return shutil.copytree(prepared.path, tmp_path / "corpus")


@pytest.fixture(scope="session")
def stranger(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that was prepared with a tokenizer of its own."""
    output = tmp_path_factory.mktemp("stranger") / "stranger"
    options: dict[str, Any] = {"workers": 1, "progress": False, "valid_fraction": 0.2}
    prepare(output, inputs=[text_folder], vocab_size=300, **options)
    return output


def test_the_header_counts_what_megatron_reads(prepared: PreparedData) -> None:
    for split in ("train", "valid"):
        files = read_indexed(prepared.path / f"{split}_document", "x")
        documents = megatrons_documents(prepared.path / f"{split}_document")
        assert files.sequences == len(documents)
        assert files.tokens == sum(map(len, documents))
        assert files.lengths().tolist() == list(map(len, documents))
        assert files.stream().tolist() == [token for each in documents for token in each]
        assert files.id_range() == (min(map(min, documents)), max(map(max, documents)))


@pytest.mark.parametrize("entry", ["{stranger}", "{stranger}/train_document"])
@pytest.mark.parametrize("key", ["train", "valid"])
def test_tokens_of_another_tokenizer_are_refused(
    entry: str, key: str, folder: Path, stranger: Path
) -> None:
    blend = ((0.7, str(folder)), (0.3, entry.format(stranger=stranger)))
    fix = f"mellum2 data prepare --tokenizer {folder}/tokenizer"
    with pytest.raises(InputError, match=f"another tokenizer .300 entries.*{fix}") as refusal:
        check_data(run_of(folder, **{key: blend}))
    assert refusal.value.value == f"data.{key}: {stranger}"


def test_a_blend_has_one_end_of_documents_and_training_takes_it(
    folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    def other(eod: str) -> Path:
        return prepare(
            tmp_path / eod.strip("<|>"),
            inputs=[text_folder],
            tokenizer=folder / "tokenizer",
            eod=eod,
            workers=1,
            valid_fraction=0.2,
            progress=False,
        ).path

    assert check_data(run_of(folder)).tokenizer.eod == 0
    pad = other("<|pad|>")
    assert check_data(run_of(pad)).tokenizer.eod == 2
    blend = ((0.7, str(folder)), (0.3, str(pad)))
    with pytest.raises(InputError, match="prepare them with the same --eod"):
        check_data(run_of(folder, train=blend))


def test_a_dataset_without_a_record_is_taken_and_said(
    folder: Path, stranger: Path, tmp_path: Path
) -> None:
    for suffix in ("bin", "idx"):
        shutil.copyfile(stranger / f"train_document.{suffix}", tmp_path / f"web.{suffix}")
    blend = ((0.7, str(folder)), (0.3, str(tmp_path / "web")))
    data = check_data(run_of(folder, train=blend))
    assert [source.name for source in data.train] == ["corpus", "web"]
    (note,) = data.notes
    assert note.startswith(f"{tmp_path / 'web'}: there is no corpus.json beside it")


def damage_magic(prefix: Path) -> None:
    content = Path(f"{prefix}.idx").read_bytes()
    Path(f"{prefix}.idx").write_bytes(b"GARBAGE" + content[7:])


def damage_version(prefix: Path) -> None:
    content = Path(f"{prefix}.idx").read_bytes()
    Path(f"{prefix}.idx").write_bytes(content[:9] + struct.pack("<Q", 7) + content[17:])


def cut_index(prefix: Path) -> None:
    content = Path(f"{prefix}.idx").read_bytes()
    Path(f"{prefix}.idx").write_bytes(content[:-9])


def cut_tokens(prefix: Path) -> None:
    content = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes(content[:-2])


def add_foreign_id(prefix: Path) -> None:
    tokens = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
    tokens[len(tokens) // 2] = 360
    tokens.tofile(f"{prefix}.bin")


def hide(prefix: Path) -> None:
    Path(f"{prefix}.idx").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_magic, "is not a Megatron index"),
        (damage_version, "has version 7"),
        (cut_index, "its header describes"),
        (cut_tokens, "its index describes"),
        (add_foreign_id, "holds the id 360, the tokenizer has 360 entries"),
        (hide, "web.idx does not exist"),
    ],
)
def test_damaged_files_are_refused(
    damage: Callable[[Path], None], message: str, folder: Path, tmp_path: Path
) -> None:
    for suffix in ("bin", "idx"):
        shutil.copyfile(folder / f"train_document.{suffix}", tmp_path / f"web.{suffix}")
    run = run_of(folder, train=((1.0, str(tmp_path / "web")),))
    check_data(run)
    damage(tmp_path / "web")
    with pytest.raises(InputError, match=message):
        check_data(run)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": "[[0.7, a],[0.3, b]]"}, r"use data.train='\[\[0.7, a\],\[0.3, b\]\]'"),
        ({"path": "{folder}/train_document"}, r"use data.train='\[\[1, .*/train_document\]\]'"),
        ({"train": ((1.0, "{folder}/train_document.bin"),)}, "leave the suffix out: .*_document$"),
        ({"train": ((1.0, "{folder}/tokenizer"),)}, "is not a prepared corpus"),
        ({"valid": ((1.0, "nowhere"),)}, "nowhere.bin does not exist"),
    ],
)
def test_mistaken_names_are_refused_with_the_right_one(
    data: dict[str, Any], message: str, folder: Path
) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, str):
            return value.format(folder=folder)
        return tuple((weight, filled(entry)) for weight, entry in value)

    given = {"path": str(folder)} | {key: filled(value) for key, value in data.items()}
    path = Path(given.pop("path"))
    with pytest.raises(InputError, match=message.rstrip("$")):
        check_data(run_of(path, **given))


def test_an_empty_validation_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "none.bin").write_bytes(b"")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQq", 1, 8, 0, 1, 0)
    (tmp_path / "none.idx").write_bytes(header)
    with pytest.raises(InputError, match="holds no tokens"):
        check_data(run_of(folder, valid=((1.0, str(tmp_path / "none")),)))


def test_the_number_of_epochs_is_said(folder: Path) -> None:
    run = run_of(folder)
    run.schedule = SimpleNamespace(train_samples=1000)
    run.logging = SimpleNamespace(eval_iterations=2, validation_documents=False)
    run.eval_batch_size = 3
    tokens = sum(map(len, megatrons_documents(folder / "train_document")))
    epochs = 1000 / ((tokens - 1) // 64)
    training, validation = check_amounts(run, check_data(run))
    assert training == f"training data: corpus 1,000 of 1,000 sequences ({epochs:.2f} epochs)"
    assert validation.startswith("validation data: corpus 6 of 6 sequences (0.")
    run.eval_batch_size = 10**9
    with pytest.raises(InputError, match=r"lower logging\.eval_batch_size") as error:
        check_amounts(run, check_data(run))
    assert "2,000,000,000 sequences" in error.value.rule
    run.eval_batch_size, run.schedule.train_samples = 3, 10**10
    with pytest.raises(InputError, match=r"lower schedule\.train_samples"):
        check_amounts(run, check_data(run))


def test_every_validation_set_gets_a_sample() -> None:
    sources = [source(0.98), source(0.01), source(0.01)]
    assert validation_shares(sources, 10) == [8, 1, 1]
    assert validation_shares(sources, 3) == [1, 1, 1]
    with pytest.raises(InputError, match="there are 3 validation sets, and each needs one"):
        validation_shares(sources, 2)


def source(weight: float) -> Source:
    return Source(
        key="data.valid",
        name="x",
        weight=weight,
        prefix=Path("x"),
        tokens=100,
        identity="",
        tokenizer_sha256=None,
        vocab_size=None,
    )


def test_a_damaged_record_is_refused(folder: Path) -> None:
    (folder / "corpus.json").write_text(json.dumps({"tokenizer": 3}))
    with pytest.raises(InputError, match=r"corpus.json: it is damaged"):
        check_data(run_of(folder, train=((1.0, str(folder / "train_document")),)))
