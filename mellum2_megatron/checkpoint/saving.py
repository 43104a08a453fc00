"""Additions of a training run to Megatron's saves: an empty folder, a manifest, pruning.

Megatron writes into ``iter_*`` in place, over whatever is there, and moves its tracker once all
ranks are done. Before the tracker moves, each rank hashes the files that it has just written, while
they are in the page cache. ``training/hooks.py`` installs the wrappers.
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
from mellum2_megatron.common.staging import remove_leftovers
from mellum2_megatron.config import Checkpoint

logger = logging.getLogger(__name__)


def remove_partial_checkpoints(root: Path) -> None:
    """Delete what a killed run left: half-written checkpoints, logged, and temporary names.

    One rank calls it.

    A checkpoint is half-written if it is not complete (`is_complete`) and holds files only.
    Megatron's older format has folders inside.
    """
    remove_leftovers(root)
    for folder in iteration_folders(root):
        if iteration_number(folder.name) is None or folder.is_symlink() or is_complete(folder):
            continue
        if all(entry.is_file() for entry in folder.iterdir()):
            remove_directory(folder)
            logger.warning("removed %s: its save was interrupted", folder)


def remove_old(root: Path, *, keep_last: int | None, retain_interval: int | None) -> None:
    """Remove the checkpoints that a run does not keep; the tracked one and newer ones stay.

    Args:
        root: output folder of the run.
        keep_last: number of newest checkpoints to keep; None: 1 with a ``retain_interval``, else
            all.
        retain_interval: keep multiples of this number of steps too.
    """
    newest = tracked_iteration(root)
    if newest is None or (keep_last is None and retain_interval is None):
        return
    numbers = [
        iteration_number(folder.name)
        for folder in iteration_folders(root)
        if not folder.is_symlink()
    ]
    # Checkpoints newer than the tracked one exist after a user set the tracker back: kept.
    saved = sorted(number for number in numbers if number is not None and number <= newest)
    for number in saved[: -(keep_last or 1)]:
        if retain_interval is None or number % retain_interval:
            remove_directory(root / iteration_folder_name(number))


def with_manifest(
    save: Callable[..., Any], *, extra_save: Callable[[Path], None]
) -> Callable[..., Any]:
    """Wrap `dist_checkpointing.save`: empty the folder first, write a manifest last.

    Args:
        save: called on every rank with state and folder. Returns None or, for an asynchronous save,
            a request with a list of functions to call at its end.
        extra_save: called on rank 0 with the emptied folder, to add a file to the checkpoint.
    """
    import torch

    @functools.wraps(save)
    def save_with_manifest(state: Any, folder: str, *args: Any, **kwargs: Any) -> Any:
        path = Path(folder)
        if torch.distributed.get_rank() == 0:
            _empty(path)
            extra_save(path)
        torch.distributed.barrier()
        request = save(state, folder, *args, **kwargs)
        # An asynchronous save has written nothing yet: the manifest must follow its last file.
        if request is None:
            _write_manifest(path)
        else:
            request.finalize_fns.append(functools.partial(_write_manifest, path))
        return request

    return save_with_manifest


def with_retention(
    save_checkpoint: Callable[..., None],
    *,
    settings: Checkpoint,
    paused: Callable[[], AbstractContextManager[None]],
) -> Callable[..., None]:
    """Wrap `megatron.training.checkpointing.save_checkpoint`: save a step once, then prune.

    Megatron saves some steps twice, such as a step at which the batch grows (training.py:3772,
    0.19.2). The second save would overwrite the newest checkpoint, and a crash during it would lose
    all steps since the checkpoint before.

    Args:
        save_checkpoint: called on every rank, with the iteration first.
        settings: checkpoint settings of the run.
        paused: context manager that suspends the hang watch during a save, in which no micro-batch
            starts.
    """
    import torch

    saved: set[int] = set()

    @functools.wraps(save_checkpoint)
    def save_and_prune(iteration: int, *args: Any, **kwargs: Any) -> None:
        if iteration in saved:
            return
        with paused():
            save_checkpoint(iteration, *args, **kwargs)
            saved.add(iteration)
            if torch.distributed.get_rank() != 0 or settings.output is None:
                return
            try:
                remove_old(
                    Path(settings.output),
                    keep_last=settings.keep_last,
                    retain_interval=settings.retain_interval,
                )
            except OSError as error:  # a checkpoint too many is no reason to end a run
                logger.warning("an old checkpoint could not be removed: %s", error)

    return save_and_prune


def _empty(folder: Path) -> None:
    """Empty a folder, the ``.json`` files first.

    `LAST_FILE` is one of them. An interruption then never leaves a checkpoint that counts as
    complete.
    """
    for entry in sorted(folder.iterdir(), key=lambda entry: not entry.name.endswith(".json")):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _write_manifest(folder: Path) -> None:
    """Hash this rank's files and write the manifest of all ranks' files. A collective.

    Raises:
        WorkError: a rank could not read its files; raised on every rank.
    """
    import torch

    rank = torch.distributed.get_rank()
    own: dict[str, FileRecord] | str
    try:
        own = hash_files(sorted(folder.glob(f"__{rank}_*")))
    except OSError as error:
        own = str(error)  # raised below by all ranks; one alone would leave the others waiting
    parts: list[dict[str, FileRecord] | str] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, own)
    failed = [f"rank {index}: {part}" for index, part in enumerate(parts) if isinstance(part, str)]
    if failed:
        raise WorkError(
            f"{folder} could not be hashed ({'; '.join(failed)})", fix="check that disk"
        )
    if rank == 0:
        if (folder.parent / ARCHITECTURE_FILE).is_file():
            write_run_config(folder, read_architecture(folder.parent))
        records: dict[str, FileRecord] = {}
        for part in parts:
            assert not isinstance(part, str)
            records |= part
        # Files that belong to no rank: Megatron's common state and metadata, stability.json and
        # run_config.yaml.
        others = [
            file
            for file in folder.iterdir()
            if file.name not in records and file.name != MANIFEST_FILE
        ]
        write_manifest(folder, records | hash_files(others))
    torch.distributed.barrier()
