"""The outcome of one check of a release folder, and the report of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from mellum2_megatron.common.errors import InputError

Status = Literal["pass", "fail", "not applicable"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: what was checked.
        status: how it ended.
        value: what was found; of a check that is not applicable, why.
        rule, fix: of a failed check, the rule the value breaks and what to do.
        figures: measured numbers, for the verification card.
    """

    name: str
    status: Status
    value: str
    rule: str = ""
    fix: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def passed(cls, name: str, value: str, **figures: Any) -> Check:
        """A check that holds."""
        return cls(name=name, status="pass", value=value, figures=figures)

    @classmethod
    def failed(cls, name: str, value: str, *, rule: str, fix: str, **figures: Any) -> Check:
        """A check that does not hold."""
        return cls(name=name, status="fail", value=value, rule=rule, fix=fix, figures=figures)

    @classmethod
    def refused(cls, name: str, error: InputError) -> Check:
        """A check that an InputError ended."""
        return cls(name=name, status="fail", value=error.value, rule=error.rule, fix=error.fix)

    @classmethod
    def not_applicable(cls, name: str, why: str) -> Check:
        """A check that has nothing to look at."""
        return cls(name=name, status="not applicable", value=why)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseReport:
    """Every check of a folder, in order."""

    folder: Path
    member: str | None
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """No check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == "fail")

    def check(self, name: str) -> Check:
        """The outcome of the check called ``name``."""
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        checks = [asdict(check) for check in self.checks]
        return {"folder": str(self.folder), "member": self.member, "ok": self.ok, "checks": checks}

    def table(self) -> Table:
        """The report for a console."""
        marks = {"pass": "[green]pass[/]", "fail": "[red]FAIL[/]", "not applicable": "[dim]n/a[/]"}
        count = Counter(check.status for check in self.checks)
        verdict = "fit to publish" if self.ok else "NOT fit to publish"
        title = f"{self.folder}: {verdict} ({', '.join(f'{number} {status}' for status, number in count.items())})"
        table = Table("check", "", "found", title=title, title_justify="left")
        for check in self.checks:
            found = check.value
            if check.status == "fail":
                found = f"{check.value}: {check.rule}. Fix: {check.fix}."
            table.add_row(check.name, marks[check.status], _plain(found))
        return table


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
