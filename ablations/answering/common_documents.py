"""The documents that all runs of a study were validated on, and each run's sums of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ablations.answering.run_measures import RunMeasures
from mellum2_megatron.metrics.validation_sums import ValidationSums

Key = tuple[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class CommonDocuments:
    """Sums of each run over the common documents, `[runs, documents]`.

    A document is common if every run scored the same part of it, by its bytes.

    Attributes:
        keys: validation set and document, of each column.
        nats, tokens: sums of each run.
        bytes: bytes of text of each document, `[documents]`.
        of_all: number of different documents of all runs.
    """

    keys: tuple[Key, ...]
    nats: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]
    of_all: int

    @property
    def same_tokens(self) -> bool:
        """True if every run has the same tokens; false with other tokenizers."""
        return bool((self.tokens == self.tokens[:1]).all())


def common_documents(runs: Sequence[RunMeasures]) -> CommonDocuments | None:
    """Return the common documents of runs; None if a run has no sums by document."""
    tables: list[dict[Key, int]] = []
    sums: list[ValidationSums] = []
    for run in runs:
        if run.sums is None:
            return None
        sums.append(run.sums)
        names = run.sums.corpora
        tables.append(
            {
                (names[corpus], document): row
                for row, (corpus, document) in enumerate(
                    zip(run.sums.corpus.tolist(), run.sums.document.tolist(), strict=True)
                )
            }
        )
    if not tables:
        return None
    every = set().union(*tables)
    keys = tuple(
        key
        for key in tables[0]
        if all(key in table for table in tables)
        and len({int(one.bytes[table[key]]) for one, table in zip(sums, tables, strict=True)}) == 1
    )
    rows = [np.array([table[key] for key in keys], dtype=np.int64) for table in tables]
    return CommonDocuments(
        keys=keys,
        nats=np.array([one.nats[row] for one, row in zip(sums, rows, strict=True)]),
        tokens=np.array([one.tokens[row] for one, row in zip(sums, rows, strict=True)]),
        bytes=sums[0].bytes[rows[0]],
        of_all=len(every),
    )
