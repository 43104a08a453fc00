"""Megatron ``torch_dist`` checkpoints, read and written tensor by tensor without a model, a GPU or
a process group.

On disk (megatron-core 0.19.2, ``core/dist_checkpointing/strategies/torch.py``) such a folder is a
``torch.distributed.checkpoint`` of whole tensors cut into chunks:

  ``.metadata``        pickled ``Metadata``: per key whole shape, dtype and chunks; per chunk file,
                       offset and length
  ``__R_N.distcp``     the chunks, each its own ``torch.save`` archive
  ``metadata.json``    ``{"sharded_backend": "torch_dist", "sharded_backend_version": 1}``
  ``common.pt``        older versions only; 0.19.2 stores the common state as the object
                       ``common_state/shard_0_1``

Keys carry no ``model.`` prefix, whatever the pipeline layout: the state dict's ``model`` /
``model0`` levels do not reach the tensors' own keys (``core/dist_checkpointing/mapping.py``,
``ShardedTensor.key``).

Nothing in a checkpoint is executed: ``.metadata`` is read with an unpickler that knows a fixed list
of plain record classes, tensors with ``weights_only=True``, and pickled objects are not read at
all.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
)

from conversion.mapping import Shape
from conversion.torch_dist.safe_metadata import read_metadata
from mellum2_megatron.common.errors import InputError, first_line

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
    """What ``.metadata`` says of one tensor; ``by_layer`` indexes its chunks where each is one step
    of the first axis.

    A released model's fc1 has 3,584 chunks and is read in 1,792 pieces: looking at every chunk each
    time would show.
    """

    key: str
    dtype: torch.dtype
    shape: Shape
    chunks: tuple[ChunkStorageMetadata, ...]
    by_layer: dict[int, list[ChunkStorageMetadata]]

    def near(self, offset: Shape, extent: Shape) -> Iterable[ChunkStorageMetadata]:
        """The chunks that may overlap a box: those of its layers, or all where chunks span the
        first axis."""
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
        InputError: not such a folder, a truncated or missing file, chunks that do not cover their
            tensor, an object that is not known to be safely ignorable.
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
        """Return the box ``[offset, offset + extent)`` of tensor ``key``, from whatever chunks hold
        it."""
        tensor = self.tensors[key]
        out = torch.empty(extent, dtype=tensor.dtype)
        items = []
        for chunk in tensor.near(offset, extent):
            low = [max(a, b) for a, b in zip(chunk.offsets, offset, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(chunk.offsets, chunk.sizes, offset, extent, strict=True)
            ]
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
            ends[info.relative_path] = max(
                ends.get(info.relative_path, 0), info.offset + info.length
            )
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


# ---------------------------------------------------------------------------------------------------------------------


class _IntoTensor(LoadPlanner):
    """Lets DCP's reader copy chunk parts into one tensor."""

    def __init__(self, out: torch.Tensor) -> None:
        self._out = out

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        view = self._out
        for axis, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            view = view.narrow(axis, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: the reader copied into a view of the result."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("plans are made by TorchDistReader.read")

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner  # type: ignore[assignment]


def _read_item(
    key: str, chunk: ChunkStorageMetadata, low: list[int], high: list[int], offset: Shape
) -> ReadItem:
    """The part ``[low, high)`` (whole-tensor coordinates) of ``chunk``, for a box that begins at
    ``offset``."""
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
        raise InputError(
            str(path), rule=f"a torch_dist checkpoint has it ({first_line(error)})", fix=fix
        ) from error
    backend = config.get("sharded_backend") if isinstance(config, dict) else None
    if backend != "torch_dist":
        raise InputError(
            f"{path}: sharded_backend={backend!r}", rule="only torch_dist is read", fix=fix
        )
