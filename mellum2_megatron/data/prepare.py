"""Text files to a prepared folder: tokenizer, Megatron indexed datasets, record of the inputs.

::

    PATH/train_document.{bin,idx}   megatron.core.datasets.indexed_dataset; every document ends
                                    with eos
    PATH/valid_document.{bin,idx}
    PATH/tokenizer/                 Hugging Face tokenizer files
    PATH/corpus.json                counts, entropy, sources with licences, seed, hashes
    PATH/cache/                     written later by Megatron: sample indices of each
                                    (seed, sequence length)

The folder appears at once and complete, or not at all. Its bytes depend on the inputs and the seed,
not on ``workers``.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mellum2_megatron.common.console import error_console
from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.common.files import atomic_directory, check_writable, write_json
from mellum2_megatron.data.corpus.discovery import (
    SPLITS,
    Selection,
    given_sources,
    installed_sources,
    read_document,
    select,
)
from mellum2_megatron.data.prepared_folder import (
    FORMAT,
    PreparedData,
    SplitStatistics,
    load_prepared,
)
from mellum2_megatron.data.tokens.encode import encode_documents
from mellum2_megatron.data.tokens.tokenizer import (
    check_vocab_size,
    copy_tokenizer,
    special_ids,
    tokenizer_hash,
    train_tokenizer,
)
from mellum2_megatron.data.tokens.tokenizer import vocab_size as vocab_size_of

if TYPE_CHECKING:
    from rich.progress import Progress

logger = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 32 * 1024 * 1024
# A BPE's merges settle long before this much text.
_TOKENIZER_TRAINING_BYTES = 64 * 1024 * 1024

Advance = Callable[[int], None]
"""Adds finished bytes to the progress of a stage."""

StartStage = Callable[[str, int | None], Advance]
"""Begins a stage, given its name and its size in bytes, None if unknown."""


def prepare(
    output: str | os.PathLike[str],
    *,
    inputs: Sequence[str | os.PathLike[str]] = (),
    tokenizer: str | os.PathLike[str] | None = None,
    vocab_size: int = 4096,
    workers: int | None = None,
    seed: int = 1234,
    valid_fraction: float = 0.02,
    max_bytes: int | None = DEFAULT_MAX_BYTES,
    overwrite: bool = False,
    progress: bool = True,
) -> PreparedData:
    """Make a prepared folder from text.

    Args:
        output: folder to make.
        inputs: text files, ``.jsonl`` files or folders; by default the Python sources installed on
            this machine.
        tokenizer: Hugging Face tokenizer folder; None trains a byte-level BPE on the training
            split.
        vocab_size: entries of the trained tokenizer (ignored beside ``tokenizer``).
        workers: processes that read and encode; None for one per core.
        seed: seed of the sample and the split.
        valid_fraction: share of the documents held out for validation.
        max_bytes: upper limit of the text in bytes, an even sample of it; None takes everything.
        overwrite: replace an existing folder (only once the new one is complete).
        progress: show progress bars when standard error is a terminal.

    Raises:
        InputError: bad arguments or input files; nothing has been written.
        WorkError: a file changed meanwhile, the disk is full, a worker was killed; ``output`` is
            untouched.
    """
    target = Path(output)
    # A container or a Slurm job may use fewer cores than the machine has.
    workers = workers if workers is not None else len(os.sched_getaffinity(0))
    _check_arguments(target, workers, vocab_size, valid_fraction, max_bytes, overwrite, tokenizer)
    sources, refused = (given_sources(inputs), []) if inputs else installed_sources()
    with _progress_bars(progress) as start_stage:
        advance = start_stage("reading", max_bytes)
        selection = select(
            sources, seed=seed, valid_fraction=valid_fraction, max_bytes=max_bytes, advance=advance
        )
        _check_splits(selection, valid_fraction)
        try:
            with atomic_directory(target, overwrite=overwrite) as folder:
                if tokenizer is None:
                    _train_tokenizer(selection, folder / "tokenizer", vocab_size, start_stage)
                else:
                    copy_tokenizer(Path(tokenizer), folder / "tokenizer")
                facts = _encode_splits(selection, folder, workers, start_stage)
                facts |= {
                    "seed": seed,
                    "valid_fraction": valid_fraction,
                    "max_bytes": max_bytes,
                    "sources": _source_table(selection),
                    "documents_left_out": selection.left_out,
                    "sources_without_open_licence": refused,
                }
                write_json(folder / "corpus.json", facts)
        except OSError as error:
            raise WorkError(
                f"writing {target} failed ({error})",
                fix="free space on that disk or choose another --output",
            ) from error
    return load_prepared(target)


def _check_arguments(
    target: Path,
    workers: int,
    vocab_size: int,
    valid_fraction: float,
    max_bytes: int | None,
    overwrite: bool,
    tokenizer: str | os.PathLike[str] | None,
) -> None:
    """Refuse arguments that cannot work, before minutes of reading."""
    if workers < 1:
        raise InputError(
            f"workers={workers}",
            rule="it must be at least 1",
            fix="use 1, or leave it out for one per core",
        )
    if not 0 < valid_fraction <= 0.5:
        raise InputError(
            f"valid_fraction={valid_fraction}",
            rule="it must be above 0 and at most 0.5",
            fix="use 0.02",
        )
    if max_bytes is not None and max_bytes < 1:
        raise InputError(
            f"max_bytes={max_bytes}",
            rule="it must be positive",
            fix=f"use {DEFAULT_MAX_BYTES}, or none for no limit",
        )
    if tokenizer is None:
        check_vocab_size(vocab_size)
    else:
        special_ids(Path(tokenizer))
    check_writable("--output", target, folder=True)
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and not overwrite:
        raise InputError(
            f"--output {target}",
            rule="it exists and is not empty",
            fix="choose another folder, or add --overwrite",
        )
    # A mistyped --output must not delete somebody's other folder.
    if occupied and not (target / "corpus.json").is_file():
        raise InputError(
            f"--output {target}",
            rule="only a prepared corpus may be replaced",
            fix="choose another folder",
        )


def _check_splits(selection: Selection, valid_fraction: float) -> None:
    """Refuse an empty split: Megatron cannot build a dataset without documents."""
    left_out = ", ".join(f"{count} {reason}" for reason, count in selection.left_out.items())
    for split in SPLITS:
        if not selection.of(split):
            raise InputError(
                f"{len(selection.documents)} document(s)",
                rule=f"the {split} split is empty (valid_fraction={valid_fraction}; "
                f"documents left out: {left_out or 'none'})",
                fix="give more documents, a larger --max-megabytes, "
                "or another --valid-fraction (0.2, say)",
            )


def _train_tokenizer(
    selection: Selection, folder: Path, vocab_size: int, start_stage: StartStage
) -> None:
    """Train a tokenizer on an even sample of the training split, and write it to ``folder``."""
    documents = selection.of("train")
    # Every k-th document, so that a large corpus is sampled evenly.
    stride = -(-sum(document.size for document in documents) // _TOKENIZER_TRAINING_BYTES)
    documents = documents[::stride]
    advance = start_stage("training the tokenizer", sum(document.size for document in documents))

    def texts() -> Iterator[str]:
        for document in documents:
            yield read_document(document)
            advance(document.size)

    train_tokenizer(texts(), folder, vocab_size=vocab_size)


def _encode_splits(
    selection: Selection, folder: Path, workers: int, start_stage: StartStage
) -> dict[str, Any]:
    """Write both indexed datasets with the folder's tokenizer.

    Returns:
        Entries of ``corpus.json``: format, size of each split, validation entropy, tokenizer.
    """
    # Loads torch and all of megatron.core, some seconds; bad input has been refused by now.
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    identifiers = special_ids(folder / "tokenizer")
    vocab_size = vocab_size_of(folder / "tokenizer")
    dtype = DType.optimal_dtype(vocab_size)
    splits: dict[str, SplitStatistics] = {}
    valid_counts = np.zeros(vocab_size, dtype=np.int64)
    for split in SPLITS:
        documents = selection.of(split)
        size = sum(document.size for document in documents)
        advance = start_stage(f"encoding the {split} split", size)
        prefix = folder / f"{split}_document"
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        tokens, digest = 0, hashlib.sha256()
        for batch in encode_documents(
            documents, folder / "tokenizer", eos=identifiers["eos"], workers=workers
        ):
            start = 0
            for length in batch.lengths:
                builder.add_document(batch.tokens[start : start + length], [length])
                start += length
            # The bytes as the builder writes them: hashing the file would read it once more.
            digest.update(batch.tokens.astype(dtype).tobytes())
            tokens += start
            if split == "valid":
                valid_counts += np.bincount(batch.tokens, minlength=vocab_size)
            advance(batch.size)
        builder.finalize(f"{prefix}.idx")
        splits[split] = SplitStatistics(
            documents=len(documents),
            tokens=tokens,
            bytes=size,
            bin_bytes=Path(f"{prefix}.bin").stat().st_size,
            idx_bytes=Path(f"{prefix}.idx").stat().st_size,
            bin_sha256=digest.hexdigest(),
        )
    probabilities = valid_counts[valid_counts > 0] / valid_counts.sum()
    return {
        "format": FORMAT,
        "splits": {split: asdict(statistics) for split, statistics in splits.items()},
        "valid_unigram_entropy_nats": float(-(probabilities * np.log(probabilities)).sum()),
        "dtype": np.dtype(dtype).name,
        "tokenizer": {
            "vocab_size": vocab_size,
            "special_ids": identifiers,
            "sha256": tokenizer_hash(folder / "tokenizer"),
        },
    }


def _source_table(selection: Selection) -> list[dict[str, Any]]:
    """Return a row for each source that contributed: name, version, licence, documents, bytes."""
    documents = np.zeros(len(selection.sources), dtype=np.int64)
    size = np.zeros_like(documents)
    for document in selection.documents:
        documents[document.source] += 1
        size[document.source] += document.size
    return [
        {
            "name": source.name,
            "version": source.version,
            "licence": source.licence,
            "documents": int(documents[index]),
            "bytes": int(size[index]),
        }
        for index, source in enumerate(selection.sources)
        if documents[index]
    ]


@contextlib.contextmanager
def _progress_bars(show: bool) -> Iterator[StartStage]:
    """Yield a function that begins a stage with a bar of its own; each stage is logged too.

    There are no bars if ``show`` is false or standard error is not a terminal.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    bars: Progress | None = None
    if show and error_console.is_terminal:
        bars = Progress(
            TextColumn("{task.description:<26}"),
            BarColumn(),
            DownloadColumn(),
            TimeElapsedColumn(),
            console=error_console,
        )

    def start_stage(stage: str, total: int | None) -> Advance:
        size = f" ({total / 1e6:.1f} MB)" if total else ""
        logger.info("%s%s", stage, size)
        if bars is None:
            return lambda _: None
        task = bars.add_task(stage, total=total)
        return lambda amount: bars.advance(task, amount)

    with contextlib.nullcontext() if bars is None else bars:
        yield start_stage
