"""Every wrong value in config.json and architecture.json is one message, whatever its type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mellum2_megatron.architecture import PRESETS, find_architecture, to_hf_config
from mellum2_megatron.common.errors import InputError

VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 10**29, 1e308, "", "x", "x" * 100_000, [], {}, [["a"]], [None]),
    *([{}], {"a": {"b": [1]}}, ["sliding_attention", []], [1] * 10_000, {"full_attention": []}),
)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a document, one item of each list."""
    found = [path] if path else []
    items: Any = ()
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, list):
        items = list(enumerate(document))[:1]
    for key, value in items:
        found += places(value, (*path, key))
    return found


def with_value(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = json.loads(json.dumps(document))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


ARCHITECTURE = next(PRESETS[name] for name in PRESETS if "tiny" in name)
DOCUMENTS = {
    "config.json": json.loads(json.dumps(to_hf_config(ARCHITECTURE))),
    "architecture.json": json.loads(json.dumps(ARCHITECTURE.to_dict())),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_value_of_any_type_is_read_or_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    for path in places(DOCUMENTS[name]):
        for value in VALUES:
            file.write_text(json.dumps(with_value(DOCUMENTS[name], path, value)))
            try:
                find_architecture(str(file))
                continue
            except InputError as error:
                message = str(error)
            assert message.startswith(str(file))
            assert "\n" not in message
            assert len(message) < 4500


@pytest.mark.parametrize("text", ["null", "[]", "7", '{"a": NaN}', "[" * 100_000])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_another_document_is_refused(name: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(InputError, match="it must be valid JSON"):
        find_architecture(str(file))
