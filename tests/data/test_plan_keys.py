"""Keys of a corpus plan: the table in the documentation, and keys at a wrong place."""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.values import to_plain
from mellum2_megatron.data.pipeline.plan import FILTERS, Plan
from mellum2_megatron.data.pipeline.plan_file import read_plan
from mellum2_megatron.data.pipeline.plan_keys import PLACES
from tests.data.plan_keys_table import PAGE, with_table

BASE: dict[str, Any] = {
    "name": "keys",
    "tokenizer": "tokenizer",
    "sources": {
        "NAME": {"kind": "text", "inputs": ["tree"]},
        "SOURCE": {"kind": "code", "inputs": ["tree"]},
    },
    "phases": [{"tokens": 100, "mixture": {"NAME": 50, "SOURCE": 50}}],
}
KEYS = [(place, field) for place in PLACES for field in dataclasses.fields(place.keys)]


def _classes(annotation: Any) -> Iterator[type]:
    """Yield the dataclasses in an annotation, and in their fields."""
    if dataclasses.is_dataclass(annotation):
        yield annotation
        for hint in typing.get_type_hints(annotation).values():
            yield from _classes(hint)
    for part in typing.get_args(annotation):
        yield from _classes(part)


def _with(key: str, value: Any) -> dict[str, Any]:
    """Return the plan with a key set; the mappings around it are made."""
    plan = copy.deepcopy(BASE)
    if ".filters." in key:  # each kind has filters of its own
        plan["sources"]["NAME"]["kind"] = "text" if _is_filter_of("text", key) else "code"
    place: Any = plan
    *path, name = key.split(".")
    for word in path:
        place = place[int(word) - 1] if isinstance(place, list) else place.setdefault(word, {})
    place[name] = value
    return plan


def _is_filter_of(kind: str, key: str) -> bool:
    return key.split(".")[3] in {type(one).__name__ for one in FILTERS[kind]}


def _read(plan: dict[str, Any], folder: Path) -> Plan:
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(plan))
    return read_plan(file)


def test_the_table_in_the_documentation_is_that_of_the_classes() -> None:
    assert with_table(PAGE.read_text()) == PAGE.read_text()


def test_every_class_of_a_plan_has_its_place() -> None:
    found = {*_classes(Plan), *(type(one) for filters in FILTERS.values() for one in filters)}
    assert {place.keys for place in PLACES} == found


@pytest.mark.parametrize(
    ("place", "field"), KEYS, ids=[f"{place.path}{field.name}" for place, field in KEYS]
)
def test_a_key_is_read_at_its_place_and_refused_with_it_elsewhere(
    place: Any, field: dataclasses.Field[Any], tmp_path: Path
) -> None:
    full = f"{place.path}{field.name}"
    value = None
    if field.default is not dataclasses.MISSING:
        value = to_plain(field.default)
    elif field.default_factory is not dataclasses.MISSING:
        value = {}
    if value is not None:
        assert _read(_with(full, value), tmp_path).name == "keys"
    homes = {home.path for home, known in KEYS if known.name == field.name}
    for other in PLACES:
        if other.path in homes or ".filters." in other.path:
            continue  # of its thresholds a filter names the nearest itself
        with pytest.raises(InputError) as refusal:
            _read(_with(f"{other.path}{field.name}", value), tmp_path)
        message = str(refusal.value)
        assert message.startswith(f"{tmp_path / 'plan.yaml'}: {other.path}{field.name}: ")
        assert all(f"({home}{field.name})" in message for home in homes), message
        assert f"{field.name} belongs to " in message


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("fim", {"rate": 0.5}, "fim belongs to a phase (phases.1.fim)"),
        ("phases.1.rate", 0.5, "`fim` of a phase (phases.1.fim.rate), or to `repository`"),
        ("sources.NAME.LineLength", {}, "sources.NAME.filters.LineLength"),
        ("sequenc_length", 512, "did you mean 'sequence_length', of a phase"),
        ("toknizer", "t", "did you mean 'tokenizer'"),
        ("phases.1.seq_length", 512, "did you mean 'phases.1.sequence_length'"),
        ("sources.NAME.near_duplicates", {"verify": True}, "`near_duplicates` at the top"),
        ("near_duplicates", False, "sources.NAME.near_duplicates switches"),
        ("sources.NAME.filters.Parses", {}, "Parses is a filter of kind code"),
    ],
)
def test_the_fix_names_the_place(key: str, value: Any, fix: str, tmp_path: Path) -> None:
    plan = _with(key, value) if ".filters." not in key else copy.deepcopy(BASE)
    if ".filters." in key:
        plan["sources"]["NAME"]["filters"] = {key.rpartition(".")[2]: value}
    with pytest.raises(InputError) as refusal:
        _read(plan, tmp_path)
    assert fix in refusal.value.fix
