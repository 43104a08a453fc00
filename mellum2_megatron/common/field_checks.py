"""Checks of dataclass fields; each raises InputError with the field's name and value."""

from __future__ import annotations

import dataclasses
import math
import os
import unicodedata
from collections.abc import Collection, Iterator
from typing import Any, TypeGuard

from mellum2_megatron.common.errors import InputError, shown
from mellum2_megatron.common.values import field_types, from_plain

INT32_MAX = 2**31 - 1
"""Largest size, interval or seed: torch and NumPy hold several of them in 32 bits."""
INT64_MAX = 2**63 - 1
"""Largest count of samples or tokens: Megatron, torch and NumPy hold them in 64 bits."""
_LONGEST_TEXT = 4000
"""Characters of the longest text; Linux takes paths of 4,095 bytes."""


def require(holds: bool, given: str, *, rule: str, fix: str) -> None:
    """Raise InputError about ``given`` (``layout.ep=3``) unless ``holds``; see `InputError`."""
    if not holds:
        raise InputError(given, rule=rule, fix=fix)


def check_fields(section: str, instance: Any, *, many_lines: Collection[str] = ()) -> None:
    """Check type, size and text of every field of a dataclass, except dataclasses in its fields.

    Numbers are finite, whole ones fit into 64 bits, and text is as `require_text` takes it.

    Args:
        section: section of the field's key, such as ``data``; empty for the keys of a run itself.
        instance: the dataclass.
        many_lines: names of fields whose text may have line ends and tabs, default none.

    Raises:
        InputError: a field that is not so, by its full key.
    """
    for name, annotation in field_types(type(instance)).items():
        key, value = f"{section}.{name}" if section else name, getattr(instance, name)
        if dataclasses.is_dataclass(annotation):
            continue
        from_plain(value, annotation, key)
        for item in _leaves(value):
            if isinstance(item, str) and name in many_lines:
                require_text(key, item.translate({10: " ", 9: " "}))
            elif isinstance(item, str):
                require_text(key, item)
            elif isinstance(item, int) and abs(item) > INT64_MAX:
                raise InputError(
                    f"{key}={shown(item)}",
                    rule="whole numbers are held in 64 bits",
                    fix=f"use {INT64_MAX} or less",
                )


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def require_text(key: str, text: str) -> None:
    """Raise InputError unless ``text`` is one line of printable Unicode, not blank, not endless."""
    given = f"{key}={shown(text)}"
    require(bool(text.strip()), given, rule="must not be empty", fix="give text")
    require(
        len(text) <= _LONGEST_TEXT,
        given,
        rule=f"is text of {_LONGEST_TEXT} characters at most",
        fix="shorten it",
    )
    # Cc: control characters. Zl, Zp: line separators. Cs: bytes that are no UTF-8.
    refused = [
        letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")
    ]
    require(
        not refused,
        given,
        rule="is one line of text in UTF-8, without control characters",
        fix=f"remove {shown(refused[0])}" if refused else "",
    )


def require_name(key: str, name: str | None) -> None:
    """Raise InputError if ``name`` has more than 128 characters; None is fine."""
    require(
        name is None or len(name) <= 128,
        f"{key}={shown(name)}",
        rule="a name has 128 characters at most",
        fix="shorten it",
    )


def require_path(key: str, path: str | None) -> None:
    """Raise InputError if ``path`` cannot be a path on a command line; None is fine."""
    if path is None:
        return
    require_text(key, path)
    require(
        not path.startswith("-"),
        f"{key}={shown(path)}",
        rule="Megatron would read it as an option",
        fix=f"write ./{shown(path, quote=False)}",
    )
    longest = max(path.split("/"), key=len)
    require(
        len(os.fsencode(longest)) <= 255,
        f"{key}={shown(path)}",
        rule="a name in a path has 255 bytes at most",
        fix=f"shorten {shown(longest)}",
    )


def is_int(value: object) -> TypeGuard[int]:
    """Return true for an int that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Return true for a finite int or float that is no bool."""
    # In Python a bool is an int, and a YAML true would pass as 1.
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def require_positive_int(name: str, value: object, *, most: int = INT32_MAX) -> None:
    """Raise InputError unless ``value`` is an int from 1 to ``most``; a bool is not one."""
    require(
        is_int(value) and value >= 1,
        f"{name}={shown(value)}",
        rule="it must be a whole number >= 1",
        fix="give a positive integer",
    )
    _require_most(name, value, most)


def require_positive_number(
    name: str, value: object, *, least: float = 0.0, most: float = 1e12
) -> None:
    """Raise InputError unless ``value`` is an int or float above 0, from ``least`` to ``most``."""
    require(
        is_number(value) and value > 0,
        f"{name}={shown(value)}",
        rule="it must be a finite number > 0",
        fix="give a positive number",
    )
    assert is_number(value)
    require(
        value >= least, f"{name}={value}", rule=f"must not be below {least}", fix=f"use {least}"
    )
    _require_most(name, value, most)


def require_positive(
    name: str, value: float, *, fix: str = "use 1 or more", most: float = INT32_MAX
) -> None:
    """Raise InputError unless ``value``, a number already, is above 0 and at most ``most``."""
    require(value > 0, f"{name}={value}", rule="must be positive", fix=fix)
    _require_most(name, value, most)


def require_not_negative(name: str, value: float, *, fix: str, most: float = INT32_MAX) -> None:
    """Raise InputError unless ``value``, a number already, is from 0 to ``most``."""
    require(value >= 0, f"{name}={value}", rule="must not be negative", fix=fix)
    _require_most(name, value, most)


def _require_most(name: str, value: Any, most: float) -> None:
    require(
        value <= most,
        f"{name}={shown(value)}",
        rule=f"must not exceed {most}",
        fix=f"use {most} or less",
    )


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, ascending.

    >>> divisors(6)
    [1, 2, 3, 6]
    """
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})
