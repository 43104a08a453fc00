"""A folder of checkpoints: training and import write it; export, score and verify read it.

::

    DIR/latest_checkpointed_iteration.txt     Megatron's tracker: "release" for an import,
                                              else an iteration number
    DIR/release/ or DIR/iter_0000100/         Megatron torch_dist checkpoint
    DIR/*/run_config.yaml                     inside it: Megatron-Bridge's model config
                                              (checkpoint/bridge_config.py)
    DIR/architecture.json                     the model: Mellum2Architecture.to_dict()
    DIR/run.yaml                              resolved run (training only)
    DIR/generation_config.json                copied from an imported folder, if it had one
    DIR/tokenizer/                            tokenizer files in Hugging Face format
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.common.files import write_json, write_text
from mellum2_megatron.common.json_files import load_json
from mellum2_megatron.common.model_folders import ARCHITECTURE_FILE as ARCHITECTURE_FILE
from mellum2_megatron.common.model_folders import RELEASE as RELEASE
from mellum2_megatron.common.model_folders import RUN_FILE as RUN_FILE
from mellum2_megatron.common.model_folders import TRACKER_FILE as TRACKER_FILE
from mellum2_megatron.common.model_folders import check_inside, is_checkpoint_name, not_checkpoint

GENERATION_CONFIG_FILE = "generation_config.json"
TOKENIZER_FOLDER = "tokenizer"
LAST_FILE = "metadata.json"
"""Last file that Megatron writes into a checkpoint; without it the save did not finish
(core/dist_checkpointing/serialization.py:445, 0.19.2)."""

ROTATION = ("max_position_embeddings", "rope_full_attention", "rope_sliding_attention")
"""Fields of the architecture that have no weights; a run that takes another's weights may change
them."""

_GIVE = (
    "give a folder that `mellum2 train` or `mellum2 convert import` wrote, "
    "or one DIR/iter_* inside it"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFolder:
    """One checkpoint on disk.

    Attributes:
        root: folder of all checkpoints of a run, ``DIR``.
        iteration_dir: the Megatron checkpoint, ``DIR/iter_*`` or ``DIR/release``.
        architecture: the model in the checkpoint.
        tokenizer_dir: ``DIR/tokenizer``; None if that folder does not exist.
    """

    root: Path
    iteration_dir: Path
    architecture: Mellum2Architecture
    tokenizer_dir: Path | None

    @property
    def iteration(self) -> int | None:
        """Iteration number, or None for a release."""
        return iteration_number(self.iteration_dir.name)


def iteration_folder_name(iteration: int) -> str:
    """Return the folder name of an iteration, such as ``iter_0000100``.

    As Megatron's `get_checkpoint_name` (training/checkpointing.py, 0.19.2).
    """
    return f"iter_{iteration:07d}"


def iteration_number(name: str) -> int | None:
    """Return the iteration of a folder name (``iter_0000100``: 100); None for any other name."""
    digits = name.removeprefix("iter_")
    if not name.startswith("iter_"):
        return None
    # isdigit() alone accepts digits of other scripts, and int() would turn them into a number that
    # belongs to another name.
    return int(digits) if digits.isascii() and digits.isdigit() else None


def iteration_folders(root: Path) -> list[Path]:
    """Return the checkpoints in ``root``: ``release`` first, then iterations, ascending."""
    if not root.is_dir():
        return []
    iterations = [
        path for path in root.iterdir() if path.is_dir() and iteration_number(path.name) is not None
    ]
    release = [root / RELEASE] if (root / RELEASE).is_dir() else []
    return release + sorted(iterations, key=lambda path: iteration_number(path.name) or 0)


def is_complete(folder: Path) -> bool:
    """Return true if the save of a checkpoint finished.

    `LAST_FILE` is never left over from an older save, because a save first empties the folder
    (checkpoint/saving.py).
    """
    return (folder / LAST_FILE).is_file()


def names_checkpoint(path: Path) -> bool:
    """Return true if ``path`` is a folder with a tracker, or has the name of one checkpoint."""
    if (path / TRACKER_FILE).is_file():
        return True
    return path.is_dir() and is_checkpoint_name(path.name)


def find_checkpoint(path: str | os.PathLike[str]) -> CheckpointFolder:
    """Find the checkpoint that a path names.

    Args:
        path: ``DIR/iter_*`` or ``DIR/release``; or ``DIR``, for the checkpoint in its tracker.

    Raises:
        InputError: not a Megatron checkpoint (the message names what it is, and the command that
            converts a Hugging Face folder), a missing or broken tracker, a tracked checkpoint that
            is gone, an iteration whose save was interrupted, or no architecture.json.
    """
    given = Path(path)
    # With iterations inside, only the tracker is missing; `_tracked` lists them.
    if not iteration_folders(given) and (error := not_checkpoint(given)) is not None:
        raise error
    # Not Path.resolve(): if the iteration is a link to another disk, that would lose its root.
    absolute = Path(os.path.abspath(given))
    if is_checkpoint_name(absolute.name) and not (absolute / TRACKER_FILE).exists():
        root, iteration_dir = absolute.parent, absolute
    else:
        root, iteration_dir = absolute, _tracked(absolute)
    if iteration_number(iteration_dir.name) is not None and not is_complete(iteration_dir):
        raise InputError(
            f"{iteration_dir} is half a checkpoint",
            rule=f"its save was interrupted: it has no {LAST_FILE}",
            fix=f"use another of {root} (complete: {_complete_names(root)})",
        )
    tokenizer = root / TOKENIZER_FOLDER
    return CheckpointFolder(
        root=root,
        iteration_dir=iteration_dir,
        architecture=read_architecture(root),
        tokenizer_dir=tokenizer if tokenizer.is_dir() else None,
    )


def tracked_iteration(root: Path) -> int | None:
    """Return the iteration in the tracker; None for a release or without a readable tracker."""
    try:
        text = (root / TRACKER_FILE).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isascii() and text.isdigit() else None


def how_to_resume(root: Path) -> str:
    """Return the end of a failure's message: what the same command would do."""
    if not (root / TRACKER_FILE).is_file():
        return "no checkpoint was saved, so the same command starts from the beginning"
    return "the same command resumes from the last checkpoint"


