"""`data prepare` as a small plan: what its packs hold, and that training reads the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.config import apply_overrides
from mellum2_megatron.data import prepare_packs as module_under_test
from mellum2_megatron.data.feed.sources import check_amounts, check_data
from mellum2_megatron.data.prepare_packs import Packing, prepare_packs
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.data.tokens.pack_files import PackShard, PieceFlag, read_pack_folder
from mellum2_megatron.data.tokens.tokenizer import load_tokenizer
from mellum2_megatron.recipes import recipe
from tests.cli.runner import mellum2
from tests.data.plan_inputs import content, rich, write_inputs

WHOLE = Packing(sequence_length=8192, fim_rate=0.0)
"""Packs in which no document is cut or reordered, so that their texts can be read back."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, rich)
    return folder


@pytest.fixture(scope="module")
def make(inputs: Path) -> Callable[..., dict[str, Any]]:
    def run(output: Path, **changes: Any) -> dict[str, Any]:
        return prepare_packs(
            output,
            **{
                "inputs": [inputs / "tree", inputs / "code.parquet"],
                "vocab_size": 340,
                "workers": 1,
                "valid_fraction": 0.2,
                "packing": WHOLE,
                "progress": False,
                **changes,
            },
        )

    return run


@pytest.fixture(scope="module")
def made(
    make: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("made") / "corpus"
    return output, make(output)


def texts(folder: Path, split: str) -> list[str]:
    """Return the texts of all pieces, in order."""
    packs, tokenizer = read_pack_folder(folder, "x"), load_tokenizer(folder / "tokenizer")
    found = []
    for prefix in packs.prefixes(split):
        shard = PackShard(prefix)
        for pack in range(len(shard)):
            tokens, pieces = shard.tokens(pack), shard.pieces(pack)
            for start, length in zip(pieces.starts, pieces.lengths, strict=True):
                # The last id ends the document.
                ids = tokens[start : start + length - 1].tolist()
                found.append(tokenizer.decode(ids, skip_special_tokens=False))
    return found


def test_packs_hold_each_good_document_once(
    made: tuple[Path, dict[str, Any]], inputs: Path
) -> None:
    folder, facts = made
    rows = [row["content"] for row in pq.read_table(inputs / "code.parquet").to_pylist()]
    good = {rich(seed) for seed in range(30)} | set(rows)
    near = {rich(1), rich(1) + "\n# the end\n"}
    train, valid = texts(folder, "train"), texts(folder, "valid")
    assert len(train) + len(valid) == len(set(train) | set(valid)) == len(good)
    assert (set(train) | set(valid)) - near == good - near
    assert train
    assert valid
    assert facts["plan"]["sources"]["corpus"]["kind"] == "code"
    assert facts["documents_left_out"] == {"not_utf8": 1}
    dropped = {one["filter"]: one["documents"] for one in facts["documents_dropped"]}
    assert dropped == {
        "LineLength": 1,
        "Parses": 1,
        "exact duplicates": 1,
        "near-duplicates": 1,
    }
    assert sorted(path.name for path in (folder / "report").iterdir()) == [
        "funnel.png",
        "lengths.png",
        "phases.png",
        "report.md",
    ]
    assert not (folder / "results").exists()


def test_two_workers_write_the_same_bytes_as_one(
    made: tuple[Path, dict[str, Any]], make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    make(tmp_path / "corpus", workers=2)
    assert content(tmp_path / "corpus") == content(made[0])


def test_a_run_reads_the_folder_by_its_path(made: tuple[Path, dict[str, Any]]) -> None:
    words = [f"data.path={made[0]}", "data.sequence_length=8192"]
    run = apply_overrides(
        recipe("mellum2_tiny_pretrain"), [*words, "architecture.max_position_embeddings=8192"]
    )
    data = check_data(run)
    assert data.document_attention
    assert check_amounts(run, data)
    with pytest.raises(InputError, match="its packs have 8192 tokens"):
        check_data(apply_overrides(run, ["data.sequence_length=256"]))


def test_prose_gets_its_own_filters_and_one_pass(
    make: Callable[..., dict[str, Any]],
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A small vocabulary and few words.
    monkeypatch.setattr(module_under_test, "UNIQUE_TOKENS", 0)
    facts = make(
        tmp_path / "corpus",
        inputs=[inputs / "web.jsonl.gz"],
        vocab_size=280,
        packing=Packing(sequence_length=2048, fim_rate=0.0),
    )
    assert facts["plan"]["sources"]["corpus"]["kind"] == "text"
    train, valid = texts(tmp_path / "corpus", "train"), texts(tmp_path / "corpus", "valid")
    kept = 25 - sum(one["documents"] for one in facts["documents_dropped"])
    assert len(train) + len(valid) == len({*train, *valid}) == kept > 5


def test_no_filters_keeps_all_but_exact_duplicates(
    make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    facts = make(tmp_path / "corpus", packing=Packing(sequence_length=8192, filters=False))
    assert {one["filter"] for one in facts["documents_dropped"]} == {"exact duplicates"}
    packs = read_pack_folder(tmp_path / "corpus", "x")
    shard = PackShard(packs.prefixes("train")[0])
    roles = [flag for pack in range(len(shard)) for flag in shard.pieces(pack).flags.tolist()]
    # 0.5 by default: both ways of FIM, and neither.
    assert {0, PieceFlag.PSM, PieceFlag.SPM} <= set(roles)


def test_a_sample_keeps_the_names_of_its_files(
    make: Callable[..., dict[str, Any]], inputs: Path, tmp_path: Path
) -> None:
    facts = make(tmp_path / "corpus", inputs=[inputs / "tree"], max_bytes=10_000)
    (source,) = facts["sources"]
    assert source["name"] == str(inputs / "tree")
    assert source["bytes"] <= 10_000
    assert facts["documents_left_out"]["not_sampled"] > 5
    assert len(texts(tmp_path / "corpus", "train")) < source["documents"]
    page = (tmp_path / "corpus" / "report" / "report.md").read_text()
    assert "Languages: python" in page


def test_the_tokenizer_sees_training_documents_alone(
    make: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    train = module_under_test.train_tokenizer

    def record(given: Any, folder: Path, **options: Any) -> None:
        seen.extend(given)
        train(seen, folder, **options)

    monkeypatch.setattr(module_under_test, "train_tokenizer", record)
    make(tmp_path / "corpus")
    assert set(texts(tmp_path / "corpus", "train")) <= set(seen)
    assert not set(texts(tmp_path / "corpus", "valid")) & set(seen)


def test_a_tokenizer_without_fim_tokens_packs_without_fim(
    make: Callable[..., dict[str, Any]], prepared: PreparedData, tmp_path: Path
) -> None:
    value = json.loads((prepared.tokenizer_dir / "tokenizer.json").read_text())
    value["added_tokens"] = [one for one in value["added_tokens"] if "fim" not in one["content"]]
    value["model"]["vocab"] = {
        name.replace("fim_", "no_"): id for name, id in value["model"]["vocab"].items()
    }
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "tokenizer.json").write_text(json.dumps(value))
    asked = Packing(fim_rate=0.5)
    with pytest.raises(InputError, match="it has no fim_prefix, fim_middle, fim_suffix token"):
        make(tmp_path / "corpus", tokenizer=plain, packing=asked)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
    facts = make(tmp_path / "corpus", tokenizer=plain, packing=Packing(sequence_length=512))
    assert facts["plan"]["phases"][0]["fim"]["rate"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": Packing(sequence_length=1)}, "sequence_length=1"),
        ({"packing": Packing(align=3)}, "align=3"),
        ({"packing": Packing(fim_rate=1.5)}, "fim.rate=1.5"),
        ({"valid_fraction": 0.7}, "--valid-fraction 0.7"),
        ({"inputs": ["/nowhere"]}, "--input /nowhere"),
        ({"valid_fraction": 1e-9}, "the valid split is empty"),
    ],
)
def test_bad_wishes_are_refused_and_nothing_is_written(
    make: Callable[..., dict[str, Any]], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make(tmp_path / "corpus", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["packs", "packs with a tokenizer", "megatron"])
def test_inputs_of_which_nothing_is_left(form: str, prepared: PreparedData, tmp_path: Path) -> None:
    """Said with the reasons, without a word of splits or of a vocabulary."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "empty.py").write_text("")
    (folder / "latin.py").write_bytes("# caf\xe9\n".encode("latin-1"))
    words = ["--input", folder, "--output", tmp_path / "out", "--workers", "1"]
    reasons = ["left out: 1 empty", "left out: 1 not UTF-8"]
    if form == "megatron":
        words += ["--format", "megatron"]
    else:
        (folder / "broken.py").write_text("def f(:\n" * 20)
        reasons += ["dropped: 1 "]
    if "tokenizer" in form:
        words += ["--tokenizer", prepared.tokenizer_dir]
    result = mellum2("data", "prepare", *words)
    result.refused("0 documents: nothing is left of the inputs", *reasons, "--max-megabytes")
    assert "--valid-fraction" not in result.err
    assert "--vocab-size" not in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_full_disk_leaves_nothing(
    make: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module_under_test, "write_record", full)
    with pytest.raises(WorkError, match="No space left on device"):
        make(tmp_path / "corpus")
    assert list(tmp_path.iterdir()) == []
