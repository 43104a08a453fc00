"""The two errors a user of the command line can meet: bad input (exit 2) and a failure at work
(exit 1)."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class Mellum2Error(Exception):
    """Base of the errors that carry a message for the user and no traceback.

    Attributes:
        exit_code: of a command that ends with it.
    """

    exit_code: int = 1

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle as "class(*args)", which loses keyword-only arguments on the way back
        # from a worker.
        return _rebuild, (type(self), vars(self))


def _rebuild(cls: type[Mellum2Error], fields: dict[str, str]) -> Mellum2Error:
    return cls(**fields)


class InputError(Mellum2Error):
    """Something the user gave cannot work; raised before any process is launched or file is
    touched.

    Args:
        value: what was given, named (``layout.ep=3``).
        rule: the rule it breaks (``ep must divide num_experts (8)``).
        fix: what to do instead (``use ep=1, 2, 4 or 8``).
    """

    exit_code = 2

    def __init__(self, value: str, *, rule: str, fix: str) -> None:
        self.value, self.rule, self.fix = value, rule, fix
        super().__init__(f"{value}: {rule}. Fix: {fix}.")


class WorkError(Mellum2Error):
    """Work that began with good input did not succeed (disk full, diverging logits, a lost rank).

    Args:
        what: what failed, with the values.
        fix: what to do about it.
    """

    def __init__(self, what: str, *, fix: str) -> None:
        self.what, self.fix = what, fix
        super().__init__(f"{what}. Fix: {fix}.")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the phrase that ends an unknown-name error: the closest known name, or the whole list.

    >>> nearest("layot.ep", ["layout.ep", "layout.tp"])
    "did you mean 'layout.ep'"
    """
    names = sorted(known)
    close = get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}"
    return "known: " + ", ".join(names)
