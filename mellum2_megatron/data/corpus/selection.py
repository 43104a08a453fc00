"""Choice of a corpus' documents, and of the split of each.

No text stays in memory. ``select`` reads every document once, drops exact duplicates by content
hash, decides the split from that hash, and returns a reference to each document. ``read_selected``
streams their texts again.

The result is deterministic: the same files and the same seed give the same documents in the same
order with the same split, wherever the files lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.data.corpus.discovery import Source
from mellum2_megatron.data.corpus.left_out import LeftOut, printable
from mellum2_megatron.data.corpus.listing import SourceFile
from mellum2_megatron.data.corpus.rows import place
from mellum2_megatron.data.corpus.sources import ReadOptions, read_documents

Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")


@dataclass(frozen=True, kw_only=True, slots=True)
class Selected:
    """A reference to one document.

    Attributes:
        source: index of the document's source.
        file: index of the file among the source's.
        row: line or row number from 1; 0 for a whole file.
        size: bytes of the text in UTF-8.
        digest: first 16 bytes of the text's SHA-256; decides duplicates and the split.
        split: the document's split.
    """

    source: int
    file: int
    row: int
    size: int
    digest: bytes
    split: Split


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The documents of a corpus.

    Attributes:
        sources: all sources, contributing or not.
        options: how they were read.
        documents: the documents, ordered by source, file and row.
        left_out: what was left out.
    """

    sources: tuple[Source, ...]
    options: ReadOptions
    documents: tuple[Selected, ...]
    left_out: LeftOut

    def of(self, split: Split) -> list[Selected]:
        """Return the documents of one split, in order."""
        return [document for document in self.documents if document.split == split]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A document that may be chosen.

    Attributes:
        key: orders candidates at random; empty without a limit.
        source, file, row, size: as in `Selected`.
        digest: as in `Selected`; None for a text file that has not been read.
    """

    key: bytes
    source: int
    file: int
    row: int
    size: int
    digest: bytes | None


def select(
    sources: Sequence[Source],
    *,
    seed: int,
    valid_fraction: float,
    max_bytes: int | None,
    options: ReadOptions | None = None,
    left_out: LeftOut | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Selection:
    """Read every candidate once, and choose the corpus' documents and the split of each.

    With ``max_bytes`` the candidates are visited in the order of a hash of (seed, source, relative
    path, row). One that does not fit into what is left is passed over, and the rest goes on. This
    is an even sample of all of them, but for its last few documents, which are shorter. It is the
    same on every machine with the same files.

    Args:
        sources: sources of candidates.
        seed: seed of the sample and of the split.
        valid_fraction: share of the documents in the validation split, drawn by content hash.
        max_bytes: upper limit of the corpus in bytes of UTF-8, or None.
        options: how files are read; default `ReadOptions()`.
        left_out: tally to continue; default a new one.
        advance: called with the bytes of each document taken.

    Raises:
        InputError: a file or row cannot be read, see `read_documents`.
    """
    options = options or ReadOptions()
    left_out = left_out or LeftOut()
    candidates: Iterable[_Candidate] = (
        candidate
        for index, source in enumerate(sources)
        for candidate in _candidates(
            index, source, None if max_bytes is None else seed, options, left_out
        )
    )
    if max_bytes is not None:
        candidates = sorted(candidates, key=lambda candidate: candidate.key)
    seen: set[bytes] = set()
    documents: list[Selected] = []
    total = 0
    for candidate in candidates:
        file = sources[candidate.source].files[candidate.file]
        if max_bytes is not None and total + candidate.size > max_bytes:
            reason = "too_large" if candidate.size > max_bytes else "not_sampled"
            left_out.add(reason, _name(file, candidate.row))
            continue
        digest, size = candidate.digest, candidate.size
        if digest is None:
            texts = [document.text for document in read_documents(file, options, left_out)]
            if not texts:
                continue
            data = texts[0].encode("utf-8")
            digest, size = _digest(data), len(data)
        if digest in seen:
            left_out.add("duplicate", _name(file, candidate.row))
            continue
        seen.add(digest)
        total += size
        advance(size)
        # Uniform in [0, 1) and a function of content and seed alone: an even split that stays the
        # same when files are moved or added.
        draw = hashlib.blake2b(digest, digest_size=8, key=str(seed).encode()).digest()
        fraction = int.from_bytes(draw, "big") / 2**64
        documents.append(
            Selected(
                source=candidate.source,
                file=candidate.file,
                row=candidate.row,
                size=size,
                digest=digest,
                split="valid" if fraction < valid_fraction else "train",
            )
        )
    # Datasets keep this order, whatever the order of reading was.
    documents.sort(key=_place)
    return Selection(
        sources=tuple(sources), options=options, documents=tuple(documents), left_out=left_out
    )


def read_selected(
    selection: Selection, documents: Iterable[Selected]
) -> Iterator[tuple[Selected, str]]:
    """Yield selected documents with their texts, in constant memory.

    Args:
        selection: the selection that the documents are part of.
        documents: some or all of its documents, in its order.

    Raises:
        WorkError: a file is gone, or a text is no longer the selected one.
    """
    fix = "leave the input files alone while they are prepared, and run the command again"
    for (source, index), group in groupby(documents, key=lambda one: (one.source, one.file)):
        file = selection.sources[source].files[index]
        wanted = list(group)
        rows = read_documents(file, selection.options, LeftOut())
        try:
            for document in wanted:
                text = next((row.text for row in rows if row.row == document.row), None)
                name = _name(file, document.row)
                if text is None:
                    raise WorkError(f"{name} can no longer be read", fix=fix)
                if _digest(text.encode("utf-8")) != document.digest:
                    raise WorkError(f"{name} changed while the corpus was prepared", fix=fix)
                yield document, text
        except InputError as error:
            raise WorkError(
                f"{error.value} can no longer be read ({error.rule})", fix=fix
            ) from error


def _candidates(
    index: int, source: Source, seed: int | None, options: ReadOptions, left_out: LeftOut
) -> Iterator[_Candidate]:
    """Yield the documents of a source; the files of rows are read, text files are not yet."""
    for number, file in enumerate(source.files):
        label = f"{seed}\0{source.key}\0{file.relative}\0".encode("utf-8", "surrogateescape")
        if file.format == "text":
            key = b"" if seed is None else _hash(label)
            yield _Candidate(key, index, number, 0, file.size, None)
            continue
        for document in read_documents(file, options, left_out):
            data = document.text.encode("utf-8")
            key = b"" if seed is None else _hash(label + str(document.row).encode())
            yield _Candidate(key, index, number, document.row, len(data), _digest(data))


def _place(document: Selected) -> tuple[int, int, int]:
    return document.source, document.file, document.row


def _name(file: SourceFile, row: int) -> str:
    return place(file, row) if row else printable(file.path)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
