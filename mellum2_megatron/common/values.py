"""Values of dataclass fields, converted by the field's own annotation: from override text, from
YAML and JSON, and back to plain values.

One converter serves ``a.b=c`` on the command line, run files, site profiles and
``architecture.json``. All of them accept the same values and name the same expected type:

- whole number: decimal, ``_`` between digits allowed, no zero in front (``8_192``);
- number: the same, with point and exponent (``1e-3``), finite;
- ``true`` and ``false``; ``null``, ``none`` and ``~`` for absence;
- text: as it stands; in quotes it is never a number or null.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mellum2_megatron.common.errors import InputError, nearest, shown
from mellum2_megatron.common.text import Items, ListError, Plain, read_list, read_yaml

Reader = Callable[[Any, str], Any]
"""Reader of one key: a function of the value as YAML gives it and the full key, to the field."""

# ASCII only: `int` and `float` take the digits of every script, and `float` takes "nan".
_INTEGER = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
_FLOAT = re.compile(r"[+-]?[0-9._]+([eE][+-]?[0-9]+)?")
_OCTAL_LIKE = re.compile(r"[+-]?0[0-9_]")
_NAME_WITHOUT_BLANK = re.compile(r"([{,]\s*\w+):(?=\S)")
_MAX_DIGITS = 400
"""Digits of the longest number that is read; `int` refuses more than 4,300."""
_BOOLEANS = {"true": True, "false": False}
NULLS = ("null", "none", "~")
"""Words for an absent value, in capitals too."""
_YAML_BOOLEANS = {"yes": "true", "on": "true", "no": "false", "off": "false"}
"""Other spellings of booleans -> ours, for the fix."""
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class _Override(Plain):
    """Right-hand side of an override: the only text that may be a list too.

    In a file a list is YAML's, so that a comma in a line of bash stays a comma.
    """

    __slots__ = ()


class MismatchError(Exception):
    """A value that does not fit an annotation; the caller adds the key and raises InputError."""


_TYPES: dict[type, Mapping[str, Any]] = {}
"""Results of `field_types`: every section of a run is checked by them, and they are slow to get."""


def field_types(cls: type) -> Mapping[str, Any]:
    """Return every field of dataclass ``cls`` with its resolved annotation, in order."""
    if cls not in _TYPES:
        hints = get_type_hints(cls)
        fields = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
        _TYPES[cls] = MappingProxyType(fields)
    return _TYPES[cls]


def describe(annotation: Any) -> str:
    """Return an annotation in words: ``a whole number``, ``'muon' or 'adam'``, ``list of text``."""
    origin = get_origin(annotation)
    if annotation is type(None):
        return "null"
    if origin is Literal:
        return " or ".join(repr(choice) for choice in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in get_args(annotation))
    if origin is tuple:
        items = get_args(annotation)
        if len(items) == 2 and items[1] is Ellipsis:
            return f"list of {describe(items[0])}"
        return "[" + ", ".join(describe(item) for item in items) + "]"
    if origin in (dict, Mapping):
        return f"a mapping of names to {describe(get_args(annotation)[1])} (empty: {{}})"
    if dataclasses.is_dataclass(annotation):
        return "a mapping of keys to values"
    return _NAMES[annotation]


def from_text(text: str, annotation: Any, key: str) -> Any:
    """Convert the right-hand side of ``key=text`` to ``annotation``.

    Lists are written ``[a,b]``, ``(a,b)`` or ``a,b``, see `text.read_list`; all fields of a
    dataclass at once ``{a: 1, b: 2}`` or ``{a:1,b:2}``.

    Raises:
        InputError: the text does not fit; the message names the expected type or the nearest
            choice.
    """
    nested = dataclass_in(annotation)
    if nested is not None and text.lower() not in NULLS:
        # YAML's mappings need the blank; the user may leave it out.
        spaced = _NAME_WITHOUT_BLANK.sub(r"\1: ", text)
        fix = "write {name: value, name: value}"
        return from_mapping(
            nested, read_yaml(spaced, document=key, fix=fix), document=f"value of {key}", key=key
        )
    try:
        return _convert(_Override(text), annotation)
    except MismatchError as error:
        raise _wrong_type(key, Plain(text), annotation, error) from None


def from_plain(value: Any, annotation: Any, key: str) -> Any:
    """Convert ``value`` as `text.read_yaml` or JSON gives it to ``annotation``.

    Raises:
        InputError: see `from_text`.
    """
    try:
        return _convert(value, annotation)
    except MismatchError as error:
        raise _wrong_type(key, value, annotation, error) from None


def from_mapping[T](
    cls: type[T],
    values: Any,
    *,
    document: str,
    key: str = "",
    on_default: Callable[[str], None] | None = None,
    readers: Mapping[str, Reader] = MappingProxyType({}),
    right_place: Callable[[str], str | None] = lambda _: None,
) -> T:
    """Build dataclass ``cls``, and the dataclasses in its fields, from a mapping of its fields.

    Args:
        cls: the dataclass.
        values: mapping as YAML or JSON gives it.
        document: the file's kind, for messages (``run file``).
        key: full key of the mapping in the document; empty (default): the document itself.
        on_default: called with the full key of each absent field that takes its default; None
            (default): not called.
        readers: readers to use in place of `from_plain`, by full key; default none.
        right_place: function of an unknown full key, to the fix; where it is None (default), the
            fix is the nearest key of the same mapping.

    Raises:
        InputError: not a mapping, an unknown key, an absent key without default, or a value of
            another type. Each names the full key, an unknown one also the nearest.
    """
    annotations = field_types(cls)
    full_keys = {name: f"{key}.{name}" if key else name for name in annotations}
    if not isinstance(values, Mapping):
        raise InputError(
            f"{key or document}: {shown(values)}",
            rule="must be a mapping of keys to values",
            fix=f"its keys are {', '.join(annotations)}",
        )
    for name in values:
        if name not in annotations:
            unknown = f"{key}.{name}" if key else str(name)
            raise InputError(
                unknown,
                rule=f"no such key in a {document}",
                fix=right_place(unknown) or nearest(unknown, full_keys.values()),
            )
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # T is a dataclass
        name, full_key = field.name, full_keys[field.name]
        if name in values:
            value, nested = values[name], dataclass_in(annotations[name])
            # `D | None` given as null: no dataclass to build.
            is_null = nested is not annotations[name] and (
                value is None or (isinstance(value, Plain) and value.lower() in NULLS)
            )
            if full_key in readers:
                arguments[name] = readers[full_key](value, full_key)
            elif nested is not None and not is_null:
                arguments[name] = from_mapping(
                    nested,
                    value,
                    document=document,
                    key=full_key,
                    on_default=on_default,
                    readers=readers,
                    right_place=right_place,
                )
            else:
                arguments[name] = from_plain(value, annotations[name], full_key)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError(
                f"{full_key} is missing", rule="it has no default", fix=f"add {full_key}"
            )
        elif on_default is not None:
            on_default(full_key)
    return cls(**arguments)


def to_plain(value: Any) -> Any:
    """Return ``value`` as scalars, lists and dicts; dataclasses keep the order of their fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return value


