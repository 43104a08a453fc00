"""Hugging Face model folders, read: everything checked first, then tensor by tensor.

`HfFolder.open` checks everything a folder can be checked for without reading weights (config,
index, every safetensors header against the architecture) and raises one InputError that says what
is wrong. Only safetensors files are opened; pickled weights (``*.bin``, ``*.pt``) never are.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open

from conversion.mapping import Entry, FusedTensor, Shape, derive, fused_experts, huggingface_shapes
from mellum2_megatron.architecture import Mellum2Architecture, from_hf_config
from mellum2_megatron.common.errors import InputError

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The dtypes a released model may be stored in: safetensors' name, torch's, and config.json's.
DTYPES: dict[str, tuple[str, torch.dtype]] = {
    "bfloat16": ("BF16", torch.bfloat16),
    "float16": ("F16", torch.float16),
    "float32": ("F32", torch.float32),
}
_BY_SAFETENSORS = dict(DTYPES.values())

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """``"bfloat16"`` -> ``torch.bfloat16``; InputError unless it is one of `DTYPES`."""
    if name not in DTYPES:
        raise InputError(
            f"dtype={name!r}",
            rule="weights are stored as one of " + ", ".join(DTYPES),
            fix="use bfloat16",
        )
    return DTYPES[name][1]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """What a safetensors header says of one tensor; ``begin`` is where its bytes begin in the
    file."""

    file: Path
    dtype: str
    shape: Shape
    begin: int


class HfFolder:
    """A checked Hugging Face folder of a Mellum 2 model; use as a context manager to read tensors.

    Attributes:
        path: the folder.
        architecture: from its config.json.
        entries: the mapping table for that architecture.
        dtype: the dtype all its tensors share.
        nbytes: size of its tensors.
    """

    def __init__(
        self, path: Path, architecture: Mellum2Architecture, tensors: dict[str, StoredTensor]
    ) -> None:
        self.path = path
        self.architecture = architecture
        self.entries = derive(architecture)
        self._tensors = tensors
        self._fused = present_fused(architecture, tensors)
        check_names(path, self.entries, tensors, self._fused, architecture)
        check_shapes(path, huggingface_shapes(self.entries), tensors, self._fused)
        self.dtype = one_dtype(path, tensors)
        self.nbytes = (
            sum(math.prod(tensor.shape) for tensor in tensors.values()) * self.dtype.itemsize
        )
        self._slices = {
            released: part
            for fused in self._fused.values()
            for released, part in fused.slices.items()
        }
        self._stack = ExitStack()
        self._open: dict[Path, BinaryIO] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, lost_mtp: bool = False) -> HfFolder:
        """Validate the folder at ``path``.

        Args:
            lost_mtp: the folder has no MTP head, although its config.json may announce one: read it
                as a model without.

        Raises:
            InputError: no such folder; a missing or malformed config.json or index; a config of
                another architecture; only pickled weights; a truncated or malformed safetensors
                file; tensors missing, extra, duplicated, misshapen, or of mixed or unsupported
                dtype.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise InputError(
                str(folder), rule="it must be a folder", fix="give the Hugging Face model's folder"
            )
        architecture, tensors = read_config(folder), read_headers(folder)
        if lost_mtp:
            architecture = architecture.replace(num_mtp_layers=0)
            if any(name.startswith("mtp.") for name in tensors):
                raise InputError(
                    f"{folder} has an MTP head",
                    rule="only a lost one is put back",
                    fix="use it as it is",
                )
        opened = cls(folder, architecture, tensors)
        config = read_json(folder / CONFIG_FILE, "it was just there")
        announced = config.get("dtype", config.get("torch_dtype"))
        if announced is not None and announced != dtype_name(opened.dtype):
            logger.warning(
                "%s announces dtype %s; its tensors are %s",
                folder,
                announced,
                dtype_name(opened.dtype),
            )
        return opened

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor of released name ``name``, cut out of a fused expert tensor where that
        is stored.

        Any thread may call it.
        """
        part = self._slices.get(name)
        stored = self._tensors[part.name if part is not None else name]
        shape, begin = stored.shape, stored.begin
        if part is not None:  # fused[expert, rows] is one run of bytes
            _, rows, columns = stored.shape
            shape = (part.rows.stop - part.rows.start, columns)
            begin += (part.expert * rows + part.rows.start) * columns * self.dtype.itemsize
        with self._lock:
            if stored.file not in self._open:
                self._open[stored.file] = self._stack.enter_context(
                    stored.file.open("rb", buffering=0)
                )
        return _read(self._open[stored.file], begin, shape, self.dtype)

    @property
    def files(self) -> list[Path]:
        """The files that say what the model is: config.json and those of the weights."""
        return sorted(
            {self.path / CONFIG_FILE, *(tensor.file for tensor in self._tensors.values())}
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.clear()
        self._stack.close()


def read_config(folder: Path) -> Mellum2Architecture:
    """Return the architecture that ``folder/config.json`` describes."""
    config = read_json(folder / CONFIG_FILE, "a Hugging Face model folder has it")
    try:
        return from_hf_config(config)
    except InputError as error:
        raise InputError(
            f"{folder / CONFIG_FILE}: {error.value}", rule=error.rule, fix=error.fix
        ) from error


def read_json(path: Path, why: str) -> dict[str, Any]:
    """Read a JSON object; InputError when it is absent, malformed, not an object, or names a key
    twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing", rule=why, fix="give a complete folder") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            str(path), rule=f"it must be readable ({error})", fix="check the file"
        ) from error
    return _parse_json(text, str(path))


