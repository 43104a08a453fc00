"""``weights_manifest.json``: name, shape, dtype and SHA-256 of every tensor written, beside what
was written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from conversion.huggingface.folder import dtype_name, listed, read_json, tensor_bytes
from conversion.mapping import Shape
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import write_json

MANIFEST_FILE = "weights_manifest.json"

_CHANGED = (
    "copy the folder again from where it was written; if the weights were changed on purpose, delete "
    f"{MANIFEST_FILE}, which describes the old ones"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightRecord:
    """One written tensor; ``sha256`` is of its values in row-major, little-endian order."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> WeightRecord:
        """Hash ``tensor``."""
        digest = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        return cls(
            name=name, shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype), sha256=digest
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WeightRecord:
        """The inverse of `dataclasses.asdict`, through JSON."""
        return cls(**values | {"shape": tuple(values["shape"])})


class Manifest:
    """What a folder's manifest says of its tensors, to hold what is read against it."""

    def __init__(self, path: Path, records: Mapping[str, WeightRecord]) -> None:
        self.path = path
        self.records = records

    @classmethod
    def of_folder(cls, folder: Path) -> Manifest | None:
        """Read the manifest of ``folder``; None where there is none.

        Raises:
            InputError: it is damaged.
        """
        path = folder / MANIFEST_FILE
        if not path.exists():
            return None
        weights = read_json(path, "it was just there").get("weights")
        try:
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

    def check_table(
        self, shapes: Mapping[str, Shape], dtype: torch.dtype | Mapping[str, torch.dtype]
    ) -> None:
        """Compare names, shapes and dtypes with those of the weights; no weight is read.

        Raises:
            InputError: naming what differs.
        """
        dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
        if differ := sorted(set(shapes) ^ set(self.records)):
            where = "lists" if differ[0] in self.records else "does not list"
            raise InputError(
                f"{self.path} {where} {listed(differ)}",
                rule="it describes the weights",
                fix=_CHANGED,
            )
        for name, shape in shapes.items():
            record = self.records[name]
            if (record.shape, record.dtype) != (tuple(shape), dtype_name(dtypes[name])):
                raise InputError(
                    f"tensor {name!r} is {dtype_name(dtypes[name])} {list(shape)}, {self.path} lists {record.dtype} "
                    f"{list(record.shape)}",
                    rule="it describes the weights",
                    fix=_CHANGED,
                )

    def check(self, found: WeightRecord) -> None:
        """Compare the hash of a tensor that was read.

        Raises:
            InputError: naming it.
        """
        listed_hash = self.records[found.name].sha256
        if found.sha256 != listed_hash:
            raise InputError(
                f"tensor {found.name!r} has SHA-256 {found.sha256[:12]}..., {self.path} lists {listed_hash[:12]}...",
                rule="its values must be those that were written",
                fix=f"{_CHANGED}, or pass --skip-hashes",
            )


def write_manifest(folder: Path, records: Iterable[WeightRecord]) -> None:
    """Write the manifest into ``folder``, sorted by name."""
    write_json(
        folder / MANIFEST_FILE,
        {"weights": [asdict(r) for r in sorted(records, key=lambda r: r.name)]},
    )