def dataclass_in(annotation: Any) -> type | None:
    """Return the dataclass of ``D`` or ``D | None``; None for any other annotation."""
    options = [annotation]
    if get_origin(annotation) in (Union, types.UnionType):
        options = [option for option in get_args(annotation) if option is not type(None)]
    if len(options) == 1 and dataclasses.is_dataclass(options[0]):
        nested: type = options[0]  # type: ignore[assignment]  # an annotation is a type
        return nested
    return None


def _convert(value: Any, annotation: Any) -> Any:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(annotation))
    if origin is Literal:
        return _convert_choice(value, get_args(annotation))
    if origin is tuple:
        return _convert_tuple(value, get_args(annotation))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise MismatchError
        return {name: _convert(item, get_args(annotation)[1]) for name, item in value.items()}
    if annotation is type(None):
        # Only text without quotes is read as another type: "1" and "null" in quotes are text.
        if value is None or (isinstance(value, Plain) and value.lower() in NULLS):
            return None
    elif annotation is bool:
        return _convert_bool(value)
    elif annotation in (int, float):
        return _convert_number(value, annotation)
    elif annotation is str:
        # YAML's two words for an absent value; a field that may be absent has returned above.
        if isinstance(value, Plain) and value.lower() in ("null", "~"):
            raise MismatchError("give text: it cannot be absent")
        if isinstance(value, str):
            return str(value)  # a plain str out of a Plain
    else:
        raise TypeError(f"no conversion for {annotation}")  # an error in our own dataclass
    raise MismatchError


