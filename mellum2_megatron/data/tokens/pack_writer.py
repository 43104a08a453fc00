"""Writes packs: arrays of pieces and their order in, files out; the layout is in `pack_files`.

::

    pieces = cut_documents(document_lengths, capacity=8192)
    order = shuffle(best_fit(pieces.lengths, capacity=8192), seed=1234)
    shard = write_shard(folder / "train-00000", PieceTable(...), order, sequence_length=8192, ...)
    write_record(folder, splits={"train": [shard]}, ...)

Every file appears complete or not at all, and the folder counts as packs once its record is there.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mellum2_megatron.common.files import atomic_path, write_json
from mellum2_megatron.data.tokens.best_fit_packing import PackOrder
from mellum2_megatron.data.tokens.pack_files import (
    FORMAT,
    MASK_MAGIC,
    PACKS_FILE,
    PIECE_ARRAYS,
    PIECES_MAGIC,
    header_bytes,
)

_CHUNK_TOKENS = 2**22
"""Tokens that are put together in memory at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceTable:
    """The pieces of a shard; all arrays but the first and the last are over pieces, `[n]`.

    Attributes:
        tokens: ids of all documents, one array in memory or mapped, `[t]`.
        offsets: place in `tokens` of each piece's first token.
        lengths: number of tokens of each piece.
        flags: `PieceFlag`s.
        sources: number of each piece's source, below 65,536.
        documents: hash of each piece's document, 64 bits.
        label_mask: `[t]`, true where a token counts when it is predicted; None (default): all do.
    """

    tokens: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    flags: npt.NDArray[np.uint8]
    sources: npt.NDArray[np.uint16]
    documents: npt.NDArray[np.uint64]
    label_mask: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFacts:
    """Facts of a written shard, one entry of ``packs.json``.

    Attributes:
        name: name of the shard's files, without suffix.
        packs: number of packs.
        pieces: number of pieces.
        tokens: number of tokens, padding not counted.
        padding: number of padded places.
        align: every piece starts at a multiple of it.
        max_pieces: largest number of pieces in a pack.
        files: size in bytes and SHA-256 of each file, by suffix.
    """

    name: str
    packs: int
    pieces: int
    tokens: int
    padding: int
    align: int
    max_pieces: int
    files: dict[str, dict[str, Any]]


