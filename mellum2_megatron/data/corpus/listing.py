"""Files of a corpus: what a folder holds, in one order, and how each file is to be read.

Nothing is opened here but ``.json`` files, whose name alone does not give their format.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.corpus.left_out import LeftOut, printable

Format = Literal["text", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"]
"""How a file is read: one document, a document a line, or a document a row."""

READ_FORMATS = "text, .jsonl, .jsonl.gz, .jsonl.zst, .json.gz, .parquet"
"""The formats that are read, for messages."""

# Two suffixes are looked up before one, so that `.json.gz` is not `.gz`.
_LINES = (".jsonl", ".ndjson", ".jsonlines")
_FORMATS: dict[str, Format] = dict.fromkeys(_LINES, "jsonl")
_FORMATS[".parquet"] = "parquet"
for _rows in (*_LINES, ".json"):
    _FORMATS |= {
        f"{_rows}.gz": "jsonl.gz",
        f"{_rows}.zst": "jsonl.zst",
        f"{_rows}.zstd": "jsonl.zst",
    }
_COMPRESSED = frozenset(
    ".gz .tgz .zst .zstd .bz2 .tbz2 .xz .txz .lzma .lz4 .br .z .zip .7z .rar .snappy .sz".split()
)
_TABLES = frozenset(
    ".arrow .feather .avro .orc .h5 .hdf5 .npy .npz .pkl .pickle .mds .tfrecord .xlsx "
    ".sqlite .db .duckdb .lance".split()
)
_SNIFFED = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """A regular file that holds documents.

    Attributes:
        path: the file.
        relative: its path below the folder the user named, with ``/``; else its name.
        format: how it is read.
        size: bytes.
        given: true if the user named the file itself: it must then be readable. A fault in a file
            of a folder is counted instead.
    """

    path: Path
    relative: str
    format: Format
    size: int
    given: bool


def list_files(
    root: Path,
    left_out: LeftOut,
    *,
    skip: frozenset[str] = frozenset(),
    keep: Callable[[str], bool] = lambda _: True,
) -> list[SourceFile]:
    """Return the files below a folder in a fixed order: files of a folder, then its folders.

    Hidden files, links to folders, and all that is not a regular file are counted as left out.

    Args:
        root: the folder.
        left_out: tally to add to.
        skip: names of folders to pass over without a count.
        keep: false for names of files to pass over without a count.

    Raises:
        InputError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        rule = f"the folder cannot be listed ({error.strerror})"
        raise InputError(
            printable(error.filename), rule=rule, fix="make it readable or leave it out"
        )

    files: list[SourceFile] = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        descend = []
        for name in sorted(folders):
            path = os.path.join(folder, name)
            if name in skip:
                continue
            if name.startswith("."):
                left_out.add("hidden", printable(path))
            elif os.path.islink(path):
                left_out.add("linked_folder", printable(path))
            else:
                descend.append(name)
        folders[:] = descend  # in place: os.walk descends into this list's folders
        for name in sorted(names):
            if not keep(name):
                continue
            file = _file_of_folder(Path(folder, name), root, left_out)
            if file is not None:
                files.append(file)
    return files


def _file_of_folder(path: Path, root: Path, left_out: LeftOut) -> SourceFile | None:
    """Return a file that a walk met, or None after counting why it is left out."""
    if path.name.startswith("."):
        left_out.add("hidden", printable(path))
        return None
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            left_out.add("not_regular", printable(path))
            return None
        kind = file_format(path)
    except OSError:
        left_out.add("unreadable", printable(path))
        return None
    if kind == "compressed" or kind == "table":  # `in` would hide the types from the checker
        left_out.add(kind, printable(path))
        return None
    return SourceFile(
        path=path,
        relative=path.relative_to(root).as_posix(),
        format=kind,
        size=status.st_size,
        given=False,
    )


def named_file(path: Path, name: str) -> SourceFile:
    """Return a file that the user names.

    Args:
        path: the file.
        name: the user's name for it (``--input x.jsonl``), for messages.

    Raises:
        InputError: there is no such file, it is not a regular file, or its format is not read.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        missing = isinstance(error, FileNotFoundError)
        raise InputError(
            name,
            rule="there is no such file or folder" if missing else f"it cannot be read ({reason})",
            fix=f"name existing files ({READ_FORMATS}) or folders",
        ) from error
    # Opening a pipe without a writer would wait for ever, and a stream cannot be read twice.
    if not stat.S_ISREG(status.st_mode):
        raise InputError(
            name,
            rule="it is not a regular file (a pipe, a socket or a device)",
            fix="write its content to a .jsonl file first, and name that",
        )
    try:
        kind = file_format(path)
        if path.suffix.lower() == ".json":
            kind = "jsonl" if _has_json_lines(path, at_least=1) else "text"
    except OSError as error:
        raise unreadable(name, error) from error
    if kind == "compressed" or kind == "table":
        raise InputError(
            name,
            rule=f"its format ({path.suffix}) is not read; read are {READ_FORMATS}",
            fix="convert it to one of these",
        )
    if kind == "text" and path.suffix.lower() == ".json":
        raise InputError(
            name,
            rule="a .json file must have one JSON object in each line",
            fix="write it so and call it .jsonl, or name its folder to take it as plain text",
        )
    return SourceFile(
        path=path,
        relative=path.name,
        format=kind,
        size=status.st_size,
        given=True,
    )


def file_format(path: Path) -> Format | Literal["compressed", "table"]:
    """Return how a file is read, by its name, or why it is not.

    Raises:
        OSError: a ``.json`` file cannot be opened.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    for suffix in ("".join(suffixes), *suffixes[-1:]):
        if suffix in _FORMATS:
            return _FORMATS[suffix]
    last = suffixes[-1] if suffixes else ""
    if last in _COMPRESSED:
        return "compressed"
    if last in _TABLES:
        return "table"
    return "jsonl" if last == ".json" and _has_json_lines(path) else "text"


def unreadable(name: str, error: OSError) -> InputError:
    """Return the refusal of a file that cannot be opened or read."""
    return InputError(
        name,
        rule=f"it cannot be read ({error.strerror or error})",
        fix="make it readable or leave it out",
    )


def _has_json_lines(path: Path, *, at_least: int = 2) -> bool:
    """Return true if the first lines are whole JSON objects: exports often call such files .json.

    One object in one line is as likely a configuration file; two in two lines are rows.
    """
    with path.open("rb") as file:
        head = file.read(_SNIFFED)
    lines = [line.strip() for line in head.removeprefix(b"\xef\xbb\xbf").split(b"\n")[:at_least]]
    whole = [line.startswith(b"{") and line.endswith(b"}") for line in lines]
    return len(whole) == at_least and all(whole)
