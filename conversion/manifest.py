"""``weights_manifest.json``: name, shape, dtype and SHA-256 of every tensor written, beside what was written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from conversion.hf_folder import dtype_name, tensor_bytes
from mellum2_megatron.files import write_json

MANIFEST_FILE = "weights_manifest.json"


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
        return cls(name=name, shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype), sha256=digest)


def write_manifest(folder: Path, records: Iterable[WeightRecord]) -> None:
    """Write the manifest into ``folder``, sorted by name."""
    write_json(folder / MANIFEST_FILE, {"weights": [asdict(r) for r in sorted(records, key=lambda r: r.name)]})
