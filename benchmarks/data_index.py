"""Time, memory and bytes of `mellum2 data index` on sets whose documents are lengths alone.

::

    python -m benchmarks.data_index --folder /scratch                       # 6e9 documents
    python -m benchmarks.data_index --documents 6e7 --samples 7.54e6 --folder /scratch

The tokens are holes in a file, and all sets are hard links to one, so the disk holds the indices
and the lengths of one set. Indices are built by the command's own function. Then one process opens
all of them, as a rank does at the start of a run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import struct
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil

from mellum2_megatron.common.files import size_text
from mellum2_megatron.common.free_memory import free_memory
from mellum2_megatron.data.feed.index_plan import SampleIndex
from mellum2_megatron.data.feed.sources import DatasetTokenizer, Source
from mellum2_megatron.data.tokens.indexed_files import read_indexed
from mellum2_megatron.training.index_builder import IndexPlan, build_indices

LENGTH = 8192
"""Tokens of a sample."""

_BLOCK = 50_000_000
_UINT16 = 8  # Megatron's code of a token type


def write_set(prefix: Path, documents: int, samples: int) -> None:
    """Write a set whose documents have log-normal lengths and fill the samples exactly.

    Args:
        prefix: path without ``.bin`` or ``.idx``.
        documents: number of documents.
        samples: samples of `LENGTH` tokens in one pass.
    """
    tokens = samples * LENGTH + 1
    generator = np.random.default_rng(1)
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, _UINT16, documents, documents + 1)
    with Path(f"{prefix}.idx").open("wb") as stream:
        stream.write(header)
        for start in range(0, documents, _BLOCK):
            end = min(start + _BLOCK, documents)
            count, first, beyond = end - start, tokens * start, tokens * end
            # One token each; the rest by weights, rounded at the ends of documents.
            rest = beyond // documents - first // documents - count
            ends = np.cumsum(generator.lognormal(size=count))
            ends = np.floor(ends * (rest / ends[-1]))
            ends[-1] = rest
            lengths = (np.diff(ends, prepend=0) + 1).astype(np.int32)
            lengths.tofile(stream)
        last = 2 * (tokens - int(lengths[-1]))
        # Places of documents and their ends: only the last of each are read.
        stream.seek(8 * (documents - 1), os.SEEK_CUR)
        stream.write(struct.pack("<q", last))
        stream.seek(8 * documents, os.SEEK_CUR)
        stream.write(struct.pack("<q", documents))
    with Path(f"{prefix}.bin").open("wb") as stream:
        stream.truncate(2 * tokens)


def indices_of(folder: Path, sets: int, documents: int, samples: int) -> list[SampleIndex]:
    """Write the sets; return their indices, one pass over each."""
    write_set(folder / "set-0", documents // sets, samples // sets)
    indices = []
    for number in range(sets):
        prefix = folder / f"set-{number}"
        if number:
            for suffix in (".bin", ".idx"):
                os.link(f"{folder / 'set-0'}{suffix}", f"{prefix}{suffix}")
        files = read_indexed(prefix, str(prefix))
        source = Source(
            key="data.train",
            name=prefix.name,
            weight=1.0,
            prefix=prefix,
            tokens=files.tokens,
            documents=files.sequences,
            identity=f"{files.tokens} tokens",
            tokenizer_sha256=None,
            vocab_size=None,
        )
        indices.append(
            SampleIndex(
                source=source,
                split="train",
                samples=samples // sets,
                sequence_length=LENGTH,
                seed=1234,
                tokenizer=DatasetTokenizer(vocab_size=65536, eod=0, eos=0, bos=None),
                cache=folder / "cache",
            )
        )
    return indices


class _Peak:
    """Largest memory of this process's children together, looked at every half second."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            children = psutil.Process().children(recursive=True)
            self.bytes = max(self.bytes, sum(_own_memory(child.pid) for child in children))


def _own_memory(process: int) -> int:
    """Return the memory of a process that is no file's; mapped files need not stay in memory."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:  # it has ended
        return 0
    return sum(
        int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")
    )


def _open_all(indices: list[SampleIndex], results: Any) -> None:
    """Open the sets as a rank does, and read a sample of each."""
    from mellum2_megatron import upstream
    from mellum2_megatron.data.feed import datasets

    upstream.quiet_upstream()
    import megatron.core.datasets.gpt_dataset  # noqa: F401  # not a part of the time

    before, start = _own_memory(os.getpid()), time.monotonic()
    opened = [datasets.open_documents(index) for index in indices]
    seconds = time.monotonic() - start
    for each in opened:
        each[len(each) - 1]
    results.put((seconds, _own_memory(os.getpid()) - before))


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--documents", type=float, default=6e9, help="of all sets; default: 6e9")
    parser.add_argument("--samples", type=float, default=754e6, help="of all sets; default: 754e6")
    parser.add_argument("--sets", type=int, default=12, help="sets of the blend; default: 12")
    parser.add_argument("--workers", type=int, default=2, help="processes; default: 2")
    parser.add_argument("--memory", type=float, help="GB; default: 80%% of what is free")
    parser.add_argument("--folder", type=Path, required=True, help="place for the files")
    words = parser.parse_args()
    with TemporaryDirectory(dir=words.folder) as name:
        start = time.monotonic()
        indices = indices_of(Path(name), words.sets, int(words.documents), int(words.samples))
        _print(f"wrote {words.sets} sets in {time.monotonic() - start:,.0f} s")
        memory = int(0.8 * free_memory() if words.memory is None else words.memory * 1e9)
        plan = IndexPlan(indices=tuple(indices), missing=tuple(indices), memory=memory)
        for title in ("build", "check the hashes"):
            start, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            with _Peak() as peak:
                for built in build_indices(plan, workers=words.workers):
                    _print(f"{built.index.source.name}: {built.state}, {built.seconds:,.0f} s")
            now = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
            _print(
                f"{title}: {(time.monotonic() - start) / 60:,.1f} minutes, {cpu:,.0f} CPU s, "
                f"{words.workers} processes, peak memory {size_text(peak.bytes)}, of one at most "
                f"{size_text(max(index.memory for index in indices))} by the estimate"
            )
        documents = sum(index.entries[0] for index in indices)
        samples = sum(index.entries[1] for index in indices)
        _print(
            f"{documents:,} documents, {samples:,} samples: "
            f"{size_text(sum(index.size for index in indices))} of indices"
        )
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        process = context.Process(target=_open_all, args=(indices, results))
        process.start()
        seconds, own = results.get()
        process.join()
        _print(f"a start opens all in {seconds:,.2f} s and {size_text(own)} of memory")


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
