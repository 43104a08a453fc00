"""Hugging Face model folders, written: safetensors streamed tensor by tensor, in the released layout."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conversion.hf_folder import DTYPES, INDEX_FILE, WEIGHTS_FILE, check_inside, tensor_bytes
from conversion.mapping import Entry

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One safetensors file to write and the entries whose tensors it holds."""

    file: str
    entries: tuple[Entry, ...]


def plan_shards(entries: Iterable[Entry], dtype: torch.dtype, *, max_bytes: int = MAX_SHARD_BYTES) -> list[Shard]:
    """Cut ``entries`` into files of at most ``max_bytes`` (more only where one entry alone is larger)."""
    groups: list[list[Entry]] = []
    size = 0
    for entry in entries:
        nbytes = math.prod(entry.shape) * dtype.itemsize
        if not groups or size + nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += nbytes
    if len(groups) == 1:
        return [Shard(file=WEIGHTS_FILE, entries=tuple(groups[0]))]
    return [
        Shard(file=f"model-{number:05d}-of-{len(groups):05d}.safetensors", entries=tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def write_shard(
    folder: Path, shard: Shard, dtype: torch.dtype, tensors: Callable[[Entry], Iterator[tuple[str, torch.Tensor]]]
) -> None:
    """Stream one safetensors file: the header follows from the table, then each entry's tensors as they come.

    ``safetensors.torch.save_file`` would need the whole file's tensors in memory at once.

    Args:
        tensors: yields (name, tensor) of an entry, in the order of ``entry.sources``.
    """
    code = next(code for code, stored in DTYPES.values() if stored == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in shard.entries:
        for source in entry.sources:
            begin, end = end, end + math.prod(source.shape) * dtype.itemsize
            header[source.name] = {"dtype": code, "shape": list(source.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with (folder / shard.file).open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for entry in shard.entries:
            for source, (name, tensor) in zip(entry.sources, tensors(entry), strict=True):
                if (name, tuple(tensor.shape), tensor.dtype) != (source.name, source.shape, dtype):
                    raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype} does not fit {source}")
                stream.write(tensor_bytes(tensor))
        stream.flush()
        os.fsync(stream.fileno())


def write_index(folder: Path, shards: Sequence[Shard], dtype: torch.dtype) -> None:
    """Write the index that several files need; nothing for a single one."""
    if len(shards) == 1:
        return
    weight_map = {source.name: shard.file for shard in shards for entry in shard.entries for source in entry.sources}
    total = sum(math.prod(entry.shape) for shard in shards for entry in shard.entries) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer files that ``source`` has into ``target`` (made when needed); return their names."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        check_inside(source, source / name)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return names
