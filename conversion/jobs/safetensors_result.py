"""The safetensors files of a result: created at their final size, filled by several workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from conversion.huggingface.dtypes import Dtypes
from conversion.huggingface.format import CONFIG_FILE, dtype_name
from conversion.huggingface.writer import (
    create_shard,
    plan_shards,
    shard_size,
    write_index,
    write_tensor,
)
from conversion.jobs.job import ConversionUnit, records_of
from conversion.jobs.tensor_checks import CheckedTensor
from conversion.jobs.weights_manifest import WeightRecord, write_manifest
from conversion.mapping import Entry, Source, derive
from mellum2_megatron.architecture import Mellum2Architecture, to_hf_config
from mellum2_megatron.common.files import write_json


class SafetensorsPart:
    """One unit's part of a file while it is written.

    Attributes:
        records: record of each tensor written, in order.
    """

    def __init__(self, descriptor: int, positions: dict[str, int], dtypes: Dtypes) -> None:
        self.records: list[WeightRecord] = []
        self._descriptor, self._positions, self._dtypes = descriptor, positions, dtypes

    def write(self, source: Source, checked: CheckedTensor) -> None:
        """Write a tensor to its position in the file; hash it unless its check has done so."""
        tensor, record = checked
        # The header is on the disk already: a tensor of another size or dtype would be read back as
        # wrong values, and no error.
        dtype = self._dtypes.by_name[source.name]
        if (tuple(tensor.shape), tensor.dtype) != (source.shape, dtype):
            raise ValueError(f"{source}: {tuple(tensor.shape)} {tensor.dtype} does not fit")
        write_tensor(self._descriptor, self._positions[source.name], tensor)
        if record is None:
            self.records.append(WeightRecord.of(source.name, tensor))
        else:
            self.records.append(replace(record, name=source.name))


class SafetensorsResult:
    """A result in the released layout: weights, index, weights manifest and config.json."""

    def __init__(self, architecture: Mellum2Architecture, dtypes: Dtypes) -> None:
        self._architecture, self._dtypes = architecture, dtypes
        self._shards = plan_shards(derive(architecture), dtypes)
        self._sizes = {shard.file: shard_size(shard, dtypes) for shard in self._shards}
        self._positions: dict[str, dict[str, int]] = {}

    def units(self, peak: Callable[[Entry], int]) -> list[ConversionUnit]:
        """Return the units: the entries of one group in one file.

        Args:
            peak: function that returns the most memory for an entry, in bytes.
        """
        # Not a unit per file: a model of few files would leave workers idle, and an interruption
        # would lose up to 5 GB of work instead of a layer.
        units = []
        for shard in self._shards:
            for group, entries in groupby(shard.entries, key=lambda entry: entry.group):
                members = tuple(entries)
                unit = ConversionUnit(
                    name=f"{shard.file}#{group}",
                    file=shard.file,
                    entries=members,
                    nbytes=self._dtypes.nbytes(members),
                    peak=max(peak(entry) for entry in members),
                )
                units.append(unit)
        return units

    def create(self, folder: Path) -> None:
        """Create the files in ``folder``; keep those of an earlier attempt."""
        self._positions = {
            shard.file: create_shard(folder, shard, self._dtypes) for shard in self._shards
        }

    @contextmanager
    def open(self, folder: Path, unit: ConversionUnit) -> Iterator[SafetensorsPart]:
        """Yield the part of ``unit`` to write; it is on the disk when the block ends."""
        # Unbuffered and written by position, so that workers share a file without a lock.
        with (folder / unit.file).open("r+b", buffering=0) as stream:
            yield SafetensorsPart(stream.fileno(), self._positions[unit.file], self._dtypes)
            os.fsync(stream.fileno())

    def payload(self, unit: ConversionUnit, part: SafetensorsPart) -> tuple[dict[str, Any], int]:
        """Return the result of `ConversionJob.convert` for a finished unit."""
        return {"records": [asdict(record) for record in part.records]}, self._sizes[unit.file]

    def finish(self, folder: Path, payloads: Sequence[dict[str, Any]]) -> None:
        """Write index, weights manifest and config.json."""
        write_index(folder, self._shards, self._dtypes)
        write_manifest(folder, records_of(payloads))
        config = to_hf_config(self._architecture, dtype_name(self._dtypes.main))
        write_json(folder / CONFIG_FILE, config)
