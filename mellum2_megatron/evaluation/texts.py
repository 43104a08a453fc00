"""Texts that measures are taken on: the user's own, or Python's standard library."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from mellum2_megatron.data.corpus.discovery import given_sources, standard_library
from mellum2_megatron.data.corpus.left_out import LeftOut
from mellum2_megatron.data.corpus.sources import ReadOptions, read_documents

MAY_BE_TRAINED_ON = (
    "texts: Python's standard library, which the training data may contain; "
    "name held-out files with the setting `text`"
)
"""Note of a measure without texts of the user."""


def shuffled_texts(paths: Sequence[str], seed: int) -> Iterator[str]:
    """Yield documents in an order that files and seed decide.

    Args:
        paths: files and folders, read as `mellum2 data prepare` reads them; empty: the standard
            library of the running Python.
        seed: seed of the order.

    Raises:
        InputError: a path cannot be read.
    """
    left_out = LeftOut()
    sources = given_sources(paths, left_out) if paths else [standard_library(left_out)]
    files = [file for source in sources for file in source.files]
    random.Random(seed).shuffle(files)
    for file in files:
        for document in read_documents(file, ReadOptions(), left_out):
            yield document.text


def notes_on(paths: Sequence[str]) -> tuple[str, ...]:
    """Return what a reader must know about the texts."""
    return () if paths else (MAY_BE_TRAINED_ON,)
