"""Hugging Face model folders, written: safetensors streamed tensor by tensor, in the released
layout."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conversion.huggingface.folder import (
    DTYPES,
    GENERATION_CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    check_inside,
    read_json,
    tensor_bytes,
)
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


def plan_shards(
    entries: Iterable[Entry], dtype: torch.dtype, *, max_bytes: int = MAX_SHARD_BYTES
) -> list[Shard]:
    """Cut ``entries`` into files of at most ``max_bytes`` (more only where one entry alone is
    larger)."""
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


def create_shard(folder: Path, shard: Shard, dtype: torch.dtype) -> dict[str, int]:
    """Make one safetensors file of its final size, header written, and return where each tensor's
    bytes belong.

    ``safetensors.torch.save_file`` would need the whole file's tensors in memory at once. A file
    that exists already, from an earlier attempt, is kept.
    """
    header, begins, size = _header(shard, dtype)
    path = folder / shard.file
    if not path.exists():
        with path.open("wb") as stream:
            stream.write(header)
            stream.truncate(size)
    return begins


def shard_size(shard: Shard, dtype: torch.dtype) -> int:
    """Bytes of the file."""
    return _header(shard, dtype)[2]


def write_tensor(descriptor: int, begin: int, tensor: torch.Tensor) -> None:
    """Write a tensor's bytes at ``begin`` of an open file; any thread may."""
    view, done = tensor_bytes(tensor), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], begin + done)


def _header(shard: Shard, dtype: torch.dtype) -> tuple[bytes, dict[str, int], int]:
    code = next(code for code, stored in DTYPES.values() if stored == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in shard.entries:
        for source in entry.sources:
            begin, end = end, end + math.prod(source.shape) * dtype.itemsize
            header[source.name] = {
                "dtype": code,
                "shape": list(source.shape),
                "data_offsets": [begin, end],
            }
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    del header["__metadata__"]
    begins = {name: start + info["data_offsets"][0] for name, info in header.items()}
    return len(text).to_bytes(8, "little") + text, begins, start + end


def write_index(folder: Path, shards: Sequence[Shard], dtype: torch.dtype) -> None:
    """Write the index that several files need; nothing for a single one."""
    if len(shards) == 1:
        return
    weight_map = {
        source.name: shard.file
        for shard in shards
        for entry in shard.entries
        for source in entry.sources
    }
    total = (
        sum(math.prod(entry.shape) for shard in shards for entry in shard.entries) * dtype.itemsize
    )
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer files that ``source`` has into ``target`` (made when needed); return their
    names."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        check_inside(source, source / name)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return names


def copy_generation_config(source: Path, target: Path) -> bool:
    """Copy ``generation_config.json`` if ``source`` has one, and say so."""
    path = source / GENERATION_CONFIG_FILE
    if not path.is_file():
        return False
    check_inside(source, path)
    read_json(path, "it was just there")
    shutil.copyfile(path, target / GENERATION_CONFIG_FILE)
    return True
