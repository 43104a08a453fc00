"""The stitch job: a Hugging Face folder that lost its MTP head gets it from another one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from conversion.huggingface.folder import HfFolder, dtype_name
from conversion.huggingface.writer import copy_generation_config, copy_tokenizer
from conversion.jobs.job import Checks
from conversion.jobs.safetensors_job import SafetensorsJob
from conversion.jobs.weights_manifest import Manifest, WeightRecord
from conversion.mapping import Entry, huggingface_shapes
from mellum2_megatron.common.errors import InputError

# What does not change what the trunk's hidden states mean to the head.
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
_MTP = "mtp."


class StitchJob(SafetensorsJob):
    """Write ``trunk``'s tensors and ``head``'s ``mtp.*`` as one model."""

    kind = "stitch-mtp"

    def __init__(
        self,
        head: HfFolder,
        trunk: HfFolder,
        target: Path,
        *,
        workers: int,
        overwrite: bool,
        checks: Checks,
    ) -> None:
        super().__init__(target, workers=workers, overwrite=overwrite, checks=checks)
        if not head.architecture.num_mtp_layers:
            raise InputError(
                f"{head.path} has no MTP head",
                rule="it is what is put back",
                fix="give a folder with it",
            )
        _require_same_trunk(head, trunk)
        if target.resolve() == head.path.resolve():
            raise InputError(
                f"target {target}", rule="it must not be the source", fix="name another"
            )
        self.source, self.dtype = trunk.path, trunk.dtype
        self._head, self._trunk = head, trunk
        self.architecture = trunk.architecture.replace(
            num_mtp_layers=head.architecture.num_mtp_layers,
            mtp_layer_types=head.architecture.mtp_layer_types,
        )
        self.manifest = _manifest(trunk) if checks.hashes else None
        self._head_manifest = _manifest(head) if checks.hashes else None
        self.plan_units()

    def source_files(self) -> Iterable[Path]:
        return [*self._trunk.files, *self._head.files]

    def finish(self, payloads: Sequence[dict[str, Any]]) -> None:
        super().finish(payloads)
        copy_generation_config(self.source, self.folder)
        copy_tokenizer(self.source, self.folder)

    def parts(self, entry: Entry) -> list[tuple[torch.Tensor, WeightRecord | None]]:
        parts = []
        for source in entry.sources:
            mtp = source.name.startswith(_MTP)
            folder, manifest = (
                (self._head, self._head_manifest) if mtp else (self._trunk, self.manifest)
            )
            part = self.read_checked(source.name, folder.tensor(source.name), manifest)
            self.passed(part[0].nbytes)
            parts.append(part)
        return parts

    def peak(self, entry: Entry) -> int:
        return math.prod(entry.shape) * (self.dtype.itemsize + self._head.dtype.itemsize)


def _require_same_trunk(head: HfFolder, trunk: HfFolder) -> None:
    ours, theirs = head.architecture.to_dict(), trunk.architecture.to_dict()
    for name, value in theirs.items():
        if value != ours[name] and name not in _MAY_DIFFER:
            raise InputError(
                f"{name}={ours[name]!r} in {head.path}, {value!r} in {trunk.path}",
                rule="an MTP head fits the model it was trained with",
                fix="give the checkpoint that the second one was trained from",
            )
    if trunk.dtype not in (head.dtype, torch.float32):
        raise InputError(
            f"{head.path} is {dtype_name(head.dtype)}, {trunk.path} is {dtype_name(trunk.dtype)}",
            rule="a head is not rounded in passing",
            fix=f"convert one of them first (import, then export --torch-dtype {dtype_name(head.dtype)})",
        )


def _manifest(folder: HfFolder) -> Manifest | None:
    manifest = Manifest.of_folder(folder.path)
    if manifest is not None:
        manifest.check_table(huggingface_shapes(folder.entries), folder.dtype)
    return manifest
