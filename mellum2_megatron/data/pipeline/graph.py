"""The stages of a plan as tasks, in order.

================  ========================  ====================================================
stage             a task for each           result
================  ========================  ====================================================
``documents``     shard of input files      documents that pass the filters, with a hash each
``exact``         plan                      rows with the text of an earlier document
``tokens``        shard                     ids of the rest, with near-duplicate keys
``repositories``  shard                     files sorted by repository, where a phase joins them
``select``        source                    bucket of each document, without near-duplicates
``packs``         phase, source, pass,      sequences with FIM, packed to one length
                  shards or repositories
================  ========================  ====================================================

The first three depend on the sources alone, so that plans that differ in their phases share them.
``select`` depends on the phases where near-duplicates are dropped phase by phase, or where a phase
joins files by repository. The phases' parts are known once it has counted the tokens (`ledger`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.values import to_plain
from mellum2_megatron.data.corpus.left_out import LeftOut, printable
from mellum2_megatron.data.corpus.near_duplicates import minhash_version
from mellum2_megatron.data.corpus.parse_filters import LANGUAGES, check_languages
from mellum2_megatron.data.pipeline.documents import drop_exact, filter_documents
from mellum2_megatron.data.pipeline.encoding import encode
from mellum2_megatron.data.pipeline.inputs import HASHES_FILE, ContentHashes, Shard, list_inputs
from mellum2_megatron.data.pipeline.ledger import (
    Allotment,
    Part,
    Shortage,
    allot,
    with_margin,
)
from mellum2_megatron.data.pipeline.packing import pack
from mellum2_megatron.data.pipeline.plan import Plan
from mellum2_megatron.data.pipeline.repositories import gather
from mellum2_megatron.data.pipeline.repository_packing import key_ranges, pack_repositories
from mellum2_megatron.data.pipeline.selecting import VALID, select
from mellum2_megatron.data.pipeline.tasks import Task
from mellum2_megatron.data.tokens.document_tokenizer import end_of_document
from mellum2_megatron.data.tokens.encoder import choose_encoder
from mellum2_megatron.data.tokens.tokenizer import (
    repository_ids,
    special_ids,
    tokenizer_hash,
    vocab_size,
)

STAGES = ("documents", "exact", "tokens", "repositories", "select", "packs")

TRAINING, VALIDATION = "train", "valid"
"""The two kinds of packs."""

Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """All tasks of a plan whose inputs are known.

    Attributes:
        plan: the plan.
        results: folder of all results.
        shards: shards of input files, in the plan's order.
        left_out: files and folders that the listing left out, by source.
        hashes: SHA-256 of each input file, by path.
        tokenizer: what tasks need to know of the tokenizer, see `tokenizer_facts`.
    """

    plan: Plan
    results: Path
    shards: tuple[Shard, ...]
    left_out: dict[str, LeftOut]
    hashes: dict[str, str]
    tokenizer: dict[str, Any]

    @classmethod
    def of(cls, plan: Plan, results: Path, *, advance: Advance = lambda _: None) -> Graph:
        """List and hash a plan's inputs; files hashed by an earlier call are not read again.

        Args:
            plan: the plan.
            results: folder of all results, made if missing.
            advance: called with the bytes of each hashed file.

        Raises:
            InputError: an input, the tokenizer or a grammar is missing, or the tokenizer has no
                FIM tokens although a phase needs them.
        """
        tokenizer = tokenizer_facts(plan)
        lacking = [
            role
            for role in ("fim_prefix", "fim_middle", "fim_suffix")
            if role not in tokenizer["special"]
        ]
        if lacking and any(phase.fim.rate for phase in plan.phases):
            raise InputError(
                f"tokenizer {plan.tokenizer}",
                rule=f"it has no {', '.join(lacking)} token, and a phase has fim.rate above 0",
                fix="use a tokenizer with FIM tokens, or set fim.rate to 0",
            )
        lacking += [
            role for role in ("reponame", "filename") if role not in tokenizer["repository"]
        ]
        if lacking and any(phase.repository for phase in plan.phases):
            raise InputError(
                f"tokenizer {plan.tokenizer}",
                rule=f"it has no {', '.join(lacking)} token, and a phase joins repositories",
                fix="use a tokenizer with these tokens, or take `repository` out of the plan",
            )
        if any(source.kind == "code" for source in plan.sources.values()):
            check_languages(list(LANGUAGES))
        shards, left_out = list_inputs(plan)
        known = ContentHashes(results / HASHES_FILE)
        try:
            hashes = {
                printable(file.path): known.of(file, advance)
                for shard in shards
                for file in shard.files
            }
        finally:
            known.save()
        return cls(
            plan=plan,
            results=results,
            shards=tuple(shards),
            left_out=left_out,
            hashes=hashes,
            tokenizer=tokenizer,
        )

    def tasks(self, stage: str) -> list[Task]:
        """Return the tasks of a stage.

        Raises:
            InputError: no such stage; or the tasks depend on a stage that has not ended, or a
                source has too few tokens.
        """
        match stage:
            case "documents":
                return self.documents
            case "exact":
                return [self.exact]
            case "tokens":
                return self.tokens
            case "repositories":
                return self.repositories
            case "select":
                return list(self.selects.values())
            case "packs":
                return self.packs()
        raise InputError(
            f"--stage {stage}", rule="there is no such stage", fix=f"known: {', '.join(STAGES)}"
        )

    @cached_property
    def documents(self) -> list[Task]:
        """Tasks that read and filter."""
        tasks = []
        for shard in self.shards:
            source = self.plan.sources[shard.source]
            places = {f"{number}": str(file.path) for number, file in enumerate(shard.files)}
            tasks.append(
                Task(
                    stage="documents",
                    label=f"{shard.source}-{shard.number:05}",
                    version=2,
                    work=filter_documents,
                    source=shard.source,
                    places=places,
                    settings={
                        "kind": source.kind,
                        "text_key": source.text_key,
                        "skip_bad_rows": source.skip_bad_rows,
                        "max_document_bytes": source.max_document_bytes,
                        "filters": to_plain(source.filters),
                        "files": [
                            {
                                "key": f"{number}",
                                "relative": printable(file.relative),
                                "format": file.format,
                                "size": file.size,
                                "given": file.given,
                                "sha256": self.hashes[printable(file.path)],
                            }
                            for number, file in enumerate(shard.files)
                        ],
                    },
                )
            )
        return tasks

    @cached_property
    def exact(self) -> Task:
        """Task that finds exact duplicates."""
        return Task(
            stage="exact",
            label="all",
            version=1,
            work=drop_exact,
            settings={},
            inputs=tuple(task.result for task in self.documents),
        )

    @cached_property
    def tokens(self) -> list[Task]:
        """Tasks that encode."""
        return [
            Task(
                stage="tokens",
                label=documents.label,
                version=1,
                work=encode,
                source=documents.source,
                inputs=(documents.result, self.exact.result),
                places={"tokenizer": self.plan.tokenizer},
                settings={
                    "number": number,
                    "tokenizer": self.tokenizer["sha256"],
                    "engine": self.tokenizer["engine"],
                    "eod": self.tokenizer["eod"],
                    "unique_tokens": self.plan.unique_tokens,
                    "near_duplicates": self._near(documents.source),
                },
            )
            for number, documents in enumerate(self.documents)
        ]

    @cached_property
    def repositories(self) -> list[Task]:
        """Tasks that sort files by repository, for the sources of which a phase joins files."""
        return [
            Task(
                stage="repositories",
                label=tokens.label,
                version=2,
                work=gather,
                source=tokens.source,
                inputs=(tokens.inputs[0], tokens.result),
                settings={
                    "seed": self.plan.seed,
                    "folders": self.plan.sources[tokens.source].repository_folders,
                },
            )
            for tokens in self.tokens
            if self.plan.joins_repositories(tokens.source)
        ]

    def _near(self, source: str) -> dict[str, Any] | None:
        if not self.plan.sources[source].near_duplicates:
            return None
        # Signatures of two implementations cannot be compared.
        return {"settings": to_plain(self.plan.near_duplicates), "minhash": minhash_version()}

    @cached_property
    def selects(self) -> dict[str, Task]:
        """Task that selects, by source."""
        return {
            name: Task(
                stage="select",
                label=name,
                version=1,
                work=select,
                source=name,
                inputs=tuple(
                    task.result
                    for tasks in (self.tokens, self.repositories)
                    for task in tasks
                    if task.source == name
                ),
                settings={
                    "seed": self.plan.seed,
                    "valid_share": self.plan.valid_share,
                    "near_duplicates": self._near(name),
                    **({"repositories": True} if self.plan.joins_repositories(name) else {}),
                    **(
                        {"phases": self._phases_of(name), "epochs": source.epochs}
                        if source.compares_phases
                        else {}
                    ),
                },
            )
            for name, source in self.plan.sources.items()
        }

    def _phases_of(self, source: str) -> list[list[int]]:
        """Return number and tokens of each phase that takes a source."""
        return [
            [number, with_margin(phase.tokens_of(source), self.plan.margin)]
            for number, phase in enumerate(self.plan.phases, start=1)
            if source in phase.mixture
        ]

    def counted(self) -> bool:
        """Return true once the tokens of every source are counted."""
        return all(task.done(self.results) for task in self.selects.values())

    def allotments(self) -> tuple[list[Allotment], list[Shortage]]:
        """Return every phase's part of every source, and the sources with too few tokens.

        Raises:
            InputError: stage ``select`` has not ended.
        """
        for task in self.selects.values():
            if not task.done(self.results):
                raise InputError(
                    "stage packs",
                    rule=f"it needs the token counts of {task.name}, which is not there",
                    fix="run stage select first",
                )
        return allot(
            {
                name: np.stack(
                    [self._histogram(name, number + 1) for number in range(len(self.plan.phases))]
                )
                for name in self.selects
            },
            [
                {source: phase.tokens_of(source) for source in phase.mixture}
                for phase in self.plan.phases
            ],
            {name: source.epochs for name, source in self.plan.sources.items()},
            margin=self.plan.margin,
        )

    def _histogram(self, source: str, phase: int) -> NDArray[np.int64]:
        """Return the tokens of each bucket of a source that a phase may take ``[BUCKETS]``."""
        tokens: NDArray[np.int64] = np.load(
            self.selects[source].folder(self.results) / "histogram.npy"
        )
        if tokens.ndim == 1:
            return tokens
        numbers = [number for number, _ in self._phases_of(source)]
        return tokens[numbers.index(phase)] if phase in numbers else np.zeros_like(tokens[0])

    def packs(self) -> list[Task]:
        """Return the tasks that pack, phase by phase, training before validation.

        Raises:
            InputError: stage ``select`` has not ended, or a source has too few tokens.
        """
        allotments, shortages = self.allotments()
        if shortages:
            raise shortages[0].error()
        tasks = [
            task
            for allotment in allotments
            for part in allotment.parts
            for task in self._pack(allotment.phase, allotment.source, part, TRAINING)
        ]
        whole = Part(epoch=0, first=VALID, last=VALID + 1)
        for number, phase in enumerate(self.plan.phases, start=1):
            for source in phase.mixture:
                tasks += self._pack(number, source, whole, VALIDATION)
        return tasks

    def _pack(self, number: int, source: str, part: Part, split: str) -> list[Task]:
        phase = self.plan.phases[number - 1]
        shards = [task for task in self.tokens if task.source == source]
        gathered = [task for task in self.repositories if task.source == source]
        joins = split == TRAINING and source in phase.repository
        settings = self._pack_settings(number, source, split)
        tasks = []
        for group in batched(enumerate(shards), self.plan.pack_shards):
            first = group[0][0]
            inputs = [
                one
                for place, shard in group
                for one in (
                    shard.result,
                    shard.inputs[0],
                    *((gathered[place].result,) if joins else ()),
                )
            ]
            tasks.append(
                Task(
                    stage="packs",
                    label=f"{number}-{source}-{split}-{part.epoch}-{first:05}",
                    version=1,
                    work=pack,
                    source=source,
                    inputs=(self.selects[source].result, *inputs),
                    places={"tokenizer": self.plan.tokenizer},
                    settings={
                        **settings,
                        "part": to_plain(part),
                        "shards": [place for place, _ in group],
                    },
                )
            )
        if not joins:
            return tasks
        # About as many tokens as the files of one of the tasks above.
        limit = self.plan.pack_shards * self.plan.shard_bytes // 4
        for place, some in enumerate(key_ranges(self._histogram(source, number), part, limit)):
            tasks.append(
                Task(
                    stage="packs",
                    label=f"{number}-{source}-{split}-{part.epoch}-repositories-{place:05}",
                    version=1,
                    work=pack_repositories,
                    source=source,
                    # Its manifest names the results that it has read.
                    inputs=(self.selects[source].result,),
                    places={"tokenizer": self.plan.tokenizer},
                    settings={**settings, "epoch": part.epoch, "range": to_plain(some)},
                )
            )
        return tasks

    def _pack_settings(self, number: int, source: str, split: str) -> dict[str, Any]:
        """Return the settings of a phase's pack tasks that do not depend on the part."""
        phase = self.plan.phases[number - 1]
        # Validation has no FIM: its loss is then that of plain text in every phase, and comparable.
        fim = phase.fim if split == TRAINING else type(phase.fim)()
        settings = {
            "phase": number,
            "split": split,
            "sequence_length": phase.sequence_length,
            "packing": phase.packing,
            "unique_tokens": phase.fewest_unique,
            "fim": to_plain(fim),
            "is_code": self.plan.sources[source].kind == "code",
            "source_number": list(self.plan.sources).index(source),
            "seed": self.plan.seed,
            "align": phase.align,
            "tokenizer": self.tokenizer["sha256"],
            "engine": self.tokenizer["engine"],
            "eod": self.tokenizer["eod"],
            "vocab_size": self.tokenizer["vocab_size"],
            "special": self.tokenizer["special"],
        }
        if phase.piece_order != "random":
            # Only then: results of plans that are older than the key keep their names.
            settings["piece_order"] = phase.piece_order
        if split == TRAINING and source in phase.repository:
            settings["special"] = {**self.tokenizer["special"], **self.tokenizer["repository"]}
            settings["repository"] = {
                "rate": phase.repository[source].rate,
                "length": phase.repository_length(source),
            }
        return settings


def tokenizer_facts(plan: Plan) -> dict[str, Any]:
    """Return what decides the tokens of a plan.

    Returns:
        ``sha256`` of ``tokenizer.json``, ``vocab_size``, ``eod`` (the id that ends documents),
        ``special`` ids by role, ``repository`` ids by role (see `repository_ids`), and ``engine``:
        the library that encodes, with ``engine_reason``.

    Raises:
        InputError: the folder has no tokenizer, or several tokens could end a document.
    """
    folder = Path(plan.tokenizer)
    eod = end_of_document(folder, plan.eod, key="eod: ")
    choice = choose_encoder(folder, eod)
    return {
        "sha256": tokenizer_hash(folder),
        "vocab_size": vocab_size(folder),
        "eod": eod,
        "special": special_ids(folder, need_eos=False),
        "repository": repository_ids(folder),
        "engine": choice.engine,
        "engine_reason": choice.reason,
    }
