"""Writes Megatron ``torch_dist`` checkpoints chunk by chunk, without a model, a GPU or a process
group."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import (
    FileSystemWriter,
    _StorageInfo,
    _StoragePrefix,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from conversion.mapping import Shape
from conversion.torch_dist.hashed_files import HashingFileSystem
from conversion.torch_dist.reader import COMMON_STATE_KEY, CONFIG_FILE
from mellum2_megatron.checkpoint.file_manifest import FileRecord, hash_files, write_manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """Where one chunk or object lies: in ``file``, ``length`` bytes from ``begin``. Plain values,
    for a journal."""

    key: str
    offset: Shape | None
    file: str
    begin: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """One group on the disk: its ``file``, and where everything lies in it. Plain values, for a
    journal."""

    file: FileRecord
    placed: tuple[Placed, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Written:
        """The inverse of `dataclasses.asdict`, through JSON."""
        return cls(
            file=FileRecord(**values["file"]),
            placed=tuple(
                Placed(
                    **each | {"offset": None if each["offset"] is None else tuple(each["offset"])}
                )
                for each in values["placed"]
            ),
        )


class TorchDistWriter:
    """Write a ``torch_dist`` folder; each group of chunks becomes one ``__N_0.distcp`` file.

    `write_group` may be called by several threads, once for each group in any order; then `finish`,
    with what all of them returned. A call holds one tensor at a time.

    Args:
        folder: an existing folder.
        groups: the chunks of each file; a chunk's ``produce`` is called once, when its turn comes.
        common: Megatron's common state (``checkpoint_version``, ``iteration``,
            ``content_metadata``): plain values.
        empty_states: keys of ``_extra_state`` objects to store as None, as Megatron's own linears
            do (``core/tensor_parallel/layers.py:1232``); Transformer Engine takes None for "nothing
            to restore".
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
        self._objects = {COMMON_STATE_KEY: _serialized(common)} | dict.fromkeys(
            empty_states, _serialized(None)
        )
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
            folder,
            single_file_per_rank=True,
            sync_files=True,
            thread_count=1,
            per_thread_copy_ahead=0,
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
        """Write ``.metadata`` and ``metadata.json``, which make the folder a checkpoint, and its
        manifest."""
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
    """A box of a tensor to write: ``produce()`` returns it, with shape ``extent`` and dtype
    ``dtype``."""

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
                chunk=ChunkStorageMetadata(
                    offsets=torch.Size(self.offset), sizes=torch.Size(self.extent)
                ),
                properties=TensorProperties(dtype=self.dtype),
                size=torch.Size(self.global_shape),
            ),
        )


def group_file(number: int) -> str:
    """Name of the file that holds group ``number``, as DCP gives it."""
    return f"__{number}_0.distcp"


def _offset(index: MetadataIndex) -> Shape | None:
    return None if index.offset is None else tuple(index.offset)


def _serialized(value: Any) -> io.BytesIO:
    """A sharded object's bytes: Megatron stores the list of a rank's objects of one key
    (``torch.py:324-329``)."""
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