def rooms(lengths: npt.NDArray[np.int64], align: int) -> npt.NDArray[np.int64]:
    """Return the places that each piece takes: its length rounded up to a multiple of `align`.

    Pack by rooms, not by lengths. Context parallelism over cp ranks needs ``align = 2 * cp``.
    """
    return -(-lengths // align) * align


def write_shard(
    prefix: Path,
    table: PieceTable,
    order: PackOrder,
    *,
    sequence_length: int,
    pad: int,
    vocab_size: int,
    align: int = 1,
) -> ShardFacts:
    """Write one shard of packs.

    Args:
        prefix: path of the files, without suffix.
        table: the pieces.
        order: the pieces of each pack, in order.
        sequence_length: tokens of a pack, a multiple of `align`.
        pad: id at padded places, a valid one.
        vocab_size: entries of the tokenizer; ids below 65,500 take 2 bytes, as in Megatron
            (megatron/core/datasets/indexed_dataset.py, ``DType.optimal_dtype``, 0.19.2).
        align: every piece starts at a multiple of it, default 1.

    Raises:
        ValueError: a pack holds more than `sequence_length`, or an id is not in the vocabulary.
    """
    if sequence_length % align or not 0 <= pad < vocab_size:
        raise ValueError(f"packs of {sequence_length} aligned to {align}, padded with {pad}")
    lengths = table.lengths[order.pieces]
    taken = rooms(lengths, align)
    ends = np.cumsum(taken)
    pack_of = np.repeat(np.arange(order.starts.size - 1), np.diff(order.starts))
    first = order.starts[:-1]
    before = np.concatenate(([0], ends))[first] if first.size else first
    starts = ends - taken - before[pack_of]
    if lengths.size and (starts + taken).max() > sequence_length:
        raise ValueError(f"a pack of {(starts + taken).max()} tokens, not {sequence_length}")
    packs = order.starts.size - 1
    dtype = np.dtype(np.uint16 if vocab_size < 65500 else np.int32)
    files = {}
    rows = _Rows(table, order, starts, sequence_length)
    with atomic_path(f"{prefix}.bin") as file, file.open("wb") as stream:
        digest = hashlib.sha256()
        for tokens in rows.of(table.tokens, fill=pad):
            if tokens.min() < 0 or tokens.max() >= vocab_size:
                raise ValueError(f"ids {tokens.min()} to {tokens.max()}, not below {vocab_size}")
            _write(stream, digest, tokens.astype(dtype))
        files[".bin"] = _facts(stream, digest)
    files[".idx"] = _write_index(Path(f"{prefix}.idx"), packs, sequence_length, dtype)
    arrays = {
        "starts": starts,
        "lengths": lengths,
        "flags": table.flags[order.pieces],
        "sources": table.sources[order.pieces],
        "documents": table.documents[order.pieces],
    }
    facts = {
        "packs": packs,
        "sequence_length": sequence_length,
        "align": align,
        "max_pieces": int(np.diff(order.starts).max(initial=0)),
    }
    files[".pieces"] = _write_arrays(
        Path(f"{prefix}.pieces"),
        PIECES_MAGIC,
        facts,
        {
            "first": order.starts.astype("<i8"),
            **{name: arrays[name].astype(kind) for name, kind in PIECE_ARRAYS.items()},
        },
    )
    if table.label_mask is not None:
        bits = [
            np.packbits(_as_labels(mask), axis=1, bitorder="little").ravel()
            for mask in rows.of(table.label_mask, fill=False)
        ]
        files[".mask"] = _write_arrays(
            Path(f"{prefix}.mask"),
            MASK_MAGIC,
            {"packs": packs, "sequence_length": sequence_length},
            {"bits": np.concatenate(bits) if bits else np.empty(0, dtype=np.uint8)},
        )
    else:
        # A mask that an earlier attempt left would be read with the new tokens.
        Path(f"{prefix}.mask").unlink(missing_ok=True)
    tokens_in = int(lengths.sum())
    return ShardFacts(
        name=prefix.name,
        packs=packs,
        pieces=lengths.size,
        tokens=tokens_in,
        padding=packs * sequence_length - tokens_in,
        align=align,
        max_pieces=facts["max_pieces"],
        files=files,
    )


def write_record(
    folder: Path,
    *,
    splits: Mapping[str, Sequence[ShardFacts]],
    sequence_length: int,
    sources: Sequence[str],
    tokenizer_sha256: str,
    vocab_size: int,
    eod: int,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write ``packs.json``, after which the folder counts as packs.

    Args:
        folder: folder of the shards; the tokenizer belongs into its ``tokenizer/``.
        splits: shards of ``train`` and ``valid``, in their order.
        sequence_length: tokens of a pack.
        sources: name of each source, by its number.
        tokenizer_sha256, vocab_size: hash of ``tokenizer.json``, and number of entries.
        eod: id that ends every document.
        more: further entries, such as the hash of a plan.
    """
    write_json(
        folder / PACKS_FILE,
        {
            **(more or {}),
            "format": FORMAT,
            "sequence_length": sequence_length,
            "sources": list(sources),
            "tokenizer": {"sha256": tokenizer_sha256, "vocab_size": vocab_size, "eod": eod},
            "splits": {
                split: [
                    {name: getattr(shard, name) for name in ShardFacts.__dataclass_fields__}
                    for shard in shards
                ]
                for split, shards in splits.items()
            },
        },
    )


@dataclass(frozen=True, slots=True)
class _Rows:
    """Packs as rows, put together from the pieces a part at a time."""

    table: PieceTable
    order: PackOrder
    starts: npt.NDArray[np.int64]
    length: int

    def of(self, values: npt.NDArray[Any], *, fill: Any) -> Iterator[npt.NDArray[Any]]:
        """Yield `[packs, L]` of a value for each token, padded with `fill`."""
        packs = self.order.starts.size - 1
        step = max(1, _CHUNK_TOKENS // self.length)
        for first in range(0, packs, step):
            last = min(packs, first + step)
            rows = np.full((last - first) * self.length, fill, dtype=np.asarray(values[:0]).dtype)
            begin, end = self.order.starts[first], self.order.starts[last]
            pieces = self.order.pieces[begin:end]
            row = np.repeat(np.arange(last - first), np.diff(self.order.starts[first : last + 1]))
            places = row * self.length + self.starts[begin:end]
            for place, offset, length in zip(
                places.tolist(),
                self.table.offsets[pieces].tolist(),
                self.table.lengths[pieces].tolist(),
                strict=True,
            ):
                rows[place : place + length] = values[offset : offset + length]
            yield rows.reshape(-1, self.length)


def _as_labels(counts: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return a mask of tokens as one of labels: the label at a place is the token after it."""
    shifted = np.zeros_like(counts)
    shifted[:, :-1] = counts[:, 1:]
    return shifted


def _write_index(file: Path, packs: int, length: int, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Write Megatron's index of `packs` documents of `length` tokens each."""
    code = {"uint16": 8, "int32": 4}[dtype.name]
    parts = (
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, packs, packs + 1),
        np.full(packs, length, dtype="<i4").tobytes(),
        (np.arange(packs, dtype="<i8") * length * dtype.itemsize).tobytes(),
        np.arange(packs + 1, dtype="<i8").tobytes(),
    )
    with atomic_path(file) as temporary, temporary.open("wb") as stream:
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
            stream.write(part)
        return _facts(stream, digest)


def _write_arrays(
    file: Path, magic: bytes, facts: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]
) -> dict[str, Any]:
    header, places = header_bytes(
        magic, facts, {name: (array.dtype.str, array.size) for name, array in arrays.items()}
    )
    with atomic_path(file) as temporary, temporary.open("wb") as stream:
        digest = hashlib.sha256(header)
        stream.write(header)
        for name, array in arrays.items():
            gap = b"\0" * (places[name] - stream.tell())
            digest.update(gap)
            stream.write(gap)
            _write(stream, digest, array)
        return _facts(stream, digest)


def _write(stream: BinaryIO, digest: Any, array: npt.NDArray[Any]) -> None:
    content = np.ascontiguousarray(array).data
    digest.update(content)
    stream.write(content)


def _facts(stream: BinaryIO, digest: Any) -> dict[str, Any]:
    return {"bytes": stream.tell(), "sha256": digest.hexdigest()}
