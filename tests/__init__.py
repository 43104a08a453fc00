"""The test suite; `REPOSITORY` is the folder of this checkout."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def parameter_id(value: object) -> str:
    """Return a test's id of overrides or parallel sizes: without spaces, so that -k can pick it.

    >>> parameter_id(("layout.ep=2", "layout.pp=2")), parameter_id({"tp": 2, "cp": 2})
    ('layout.ep=2,layout.pp=2', 'tp2_cp2')
    """
    if isinstance(value, dict):
        return "_".join(f"{name}{size}" for name, size in value.items())
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "unchanged"
    return str(value)
