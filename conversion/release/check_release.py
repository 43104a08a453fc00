"""Is a Hugging Face folder fit to publish? A list of named checks, each with the value, the rule
and the fix.

Works on folders made elsewhere. Nothing in the folder is executed: weights are read as safetensors,
chat templates are rendered in transformers' sandbox, and ``trust_remote_code`` is never given.
"""

from __future__ import annotations

import os
from pathlib import Path

from conversion.release.check import ReleaseReport
from conversion.release.members import require_member
from mellum2_megatron.common.errors import InputError

MIN_ACCEPTANCE = 0.5


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
        member: one of `MEMBERS`; by default what the folder's verification card says, else unknown.
            A known member adds its rules: context length, chat template.
        text: evaluation text for the MTP head's acceptance.
        min_acceptance: smallest acceptance on ``text`` that passes; a broken MTP export shows 1 to
            2%.
        skip_run: leave out what loads the model (four bytes a parameter of memory, in float32).

    Raises:
        InputError: ``path`` is no folder, ``text`` cannot be read, or another argument cannot be
            used.
    """
    from conversion.release.file_checks import stated_member, static_checks
    from conversion.release.model_checks import running_checks, skipped_checks

    folder = Path(path)
    if not folder.is_dir():
        raise InputError(
            str(folder), rule="it must be a folder", fix="give the Hugging Face model's folder"
        )
    if member is not None:
        require_member(member)
    require_acceptance(min_acceptance)
    words = read_text(text) if text is not None else None
    known = member or stated_member(folder)
    checks = static_checks(folder, known)
    broken = [
        check.name for check in checks if check.status == "fail" and check.name in NEEDED_TO_RUN
    ]
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


def require_acceptance(value: float) -> None:
    """Refuse a floor that is no share."""
    if not 0 <= value <= 1:
        raise InputError(
            f"--min-acceptance {value}", rule="a share lies between 0 and 1", fix="use 0.5"
        )


def read_text(path: Path) -> str:
    """Read evaluation text, UTF-8; InputError when it cannot be read or is blank."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--text {path}", rule=f"it must be readable UTF-8 ({error})", fix="name a text file"
        ) from None
    if not text.strip():
        raise InputError(
            f"--text {path}", rule="it holds no text", fix="give the text to evaluate on"
        )
    return text
