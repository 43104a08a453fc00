"""Reads Hugging Face model folders: everything is checked first, then read tensor by tensor.

`HfFolder.open` compares config, index and every safetensors header with the architecture, without
reading weights, and raises one InputError for the first problem. Only safetensors files are opened;
pickled weights (``*.bin``, ``*.pt``), which can execute code, never are.
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

from conversion.mapping import Entry, FusedTensor, derive, fused_experts, huggingface_shapes
from mellum2_megatron.architecture import Mellum2Architecture, Shape, from_hf_config
from mellum2_megatron.common.errors import InputError

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The dtypes of a released model: config.json's name, then safetensors' name and torch's dtype.
DTYPES: dict[str, tuple[str, torch.dtype]] = {
    "bfloat16": ("BF16", torch.bfloat16),
    "float16": ("F16", torch.float16),
    "float32": ("F32", torch.float32),
}
_BY_SAFETENSORS = dict(DTYPES.values())

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name: ``torch.bfloat16`` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name: ``"bfloat16"`` -> ``torch.bfloat16``.

    Raises:
        InputError: a name that is not in `DTYPES`.
    """
    if name not in DTYPES:
        raise InputError(
            f"dtype={name!r}",
            rule="weights are stored as one of " + ", ".join(DTYPES),
            fix="use bfloat16",
        )
    return DTYPES[name][1]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor as a safetensors header describes it.

    Attributes:
        file: file that holds it.
        dtype: safetensors' name, ``BF16``.
        shape: sizes of its axes.
        begin: position in the file of its first byte.
    """

    file: Path
    dtype: str
    shape: Shape
    begin: int


class HfFolder:
    """A checked Hugging Face folder of a Mellum 2 model; use as a context manager to read tensors.

    Attributes:
        path: the folder.
        architecture: architecture that its config.json describes.
        entries: mapping table for that architecture.
        dtype: dtype that all its tensors share.
        nbytes: bytes of all its tensors.
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
        """Check the folder at ``path`` and return it.

        Args:
            path: a Hugging Face model folder.
            lost_mtp: read it as a model without MTP head, even if its config.json announces one;
                refuse a folder that has one.

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
        """Return the tensor of released name ``name``, in memory of its own.

        An expert's tensor may be a part of a fused one. Any thread may call it.

        Raises:
            InputError: the file shrank since it was opened.
        """
        part = self._slices.get(name)
        stored = self._tensors[part.name if part is not None else name]
        shape, begin = stored.shape, stored.begin
        # fused[expert, rows] is one run of bytes: rows are not the last axis.
        if part is not None:
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
        """config.json and the files of the weights, sorted."""
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
    """Return the JSON object in a file.

    Args:
        path: the file.
        why: rule of the error for a missing file.

    Raises:
        InputError: it is absent, malformed, not an object, or names a key twice.
    """
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
    # Python keeps the last of two equal keys, so the pairs are looked at before they are a dict.
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


# -- files and headers -------------------------------------------------------------------------


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the folder's safetensors files by name.

    Raises:
        InputError: no weights, a damaged file, a tensor twice, or an index that differs from the
            files.
    """
    index = folder / INDEX_FILE
    files = sorted(folder.glob("*.safetensors"))
    names = [file.name for file in files]
    weight_map = _read_index(index) if index.exists() else None
    if not files:
        _refuse_no_weights(folder)
    if weight_map is not None:
        _check_index_files(folder, set(weight_map.values()), set(names))
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


def _refuse_no_weights(folder: Path) -> None:
    pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    if pickled:
        raise InputError(
            f"{folder}: {listed(pickled)}",
            rule=(
                "only safetensors weights are read; pickled files can run code and are never opened"
            ),
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


def _check_index_files(folder: Path, named: set[str], present: set[str]) -> None:
    if missing := sorted(named - present):
        raise InputError(
            f"{folder}: {listed(missing)} missing",
            rule=f"{INDEX_FILE} names these files",
            fix="copy the missing files, each directly into the folder",
        )
    if extra := sorted(present - named):
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
        # The library compares sizes and offsets with the file. It keeps the last of two equal names,
        # so the header is parsed here once more.
        with safe_open(file, framework="pt"):
            pass
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
    """Return a tensor read from position ``begin`` of an open file, in memory of its own."""
    # Not mapped: the pages of a whole file would count as this process's memory. By position: the
    # threads share the file and no seek.
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
    """Return the tensor's values in row-major order as bytes; no copy of a contiguous tensor."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def check_inside(folder: Path, file: Path) -> None:
    """Refuse a link that leaves the folder, those of the Hugging Face cache excepted
    (``snapshots/X/f -> blobs/Y``).

    Raises:
        InputError: such a link.
    """
    real, home = file.resolve(), folder.resolve()
    if not real.is_relative_to(home) and not real.is_relative_to(home.parent.parent / "blobs"):
        raise InputError(
            f"{file} -> {real}",
            rule="a link may not leave the model's folder",
            fix="copy the file itself into it",
        )


# -- comparison with the architecture ----------------------------------------------------------


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
        expected = expected - set(part.slices) | {part.name}
    if missing := sorted(expected - set(tensors)):
        fix = "give a complete checkpoint whose config.json is its own"
        has_mtp = any(name.startswith("mtp.") for name in tensors)
        if not has_mtp and all(name.startswith("mtp.") for name in missing):
            fix = (
                "its MTP head was dropped (transformers' save_pretrained does so): "
                "set num_nextn_predict_layers to 0 in config.json to convert without it"
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
    """Compare the tensors' shapes with ``shapes``, the architecture's.

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


def one_dtype(folder: Path, tensors: dict[str, StoredTensor]) -> torch.dtype:
    """Return the dtype that all tensors share.

    Raises:
        InputError: a mixture of dtypes, or one that is not in `DTYPES`.
    """
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
    """Return the first names and the number of the others: ``a, b, c and 7 more``."""
    text = ", ".join(names[:first])
    return text if len(names) <= first else f"{text} and {len(names) - first} more"
