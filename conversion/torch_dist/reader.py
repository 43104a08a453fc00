"""Megatron ``torch_dist`` checkpoints, read tensor by tensor without a model, a GPU or a process
group.

On disk (megatron-core 0.19.2, ``core/dist_checkpointing/strategies/torch.py``) such a folder is a
``torch.distributed.checkpoint`` of whole tensors cut into chunks:

  ``.metadata``
      pickled ``Metadata``: shape, dtype and chunks of each key; file, offset and length of each
      chunk
  ``__R_N.distcp``
      chunks, each a ``torch.save`` archive of its own
  ``metadata.json``
      ``{"sharded_backend": "torch_dist", "sharded_backend_version": 1}``
  ``common.pt``
      older versions only; 0.19.2 stores the common state as the object
      ``common_state/shard_0_1``

Keys carry no ``model.`` prefix, with any pipeline layout: the state dict's ``model`` and
``model0`` levels do not reach the tensors' own keys (``core/dist_checkpointing/mapping.py``,
``ShardedTensor.key``).

Nothing in a checkpoint is executed: ``.metadata`` is read with an unpickler that builds a fixed
list of plain record classes, tensors with ``weights_only=True``, and pickled objects are not read
at all.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from mellum2_megatron.architecture import Shape
from mellum2_megatron.checkpoint.safe_metadata import read_metadata
from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.common.json_files import load_json

CONFIG_FILE = "metadata.json"
COMMON_STATE_KEY = "common_state/shard_0_1"

# Everything that a training checkpoint holds beside the model's weights, by the form of its key.
NOT_WEIGHTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("optimizer state", re.compile(r"^(chained_\d+\.)?optimizer\.")),
    ("common state", re.compile(r"^common_state/")),
    ("random number generator state", re.compile(r"^rng_state/")),
    ("rerun state", re.compile(r"^rerun_state_machine")),
    ("Transformer Engine extra state", re.compile(r"\._extra_state(/|$)")),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor as ``.metadata`` describes it.

    Attributes:
        key: Megatron key.
        dtype: dtype of its values.
        shape: shape of the whole tensor.
        chunks: boxes that it is stored in.
        chunks_of_layer: chunks by position on the first axis, if each lies at one position; else
            empty. A released model's fc1 has 3,584 chunks and is read in 1,792 pieces: the index
            avoids 6.4 million comparisons.
    """

    key: str
    dtype: torch.dtype
    shape: Shape
    chunks: tuple[ChunkStorageMetadata, ...]
    chunks_of_layer: dict[int, list[ChunkStorageMetadata]]

    def chunks_overlapping(self, offset: Shape, extent: Shape) -> Iterable[ChunkStorageMetadata]:
        """Return all chunks that overlap the box ``[offset, offset + extent)``, and maybe more.

        They are the chunks of the box's layers; without an index, all chunks.
        """
        if not self.chunks_of_layer:
            return self.chunks
        layers = range(offset[0], offset[0] + extent[0])
        return [chunk for layer in layers for chunk in self.chunks_of_layer.get(layer, ())]


