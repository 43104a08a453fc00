"""The import job: a Hugging Face folder becomes a Megatron checkpoint, one file a layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from conversion.huggingface.folder import HfFolder, dtype_name
from conversion.huggingface.writer import copy_generation_config, copy_tokenizer
from conversion.jobs.job import Checks, Job, Unit, entry_bytes, records_of
from conversion.jobs.reports import ConversionReport
from conversion.jobs.weights_manifest import Manifest, WeightRecord, write_manifest
from conversion.mapping import Entry, Same, extra_states, huggingface_shapes
from conversion.torch_dist.hashed_files import without_crc32
from conversion.torch_dist.writer import Chunk, TorchDistWriter, Written, group_file
from mellum2_megatron.checkpoint.bridge_config import write_run_config
from mellum2_megatron.checkpoint.folder import (
    RELEASE,
    TOKENIZER_FOLDER,
    write_architecture,
    write_tracker,
)

# What Megatron's load of a release looks at (training/checkpointing.py:load_checkpoint, 0.19.2):
# version 3 keeps it from reordering linear_qkv; the content metadata names the key layout written
# here.
COMMON_STATE = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
}


class ImportJob(Job):
    """Import ``source`` in ``dtype``, or as it is when None."""

    kind = "import"

    def __init__(
        self,
        source: HfFolder,
        target: Path,
        dtype: torch.dtype | None,
        *,
        workers: int,
        overwrite: bool,
        checks: Checks,
    ) -> None:
        super().__init__(target, workers=workers, overwrite=overwrite, checks=checks)
        self.source, self.architecture = source.path, source.architecture
        self.dtype = dtype or source.dtype
        self.manifest = Manifest.of_folder(source.path) if self.checks.hashes else None
        if self.manifest is not None:
            self.manifest.check_table(huggingface_shapes(source.entries), source.dtype)
        self._hf = source
        self._groups = [
            tuple(group) for _, group in groupby(source.entries, key=lambda entry: entry.group)
        ]
        self._records: list[list[WeightRecord]] = [[] for _ in self._groups]
        self.units = [
            Unit(
                name=str(number),
                file=f"{RELEASE}/{group_file(number)}",
                entries=group,
                nbytes=entry_bytes(group, self.dtype),
                peak=max(self._peak(entry) for entry in group),
            )
            for number, group in enumerate(self._groups)
        ]

    def source_files(self) -> Iterable[Path]:
        return self._hf.files

    def run(self) -> ConversionReport:
        with without_crc32():
            return super().run()

    def prepare(self) -> None:
        release = self.folder / RELEASE
        release.mkdir(exist_ok=True)
        self._writer = TorchDistWriter(
            release,
            [
                [self._chunk(entry, records) for entry in group]
                for group, records in zip(self._groups, self._records, strict=True)
            ],
            common=COMMON_STATE,
            empty_states=extra_states(self.architecture),
        )

    def convert(self, unit: Unit) -> tuple[dict[str, Any], int]:
        number = int(unit.name)
        written = self._writer.write_group(number)
        records = [asdict(record) for record in self._records[number]]
        return {"records": records, "written": asdict(written)}, written.file.size

    def finish(self, payloads: Sequence[dict[str, Any]]) -> None:
        write_manifest(self.folder / RELEASE, records_of(payloads))
        write_run_config(self.folder / RELEASE, self.architecture, dtype_name(self.dtype))
        self._writer.finish([Written.from_dict(payload["written"]) for payload in payloads])
        write_architecture(self.folder, self.architecture)
        copy_tokenizer(self.source, self.folder / TOKENIZER_FOLDER)
        copy_generation_config(self.source, self.folder)
        write_tracker(self.folder, None)

    def _chunk(self, entry: Entry, records: list[WeightRecord]) -> Chunk:
        def produce() -> torch.Tensor:
            parts, record = [], None
            for part in entry.sources:
                tensor, record = self.read_checked(
                    part.name, self._hf.tensor(part.name), self.manifest
                )
                parts.append(tensor)
            whole = entry.transform.join(parts, self.architecture)
            same = record is not None and whole is parts[-1]
            records.append(
                replace(record, name=entry.label)
                if record and same
                else WeightRecord.of(entry.label, whole)
            )
            self.passed(whole.nbytes)
            return whole

        return Chunk(
            key=entry.key,
            global_shape=entry.global_shape,
            offset=entry.offset,
            extent=entry.extent,
            dtype=self.dtype,
            produce=produce,
        )

    def _peak(self, entry: Entry) -> int:
        """The parts, converted where that is asked for, joined where there are several."""
        converted = self.dtype.itemsize if self.dtype != self._hf.dtype else 0
        joined = 0 if isinstance(entry.transform, Same) else self.dtype.itemsize
        return math.prod(entry.shape) * (self._hf.dtype.itemsize + converted + joined)
