"""The two errors that a user of the command line meets: bad input and failed work."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any


class Mellum2Error(Exception):
    """Base of the errors that carry a message for the user and no traceback.

    Attributes:
        exit_code: exit code of a command that ends with the error.
    """

    exit_code: int = 1

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle as class(*args), which loses keyword-only arguments on the way back
        # from a worker process.
        return functools.partial(type(self), **vars(self)), ()


class InputError(Mellum2Error):
    """Input that cannot work (exit code 2); raised before a process starts or a file changes.

    Args:
        value: refused input with its name, such as ``layout.ep=3``.
        rule: broken rule, such as ``ep must divide num_experts (8)``.
        fix: input that works, such as ``use ep=1, 2, 4 or 8``.
    """

    exit_code = 2

    def __init__(self, value: str, *, rule: str, fix: str) -> None:
        # A value from a file may have megabytes.
        self.value, self.rule, self.fix = _cut(value), _cut(rule), _cut(fix)
        super().__init__(f"{value}: {rule}. Fix: {fix}.")  # one line, for logs and `grep`


@contextmanager
def keyed(key: str) -> Iterator[None]:
    """Put the key of a section in front of a refused value that lacks it.

    For dataclasses that are checked by themselves and do not know where they stand.

    Args:
        key: key of the section, such as ``architecture``.
    """
    try:
        yield
    except InputError as error:
        if error.value.startswith(key):
            raise
        raise InputError(f"{key}.{error.value}", rule=error.rule, fix=error.fix) from None


def _cut(text: str) -> str:
    return text if len(text) <= 2000 else f"{text[:1000]}...{text[-100:]}"


class WorkError(Mellum2Error):
    """Work that failed on good input (exit code 1): a full disk, diverging logits, a lost rank.

    Args:
        what: the failure, with its values.
        fix: the user's next step.
    """

    def __init__(self, what: str, *, fix: str) -> None:
        self.what, self.fix = what, fix
        super().__init__(f"{what}. Fix: {fix}.")


def nearest(word: str, known: Iterable[str], *, show_all: bool = True) -> str:
    """Return the fix for an unknown name: the closest known one, or the list of all.

    Args:
        word: the unknown name.
        known: the known names.
        show_all: list all names if none is close, default true. False: name the three closest.

    >>> nearest("layot.ep", ["layout.ep", "layout.tp"])
    "did you mean 'layout.ep'"
    """
    names = sorted(known)
    # Below 0.6 (difflib's default) the guess is mostly wrong, and the list helps more.
    close = get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}"
    if not show_all:
        return "closest: " + ", ".join(get_close_matches(word, names, n=3, cutoff=0.0))
    return "known: " + ", ".join(names)


def shown(value: object, *, quote: bool = True) -> str:
    """Return a value in one line of at most 120 characters, as a message shows it.

    Absence and truth are spelt as in files: null, true, false.

    Args:
        value: the value.
        quote: write text in quotes and its control characters as escapes; default true. False: only
            the escapes. Unquoted text of a file (`text.Plain`) is shown as it stands there.
    """
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    try:
        text = repr(value)
    except ValueError:  # Python does not write an int of more than 4,300 digits
        return "a number of thousands of digits"
    if isinstance(value, str) and (not quote or type(value) is not str):
        text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in value)
    return text if len(text) <= 120 else f"{text[:80]}...{text[-20:]}"


def first_line(error: BaseException) -> str:
    """Return an error in one line: its message's first line, or its class if it has none.

    An `OSError` reads ``No space left on device: FILE``, without the error number.
    """
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]
