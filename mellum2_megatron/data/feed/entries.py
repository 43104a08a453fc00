"""The sets that a run's ``data`` section names, before any file of them is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mellum2_megatron.data.phase_record import phase_folder, read_phase

if TYPE_CHECKING:
    from mellum2_megatron.config import Data
    from mellum2_megatron.data.corpus.selection import Split


def entries(data: Data, split: Split) -> tuple[tuple[str, float, str], ...]:
    """Return (key, weight, folder or prefix) of each source of a split.

    Training: ``data.train``, else the sources of ``data.phase``, else ``data.path``. Validation:
    ``data.valid``, else that of the training's folders, each with its own validation split, else
    ``data.path``.
    """
    given = data.train if split == "train" else data.valid
    if given:
        return tuple((f"data.{split}", weight, entry) for weight, entry in given)
    if split == "valid":
        folders = [(weight, entry) for weight, entry in data.train if Path(entry).is_dir()]
        if folders:
            return tuple(("data.train", weight, entry) for weight, entry in folders)
    if data.phase is not None:
        folder = phase_folder(data.path, data.phase)
        if not folder.is_dir():
            # A run can be planned without its data; `sources` refuses it.
            return (("data.phase", 1.0, str(folder)),)
        record = read_phase(data.path, data.phase)
        return tuple(
            ("data.phase", share, str(folder / source)) for source, share in record.shares.items()
        )
    return (("data.path", 1.0, data.path),)


def tokenizer_folder(data: Data) -> Path:
    """Return the tokenizer's folder.

    It is ``data.tokenizer``, else that of the first folder in ``data.train``, else that of
    ``data.path``.
    """
    if data.tokenizer is not None:
        return Path(data.tokenizer)
    for _, entry in data.train:
        if Path(entry).is_dir():
            return Path(entry) / "tokenizer"
    return Path(data.path) / "tokenizer"


def prefixes(data: Data, split: Split) -> tuple[tuple[float, str], ...]:
    """Return (weight, prefix) of each source of a split, without looking at the files."""
    return tuple(
        (
            weight,
            str(Path(entry) / f"{split}_document")
            if is_folder(key, entry) and not is_packs(entry)
            else entry,
        )
        for key, weight, entry in entries(data, split)
    )


def is_packs(entry: str) -> bool:
    """Return true if an entry names a folder of packs."""
    return (Path(entry) / "packs.json").is_file()


def is_absent(data: Data) -> bool:
    """Return true if no source of the training data is on this machine."""
    return not any(
        Path(entry).exists() or Path(f"{entry}.bin").exists()
        for _, _, entry in entries(data, "train")
    )


def is_folder(key: str, entry: str) -> bool:
    """Return true if an entry of `entries` names a folder, and false if it names a prefix."""
    return key == "data.path" or Path(entry).is_dir()
