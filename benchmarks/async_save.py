"""Seconds that the background process of an asynchronous save needs, with and without CRC-32.

::

    python -m benchmarks.async_save --folder /dev/shm --gigabytes 2     # benchmarks/NOTES.md

Megatron's own writer runs in a spawned process, as `checkpoint.async_save` starts one. In a folder
in main memory the processor is all it waits for; processor seconds hold on a busy machine too. The
order is without, with, without: the difference of the two equal ones is noise.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TENSORS = 8


def seconds(folder: Path, size: int, *, checksums: bool) -> tuple[float, float]:
    """Return wall and processor seconds in which a spawned process writes one file.

    Args:
        folder: place of the file, which is removed.
        size: bytes of the file's tensors.
        checksums: write as Megatron does, with torch's CRC-32.
    """
    import torch
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

    from mellum2_megatron.upstream.replacements import save_without_checksums

    spawn = multiprocessing.get_context("spawn")
    # In shared memory, so that the process does not get a copy first.
    tensors = [
        torch.ones(size // TENSORS // 4, dtype=torch.float32).share_memory_()
        for _ in range(TENSORS)
    ]
    items = [
        (WriteItem(index=MetadataIndex(str(number)), type=WriteItemType.SHARD), tensor)
        for number, tensor in enumerate(tensors)
    ]
    with tempfile.TemporaryDirectory(dir=folder) as place, spawn.Manager() as manager:
        writer = FileSystemWriterAsync(place)
        writer.results_queue = manager.Queue()
        writer.write_buckets = [(f"{place}/__0_0.distcp", "__0_0.distcp", ([], items))]
        make = FileSystemWriterAsync.get_save_function_and_args
        write, _, args = (make if checksums else save_without_checksums(make))(writer)
        with spawn.Pool(1) as pool:
            pool.apply(_timed, (write, [*args[:1], [], args[2]]))  # imports, not timed
            writer.results_queue.get()
            taken: tuple[float, float] = pool.apply(_timed, (write, args))
    return taken


def _timed(write: Callable[..., None], args: list[Any]) -> tuple[float, float]:
    begin, spent = time.perf_counter(), time.process_time()
    write(*args)
    return time.perf_counter() - begin, time.process_time() - spent


def main() -> None:
    """Write a table to stdout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the file is written")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the file")
    parser.add_argument("--rounds", type=int, default=1, help="pairs to measure, and one more")
    args = parser.parse_args()
    from mellum2_megatron import cpu

    cpu.activate()
    import torch

    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    size = int(args.gigabytes * 1e9)
    lines = ["| CRC-32 | seconds | processor seconds |", "|---|---|---|"]
    for checksums in (False, True) * args.rounds + (False,):
        wall, spent = seconds(args.folder, size, checksums=checksums)
        word = "as Megatron writes" if checksums else "none"
        lines.append(f"| {word} | {wall:.2f} | {spent:.2f} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
