"""Speed of the data pipeline's steps, each against its bar and, in the same run, a reference.

::

    python -m benchmarks.data                     # all rows, about three minutes
    python -m benchmarks.data --only pack stream  # some rows; --list names them
    python -m benchmarks.data --json FILE         # the figures as JSON too
    python -m benchmarks.data --tokenizer DIR     # a tokenizer of one's own

Rates are per second of CPU time in one process, the best of three rounds in which both sides
alternate: a busy machine then changes them less, though not little. Only ``stream`` has several
processes and wall time. Where both sides can give the same result, they must. Figures of libraries
that are not installed are constants, measured once on another machine; the table marks them.

A new row is a function from `Corpus` to `Measured` and an entry in `ROWS`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_corpus import LENGTH, Corpus, lognormal
from benchmarks.data_stock import stock_dataset, write_documents
from benchmarks.data_stream import READERS, cpu_of_files, stream_samples
from mellum2_megatron.common.console import console, plain_table
from mellum2_megatron.common.files import write_json
from mellum2_megatron.data.corpus.near_duplicates import (
    NearDuplicateSettings,
    minhash_version,
    signatures,
)
from mellum2_megatron.data.corpus.parse_filters import Parses
from mellum2_megatron.data.corpus.quality_filters import (
    CODE_FILTERS,
    Content,
    Filter,
    reason_to_drop,
)
from mellum2_megatron.data.feed.order import Permutation, key_of
from mellum2_megatron.data.feed.packed_dataset import PackedDataset
from mellum2_megatron.data.tokens.best_fit_packing import best_fit, cut_documents

ROUNDS = 3
STREAMED = 8000
"""Samples that go through Redis, 270 MB."""

# Measured on 24 November 2026 on a machine with two cores, one process, CPU time.
DATATROVE_SIGNATURES = 0.49
"""MB of code a second: signatures of datatrove 0.10.1."""
OLMO_PACKER = 0.125e6
"""Pieces a second: OLMo-core's `InstancePacker`, 2 million pieces, packs of 8,192."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The outcome of a row.

    Attributes:
        figure: what the bar is about, such as megabytes a CPU second.
        unit: its unit.
        met: it reaches the bar. None: the bar cannot be judged here.
        reference: name and figure of the other side; empty if there is none.
        ratio: our figure over the reference's.
        facts: all other figures.
    """

    figure: float
    unit: str
    met: bool | None
    reference: str = ""
    ratio: float | None = None
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A line of the table: its bar in words, and the function that measures it."""

    bar: str
    measure: Callable[[Corpus], Measured]


