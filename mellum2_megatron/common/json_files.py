"""JSON files that somebody else may have written, read in bounded time and memory.

Python's own reader takes ``NaN`` as a number, keeps the last of two equal keys in silence, has no
limit of size, and raises `RecursionError` on deep nesting.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from mellum2_megatron.common.errors import InputError, first_line, shown
from mellum2_megatron.common.files import LARGEST_TEXT, read_bytes
from mellum2_megatron.common.values import from_mapping

MAX_DEPTH = 64
"""Deepest nesting of a document; our own files need six levels, a tokenizer.json about ten."""

_MAX_DIGITS = 30
"""Digits of the largest whole number; 64 bits need 20."""


class JsonError(ValueError):
    """Content that is no acceptable JSON; the message is one line with the reason."""


def load_json(path: Path, *, largest: int = LARGEST_TEXT) -> dict[str, Any]:
    """Return the JSON object in a file; see `parse_json`.

    Args:
        path: the file.
        largest: bytes of the largest file that is read.

    Raises:
        OSError: the file cannot be read, or is larger.
        JsonError: it holds no JSON object.
    """
    return parse_object(read_bytes(path, largest=largest))


def read_record[T](cls: type[T], file: Path, *, what: str, fix: str) -> T | None:
    """Return the dataclass that a JSON file holds the fields of; None without the file.

    Args:
        cls: the dataclass.
        file: the file.
        what: what the file should be, for the message (``record of a task``).
        fix: fix in the message.

    Raises:
        InputError: the file is damaged, or holds something else.
    """
    if not file.is_file():
        return None
    try:
        return from_mapping(cls, load_json(file), document=what)
    except (OSError, ValueError, InputError) as error:
        raise InputError(str(file), rule=f"is no {what} ({first_line(error)})", fix=fix) from None


def parse_object(content: str | bytes) -> dict[str, Any]:
    """Return the JSON object in a text; see `parse_json`."""
    value = parse_json(content)
    if not isinstance(value, dict):
        raise JsonError("it must hold a JSON object")
    return value


def parse_json(content: str | bytes) -> Any:
    """Return the value of a JSON text.

    Args:
        content: the text; bytes are UTF-8.

    Raises:
        JsonError: malformed or not UTF-8, a key twice in one object, nesting deeper than
            `MAX_DEPTH`, ``NaN``, ``Infinity`` or a number beyond a float, a whole number of more
            than 30 digits, half of a character.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = _DECODER.decode(text)
        # JSON can spell half of a character, which no file can then be written with.
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise _too_deep() from None
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError(f"no valid JSON: {error}") from None
    # Counting brackets is cheap, and settles all but a few files.
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_too_deep(value):
        raise _too_deep()
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in result if keys.count(key) > 1)
        raise JsonError(f"key {shown(twice)} is given twice")
    return result


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise JsonError(f"a whole number has {len(digits):,} characters")
    return int(digits)


def _real(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise JsonError(f"{shown(digits)} is beyond the range of a number")
    return number


def _no_constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is no number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_whole, parse_float=_real, parse_constant=_no_constant
)


def _is_too_deep(value: Any) -> bool:
    # Level by level: no recursion.
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for parent in level
            for item in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _too_deep() -> JsonError:
    return JsonError(f"nested deeper than {MAX_DEPTH} levels")
