"""A plan's tokens, disk and time before it has run, from a sample of every source."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from mellum2_megatron.data.corpus.left_out import LeftOut
from mellum2_megatron.data.corpus.quality_filters import Content, reason_to_drop
from mellum2_megatron.data.corpus.sources import read_documents
from mellum2_megatron.data.pipeline.graph import Graph
from mellum2_megatron.data.tokens.encoder import DocumentEncoder

SAMPLE_BYTES = 4_000_000
"""Text of each source that is read, filtered and encoded for an estimate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """One source, from a sample.

    Attributes:
        files: input files.
        bytes: their bytes on disk.
        tokens: tokens of one pass; before duplicates are dropped, so an upper bound.
        kept: share of the documents that pass the filters.
        core_hours: time to read, filter and encode all of it on one core of this machine.
        disk: bytes of the stored documents and ids; packs come in addition.
    """

    files: int
    bytes: int
    tokens: float
    kept: float
    core_hours: float
    disk: float


def estimate(graph: Graph, source: str) -> Estimate:
    """Read, filter and encode a sample of a source: files at even distances.

    Raises:
        InputError: a file of the sample cannot be read.
    """
    settings = graph.plan.sources[source]
    files = [file for shard in graph.shards if shard.source == source for file in shard.files]
    total = sum(file.size for file in files)
    options = settings.read_options()
    filters = settings.chosen_filters()
    encoder = DocumentEncoder(
        Path(graph.plan.tokenizer), graph.tokenizer["engine"], graph.tokenizer["eod"]
    )
    began = time.process_time()
    read = kept = tokens = text_bytes = 0
    sampled = 0.0
    # Few documents of many files, so that one large file does not stand for all.
    stride = max(1, len(files) // 64)
    share = SAMPLE_BYTES / max(len(files[::stride]), 1)
    for file in files[::stride]:
        taken = 0
        complete = True
        for document in read_documents(file, options, LeftOut()):
            content = Content(document.text, document.language or "")
            read += 1
            taken += len(content.bytes)
            if reason_to_drop(content, filters) is None:
                kept += 1
                text_bytes += len(content.bytes)
                tokens += len(encoder.encode([document.text])[0]) + 1
            if taken > share:
                complete = False
                break
        # A compressed file's share is not known when the reading ends early; text of it counts as
        # if it were stored at a quarter of its size.
        ratio = 4 if file.format not in ("text", "jsonl") else 1
        sampled += file.size if complete else min(file.size, taken / ratio)
    spent = time.process_time() - began
    copies = 2 if graph.plan.joins_repositories(source) else 1
    factor = total / sampled if sampled else 0.0
    return Estimate(
        files=len(files),
        bytes=total,
        tokens=tokens * factor,
        kept=kept / read if read else 0.0,
        core_hours=spent * factor / 3600,
        disk=factor * (copies * text_bytes / 4 + 4 * tokens + 150 * kept),
    )
