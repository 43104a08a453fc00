"""``data prepare --format megatron``: all texts as Megatron's indexed datasets, with a record.

Training cuts windows of any length from them, wherever documents end: the plain way that packs are
compared with. `prepare_packs` makes packs.

::

    PATH/train_document.{bin,idx}   megatron.core.datasets.indexed_dataset; every document ends
                                    with eod
    PATH/valid_document.{bin,idx}
    PATH/tokenizer/                 Hugging Face tokenizer files
    PATH/corpus.json                counts, entropy, sources with licences, seed, hashes
    PATH/cache/                     written later by Megatron: sample indices of each
                                    (seed, sequence length)

Documents are read by the plan's reader (`corpus.sources.read_documents`) and encoded by its encoder
(`tokens.encoder.DocumentEncoder`). The rest is not a plan of its own on purpose: a plan's stages
decide by hash where a document goes, and these datasets keep the order of the files, which is what
windows over ends of documents are compared on.

The folder appears at once and complete, or not at all. Its bytes depend on the inputs and the seed,
not on ``workers``.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.common.files import atomic_directory, check_new_folder, write_json
from mellum2_megatron.common.stage_bars import StartStage, stage_bars
from mellum2_megatron.data.corpus.discovery import (
    INSTALLED_FILE_LIMIT,
    given_sources,
    installed_sources,
)
from mellum2_megatron.data.corpus.left_out import LeftOut, printable
from mellum2_megatron.data.corpus.selection import (
    SPLITS,
    Selected,
    Selection,
    read_selected,
    select,
)
from mellum2_megatron.data.corpus.sources import ReadOptions
from mellum2_megatron.data.prepared_folder import (
    CORPUS_FILE,
    FORMAT,
    PreparedData,
    SplitStatistics,
    load_prepared,
)
from mellum2_megatron.data.tokens.document_tokenizer import (
    check_roles,
    end_of_document,
    fidelity,
)
from mellum2_megatron.data.tokens.encode import encode_texts
from mellum2_megatron.data.tokens.encoder import choose_encoder
from mellum2_megatron.data.tokens.tokenizer import (
    check_vocab_size,
    copy_tokenizer,
    special_ids,
    tokenizer_hash,
    train_tokenizer,
)
from mellum2_megatron.data.tokens.tokenizer import vocab_size as vocab_size_of

logger = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 32 * 1024 * 1024
"""Upper limit of the text of the installed sources; a user's own inputs have none."""

TOKENIZER_TRAINING_BYTES = 64 * 1024 * 1024
"""Text that a tokenizer is trained on: a BPE's merges settle long before."""

SAMPLED, SAMPLED_LENGTH = 100, 10_000
"""Documents that show how well a tokenizer keeps texts, and characters of each."""


def prepare(
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
    overwrite: bool = False,
    progress: bool = True,
) -> PreparedData:
    """Make a prepared folder from text.

    Args:
        output: folder to make.
        inputs: text, ``.jsonl`` (also ``.gz``, ``.zst``) or parquet files, or folders of them; by
            default the Python sources installed on this machine.
        tokenizer: Hugging Face tokenizer folder; None trains a byte-level BPE on the training
            split.
        eod: token that ends every document, an added token of ``tokenizer`` or its id; None for
            ``<|endoftext|>`` where there is one, else its eos.
        vocab_size: entries of the trained tokenizer (ignored beside ``tokenizer``).
        workers: processes that read and encode; None for one per core.
        seed: seed of the sample and the split.
        valid_fraction: share of the documents held out for validation.
        max_bytes: upper limit of the text in bytes, an even sample of it; 0 takes everything.
            Default: `DEFAULT_MAX_BYTES` of the installed sources, everything of ``inputs``.
        options: how inputs are read. Default: `INSTALLED_FILE_LIMIT` for a document of the
            installed sources, no limit for ``inputs``.
        overwrite: replace an existing folder (only once the new one is complete).
        progress: show progress bars when standard error is a terminal.

    Raises:
        InputError: bad arguments or input files; nothing has been written.
        WorkError: a file changed meanwhile, the disk is full, a worker was killed; ``output`` is
            untouched.
    """
    target = Path(output)
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
    left_out = LeftOut()
    sources, refused = (
        (given_sources(inputs, left_out), []) if inputs else installed_sources(left_out)
    )
    with stage_bars(progress, logger, unit="bytes") as start_stage:
        selection = select(
            sources,
            seed=seed,
            valid_fraction=valid_fraction,
            max_bytes=max_bytes or None,
            options=options,
            left_out=left_out,
            advance=start_stage("reading", max_bytes or None),
        )
        _check_splits(selection, valid_fraction)
        try:
            with atomic_directory(target, overwrite=overwrite) as folder:
                if tokenizer is None:
                    _train_tokenizer(selection, folder / "tokenizer", vocab_size, start_stage)
                else:
                    copy_tokenizer(Path(tokenizer), folder / "tokenizer")
                facts = _encode_splits(selection, folder, eod, workers, start_stage)
                facts |= {
                    "seed": seed,
                    "valid_fraction": valid_fraction,
                    "max_bytes": max_bytes or None,
                    "sources": source_table(selection),
                    "documents_left_out": dict(sorted(left_out.counts.items())),
                    "documents_left_out_first": dict(sorted(left_out.first.items())),
                    "sources_without_open_licence": refused,
                }
                write_json(folder / "corpus.json", facts)
        except OSError as error:
            raise WorkError(
                f"writing {target} failed ({error})",
                fix="free space on that disk or choose another --output",
            ) from error
    return load_prepared(target)


