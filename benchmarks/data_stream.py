"""Samples through Redis: a streamer, a server and two readers, each a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.config import Stream
from mellum2_megatron.data.feed.packed_dataset import PackedDataset
from mellum2_megatron.data.feed.redis_run import HEAP_VARIABLES
from mellum2_megatron.data.feed.redis_server import write_server_files
from mellum2_megatron.data.feed.redis_streamer import Streamer
from mellum2_megatron.data.feed.redis_wire import Keys
from mellum2_megatron.data.feed.streamed_training import StreamedTraining, StreamSource
from mellum2_megatron.data.tokens.pack_files import ShardEntry

KEYS = Keys("benchmark", "plan")
MICRO_BATCH = 8
READERS = 2
WINDOW = 1024


def stream_samples(entry: ShardEntry, length: int, folder: Path, *, samples: int) -> dict[str, Any]:
    """Stream training samples of packs to two readers, which take turns as two ranks do.

    Args:
        entry: the packs; their epochs follow one another.
        length: tokens of a pack.
        folder: folder for the server's files.
        samples: number of samples in all.

    Returns:
        ``megabytes`` as they lie in Redis, ``mb_per_second`` of wall time, and
        ``cpu_seconds_per_gb`` of each part. Readers build the training items, as from files.

    Raises:
        WorkError: the server does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    files = write_server_files(
        folder / "redis",
        KEYS,
        address="127.0.0.1",
        port=port,
        memory=2 * WINDOW * (6 * length + 2048),
    )
    settings = Stream(
        url=f"redis://127.0.0.1:{port}",
        password_file=str(files.trainer_password),
        streamer_password_file=str(files.streamer_password),
        window=WINDOW,
        timeout_s=60,
    )
    # As the launcher does; an environment that is set counts for processes to come.
    os.environ |= HEAP_VARIABLES
    spawn = multiprocessing.get_context("spawn")
    server = subprocess.Popen(
        ["redis-server", str(files.config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    streamer = spawn.Process(target=_serve, args=(entry, settings, samples), daemon=True)
    # Readers begin together, after all have imported and have had one micro-batch.
    barrier, results = spawn.Barrier(READERS + 1), spawn.SimpleQueue()
    readers = [
        spawn.Process(target=_read, args=(settings, samples, number, barrier, results), daemon=True)
        for number in range(READERS)
    ]
    try:
        _await(port)
        for process in (streamer, *readers):
            process.start()
        barrier.wait(120)
        parts = {"streamer": psutil.Process(streamer.pid), "server": psutil.Process(server.pid)}
        before = {name: _cpu(process) for name, process in parts.items()}
        start = time.perf_counter()
        answers = [results.get() for _ in readers]
        seconds = time.perf_counter() - start
        cpu = {name: _cpu(process) - before[name] for name, process in parts.items()}
    finally:
        for process in (streamer, *readers):
            if process.pid is not None:
                process.kill()
        server.kill()
    gigabytes = sum(read for _, read in answers) * sample_bytes(length) / 1e9
    cpu["readers"] = sum(used for used, _ in answers)
    return {
        "megabytes": gigabytes * 1e3,
        "mb_per_second": gigabytes * 1e3 / seconds,
        "cpu_seconds_per_gb": {name: used / gigabytes for name, used in cpu.items()},
    }


def cpu_of_files(entry: ShardEntry, length: int) -> float:
    """Return the CPU seconds a gigabyte of the same samples from files, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_from_files, (entry,)) / (entry.packs * sample_bytes(length) / 1e9)


def _from_files(entry: ShardEntry) -> float:
    dataset = PackedDataset([entry], samples=None, key=1, index_split=None, document_attention=True)
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        for index in range(len(dataset)):
            dataset[index]
        best = min(best, time.process_time() - start)
    return best


def sample_bytes(length: int) -> int:
    """Return the bytes of a sample's tokens and label mask in Redis."""
    return 4 * length + length // 8


def _await(port: int) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise WorkError(f"redis-server does not start on port {port}", fix="run it by hand")


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _serve(entry: ShardEntry, settings: Stream, samples: int) -> None:
    dataset = PackedDataset(
        [entry], samples=samples, key=1, index_split=None, document_attention=True
    )
    Streamer(StreamSource(dataset), settings, KEYS).run(lambda: False)


def _read(settings: Stream, samples: int, number: int, barrier: Any, results: Any) -> None:
    dataset = StreamedTraining(settings, KEYS, samples, rank=number, index_split=None)
    step = MICRO_BATCH * READERS
    starts = range(number * MICRO_BATCH, samples - MICRO_BATCH + 1, step)
    dataset.__getitems__(range(starts[0], starts[0] + MICRO_BATCH))
    barrier.wait(120)
    start, read = time.process_time(), 0
    for first in starts[1:]:
        read += len(dataset.__getitems__(range(first, first + MICRO_BATCH)))
    results.put((time.process_time() - start, read))