def _parse_json(text: str, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                raise InputError(
                    f"{where}: key {name!r} twice",
                    rule="a key may appear once",
                    fix="remove one of them",
                )
            result[name] = value
        return result

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except ValueError as error:
        raise InputError(
            where, rule=f"it must be valid JSON ({error})", fix="copy the file again"
        ) from error
    if not isinstance(value, dict):
        raise InputError(where, rule="it must hold a JSON object", fix="copy the file again")
    return value


# -- reading: which files, what is in them
# ----------------------------------------------------------------------------


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the folder's safetensors files; the index, if any, must agree with the
    files."""
    index = folder / INDEX_FILE
    found = sorted(folder.glob("*.safetensors"))
    weight_map = _read_index(index) if index.exists() else None
    if not found:
        _refuse_no_weights(folder)
    if weight_map is not None:
        _check_index_files(folder, set(weight_map.values()), {file.name for file in found})
    elif [file.name for file in found] != [WEIGHTS_FILE]:
        raise InputError(
            f"{folder}: {listed([file.name for file in found])} without {INDEX_FILE}",
            rule=f"weights are either one {WEIGHTS_FILE} or several files with an index",
            fix="copy the index file too",
        )
    tensors: dict[str, StoredTensor] = {}
    for file in found:
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


def _refuse_no_weights(folder: Path) -> None:
    pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    if pickled:
        raise InputError(
            f"{folder}: {listed(pickled)}",
            rule="only safetensors weights are read; pickled files can run code and are never opened",
            fix="save the model as safetensors where you trust its source",
        )
    raise InputError(
        f"{folder}: no *.safetensors",
        rule="the folder must hold weights",
        fix="give a complete folder",
    )


def _read_index(path: Path) -> dict[str, str]:
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


def _check_index_files(folder: Path, named: set[str], found: set[str]) -> None:
    if missing := sorted(named - found):
        raise InputError(
            f"{folder}: {listed(missing)} missing",
            rule=f"{INDEX_FILE} names these files",
            fix="copy the missing files, each directly into the folder",
        )
    if extra := sorted(found - named):
        raise InputError(
            f"{folder}: {listed(extra)} not named in {INDEX_FILE}",
            rule="every safetensors file belongs to the checkpoint",
            fix="remove the files that do not",
        )


def _check_index_names(
    index: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]
) -> None:
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
    check_inside(folder, file)
    try:
        with safe_open(file, framework="pt"):
            pass  # the library checks sizes and offsets against the file; it keeps the last of two equal names
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            text = stream.read(size).decode("utf-8")
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise InputError(
            str(file),
            rule=f"it must be a complete safetensors file ({error})",
            fix="it is truncated or damaged: copy or download it again",
        ) from error
    header = _parse_json(text, str(file))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            file=file,
            dtype=info["dtype"],
            shape=tuple(info["shape"]),
            begin=8 + size + info["data_offsets"][0],
        )
        for name, info in header.items()
    }


def _read(stream: BinaryIO, begin: int, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    """Read a tensor's bytes into memory of its own: no mapping of a whole file, no seek to
    share."""
    tensor = torch.empty(shape, dtype=dtype)
    view, done = tensor_bytes(tensor), 0
    while done < len(view):
        count = os.preadv(stream.fileno(), [view[done:]], begin + done)
        if not count:
            raise InputError(
                stream.name, rule="it must not shrink while it is read", fix="convert a copy of it"
            )
        done += count
    return tensor


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's values in row-major order as bytes, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def check_inside(folder: Path, file: Path) -> None:
    """Refuse a link that leaves the folder; the Hugging Face cache's own (``snapshots/X/f ->
    blobs/Y``) may."""
    real, home = file.resolve(), folder.resolve()
    if not real.is_relative_to(home) and not real.is_relative_to(home.parent.parent / "blobs"):
        raise InputError(
            f"{file} -> {real}",
            rule="a link may not leave the model's folder",
            fix="copy the file itself into it",
        )


# -- reading: against the architecture
# --------------------------------------------------------------------------------


def present_fused(
    architecture: Mellum2Architecture, tensors: dict[str, StoredTensor]
) -> dict[str, FusedTensor]:
    """Those of transformers' fused expert tensors that a folder stores."""
    return {name: fused for name, fused in fused_experts(architecture).items() if name in tensors}