def complete_arguments(
    target: Path,
    *,
    inputs: Sequence[str | os.PathLike[str]],
    tokenizer: str | os.PathLike[str] | None,
    eod: str | None,
    vocab_size: int,
    workers: int | None,
    valid_fraction: float,
    max_bytes: int | None,
    options: ReadOptions | None,
    overwrite: bool,
) -> tuple[int, int, ReadOptions]:
    """Return ``workers``, ``max_bytes`` and ``options`` of `prepare` with their defaults.

    Raises:
        InputError: arguments that cannot work, before minutes of reading.
    """
    # A container or a Slurm job may use fewer cores than the machine has.
    workers = workers if workers is not None else len(os.sched_getaffinity(0))
    if max_bytes is None:
        max_bytes = 0 if inputs else DEFAULT_MAX_BYTES
    options = options or ReadOptions(max_document_bytes=None if inputs else INSTALLED_FILE_LIMIT)
    _check_apart(target, inputs)
    if workers < 1:
        raise InputError(
            f"workers={workers}",
            rule="it must be at least 1",
            fix="use 1, or leave it out for one per core",
        )
    if not 0 < valid_fraction <= 0.5:
        raise InputError(
            f"--valid-fraction {valid_fraction}",
            rule="it must be above 0 and at most 0.5",
            fix="use 0.02",
        )
    if max_bytes < 0:
        raise InputError(
            f"max_bytes={max_bytes}",
            rule="it must not be negative",
            fix=f"use {DEFAULT_MAX_BYTES}, or 0 for no limit",
        )
    check_new_folder(target, overwrite=overwrite, marker=CORPUS_FILE, kind="a prepared corpus")
    if tokenizer is None:
        check_vocab_size(vocab_size)
    else:
        check_roles(Path(tokenizer), end_of_document(Path(tokenizer), eod))
    return workers, max_bytes, options


def _check_apart(target: Path, inputs: Sequence[str | os.PathLike[str]]) -> None:
    """Refuse an output inside an input, which would become its own input, and the reverse."""
    output = Path(os.path.realpath(target))
    for given in inputs:
        path = Path(os.path.realpath(given))
        if path == output or path in output.parents or output in path.parents:
            raise InputError(
                f"--output {printable(target)}",
                rule=f"it must lie apart from --input {printable(given)}: neither inside the other",
                fix="choose another output folder",
            )


def no_documents(lines: Sequence[str], *, filters: bool = False) -> InputError:
    """Return the refusal of inputs of which nothing is left.

    Args:
        lines: what was left out and dropped, a line for each reason.
        filters: whether filters could have dropped it, default false.
    """
    return InputError(
        "0 documents",
        rule="\n".join(["nothing is left of the inputs", *lines]),
        fix="give other texts, or a larger --max-megabytes or --max-document-megabytes"
        + (", or --no-filters" if filters else ""),
    )


def _check_splits(selection: Selection, valid_fraction: float) -> None:
    """Refuse an empty split: Megatron cannot build a dataset without documents."""
    if not selection.documents:
        raise no_documents(selection.left_out.lines())
    for split in SPLITS:
        if not selection.of(split):
            raise InputError(
                f"{len(selection.documents)} document(s)",
                rule="\n".join(
                    [
                        f"the {split} split is empty (--valid-fraction {valid_fraction})",
                        *(selection.left_out.lines() or ["nothing was left out"]),
                    ]
                ),
                fix="give more documents, a larger --max-megabytes, "
                "or another --valid-fraction (0.2, say)",
            )


