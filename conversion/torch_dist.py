"""Megatron ``torch_dist`` checkpoints, read and written tensor by tensor without a model, a GPU or a process group.

On disk (megatron-core 0.19.2, ``core/dist_checkpointing/strategies/torch.py``) such a folder is a
``torch.distributed.checkpoint`` of whole tensors cut into chunks:

  ``.metadata``        pickled ``Metadata``: per key whole shape, dtype and chunks, per chunk (file, offset, length)
  ``__R_N.distcp``     the chunks, each its own ``torch.save`` archive
  ``metadata.json``    ``{"sharded_backend": "torch_dist", "sharded_backend_version": 1}``
  ``common.pt``        older versions only; 0.19.2 stores the common state as the object ``common_state/shard_0_1``

Keys carry no ``model.`` prefix, whatever the pipeline layout: the state dict's ``model`` / ``model0`` levels do not
reach the tensors' own keys (``core/dist_checkpointing/mapping.py``, ``ShardedTensor.key``).

Nothing in a checkpoint is executed: ``.metadata`` is read with an unpickler that knows a fixed list of plain record
classes, tensors with ``weights_only=True``, and pickled objects are not read at all.
"""

from __future__ import annotations

import io
import json
import logging
import math
import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,
    _StoragePrefix,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from conversion.dcp_files import HashingFileSystem
from conversion.mapping import Shape
from conversion.safe_metadata import first_line, read_metadata
from mellum2_megatron.errors import InputError
from mellum2_megatron.integrity import FileRecord, hash_files, write_manifest

logger = logging.getLogger(__name__)

CONFIG_FILE = "metadata.json"
COMMON_STATE_KEY = "common_state/shard_0_1"

# What a training checkpoint holds beside the model's weights, by the key's form.
NOT_WEIGHTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("optimizer state", re.compile(r"^(chained_\d+\.)?optimizer\.")),
    ("common state", re.compile(r"^common_state/")),
    ("random number generator state", re.compile(r"^rng_state/")),
    ("rerun state", re.compile(r"^rerun_state_machine")),
    ("Transformer Engine extra state", re.compile(r"\._extra_state(/|$)")),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """What ``.metadata`` says of one tensor; ``by_layer`` indexes its chunks where each is one step of the first axis.

    A released model's fc1 has 3,584 chunks and is read in 1,792 pieces: looking at every chunk each time would show.
    """

    key: str
    dtype: torch.dtype
    shape: Shape
    chunks: tuple[ChunkStorageMetadata, ...]
    by_layer: dict[int, list[ChunkStorageMetadata]]

    def near(self, offset: Shape, extent: Shape) -> Iterable[ChunkStorageMetadata]:
        """The chunks that may overlap a box: those of its layers, or all where chunks span the first axis."""
        if not self.by_layer:
            return self.chunks
        layers = range(offset[0], offset[0] + extent[0])
        return [chunk for layer in layers for chunk in self.by_layer.get(layer, ())]


