"""Jobs that write a Hugging Face folder: safetensors files of their final size, filled by several
workers."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any

import torch

from conversion.huggingface.folder import CONFIG_FILE, dtype_name
from conversion.huggingface.writer import (
    create_shard,
    plan_shards,
    shard_size,
    write_index,
    write_tensor,
)
from conversion.jobs.job import Job, Unit, entry_bytes, records_of
from conversion.jobs.weights_manifest import WeightRecord, write_manifest
from conversion.mapping import Entry, derive
from mellum2_megatron.architecture import to_hf_config
from mellum2_megatron.common.files import write_json


class SafetensorsJob(Job):
    """A job whose units are a layer's part of one file each."""

    @abstractmethod
    def parts(self, entry: Entry) -> list[tuple[torch.Tensor, WeightRecord | None]]:
        """Return an entry's Hugging Face tensors in its sources' order, each with a record of it if
        there is one."""

    @abstractmethod
    def peak(self, entry: Entry) -> int:
        """Bytes in memory at most while `parts` and the writing of an entry last."""

    def plan_units(self) -> None:
        """Set ``units``; for a subclass to call when ``architecture`` and ``dtype`` are known."""
        self._shards = plan_shards(derive(self.architecture), self.dtype)
        self._sizes = {shard.file: shard_size(shard, self.dtype) for shard in self._shards}
        self.units = [
            Unit(
                name=f"{shard.file}#{group}",
                file=shard.file,
                entries=(members := tuple(entries)),
                nbytes=entry_bytes(members, self.dtype),
                peak=max(self.peak(entry) for entry in members),
            )
            for shard in self._shards
            for group, entries in groupby(shard.entries, key=lambda entry: entry.group)
        ]

    def prepare(self) -> None:
        self._begins = {
            shard.file: create_shard(self.folder, shard, self.dtype) for shard in self._shards
        }

    def convert(self, unit: Unit) -> tuple[dict[str, Any], int]:
        records = []
        begins = self._begins[unit.file]
        with (self.folder / unit.file).open("r+b", buffering=0) as stream:
            for entry in unit.entries:
                for source, (tensor, record) in zip(entry.sources, self.parts(entry), strict=True):
                    if (tuple(tensor.shape), tensor.dtype) != (source.shape, self.dtype):
                        raise ValueError(
                            f"{source}: {tuple(tensor.shape)} {tensor.dtype} does not fit"
                        )
                    write_tensor(stream.fileno(), begins[source.name], tensor)
                    named = (
                        replace(record, name=source.name)
                        if record
                        else WeightRecord.of(source.name, tensor)
                    )
                    records.append(asdict(named))
            os.fsync(stream.fileno())
        return {"records": records}, self._sizes[unit.file]

    def finish(self, payloads: Sequence[dict[str, Any]]) -> None:
        write_index(self.folder, self._shards, self.dtype)
        write_manifest(self.folder, records_of(payloads))
        write_json(
            self.folder / CONFIG_FILE, to_hf_config(self.architecture, dtype_name(self.dtype))
        )
