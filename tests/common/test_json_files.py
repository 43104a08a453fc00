"""JSON of strangers: bounded in size, depth and digits, and one reason for each fault."""

from __future__ import annotations

import ast
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import read_bytes
from mellum2_megatron.common.json_files import JsonError, load_json, parse_json, read_record
from tests import REPOSITORY

BAD = {
    "deep-lists": ("[" * 100_000 + "]" * 100_000, "nested deeper than 64 levels"),
    "deep-objects": ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested deeper than 64 levels"),
    "unclosed": ("[" * 1_000_000, "nested deeper than 64 levels"),
    "just-too-deep": ("[" * 65 + "]" * 65, "nested deeper than 64 levels"),
    "twice": ('{"a": {"b": 1, "b": 2}}', "key 'b' is given twice"),
    "nan": ('{"a": NaN}', "NaN is no number"),
    "infinity": ('{"a": -Infinity}', "-Infinity is no number"),
    "overflow": ('{"a": 1e999}', "'1e999' is beyond the range of a number"),
    "digits": ('{"a": ' + "9" * 5_000 + "}", "a whole number has 5,000 characters"),
    "fraction": ("9" * 5_000 + ".5", "is beyond the range of a number"),
    "half-character": (r'{"a": "\ud83d"}', "surrogates not allowed"),
    "empty": ("", "no valid JSON"),
    "cut": ('{"a": [1,', "no valid JSON"),
    "bytes": (b'{"a": "\xff"}', "can't decode byte 0xff"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_text_has_one_reason(name: str) -> None:
    content, reason = BAD[name]
    with pytest.raises(JsonError) as caught:
        parse_json(content)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "value", [{"a": [1, -2.5e3, None, True, {"b": "ü\U0001f600"}]}, [], 7, [[0]] * 1000, 2**64]
)
def test_a_good_text_reads_as_by_python(value: object) -> None:
    text = json.dumps(value)
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


def test_the_deepest_text_is_read() -> None:
    text = "[" * 64 + "]" * 64
    assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize("text", ["null", "[1]", '"x"', "3"])
def test_a_file_holds_an_object(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(JsonError, match="it must hold a JSON object"):
        load_json(file)


def test_a_file_has_a_limit(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"a": 1}')
    assert load_json(file, largest=8) == {"a": 1}
    with pytest.raises(OSError, match="larger than 7 bytes"):
        load_json(file, largest=7)


def test_what_has_no_end_is_not_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    for endless in (pipe, Path("/dev/zero")):
        with pytest.raises(OSError, match="no regular file"):
            read_bytes(endless)
    with pytest.raises(OSError, match="larger than 67,108,864 bytes"):
        read_bytes(Path("/dev/zero"), pipes=True)


OWN_TEXT = {
    "conversion/jobs/result_folder.py",  # a line that it has just written
    "mellum2_megatron/data/chat/render_script.py",  # the job that its own parent sends
    "mellum2_megatron/data/chat/template.py",  # a job and an answer that it remembers
    "conversion/verification/score_folder.py",  # files between one command's own processes
    "conversion/verification/scoring.py",
    "mellum2_megatron/checkpoint/bridge_config.py",  # text made by the program
    "mellum2_megatron/common/json_files.py",
    "mellum2_megatron/data/corpus/rows.py",  # one row of a corpus, with limits of its own
    "mellum2_megatron/data/pipeline/documents.py",  # results of an earlier stage
    "mellum2_megatron/data/pipeline/repositories.py",  # files that its own stage wrote
    "mellum2_megatron/data/tokens/document_tokenizer.py",  # text of the tokenizers library
    "mellum2_megatron/data/tokens/token_bytes.py",  # text of the tokenizers library
    "mellum2_megatron/data/tokens/tokenizer_script.py",  # the job that its own parent sends
    "mellum2_megatron/faults/hang_watch.py",  # values in the store of this run's ranks
    "mellum2_megatron/model/transformer_config.py",
    "mellum2_megatron/rlvr/nemo_rl/declared.py",  # a file of this package
    "mellum2_megatron/rlvr/nemo_rl/tasks.py",  # tasks that `rl render-nemo` wrote
    "mellum2_megatron/rlvr/reward_client.py",  # answers of the user's own service
    "mellum2_megatron/rlvr/rewards/calls_script.py",  # the job that its own parent sends
    "mellum2_megatron/rlvr/rewards/confine_script.py",  # the same
    "mellum2_megatron/rlvr/rewards/probe_script.py",  # the same
    "mellum2_megatron/rlvr/rewards/worker_script.py",  # the same
}
"""Files that call `json` themselves, with the reason."""


NAMES = ("json.load", "json.loads")


def test_every_other_reader_is_the_bounded_one() -> None:
    callers = set()
    for room in ("mellum2_megatron", "conversion", "launchers", "ablations"):
        for file in (REPOSITORY / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in NAMES:
                    callers.add(str(file.relative_to(REPOSITORY)))
    assert callers <= OWN_TEXT


@dataclass(frozen=True, kw_only=True)
class Limit:
    step: int
    above: float = 1.0


def test_a_record_is_read_whole_or_refused_with_its_fix(tmp_path: Path) -> None:
    file = tmp_path / "limit.json"
    words = {"what": "limit", "fix": "write it anew"}
    assert read_record(Limit, file, **words) is None
    file.write_text('{"step": 3}')
    assert read_record(Limit, file, **words) == Limit(step=3)
    for text, reason in (
        ('{"step": 3', "no valid JSON"),
        ("[]", "it must hold a JSON object"),
        ('{"step": 3, "abov": 2}', "did you mean 'above'"),
        ('{"step": "x"}', "must be a whole number"),
        ("{}", "step is missing"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match="is no limit") as caught:
            read_record(Limit, file, **words)
        assert reason in str(caught.value)
        assert str(caught.value).endswith("Fix: write it anew.")
