"""Stage ``tokens``: encode what is left of a shard, with the keys of near-duplicates.

::

    tokens/LABEL-HASH/ids.bin          int32 ids of all documents, each ending with eod
    tokens/LABEL-HASH/offsets.npy      first id of each document, and the end [n + 1]
    tokens/LABEL-HASH/rows.npy         its row in the result of stage documents [n]
    tokens/LABEL-HASH/hashes.npy       hash of its text [n, 16]
    tokens/LABEL-HASH/keys.npy         its band keys [n, bands], for sources without near-duplicates
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.values import from_mapping
from mellum2_megatron.data.corpus.near_duplicates import (
    NearDuplicateSettings,
    band_keys,
    signatures,
)
from mellum2_megatron.data.corpus.quality_filters import too_few_unique
from mellum2_megatron.data.pipeline.documents import HASH_BYTES, batches, stored_documents
from mellum2_megatron.data.pipeline.row_file import BLOCK_ROWS, RowFile, count_rows, read_rows
from mellum2_megatron.data.pipeline.tasks import Task
from mellum2_megatron.data.tokens.encoder import DocumentEncoder
from mellum2_megatron.data.tokens.tokenizer import tokenizer_hash


def encode(task: Task, results: Path, folder: Path) -> dict[str, Any]:
    """Encode the documents that exact deduplication left, with their near-duplicate keys."""
    documents, exact = task.inputs
    settings = task.settings
    near = near_settings(settings)
    stored = documents.folder(results)
    duplicates = np.load(exact.folder(results) / f"dropped-{settings['number']:05}.npy")
    hashes = _Hashes(stored / "hashes.npy")
    # One byte for each document of the shard is all that is in memory of them together.
    keep = np.ones(count_rows(stored / "hashes.npy"), dtype=bool)
    keep[duplicates] = False
    del duplicates
    encoder = make_encoder(task)
    few = few_bytes = size = documents_kept = end = 0
    few_example = ""
    keys = None if near is None else RowFile(folder / "keys.npy", np.uint64, near.bands)
    with (
        (folder / "ids.bin").open("wb") as out,
        RowFile(folder / "offsets.npy", np.int64) as offsets,
        RowFile(folder / "rows.npy", np.int64) as rows,
        RowFile(folder / "hashes.npy", np.uint8, HASH_BYTES) as kept_hashes,
        keys or nullcontext(),
    ):
        offsets.add(np.zeros(1))
        kept = ((row, one) for row, one in enumerate(stored_documents(stored)) if keep[row])
        for batch in batches(kept):
            encoded = encoder.encode(
                [one.text for _, one in batch], [one.origin for _, one in batch]
            )
            chosen: list[NDArray[np.int32]] = []
            numbers: list[int] = []
            for (row, one), ids in zip(batch, encoded, strict=True):
                reason = too_few_unique(ids, fewest=settings["unique_tokens"])
                length = len(one.text.encode())
                if reason is not None:
                    few += 1
                    few_bytes += length
                    few_example = few_example or f"{one.origin}: {reason}"
                    continue
                size += length
                numbers.append(row)
                chosen.append(np.asarray(ids, dtype=np.int32))
                out.write(np.append(chosen[-1], settings["eod"]).astype("<i4").tobytes())
            if not chosen:
                continue
            ends = end + np.cumsum([len(ids) + 1 for ids in chosen])
            end = int(ends[-1])
            documents_kept += len(chosen)
            offsets.add(ends)
            rows.add(np.array(numbers))
            kept_hashes.add(hashes.of(numbers))
            if near is not None and keys is not None:
                keys.add(band_keys(signatures(chosen, near), near))
    return {
        "documents_read": int(keep.sum()),
        "documents": documents_kept,
        "bytes": size,
        "tokens": end,
        "encoder": settings["engine"],
        "dropped": {"UniqueTokens": {"documents": few, "bytes": few_bytes, "example": few_example}}
        if few
        else {},
    }


class _Hashes:
    """Hashes of a shard's documents, of which one block is in memory."""

    def __init__(self, path: Path) -> None:
        self._path, self._count = path, count_rows(path)
        self._number, self._block = -1, np.zeros((0, HASH_BYTES), dtype=np.uint8)

    def of(self, rows: Sequence[int]) -> NDArray[np.uint8]:
        """Return the hashes of rows in rising order ``[n, 16]``."""
        found = np.empty((len(rows), HASH_BYTES), dtype=np.uint8)
        for place, row in enumerate(rows):
            number, within = divmod(row, BLOCK_ROWS)
            if number != self._number:
                start = number * BLOCK_ROWS
                self._block = read_rows(self._path, start, min(start + BLOCK_ROWS, self._count))
                self._number = number
            found[place] = self._block[within]
        return found


def make_encoder(task: Task) -> DocumentEncoder:
    """Return the encoder of a task's tokenizer, with the library that the plan chose.

    Raises:
        InputError: the tokenizer is not the one that the task is named after.
    """
    folder = Path(task.places["tokenizer"])
    if tokenizer_hash(folder) != task.settings["tokenizer"]:
        raise InputError(
            f"tokenizer {folder}",
            rule="it has changed since this run of the plan began",
            fix="run the plan again: with a changed tokenizer it encodes and packs anew",
        )
    return DocumentEncoder(folder, task.settings["engine"], task.settings["eod"])


def near_settings(settings: dict[str, Any]) -> NearDuplicateSettings | None:
    """Return what a task finds near-duplicates with, None if it finds none."""
    given = settings["near_duplicates"]
    if given is None:
        return None
    return from_mapping(NearDuplicateSettings, given["settings"], document="corpus plan")
