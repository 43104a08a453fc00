"""Checks that several descriptions share; each raises InputError naming the field and its value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from mellum2_megatron.common.errors import InputError, nearest


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def require_positive_int(name: str, value: object) -> None:
    """Raise InputError unless ``value`` is an int >= 1; a bool is not one."""
    if not is_int(value) or value < 1:
        raise InputError(
            f"{name}={value!r}",
            rule="it must be a whole number >= 1",
            fix="give a positive integer",
        )


def require_positive_number(name: str, value: object) -> None:
    """Raise InputError unless ``value`` is a finite int or float > 0."""
    if not is_number(value) or value <= 0:
        raise InputError(
            f"{name}={value!r}", rule="it must be a finite number > 0", fix="give a positive number"
        )


def checked_fields(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return ``values`` as keyword arguments of the dataclass ``cls``; InputError on unknown or
    missing ones."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise InputError(
                f"{where}.{name}", rule="there is no such field", fix=nearest(name, fields)
            )
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise InputError(
                f"{where} without {name}", rule="the field is required", fix=f"add {name}"
            )
    return dict(values)
