"""Strict dataclasses from mappings: rules of run files, profiles and architecture.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.field_checks import require
from mellum2_megatron.common.text import read_yaml
from mellum2_megatron.common.values import from_mapping, to_plain


@dataclass(frozen=True, kw_only=True)
class Engine:
    kind: Literal["diesel", "electric"]
    power: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Car:
    wheels: int
    engine: Engine
    spare: Engine | None = None
    doors: tuple[str, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)


WHOLE: dict[str, Any] = {"wheels": 4, "engine": {"kind": "diesel", "power": 2}}


def car(**changes: Any) -> Car:
    return from_mapping(Car, WHOLE | changes, document="car")


def test_nested_dataclasses_lists_and_mappings_round_trip() -> None:
    built = car(spare={"kind": "electric"}, doors=["left", "right"], notes={"a": "b"})
    assert built == Car(
        wheels=4,
        engine=Engine(kind="diesel", power=2.0),
        spare=Engine(kind="electric"),
        doors=("left", "right"),
        notes={"a": "b"},
    )
    assert from_mapping(Car, to_plain(built), document="car") == built
    assert car(spare=None).spare is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weels": 4}, "weels: no such key in a car. Fix: did you mean 'wheels'."),
        (
            {"engine": {"kind": "diesel", "powr": 1}},
            "engine.powr: no such key in a car. Fix: did you mean 'engine.power'.",
        ),
        (
            {"spare": {"kind": "diesel", "powr": 1}},
            "spare.powr: no such key in a car. Fix: did you mean 'spare.power'.",
        ),
        ({1: 2}, "1: no such key in a car. Fix: known: doors, engine, notes, spare, wheels."),
        (
            {"engine": {"power": 1}},
            "engine.kind is missing: it has no default. Fix: add engine.kind.",
        ),
        ({"engine": None}, "engine: null: must be a mapping of keys to values"),
        (
            {"spare": 3},
            "spare: 3: must be a mapping of keys to values. Fix: its keys are kind, power.",
        ),
        ({"engine": {"kind": "petrol"}}, "engine.kind='petrol': must be 'diesel' or 'electric'"),
        ({"notes": ["x"]}, "notes=['x']: must be a mapping of names to text (empty: {})"),
        ({"notes": {"a": 1}}, "notes={'a': 1}: must be a mapping of names to text"),
        ({"notes": {1: "a"}}, "notes={1: 'a'}: must be a mapping of names to text"),
    ],
)
def test_misfits_are_named_by_their_full_key(changes: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        from_mapping(Car, WHOLE | changes, document="car")
    assert message in str(error.value)


def test_the_document_itself_must_be_a_mapping() -> None:
    with pytest.raises(InputError, match=r"^car: \[1\]: must be a mapping"):
        from_mapping(Car, [1], document="car")
    with pytest.raises(InputError, match=r"^fleet\.car\.weels: .* 'fleet\.car\.wheels'"):
        from_mapping(Car, {"weels": 1}, document="fleet", key="fleet.car")


def test_defaults_are_reported_by_full_key() -> None:
    taken: list[str] = []
    values = {"wheels": 4, "engine": {"kind": "diesel"}}
    from_mapping(Car, values, document="car", on_default=taken.append)
    assert sorted(taken) == ["doors", "engine.power", "notes", "spare"]


def test_a_reader_takes_the_place_of_the_annotation() -> None:
    built = from_mapping(
        Car,
        WHOLE | {"doors": "left,right"},
        document="car",
        readers={
            "doors": lambda value, key: (key, *value.split(",")),
            "engine.power": lambda value, key: value * 10,
        },
    )
    assert built.doors == ("doors", "left", "right")
    assert built.engine.power == 20


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: [", "car, line 1: not YAML ("),
        ("a: 1\nb: {c: 1, c: 2}", "car, line 2: not YAML (key c is given twice). Fix: f."),
    ],
)
def test_yaml_errors_name_the_line(text: str, place: str) -> None:
    with pytest.raises(InputError) as error:
        read_yaml(text, document="car", fix="f")
    assert str(error.value).startswith(place)


def test_require_takes_rule_and_fix_by_name() -> None:
    require(True, "a=1", rule="r", fix="f")
    with pytest.raises(InputError, match=r"^a=1: r\. Fix: f\.$"):
        require(False, "a=1", rule="r", fix="f")
    with pytest.raises(TypeError):
        require(False, "a=1", "r", "f")  # type: ignore[misc]
