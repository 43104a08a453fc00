"""Check whether a Hugging Face folder is fit to publish, whoever made it.

Nothing in the folder is executed: weights are read as safetensors, chat templates are rendered in
transformers' sandbox, and ``trust_remote_code`` is never given.
"""

from __future__ import annotations

import os
from pathlib import Path

from conversion.release.check import ReleaseReport
from conversion.release.file_checks import file_checks, stated_member
from conversion.release.members import require_member
from conversion.release.model_checks import model_checks, model_checks_left_out
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import read_text

MIN_ACCEPTANCE = 0.5
"""Default of the smallest MTP acceptance that passes; a broken export has 0.01 to 0.02."""

NEEDED_TO_RUN = (
    "nothing executable",
    "config",
    "files",
    "tensors",
    "MTP head",
    "shapes",
    "dtypes",
    "finite",
    "tokenizer files",
    "tokenizer vocabulary",
)
"""Checks that must pass before the model is loaded.

Otherwise loading would fail for the same reason, or run code.
"""


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
        path: Hugging Face folder.
        member: one of `MEMBERS`, whose rules on context length and chat template are added.
            Default: the member in the folder's verification card, if any.
        text: file on which the MTP head's acceptance is measured; None leaves that check out.
        min_acceptance: smallest acceptance on ``text`` that passes, 0 to 1; default 0.5.
        skip_run: leave out the checks that load the model (4 bytes per parameter, in float32);
            default False.

    Raises:
        InputError: ``path`` is no folder, ``text`` cannot be read, or another argument cannot be
            used.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(
            str(folder), rule="it must be a folder", fix="give the Hugging Face model's folder"
        )
    # Options first: a misspelt one must not cost the minutes that hashing the weights takes.
    if member is not None:
        require_member(member)
    require_acceptance(min_acceptance)
    evaluation_text = read_evaluation_text(text) if text is not None else None
    # The card only claims a member: the checks of context and chat template test the claim.
    known = member or stated_member(folder)
    checks = file_checks(folder, known)
    failed = [check.name for check in checks if check.status == "fail"]
    blocking = [name for name in failed if name in NEEDED_TO_RUN]
    if skip_run:
        checks += model_checks_left_out("left out (--skip-run)")
    elif blocking:
        checks += model_checks_left_out(f"needs what failed: {', '.join(blocking)}")
    else:
        checks += model_checks(folder, text=evaluation_text, min_acceptance=min_acceptance)
    return ReleaseReport(folder=folder, member=known, checks=tuple(checks))


def require_acceptance(value: float) -> None:
    """Raise InputError unless ``value`` lies between 0 and 1."""
    if not 0 <= value <= 1:
        raise InputError(
            f"--min-acceptance {value}", rule="a share lies between 0 and 1", fix="use 0.5"
        )


def read_evaluation_text(path: Path) -> str:
    """Return the evaluation text of ``--text``.

    Raises:
        InputError: the file is unreadable, not UTF-8, or blank.
    """
    text = read_text(path, f"--text {path}", fix="name a text file")
    if not text.strip():
        raise InputError(
            f"--text {path}", rule="it holds no text", fix="give the text to evaluate on"
        )
    return text
