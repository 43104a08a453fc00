"""Values of dataclass fields, converted by the field's own annotation: from override text, from
YAML and JSON, and back to plain values.

One converter serves ``a.b=c`` on the command line, run files, site profiles and
``architecture.json``. All of them accept the same values and name the same expected type.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from mellum2_megatron.common.errors import InputError, nearest

Reader = Callable[[Any, str], Any]
"""Reader of one key: a function of the value as YAML gives it and the full key, to the field."""

_INTEGER = re.compile(r"[+-]?\d+(_\d+)*")
_BOOLEANS = {"true": True, "false": False}
_NULLS = ("null", "none", "~")
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class MismatchError(Exception):
    """A value that does not fit an annotation; the caller adds the key and raises InputError."""


def field_types(cls: type) -> dict[str, Any]:
    """Return every field of dataclass ``cls`` with its resolved annotation, in order."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


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

    Integers may carry underscores (``8_192``), floats an exponent (``3e-4``). Booleans are
    ``true`` and ``false``, absence is ``null``. Lists are written ``[a,b]``, ``(a,b)`` or ``a,b``.

    Raises:
        InputError: the text does not fit; the message names the expected type or the nearest
            choice.
    """
    try:
        return _convert(_Text(text), annotation)
    except MismatchError as error:
        raise _wrong_type(f"{key}={text}", annotation, error) from None


def from_plain(value: Any, annotation: Any, key: str) -> Any:
    """Convert ``value`` as YAML gives it (scalars, lists, mappings) to ``annotation``.

    Raises:
        InputError: see `from_text`.
    """
    try:
        return _convert(value, annotation)
    except MismatchError as error:
        raise _wrong_type(f"{key}={value!r}", annotation, error) from None


def from_mapping[T](
    cls: type[T],
    values: Any,
    *,
    document: str,
    key: str = "",
    on_default: Callable[[str], None] | None = None,
    readers: Mapping[str, Reader] = MappingProxyType({}),
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

    Raises:
        InputError: not a mapping, an unknown key, an absent key without default, or a value of
            another type. Each names the full key, an unknown one also the nearest.
    """
    annotations = field_types(cls)
    full_keys = {name: f"{key}.{name}" if key else name for name in annotations}
    if not isinstance(values, Mapping):
        raise InputError(
            f"{key or document}: {values!r}",
            rule="must be a mapping of keys to values",
            fix=f"its keys are {', '.join(annotations)}",
        )
    for name in values:
        if name not in annotations:
            unknown = f"{key}.{name}" if key else str(name)
            raise InputError(
                unknown,
                rule=f"no such key in a {document}",
                fix=nearest(unknown, full_keys.values()),
            )
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # T is a dataclass
        name, full_key = field.name, full_keys[field.name]
        if name in values:
            value, nested = values[name], _dataclass_in(annotations[name])
            # `D | None` given as null: no dataclass to build.
            is_null = value is None and nested is not annotations[name]
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


def read_yaml(text: str, *, document: str, fix: str) -> Any:
    """Return the content of a YAML document.

    Args:
        text: the document.
        document: its kind, for the message (``run file``).
        fix: fix in the message.

    Raises:
        InputError: not YAML, or a key given twice in one mapping. The message names the line.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        # Only marked errors have a line; the plain message spans several lines.
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
        place = f"{document}, line {mark.line + 1}" if mark else document
        raise InputError(place, rule=f"not YAML ({problem})", fix=fix) from None


class _StrictLoader(yaml.SafeLoader):
    """YAML reader that refuses a key given twice; PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        earlier: list[Any] = []
        for name, _ in node.value:
            if name.value in earlier:
                raise yaml.MarkedYAMLError(
                    problem=f"key {name.value} is given twice", problem_mark=name.start_mark
                )
            earlier.append(name.value)
        return super().construct_mapping(node, deep)


class _Text(str):
    """Text of an override, to be read as any type; a plain str out of YAML is only text."""

    __slots__ = ()


def _dataclass_in(annotation: Any) -> type | None:
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
    # Below, text is read as another type only if a person typed it: in YAML, "1" is not 1.
    typed = isinstance(value, _Text)
    if annotation is type(None):
        if value is None or (typed and value.lower() in _NULLS):
            return None
    elif annotation is bool:
        if isinstance(value, bool):
            return value
        if typed and value.lower() in _BOOLEANS:
            return _BOOLEANS[value.lower()]
    elif annotation is int:
        if isinstance(value, int) and not isinstance(value, bool):  # a bool is an int in Python
            return value
        if typed and _INTEGER.fullmatch(value):
            return int(value)
    elif annotation is float:
        # A plain str too: YAML 1.1 reads 3e-4, without a dot, as text.
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                raise MismatchError from None
    elif annotation is str:
        if isinstance(value, str):
            return str(value)  # a plain str out of a _Text
    else:
        raise TypeError(f"no conversion for {annotation}")  # an error in our own dataclass
    raise MismatchError


def _convert_choice(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        # 1 == True in Python, so the types must agree too.
        if value == choice and type(value) in (type(choice), _Text):
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
    values = _split(value) if isinstance(value, _Text) else value
    if not isinstance(values, (list, tuple)):
        raise MismatchError
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(_convert(item, items[0]) for item in values)
    if len(values) != len(items):
        raise MismatchError(f"{len(items)} values are needed, {len(values)} given")
    return tuple(_convert(item, kind) for item, kind in zip(values, items, strict=True))


def _split(text: str) -> list[Any]:
    """Read ``[a, [b, c]]`` as nested lists of `_Text`.

    Brackets may be parentheses, and the outer pair may be left out.
    """
    # As YAML lists: they nest and quote already. BaseLoader leaves every item text.
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
    """Return true if the first bracket closes before the end.

    ``[0,8],[64,16]`` is two items of a list without its outer brackets.
    """
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
    expected = describe(annotation)
    return InputError(given, rule=f"must be {expected}", fix=str(error) or f"give {expected}")
