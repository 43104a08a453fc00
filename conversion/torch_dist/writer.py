"""Writes Megatron ``torch_dist`` checkpoints chunk by chunk, without a model, a GPU or a process
group.

Data files are laid out as by ``torch.distributed.checkpoint``'s own writer
(torch/distributed/checkpoint/filesystem.py:_write_files_from_queue, 2.15): objects, then tensors,
one after the other. That writer fetches tensors through callbacks from a queue; here the caller
writes each one in its own loop. torch's writer still writes ``.metadata``.
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

# The private `_StorageInfo` is the type of the values in `Metadata.storage_data`. Its fields in
# torch 2.15: relative_path, offset, length, transform_descriptors.
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
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
    """The place of one chunk or object in a file, as plain values for the journal.

    Attributes:
        key: Megatron key.
        offset: first position of the chunk in its tensor; None for an object.
        file: file name.
        begin: position of the first byte in the file.
        length: number of bytes.
    """

    key: str
    offset: Shape | None
    file: str
    begin: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """One finished file, as plain values for the journal.

    Attributes:
        file: size and hash.
        placed: place of each chunk and object in it.
    """

    file: FileRecord
    placed: tuple[Placed, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Written:
        """Build it from `dataclasses.asdict` values that JSON has stored, tuples as lists."""
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
        """The file's record, once everything is written."""
        return Written(file=self._stream.record, placed=tuple(self._placed))

    def write(self, key: str, offset: Shape, tensor: torch.Tensor) -> None:
        """Append the chunk of ``key`` at ``offset``; ``tensor`` has its values and its dtype."""
        chunk = self._chunks[key, offset]
        if tensor.dtype != chunk.dtype:
            raise TypeError(f"{key}: a {tensor.dtype} tensor for a chunk of {chunk.dtype}")
        tensor = tensor.reshape(chunk.extent).contiguous()
        # torch.save would write all of the storage behind a view.
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

    Call `open_group` once for each group, in any order and from any thread, then `finish`.

    Args:
        folder: existing folder.
        groups: chunks of each file, in the order they are written.
        common: Megatron's common state (``checkpoint_version``, ``iteration``,
            ``content_metadata``), plain values.
        empty_states: keys of ``_extra_state`` objects to store as None, default none. Megatron's
            own linears store None too (``core/tensor_parallel/layers.py:1232``, 0.19.2), and
            Transformer Engine restores nothing from it.
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
        # One shared buffer: the released model has 3,862 empty states.
        empty = dict.fromkeys(empty_states, _serialized(None))
        self._objects = {COMMON_STATE_KEY: _serialized(common)} | empty

    @contextmanager
    def open_group(self, number: int) -> Iterator[GroupFile]:
        """Yield the file of group ``number`` to write; it is on the disk when the block ends."""
        name = group_file(number)
        with hashed_file(self.folder / name) as stream:
            group = GroupFile(name, self._groups[number], stream)
            # Objects before tensors, in the order of torch's own writer.
            for key, data in self._objects.items() if number == 0 else ():
                group.write_object(key, data)
            yield group

    def finish(self, groups: Sequence[Written]) -> None:
        """Write ``.metadata`` and ``metadata.json``, then the manifest of all files.

        The first two make the folder a checkpoint.

        Args:
            groups: `GroupFile.written` of every group, in order.

        Raises:
            ValueError: a chunk was not written, which is a programming error.
        """
        plans = []
        for chunks in self._groups:
            items = []
            for chunk in chunks:
                offset, extent = torch.Size(chunk.offset), torch.Size(chunk.extent)
                data = TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=offset, sizes=extent),
                    properties=TensorProperties(dtype=chunk.dtype),
                    size=torch.Size(chunk.global_shape),
                )
                index = MetadataIndex(chunk.key, offset)
                items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
            plans.append(SavePlan(items))
        objects = [
            WriteItem(
                index=MetadataIndex(key),
                type=WriteItemType.BYTE_IO,
                bytes_io_data=BytesIOWriteData(nbytes=stream.getbuffer().nbytes),
            )
            for key, stream in self._objects.items()
        ]
        plans[0] = SavePlan([*objects, *plans[0].items])
        # It also numbers each tensor's chunks. With that hint a load needs no linear search for
        # each chunk (torch/distributed/checkpoint/metadata.py:MetadataIndex, 2.15).
        plans, metadata = create_default_global_save_plan(plans)
        results = []
        for plan, group in zip(plans, groups, strict=True):
            indices = {}
            for item in plan.items:
                position = None if item.index.offset is None else tuple(item.index.offset)
                indices[item.index.fqn, position] = item.index
            # A chunk in .metadata that no file holds would fail at a load, not here.
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
        writer = _Writer(self.folder, sync_files=True)
        writer.set_up_storage_writer(is_coordinator=True)
        writer.finish(metadata, results)
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self.folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        # The data files were hashed while they were written; the few others are small.
        written = {group_file(number): group.file for number, group in enumerate(groups)}
        others = hash_files(path for path in self.folder.iterdir() if path.name not in written)
        write_manifest(self.folder, written | others)


def group_file(number: int) -> str:
    """Return the name of a group's file: torch's name of the first file of rank ``number``."""
    return f"__{number}_0.distcp"


def _serialized(value: Any) -> io.BytesIO:
    """Return an object's bytes in Megatron's form."""
    # A list of one: Megatron stores all of a rank's objects with the same key together
    # (core/dist_checkpointing/strategies/torch.py:324-329, 0.19.2).
    stream = io.BytesIO()
    torch.save([value], stream)
    return stream


class _Writer(FileSystemWriter):
    """torch's writer of ``.metadata``, without the path of this machine."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)
