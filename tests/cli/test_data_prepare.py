"""`mellum2 data prepare`: what it says about documents that are left out."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from mellum2_megatron.data.prepared_folder import load_prepared
from tests.cli.runner import PREPARE, mellum2
from tests.small import python_like


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [json.dumps({"content": python_like(number)}) for number in range(40)]
    (folder / "part.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    return folder


def test_every_reason_is_said_with_its_count_and_first_example(
    inputs: Path, tmp_path: Path
) -> None:
    for number in range(3):
        (inputs / f"latin_{number}.py").write_bytes("caf\u00e9".encode("latin-1"))
    (inputs / "old.txt.bz2").write_bytes(b"BZh")
    (inputs / "bad.jsonl").write_text('{"content": 1}\n')
    with open(os.fsencode(inputs) + b"/\xff.txt", "wb") as file:
        file.write(b" ")
    out = tmp_path / "out"
    words = ["data", "prepare", "--output", out, "--input", inputs, *PREPARE]
    mellum2(*words).refused(f"{inputs}/bad.jsonl line 1", "--skip-bad-rows")
    result = mellum2(*words, "--skip-bad-rows")
    assert result.code == 0, result
    *left_out, _, wrote = result.out.splitlines()
    assert left_out[0] == f"left out: 3 not UTF-8 (first: {inputs}/latin_0.py)"
    assert set(left_out[1:]) == {
        f"left out: 1 bad rows (first: {inputs}/bad.jsonl line 1, "
        "'content' is not a string but number)",
        "left out: 1 compressed in a way that is not read (.jsonl.gz, .jsonl.zst and .json.gz are)"
        f" (first: {inputs}/old.txt.bz2)",
        f"left out: 1 empty (first: {inputs}/\\xff.txt)",
    }
    assert wrote.startswith(f"wrote {out}: ")
    prepared = load_prepared(out)
    assert sum(split.documents for split in prepared.splits.values()) == 40
    assert prepared.corpus["documents_left_out"]["not_utf8"] == 3


def test_limits_hold_only_where_they_are_asked(inputs: Path, tmp_path: Path) -> None:
    (inputs / "large.txt").write_text(python_like(1) * 300)  # above 256 KiB
    words = ["data", "prepare", "--input", inputs, *PREPARE, "--output"]
    assert "left out" not in mellum2(*words, tmp_path / "all").out
    limited = mellum2(*words, tmp_path / "some", "--max-document-megabytes", "0.1").out
    assert f"left out: 1 too large (first: {inputs}/large.txt)" in limited
    sampled = mellum2(*words, tmp_path / "sample", "--max-megabytes", "0.03").out
    assert f"left out: 1 too large (first: {inputs}/large.txt)" in sampled
    assert "not in the sample that fits --max-megabytes (first: " in sampled
    mellum2(*words, tmp_path / "x", "--max-document-megabytes", "inf").refused("must be finite")


def test_names_that_are_not_utf8_work_everywhere(inputs: Path, tmp_path: Path) -> None:
    def odd(name: bytes) -> Path:
        return Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))

    inputs.rename(odd(b"\xe9-in"))
    words = ["data", "prepare", "--input", odd(b"\xe9-in"), *PREPARE]
    first = mellum2(*words, "--output", odd(b"\xe9-out"))
    assert first.code == 0, first
    first.out.encode("utf-8")  # as a console does
    assert f"wrote {tmp_path}/\\xe9-out: " in first.out
    words += ["--tokenizer", odd(b"\xe9-out") / "tokenizer", "--output", odd(b"\xe9-2")]
    assert mellum2(*words).code == 0
    assert load_prepared(odd(b"\xe9-2")).splits == load_prepared(odd(b"\xe9-out")).splits
    mellum2(*words, "--text-key", "\udce9", "--overwrite").refused("no key '\\udce9'")
    mellum2("generate", "--hf-path", tmp_path, "--prompt", "caf\udce9").refused("must be text in")


def test_the_end_of_documents_can_be_chosen(inputs: Path, tmp_path: Path) -> None:
    words = ["data", "prepare", "--input", inputs, *PREPARE, "--output", tmp_path / "out"]
    mellum2(*words, "--eod", "nowhere").refused("--eod nowhere", "<|endoftext|> (0)")
    assert not (tmp_path / "out").exists()
    assert mellum2(*words, "--eod", "<|pad|>").code == 0
    assert load_prepared(tmp_path / "out").eod == 2


def test_a_tokenizer_that_loses_text_is_warned_of(inputs: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    words = ["data", "prepare", "--input", inputs, *PREPARE, "--output"]
    assert mellum2(*words, first).code == 0
    (inputs / "capitals.txt").write_text("CAPITALS")
    file = first / "tokenizer" / "tokenizer.json"
    value = json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}
    file.write_text(json.dumps(value))
    result = mellum2(*words, tmp_path / "second", "--tokenizer", first / "tokenizer")
    assert "warning: the tokenizer loses text: 2% of 41 sampled documents do not" in result.out
    assert "encoded with tokenizers: it has a normaliser" in result.out
