"""Checks of dataclass fields; each raises InputError with the field's name and value."""

from __future__ import annotations

import math
from typing import TypeGuard

from mellum2_megatron.common.errors import InputError


def require(holds: bool, given: str, *, rule: str, fix: str) -> None:
    """Raise InputError about ``given`` (``layout.ep=3``) unless ``holds``; see `InputError`."""
    if not holds:
        raise InputError(given, rule=rule, fix=fix)


def is_int(value: object) -> TypeGuard[int]:
    """Return true for an int that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Return true for a finite int or float that is no bool."""
    # In Python a bool is an int, and a YAML true would pass as 1.
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def require_positive_int(name: str, value: object) -> None:
    """Raise InputError unless ``value`` is an int >= 1; a bool is not one."""
    require(
        is_int(value) and value >= 1,
        f"{name}={value!r}",
        rule="it must be a whole number >= 1",
        fix="give a positive integer",
    )


def require_positive_number(name: str, value: object) -> None:
    """Raise InputError unless ``value`` is a finite int or float > 0."""
    require(
        is_number(value) and value > 0,
        f"{name}={value!r}",
        rule="it must be a finite number > 0",
        fix="give a positive number",
    )


def require_positive(name: str, value: float, *, fix: str = "use 1 or more") -> None:
    """Raise InputError unless ``value``, a number already, is above 0."""
    require(value > 0, f"{name}={value}", rule="must be positive", fix=fix)


def require_not_negative(name: str, value: float, *, fix: str) -> None:
    """Raise InputError unless ``value``, a number already, is 0 or more."""
    require(value >= 0, f"{name}={value}", rule="must not be negative", fix=fix)


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, ascending.

    >>> divisors(6)
    [1, 2, 3, 6]
    """
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