def check_names(
    folder: Path,
    entries: list[Entry],
    tensors: dict[str, StoredTensor],
    fused: dict[str, FusedTensor],
    architecture: Mellum2Architecture,
) -> None:
    """Refuse tensors missing or extra for the architecture, and experts stored both ways."""
    expected = set(huggingface_shapes(entries))
    for part in fused.values():
        if twice := sorted(set(part.slices) & set(tensors)):
            raise InputError(
                f"{folder}: {listed(twice)} beside {part.name!r}",
                rule="experts are stored either one by one or fused, not both",
                fix="remove one of the two",
            )
        expected = expected - set(part.slices) | {part.name}
    if missing := sorted(expected - set(tensors)):
        lost_mtp = all(name.startswith("mtp.") for name in missing) and not any(
            n.startswith("mtp.") for n in tensors
        )
        raise InputError(
            f"{folder}: {listed(missing)} missing",
            rule=f"{CONFIG_FILE} describes a model that has them",
            fix="its MTP head was dropped (transformers' save_pretrained does so): set num_nextn_predict_layers to 0 "
            "in config.json to convert without it"
            if lost_mtp
            else "give a complete checkpoint whose config.json is its own",
        )
    if extra := sorted(set(tensors) - expected):
        only_mtp = (
            all(name.startswith("mtp.") for name in extra) and not architecture.num_mtp_layers
        )
        raise InputError(
            f"{folder}: {listed(extra)} not part of the model",
            rule=f"{CONFIG_FILE} describes a model without them",
            fix="set num_nextn_predict_layers to 1 in config.json to keep the MTP head"
            if only_mtp
            else "give a checkpoint whose config.json is its own",
        )


def check_shapes(
    folder: Path,
    shapes: dict[str, Shape],
    tensors: dict[str, StoredTensor],
    fused: dict[str, FusedTensor],
) -> None:
    """Refuse tensors of another shape than the architecture gives them."""
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


def one_dtype(folder: Path, tensors: dict[str, StoredTensor]) -> torch.dtype:
    """The dtype that all tensors share; InputError for a mixture or another than `DTYPES`."""
    by_dtype: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        by_dtype.setdefault(tensor.dtype, []).append(name)
    for dtype, names in by_dtype.items():
        if dtype not in _BY_SAFETENSORS:
            raise InputError(
                f"{folder}: {listed(names)} of dtype {dtype}",
                rule="weights are stored as one of " + ", ".join(_BY_SAFETENSORS),
                fix="convert an unquantised checkpoint",
            )
    if len(by_dtype) > 1:
        common, *others = sorted(by_dtype, key=lambda dtype: -len(by_dtype[dtype]))
        odd = [f"{name} ({dtype})" for dtype in others for name in by_dtype[dtype]]
        raise InputError(
            f"{folder}: {listed(odd)} beside {common}",
            rule="all tensors of a checkpoint have one dtype",
            fix=f"store them as {common}",
        )
    return _BY_SAFETENSORS[next(iter(by_dtype))]


def listed(names: Sequence[str], first: int = 3) -> str:
    """``a, b, c and 7 more``."""
    text = ", ".join(names[:first])
    return text if len(names) <= first else f"{text} and {len(names) - first} more"
