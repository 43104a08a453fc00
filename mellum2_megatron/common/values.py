"""Values of dataclass fields, converted by the field's own annotation: from override text, from
YAML, and back.

One converter serves ``a.b=c`` on the command line and the resolved YAML of a run, so both accept
the same values and name the same expected type when they do not fit.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from mellum2_megatron.common.errors import InputError

_INTEGER = re.compile(r"[+-]?\d+(_\d+)*")
_BOOLEANS = {"true": True, "false": False}
_NULLS = ("null", "none", "~")
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class StrictLoader(yaml.SafeLoader):
    """YAML reader that refuses a key that is given twice, of which YAML would take the last in
    silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [name.value for name, _ in node.value]
        for (name, _), earlier in zip(node.value, range(len(names)), strict=True):
            if name.value in names[:earlier]:
                raise yaml.MarkedYAMLError(
                    problem=f"key {name.value} is given twice", problem_mark=name.start_mark
                )
        return super().construct_mapping(node, deep)


def yaml_problem(error: yaml.YAMLError) -> tuple[int | None, str]:
    """Return the line (from 1) of what `StrictLoader` cannot read, if it says, and what is wrong,
    in one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
    return (mark.line + 1 if mark else None), problem


class MismatchError(Exception):
    """A value that does not fit an annotation; the caller adds the key and raises InputError."""


def field_types(cls: type) -> dict[str, Any]:
    """Map every field of dataclass ``cls`` to its resolved annotation, in the order of
    declaration."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def describe(annotation: Any) -> str:
    """Return what a reader should type for ``annotation``: ``a whole number``, ``'muon' or 'adam'``
    ..."""
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
    if origin in (dict, Mapping) or dataclasses.is_dataclass(annotation):
        return "mapping"
    return _NAMES[annotation]


def from_text(text: str, annotation: Any, key: str) -> Any:
    """Convert the right-hand side of ``key=text`` to ``annotation``.

    Integers may carry underscores (``8_192``), floats an exponent (``3e-4``), booleans are
    ``true``/``false``, absence is ``null``; lists are written ``[a,b]``, ``(a,b)`` or plain
    ``a,b``.

    Raises:
        InputError: the text does not fit; the message names the expected type or the nearest
            choice.
    """
    try:
        return _convert(_Text(text), annotation)
    except MismatchError as error:
        raise _wrong_type(f"{key}={text}", annotation, error) from None


def from_plain(value: Any, annotation: Any, key: str) -> Any:
    """Convert ``value`` as YAML gives it (scalars, lists) to ``annotation``; see :func:`from_text`
    for errors."""
    try:
        return _convert(value, annotation)
    except MismatchError as error:
        raise _wrong_type(f"{key}={value!r}", annotation, error) from None


def to_plain(value: Any) -> Any:
    """Return ``value`` as YAML-ready scalars, lists and dicts; dataclasses keep the order of their
    fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return value


class _Text(str):
    """Text typed by a person: scalars are still to be recognised, unlike a string that YAML has
    already typed."""

    __slots__ = ()


def _convert(value: Any, annotation: Any) -> Any:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(annotation))
    if origin is Literal:
        return _convert_choice(value, get_args(annotation))
    if origin is tuple:
        return _convert_tuple(value, get_args(annotation))
    if annotation is type(None):
        if value is None or (isinstance(value, _Text) and value.lower() in _NULLS):
            return None
        raise MismatchError
    if annotation is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, _Text) and value.lower() in _BOOLEANS:
            return _BOOLEANS[value.lower()]
        raise MismatchError
    if annotation is int:
        return _convert_int(value)
    if annotation is float:
        return _convert_float(value)
    if annotation is str:
        if isinstance(value, str):
            return str(value)
        raise MismatchError
    raise TypeError(
        f"no conversion for {annotation}"
    )  # a field of ours with an annotation this module cannot read


def _convert_int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, _Text) and _INTEGER.fullmatch(value):
        return int(value)
    raise MismatchError


def _convert_float(value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):  # plain str too: YAML 1.1 reads 3e-4, without a dot, as text
        try:
            return float(value)
        except ValueError:
            raise MismatchError from None
    raise MismatchError


def _convert_choice(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if value == choice and type(value) in (type(choice), _Text):
            return choice
    close = get_close_matches(str(value), [str(choice) for choice in choices], n=1, cutoff=0.5)
    raise MismatchError(f"did you mean {close[0]!r}" if close else "")


def _convert_union(value: Any, options: tuple[Any, ...]) -> Any:
    # null first, so that `str | None` reads the text null as absence; then in the order of the
    # annotation
    hints: list[str] = []
    for option in sorted(options, key=lambda option: option is not type(None)):
        try:
            return _convert(value, option)
        except MismatchError as error:
            hints.append(str(error))
    raise MismatchError(next((hint for hint in hints if hint), ""))


def _convert_tuple(value: Any, items: tuple[Any, ...]) -> tuple[Any, ...]:
    values = _split(value) if isinstance(value, _Text) else value
    if not isinstance(values, (list, tuple)):
        raise MismatchError
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(_convert(item, items[0]) for item in values)
    if len(values) != len(items):
        raise MismatchError(f"{len(items)} values are needed, {len(values)} given")
    return tuple(_convert(item, kind) for item, kind in zip(values, items, strict=True))


def _split(text: str) -> list[Any]:
    """Read ``[a, [b, c]]`` (brackets or parentheses, the outer pair optional) as nested lists of
    typed-by-hand text."""
    listed = text.strip().replace("(", "[").replace(")", "]")
    if not listed.startswith("[") or _closes_early(listed):
        listed = f"[{listed}]"
    try:
        nested = yaml.load(listed, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        raise MismatchError from None
    items: list[Any] = _as_text(nested)
    return items


def _closes_early(listed: str) -> bool:
    """Tell whether the first bracket closes before the end: ``[0,8],[64,16]`` is two items of an
    unbracketed list."""
    depth = 0
    for position, character in enumerate(listed):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if depth == 0:
            return position < len(listed) - 1
    return False


def _as_text(nested: Any) -> Any:
    if isinstance(nested, list):
        return [_as_text(item) for item in nested]
    if not isinstance(nested, str):
        raise MismatchError
    return _Text(nested)


def _wrong_type(given: str, annotation: Any, error: MismatchError) -> InputError:
    hint = str(error)
    return InputError(
        given, rule=f"must be {describe(annotation)}", fix=hint or f"give {describe(annotation)}"
    )
