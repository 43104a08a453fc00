"""Stage ``packs`` of sources with repository-level documents: the tasks that join files.

A task owns a range of repository keys, see `repositories`. Files that are too long for a document
beside the repository's name become documents of their own, as in other phases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mellum2_megatron.common.values import from_mapping
from mellum2_megatron.data.pipeline.encoding import make_encoder
from mellum2_megatron.data.pipeline.ledger import BUCKET_BITS, Part
from mellum2_megatron.data.pipeline.packing import (
    MOST_TOKENS,
    PackedDocument,
    fim_form,
    joined_repositories,
    sentinels,
    write_packs,
)
from mellum2_megatron.data.pipeline.repositories import StoredFile, read_repositories
from mellum2_megatron.data.pipeline.selecting import buckets_file
from mellum2_megatron.data.pipeline.tasks import Task
from mellum2_megatron.data.tokens.encoder import DocumentEncoder
from mellum2_megatron.data.tokens.fill_in_middle import FimCounts, FimSettings, choose
from mellum2_megatron.data.tokens.keyed_random import KeyedRandom
from mellum2_megatron.data.tokens.pack_files import PieceFlag
from mellum2_megatron.data.tokens.repository import RepositoryFile, contexts

_PART_DOCUMENTS = 32
"""Documents of a repository whose files are in memory at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRange:
    """Repositories of one pack task: buckets ``first`` to ``last - 1``.

    A bucket with too many tokens is cut in ``slices`` even ranges of keys, and ``number`` is one.
    """

    first: int
    last: int
    number: int = 0
    slices: int = 1

    def bounds(self) -> tuple[int, int]:
        """Return the first key, and the first that is not in the range."""
        low, high = (bucket << (64 - BUCKET_BITS) for bucket in (self.first, self.last))
        width = high - low
        return (
            low + width * self.number // self.slices,
            low + width * (self.number + 1) // self.slices,
        )


