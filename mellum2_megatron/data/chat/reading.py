"""Rows of chat files, each with its place for messages."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.stage_bars import Advance
from mellum2_megatron.data.chat.records import MESSAGE_KEYS, OTHER_KEYS
from mellum2_megatron.data.corpus.left_out import LeftOut, printable
from mellum2_megatron.data.corpus.listing import SourceFile, list_files, named_file
from mellum2_megatron.data.corpus.rows import BadRow, place, read_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFile:
    """A file of conversations.

    Attributes:
        source: number of the input that it belongs to.
        file: the file.
    """

    source: int
    file: SourceFile


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRow:
    """A row.

    Attributes:
        source: number of its input.
        place: file and line, for messages.
        content: the row, or its fault.
        parquet: true if absent keys are nulls, see `parse_record`.
    """

    source: int
    place: str
    content: dict[str, Any] | BadRow
    parquet: bool


def chat_files(
    inputs: Sequence[str | os.PathLike[str]], output: Path, left_out: LeftOut
) -> list[ChatFile]:
    """Return the files of conversations that the user names, in order.

    Args:
        inputs: files, and folders of them.
        output: folder that will be written.
        left_out: tally to add the folders' other files to.

    Raises:
        InputError: none, one that does not exist or has no rows, one twice, a folder without any,
            or an output inside an input or around it.
    """
    if not inputs:
        raise InputError("no input", rule="there must be one or more", fix="name a .jsonl file")
    files: list[ChatFile] = []
    named: set[str] = set()
    target = Path(os.path.realpath(output))
    for source, given in enumerate(inputs):
        path, real = Path(given), Path(os.path.realpath(given))
        name = printable(given)
        if str(real) in named:
            raise InputError(name, rule="each input may be named once", fix="remove the repetition")
        named.add(str(real))
        if real == target or real in target.parents or target in real.parents:
            raise InputError(
                f"--output {printable(output)}",
                rule=f"it must lie apart from {name}: neither inside the other",
                fix="choose another output folder",
            )
        if path.is_dir():
            listed = []
            for file in list_files(path, left_out):
                if file.format == "text":
                    left_out.add("no_rows", printable(file.path))
                else:
                    listed.append(file)
        else:
            try:
                listed = [named_file(path, name)]
            except InputError as error:
                if path.suffix.lower() != ".json" or not path.is_file():
                    raise
                raise InputError(
                    name,
                    rule="it must have one conversation, a JSON object, in each line",
                    fix=f"write an array's entries so: jq -c '.[]' {name} > "
                    f"{Path(name).with_suffix('.jsonl')}",
                ) from error
        if not listed or listed[0].format == "text":
            raise InputError(
                name,
                rule="it holds no rows: conversations are read from .jsonl (also .gz, .zst) and "
                ".parquet files",
                fix="write one conversation a line and call the file .jsonl",
            )
        files += [ChatFile(source=source, file=file) for file in listed]
    return files


def read_chat_rows(files: Sequence[ChatFile], advance: Advance) -> Iterator[ChatRow]:
    """Yield the rows of all files in order; ``advance`` gets the bytes of each finished file."""
    for chat_file in files:
        file = chat_file.file
        rows = read_rows(file, columns=_columns, whole_numbers=True)
        for number, row in rows:
            yield ChatRow(
                source=chat_file.source,
                place=place(file, number),
                content=row,
                parquet=file.format == "parquet",
            )
        advance(file.size)


def _columns(names: Sequence[str]) -> list[str]:
    """Return the columns to read of a parquet file; all if none is known, for the message."""
    known = [name for name in names if name in (*MESSAGE_KEYS, *OTHER_KEYS)]
    return known or list(names)
