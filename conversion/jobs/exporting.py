"""The export job: a Megatron checkpoint becomes a Hugging Face folder, several layers of a file at
a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from conversion.huggingface.folder import GENERATION_CONFIG_FILE, dtype_name, listed, torch_dtype
from conversion.huggingface.writer import copy_generation_config, copy_tokenizer
from conversion.jobs.job import Checks
from conversion.jobs.safetensors_job import SafetensorsJob
from conversion.jobs.weights_manifest import Manifest, WeightRecord
from conversion.mapping import Entry, Same, derive
from conversion.torch_dist.reader import TorchDistReader
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.checkpoint import CheckpointFolder
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import write_json

logger = logging.getLogger(__name__)


class ExportJob(SafetensorsJob):
    """Export ``checkpoint``, which ``reader`` has open, in ``dtype``, or as it is when None."""

    kind = "export"

    def __init__(
        self,
        checkpoint: CheckpointFolder,
        reader: TorchDistReader,
        target: Path,
        dtype: torch.dtype | None,
        tokenizer: Path | None,
        *,
        workers: int,
        overwrite: bool,
        checks: Checks,
    ) -> None:
        super().__init__(target, workers=workers, overwrite=overwrite, checks=checks)
        self.source, self.architecture, self._checkpoint = (
            checkpoint.root,
            checkpoint.architecture,
            checkpoint,
        )
        self._reader = reader
        self.dtype = dtype or _one_dtype(self._reader)
        self._tokenizer = _tokenizer_dir(checkpoint, tokenizer)
        entries = derive(self.architecture)
        self.manifest = Manifest.of_folder(checkpoint.iteration_dir) if self.checks.hashes else None
        if self.manifest is not None:
            dtypes = {entry.label: self._reader.tensors[entry.key].dtype for entry in entries}
            self.manifest.check_table({entry.label: entry.shape for entry in entries}, dtypes)
        self.plan_units()

    def source_files(self) -> Iterable[Path]:
        return sorted(path for path in self._checkpoint.iteration_dir.iterdir() if path.is_file())

    def finish(self, payloads: Sequence[dict[str, Any]]) -> None:
        super().finish(payloads)
        if not copy_generation_config(self._checkpoint.root, self.folder):
            write_json(self.folder / GENERATION_CONFIG_FILE, generation_config(self.architecture))
        if self._tokenizer is None or not copy_tokenizer(self._tokenizer, self.folder):
            logger.info("%s has no tokenizer, so %s has none either", self.source, self.target)

    def parts(self, entry: Entry) -> list[tuple[torch.Tensor, WeightRecord | None]]:
        stored = self._reader.read(entry.key, entry.offset, entry.extent).reshape(entry.shape)
        whole, record = self.read_checked(entry.label, stored, self.manifest)
        parts = entry.transform.split(whole, self.architecture)
        self.passed(whole.nbytes)
        return [(part, record if part is whole else None) for part in parts]

    def peak(self, entry: Entry) -> int:
        """A chunk and its copy, converted where that is asked for, cut up where there are several
        parts."""
        stored = self._reader.tensors[entry.key]
        chunk = max(
            (math.prod(chunk.sizes) for chunk in stored.near(entry.offset, entry.extent)), default=0
        )
        converted = self.dtype.itemsize if self.dtype != stored.dtype else 0
        split = 0 if isinstance(entry.transform, Same) else self.dtype.itemsize
        return chunk * stored.dtype.itemsize + math.prod(entry.shape) * (
            stored.dtype.itemsize + converted + split
        )


def generation_config(architecture: Mellum2Architecture) -> dict[str, object]:
    """Return the generation_config.json that transformers would derive from the model's own
    config."""
    ids = {
        "bos_token_id": architecture.bos_token_id,
        "eos_token_id": list(architecture.eos_token_id)
        if isinstance(architecture.eos_token_id, tuple)
        else architecture.eos_token_id,
        "pad_token_id": architecture.pad_token_id,
    }
    return {
        "_from_model_config": True,
        **{name: value for name, value in ids.items() if value is not None},
    }


def _one_dtype(reader: TorchDistReader) -> torch.dtype:
    """The dtype all weights share; a mixed checkpoint needs the caller's choice."""
    by_dtype: dict[torch.dtype, list[str]] = {}
    for key, tensor in reader.tensors.items():
        by_dtype.setdefault(tensor.dtype, []).append(key)
    if len(by_dtype) > 1:
        raise InputError(
            f"{reader.folder}: weights in "
            + ", ".join(f"{dtype_name(d)} ({listed(k, 1)})" for d, k in by_dtype.items()),
            rule="a Hugging Face folder has one dtype",
            fix="choose it: --torch-dtype bfloat16",
        )
    dtype = next(iter(by_dtype))
    torch_dtype(dtype_name(dtype))
    return dtype


def _tokenizer_dir(checkpoint: CheckpointFolder, given: Path | None) -> Path | None:
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

    top = max(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab().values(), default=-1)
    if top >= checkpoint.architecture.vocab_size:
        raise InputError(
            f"tokenizer {folder} has token id {top}",
            rule=f"the model's vocabulary has {checkpoint.architecture.vocab_size} entries",
            fix="give the tokenizer the model was trained with",
        )
    return folder