def _train_tokenizer(
    selection: Selection, folder: Path, vocab_size: int, start_stage: StartStage
) -> None:
    """Train a tokenizer on an even sample of the training split, and write it to ``folder``."""
    documents = selection.of("train")
    # Every k-th document, so that a large corpus is sampled evenly.
    stride = -(-sum(document.size for document in documents) // TOKENIZER_TRAINING_BYTES)
    documents = documents[::stride]
    advance = start_stage("training the tokenizer", sum(document.size for document in documents))

    def texts() -> Iterator[str]:
        for document, text in read_selected(selection, documents):
            yield text
            advance(document.size)

    train_tokenizer(texts(), folder, vocab_size=vocab_size)


def _encode_splits(
    selection: Selection, folder: Path, eod: str | None, workers: int, start_stage: StartStage
) -> dict[str, Any]:
    """Write both indexed datasets in one pass over the texts, with the folder's tokenizer.

    Returns:
        Entries of ``corpus.json``: format, size of each split, validation entropy, tokenizer,
        encoder.
    """
    # Loads torch and all of megatron.core, some seconds; bad input has been refused by now.
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = folder / "tokenizer"
    end = end_of_document(tokenizer, eod)
    check_roles(tokenizer, end)
    identifiers = special_ids(tokenizer, need_eos=False) | {"eod": end}
    sample = _sample(selection)
    encoder = choose_encoder(tokenizer, end, sample)
    logger.info("encoding with %s: %s", encoder.engine, encoder.reason)
    kept = fidelity(tokenizer, end, sample)
    vocab_size = vocab_size_of(tokenizer)
    dtype = DType.optimal_dtype(vocab_size)
    documents = selection.documents
    advance = start_stage("encoding", sum(document.size for document in documents))
    prefixes = {split: folder / f"{split}_document" for split in SPLITS}
    builders = {
        split: IndexedDatasetBuilder(f"{prefixes[split]}.bin", dtype=dtype) for split in SPLITS
    }
    digests = {split: hashlib.sha256() for split in SPLITS}
    tokens = dict.fromkeys(SPLITS, 0)
    valid_counts = np.zeros(vocab_size, dtype=np.int64)
    encoded = encode_texts(
        (text for _, text in read_selected(selection, documents)),
        tokenizer,
        eod=end,
        engine=encoder.engine,
        workers=workers,
    )
    ids = (part for batch in encoded for part in batch.documents())
    for document, part in zip(documents, ids, strict=True):
        split = document.split
        builders[split].add_document(part, [len(part)])
        # The bytes as the builder writes them: hashing the file would read it once more.
        digests[split].update(part.astype(dtype).tobytes())
        tokens[split] += len(part)
        if split == "valid":
            valid_counts += np.bincount(part, minlength=vocab_size)
        advance(document.size)
    splits: dict[str, SplitStatistics] = {}
    for split in SPLITS:
        builders[split].finalize(f"{prefixes[split]}.idx")
        splits[split] = SplitStatistics(
            documents=len(selection.of(split)),
            tokens=tokens[split],
            bytes=sum(document.size for document in selection.of(split)),
            bin_bytes=Path(f"{prefixes[split]}.bin").stat().st_size,
            idx_bytes=Path(f"{prefixes[split]}.idx").stat().st_size,
            bin_sha256=digests[split].hexdigest(),
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
            "sha256": tokenizer_hash(tokenizer),
            "fidelity": asdict(kept),
        },
        "encoder": asdict(encoder),
    }


def _sample(selection: Selection) -> list[str]:
    """Return the texts of about `SAMPLED` documents: the first ones of files in even distances."""
    files: dict[tuple[int, int], list[Selected]] = {}
    for document in selection.documents:
        files.setdefault((document.source, document.file), []).append(document)
    groups = list(files.values())[:: -(-len(files) // SAMPLED)]
    share = -(-SAMPLED // len(groups))
    documents = [document for group in groups for document in group[:share]]
    # A long text is cut: what the tokenizer does to it shows at its beginning.
    return [text[:SAMPLED_LENGTH] for _, text in read_selected(selection, documents)]


def source_table(selection: Selection) -> list[dict[str, Any]]:
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
