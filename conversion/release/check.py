"""Checks of a release folder: their functions, their outcomes, and the report of all outcomes.

A check is a function. It returns the checked value, or raises InputError with value, rule and fix.
`named_check` gives it its name in reports:

    >>> @named_check("parity")
    ... def parity(number: int) -> str:
    ...     if number % 2:
    ...         raise InputError(f"{number}", rule="it must be even", fix="add 1")
    ...     return f"{number} is even"
    >>> parity(4).status, parity(4).value
    ('pass', '4 is even')
    >>> parity(3).status, parity(3).fix
    ('fail', 'add 1')
    >>> parity.left_out("no number").status
    'not applicable'
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from mellum2_megatron.common.errors import InputError

Status = Literal["pass", "fail", "not applicable"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """Outcome of one check.

    Attributes:
        name: subject of the check.
        status: ``pass``, ``fail`` or ``not applicable``.
        value: checked value; if not applicable, the reason.
        rule, fix: broken rule and remedy of a failed check; else empty.
        figures: measured numbers for the verification card, default none.
    """

    name: str
    status: Status
    value: str
    rule: str = ""
    fix: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def passed(cls, name: str, value: str, **figures: Any) -> Check:
        """Return the outcome of a check that holds."""
        return cls(name=name, status="pass", value=value, figures=figures)

    @classmethod
    def failed(cls, name: str, error: InputError, **figures: Any) -> Check:
        """Return the outcome of a check that failed with ``error``."""
        return cls(
            name=name,
            status="fail",
            value=error.value,
            rule=error.rule,
            fix=error.fix,
            figures=figures,
        )

    @classmethod
    def not_applicable(cls, name: str, why: str) -> Check:
        """Return the outcome of a check without a subject, with the reason."""
        return cls(name=name, status="not applicable", value=why)


class NamedCheck[**P]:
    """A check function with its name in reports; made by `named_check`.

    Attributes:
        name: name of its outcomes.
    """

    def __init__(self, name: str, function: Callable[P, str | Check]) -> None:
        self.name = name
        self._function = function
        self.__doc__ = function.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Check:
        """Run the check; an InputError is its failure."""
        try:
            result = self._function(*args, **kwargs)
        except InputError as error:
            return Check.failed(self.name, error)
        # A check with figures, or one that may not apply, returns its outcome itself.
        return result if isinstance(result, Check) else Check.passed(self.name, result)

    def left_out(self, why: str) -> Check:
        """Return the outcome of this check when it does not run, with the reason."""
        return Check.not_applicable(self.name, why)


def named_check[**P](name: str) -> Callable[[Callable[P, str | Check]], NamedCheck[P]]:
    """Make a function a named check.

    The function returns the checked value. It returns a `Check` if it has figures or may not apply.
    """
    return lambda function: NamedCheck(name, function)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseReport:
    """Outcomes of every check of a folder, in order.

    Attributes:
        folder: folder that was checked.
        member: family member whose rules were checked; None if unknown.
        checks: outcomes in the order of the checks.
    """

    folder: Path
    member: str | None
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True if no check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """Checks that failed."""
        return tuple(check for check in self.checks if check.status == "fail")

    def check(self, name: str) -> Check:
        """Return the outcome of the check called ``name``."""
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        checks = [asdict(check) for check in self.checks]
        return {"folder": str(self.folder), "member": self.member, "ok": self.ok, "checks": checks}

    def table(self) -> Table:
        """Return the report as a table for the console."""
        marks = {"pass": "[green]pass[/]", "fail": "[red]FAIL[/]", "not applicable": "[dim]n/a[/]"}
        counts = Counter(check.status for check in self.checks)
        verdict = "fit to publish" if self.ok else "NOT fit to publish"
        summary = ", ".join(f"{count} {status}" for status, count in counts.items())
        table = Table(
            "check",
            "",
            "found",
            title=escape(f"{self.folder}: {verdict} ({summary})"),
            title_justify="left",
        )
        for check in self.checks:
            # Values quote Jinja and file names, whose brackets rich would read as markup.
            value = check.value
            if check.status == "fail":
                value = f"{check.value}: {check.rule}. Fix: {check.fix}."
            table.add_row(check.name, marks[check.status], escape(value))
        return table
