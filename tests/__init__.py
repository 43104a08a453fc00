"""The test suite; `REPOSITORY` is the folder of this checkout."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def parameter_id(value: object) -> str:
    """Return a test's id of overrides, parallel sizes or a text, without spaces.

    >>> parameter_id(("layout.ep=2", "layout.pp=2")), parameter_id({"tp": 2, "cp": 2})
    ('layout.ep=2,layout.pp=2', 'tp2_cp2')
    >>> parameter_id("no such key")
    'no_such_key'
    """
    if isinstance(value, dict):
        return "_".join(f"{name}{size}" for name, size in value.items())
    if isinstance(value, (tuple, list)):
        return ",".join("".join(str(item).split()) for item in value) or "unchanged"
    return "_".join(str(value).split())


def text_id(value: object) -> str:
    """Return a test's id of a text, as `parameter_id` does; nothing for another value."""
    return parameter_id(value) if isinstance(value, str) else ""
