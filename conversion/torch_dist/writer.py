"""Writes Megatron ``torch_dist`` checkpoints chunk by chunk, without a model, a GPU or a process
group.

The data files are written here, as ``torch.distributed.checkpoint``'s own writer does it
(torch/distributed/checkpoint/filesystem.py:_write_files_from_queue, 2.15): objects, then tensors,
one after the other. That writer calls back for each tensor from a queue of its own; here the caller
writes them in its own loop. ``.metadata`` is written by the original.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan

# `_StorageInfo` is private, and the type of the values of `Metadata.storage_data`: relative_path,
# offset, length, transform_descriptors as of torch 2.15.
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from conversion.mapping import Entry
from conversion.torch_dist.hashed_files import HashingStream, hashed_file
from conversion.torch_dist.reader import COMMON_STATE_KEY, CONFIG_FILE
from mellum2_megatron.architecture import Shape
from mellum2_megatron.checkpoint.file_manifest import FileRecord, hash_files, write_manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A box of a tensor to write.

    Attributes:
        key: Megatron key.
        global_shape: shape of the whole tensor.
        offset: first position of the box, per axis of the whole tensor.
        extent: size of the box, per axis.
        dtype: dtype of the whole tensor.
    """

    key: str
    global_shape: Shape
    offset: Shape
    extent: Shape
    dtype: torch.dtype

    @classmethod
    def of_entry(cls, entry: Entry, dtype: torch.dtype) -> Chunk:
        """Return the chunk of an entry of the mapping table."""
        return cls(
            key=entry.key,
            global_shape=entry.global_shape,
            offset=entry.offset,
            extent=entry.extent,
            dtype=dtype,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """The place of one chunk or object. Plain values, for a journal.

    Attributes:
        key: Megatron key.
        offset: first position of the chunk; None for an object.
        file: file name.
        begin: first byte in the file.
        length: bytes.
    """

    key: str
    offset: Shape | None
    file: str
    begin: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """One file on the disk, and the place of everything in it. Plain values, for a journal."""

    file: FileRecord
    placed: tuple[Placed, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Written:
        """Return the inverse of `dataclasses.asdict`, after JSON has made lists of tuples."""
        placed = []
        for place in values["placed"]:
            offset = None if place["offset"] is None else tuple(place["offset"])
            placed.append(Placed(**place | {"offset": offset}))
        return cls(file=FileRecord(**values["file"]), placed=tuple(placed))


class GroupFile:
    """One ``.distcp`` file while it is written."""

    def __init__(self, name: str, chunks: Iterable[Chunk], stream: HashingStream) -> None:
        self._name, self._stream = name, stream
        self._chunks = {(chunk.key, chunk.offset): chunk for chunk in chunks}
        self._placed: list[Placed] = []

    @property
    def written(self) -> Written:
        """The file and its places, once everything is written."""
        return Written(file=self._stream.record, placed=tuple(self._placed))

    def write(self, key: str, offset: Shape, tensor: torch.Tensor) -> None:
        """Append the chunk of ``key`` at ``offset``; ``tensor`` has its values and its dtype."""
        chunk = self._chunks[key, offset]
        if tensor.dtype != chunk.dtype:
            raise TypeError(f"{key}: a {tensor.dtype} tensor for a chunk of {chunk.dtype}")
        tensor = tensor.reshape(chunk.extent).contiguous()
        # torch.save writes the whole storage behind a view.
        if tensor.untyped_storage().size() != tensor.nbytes:
            tensor = tensor.clone()
        begin = self._stream.tell()
        torch.save(tensor, cast(IO[bytes], self._stream))
        self._place(key, offset, begin)

    def write_object(self, key: str, data: io.BytesIO) -> None:
        """Append a pickled object."""
        begin = self._stream.tell()
        self._stream.write(data.getbuffer())
        self._place(key, None, begin)

    def _place(self, key: str, offset: Shape | None, begin: int) -> None:
        length = self._stream.tell() - begin
        self._placed.append(
            Placed(key=key, offset=offset, file=self._name, begin=begin, length=length)
        )


class TorchDistWriter:
    """Write a ``torch_dist`` folder; each group of chunks becomes one ``__N_0.distcp`` file.

    `open_group` is called once for each group, in any order and by any thread; then `finish`.

    Args:
        folder: an existing folder.
        groups: chunks of each file, in the order they are written.
        common: Megatron's common state (``checkpoint_version``, ``iteration``,
            ``content_metadata``), plain values.
        empty_states: keys of ``_extra_state`` objects to store as None, as Megatron's own linears
            do (``core/tensor_parallel/layers.py:1232``, 0.19.2); Transformer Engine restores
            nothing from None.
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
        # One buffer for all empty states: the released model has 3,862.
        empty = dict.fromkeys(empty_states, _serialized(None))
        self._objects = {COMMON_STATE_KEY: _serialized(common)} | empty

    @contextmanager
    def open_group(self, number: int) -> Iterator[GroupFile]:
        """Yield the file of group ``number`` to write; it is on the disk when the block ends."""
        name = group_file(number)
        with hashed_file(self.folder / name) as stream:
            group = GroupFile(name, self._groups[number], stream)
            # Objects before tensors, as torch's own writer has them.
            for key, data in self._objects.items() if number == 0 else ():
                group.write_object(key, data)
            yield group

    def finish(self, groups: Sequence[Written]) -> None:
        """Write ``.metadata`` and ``metadata.json``, which make the folder a checkpoint, then the
        manifest of all its files.

        Args:
            groups: `GroupFile.written` of every group, in order.

        Raises:
            ValueError: a chunk was not written, which is a programming error.
        """
        plans = [SavePlan([_write_item(chunk) for chunk in chunks]) for chunks in self._groups]
        objects = [
            WriteItem(
                index=MetadataIndex(key),
                type=WriteItemType.BYTE_IO,
                bytes_io_data=BytesIOWriteData(nbytes=data.getbuffer().nbytes),
            )
            for key, data in self._objects.items()
        ]
        plans[0] = SavePlan([*objects, *plans[0].items])
        # This numbers each tensor's chunks too, a hint that saves loads a linear search for each
        # chunk (torch/distributed/checkpoint/metadata.py:MetadataIndex, 2.15).
        plans, metadata = create_default_global_save_plan(plans)
        results = []
        for plan, group in zip(plans, groups, strict=True):
            indices = {(item.index.fqn, _offset(item.index)): item.index for item in plan.items}
            # A chunk that .metadata promises and no file holds would only fail at a load.
            if missing := set(indices) - {(place.key, place.offset) for place in group.placed}:
                raise ValueError(f"{len(missing)} chunks were not written, one is {missing.pop()}")
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
        writer = FileSystemWriter(self.folder, sync_files=True)
        writer.set_up_storage_writer(is_coordinator=True)
        writer.finish(metadata, results)
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self.folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        # Of the data files the hashes are known; the few others are small.
        written = {group_file(number): group.file for number, group in enumerate(groups)}
        others = hash_files(path for path in self.folder.iterdir() if path.name not in written)
        write_manifest(self.folder, written | others)


def group_file(number: int) -> str:
    """Return the name of the file of group ``number``, as ``torch.distributed.checkpoint`` names
    the first file of rank ``number``."""
    return f"__{number}_0.distcp"


def _write_item(chunk: Chunk) -> WriteItem:
    offset, extent = torch.Size(chunk.offset), torch.Size(chunk.extent)
    return WriteItem(
        index=MetadataIndex(chunk.key, offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offset, sizes=extent),
            properties=TensorProperties(dtype=chunk.dtype),
            size=torch.Size(chunk.global_shape),
        ),
    )


def _offset(index: MetadataIndex) -> Shape | None:
    return None if index.offset is None else tuple(index.offset)


def _serialized(value: Any) -> io.BytesIO:
    """Return an object's bytes: Megatron stores the list of a rank's objects of one key
    (``core/dist_checkpointing/strategies/torch.py:324-329``, 0.19.2)."""
    stream = io.BytesIO()
    torch.save([value], stream)
    return stream
