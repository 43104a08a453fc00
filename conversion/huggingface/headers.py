"""Headers of a folder's safetensors files, compared with its index and with the architecture.

All errors in a folder's tensors, except in their values, are found here before a weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from conversion.huggingface.format import (
    CONFIG_FILE,
    DTYPES,
    INDEX_FILE,
    PICKLED,
    WEIGHTS_FILE,
    dtype_name,
    listed,
    read_json,
)
from conversion.mapping import Entry, FusedTensor, fused_experts, huggingface_shapes
from mellum2_megatron.architecture import Mellum2Architecture, Shape
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.json_files import JsonError, parse_object
from mellum2_megatron.common.model_folders import check_inside

_BY_SAFETENSORS = dict(DTYPES.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor as a safetensors header describes it.

    Attributes:
        file: file that holds it.
        dtype: safetensors' name, ``BF16``.
        shape: sizes of its axes.
        position: position of its first byte in the file.
    """

    file: Path
    dtype: str
    shape: Shape
    position: int


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the folder's safetensors files by name.

    Raises:
        InputError: no weights, a damaged file, a tensor in two files, or an index that differs
            from the files.
    """
    files = sorted(folder.glob("*.safetensors"))
    names = [file.name for file in files]
    index = folder / INDEX_FILE
    weight_map = _read_index(index) if index.exists() else None
    if not files:
        if pickled := sorted(file.name for pattern in PICKLED for file in folder.glob(pattern)):
            raise InputError(
                f"{folder}: {listed(pickled)}",
                rule=(
                    "only safetensors weights are read; "
                    "pickled files can run code and are never opened"
                ),
                fix="save the model as safetensors where you trust its source",
            )
        raise InputError(
            f"{folder}: no *.safetensors",
            rule="the folder must hold weights",
            fix="give a complete folder",
        )
    # File names before file contents: a missing or foreign file explains most errors in tensors.
    if weight_map is not None:
        if missing := sorted(set(weight_map.values()) - set(names)):
            raise InputError(
                f"{folder}: {listed(missing)} missing",
                rule=f"{INDEX_FILE} names these files",
                fix="copy the missing files, each directly into the folder",
            )
        if extra := sorted(set(names) - set(weight_map.values())):
            raise InputError(
                f"{folder}: {listed(extra)} not named in {INDEX_FILE}",
                rule="every safetensors file belongs to the checkpoint",
                fix="remove the files that do not",
            )
    elif names != [WEIGHTS_FILE]:
        raise InputError(
            f"{folder}: {listed(names)} without {INDEX_FILE}",
            rule=f"weights are either one {WEIGHTS_FILE} or several files with an index",
            fix="copy the index file too",
        )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read_header(folder, file).items():
            if name in tensors:
                raise InputError(
                    f"{folder}: tensor {name!r} in {tensors[name].file.name} and {file.name}",
                    rule="a tensor is stored once",
                    fix="remove the file that does not belong to this checkpoint",
                )
            tensors[name] = tensor
    if weight_map is not None:
        _check_index_names(index, weight_map, tensors)
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """Return the index's map of tensor names to file names."""
    weight_map = read_json(path, "it is named here").get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise InputError(
            str(path),
            rule="weight_map must map tensor names to file names",
            fix="copy the index again",
        )
    return weight_map


def _check_index_names(
    index: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]
) -> None:
    """Raise InputError unless the index names the headers' tensors, each with its file."""
    wrong = sorted(
        name
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].file.name != file
    )
    if wrong:
        raise InputError(
            f"{index}: {listed(wrong)}",
            rule="a tensor must be in the file the index names",
            fix="copy both again",
        )
    if unlisted := sorted(set(tensors) - set(weight_map)):
        raise InputError(
            f"{index}: {listed(unlisted)} not listed",
            rule="the index lists every tensor of its files",
            fix="copy the index and the files from one checkpoint",
        )