class TorchDistReader:
    """The model weights of one ``torch_dist`` folder (``DIR/iter_0000100`` or ``DIR/release``).

    Attributes:
        folder: checkpoint folder.
        tensors: every weight tensor by Megatron key.
        skipped: number of keys left out, by kind (optimizer state, ...).

    Raises:
        InputError: no ``torch_dist`` folder, a truncated or missing file, chunks that do not cover
            their tensor, an object of no kind in `NOT_WEIGHTS`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _check_backend(folder)
        self._reader = FileSystemReader(folder)
        # Our metadata instead of `self._reader.read_metadata()`, which unpickles anything.
        metadata = read_metadata(folder)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        _check_files(folder, metadata)
        self.tensors: dict[str, StoredTensor] = {}
        self.skipped: dict[str, int] = {}
        # Every key must be a weight or of a known kind. Otherwise a new kind of state that matters
        # to the model would be dropped in silence.
        for key, stored in metadata.state_dict_metadata.items():
            kind = next((kind for kind, pattern in NOT_WEIGHTS if pattern.search(key)), None)
            if kind is not None:
                self.skipped[kind] = self.skipped.get(kind, 0) + 1
            elif isinstance(stored, TensorStorageMetadata):
                self.tensors[key] = _stored_tensor(folder, key, stored)
            else:
                raise InputError(
                    f"{folder}: object {key!r}",
                    rule=(
                        "beside weights a checkpoint holds optimizer, generator, rerun, common "
                        "and extra state only"
                    ),
                    fix="convert a checkpoint that Megatron-Core 0.19 or this project wrote",
                )

    def read(self, key: str, offset: Shape, extent: Shape) -> torch.Tensor:
        """Return the box ``[offset, offset + extent)`` of tensor ``key``, of shape ``extent``.

        The tensor may be cut into any chunks. Any thread may call this.

        Raises:
            InputError: a chunk cannot be read.
        """
        tensor = self.tensors[key]
        out = torch.empty(extent, dtype=tensor.dtype)
        items = []
        for chunk in tensor.chunks_overlapping(offset, extent):
            # The overlap [low, high) of chunk and box, in positions of the whole tensor.
            low = [max(a, b) for a, b in zip(chunk.offsets, offset, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(chunk.offsets, chunk.sizes, offset, extent, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            items.append(
                ReadItem(
                    type=LoadItemType.TENSOR,
                    dest_index=MetadataIndex(key, torch.Size(offset)),
                    dest_offsets=_difference(low, offset),
                    storage_index=MetadataIndex(key, chunk.offsets),
                    storage_offsets=_difference(low, chunk.offsets),
                    lengths=_difference(high, low),
                )
            )
        try:
            self._reader.read_data(LoadPlan(items), _IntoTensor(out)).wait()
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(
                f"{self.folder}: tensor {key!r}",
                rule=f"its chunks must be readable tensors ({first_line(error)})",
                fix="copy the checkpoint again, or use an earlier one",
            ) from error
        return out


class _IntoTensor(DefaultLoadPlanner):
    """A planner that makes torch's reader copy parts of chunks into one tensor.

    The default planner calls `lookup_tensor` for each read item and narrows the result to the
    item's destination (torch/distributed/checkpoint/default_planner.py:402, 2.15).
    """

    def __init__(self, out: torch.Tensor) -> None:
        super().__init__()
        self._out = out

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._out


def _difference(positions: Sequence[int], origin: Sequence[int]) -> torch.Size:
    return torch.Size([a - b for a, b in zip(positions, origin, strict=True)])


def _check_files(folder: Path, metadata: Metadata) -> None:
    """Compare the data files' sizes with ``.metadata``.

    Raises:
        InputError: a file that is missing, truncated, or outside the folder.
    """
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in sorted(ends.items()):
        # The name comes from the checkpoint: it must not point at another file of this machine.
        if Path(name).name != name:
            raise InputError(
                f"{folder}: storage file {name!r}",
                rule="checkpoint files lie in the checkpoint's own folder",
                fix="convert a checkpoint from a source you trust",
            )
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size < end:
            state = "is missing" if size < 0 else f"has {size} bytes"
            raise InputError(
                f"{path} {state}",
                rule=f".metadata places data up to byte {end} of it",
                fix="the checkpoint is incomplete: copy it again, or use an earlier one",
            )


def _stored_tensor(folder: Path, key: str, stored: TensorStorageMetadata) -> StoredTensor:
    """Return a tensor's record.

    Raises:
        InputError: its chunks do not cover it.
    """
    # The sum does not show an overlap beside a gap of the same size. Megatron writes no overlaps,
    # and finding them would compare every box with every other.
    covered = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
    if covered != math.prod(stored.size):
        raise InputError(
            f"{folder}: tensor {key!r} has {covered} of {math.prod(stored.size)} values",
            rule="a tensor's chunks cover it exactly",
            fix="the checkpoint is incomplete: copy it again, or use an earlier one",
        )
    # Megatron and our writer store layers apart; any other cut is read without the index.
    chunks_of_layer: dict[int, list[ChunkStorageMetadata]] = {}
    if all(len(chunk.sizes) and chunk.sizes[0] == 1 for chunk in stored.chunks):
        for chunk in stored.chunks:
            chunks_of_layer.setdefault(chunk.offsets[0], []).append(chunk)
    return StoredTensor(
        key=key,
        dtype=stored.properties.dtype,
        shape=tuple(stored.size),
        chunks=tuple(stored.chunks),
        chunks_of_layer=chunks_of_layer,
    )


def _check_backend(folder: Path) -> None:
    """Raise InputError unless ``metadata.json`` names the ``torch_dist`` backend."""
    path = folder / CONFIG_FILE
    fix = "give a checkpoint saved with --ckpt-format torch_dist (this project's only format)"
    try:
        config = load_json(path)
    except (OSError, ValueError) as error:
        raise InputError(
            str(path), rule=f"a torch_dist checkpoint has it ({first_line(error)})", fix=fix
        ) from error
    backend = config.get("sharded_backend")
    if backend != "torch_dist":
        raise InputError(
            f"{path}: sharded_backend={backend!r}", rule="only torch_dist is read", fix=fix
        )
