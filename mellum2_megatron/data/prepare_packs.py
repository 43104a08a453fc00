"""`mellum2 data prepare`: a corpus plan of one source and one pass, in one folder of packs.

::

    PATH/packs.json, train-*, valid-*   see `data.tokens.pack_files`
    PATH/tokenizer/
    PATH/corpus.json                    sources with licences, settings, what was left out
    PATH/report/report.md               tables and pictures of `mellum2 data report`

The stages are those of a plan (`data.pipeline`): filters, exact and near duplicates, FIM, best-fit
packing. Their results lie in a folder that is removed at the end. The folder appears at once and
complete, or not at all; its bytes depend on inputs and settings, not on ``workers``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.common.files import atomic_directory, write_json
from mellum2_megatron.common.values import to_plain
from mellum2_megatron.data.corpus.discovery import given_sources
from mellum2_megatron.data.corpus.languages import is_code
from mellum2_megatron.data.corpus.left_out import LeftOut, printable
from mellum2_megatron.data.corpus.quality_filters import UNIQUE_TOKENS, Content, reason_to_drop
from mellum2_megatron.data.corpus.sources import (
    LARGEST_DOCUMENT,
    ReadOptions,
)
from mellum2_megatron.data.packs_input import PackInput, find_inputs, some_texts
from mellum2_megatron.data.phase_record import PHASE_FILE, PhaseRecord, phase_folder
from mellum2_megatron.data.pipeline.assemble import link_shards
from mellum2_megatron.data.pipeline.documents import HASH_BYTES
from mellum2_megatron.data.pipeline.graph import STAGES, Graph
from mellum2_megatron.data.pipeline.plan import FILTERS, Phase, Plan, Source
from mellum2_megatron.data.pipeline.report import write_report
from mellum2_megatron.data.pipeline.run import run_plan
from mellum2_megatron.data.pipeline.selecting import VALID, place
from mellum2_megatron.data.pipeline.summary import counted, funnels
from mellum2_megatron.data.prepare import (
    SAMPLED_LENGTH,
    TOKENIZER_TRAINING_BYTES,
    complete_arguments,
    no_documents,
)
from mellum2_megatron.data.prepared_folder import CORPUS_FILE
from mellum2_megatron.data.tokens.document_tokenizer import end_of_document, fidelity
from mellum2_megatron.data.tokens.fill_in_middle import FimSettings
from mellum2_megatron.data.tokens.pack_files import PackShard, read_pack_folder
from mellum2_megatron.data.tokens.pack_writer import write_record
from mellum2_megatron.data.tokens.tokenizer import copy_tokenizer, special_ids, train_tokenizer

logger = logging.getLogger(__name__)

SOURCE = "corpus"
"""Name of the plan's one source."""

FORMAT = "packs"
"""Format of ``corpus.json``; the other one is `prepared_folder.FORMAT`."""

FIM_RATE = 0.5
"""Share of the documents that FIM reorders, by default: that of the report's first phase (§3)."""

SEQUENCE_LENGTH = 256
"""Tokens of a pack by default: those of the tiny recipes."""

Kind = Literal["code", "text"]

_LOOKED_AT = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """Wishes for filters and packs.

    Attributes:
        sequence_length: tokens of a pack, default `SEQUENCE_LENGTH`.
        align: every piece begins at a multiple of it, default 1; 2 x layout.cp for training on
            context-parallel ranks.
        kind: filters to use; None (default): ``code`` if most of a sample of the documents are in
            a programming language, else ``text``.
        filters: false keeps all documents but exact duplicates, default true.
        fim_rate: share of the documents that FIM reorders; None (default): `FIM_RATE`, or 0 for a
            tokenizer without FIM tokens.
    """

    sequence_length: int = SEQUENCE_LENGTH
    align: int = 1
    kind: Kind | None = None
    filters: bool = True
    fim_rate: float | None = None


