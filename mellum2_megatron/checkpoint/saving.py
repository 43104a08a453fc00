"""What a save of this project does beyond Megatron's: an empty folder first, a manifest last, old
checkpoints removed.

Megatron writes into ``iter_*`` in place, whatever is there, and moves its tracker when all ranks
are done. In between, before the tracker moves, each rank hashes the files that it has just written,
which the system still holds in memory.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mellum2_megatron.checkpoint.bridge_config import write_run_config
from mellum2_megatron.checkpoint.file_manifest import (
    MANIFEST_FILE,
    FileRecord,
    hash_files,
    write_manifest,
)
from mellum2_megatron.checkpoint.folder import (
    ARCHITECTURE_FILE,
    is_complete,
    iteration_folder_name,
    iteration_folders,
    iteration_number,
    read_architecture,
    tracked_iteration,
)
from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.common.files import remove_directory
from mellum2_megatron.config import Checkpoint

logger = logging.getLogger(__name__)


def install(
    settings: Checkpoint,
    paused: Callable[[], AbstractContextManager[None]],
    also: Callable[[Path], None],
) -> None:
    """Make Megatron's saves do so for the rest of the process.

    Args:
        settings: of the run.
        paused: entered around each save, which has no micro-batches.
        also: called by one rank with each new checkpoint's folder, to put something of its own
            there.
    """
    import torch
    from megatron.core import dist_checkpointing
    from megatron.training import training

    # torch.save's own checksum costs several times what writing does, and torch.load never looks at
    # it; the manifest has a SHA-256 of every file.
    torch.serialization.set_crc32_options(False)
    dist_checkpointing.save = _with_manifest(dist_checkpointing.save, also)
    training.save_checkpoint = _with_retention(training.save_checkpoint, settings, paused)


def remove_fragments(root: Path) -> None:
    """Remove checkpoints of which a run that was killed has left a part, and say so. One rank calls
    it.

    A part has no `LAST_FILE` and holds nothing but files; folders inside are another format's.
    """
    for folder in iteration_folders(root):
        is_training = iteration_number(folder.name) is not None and not folder.is_symlink()
        if (
            is_training
            and not is_complete(folder)
            and all(entry.is_file() for entry in folder.iterdir())
        ):
            remove_directory(folder)
            logger.warning("removed %s: its save was interrupted", folder)


def remove_old(root: Path, *, keep_last: int | None, retain_interval: int | None) -> None:
    """Remove checkpoints that a run does not keep; nothing from the tracked one on counts as old.

    Args:
        root: folder of the run.
        keep_last: how many of the newest stay; None means 1 with a ``retain_interval``, else all.
        retain_interval: multiples of this stay too.
    """
    newest = tracked_iteration(root)
    if newest is None or (keep_last is None and retain_interval is None):
        return
    numbers = [
        iteration_number(folder.name)
        for folder in iteration_folders(root)
        if not folder.is_symlink()
    ]
    saved = sorted(number for number in numbers if number is not None and number <= newest)
    for number in saved[: -(keep_last or 1)]:
        if retain_interval is None or number % retain_interval:
            remove_directory(root / iteration_folder_name(number))


def _with_manifest(
    save: Callable[..., Any], also: Callable[[Path], None] | None = None
) -> Callable[..., Any]:
    """Wrap `dist_checkpointing.save`, which every rank calls; asynchronous, it returns what it will
    do at its end."""
    import torch

    @functools.wraps(save)
    def save_with_manifest(state: Any, folder: str, *args: Any, **kwargs: Any) -> Any:
        if torch.distributed.get_rank() == 0:
            _empty(Path(folder))
            if also is not None:
                also(Path(folder))
        torch.distributed.barrier()
        request = save(state, folder, *args, **kwargs)
        if request is None:
            _write_manifest(Path(folder))
        else:
            request.finalize_fns.append(functools.partial(_write_manifest, Path(folder)))
        return request

    return save_with_manifest


def _empty(folder: Path) -> None:
    """Empty a folder, its completeness mark first: an earlier save's files must not count as this
    one's."""
    for entry in sorted(folder.iterdir(), key=lambda entry: not entry.name.endswith(".json")):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _write_manifest(folder: Path) -> None:
    """Hash this rank's files and write the manifest of all of them. A collective of all ranks."""
    import torch

    rank = torch.distributed.get_rank()
    parts: list[dict[str, FileRecord] | str] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, _own_records(folder, f"__{rank}_"))
    failed = [
        f"rank {number}: {part}" for number, part in enumerate(parts) if isinstance(part, str)
    ]
    if failed:
        raise WorkError(
            f"{folder} could not be hashed ({'; '.join(failed)})", fix="check that disk"
        )
    if rank == 0:
        if (folder.parent / ARCHITECTURE_FILE).is_file():
            write_run_config(folder, read_architecture(folder.parent))
        records = {
            name: record
            for part in parts
            if isinstance(part, dict)
            for name, record in part.items()
        }
        others = [
            file
            for file in folder.iterdir()
            if file.name not in records and file.name != MANIFEST_FILE
        ]
        write_manifest(folder, records | hash_files(others))
    torch.distributed.barrier()


def _own_records(folder: Path, prefix: str) -> dict[str, FileRecord] | str:
    """Return the records of this rank's files (``__RANK_N.distcp``), or why they could not be
    read."""
    try:
        return hash_files(sorted(folder.glob(f"{prefix}*")))
    except OSError as error:
        return str(error)


def _with_retention(
    save_checkpoint: Callable[..., None],
    settings: Checkpoint,
    paused: Callable[[], AbstractContextManager[None]],
) -> Callable[..., None]:
    """Wrap `megatron.training.checkpointing.save_checkpoint`, which every rank calls.

    A step is saved once. Megatron saves some twice, as a step at which the batch grows
    (training.py:3772, 0.19.2): the second save would overwrite the newest checkpoint, and a crash
    in it would cost more than the steps since.
    """
    import torch

    saved: set[int] = set()

    @functools.wraps(save_checkpoint)
    def save_and_remove(iteration: int, *args: Any, **kwargs: Any) -> None:
        if iteration in saved:
            return
        with paused():
            save_checkpoint(iteration, *args, **kwargs)
            saved.add(iteration)
            if torch.distributed.get_rank() == 0 and settings.output is not None:
                _remove_old(Path(settings.output), settings)

    return save_and_remove


def _remove_old(root: Path, settings: Checkpoint) -> None:
    try:
        remove_old(root, keep_last=settings.keep_last, retain_interval=settings.retain_interval)
    except OSError as error:  # no reason to end a run
        logger.warning("an old checkpoint could not be removed: %s", error)
