"""Is a Hugging Face folder fit to publish? A list of named checks, each with the value, the rule and the fix.

Works on folders made elsewhere. Nothing in the folder is executed: weights are read as safetensors, chat templates are
rendered in transformers' sandbox, and ``trust_remote_code`` is never given.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from mellum2_megatron.errors import InputError, nearest

Status = Literal["pass", "fail", "not applicable"]

BASE_PRETRAIN = "base-pretrain"
CHAT_MEMBERS = ("instruct-sft", "thinking-sft", "instruct", "thinking")
MEMBERS = (BASE_PRETRAIN, "base", *CHAT_MEMBERS)

MIN_ACCEPTANCE = 0.5


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


def check_release(
    path: str | os.PathLike[str],
    *,
    member: str | None = None,
    text: Path | None = None,
    min_acceptance: float = MIN_ACCEPTANCE,
    skip_run: bool = False,
) -> ReleaseReport:
    """Run every check on a Hugging Face folder.

    Args:
        path: the folder.
        member: one of `MEMBERS`; by default what the folder's verification card says, else unknown. A known member
            adds its rules: context length, chat template.
        text: evaluation text for the MTP head's acceptance.
        min_acceptance: smallest acceptance on ``text`` that passes; a broken MTP export shows 1 to 2%.
        skip_run: leave out what loads the model (four bytes a parameter of memory, in float32).

    Raises:
        InputError: ``path`` is no folder, ``text`` cannot be read, or another argument cannot be used.
    """
    from conversion.release_checks import stated_member, static_checks
    from conversion.release_runs import running_checks, skipped_checks

    folder = Path(path)
    if not folder.is_dir():
        raise InputError(str(folder), rule="it must be a folder", fix="give the Hugging Face model's folder")
    if member is not None:
        require_member(member)
    require_acceptance(min_acceptance)
    words = read_text(text) if text is not None else None
    known = member or stated_member(folder)
    checks = static_checks(folder, known)
    broken = [check.name for check in checks if check.status == "fail" and check.name in NEEDED_TO_RUN]
    if skip_run:
        checks += skipped_checks("left out (--skip-run)")
    elif broken:
        checks += skipped_checks(f"needs what failed: {', '.join(broken)}")
    else:
        checks += running_checks(folder, text=words, min_acceptance=min_acceptance)
    return ReleaseReport(folder=folder, member=known, checks=tuple(checks))


NEEDED_TO_RUN = (
    *("nothing executable", "config", "files", "tensors", "MTP head", "shapes", "dtypes", "finite"),
    *("tokenizer files", "tokenizer vocabulary"),
)
"""Checks without which loading the model would fail for the same reason again, or do harm."""


def require_member(member: str) -> None:
    """Refuse a name that is no family member's."""
    if member not in MEMBERS:
        raise InputError(f"--member {member}", rule="no family member has that name", fix=nearest(member, MEMBERS))


def require_acceptance(value: float) -> None:
    """Refuse a floor that is no share."""
    if not 0 <= value <= 1:
        raise InputError(f"--min-acceptance {value}", rule="a share lies between 0 and 1", fix="use 0.5")


def read_text(path: Path) -> str:
    """Read evaluation text, UTF-8; InputError when it cannot be read or is blank."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--text {path}", rule=f"it must be readable UTF-8 ({error})", fix="name a text file"
        ) from None
    if not text.strip():
        raise InputError(f"--text {path}", rule="it holds no text", fix="give the text to evaluate on")
    return text


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
