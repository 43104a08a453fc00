"""The export job: a Megatron checkpoint becomes a Hugging Face folder.

Workers convert several layers at a time, into the same file too.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from conversion.huggingface.dtypes import Dtypes
from conversion.huggingface.format import DTYPES, GENERATION_CONFIG_FILE, dtype_name
from conversion.huggingface.writer import (
    check_tokenizer,
    copy_generation_config,
    copy_tokenizer,
)
from conversion.jobs.job import (
    ConversionJob,
    ConversionRequest,
    ConversionUnit,
    Progress,
    result_dtypes,
)
from conversion.jobs.safetensors_result import SafetensorsResult
from conversion.jobs.tensor_checks import CheckedTensor
from conversion.jobs.weights_manifest import Manifest
from conversion.mapping import Entry, derive
from conversion.rows import Same
from conversion.torch_dist.reader import TorchDistReader
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.checkpoint import CheckpointFolder
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import write_json

logger = logging.getLogger(__name__)


class ExportJob(ConversionJob):
    """Export of ``checkpoint``, whose weights ``reader`` has open.

    Args:
        tokenizer: folder of tokenizer files; None: the checkpoint's own.
    """

    kind = "export"

    def __init__(
        self,
        checkpoint: CheckpointFolder,
        reader: TorchDistReader,
        request: ConversionRequest,
        tokenizer: Path | None,
    ) -> None:
        super().__init__(request)
        self.source = checkpoint.root
        # The chosen iteration alone: a training run may keep saving others beside it.
        self.source_files = sorted(
            path for path in checkpoint.iteration_dir.iterdir() if path.is_file()
        )
        self.architecture = checkpoint.architecture
        entries = derive(self.architecture)
        stored = Dtypes(entries, _stored_dtypes(reader, entries))
        self.dtypes = result_dtypes(reader.folder, entries, stored, request)
        self._reader = reader
        self._tokenizer = _tokenizer_dir(checkpoint, tokenizer)
        self._manifest = (
            Manifest.of_folder(checkpoint.iteration_dir) if request.checks.hashes else None
        )
        self.has_manifest = self._manifest is not None
        if self._manifest is not None:
            dtypes = {entry.label: reader.tensors[entry.key].dtype for entry in entries}
            self._manifest.check_table({entry.label: entry.shape for entry in entries}, dtypes)
        self._result = SafetensorsResult(self.architecture, self.dtypes)
        self.units = self._result.units(self._peak)

    def prepare(self, folder: Path) -> None:
        self._result.create(folder)

    def convert(
        self, unit: ConversionUnit, folder: Path, progress: Progress
    ) -> tuple[dict[str, Any], int]:
        """Write one part of a file: read, check, split, hash and write each entry in turn."""
        with self._result.open(folder, unit) as part:
            for entry in unit.entries:
                stored = self._reader.read(entry.key, entry.offset, entry.extent)
                megatron = self.request.checks.apply(
                    entry.label,
                    stored.reshape(entry.shape),
                    manifest=self._manifest,
                    dtype=self.dtypes.of(entry),
                )
                del stored  # a conversion to another dtype has made a copy
                tensors = entry.transform.split(megatron.tensor, self.architecture)
                for source, tensor in zip(entry.sources, tensors, strict=True):
                    # `Same.split` returns its only tensor, which the check has hashed already.
                    record = megatron.record if tensor is megatron.tensor else None
                    part.write(source, CheckedTensor(tensor, record))
                progress(megatron.tensor.nbytes)
                del megatron, tensors, tensor  # before the next entry is read
        return self._result.payload(unit, part)

    def finish(self, folder: Path, payloads: Sequence[dict[str, Any]]) -> None:
        self._result.finish(folder, payloads)
        if not copy_generation_config(self.source, folder):
            write_json(folder / GENERATION_CONFIG_FILE, generation_config(self.architecture))
        if self._tokenizer is None or not copy_tokenizer(self._tokenizer, folder):
            logger.info(
                "%s has no tokenizer, so %s has none either", self.source, self.request.target
            )

    def _peak(self, entry: Entry) -> int:
        """Return the most bytes in memory for ``entry``.

        They are a chunk of the checkpoint, the box cut out of it, and the copies of a dtype
        conversion and of a split.
        """
        stored = self._reader.tensors[entry.key]
        chunks = stored.chunks_overlapping(entry.offset, entry.extent)
        chunk = max((math.prod(chunk.sizes) for chunk in chunks), default=0)
        dtype = self.dtypes.of(entry)
        converted = dtype.itemsize if dtype != stored.dtype else 0
        split = 0 if isinstance(entry.transform, Same) else dtype.itemsize
        box = math.prod(entry.shape) * (stored.dtype.itemsize + converted + split)
        return chunk * stored.dtype.itemsize + box


def generation_config(architecture: Mellum2Architecture) -> dict[str, object]:
    """Return the generation_config.json that transformers would derive from config.json."""
    eos = architecture.eos_token_id
    ids = {
        "bos_token_id": architecture.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": architecture.pad_token_id,
    }
    present = {name: value for name, value in ids.items() if value is not None}
    return {"_from_model_config": True, **present}


def _stored_dtypes(reader: TorchDistReader, entries: Iterable[Entry]) -> dict[str, torch.dtype]:
    """Return the dtype of each Hugging Face tensor in a checkpoint, by name.

    Raises:
        InputError: one that is not in `format.DTYPES`.
    """
    dtypes: dict[str, torch.dtype] = {}
    for entry in entries:
        dtype = reader.tensors[entry.key].dtype
        if dtype_name(dtype) not in DTYPES:
            raise InputError(
                f"{reader.folder}: {entry.key} of dtype {dtype_name(dtype)}",
                rule="weights are stored as one of " + ", ".join(DTYPES),
                fix="save the model in one of them",
            )
        dtypes |= {source.name: dtype for source in entry.sources}
    return dtypes


def _tokenizer_dir(checkpoint: CheckpointFolder, given: Path | None) -> Path | None:
    """Return the folder to copy tokenizer files from.

    Args:
        given: the caller's folder, which must hold a tokenizer. None: the checkpoint's folder,
            which may lack one.

    Raises:
        InputError: no tokenizer in ``given``, or one with more tokens than the model.
    """
    folder = given if given is not None else checkpoint.tokenizer_dir
    if folder is None:
        return None
    if not (folder / "tokenizer.json").is_file():
        if given is None:
            return folder
        raise InputError(
            f"tokenizer {folder}",
            rule="it must be a folder with a tokenizer.json",
            fix="give a tokenizer folder",
        )
    check_tokenizer(folder, checkpoint.architecture)
    return folder
