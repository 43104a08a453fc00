"""The checks of a release folder that need no model.

They compare config.json, weights, tokenizer and documents with each other. Each group has a module
of its own; this one checks the folder's safety and its documents.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from conversion.huggingface.format import (
    CARD_FILE,
    CONFIG_FILE,
    LICENSE_FILE,
    PICKLED,
    VERIFICATION_FILE,
    listed,
    read_json,
)
from conversion.release.chat_template import TOKENIZER_CONFIG_FILE
from conversion.release.check import Check, named_check
from conversion.release.config_checks import config_checks
from conversion.release.members import CHAT_MEMBERS, MEMBERS
from conversion.release.tokenizer_checks import tokenizer_checks
from conversion.release.weight_checks import weight_checks
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.model_folders import check_inside

_SHORTEST_CARD = 200
"""Fewest characters of a model card: less cannot describe a model."""


def file_checks(folder: Path, member: str | None) -> list[Check]:
    """Return every check that does not load the model.

    Args:
        folder: Hugging Face folder.
        member: one of `MEMBERS`, whose rules are added; None if unknown.
    """
    of_config, architecture = config_checks(folder, member)
    return [
        nothing_executable(folder),
        *of_config,
        *weight_checks(folder, architecture),
        *tokenizer_checks(folder, architecture, chat=member in CHAT_MEMBERS),
        model_card(folder),
        licence(folder),
        verification_card(folder),
    ]


def stated_member(folder: Path) -> str | None:
    """Return the family member in the folder's verification card; None without one."""
    try:
        member = read_json(folder / VERIFICATION_FILE, "").get("member")
    except InputError:
        return None
    return member if member in MEMBERS else None


@named_check("nothing executable")
def nothing_executable(folder: Path) -> str:
    """No file can run code where the folder is loaded, and no link leaves the folder."""
    patterns = (*PICKLED, "*.py")
    files = [file for pattern in patterns for file in folder.rglob(pattern)]
    if files:
        raise InputError(
            listed(sorted(str(file.relative_to(folder)) for file in files)),
            rule="pickles and Python files can run code where the folder is loaded",
            fix="remove them; weights are released as safetensors",
        )
    # A link to a file outside would be uploaded, or read, as a part of the release.
    for link in sorted(path for path in folder.rglob("*") if path.is_symlink()):
        check_inside(folder, link)
    # transformers downloads and runs the classes that auto_map names, with trust_remote_code.
    for name in (CONFIG_FILE, TOKENIZER_CONFIG_FILE):
        if (folder / name).is_file() and "auto_map" in read_json(folder / name, ""):
            raise InputError(
                f"auto_map in {name}",
                rule="it asks the loader to run code from the folder",
                fix="remove the key: transformers knows Mellum",
            )
    return "no pickles, no code"


@named_check("model card")
def model_card(folder: Path) -> str:
    """README.md is there and long enough to describe a model."""
    text = _read_if_there(folder / CARD_FILE)
    if len(text) < _SHORTEST_CARD:
        raise InputError(
            f"{CARD_FILE}: {len(text)} characters",
            rule="a release describes its model and its intended use",
            fix=f"write {CARD_FILE}, or let `mellum2 release` write it",
        )
    return f"{CARD_FILE}, {len(text):,} characters"


@named_check("licence")
def licence(folder: Path) -> str:
    """The licence is Apache 2.0, under any of its usual file names."""
    names = (LICENSE_FILE, f"{LICENSE_FILE}.txt", f"{LICENSE_FILE}.md")
    name = next((name for name in names if (folder / name).is_file()), LICENSE_FILE)
    text = _read_if_there(folder / name)
    if "Apache License" not in text:
        state = "another text" if text else "missing"
        raise InputError(
            f"{name}: {state}",
            rule="Mellum 2 and its derivatives are released under Apache 2.0, with its text",
            fix="copy the text of the Apache License 2.0 into the folder as LICENSE",
        )
    return f"{name}: Apache 2.0"


@named_check("verification card")
def verification_card(folder: Path) -> str | Check:
    """The files have the hashes that the verification card lists."""
    path = folder / VERIFICATION_FILE
    if not path.exists():
        return verification_card.left_out(f"no {VERIFICATION_FILE}")
    stated = read_json(path, "").get("files")
    if not isinstance(stated, dict):
        raise InputError(
            str(path), rule="it lists the hash of every file", fix="release the folder again"
        )
    actual = file_hashes(folder)
    # Unlisted files are no error: hubs add their own (.gitattributes).
    different = sorted(file for file in stated if stated[file] != actual.get(file))
    if different:
        raise InputError(
            listed(different),
            rule=f"files are those whose hashes {VERIFICATION_FILE} lists",
            fix="release the folder again after a change, or copy the files again",
        )
    return f"{len(stated)} files have the hashes it lists"


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file but weights, cards and hidden files, by relative path."""
    # The manifest covers the weights. The two cards quote these hashes, so they cannot have one.
    # Hidden files (a clone's ``.git``) are no part of a release.
    hashes = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        covered = file.suffix == ".safetensors" or file.name in (CARD_FILE, VERIFICATION_FILE)
        if file.is_file() and not hidden and not covered:
            with file.open("rb") as stream:
                hashes[str(name)] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def _read_if_there(path: Path) -> str:
    """Return the text of a file, whatever its encoding; empty without the file."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