class TorchDistReader:
    """The model weights of one ``torch_dist`` folder (``DIR/iter_0000100`` or ``DIR/release``).

    Attributes:
        tensors: every weight tensor by Megatron key.
        skipped: how many keys were left aside, by kind (optimizer state, ...).

    Raises:
        InputError: not such a folder, a truncated or missing file, chunks that do not cover their tensor, an object
            that is not known to be safely ignorable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _check_backend(folder)
        self._reader = FileSystemReader(folder)
        metadata = read_metadata(folder)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._check_files(metadata)
        self.tensors: dict[str, StoredTensor] = {}
        self.skipped: dict[str, int] = {}
        for key, stored in metadata.state_dict_metadata.items():
            kind = next((kind for kind, pattern in NOT_WEIGHTS if pattern.search(key)), None)
            if kind is not None:
                self.skipped[kind] = self.skipped.get(kind, 0) + 1
            elif isinstance(stored, TensorStorageMetadata):
                self.tensors[key] = _stored_tensor(folder, key, stored)
            else:
                raise InputError(
                    f"{folder}: object {key!r}",
                    rule="beside weights a checkpoint holds optimizer, generator, rerun, common and extra state only",
                    fix="convert a checkpoint that Megatron-Core 0.19 or this project wrote",
                )

    def read(self, key: str, offset: Shape, extent: Shape) -> torch.Tensor:
        """Return the box ``[offset, offset + extent)`` of tensor ``key``, from whatever chunks hold it."""
        tensor = self.tensors[key]
        out = torch.empty(extent, dtype=tensor.dtype)
        items = []
        for chunk in tensor.near(offset, extent):
            low = [max(a, b) for a, b in zip(chunk.offsets, offset, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(chunk.offsets, chunk.sizes, offset, extent, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                items.append(_read_item(key, chunk, low, high, offset))
        try:
            self._reader.read_data(LoadPlan(items), _IntoTensor(out)).wait()
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(
                f"{self.folder}: tensor {key!r}",
                rule=f"its chunks must be readable tensors ({first_line(error)})",
                fix="copy the checkpoint again, or use an earlier one",
            ) from error
        return out

    def _check_files(self, metadata: Metadata) -> None:
        ends: dict[str, int] = {}
        for info in metadata.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in sorted(ends.items()):
            if Path(name).name != name:
                raise InputError(
                    f"{self.folder}: storage file {name!r}",
                    rule="checkpoint files lie in the checkpoint's own folder",
                    fix="convert a checkpoint from a source you trust",
                )
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else -1
            if size < end:
                state = "is missing" if size < 0 else f"has {size} bytes"
                raise InputError(
                    f"{path} {state}",
                    rule=f".metadata places data up to byte {end} of it",
                    fix="the checkpoint is incomplete: copy it again, or use an earlier one",
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """Where one chunk or object lies: in ``file``, ``length`` bytes from ``begin``. Plain values, for a journal."""

    key: str
    offset: Shape | None
    file: str
    begin: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """One group on the disk: its ``file``, and where everything lies in it. Plain values, for a journal."""

    file: FileRecord
    placed: tuple[Placed, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Written:
        """The inverse of `dataclasses.asdict`, through JSON."""
        return cls(
            file=FileRecord(**values["file"]),
            placed=tuple(
                Placed(**each | {"offset": None if each["offset"] is None else tuple(each["offset"])})
                for each in values["placed"]
            ),
        )


class TorchDistWriter:
    """Write a ``torch_dist`` folder; each group of chunks becomes one ``__N_0.distcp`` file.

    `write_group` may be called by several threads, once for each group in any order; then `finish`, with what all of
    them returned. A call holds one tensor at a time.

    Args:
        folder: an existing folder.
        groups: the chunks of each file; a chunk's ``produce`` is called once, when its turn comes.
        common: Megatron's common state (``checkpoint_version``, ``iteration``, ``content_metadata``): plain values.
        empty_states: keys of ``_extra_state`` objects to store as None, as Megatron's own linears do
            (``core/tensor_parallel/layers.py:1232``); Transformer Engine takes None for "nothing to restore".
    """

    def __init__(
        self,
        folder: Path,
        groups: Sequence[Sequence[Chunk]],
        *,
        common: dict[str, Any],
        empty_states: Iterable[str] = (),
    ) -> None:
        self.folder = folder
        self._groups = groups
        self._objects = {COMMON_STATE_KEY: _serialized(common)} | dict.fromkeys(empty_states, _serialized(None))
        items = [
            WriteItem(
                index=MetadataIndex(key),
                type=WriteItemType.BYTE_IO,
                bytes_io_data=BytesIOWriteData(nbytes=data.getbuffer().nbytes),
            )
            for key, data in self._objects.items()
        ]
        plans = [
            SavePlan([*(items if number == 0 else []), *(chunk.write_item() for chunk in group)])
            for number, group in enumerate(groups)
        ]
        self._plans, self._metadata = create_default_global_save_plan(plans)
        self._writer = FileSystemWriter(
            folder, single_file_per_rank=True, sync_files=True, thread_count=1, per_thread_copy_ahead=0
        )
        self._writer.fs = self._files = HashingFileSystem()

    def write_group(self, number: int) -> Written:
        """Write group ``number`` to the disk and say where everything lies."""
        planner = _FromChunks(self._groups[number], self._objects)
        plan = SavePlan(self._plans[number].items, storage_data=_StoragePrefix(f"__{number}_"))
        placed = [
            Placed(
                key=result.index.fqn,
                offset=_offset(result.index),
                file=result.storage_data.relative_path,
                begin=result.storage_data.offset,
                length=result.storage_data.length,
            )
            for result in self._writer.write_data(plan, planner).wait()
        ]
        return Written(file=self._files.records[group_file(number)], placed=tuple(placed))

    def finish(self, groups: Sequence[Written]) -> None:
        """Write ``.metadata`` and ``metadata.json``, which make the folder a checkpoint, and its manifest."""
        results: list[list[WriteResult]] = []
        for plan, group in zip(self._plans, groups, strict=True):
            indices = {(item.index.fqn, _offset(item.index)): item.index for item in plan.items}
            results.append(
                [
                    WriteResult(
                        index=indices[placed.key, placed.offset],
                        size_in_bytes=placed.length,
                        storage_data=_StorageInfo(placed.file, placed.begin, placed.length),
                    )
                    for placed in group.placed
                ]
            )
        self._writer.set_up_storage_writer(is_coordinator=True)
        self._writer.finish(self._metadata, results)
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self.folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        written = {group_file(number): group.file for number, group in enumerate(groups)}
        others = hash_files(path for path in self.folder.iterdir() if path.name not in written)
        write_manifest(self.folder, written | others)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A box of a tensor to write: ``produce()`` returns it, with shape ``extent`` and dtype ``dtype``."""

    key: str
    global_shape: Shape
    offset: Shape
    extent: Shape
    dtype: torch.dtype
    produce: Callable[[], torch.Tensor]

    def write_item(self) -> WriteItem:
        return WriteItem(
            index=MetadataIndex(self.key, torch.Size(self.offset)),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=torch.Size(self.offset), sizes=torch.Size(self.extent)),
                properties=TensorProperties(dtype=self.dtype),
                size=torch.Size(self.global_shape),
            ),
        )


