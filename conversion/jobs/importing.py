"""The import job: a Hugging Face folder becomes a Megatron checkpoint, one file per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from conversion.huggingface.folder import HfFolder
from conversion.huggingface.format import dtype_name
from conversion.huggingface.writer import (
    TOKENIZER_FILE,
    check_tokenizer,
    copy_generation_config,
    copy_tokenizer,
)
from conversion.jobs.job import (
    ConversionJob,
    ConversionRequest,
    ConversionUnit,
    Progress,
    records_of,
    result_dtypes,
)
from conversion.jobs.reports import ConversionReport
from conversion.jobs.weights_manifest import Manifest, WeightRecord, write_manifest
from conversion.mapping import Entry, extra_states
from conversion.rows import Same
from conversion.torch_dist.writer import Chunk, TorchDistWriter, Written, group_file
from mellum2_megatron.checkpoint.bridge_config import write_run_config
from mellum2_megatron.checkpoint.folder import (
    RELEASE,
    TOKENIZER_FOLDER,
    write_architecture,
    write_tracker,
)
from mellum2_megatron.common.torch_checksums import without_crc32

# Megatron reads these when it loads a release (training/checkpointing.py:load_checkpoint, 0.19.2).
# Version 3 keeps it from reordering linear_qkv; the content metadata names our layout of keys.
COMMON_STATE = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
}


class ImportJob(ConversionJob):
    """Import of ``hf``. Each unit is a group of entries: embedding, a layer, head or MTP."""

    kind = "import"

    def __init__(self, hf: HfFolder, request: ConversionRequest) -> None:
        super().__init__(request)
        self.source, self.source_files = hf.path, hf.files
        self.architecture = hf.architecture
        self.dtypes = result_dtypes(hf.path, hf.entries, hf.dtypes, request)
        self._hf = hf
        if (hf.path / TOKENIZER_FILE).is_file():
            check_tokenizer(hf.path, self.architecture)
        self._manifest = Manifest.of_hf_folder(hf) if request.checks.hashes else None
        self.has_manifest = self._manifest is not None
        groups = [tuple(group) for _, group in groupby(hf.entries, key=lambda entry: entry.group)]
        self.units = [
            ConversionUnit(
                name=str(number),
                file=f"{RELEASE}/{group_file(number)}",
                entries=group,
                nbytes=self.dtypes.nbytes(group),
                peak=max(self._peak(entry) for entry in group),
            )
            for number, group in enumerate(groups)
        ]

    def run(self) -> ConversionReport:
        # Around all workers: torch's switch is process-wide.
        with without_crc32():
            return super().run()

    def prepare(self, folder: Path) -> None:
        (folder / RELEASE).mkdir(exist_ok=True)
        self._writer = TorchDistWriter(
            folder / RELEASE,
            [
                [Chunk.of_entry(entry, self.dtypes.of(entry)) for entry in unit.entries]
                for unit in self.units
            ],
            common=COMMON_STATE,
            empty_states=extra_states(self.architecture),
        )

    def convert(
        self, unit: ConversionUnit, folder: Path, progress: Progress
    ) -> tuple[dict[str, Any], int]:
        """Write one ``.distcp`` file: read, check, join, hash and write each entry in turn."""
        records = []
        with self._writer.open_group(int(unit.name)) as group:
            for entry in unit.entries:
                parts = [
                    self.request.checks.apply(
                        source.name,
                        self._hf.tensor(source.name),
                        manifest=self._manifest,
                        dtype=self.dtypes.of(entry),
                    )
                    for source in entry.sources
                ]
                tensor = entry.transform.join([part.tensor for part in parts], self.architecture)
                # `Same.join` returns its only part, which the check has hashed already.
                checked = parts[0].record if tensor is parts[0].tensor else None
                if checked is not None:
                    records.append(replace(checked, name=entry.label))
                else:
                    records.append(WeightRecord.of(entry.label, tensor))
                del parts  # one copy in memory while it is written, not two
                group.write(entry.key, entry.offset, tensor)
                progress(tensor.nbytes)
                del tensor  # before the parts of the next entry are read
        payload = {
            "records": [asdict(record) for record in records],
            "written": asdict(group.written),
        }
        return payload, group.written.file.size

    def finish(self, folder: Path, payloads: Sequence[dict[str, Any]]) -> None:
        # Before the writer's `finish`, which hashes every file of the folder.
        write_manifest(folder / RELEASE, records_of(payloads))
        write_run_config(folder / RELEASE, self.architecture, dtype_name(self.dtypes.main))
        self._writer.finish([Written.from_dict(payload["written"]) for payload in payloads])
        write_architecture(folder, self.architecture)
        copy_tokenizer(self.source, folder / TOKENIZER_FOLDER)
        copy_generation_config(self.source, folder)
        # None: the tracker names the release instead of an iteration.
        write_tracker(folder, None)

    def _peak(self, entry: Entry) -> int:
        """Return the most bytes in memory for ``entry``: parts as read, converted and joined."""
        stored, dtype = self._hf.dtypes.of(entry), self.dtypes.of(entry)
        converted = dtype.itemsize if dtype != stored else 0
        joined = 0 if isinstance(entry.transform, Same) else dtype.itemsize
        return math.prod(entry.shape) * (stored.itemsize + converted + joined)