def prepare_packs(
    output: str | os.PathLike[str],
    *,
    inputs: Sequence[str | os.PathLike[str]] = (),
    tokenizer: str | os.PathLike[str] | None = None,
    eod: str | None = None,
    vocab_size: int = 4096,
    workers: int | None = None,
    seed: int = 1234,
    valid_fraction: float = 0.02,
    max_bytes: int | None = None,
    options: ReadOptions | None = None,
    packing: Packing | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Make a folder of packs from text; return the content of its ``corpus.json``.

    Args:
        output: folder to make.
        inputs, tokenizer, eod, vocab_size, workers, seed, valid_fraction, max_bytes, options,
            overwrite, progress: see `data.prepare.prepare`.
        packing: filters, FIM and packs.

    Raises:
        InputError: bad arguments or input files; nothing has been written.
        WorkError: the disk is full or a worker was killed; ``output`` is untouched.
    """
    target, packing = Path(output), packing or Packing()
    workers, max_bytes, options = complete_arguments(
        target,
        inputs=inputs,
        tokenizer=tokenizer,
        eod=eod,
        vocab_size=vocab_size,
        workers=workers,
        valid_fraction=valid_fraction,
        max_bytes=max_bytes,
        options=options,
        overwrite=overwrite,
    )
    # Refused here, before anything is read.
    phase = Phase(
        tokens=1,
        mixture={SOURCE: 100.0},
        sequence_length=packing.sequence_length,
        align=packing.align,
        fim=FimSettings(rate=FIM_RATE if packing.fim_rate is None else packing.fim_rate),
        unique_tokens=None if packing.filters else 0,
    )
    given_sources(inputs, LeftOut())
    try:
        with atomic_directory(target, overwrite=overwrite) as folder:
            results = folder / "results"
            results.mkdir()
            given = find_inputs(inputs, results, seed, max_bytes, options, progress)
            source = _source(given, packing)
            if tokenizer is None:
                texts = _training_texts(given, source, seed, valid_fraction)
                first = list(islice(texts, 1))  # here, not in the trainer: there may be none
                train_tokenizer(chain(first, texts), folder / "tokenizer", vocab_size=vocab_size)
            else:
                copy_tokenizer(Path(tokenizer), folder / "tokenizer")
            end_of_document(folder / "tokenizer", eod)  # refused as --eod, not as a plan's key
            if packing.fim_rate is None and "fim_prefix" not in special_ids(
                folder / "tokenizer", need_eos=False
            ):
                phase = replace(phase, fim=FimSettings())
            plan = Plan(
                name=printable(target.name),
                tokenizer=str(folder / "tokenizer"),
                sources={SOURCE: source},
                phases=(phase,),
                eod=eod,
                output=str(results),
                seed=seed,
                valid_share=valid_fraction,
                unique_tokens=UNIQUE_TOKENS if packing.filters else 0,
                # One pass over all of it.
                margin=0.0,
            )
            graph = _run(plan, results, workers, valid_fraction, progress)
            facts = _assemble(graph, folder, given)
            shutil.rmtree(results)
            write_json(folder / CORPUS_FILE, facts)
    except OSError as error:
        raise WorkError(
            f"writing {printable(target)} failed ({error})",
            fix="free space on that disk or choose another --output",
        ) from error
    return facts


def _source(given: PackInput, packing: Packing) -> Source:
    kind = packing.kind
    if kind is None:
        looked = 0
        code = 0
        for document in given.documents(LeftOut(), most_bytes=1 << 20):
            looked += 1
            code += is_code(document.language)
            if looked == _LOOKED_AT:
                break
        kind = "code" if 2 * code >= looked else "text"
    none: dict[str, Any] = {type(test).__name__: None for test in FILTERS[kind]}
    return Source(
        kind=kind,
        inputs=given.paths,
        text_key=given.options.text_key,
        skip_bad_rows=given.options.skip_bad_rows,
        # The command's own limit held when the sample was taken.
        max_document_bytes=given.options.max_document_bytes or LARGEST_DOCUMENT,
        filters={} if packing.filters else none,
        near_duplicates=packing.filters,
        # The one phase takes all, and its tokens are known only when duplicates are gone.
        near_duplicate_scope="source",
    )


def _training_texts(
    given: PackInput, source: Source, seed: int, valid_share: float
) -> Iterator[str]:
    """Yield the texts that pass the filters and that the plan will place in training.

    Raises:
        InputError: no document passes the filters, at the first step.
    """
    filters = source.chosen_filters()
    tally, dropped, kept = deepcopy(given.left_out), dict[str, dict[str, Any]](), 0
    for document in given.documents(tally, most_bytes=TOKENIZER_TRAINING_BYTES):
        content = Content(document.text, document.language or "")
        if (fault := reason_to_drop(content, filters)) is not None:
            first = f"{document.file}: {fault[1]}"
            row = dropped.setdefault(fault[0], {"filter": fault[0], "documents": 0, "first": first})
            row["documents"] += 1
            continue
        kept += 1
        digest = hashlib.sha256(content.bytes).digest()[:HASH_BYTES]
        hashes = np.frombuffer(digest, dtype=np.uint8).reshape(1, -1)
        if place(hashes, seed, valid_share)[0] != VALID:
            yield document.text
    if not kept:
        raise no_documents([*tally.lines(), *dropped_lines(list(dropped.values()))], filters=True)


def _run(plan: Plan, results: Path, workers: int, valid_fraction: float, progress: bool) -> Graph:
    """Run all stages; the phase takes the tokens that stage `select` counts.

    Raises:
        InputError: a split is empty.
    """
    graph = Graph.of(plan, results)
    for stage in STAGES[:-1]:
        run_plan(graph, stage=stage, workers=workers, progress=progress)
    counts = graph.selects[SOURCE].manifest(results)
    for split, documents in (
        ("train", counts["documents"]),
        ("valid", counts["valid_documents"]),
    ):
        if not documents:
            lines = [*_left_out(graph).lines(), *dropped_lines(_dropped(graph))]
            if not counts["documents"] + counts["valid_documents"]:
                raise no_documents(lines, filters=True)
            raise InputError(
                f"{counts['documents'] + counts['valid_documents']} document(s)",
                rule="\n".join(
                    [
                        f"the {split} split is empty (--valid-fraction {valid_fraction})",
                        *(lines or ["nothing was left out"]),
                    ]
                ),
                fix="give more documents, a larger --max-megabytes, another --valid-fraction "
                "(0.2, say), or --no-filters",
            )
    tokens = int(counted(graph)[SOURCE])
    (phase,) = plan.phases
    graph = replace(graph, plan=replace(plan, phases=(replace(phase, tokens=tokens),)))
    run_plan(graph, stage=STAGES[-1], workers=workers, progress=progress)
    return graph


def _assemble(graph: Graph, folder: Path, given: PackInput) -> dict[str, Any]:
    """Link the shards into the folder, write its records and the report.

    Raises:
        InputError: a split has no packs.
    """
    results, (phase,) = graph.results, graph.plan.phases
    tasks = graph.packs()
    splits = {split: link_shards(tasks, results, folder, split) for split in ("train", "valid")}
    for split, shards in splits.items():
        if not sum(shard.packs for shard in shards):
            raise InputError(
                f"{split} split",
                rule="no pack is left: each has too few unique tokens",
                fix="give more text, or --no-filters",
            )
    write_record(
        folder,
        splits=splits,
        sequence_length=phase.sequence_length,
        sources=list(graph.plan.sources),
        tokenizer_sha256=graph.tokenizer["sha256"],
        vocab_size=graph.tokenizer["vocab_size"],
        eod=graph.tokenizer["eod"],
    )
    packs = sum(shard.packs for shard in splits["train"])
    record = PhaseRecord(
        plan=graph.plan.name,
        phase=1,
        sequence_length=phase.sequence_length,
        samples=packs,
        shares={SOURCE: 100.0},
        packs={SOURCE: packs},
    )
    phase_folder(results, 1).mkdir()
    write_json(phase_folder(results, 1) / PHASE_FILE, asdict(record))
    os.replace(write_report(graph).parent, folder / "report")
    left_out = _left_out(graph)
    for reason, count in given.left_out.counts.items():
        if reason not in left_out.counts:
            left_out.add(reason, given.left_out.first[reason], count)
    sample = [text[:SAMPLED_LENGTH] for text in some_texts(given)]
    settings = to_plain(graph.plan) | {"sources": {SOURCE: to_plain(graph.plan.sources[SOURCE])}}
    for name in ("output", "tokenizer"):
        del settings[name]
    del settings["sources"][SOURCE]["inputs"]
    return {
        "format": FORMAT,
        "plan": settings,
        "splits": {
            split: {
                "packs": sum(shard.packs for shard in shards),
                "tokens": sum(shard.tokens for shard in shards),
            }
            for split, shards in splits.items()
        },
        "valid_unigram_entropy_nats": _entropy(folder),
        "tokenizer": {
            "vocab_size": graph.tokenizer["vocab_size"],
            "special_ids": graph.tokenizer["special"] | {"eod": graph.tokenizer["eod"]},
            "sha256": graph.tokenizer["sha256"],
            "fidelity": asdict(fidelity(folder / "tokenizer", graph.tokenizer["eod"], sample)),
        },
        "encoder": {
            "engine": graph.tokenizer["engine"],
            "reason": graph.tokenizer["engine_reason"],
        },
        "sources": given.table,
        "documents_left_out": dict(sorted(left_out.counts.items())),
        "documents_left_out_first": dict(sorted(left_out.first.items())),
        "documents_dropped": _dropped(graph),
        "sources_without_open_licence": given.refused,
    }


def _left_out(graph: Graph) -> LeftOut:
    """Return what the plan's listing and reading left out."""
    tally = LeftOut()
    for one in graph.left_out.values():
        for reason, count in one.counts.items():
            tally.add(reason, one.first[reason], count)
    for task in graph.documents:
        for reason, facts in task.manifest(graph.results)["left_out"].items():
            tally.add(reason, facts["first"], facts["count"])
    return tally


def _dropped(graph: Graph) -> list[dict[str, Any]]:
    return [
        {"filter": step.name, "documents": step.documents, "first": step.example}
        for way in funnels(graph)
        for step in way.steps
    ]


def dropped_lines(dropped: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each filter and kind of duplicate that dropped documents."""
    return [
        f"dropped: {one['documents']:,} {one['filter']}"
        + (f" (first: {one['first']})" if one["first"] else "")
        for one in dropped
    ]


def _entropy(folder: Path) -> float:
    """Return the entropy of the validation packs' tokens in nats: the loss without context."""
    packs = read_pack_folder(folder, "packs")
    counts = np.zeros(packs.tokenizer["vocab_size"], dtype=np.int64)
    for entry in packs.shards["valid"]:
        shard = PackShard(entry.prefix)
        for pack in range(len(shard)):
            tokens, pieces = shard.tokens(pack), shard.pieces(pack)
            for start, length in zip(pieces.starts, pieces.lengths, strict=True):
                piece = tokens[start : start + length].astype(np.int64)
                counts += np.bincount(piece, minlength=counts.size).astype(np.int64)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
