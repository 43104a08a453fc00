"""A tokenizer.json that never ends, takes all memory or breaks its library is one message."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mellum2_megatron.common import limited_process
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.tokens.tokenizer import load_tokenizer


def tokenizer(**parts: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    rest = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    return {"version": "1.0", "added_tokens": [], "model": model, **dict.fromkeys(rest), **parts}


def split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "Sequence", "pretokenizers": []}
    for _ in range(depth):
        inner = {"type": "Sequence", "pretokenizers": [inner]}
    return inner


GROWING = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
LIMIT = "more than 3 s or 1 GiB"
HOSTILE = {
    "backtracking": (tokenizer(pre_tokenizer=split("(a+)+$")), f"retry-limit|{LIMIT}"),
    "deep-pattern": (tokenizer(pre_tokenizer=split("(" * 20_000 + ")" * 20_000)), "depth limit"),
    "growing": (tokenizer(normalizer={"type": "Sequence", "normalizers": [GROWING] * 12}), LIMIT),
    "deep": (tokenizer(pre_tokenizer=nested(2_000)), f"recursion|{LIMIT}"),
    "added": (tokenizer(added_tokens=[{"id": 0}] * 9), "missing field"),
    "model": (tokenizer(model=[]), "not a valid tokenizer file"),
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_process, "SECONDS", 3)
    monkeypatch.setattr(limited_process, "_MEMORY", 1 << 30)
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tokenizer_is_one_message(name: str, tmp_path: Path) -> None:
    content, reason = HOSTILE[name]
    (tmp_path / "tokenizer.json").write_text(dumped(content))
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "tokenizer.json"))
    assert re.search(reason, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def dumped(content: dict[str, Any]) -> str:
    """Return JSON; a deep value is written by hand, for `json` recurses."""
    try:
        return json.dumps(content)
    except RecursionError:
        deep = '{"type":"Sequence","pretokenizers":[' * 2_000 + "]}" * 2_000
        return json.dumps({**content, "pre_tokenizer": "HERE"}).replace('"HERE"', deep)


def test_a_plain_tokenizer_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer()))
    assert load_tokenizer(tmp_path).encode("ab").ids == [0, 1]


def test_a_tokenizer_of_many_megabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as sparse:
        sparse.truncate((1 << 26) + 1)
    with pytest.raises(InputError, match="larger than 67,108,864 bytes"):
        load_tokenizer(tmp_path)
