"""Time, memory and temporary files of stage `select` on documents that are numbers alone.

::

    python -m benchmarks.select_memory 10000000 --scope source --folder /scratch

writes hashes, lengths and band keys of as many documents as shards of a code source hold them, one
in ten with a near-duplicate before it, and runs the stage on them in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mellum2_megatron.common.values import to_plain
from mellum2_megatron.data.corpus.near_duplicates import NearDuplicateSettings
from mellum2_megatron.data.pipeline import partitions, row_file
from mellum2_megatron.data.pipeline.row_file import RowFile
from mellum2_megatron.data.pipeline.selecting import select
from mellum2_megatron.data.pipeline.tasks import Result, Task

SHARD = 200_000
"""Documents of a shard."""

SCOPES = ("source", "phase")


def make_task(results: Path, documents: int, *, bands: int, scope: str) -> Task:
    """Write the files of stage ``tokens``; return the task that reads them.

    Args:
        results: folder of all results.
        documents: number of documents.
        bands: band keys of a document.
        scope: compare over the ``source``, or within each of three ``phase``s.
    """
    inputs = []
    for start in range(0, documents, SHARD):
        count = min(SHARD, documents - start)
        generator = np.random.default_rng(start)
        inputs.append(Result(name=f"tokens/{start}", stage="tokens", source="code"))
        folder = inputs[-1].folder(results)
        folder.mkdir(parents=True)
        with RowFile(folder / "hashes.npy", np.uint8, 16) as hashes:
            hashes.add(generator.integers(0, 256, (count, 16), dtype=np.uint8))
        lengths = generator.integers(82, 3000, count)
        with RowFile(folder / "offsets.npy", np.int64) as offsets:
            offsets.add(np.concatenate(([0], np.cumsum(lengths))))
        # A key of a band is its number behind that of the document, or of an earlier one.
        like = np.arange(start, start + count)
        alike = np.flatnonzero(generator.random(count) < 0.1)
        own = like[:, None] * np.ones(bands, dtype=np.int64)
        earlier = generator.integers(0, like[alike] + 1)
        own[alike, generator.integers(0, bands, len(alike))] = earlier
        mixed = own.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        with RowFile(folder / "keys.npy", np.uint64, bands) as keys:
            keys.add(mixed ^ np.arange(bands, dtype=np.uint64))
    near = {"settings": to_plain(NearDuplicateSettings(bands=bands)), "minhash": "none"}
    settings: dict[str, Any] = {"seed": 1, "valid_share": 0.005, "near_duplicates": near}
    if scope == "phase":
        tokens = documents * 1000
        settings |= {"phases": [[number, tokens] for number in (1, 2, 3)], "epochs": 4.0}
    return Task(
        stage="select",
        label=f"{documents}",
        version=1,
        work=select,
        settings=settings,
        inputs=tuple(inputs),
    )


def peak() -> float:
    """Return the largest memory of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(
    folder: Path,
    tasks: list[Task],
    records_in_memory: int = partitions.RECORDS_IN_MEMORY,
    block_rows: int = row_file.BLOCK_ROWS,
) -> list[dict[str, Any]]:
    """Run tasks one after the other; return for each the peak so far, and what it did.

    Args:
        folder: the results of each task are in a folder below, named by its number of documents.
        tasks: tasks of `make_task`.
        records_in_memory, block_rows: see `partitions` and `row_file`.
    """
    partitions.RECORDS_IN_MEMORY, row_file.BLOCK_ROWS = records_in_memory, block_rows
    found = []
    for task in tasks:
        results = folder / task.label
        made = results / task.name
        made.mkdir(parents=True)
        began, before = time.monotonic(), peak()
        disk, ended = [0], threading.Event()
        watch = threading.Thread(target=_watch, args=(made, disk, ended))
        watch.start()
        facts = select(task, results, made)
        ended.set()
        watch.join()
        found.append(
            {
                "documents": facts["documents_read"],
                "near_duplicates": facts["near_duplicates"]["documents"],
                "seconds": round(time.monotonic() - began, 1),
                "peak_before": before,
                "peak": peak(),
                "temporary_bytes": disk[0],
            }
        )
    return found


def _watch(folder: Path, most: list[int], ended: threading.Event) -> None:
    """Note the largest size of the temporary files."""
    while not ended.wait(0.2):
        size = 0
        for path in folder.glob("temporary-*/*"):
            try:
                size += path.stat().st_size
            except FileNotFoundError:
                continue
        most[0] = max(most[0], size)


def main() -> None:
    """Write, run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("documents", type=int)
    parser.add_argument("--scope", choices=SCOPES, default="source")
    parser.add_argument("--bands", type=int, default=NearDuplicateSettings().bands)
    parser.add_argument("--folder", type=Path, help="where files of 150 bytes a document have room")
    given = parser.parse_args()
    with TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        task = make_task(
            folder / f"{given.documents}", given.documents, bands=given.bands, scope=given.scope
        )
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            (found,) = pool.apply(measure, (folder, [task]))
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