def _convert_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, Plain):
        word = value.lower()
        if word in _BOOLEANS:
            return _BOOLEANS[word]
        if word in _YAML_BOOLEANS:
            raise MismatchError(f"write {_YAML_BOOLEANS[word]}")
    raise MismatchError


def _convert_number(value: Any, kind: type) -> Any:
    """Convert to a finite int or float; a bool is neither, though Python has it as an int."""
    number: Any = value
    if isinstance(value, Plain):
        pattern = _INTEGER if kind is int else _FLOAT
        if _OCTAL_LIKE.match(value) and _FLOAT.fullmatch(value):
            raise MismatchError("write it without zeros in front")
        if len(value) > _MAX_DIGITS or not pattern.fullmatch(value):
            if value.lower().lstrip("+-.") in ("nan", "inf", "infinity"):
                raise MismatchError("give a finite number")
            raise MismatchError(_whole_number_hint(value) if kind is int else "")
        try:
            number = kind(value)
        except ValueError:  # underscores and points in the wrong places
            raise MismatchError from None
    types = (int,) if kind is int else (int, float)
    if not isinstance(number, types) or isinstance(number, bool):
        raise MismatchError
    try:
        if math.isfinite(number):
            return number if kind is int else float(number)
    except OverflowError:  # an int beyond all floats
        if kind is int:
            return number
    raise MismatchError("give a finite number")


def _whole_number_hint(text: str) -> str:
    """Return ``write 1000`` for ``1e3``; empty for what is no whole number."""
    try:
        number = float(text) if _FLOAT.fullmatch(text) else 0.5
    except ValueError:
        return ""
    fits = number.is_integer() and abs(number) < 2**63
    return f"write a whole number: {int(number)}" if fits else ""


def _convert_choice(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        # 1 == True in Python, so the types must agree too.
        if value == choice and (type(value) is type(choice) or isinstance(value, Plain)):
            return choice
    close = get_close_matches(str(value), [str(choice) for choice in choices], n=1, cutoff=0.5)
    raise MismatchError(f"did you mean {close[0]!r}" if close else "")


def _convert_union(value: Any, options: tuple[Any, ...]) -> Any:
    # null first, so that `str | None` reads the text null as None; then the annotation's order.
    hints: list[str] = []
    for option in sorted(options, key=lambda option: option is not type(None)):
        try:
            return _convert(value, option)
        except MismatchError as error:
            hints.append(str(error))
    raise MismatchError(next((hint for hint in hints if hint), ""))


def _convert_tuple(value: Any, items: tuple[Any, ...]) -> tuple[Any, ...]:
    values = value
    if isinstance(value, _Override):
        try:
            values = read_list(value)
        except ListError as error:
            raise MismatchError(str(error)) from None
    if not isinstance(values, (list, tuple)):
        raise MismatchError
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(_convert(item, items[0]) for item in values)
    if len(values) != len(items):
        raise MismatchError(
            f"{len(items)} values are needed, {len(values)} given{_quoted_form(values, items)}"
        )
    return tuple(_convert(item, kind) for item, kind in zip(values, items, strict=True))


def _quoted_form(values: Any, items: tuple[Any, ...]) -> str:
    """Return how to write a list whose last text has commas, such as a folder's name."""
    if len(values) < len(items) or items[-1] is not str:
        return ""
    source = values.source if isinstance(values, Items) else ", ".join(map(str, values))
    parts = [part.strip() for part in source.split(",", len(items) - 1)]
    quote = "'" if '"' in parts[-1] else '"'
    listed = ", ".join([*parts[:-1], f"{quote}{parts[-1]}{quote}"])
    return f"; a text with a comma needs quotes: [{listed}]"


def _wrong_type(key: str, value: Any, annotation: Any, error: MismatchError) -> InputError:
    given = shown(str(value), quote=False) if isinstance(value, Plain) else shown(value)
    expected = describe(annotation)
    return InputError(
        f"{key}={given}", rule=f"must be {expected}", fix=str(error) or f"give {expected}"
    )
