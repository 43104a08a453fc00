"""The export job: a Megatron checkpoint becomes a Hugging Face folder.

Workers convert several layers at a time, into the same file too.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from conversion.huggingface.format import GENERATION_CONFIG_FILE, dtype_name, listed, torch_dtype
from conversion.huggingface.writer import copy_generation_config, copy_tokenizer
from conversion.jobs.job import ConversionJob, ConversionRequest, ConversionUnit, Progress
from conversion.jobs.safetensors_result import SafetensorsResult
from conversion.jobs.tensor_checks import CheckedTensor
from conversion.jobs.weights_manifest import Manifest
from conversion.mapping import Entry, Same, derive
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
        self.dtype = request.dtype or _one_dtype(reader)
        self._reader = reader
        self._tokenizer = _tokenizer_dir(checkpoint, tokenizer)
        self._manifest = (
            Manifest.of_folder(checkpoint.iteration_dir) if request.checks.hashes else None
        )
        self.has_manifest = self._manifest is not None
        if self._manifest is not None:
            entries = derive(self.architecture)
            dtypes = {entry.label: reader.tensors[entry.key].dtype for entry in entries}
            self._manifest.check_table({entry.label: entry.shape for entry in entries}, dtypes)
        self._result = SafetensorsResult(self.architecture, self.dtype)
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
                    dtype=self.dtype,
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
        converted = self.dtype.itemsize if self.dtype != stored.dtype else 0
        split = 0 if isinstance(entry.transform, Same) else self.dtype.itemsize
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


def _one_dtype(reader: TorchDistReader) -> torch.dtype:
    """Return the dtype that all weights share.

    Raises:
        InputError: weights of several dtypes, or of one that is not in `format.DTYPES`.
    """
    by_dtype: dict[torch.dtype, list[str]] = {}
    for key, tensor in reader.tensors.items():
        by_dtype.setdefault(tensor.dtype, []).append(key)
    if len(by_dtype) > 1:
        mixture = ", ".join(
            f"{dtype_name(dtype)} ({listed(keys, 1)})" for dtype, keys in by_dtype.items()
        )
        raise InputError(
            f"{reader.folder}: weights in {mixture}",
            rule="a Hugging Face folder has one dtype",
            fix="choose it: --torch-dtype bfloat16",
        )
    return torch_dtype(dtype_name(next(iter(by_dtype))))


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
    from tokenizers import Tokenizer

    # The largest id and not the count: ids may have gaps.
    top = max(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab().values(), default=-1)
    if top >= checkpoint.architecture.vocab_size:
        raise InputError(
            f"tokenizer {folder} has token id {top}",
            rule=f"the model's vocabulary has {checkpoint.architecture.vocab_size} entries",
            fix="give the tokenizer the model was trained with",
        )
    return folder