def _read_header(folder: Path, file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file by name.

    Raises:
        InputError: a link out of the folder, a damaged file, or a name given twice.
    """
    check_inside(folder, file)
    try:
        if not file.is_file():
            raise OSError("no regular file")  # opening a pipe would wait for ever
        # The library compares sizes and offsets with the file. But it keeps the last of two equal
        # names in silence, so the header is parsed here once more.
        with safe_open(file, framework="pt"):
            pass
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = parse_object(stream.read(size))
    except (SafetensorError, OSError, JsonError) as error:
        raise InputError(
            str(file),
            rule=f"it must be a complete safetensors file ({error})",
            fix="it is truncated or damaged: copy or download it again",
        ) from error
    # ``__metadata__`` is no tensor but the writer's free text.
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            file=file,
            dtype=info["dtype"],
            shape=tuple(info["shape"]),
            # The header's size takes 8 bytes; offsets count from the end of the header.
            position=8 + size + info["data_offsets"][0],
        )
        for name, info in header.items()
    }


def present_fused(
    architecture: Mellum2Architecture, tensors: dict[str, StoredTensor]
) -> dict[str, FusedTensor]:
    """Return transformers' fused expert tensors among ``tensors``, by name."""
    return {name: fused for name, fused in fused_experts(architecture).items() if name in tensors}


def check_names(
    folder: Path,
    entries: list[Entry],
    tensors: dict[str, StoredTensor],
    fused: dict[str, FusedTensor],
    architecture: Mellum2Architecture,
) -> None:
    """Compare the tensors' names with the architecture.

    Args:
        folder: folder, for messages.
        entries: entries of the mapping table for ``architecture``.
        tensors: stored tensors by name.
        fused: fused expert tensors among them, by name.
        architecture: architecture in the folder's config.json.

    Raises:
        InputError: tensors missing or extra, or experts stored both fused and one by one.
    """
    expected = set(huggingface_shapes(entries))
    for part in fused.values():
        if twice := sorted(set(part.slices) & set(tensors)):
            raise InputError(
                f"{folder}: {listed(twice)} beside {part.name!r}",
                rule="experts are stored either one by one or fused, not both",
                fix="remove one of the two",
            )
        # The fused tensor stands in for all the tensors it holds.
        expected = expected - set(part.slices) | {part.name}
    if missing := sorted(expected - set(tensors)):
        fix = "give a complete checkpoint whose config.json is its own"
        has_mtp = any(name.startswith("mtp.") for name in tensors)
        if not has_mtp and all(name.startswith("mtp.") for name in missing):
            fix = (
                "its MTP head was dropped (transformers' save_pretrained does so): "
                f"put it back with `mellum2 convert stitch-mtp SRC {folder}`, "
                "SRC being a folder that has it, "
                "or set num_nextn_predict_layers to 0 in config.json to do without"
            )
        raise InputError(
            f"{folder}: {listed(missing)} missing",
            rule=f"{CONFIG_FILE} describes a model that has them",
            fix=fix,
        )
    if extra := sorted(set(tensors) - expected):
        fix = "give a checkpoint whose config.json is its own"
        if not architecture.num_mtp_layers and all(name.startswith("mtp.") for name in extra):
            fix = "set num_nextn_predict_layers to 1 in config.json to keep the MTP head"
        raise InputError(
            f"{folder}: {listed(extra)} not part of the model",
            rule=f"{CONFIG_FILE} describes a model without them",
            fix=fix,
        )


def check_shapes(
    folder: Path,
    shapes: dict[str, Shape],
    tensors: dict[str, StoredTensor],
    fused: dict[str, FusedTensor],
) -> None:
    """Compare the tensors' shapes with the architecture's.

    Args:
        folder: folder, for messages.
        shapes: expected shape of each released tensor by name.
        tensors: stored tensors by name.
        fused: fused expert tensors among them, by name.

    Raises:
        InputError: tensors of another shape.
    """
    expected = shapes | {name: part.shape for name, part in fused.items()}
    wrong = [
        f"{name} {list(tensor.shape)} (expected {list(expected[name])})"
        for name, tensor in tensors.items()
        if tensor.shape != expected[name]
    ]
    if wrong:
        raise InputError(
            f"{folder}: {listed(wrong)}",
            rule=f"shapes follow from {CONFIG_FILE}",
            fix="give a checkpoint whose config.json is its own",
        )


def stored_dtypes(folder: Path, tensors: dict[str, StoredTensor]) -> dict[str, torch.dtype]:
    """Return the dtype of each tensor by name.

    Raises:
        InputError: one that is not in `DTYPES`.
    """
    # By safetensors' names: torch may have no dtype for a quantised format.
    by_dtype: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        by_dtype.setdefault(tensor.dtype, []).append(name)
    for dtype, names in by_dtype.items():
        if dtype not in _BY_SAFETENSORS:
            raise InputError(
                f"{folder}: {listed(names)} of dtype {dtype}",
                rule="weights are stored as one of " + ", ".join(_BY_SAFETENSORS),
                fix="save it as float32" if dtype == "F64" else "convert an unquantised checkpoint",
            )
    return {name: _BY_SAFETENSORS[tensor.dtype] for name, tensor in tensors.items()}


def one_dtype(folder: Path, tensors: dict[str, StoredTensor]) -> torch.dtype:
    """Return the dtype that all tensors share.

    Raises:
        InputError: several dtypes, or one that is not in `DTYPES`.
    """
    by_dtype: dict[torch.dtype, list[str]] = {}
    for name, dtype in stored_dtypes(folder, tensors).items():
        by_dtype.setdefault(dtype, []).append(name)
    if len(by_dtype) > 1:
        # Tensors of the rarer dtypes are the likely mistake: the message names them.
        common, *others = sorted(by_dtype, key=lambda dtype: -len(by_dtype[dtype]))
        odd = [f"{name} ({dtype_name(dtype)})" for dtype in others for name in by_dtype[dtype]]
        raise InputError(
            f"{folder}: {listed(odd)} beside {dtype_name(common)}",
            rule="all tensors of a release have one dtype",
            fix=f"store them as {dtype_name(common)}",
        )
    return next(iter(by_dtype))
