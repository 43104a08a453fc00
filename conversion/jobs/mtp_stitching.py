"""The stitch job: a Hugging Face folder that lost its MTP head gets one from another folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from conversion.huggingface.folder import HfFolder
from conversion.huggingface.format import dtype_name
from conversion.huggingface.writer import copy_generation_config, copy_tokenizer
from conversion.jobs.job import ConversionJob, ConversionRequest, ConversionUnit, Progress
from conversion.jobs.safetensors_result import SafetensorsResult
from conversion.jobs.weights_manifest import Manifest
from conversion.mapping import Entry
from mellum2_megatron.common.errors import InputError

# Fields of the architecture that may differ between the two folders. None of them changes the
# meaning of the trunk's hidden states, which are the head's input.
_MAY_DIFFER = {
    "num_mtp_layers",
    "mtp_layer_types",
    "intermediate_size",
    "router_aux_loss_coef",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}


class StitchJob(ConversionJob):
    """Join ``trunk``'s tensors and ``head``'s ``mtp.*`` to one model, in ``trunk``'s dtype.

    Raises:
        InputError: ``head`` has no MTP head, is another model, or is the target.
    """

    kind = "stitch-mtp"

    def __init__(self, head: HfFolder, trunk: HfFolder, request: ConversionRequest) -> None:
        super().__init__(request)
        if not head.architecture.num_mtp_layers:
            raise InputError(
                f"{head.path} has no MTP head",
                rule="the head is copied from this folder",
                fix="give a folder that has one",
            )
        _require_same_trunk(head, trunk)
        # The engine itself refuses a target that is `source`, the trunk's folder.
        if request.target.resolve() == head.path.resolve():
            raise InputError(
                f"target {request.target}", rule="it must not be the source", fix="name another"
            )
        self.source, self.dtype = trunk.path, trunk.dtype
        self.source_files = [*trunk.files, *head.files]
        self.architecture = trunk.architecture.replace(
            num_mtp_layers=head.architecture.num_mtp_layers,
            mtp_layer_types=head.architecture.mtp_layer_types,
        )
        self._head, self._trunk = head, trunk
        hashes = request.checks.hashes
        self._trunk_manifest = Manifest.of_hf_folder(trunk) if hashes else None
        self._head_manifest = Manifest.of_hf_folder(head) if hashes else None
        self.has_manifest = self._trunk_manifest is not None
        self._result = SafetensorsResult(self.architecture, self.dtype)
        self.units = self._result.units(self._peak)

    def prepare(self, folder: Path) -> None:
        self._result.create(folder)

    def convert(
        self, unit: ConversionUnit, folder: Path, progress: Progress
    ) -> tuple[dict[str, Any], int]:
        """Write one part of a file: read, check and write each tensor in turn."""
        with self._result.open(folder, unit) as part:
            for source in (source for entry in unit.entries for source in entry.sources):
                if source.name.startswith("mtp."):
                    origin, manifest = self._head, self._head_manifest
                else:
                    origin, manifest = self._trunk, self._trunk_manifest
                checked = self.request.checks.apply(
                    source.name, origin.tensor(source.name), manifest=manifest, dtype=self.dtype
                )
                part.write(source, checked)
                progress(checked.tensor.nbytes)
                del checked  # before the next tensor is read
        return self._result.payload(unit, part)

    def finish(self, folder: Path, payloads: Sequence[dict[str, Any]]) -> None:
        self._result.finish(folder, payloads)
        copy_generation_config(self.source, folder)
        copy_tokenizer(self.source, folder)

    def _peak(self, entry: Entry) -> int:
        """Return the most bytes in memory for ``entry``: its tensors as read and as converted."""
        return math.prod(entry.shape) * (self.dtype.itemsize + self._head.dtype.itemsize)


def _require_same_trunk(head: HfFolder, trunk: HfFolder) -> None:
    """Refuse a head of another architecture, or of a dtype that the trunk's would round."""
    head_fields = head.architecture.to_dict()
    for name, value in trunk.architecture.to_dict().items():
        if value != head_fields[name] and name not in _MAY_DIFFER:
            raise InputError(
                f"{name}={head_fields[name]!r} in {head.path}, {value!r} in {trunk.path}",
                rule="an MTP head fits the model it was trained with",
                fix=f"give the checkpoint that {trunk.path} was trained from",
            )
    # float32 holds every value of bfloat16 and float16.
    if trunk.dtype not in (head.dtype, torch.float32):
        dtype = dtype_name(head.dtype)
        raise InputError(
            f"{head.path} is {dtype}, {trunk.path} is {dtype_name(trunk.dtype)}",
            rule="a head is not rounded in passing",
            fix=f"convert one of them first (import, then export --torch-dtype {dtype})",
        )