def write_tracker(root: Path, iteration: int | None) -> None:
    """Make Megatron's ``--load`` load ``iteration``; None: the release."""
    write_text(root / TRACKER_FILE, RELEASE if iteration is None else str(iteration))


def write_architecture(root: Path, architecture: Mellum2Architecture) -> None:
    """Write ``architecture.json`` into ``root``."""
    write_json(root / ARCHITECTURE_FILE, architecture.to_dict())


def read_architecture(root: Path) -> Mellum2Architecture:
    """Read ``architecture.json`` of a checkpoint folder.

    Raises:
        InputError: the file is absent or holds no valid architecture.
    """
    path = root / ARCHITECTURE_FILE
    check_inside(root, path)
    try:
        values = load_json(path)
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing", rule="a checkpoint has its architecture beside it", fix=_GIVE
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            str(path),
            rule=f"it must be valid JSON ({first_line(error)})",
            fix="copy the checkpoint again",
        ) from error
    try:
        return Mellum2Architecture.from_dict(values)
    except InputError as error:
        raise InputError(f"{path}: {error.value}", rule=error.rule, fix=error.fix) from error


def _complete_names(root: Path) -> str:
    return ", ".join(path.name for path in iteration_folders(root) if is_complete(path)) or "none"


def _tracked(root: Path) -> Path:
    """Return the checkpoint that the tracker of ``root`` names."""
    tracker = root / TRACKER_FILE
    inside = ", ".join(path.name for path in iteration_folders(root))
    try:
        text = tracker.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{root}: no readable {TRACKER_FILE}",
            rule="it names the last checkpoint",
            fix=f"name one of {inside} inside it" if inside else _GIVE,
        ) from error
    if text == RELEASE:
        folder = root / RELEASE
    elif text.isascii() and text.isdigit():
        folder = root / iteration_folder_name(int(text))
    else:
        raise InputError(
            f"{tracker} holds {text!r}",
            rule="it holds an iteration number or 'release'",
            fix=f"write that of a checkpoint into it (complete: {_complete_names(root)})",
        )
    if not folder.is_dir():
        raise InputError(
            f"{folder} is missing",
            rule=f"{TRACKER_FILE} names it",
            fix=f"write one that is there into it ({inside or 'none'})",
        )
    return folder
