"""The checks of a release folder's weights: files, tensors, MTP head, dtype, values, hashes."""

from __future__ import annotations

from pathlib import Path

import torch

from conversion.huggingface.folder import HfFolder
from conversion.huggingface.format import CONFIG_FILE, dtype_name, listed, read_json
from conversion.huggingface.headers import (
    StoredTensor,
    check_names,
    check_shapes,
    one_dtype,
    present_fused,
    read_headers,
)
from conversion.jobs.weights_manifest import MANIFEST_FILE, Manifest, WeightRecord
from conversion.mapping import derive, huggingface_shapes
from conversion.release.check import Check, named_check
from conversion.release.config_checks import NEEDS_CONFIG
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError

FINITE, MANIFEST = "finite", "manifest"

_NEEDS_WEIGHTS = "needs weight files that can be read"

Tensors = dict[str, StoredTensor]


def weight_checks(folder: Path, announced: Mellum2Architecture | None) -> list[Check]:
    """Return every check of the weights.

    Args:
        folder: Hugging Face folder.
        announced: architecture in its config.json; None if that cannot be read.
    """
    checks = [files(folder)]
    readable = checks[0].status == "pass"
    if announced is None or not readable:
        why = NEEDS_CONFIG if readable else _NEEDS_WEIGHTS
        later = (tensor_names.name, mtp_head.name, shapes.name, dtypes.name, FINITE, MANIFEST)
        return checks + [Check.not_applicable(name, why) for name in later]
    tensors = read_headers(folder)  # the second reading of a few MB
    # Names and shapes are compared as if config.json announced the MTP head that the tensors have:
    # a dropped head then fails its own check alone. The type of an unannounced MTP layer is
    # unknown, but no name or shape depends on it.
    present = int(any(name.startswith("mtp.") for name in tensors))
    architecture = announced
    if present != announced.num_mtp_layers:
        types = ("sliding_attention",) if present else ()
        architecture = announced.replace(num_mtp_layers=present, mtp_layer_types=types)
    checks += [
        tensor_names(folder, tensors, architecture),
        mtp_head(announced.num_mtp_layers, present),
        shapes(folder, tensors, architecture),
        dtypes(folder, tensors),
    ]
    if any(check.status == "fail" for check in checks):
        why = "needs tensors that agree with config.json"
        return checks + [Check.not_applicable(name, why) for name in (FINITE, MANIFEST)]
    return checks + _content_checks(folder)


@named_check("files")
def files(folder: Path) -> str:
    """Every safetensors file is complete, and the index agrees with them."""
    tensors = read_headers(folder)
    count = len({tensor.file for tensor in tensors.values()})
    return f"{count} safetensors file{'s' * (count != 1)}, {len(tensors)} tensors"


@named_check("tensors")
def tensor_names(folder: Path, tensors: Tensors, architecture: Mellum2Architecture) -> str:
    """No tensor of the architecture is missing, and there is no other."""
    fused = present_fused(architecture, tensors)
    check_names(folder, derive(architecture), tensors, fused, architecture)
    return f"{len(tensors)} tensors, none missing, none extra"


@named_check("MTP head")
def mtp_head(announced: int, present: int) -> str:
    """The number of MTP layers in config.json is the number in the tensors."""
    value = f"num_nextn_predict_layers={announced}, {present} in the tensors"
    if announced > present:
        raise InputError(
            value,
            rule="an announced MTP head must be there (transformers' save_pretrained drops it)",
            fix="put it back with `mellum2 convert stitch-mtp SRC DST`, "
            "SRC being a folder that has it, or set num_nextn_predict_layers to 0",
        )
    if present > announced:
        raise InputError(
            value,
            rule="an MTP head that is there must be announced, or nobody uses it",
            fix="set num_nextn_predict_layers to 1 and mtp_layer_types",
        )
    return f"announced and present: {present}" if present else "neither announced nor present"


@named_check("shapes")
def shapes(folder: Path, tensors: Tensors, architecture: Mellum2Architecture) -> str:
    """Every tensor that belongs to the model has the shape config.json gives it."""
    fused = present_fused(architecture, tensors)
    expected = huggingface_shapes(derive(architecture))
    # Foreign names fail their own check.
    known = {name: tensor for name, tensor in tensors.items() if name in expected or name in fused}
    check_shapes(folder, expected, known, fused)
    return "as in config.json"


@named_check("dtypes")
def dtypes(folder: Path, tensors: Tensors) -> str:
    """All tensors share the dtype that config.json announces."""
    stored = dtype_name(one_dtype(folder, tensors))
    values = read_json(folder / CONFIG_FILE, "")
    # transformers renamed the key `torch_dtype` to `dtype` and reads both.
    announced = values.get("dtype", values.get("torch_dtype"))
    if announced != stored:
        raise InputError(
            f"dtype={announced!r} in {CONFIG_FILE}, tensors are {stored}",
            rule="loaders believe the config",
            fix=f"set dtype to {stored!r}",
        )
    return stored


def _content_checks(folder: Path) -> list[Check]:
    """Read every tensor once, for both checks of values: finite, and as the manifest hashes them.

    One tensor is in memory at a time.
    """
    # A folder made elsewhere has no manifest; one that cannot be read is a failure.
    manifest, manifest_check = None, Check.not_applicable(MANIFEST, f"no {MANIFEST_FILE}")
    try:
        manifest = Manifest.of_folder(folder)
    except InputError as error:
        manifest_check = Check.failed(MANIFEST, error)
    non_finite: list[str] = []
    records: dict[str, WeightRecord] = {}
    try:
        with HfFolder.open(folder) as opened:
            # Released names: tensors that are stored fused are hashed one expert at a time.
            names = [source.name for entry in opened.entries for source in entry.sources]
            for name in names:
                tensor = opened.tensor(name)
                count = int((~torch.isfinite(tensor)).sum())
                if count:
                    non_finite.append(f"{name} ({count} of {tensor.numel()})")
                if manifest is not None:
                    records[name] = WeightRecord.of(name, tensor)
    except InputError as error:
        if manifest is not None:
            manifest_check = Check.not_applicable(MANIFEST, _NEEDS_WEIGHTS)
        return [Check.failed(FINITE, error), manifest_check]
    if manifest is not None:
        manifest_check = same_hashes(manifest, records)
    return [finite(non_finite, len(names)), manifest_check]


@named_check(FINITE)
def finite(non_finite: list[str], count: int) -> str:
    """No tensor holds NaN or infinity."""
    if non_finite:
        raise InputError(
            f"NaN or infinity in {listed(non_finite)}",
            rule="weights are finite numbers",
            fix="release a checkpoint from before the training diverged, or export again",
        )
    return f"every value of {count} tensors"


@named_check(MANIFEST)
def same_hashes(manifest: Manifest, records: dict[str, WeightRecord]) -> str:
    """The tensors are those of the manifest."""
    # The union: a weight that is absent on one side differs too.
    names = manifest.records.keys() | records.keys()
    different = sorted(name for name in names if manifest.records.get(name) != records.get(name))
    if different:
        raise InputError(
            listed(different),
            rule=f"weights are those whose hashes {MANIFEST_FILE} lists",
            fix="copy the weights again; if they were changed on purpose, export again",
        )
    return f"{len(records)} hashes match"
