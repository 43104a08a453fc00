"""A known fault of the code, for `python -m tests.mutations`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutation:
    """One fault, and the test that notices it.

    Attributes:
        name: the fault in a few words.
        file: file that is changed, relative to the repository.
        old: text that occurs exactly once in it.
        new: text that takes its place.
        test: arguments of pytest.
    """

    name: str
    file: str
    old: str
    new: str
    test: tuple[str, ...]
