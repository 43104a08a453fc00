"""Write Hugging Face model folders in the released layout, tensor by tensor."""

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

from conversion.huggingface.dtypes import Dtypes
from conversion.huggingface.format import (
    DTYPES,
    GENERATION_CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    read_json,
    tensor_bytes,
)
from conversion.mapping import Entry
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.model_folders import check_inside
from mellum2_megatron.data.tokens.tokenizer import load_tokenizer

TOKENIZER_FILE = "tokenizer.json"
# Names that transformers gives to tokenizer files; no other file of a folder is copied.
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# Size limit of the released model's files, as transformers' save_pretrained has cut them.
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One safetensors file to write.

    Attributes:
        file: file name.
        entries: entries whose tensors it holds, in order.
    """

    file: str
    entries: tuple[Entry, ...]


def plan_shards(
    entries: Iterable[Entry], dtypes: Dtypes, *, max_bytes: int = MAX_SHARD_BYTES
) -> list[Shard]:
    """Distribute ``entries`` to files of at most ``max_bytes``, default 5 GB.

    A file of a single entry may be larger.
    """
    # An entry is not cut: its tensors are converted together and written to one file.
    groups: list[list[Entry]] = []
    size = 0
    for entry in entries:
        nbytes = dtypes.nbytes([entry])
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


def create_shard(folder: Path, shard: Shard, dtypes: Dtypes) -> dict[str, int]:
    """Create one safetensors file at its final size, with its header; keep one that exists.

    Returns:
        Position of each tensor's first byte in the file, by name.
    """
    # ``safetensors.torch.save_file`` would need all tensors of the file in memory at once.
    header, positions, size = _header(shard, dtypes)
    path = folder / shard.file
    # An existing file is an earlier attempt's, with finished tensors in it.
    if not path.exists():
        with path.open("wb") as stream:
            stream.write(header)
            stream.truncate(size)
    return positions


def shard_size(shard: Shard, dtypes: Dtypes) -> int:
    """Return the size of the file in bytes."""
    return _header(shard, dtypes)[2]


def write_tensor(descriptor: int, position: int, tensor: torch.Tensor) -> None:
    """Write a tensor's bytes at a position of an open file; any thread may call this."""
    # One call may write only a part (man 2 pwrite).
    view, done = tensor_bytes(tensor), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], position + done)


def _header(shard: Shard, dtypes: Dtypes) -> tuple[bytes, dict[str, int], int]:
    """Return the header's bytes, each tensor's position in the file, and the file's size."""
    codes = {dtype: code for code, dtype in DTYPES.values()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    sources = [source for entry in shard.entries for source in entry.sources]
    # Wider dtypes first: a float32 tensor after an odd number of bfloat16 values would not be
    # aligned, and torch does not read it then.
    for source in sorted(sources, key=lambda source: -dtypes.by_name[source.name].itemsize):
        dtype = dtypes.by_name[source.name]
        begin, end = end, end + math.prod(source.shape) * dtype.itemsize
        header[source.name] = {
            "dtype": codes[dtype],
            "shape": list(source.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    # The format's own padding: it aligns the tensors to 8 bytes.
    text += b" " * (-len(text) % 8)
    # The header's size takes 8 bytes; offsets count from the end of the header.
    start = 8 + len(text)
    del header["__metadata__"]
    positions = {name: start + info["data_offsets"][0] for name, info in header.items()}
    return len(text).to_bytes(8, "little") + text, positions, start + end


def write_index(folder: Path, shards: Sequence[Shard], dtypes: Dtypes) -> None:
    """Write the index of several files; a single file has none."""
    if len(shards) == 1:
        return
    weight_map = {
        source.name: shard.file
        for shard in shards
        for entry in shard.entries
        for source in entry.sources
    }
    total = sum(dtypes.nbytes(shard.entries) for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def check_tokenizer(folder: Path, architecture: Mellum2Architecture) -> None:
    """Check that the folder's tokenizer can be read and fits the model's vocabulary.

    Raises:
        InputError: it does not, or ``tokenizer.json`` is missing or a link out of the folder.
    """
    check_inside(folder, folder / TOKENIZER_FILE)
    # The largest id and not the count: ids may have gaps.
    top = max(load_tokenizer(folder).get_vocab(with_added_tokens=True).values(), default=-1)
    if top >= architecture.vocab_size:
        raise InputError(
            f"tokenizer {folder} has token id {top}",
            rule=f"the model's vocabulary has {architecture.vocab_size} entries",
            fix="give the tokenizer the model was trained with",
        )


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer files of ``source`` into ``target``, which is created if there are any.

    Returns:
        Names of the files copied.

    Raises:
        InputError: a file is a link out of ``source``.
    """
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        check_inside(source, source / name)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return names


def copy_generation_config(source: Path, target: Path) -> bool:
    """Copy ``generation_config.json``.

    Returns:
        False if ``source`` has none.

    Raises:
        InputError: it is a link out of ``source``, or no JSON object.
    """
    path = source / GENERATION_CONFIG_FILE
    if not path.is_file():
        return False
    check_inside(source, path)
    read_json(path, "it was just there")
    shutil.copyfile(path, target / GENERATION_CONFIG_FILE)
    return True
