"""The stitch job: a Hugging Face folder that lost its MTP head gets one from another folder."""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from conversion.huggingface.dtypes import Dtypes
from conversion.huggingface.folder import HfFolder
from conversion.huggingface.format import (
    CARD_FILE,
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    INDEX_FILE,
    LICENSE_FILE,
    PICKLED,
    VERIFICATION_FILE,
    dtype_name,
    listed,
    read_json,
)
from conversion.huggingface.writer import TOKENIZER_FILES
from conversion.jobs.job import ConversionJob, ConversionRequest, ConversionUnit, Progress
from conversion.jobs.safetensors_result import SafetensorsResult
from conversion.jobs.weights_manifest import MANIFEST_FILE, Manifest, WeightRecord
from conversion.mapping import Entry, derive
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.model_folders import check_inside

logger = logging.getLogger(__name__)

# Files that the folder with the head lends to one that has none of that name.
_FROM_HEAD = {*TOKENIZER_FILES, GENERATION_CONFIG_FILE, CARD_FILE, LICENSE_FILE}

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
        self.source = trunk.path
        self.source_files = [*trunk.files, *head.files]
        self.architecture = trunk.architecture.replace(
            num_mtp_layers=head.architecture.num_mtp_layers,
            mtp_layer_types=head.architecture.mtp_layer_types,
        )
        self._head, self._trunk = head, trunk
        hashes = request.checks.hashes
        # A trunk's manifest that lists the lost head was written before save_pretrained. It is
        # compared, but the trunk may have been trained since: other hashes are no damage.
        self._trunk_manifest, self._stale_manifest = None, None
        if hashes and (manifest := Manifest.of_folder(trunk.path)) is not None:
            if any(name.startswith("mtp.") for name in manifest.records):
                self._stale_manifest = manifest
            else:
                self._trunk_manifest = Manifest.of_hf_folder(trunk)
        self._changed: list[str] = []
        self._head_manifest = Manifest.of_hf_folder(head) if hashes else None
        self.has_manifest = self._trunk_manifest is not None
        # Of two dtypes the trunk's wins, which `_require_same_trunk` allows if it is exact. In a
        # mixture each tensor keeps its own.
        own = {name: head.dtypes.by_name[name] for name in _head_names(head)}
        if trunk.dtypes.is_uniform and head.dtypes.is_uniform:
            own = dict.fromkeys(own, trunk.dtypes.main)
        entries = derive(self.architecture)
        self.dtypes = Dtypes(entries, {**trunk.dtypes.by_name, **own})
        self._result = SafetensorsResult(self.architecture, self.dtypes)
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
                    source.name,
                    origin.tensor(source.name),
                    manifest=manifest,
                    dtype=self.dtypes.by_name[source.name],
                )
                if origin is self._trunk and self._stale_manifest is not None:
                    before = self._stale_manifest.records.get(source.name)
                    if before != WeightRecord.of(source.name, checked.tensor):
                        self._changed.append(source.name)
                part.write(source, checked)
                progress(checked.tensor.nbytes)
                del checked  # before the next tensor is read
        return self._result.payload(unit, part)

    def finish(self, folder: Path, payloads: Sequence[dict[str, Any]]) -> None:
        self._result.finish(folder, payloads)
        if self._changed:
            logger.warning(
                "%s is older than the weights of %s: %s changed since (by training, or damaged)",
                MANIFEST_FILE,
                self.source,
                listed(sorted(self._changed)),
            )
        written = {path.name for path in folder.iterdir()}
        own = [file for file in _documents(self.source) if str(file) not in written]
        for file in own:
            _copy(self.source, folder, file)
        # What save_pretrained into a new folder does not write. The head's model is the one that
        # the trunk was trained from.
        missing = [
            Path(name)
            for name in sorted(_FROM_HEAD)
            if (self._head.path / name).is_file() and not (folder / name).exists()
        ]
        for file in missing:
            _copy(self._head.path, folder, file)
        if missing:
            logger.warning(
                "taken from %s, because %s has none: %s",
                self._head.path,
                self.source,
                listed([str(file) for file in missing], len(missing)),
            )
        if (folder / VERIFICATION_FILE).exists() and not _card_holds(folder):
            (folder / VERIFICATION_FILE).unlink()
            logger.warning(
                "%s is left out: it is about other files; `mellum2 check-release` checks these",
                VERIFICATION_FILE,
            )

    def _peak(self, entry: Entry) -> int:
        """Return the most bytes in memory for ``entry``: its tensors as read and as converted."""
        sizes = [dtypes.main.itemsize for dtypes in (self.dtypes, self._head.dtypes)]
        return math.prod(entry.shape) * sum(sizes)


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
    if not (trunk.dtypes.is_uniform and head.dtypes.is_uniform):
        return
    if trunk.dtypes.main not in (head.dtypes.main, torch.float32):
        dtype = dtype_name(head.dtypes.main)
        raise InputError(
            f"{head.path} is {dtype}, {trunk.path} is {dtype_name(trunk.dtypes.main)}",
            rule="a head is not rounded in passing",
            fix=f"convert one of them first (import, then export --torch-dtype {dtype})",
        )


def _head_names(head: HfFolder) -> list[str]:
    names = (source.name for entry in head.entries for source in entry.sources)
    return [name for name in names if name.startswith("mtp.")]


def _documents(folder: Path) -> list[Path]:
    """Return every file of a model's folder but weights and config, relative to it.

    Hidden files are left out, and those that can run code, which no released folder may hold; a
    warning names the latter.
    """
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.parts)]
    unsafe = [file for file in files if any(file.match(name) for name in (*PICKLED, "*.py"))]
    if unsafe:
        logger.warning(
            "left out, because they can run code: %s", listed([str(file) for file in unsafe])
        )
    described = {CONFIG_FILE, INDEX_FILE, MANIFEST_FILE}
    return [
        file
        for file in files
        if file not in unsafe and file.suffix != ".safetensors" and str(file) not in described
    ]


def _copy(source: Path, target: Path, file: Path) -> None:
    """Copy a file of ``source`` to the same place in ``target``.

    Raises:
        InputError: it is a link out of ``source``.
    """
    check_inside(source, source / file)
    (target / file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / file, target / file)


def _card_holds(folder: Path) -> bool:
    """Return True if every file in the folder's verification card has the hash that it lists."""
    try:
        hashes = read_json(folder / VERIFICATION_FILE, "it was just there").get("files")
        return isinstance(hashes, dict) and all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected
            for name, expected in hashes.items()
        )
    except (InputError, OSError):
        return False
