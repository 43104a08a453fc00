"""Packs on disk: tokens that stock Megatron reads, and a record of the pieces in each pack.

A shard of packs, all of the same ``sequence_length`` L::

    NAME.bin, NAME.idx   Megatron indexed dataset with one sequence and document of L tokens a pack
    NAME.pieces          the pieces of each pack: place, length, flags, source, document
    NAME.mask            optional: one bit for each label, 1 where it counts in the loss

An unmodified Megatron trains on the same packs with ``--seq-length L``: its samples then are whole
packs, without boundaries. ``.pieces`` and ``.mask`` begin with a magic word, the length of a JSON
header (uint32) and the header; arrays follow, little-endian, at the places that it states. Bounds
of documents are stored, never read off the tokens. A place that no piece covers is padding.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.common.files import LARGEST_TEXT, check_size
from mellum2_megatron.common.json_files import load_json, parse_object
from mellum2_megatron.data.tokens.indexed_files import IndexedFiles, read_indexed

FORMAT = 1
"""Version of the files' layout."""

PACKS_FILE = "packs.json"
"""Name of the record of a folder of packs."""

PIECES_MAGIC, MASK_MAGIC = b"M2PIECES", b"M2LABELS"
_ALIGNMENT = 64


class PieceFlag(IntFlag):
    """Properties of a piece, one bit each.

    Attributes:
        PSM, SPM: fill-in-the-middle in this order of prefix, suffix and middle.
        CONTINUED: continues a cut document, so it does not start where the document does.
        CUT: the document goes on in another piece, so it does not end where the document does.
        REPOSITORY: several files of one repository.
    """

    PSM = 1
    SPM = 2
    CONTINUED = 4
    CUT = 8
    REPOSITORY = 16


PIECE_ARRAYS: dict[str, str] = {
    "starts": "<i4",
    "lengths": "<i4",
    "flags": "<u1",
    "sources": "<u2",
    "documents": "<u8",
}
"""Name and type of each array over pieces, in the order of the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackPieces:
    """The pieces of one pack, `[n]` each.

    Attributes:
        starts: place of the first token in the pack.
        lengths: number of tokens, padding not counted.
        flags: `PieceFlag`s.
        sources: numbers of the sources.
        documents: hashes of the documents.
    """

    starts: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    flags: npt.NDArray[np.uint8]
    sources: npt.NDArray[np.uint16]
    documents: npt.NDArray[np.uint64]


class PackShard:
    """Reads one shard by mapping its files.

    Args:
        prefix: path of the shard, without suffix.
        name: the user's name for it, for messages; default the prefix.

    Attributes:
        sequence_length: tokens of a pack.
        align: every piece starts at a multiple of it.
        max_pieces: largest number of pieces in a pack.

    Raises:
        InputError: a file is missing, damaged, cut short, or of another format.
    """

    def __init__(self, prefix: Path, name: str | None = None) -> None:
        self.prefix = prefix
        name = name or str(prefix)
        self.indexed: IndexedFiles = read_indexed(prefix, name)
        header, pieces = _read_arrays(Path(f"{prefix}.pieces"), PIECES_MAGIC, name)
        self.sequence_length: int = header["sequence_length"]
        self.align: int = header["align"]
        self.max_pieces: int = header["max_pieces"]
        self._first = pieces["first"]
        self._pieces = {array: pieces[array] for array in PIECE_ARRAYS}
        self._tokens = np.asarray(self.indexed.stream()).reshape(-1, self.sequence_length)
        self._mask: npt.NDArray[np.uint8] | None = None
        packs = header["packs"]
        if Path(f"{prefix}.mask").is_file():
            mask_header, arrays = _read_arrays(Path(f"{prefix}.mask"), MASK_MAGIC, name)
            self._mask = arrays["bits"].reshape(mask_header["packs"], -1)
            packs = min(packs, mask_header["packs"])
        if packs != len(self._tokens) or packs + 1 != len(self._first):
            raise InputError(
                name,
                rule=f"{prefix}.bin has {len(self._tokens)} packs, its other files {packs}",
                fix="write the packs again",
            )

    def __len__(self) -> int:
        return len(self._tokens)

    def tokens(self, pack: int) -> npt.NDArray[np.generic]:
        """Return the tokens of a pack, `[L]`, mapped."""
        row: npt.NDArray[np.generic] = self._tokens[pack]
        return row

    def pieces(self, pack: int) -> PackPieces:
        """Return the pieces of a pack, mapped."""
        begin, end = int(self._first[pack]), int(self._first[pack + 1])
        return PackPieces(**{name: array[begin:end] for name, array in self._pieces.items()})

    def all_pieces(self) -> PackPieces:
        """Return the pieces of all packs, mapped."""
        return PackPieces(**self._pieces)

    def bounds(self, pack: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Return place and length of each piece of a pack, `[n]` each, mapped."""
        begin, end = self._first[pack : pack + 2].tolist()
        return self._pieces["starts"][begin:end], self._pieces["lengths"][begin:end]

    def uncounted_labels(self, pack: int) -> npt.NDArray[np.integer]:
        """Return the places whose label does not count in the loss, `[n]`.

        Those of the last label of each piece and of padding, and what the mask leaves out.
        """
        starts, lengths = self.bounds(pack)
        ends = starts + lengths
        places = [ends - 1]
        if np.add.reduce(lengths) < self.sequence_length:
            # Padding from the end of a piece to the next one.
            gaps = np.append(starts[1:], self.sequence_length) - ends
            firsts = ends - (np.cumsum(gaps) - gaps)
            places.append(np.repeat(firsts, gaps) + np.arange(gaps.sum()))
        if self._mask is not None:
            bits = np.unpackbits(self._mask[pack], bitorder="little", count=self.sequence_length)
            places.append(np.flatnonzero(bits == 0))
        return np.concatenate(places) if len(places) > 1 else places[0]

    def counted_labels(self, pack: int) -> npt.NDArray[np.bool_]:
        """Return true where the label of a pack counts in the loss, `[L]`."""
        counted = np.ones(self.sequence_length, dtype=np.bool_)
        counted[self.uncounted_labels(pack)] = False
        return counted


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """A shard in ``packs.json``; fields as in `pack_writer.ShardFacts`.

    Attributes:
        prefix: path of the shard, without suffix.
        packs, align, max_pieces: number of packs, and bounds on their pieces.
    """

    prefix: Path
    packs: int
    align: int
    max_pieces: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PackFolder:
    """A folder of packs, as its ``packs.json`` describes it.

    Attributes:
        path: the folder.
        sequence_length: tokens of a pack.
        sources: name of each source, by its number.
        shards: shards of each split.
        tokenizer: ``sha256`` and ``vocab_size`` of the tokenizer, and ``eod``, the id that ends
            every document.
        facts: the whole record.
    """

    path: Path
    sequence_length: int
    sources: tuple[str, ...]
    shards: dict[str, tuple[ShardEntry, ...]]
    tokenizer: dict[str, Any]
    facts: dict[str, Any]

    def prefixes(self, split: str) -> tuple[Path, ...]:
        """Return the prefix of each shard of a split."""
        return tuple(shard.prefix for shard in self.shards.get(split, ()))

    def packs(self, split: str) -> int:
        """Return the number of packs of a split."""
        return sum(shard.packs for shard in self.shards.get(split, ()))

    def identity(self, split: str) -> str:
        """Return the hashes of a split's tokens as one text."""
        shards = self.facts["splits"].get(split, ())
        return " ".join(shard["files"][".bin"]["sha256"] for shard in shards)


