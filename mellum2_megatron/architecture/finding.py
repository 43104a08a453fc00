"""An architecture out of a preset's name, a Hugging Face folder, a run's folder or a file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from mellum2_megatron.architecture.hf_config import from_hf_config
from mellum2_megatron.architecture.mellum2 import PRESETS, Mellum2Architecture
from mellum2_megatron.common.errors import InputError, first_line, nearest
from mellum2_megatron.common.files import read_bytes
from mellum2_megatron.common.json_files import parse_object
from mellum2_megatron.common.model_folders import (
    ARCHITECTURE_FILE,
    CONFIG_FILE,
    check_inside,
    is_checkpoint_name,
    kind_of,
    not_huggingface,
    refuse_lfs_pointers,
)


def find_architecture(word: str) -> tuple[Mellum2Architecture, str]:
    """Return the architecture that a word names, and the word with the file it was read from.

    Args:
        word: name of a preset; or path of a Hugging Face folder (its ``config.json`` is enough), of
            a Megatron checkpoint or run folder (``architecture.json``), or of one of those files.
            A preset comes before a folder of the same name.

    Raises:
        InputError: neither; the message lists the presets and what a folder must hold.
    """
    if word in PRESETS:
        return PRESETS[word], word
    path = Path(word).expanduser()
    file = _file_of(path)
    if file is None:
        raise _no_architecture(word, path)
    if file != path:
        check_inside(file.parent, file)
    refuse_lfs_pointers([file])
    try:
        content = read_bytes(file)
        values = parse_object(content)
    except (OSError, ValueError) as error:
        raise InputError(
            str(file),
            rule=f"it must be valid JSON ({first_line(error)})",
            fix="copy the file again",
        ) from None
    try:
        architecture = _from_values(values)
    except InputError as error:
        raise InputError(f"{file}: {error.value}", rule=error.rule, fix=error.fix) from None
    return architecture, f"{file.absolute()}, sha256 {hashlib.sha256(content).hexdigest()}"


def _from_values(values: dict[str, Any]) -> Mellum2Architecture:
    # By content, not by name: files get renamed. Only config.json has a model_type.
    if "model_type" in values or "rope_full_attention" not in values:
        return from_hf_config(values)
    return Mellum2Architecture.from_dict(values)


def _file_of(path: Path) -> Path | None:
    """Return the file that describes the model at a path; None if there is none."""
    if path.is_file():
        return path if path.suffix == ".json" else None
    # An iteration's architecture lies beside it. A run's own file comes before a config.json.
    folders = [path, path.absolute().parent] if is_checkpoint_name(path.name) else [path]
    for folder in folders:
        for name in (ARCHITECTURE_FILE, CONFIG_FILE):
            if (folder / name).is_file():
                return folder / name
    return None


def _no_architecture(word: str, path: Path) -> InputError:
    fix = (
        f"give a preset ({', '.join(PRESETS)}), a folder with {CONFIG_FILE} (Hugging Face) "
        f"or {ARCHITECTURE_FILE} (Megatron), or one of these files"
    )
    if kind_of(path) == "missing":
        close = nearest(word, PRESETS)
        if close.startswith("did you mean"):
            fix = f"{close}; or {fix}"
        return InputError(
            f"architecture={word}", rule="no preset, folder or file has that name", fix=fix
        )
    if path.is_file():
        rule = f"of files only {CONFIG_FILE} and {ARCHITECTURE_FILE} describe a model"
        return InputError(f"architecture={word}", rule=rule, fix=fix)
    # A folder of another kind: what it is helps more than what it lacks.
    error = not_huggingface(path)
    rule = error.rule if error is not None else "it describes no model"
    if kind_of(path) in ("hub cache", "adapter") and error is not None:
        fix = f"{error.fix}; or {fix}"
    return InputError(f"architecture={word}", rule=rule, fix=fix)