def key_ranges(tokens: NDArray[np.int64], part: Part, limit: int) -> list[KeyRange]:
    """Cut a part of a source into ranges of up to ``limit`` tokens, as far as buckets allow it.

    Args:
        tokens: tokens of each bucket ``[BUCKETS]``.
        part: the part.
        limit: tokens of a range, held down to what a shard of packs holds.
    """
    limit = max(1, min(limit, MOST_TOKENS))
    ranges: list[KeyRange] = []
    first, held = part.first, 0
    for bucket in range(part.first, part.last):
        size = int(tokens[bucket])
        if held and held + size > limit:
            ranges.append(KeyRange(first=first, last=bucket))
            first, held = bucket, 0
        held += size
        if size > limit:
            slices = -(-size // limit)
            ranges += [
                KeyRange(first=bucket, last=bucket + 1, number=number, slices=slices)
                for number in range(slices)
            ]
            first, held = bucket + 1, 0
    if held:
        ranges.append(KeyRange(first=first, last=part.last))
    return ranges


def pack_repositories(task: Task, results: Path, folder: Path) -> dict[str, Any]:
    """Write the packs of one range of a source's repositories."""
    documents = _RepositoryDocuments(task, results)
    return {**write_packs(task, folder, documents.all()), **documents.facts()}


class _RepositoryDocuments:
    """Documents of a task, and their counts."""

    def __init__(self, task: Task, results: Path) -> None:
        settings = self._settings = task.settings
        (select,) = task.inputs
        made = select.manifest(results)
        inputs = made["inputs"]
        # Select has read the shards' ids, then their repositories.
        half = len(inputs) // 2
        self._ids = [results / name / "ids.bin" for name in inputs[:half]]
        self._gathered = [results / name for name in inputs[half:]]
        self._buckets = [
            buckets_file(select.folder(results), settings["phase"], number)
            for number in range(half)
        ]
        self._fim = from_mapping(FimSettings, settings["fim"], document="corpus plan")
        self._target_fim = replace(self._fim, rate=1.0, code_only=False)
        self._encoder: DocumentEncoder = make_encoder(task)
        epoch = settings["epoch"]
        self._cuts = KeyedRandom(settings["seed"], "fim", settings["phase"], epoch)
        self._order = KeyedRandom(settings["seed"], "repository", settings["phase"], epoch)
        self._alone, self._targets = FimCounts(), FimCounts()
        self._repositories: set[int] = set()
        self._files = self._too_long = self._taken = 0

    def all(self) -> Iterator[PackedDocument]:
        """Yield the documents of every repository."""
        settings = self._settings
        first, last = KeyRange(**settings["range"]).bounds()
        joined = joined_repositories(settings, settings["epoch"])
        for key, part, files in read_repositories(
            self._gathered,
            self._buckets,
            first,
            last,
            _PART_DOCUMENTS * settings["repository"]["length"],
        ):
            if joined(key):
                self._repositories.add(key)
                # Parts of one repository get draws of their own.
                yield from self._join(files, key + (part << 64))

    def _join(self, files: Sequence[StoredFile], repository: int) -> Iterator[PackedDocument]:
        """Yield the documents of one part of a repository."""
        settings = self._settings
        special, eod = settings["special"], np.array([settings["eod"]], dtype=np.int32)
        name, *paths = self._encoder.encode(
            [f"{files[0].repository}\n", *(f"{file.path}\n" for file in files)]
        )
        head = np.concatenate(([special["reponame"]], name)).astype(np.int32)
        lines = [np.concatenate(([special["filename"]], path)).astype(np.int32) for path in paths]
        texts = [self._read(file) for file in files]
        targets: dict[int, tuple[PieceFlag, NDArray[np.int32]]] = {}

        def target_tokens(index: int) -> int:
            file = files[index]
            cut = choose(self._target_fim, self._cuts, file.digest, is_code=True)
            form = fim_form(
                file.text, texts[index], cut, self._encoder, sentinels(settings), self._target_fim
            )
            targets[index] = PieceFlag(int(cut.role)), form
            return len(lines[index]) + len(form)

        made, too_long = contexts(
            [
                RepositoryFile(
                    path=file.path,
                    text=file.text,
                    language=file.language,
                    tokens=len(line) + file.tokens,
                )
                for file, line in zip(files, lines, strict=True)
            ],
            capacity=settings["repository"]["length"] - len(head) - len(eod),
            target_tokens=target_tokens,
            random=self._order,
            repository=repository,
        )
        self._too_long += len(too_long)
        # As the ledger counts them, an eod each.
        self._taken += sum(file.tokens + 1 for file in files)
        for one in made:
            role, form = targets[one.target]
            related = [part for index in one.related for part in (lines[index], texts[index])]
            ids = np.concatenate([head, *related, lines[one.target], form, eod])
            self._targets.eligible += 1
            self._targets.psm += role is PieceFlag.PSM
            self._targets.spm += role is PieceFlag.SPM
            self._files += len(one.related) + 1
            yield PackedDocument(
                ids=ids, flags=PieceFlag.REPOSITORY | role, digest=files[one.target].digest
            )
        for index in too_long:
            file = files[index]
            cut = choose(self._fim, self._cuts, file.digest, is_code=settings["is_code"])
            if self._fim.rate and (settings["is_code"] or not self._fim.code_only):
                self._alone.add(cut.role)
            form = texts[index]
            if cut.role:
                form = fim_form(file.text, form, cut, self._encoder, sentinels(settings), self._fim)
            yield PackedDocument(
                ids=np.concatenate([form, eod]), flags=PieceFlag(int(cut.role)), digest=file.digest
            )

    def _read(self, file: StoredFile) -> NDArray[np.int32]:
        ids = np.fromfile(self._ids[file.shard], "<i4", count=file.tokens, offset=4 * file.start)
        return ids.astype(np.int32)

    def facts(self) -> dict[str, Any]:
        """Return the counts of the task."""
        facts: dict[str, Any] = {
            "repository": {
                "repositories": len(self._repositories),
                "documents": self._targets.eligible,
                "files": self._files,
                "files_too_long": self._too_long,
                "tokens_taken": self._taken,
                "fim": self._targets.report(self._target_fim),
            }
        }
        if self._fim.rate:
            facts["fim"] = self._alone.report(self._fim)
        return facts