def read_pack_folder(path: Path, name: str, *, check_files: bool = True) -> PackFolder:
    """Read a folder of packs; check that its files have their full length.

    Args:
        path: the folder.
        name: the user's name for it, for messages.
        check_files: check the lengths, default true. False: the record alone is read.

    Raises:
        InputError: no record, a damaged one, another format, or a file of another size.
    """
    file = path / PACKS_FILE
    again = "write the packs again"
    try:
        facts = load_json(file)
        if facts["format"] != FORMAT:
            raise InputError(
                name,
                rule=f"its format is {facts['format']}, this version reads {FORMAT}",
                fix=again,
            )
        folder = PackFolder(
            path=path,
            sequence_length=int(facts["sequence_length"]),
            sources=tuple(facts["sources"]),
            shards={
                split: tuple(
                    ShardEntry(
                        prefix=path / shard["name"],
                        packs=shard["packs"],
                        align=shard["align"],
                        max_pieces=shard["max_pieces"],
                    )
                    for shard in shards
                )
                for split, shards in facts["splits"].items()
            },
            tokenizer=dict(facts["tokenizer"]),
            facts=facts,
        )
        sizes = {
            path / f"{shard['name']}{suffix}": record["bytes"]
            for shards in facts["splits"].values()
            for shard in shards
            for suffix, record in shard["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(str(file), rule=f"it is damaged ({error!r})", fix=again) from error
    for data_file, size in sizes.items() if check_files else ():
        check_size(data_file, size, fix=again)
    return folder


def header_bytes(
    magic: bytes, facts: Mapping[str, Any], arrays: Mapping[str, tuple[str, int]]
) -> tuple[bytes, dict[str, int]]:
    """Return a file's beginning, and the place of each array.

    Args:
        magic: 8 bytes that name the kind of file.
        facts: entries of the header.
        arrays: name -> NumPy type and number of items, in the order of the file.
    """

    def header(first: int) -> tuple[bytes, dict[str, int]]:
        place, table, places = first, {}, {}
        for name, (dtype, count) in arrays.items():
            places[name] = place
            table[name] = {"dtype": dtype, "count": count, "offset": place}
            place += -(-count * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
        text = json.dumps({"format": FORMAT, **facts, "arrays": table}).encode("utf-8")
        return magic + struct.pack("<I", len(text)) + text, places

    # The places are in the header and depend on its length; its digits settle at once.
    size = 0
    while True:
        content, places = header(size)
        needed = -(-len(content) // _ALIGNMENT) * _ALIGNMENT
        if needed <= size:
            return content.ljust(size, b"\0"), places
        size = needed


def _read_arrays(
    file: Path, magic: bytes, name: str
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Return the header of a file and its arrays, mapped."""
    again = "write the packs again"
    try:
        with file.open("rb") as stream:
            start = stream.read(12)
            if len(start) < 12 or start[:8] != magic:
                raise InputError(name, rule=f"{file} is not a record of packs", fix=again)
            (size,) = struct.unpack("<I", start[8:])
            if size > LARGEST_TEXT:
                raise InputError(name, rule=f"{file} has a header of {size:,} bytes", fix=again)
            header = parse_object(stream.read(size))
        if header["format"] != FORMAT:
            raise InputError(
                name,
                rule=f"{file} has format {header['format']}, this version reads {FORMAT}",
                fix=again,
            )
        arrays = {
            # Plain arrays over the map: slices of a memmap itself cost several times as much.
            array: np.asarray(
                np.memmap(
                    file,
                    dtype=place["dtype"],
                    mode="r",
                    offset=place["offset"],
                    shape=place["count"],
                )
            )
            if place["count"]
            else np.empty(0, dtype=place["dtype"])
            for array, place in header["arrays"].items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            name, rule=f"{file} cannot be read ({first_line(error)})", fix=again
        ) from error
    return header, arrays
