"""The sample indices of a run: which there are, their files, sizes, and whether they are complete.

Megatron reads a set of documents through three arrays: the documents in their shuffled order, the
place where each sample starts, and the order of the samples. A set of packs has none, nor has a
blend, whose order is a rule (`feed.order`). Imports neither torch nor Megatron.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mellum2_megatron.common.files import size_text
from mellum2_megatron.data.corpus.selection import Split
from mellum2_megatron.data.feed.order import BlendSchedule, key_of
from mellum2_megatron.data.feed.sources import (
    DatasetTokenizer,
    RunData,
    Source,
    validation_shares,
)

if TYPE_CHECKING:
    from mellum2_megatron.config import Run

VALIDATION_SEED = 0
"""Seed of the order in which a validation set is read, the same for all runs."""

DATASET_CLASS = "IndexedDocuments"
"""Name of the dataset's class, a part of the files' names."""

ARRAYS = ("document_index.npy", "sample_index.npy", "shuffle_index.npy")
# Last the one without which Megatron loads nothing.
FILES = (*ARRAYS, "description.txt")
HASHES = "hashes.json"
"""Sizes and SHA-256 of the arrays, written by `mellum2 data index`."""

LARGE = 1_000_000_000
"""Bytes of missing indices from which on a start says that they are missing."""

_HEADER = 128  # bytes of NumPy's header of such an array
_PROCESS = 700_000_000
"""Bytes of a process that has imported Megatron; measured 0.6 GB on a CPU (0.19.2)."""
_LARGEST_INT32 = 2**31 - 1
_SECONDS_PER_ENTRY = 1.5e-7
"""Seconds for each document and sample; 1.2e-7 of CPU time measured (benchmarks/NOTES.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleIndex:
    """The sample index of one set of documents.

    Attributes:
        source: the set.
        split: split that it serves.
        samples: number of samples that are asked for; None: one epoch.
        sequence_length: tokens of a sample.
        seed: seed of both shuffles.
        tokenizer: tokenizer of the run; its identity is a part of the files' names.
        cache: folder of the files.
    """

    source: Source
    split: Split
    samples: int | None
    sequence_length: int
    seed: int
    tokenizer: DatasetTokenizer
    cache: Path

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies tokenizer and tokens in the files' names."""
        return {**self.tokenizer.unique_identifiers, "tokens": self.source.identity}

    @property
    def dataset_path(self) -> str:
        """Prefix of the tokens in the files' names, the same from every working folder."""
        return os.path.abspath(self.source.prefix)

    @property
    def name(self) -> str:
        """Common start of the files' names, which Megatron derives from all that decides them.

        The rule of megatron/core/datasets/megatron_dataset.py:63-77 (0.19.2).
        """
        description = json.dumps(
            {
                "class": DATASET_CLASS,
                "dataset_path": self.dataset_path,
                "num_samples": self.samples,
                "index_split": self.split,
                "random_seed": self.seed,
                "sequence_length": self.sequence_length,
                "split": None,
                "split_matrix": None,
                "tokenizer": self.identity,
            },
            indent=4,
        )
        digest = hashlib.md5(description.encode("utf-8"), usedforsecurity=False).hexdigest()
        return f"{digest}-{DATASET_CLASS}-{self.split}"

    def file(self, kind: str) -> Path:
        """Return the path of one of `FILES` or of `HASHES`."""
        return self.cache / f"{self.name}-{kind}"

    def is_complete(self) -> bool:
        """Return true if all files are there with the lengths that their headers state."""
        return all(is_complete(self.file(kind)) for kind in FILES)

    @property
    def epochs(self) -> int:
        """Passes over the documents, 1 or more."""
        if self.samples is None:
            return 1
        return max(1, -(-(self.samples * self.sequence_length + 1) // self.source.tokens))

    @property
    def entries(self) -> tuple[int, int]:
        """Numbers of documents and samples in the arrays."""
        epochs = self.epochs
        # Each sample needs one token beyond its end: its last label.
        samples = (epochs * self.source.tokens - 1) // self.sequence_length
        return epochs * self.source.documents, samples

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each of `ARRAYS`."""
        documents, samples = self.entries
        place = 4 if documents <= _LARGEST_INT32 else 8
        number = 4 if samples < 2**32 - 2 else 8
        bytes_of = (4 * documents, 2 * place * (samples + 1), number * samples)
        return {kind: _HEADER + size for kind, size in zip(ARRAYS, bytes_of, strict=True)}

    @property
    def size(self) -> int:
        """Bytes of all files, but for some hundred."""
        return sum(self.sizes.values())

    @property
    def memory(self) -> int:
        """Bytes of main memory that building takes.

        Megatron holds all arrays and the lengths of the documents until the end, and the order of
        the samples twice where the last epoch is shuffled by itself (gpt_dataset.py:486-585,
        714-740, 0.19.2). The order of the documents is made with upstream's patch
        ``document-index``.
        """
        twice = self.sizes["shuffle_index.npy"] if self.epochs > 1 else 0
        return _PROCESS + 4 * self.source.documents + self.size + twice

    @property
    def seconds(self) -> float:
        """Time to build it in one process, about."""
        documents, samples = self.entries
        return _SECONDS_PER_ENTRY * (documents + samples)


def is_complete(file: Path) -> bool:
    """Return true if a file exists and, for an array, has the length that its header states."""
    if file.suffix != ".npy":
        return file.is_file()
    try:
        # Mapping a file compares its length with its header, and reads none of the data.
        np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return True


def seed_of(run: Run, split: Split) -> int:
    """Return the seed of the order in which a split is read."""
    if split == "valid":
        # Whatever the run's seed: runs that validate on part of a set then read the same part, and
        # their losses can be compared.
        return VALIDATION_SEED
    return run.seed if run.data.seed is None else run.data.seed


def blend_of(run: Run, sources: Sequence[Source], samples: int | None) -> tuple[BlendSchedule, int]:
    """Return the order of the sources in training, and the number of samples.

    Args:
        run: a resolved run.
        sources: training sources, two or more.
        samples: number of samples; None: one epoch of each source.
    """
    weights: Sequence[float] = [source.weight for source in sources]
    if samples is None:
        weights = epoch = [source.sequences(run.data.sequence_length) for source in sources]
        samples = sum(epoch)
    return BlendSchedule(weights, key_of(seed_of(run, "train"), "blend")), samples


def source_counts(
    run: Run, sources: Sequence[Source], split: Split, samples: int | None
) -> list[int | None]:
    """Return the number of samples of each source of a split.

    Args:
        run: a resolved run.
        sources: sources of the split.
        split: the split.
        samples: number of samples of the split; None: one epoch of each source.
    """
    if len(sources) == 1:
        return [samples]
    if split == "train":
        schedule, total = blend_of(run, sources, samples)
        return [*schedule.counts(total)]
    if samples is None:
        return [source.sequences(run.data.sequence_length) for source in sources]
    return [*validation_shares(sources, samples)]


def index_of(
    run: Run,
    tokenizer: DatasetTokenizer,
    source: Source,
    samples: int | None,
    split: Split,
    cache: Path | None,
) -> SampleIndex:
    """Return the index of one set of documents; `cache` as in `datasets.build_datasets`."""
    return SampleIndex(
        source=source,
        split=split,
        samples=samples,
        sequence_length=run.data.sequence_length,
        seed=seed_of(run, split),
        tokenizer=tokenizer,
        cache=cache or source.cache,
    )


def run_indices(run: Run, data: RunData) -> list[SampleIndex]:
    """Return the indices that the start of a run loads, training first; none for packs.

    Args:
        run: a resolved run.
        data: its checked data.
    """
    if run.data.feed == "rollouts":
        return []
    cache = None if run.data.cache is None else Path(run.data.cache)
    counts: dict[Split, int] = {
        "train": run.schedule.train_samples - run.data.first_sample,
        "valid": run.logging.eval_iterations * run.eval_batch_size,
    }
    indices = []
    for split, samples in counts.items():
        sources = data.train if split == "train" else data.valid
        if not samples or not sources:
            continue
        shares = source_counts(run, sources, split, samples)
        indices += [
            index_of(run, data.tokenizer, source, share, split, cache)
            for source, share in zip(sources, shares, strict=True)
            if not source.shards
        ]
    # A blend may name a set twice, with as many samples of each.
    return [*{index.file(HASHES): index for index in indices}.values()]


def index_command(words: Sequence[str]) -> str:
    """Return the command that builds the indices of a run.

    Args:
        words: words of the command line that name the run: recipe or run file, and overrides.
    """
    return shlex.join(["mellum2", "data", "index", *words])


def index_notes(run: Run, data: RunData, command: str) -> list[str]:
    """Return a line about missing sample indices that would hold up the start for long.

    Args:
        run: a resolved run.
        data: its checked data.
        command: command that builds them.
    """
    indices = run_indices(run, data)
    missing = [index for index in indices if not index.is_complete()]
    size = sum(index.size for index in missing)
    if size < LARGE:
        return []
    minutes = sum(index.seconds for index in missing) / 60
    memory = max(index.memory for index in missing)
    return [
        f"sample indices: {len(missing)} of {len(indices)} are missing, {size_text(size)}. Rank 0 "
        f"would build them at the start, in about {minutes:,.0f} minutes and "
        f"{size_text(memory)} of memory, while all other ranks wait. Build them before: {command}"
    ]
