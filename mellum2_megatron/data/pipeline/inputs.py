"""Input files of a plan, grouped into shards and named by their content."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import write_json
from mellum2_megatron.common.json_files import load_json
from mellum2_megatron.data.corpus.discovery import given_sources
from mellum2_megatron.data.corpus.left_out import LeftOut, printable
from mellum2_megatron.data.corpus.listing import SourceFile
from mellum2_megatron.data.corpus.sources import check_first_row
from mellum2_megatron.data.pipeline.plan import Plan

HASHES_FILE = "inputs.json"
"""Name of the file of `ContentHashes` in the folder of a plan's results."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Files that one task reads.

    Attributes:
        source: name of the plan's source.
        number: number of the shard in its source, from 0.
        files: the files, in order.
    """

    source: str
    number: int
    files: tuple[SourceFile, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the files."""
        return sum(file.size for file in self.files)


def list_inputs(plan: Plan) -> tuple[list[Shard], dict[str, LeftOut]]:
    """Return the shards of all sources in the plan's order, and what each source leaves out.

    Raises:
        InputError: an input is missing or cannot be read, or holds no files, or the first row of a
            file has no text.
    """
    shards: list[Shard] = []
    left_out: dict[str, LeftOut] = {}
    for name, source in plan.sources.items():
        tally = left_out[name] = LeftOut()
        try:
            found = given_sources(source.inputs, tally)
        except InputError as error:
            value = error.value.removeprefix("--input ")
            raise InputError(
                f"sources.{name}.inputs: {value}", rule=error.rule, fix=error.fix
            ) from None
        files = [file for one in found for file in one.files]
        options = source.read_options()
        for file in files:
            check_first_row(file, options)
        shards += [
            Shard(source=name, number=number, files=tuple(group))
            for number, group in enumerate(_groups(files, plan.shard_bytes))
        ]
    return shards, left_out


def _groups(files: Sequence[SourceFile], limit: int) -> Iterator[list[SourceFile]]:
    """Yield files in order, in groups of up to ``limit`` bytes; a larger file is one group."""
    group: list[SourceFile] = []
    size = 0
    for file in files:
        if group and size + file.size > limit:
            yield group
            group, size = [], 0
        group.append(file)
        size += file.size
    if group:
        yield group


class ContentHashes:
    """SHA-256 of input files, kept in a file between runs.

    A file whose path, size and time of change are as before is not read again.
    """

    def __init__(self, path: Path) -> None:
        """Read what an earlier run found; a missing or damaged file is as good as none."""
        self._path = path
        self._changed = False
        self._known: dict[str, list[Any]] = {}
        with contextlib.suppress(OSError, ValueError):
            self._known = load_json(path, largest=1 << 30)

    def of(self, file: SourceFile, advance: Callable[[int], None] = lambda _: None) -> str:
        """Return the hash of a file, hexadecimal.

        Raises:
            InputError: the file cannot be read.
        """
        path = os.path.abspath(file.path)
        key = printable(path)
        try:
            status = os.stat(path)
            stamp = [status.st_size, status.st_mtime_ns]
            known = self._known.get(key)
            if isinstance(known, list) and known[:2] == stamp and len(known) == 3:
                digest = str(known[2])
            else:
                with open(path, "rb") as opened:
                    digest = hashlib.file_digest(opened, "sha256").hexdigest()
                self._known[key] = [*stamp, digest]
                self._changed = True
        except OSError as error:
            raise InputError(
                key, rule=f"it cannot be read ({error.strerror})", fix="make it readable"
            ) from None
        advance(file.size)
        return digest

    def save(self) -> None:
        """Write what was found, if anything is new."""
        if self._changed:
            write_json(self._path, self._known)
            self._changed = False
