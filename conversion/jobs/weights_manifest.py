"""``weights_manifest.json``: name, shape, dtype and SHA-256 of every tensor, beside the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from conversion.huggingface.folder import HfFolder
from conversion.huggingface.format import dtype_name, listed, read_json, tensor_bytes
from conversion.mapping import huggingface_shapes
from mellum2_megatron.architecture import Shape
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import write_json

MANIFEST_FILE = "weights_manifest.json"

_RULE = "it describes the weights"
_CHANGED = (
    "copy the folder again from where it was written; if the weights were changed on purpose, "
    f"delete {MANIFEST_FILE}, which describes the old ones"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightRecord:
    """One written tensor.

    Attributes:
        name: Hugging Face name, or `conversion.mapping.Entry.label` in a Megatron checkpoint.
        shape: sizes of its axes.
        dtype: torch's name, ``bfloat16``.
        sha256: hash of its values in row-major order, little-endian; hexadecimal.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> WeightRecord:
        """Hash ``tensor``."""
        # hashlib releases the interpreter's lock, so workers hash side by side.
        digest = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        return cls(
            name=name, shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype), sha256=digest
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WeightRecord:
        """Build a record from `dataclasses.asdict` values that JSON has stored, tuples as lists."""
        return cls(**values | {"shape": tuple(values["shape"])})


class Manifest:
    """The manifest of a folder, to compare with the tensors that are read.

    Attributes:
        path: manifest file.
        records: record of every tensor by name.
    """

    def __init__(self, path: Path, records: Mapping[str, WeightRecord]) -> None:
        self.path = path
        self.records = records

    @classmethod
    def of_folder(cls, folder: Path) -> Manifest | None:
        """Return the manifest of ``folder``; None if it has none.

        Raises:
            InputError: it is damaged.
        """
        path = folder / MANIFEST_FILE
        if not path.exists():
            return None
        weights = read_json(path, "it was just there").get("weights")
        try:
            # An empty list is damage too: every model has weights.
            records = [WeightRecord.from_dict(values) for values in weights or ()]
            if not records or not all(isinstance(record.sha256, str) for record in records):
                raise ValueError("no weights")
            return cls(path, {record.name: record for record in records})
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(
                str(path),
                rule=f"it must list name, shape, dtype and sha256 of each weight ({error})",
                fix=_CHANGED,
            ) from error

    @classmethod
    def of_hf_folder(cls, hf: HfFolder) -> Manifest | None:
        """Return the manifest of an open Hugging Face folder, its table checked; None if it has
        none.

        Raises:
            InputError: it is damaged, or describes other tensors.
        """
        manifest = cls.of_folder(hf.path)
        if manifest is not None:
            manifest.check_table(huggingface_shapes(hf.entries), hf.dtypes.by_name)
        return manifest

    def check_table(self, shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype]) -> None:
        """Compare names, shapes and dtypes with those of the weights; read no weight.

        Args:
            shapes: shape of every tensor by name.
            dtypes: dtype of every tensor by name.

        Raises:
            InputError: the first difference, by name.
        """
        if differing := sorted(set(shapes) ^ set(self.records)):
            verb = "lists" if differing[0] in self.records else "does not list"
            raise InputError(f"{self.path} {verb} {listed(differing)}", rule=_RULE, fix=_CHANGED)
        for name, shape in shapes.items():
            record = self.records[name]
            if (record.shape, record.dtype) != (tuple(shape), dtype_name(dtypes[name])):
                raise InputError(
                    f"tensor {name!r} is {dtype_name(dtypes[name])} {list(shape)}, "
                    f"{self.path} lists {record.dtype} {list(record.shape)}",
                    rule=_RULE,
                    fix=_CHANGED,
                )

    def check(self, record: WeightRecord) -> None:
        """Compare the hash of a tensor that was read.

        Raises:
            InputError: another hash, with the tensor's name.
        """
        expected = self.records[record.name].sha256
        if record.sha256 != expected:
            raise InputError(
                # Twelve digits are enough to recognise a hash, and leave the message readable.
                f"tensor {record.name!r} has SHA-256 {record.sha256[:12]}..., "
                f"{self.path} lists {expected[:12]}...",
                rule="its values must be those that were written",
                fix=f"{_CHANGED}, or pass --skip-hashes",
            )


def write_manifest(folder: Path, records: Iterable[WeightRecord]) -> None:
    """Write the manifest into ``folder``, sorted by name: the same bytes for any order of work."""
    ordered = sorted(records, key=lambda record: record.name)
    write_json(folder / MANIFEST_FILE, {"weights": [asdict(record) for record in ordered]})
