"""Inputs of `mellum2 data prepare`: the user's files, or a sample of texts as rows in files."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mellum2_megatron.common.stage_bars import stage_bars
from mellum2_megatron.data.corpus.discovery import given_sources, installed_sources
from mellum2_megatron.data.corpus.left_out import LeftOut, printable
from mellum2_megatron.data.corpus.listing import SourceFile, list_files
from mellum2_megatron.data.corpus.selection import Selection, read_selected, select
from mellum2_megatron.data.corpus.sources import Document, ReadOptions, read_documents
from mellum2_megatron.data.prepare import SAMPLED, source_table

logger = logging.getLogger(__name__)

_SAMPLE_FILE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class PackInput:
    """The files of the plan's source.

    Attributes:
        paths: files and folders, as the plan names them.
        files: all files.
        options: how they are read.
        table: row of ``corpus.json`` for each origin.
        refused: installed packages without an open-source licence.
        left_out: what was left out so far.
    """

    paths: tuple[str, ...]
    files: tuple[SourceFile, ...]
    options: ReadOptions
    table: list[dict[str, Any]]
    refused: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)

    def documents(self, left_out: LeftOut, *, most_bytes: int | None = None) -> Iterator[Document]:
        """Yield documents; of files at even distances where all are more than ``most_bytes``."""
        total = sum(file.size for file in self.files)
        stride = 1 if most_bytes is None else max(1, -(-total // most_bytes))
        for file in self.files[::stride]:
            yield from read_documents(file, self.options, left_out)


def find_inputs(
    inputs: Sequence[str | os.PathLike[str]],
    results: Path,
    seed: int,
    max_bytes: int,
    options: ReadOptions,
    progress: bool,
) -> PackInput:
    """Return the user's inputs, or a sample of them or of the installed sources as rows in files.

    Raises:
        InputError: a file or row cannot be read.
    """
    left_out = LeftOut()
    if inputs and not max_bytes and options.max_document_bytes is None:
        sources = given_sources(inputs, left_out)
        return PackInput(
            paths=tuple(os.fspath(path) for path in inputs),
            files=tuple(file for source in sources for file in source.files),
            options=options,
            table=[
                {"name": source.name, "version": None, "licence": source.licence}
                for source in sources
            ],
            left_out=left_out,
        )
    sources, refused = (
        (given_sources(inputs, left_out), []) if inputs else installed_sources(left_out)
    )
    with stage_bars(progress, logger, unit="bytes") as start_stage:
        selection = select(
            sources,
            seed=seed,
            valid_fraction=0.5,  # the plan decides the split
            max_bytes=max_bytes or None,
            options=options,
            left_out=left_out,
            advance=start_stage("reading", max_bytes or None),
        )
    sample = results / "sample"
    sample.mkdir()
    _write_sample(selection, sample)
    return PackInput(
        paths=(str(sample),),
        files=tuple(list_files(sample, LeftOut())),
        options=ReadOptions(),
        table=source_table(selection),
        refused=refused,
        left_out=left_out,
    )


def _write_sample(selection: Selection, folder: Path) -> None:
    """Write the selected texts as rows, with their paths, in files of `_SAMPLE_FILE_BYTES`."""
    size, lines = 0, list[str]()

    def flush() -> None:
        nonlocal size
        name = f"{len(list(folder.iterdir())):05}.jsonl"
        (folder / name).write_text("".join(lines), encoding="utf-8")
        size = 0
        lines.clear()

    for document, text in read_selected(selection, selection.documents):
        file = selection.sources[document.source].files[document.file]
        row = {"text": text, "path": printable(file.relative)}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        size += document.size
        if size >= _SAMPLE_FILE_BYTES:
            flush()
    if lines:
        flush()


def some_texts(given: PackInput) -> Iterator[str]:
    """Yield the first texts of files at even distances, `SAMPLED` in all or a few more."""
    files = given.files[:: max(1, len(given.files) // SAMPLED)]
    share = -(-SAMPLED // max(len(files), 1))
    for file in files:
        for number, document in enumerate(read_documents(file, given.options, LeftOut())):
            if number == share:
                break
            yield document.text
