"""Kinds of folders and files that a command can be given as a model, and one message for each.

Every command that reads a model asks here when it was given something else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.common.json_files import load_json

CONFIG_FILE = "config.json"
ARCHITECTURE_FILE = "architecture.json"
RUN_FILE = "run.yaml"
TRACKER_FILE = "latest_checkpointed_iteration.txt"
CORPUS_FILE = "corpus.json"
RELEASE = "release"
"""Name of a checkpoint without iteration number (weights only), in the tracker and on disk."""

LFS_START = b"version https://git-lfs.github.com/spec/"
"""First bytes of the small file that Git LFS keeps in place of a large one."""

Kind = Literal[
    "missing",
    "file",
    "lfs pointer",
    "checkpoint",
    "run",
    "adapter",
    "huggingface",
    "hub cache",
    "data",
    "unknown",
]


def kind_of(path: Path) -> Kind:
    """Return the kind of a path.

    ``checkpoint``: a folder of Megatron checkpoints, or one in it. ``run``: the folder of a run
    that has saved nothing. ``adapter``: a LoRA adapter. ``huggingface``: a model with config.json.
    ``hub cache``: a model's root in the Hugging Face cache. ``data``: a prepared corpus.
    """
    if path.is_file():
        return "lfs pointer" if is_lfs_pointer(path) else "file"
    if not path.is_dir():
        return "missing"
    if (path / TRACKER_FILE).is_file():
        return "checkpoint"
    # Before config.json: some trainers put a copy of the base model's beside the adapter.
    if (path / "adapter_config.json").is_file():
        return "adapter"
    if (path / CONFIG_FILE).is_file():
        return "huggingface"
    if is_checkpoint_name(path.absolute().name):
        return "checkpoint"
    if (path / RUN_FILE).is_file() or (path / ARCHITECTURE_FILE).is_file():
        return "run"
    if (path / CORPUS_FILE).is_file():
        return "data"
    if (path / "snapshots").is_dir():
        return "hub cache"
    return "unknown"


def is_lfs_pointer(file: Path) -> bool:
    """Return true if a file is Git LFS's stand-in for a large one; false also if unreadable."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(LFS_START)) == LFS_START
    except OSError:
        return False


def refuse_lfs_pointers(files: Iterable[Path]) -> None:
    """Refuse files that a clone without Git LFS left as pointers.

    Raises:
        InputError: one or more are; the first is named.
    """
    pointers = [file for file in files if is_lfs_pointer(file)]
    if pointers:
        others = f" (and {len(pointers) - 1} more)" if len(pointers) > 1 else ""
        raise InputError(
            f"{pointers[0]}{others}",
            rule="it is a Git LFS pointer, a few lines in place of the file itself",
            fix=f"run `git lfs pull` in {pointers[0].parent}, or download the model again",
        )


def check_inside(folder: Path, file: Path) -> None:
    """Check that a file is no link out of its folder.

    In the Hugging Face cache a link may lead to the blobs and snapshots of the same model
    (``snapshots/REVISION/f -> ../../blobs/HASH``).

    Raises:
        InputError: a link out of the folder, or a circle of links.
    """
    # Otherwise a downloaded folder could pass any file of this machine off as its own.
    try:
        real, home = file.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(
            str(file), rule=f"the link leads nowhere ({first_line(error)})", fix="copy it again"
        ) from error
    allowed = [home]
    for parent in home.parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            allowed += [parent, parent.parent / "blobs"]
    if not any(real.is_relative_to(place) for place in allowed):
        raise InputError(
            f"{file} -> {real}",
            rule="a link may not leave the model's folder",
            fix="copy the file itself into it",
        )


def is_checkpoint_name(name: str) -> bool:
    """Return true for the folder name of one checkpoint: ``release``, or ``iter_`` and digits."""
    return name == RELEASE or re.fullmatch(r"iter_[0-9]+", name) is not None


def not_huggingface(path: Path) -> InputError | None:
    """Return the message for a path given where a Hugging Face folder belongs; None if it is one.

    The fix is a command where one exists.
    """
    common = _not_a_model(path)
    if common is not None:
        return common
    if kind_of(path) == "checkpoint":
        return InputError(
            str(path),
            rule="a Hugging Face folder is needed here, this is a Megatron checkpoint",
            fix="export it: `mellum2 convert export "
            f"--megatron-path {path} --hf-path {_beside(path)}-hf`",
        )
    return None


def not_checkpoint(path: Path) -> InputError | None:
    """Return the message for a path given where a Megatron checkpoint belongs; None if it is one.

    The fix is a command where one exists.
    """
    common = _not_a_model(path)
    if common is not None:
        return common
    if kind_of(path) == "huggingface":
        return InputError(
            str(path),
            rule="a Megatron checkpoint is needed here, this is a Hugging Face folder",
            fix="import it: `mellum2 convert import "
            f"--hf-path {path} --megatron-path {_beside(path)}-megatron`",
        )
    return None


def _not_a_model(path: Path) -> InputError | None:
    """Return the message for a path that is no model of either form."""
    match kind_of(path):
        case "huggingface" | "checkpoint":
            return None
        case "missing":
            rule, fix = "there is no such folder", "give the path of a model's folder"
            if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
                fix = f"for a model of the hub: `hf download {path} --local-dir DIR`, then give DIR"
        case "lfs pointer":
            rule = "it is a Git LFS pointer, not the file itself"
            fix = "run `git lfs pull` in that repository, then give the folder"
        case "file":
            rule, fix = "a model is a folder, this is a file", f"give its folder, {path.parent}"
        case "run":
            rule = "the folder of a run that has saved no checkpoint"
            fix = "wait for its first save, or train it on with the same command"
        case "adapter":
            rule = "a LoRA adapter (adapter_config.json), which holds no whole model"
            fix = (
                f"merge it into {_base_model(path)} where PEFT is installed "
                "(`merge_and_unload()`, then `save_pretrained(DIR)`), and give DIR"
            )
        case "hub cache":
            revisions = sorted(
                entry.name for entry in (path / "snapshots").iterdir() if entry.is_dir()
            )
            rule = "the root of a model in the Hugging Face cache; its files lie in snapshots/"
            fix = f"give {path / 'snapshots' / (revisions[0] if revisions else 'REVISION')}"
            if len(revisions) > 1:
                fix += f" (or one of {', '.join(revisions[1:])})"
        case "data":
            rule, fix = "a prepared corpus, not a model", "give it as data.path; give a model here"
        case _ if any(path.glob("*.safetensors")):
            return InputError(
                f"{path / CONFIG_FILE} is missing",
                rule="a Hugging Face model folder has it",
                fix="give a complete folder",
            )
        case _:
            inside = sorted(entry.name for entry in path.iterdir())
            shown = ", ".join(inside[:5]) + (", .." if len(inside) > 5 else "")
            rule = (
                f"no model: it has neither {CONFIG_FILE} (Hugging Face) "
                f"nor {TRACKER_FILE} (Megatron), but {shown or 'nothing'}"
            )
            fix = "give a complete folder"
    return InputError(str(path), rule=rule, fix=fix)


def _beside(path: Path) -> str:
    """Return the path from which a converted folder's name is made: the run's, not iter_*."""
    plain = path.parent if is_checkpoint_name(path.name) else path
    return str(plain).rstrip("/")


def _base_model(adapter: Path) -> str:
    try:
        config = load_json(adapter / "adapter_config.json")
        return str(config["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return "its base model"