def cpu_seconds(arms: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the least CPU seconds of each arm; the arms alternate."""
    best = dict.fromkeys(arms, float("inf"))
    for _ in range(ROUNDS):
        for name, work in arms.items():
            gc.collect()
            start = time.process_time()
            work()
            best[name] = min(best[name], time.process_time() - start)
    return best


def encode(corpus: Corpus) -> Measured:
    """Measure our encoder against the tokenizers library on the same texts."""
    ours, theirs = corpus.encoder(), corpus.encoder("tokenizers")
    pairs = zip(ours.encode(corpus.texts), theirs.encode(corpus.texts), strict=True)
    assert all(np.array_equal(one, two) for one, two in pairs)
    part = corpus.texts[::2]
    megabytes = sum(len(text.encode()) for text in part) / 1e6
    seconds = cpu_seconds(
        {"ours": lambda: ours.encode(part), "reference": lambda: theirs.encode(part)}
    )
    rates = {name: megabytes / value for name, value in seconds.items()}
    ratio = rates["ours"] / rates["reference"]
    return Measured(
        figure=rates["ours"],
        unit="MB/s",
        reference=f"tokenizers {rates['reference']:.2f}",
        ratio=ratio,
        met=ratio >= 3.5,
        facts={
            "engine": corpus.choice.engine,
            "why": corpus.choice.reason,
            "megabytes_compared": corpus.megabytes,
            "tokenizers_mb_per_cpu_second": rates["reference"],
        },
    )


def filters(corpus: Corpus) -> Measured:
    """Measure the filters of source code that parse nothing."""
    return _filtered(corpus, CODE_FILTERS, 60)


def parse(corpus: Corpus) -> Measured:
    """Measure all filters of source code, the parse check of Python among them."""
    return _filtered(corpus, (*CODE_FILTERS, Parses()), 4)


def _filtered(corpus: Corpus, tests: Sequence[Filter], bar: float) -> Measured:
    dropped = 0

    def run() -> None:
        nonlocal dropped
        dropped = sum(
            reason_to_drop(Content(text, "python"), tests) is not None for text in corpus.texts
        )

    rate = corpus.megabytes / cpu_seconds({"ours": run})["ours"]
    facts = {"documents": len(corpus.texts), "dropped": dropped}
    return Measured(figure=rate, unit="MB/s", met=rate >= bar, facts=facts)


def near(corpus: Corpus) -> Measured:
    """Measure MinHash signatures of token ids against datasketch's of the same shingles."""
    settings = NearDuplicateSettings()
    batches = [corpus.ids[start : start + 256] for start in range(0, len(corpus.ids), 256)]
    arms: dict[str, Callable[[], object]] = {
        "ours": lambda: [signatures(batch, settings) for batch in batches]
    }
    some = corpus.ids[:: max(1, len(corpus.ids) // 100)]
    some_megabytes = sum(map(len, some)) / sum(map(len, corpus.ids)) * corpus.megabytes
    try:
        from datasketch import MinHash
    except ModuleNotFoundError:
        pass
    else:

        def theirs() -> None:
            for ids in some:
                raw, width = ids.tobytes(), settings.shingle
                grams = {
                    raw[4 * place : 4 * (place + width)]
                    for place in range(max(1, len(ids) - width + 1))
                }
                MinHash(num_perm=settings.permutations).update_batch(list(grams))

        arms["reference"] = theirs
    seconds = cpu_seconds(arms)
    rate = corpus.megabytes / seconds["ours"]
    reference = some_megabytes / seconds["reference"] if "reference" in seconds else None
    of_datatrove = rate / DATATROVE_SIGNATURES
    return Measured(
        figure=rate,
        unit="MB/s of text",
        reference="" if reference is None else f"datasketch {reference:.2f}",
        ratio=None if reference is None else rate / reference,
        met=rate >= 50 and of_datatrove >= 50,
        facts={
            "algorithm": minhash_version(),
            "datasketch_mb_per_cpu_second": reference,
            "datatrove_mb_per_second_stated": DATATROVE_SIGNATURES,
            "times_datatrove_as_stated": of_datatrove,
        },
    )


def pack(corpus: Corpus) -> Measured:
    """Measure best-fit packing in groups against the same rule applied piece by piece.

    The reference finds the fullest pack with a bit for each room, and gets a tenth of the pieces.
    """
    lengths = np.minimum(lognormal(2_000_000), LENGTH)
    part = lengths[: lengths.size // 20]
    one, other = best_fit(part, capacity=LENGTH), piece_by_piece(part.tolist(), LENGTH)
    filled = [np.sort(np.bincount(packs, weights=part)) for packs in (one, np.array(other))]
    assert np.array_equal(*filled)
    seconds = cpu_seconds(
        {
            "ours": lambda: best_fit(lengths, capacity=LENGTH),
            "reference": lambda: piece_by_piece(part.tolist(), LENGTH),
        }
    )
    ours, reference = lengths.size / seconds["ours"], part.size / seconds["reference"]
    return Measured(
        figure=ours / 1e6,
        unit="million pieces/s",
        reference=f"piece by piece {reference / 1e6:.2f}",
        ratio=ours / reference,
        met=ours >= 4e6 and ours >= 20 * OLMO_PACKER,
        facts={
            "pieces": lengths.size,
            "capacity": LENGTH,
            "olmo_core_pieces_per_second_stated": OLMO_PACKER,
            "times_olmo_core_as_stated": ours / OLMO_PACKER,
        },
    )


def piece_by_piece(lengths: list[int], capacity: int) -> list[int]:
    """Return the pack of each piece by best-fit decreasing, one piece at a time."""
    packs, rooms = [0] * len(lengths), [list[int]() for _ in range(capacity + 1)]
    present = opened = 0
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        length = lengths[piece]
        fitting = present >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = rooms[room].pop()
            if not rooms[room]:
                present &= ~(1 << room)
        else:
            room, number, opened = capacity, opened, opened + 1
        packs[piece] = number
        if room > length:
            rooms[room - length].append(number)
            present |= 1 << (room - length)
    return packs


def fill(corpus: Corpus) -> Measured:
    """Pack documents of real lengths; count those that were cut although they fit into a pack."""
    lengths = corpus.lengths
    pieces = cut_documents(lengths, capacity=LENGTH)
    packs = best_fit(pieces.lengths, capacity=LENGTH)
    share = lengths.sum() / ((packs.max() + 1) * LENGTH)
    cut = np.bincount(pieces.documents) > 1
    needless = int((cut & (lengths <= LENGTH)).sum())
    assert pieces.lengths.sum() == lengths.sum()
    assert np.bincount(packs, weights=pieces.lengths).max() <= LENGTH
    return Measured(
        figure=100 * share,
        unit="% filled",
        met=bool(share >= 0.9998 and needless == 0),
        facts={
            "documents": lengths.size,
            "packs": int(packs.max()) + 1,
            "documents_cut": int(cut.sum()),
            "documents_cut_that_fit": needless,
        },
    )


def order(corpus: Corpus) -> Measured:
    """Name samples of a set of 754 million packs, against storing the order of 0.1%."""
    count, asked = 754_000_000, 1000
    tracemalloc.start()
    start = time.process_time()
    permutation = Permutation(count, key_of("benchmark"))
    first = permutation(0)
    seconds = time.process_time() - start
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 <= first < count
    rates = cpu_seconds(
        {
            "one": lambda: [permutation(index) for index in range(asked)],
            "many": lambda: permutation.many(np.arange(100 * asked)),
            "stored": lambda: np.random.default_rng(0).permutation(count // 1000),
        }
    )
    stored = 1000 * rates["stored"]
    return Measured(
        figure=1e3 * seconds,
        unit="ms to start",
        reference=f"stored, 1000 x 0.1% {1e3 * stored:,.0f}",
        ratio=seconds / stored,
        met=seconds < 0.01 and memory < 1e6,
        facts={
            "packs": count,
            "bytes_at_start": memory,
            "bytes_stored": 8 * count,
            "microseconds_per_sample": 1e6 * rates["one"] / asked,
            "microseconds_per_sample_of_many": 1e6 * rates["many"] / (100 * asked),
        },
    )


def read(corpus: Corpus) -> Measured:
    """Measure training samples from packs, against Megatron's of the same documents."""
    ours = PackedDataset(
        [corpus.packs], samples=None, key=1, index_split=None, document_attention=True
    )
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "documents"
        write_documents(prefix, ours.shard(0))
        datasets: dict[str, Any] = {
            "ours": ours,
            "described": stock_dataset(prefix, LENGTH, documents=True),
            "plain": stock_dataset(prefix, LENGTH, documents=False),
        }
        count = min(map(len, datasets.values()))

        def take(dataset: Any) -> Callable[[], object]:
            # None is kept: a loader copies a sample into its batch and lets it go.
            return lambda: deque((dataset[index] for index in range(count)), maxlen=0)

        seconds = cpu_seconds({name: take(dataset) for name, dataset in datasets.items()})
    rates = {name: count / spent for name, spent in seconds.items()}
    return Measured(
        figure=rates["ours"],
        unit="packs/s",
        reference=f"GPTDataset with documents {rates['described']:,.0f}",
        ratio=rates["ours"] / rates["described"],
        met=rates["ours"] >= 20_000,
        facts={
            "packs": count,
            "length": LENGTH,
            "megatokens_per_second": rates["ours"] * LENGTH / 1e6,
            "megatron_without_documents_per_second": rates["plain"],
        },
    )


def stream(corpus: Corpus) -> Measured:
    """Measure training samples through Redis, from packs on disk to the items of two readers."""
    with tempfile.TemporaryDirectory() as folder:
        facts = stream_samples(corpus.packs, LENGTH, Path(folder), samples=STREAMED)
    of_files = cpu_of_files(corpus.packs, LENGTH)
    rate, used = facts["mb_per_second"], sum(facts["cpu_seconds_per_gb"].values())
    return Measured(
        figure=rate,
        unit="MB/s, wall",
        reference=f"CPU s/GB {used:.1f}, from files {of_files:.1f}",
        met=rate >= 100,
        facts={**facts, "cpu_seconds_per_gb_in_all": used, "cpu_seconds_per_gb_of_files": of_files},
    )


ROWS = {
    "encode": Row(bar=">= 3.5 x tokenizers, equal ids", measure=encode),
    "filters": Row(bar=">= 60 MB/s", measure=filters),
    "parse": Row(bar=">= 4 MB/s", measure=parse),
    "near": Row(bar=">= 50 MB/s, 50 x datatrove's stated 0.49", measure=near),
    "pack": Row(bar=">= 4 million/s, 20 x OLMo-core's stated 0.125", measure=pack),
    "fill": Row(bar=">= 99.98 %, none cut that fits", measure=fill),
    "order": Row(bar="< 10 ms and 1 MB for 754 million", measure=order),
    "read": Row(bar=">= 20,000 packs/s", measure=read),
    "stream": Row(bar=f">= 100 MB/s to {READERS} readers", measure=stream),
}


def machine() -> dict[str, Any]:
    """Return what figures depend on."""
    names = ("numpy", "tokenizers", "tiktoken", "rensa", "datasketch", "redis", "hiredis", "torch")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    cores = len(os.sched_getaffinity(0))
    return {"cores": cores, "python": platform.python_version(), "versions": versions}


def show(results: dict[str, Measured]) -> None:
    """Print the table."""
    table = plain_table("row", "figure", "reference", "ratio", "bar", "met")
    for name, one in results.items():
        table.add_row(
            name,
            f"{one.figure:,.4g} {one.unit}"
            if one.figure < 1e4
            else f"{one.figure:,.0f} {one.unit}",
            one.reference,
            "" if one.ratio is None else f"{one.ratio:.3g}",
            ROWS[name].bar,
            {True: "yes", False: "no", None: "?"}[one.met],
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure rows, print a table, and return 0."""
    # One thread: the reference is a process of its own too.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parser = argparse.ArgumentParser(description="Speed of the data pipeline's steps.")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--list", action="store_true", help="list the rows")
    parser.add_argument("--megabytes", type=float, default=8.0, help="size of the corpus")
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face tokenizer folder")
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_args(argv)
    if arguments.list:
        for name, row in ROWS.items():
            console.print(f"{name:8} {row.bar}")
        return 0
    corpus = Corpus(arguments.megabytes, arguments.tokenizer)
    before = os.getloadavg()[0]
    results = {}
    for name in arguments.only:
        start = time.perf_counter()
        results[name] = ROWS[name].measure(corpus)
        console.print(f"{name}: {time.perf_counter() - start:.0f} s", style="dim")
    show(results)
    load = before, os.getloadavg()[0]
    console.print(f"load of the machine before and after: {load[0]:.1f}, {load[1]:.1f}")
    if arguments.json is not None:
        rows = {name: {"bar": ROWS[name].bar, **asdict(one)} for name, one in results.items()}
        write_json(arguments.json, {"machine": machine(), "load": load, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