# ---------------------------------------------------------------------------------------------------------------------


def group_file(number: int) -> str:
    """Name of the file that holds group ``number``, as DCP gives it."""
    return f"__{number}_0.distcp"


def _offset(index: MetadataIndex) -> Shape | None:
    return None if index.offset is None else tuple(index.offset)


def _serialized(value: Any) -> io.BytesIO:
    """A sharded object's bytes: Megatron stores the list of a rank's objects of one key (``torch.py:324-329``)."""
    stream = io.BytesIO()
    torch.save([value], stream)
    return stream


class _FromChunks(SavePlanner):
    """Hands DCP's writer each chunk's bytes when it asks for them."""

    def __init__(self, chunks: Iterable[Chunk], objects: dict[str, io.BytesIO]) -> None:
        self._chunks = {(chunk.key, tuple(chunk.offset)): chunk for chunk in chunks}
        self._objects = objects

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return self._objects[write_item.index.fqn]
        chunk = self._chunks[write_item.index.fqn, tuple(write_item.index.offset or ())]
        tensor = chunk.produce().reshape(chunk.extent).contiguous()
        if tensor.dtype != chunk.dtype:
            raise TypeError(f"{chunk.key}: produced {tensor.dtype}, announced {chunk.dtype}")
        return tensor

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("plans are made by TorchDistWriter.write")

    create_local_plan = create_global_plan = finish_plan = set_up_planner  # type: ignore[assignment]


class _IntoTensor(LoadPlanner):
    """Lets DCP's reader copy chunk parts into one tensor."""

    def __init__(self, out: torch.Tensor) -> None:
        self._out = out

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        view = self._out
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(axis, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: the reader copied into a view of the result."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("plans are made by TorchDistReader.read")

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner  # type: ignore[assignment]


def _read_item(key: str, chunk: ChunkStorageMetadata, low: list[int], high: list[int], offset: Shape) -> ReadItem:
    """The part ``[low, high)`` (whole-tensor coordinates) of ``chunk``, for a box that begins at ``offset``."""
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(key, torch.Size(offset)),
        dest_offsets=torch.Size([a - b for a, b in zip(low, offset, strict=True)]),
        storage_index=MetadataIndex(key, chunk.offsets),
        storage_offsets=torch.Size([a - b for a, b in zip(low, chunk.offsets, strict=True)]),
        lengths=torch.Size([b - a for a, b in zip(low, high, strict=True)]),
    )


def _stored_tensor(folder: Path, key: str, stored: TensorStorageMetadata) -> StoredTensor:
    covered = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
    if covered != math.prod(stored.size):
        raise InputError(
            f"{folder}: tensor {key!r} has {covered} of {math.prod(stored.size)} values",
            rule="a tensor's chunks cover it exactly",
            fix="the checkpoint is incomplete: copy it again, or use an earlier one",
        )
    by_layer: dict[int, list[ChunkStorageMetadata]] = {}
    if all(len(chunk.sizes) and chunk.sizes[0] == 1 for chunk in stored.chunks):
        for chunk in stored.chunks:
            by_layer.setdefault(chunk.offsets[0], []).append(chunk)
    return StoredTensor(
        key=key,
        dtype=stored.properties.dtype,
        shape=tuple(stored.size),
        chunks=tuple(stored.chunks),
        by_layer=by_layer,
    )


def _check_backend(folder: Path) -> None:
    path = folder / CONFIG_FILE
    fix = "give a checkpoint saved with --ckpt-format torch_dist (this project's only format)"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(str(path), rule=f"a torch_dist checkpoint has it ({first_line(error)})", fix=fix) from error
    backend = config.get("sharded_backend") if isinstance(config, dict) else None
    if backend != "torch_dist":
        raise InputError(f"{path}: sharded_backend={backend!r}", rule="only torch_dist is read", fix=fix)
