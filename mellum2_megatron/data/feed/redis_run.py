"""The stream of one run: server, keys, folder and sizes. No torch or NumPy at import."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mellum2_megatron.common.errors import InputError

if TYPE_CHECKING:
    from mellum2_megatron.config import Run, Stream
    from mellum2_megatron.data.feed.redis_wire import Keys
    from mellum2_megatron.data.feed.sources import RunData

STREAM_FOLDER = "stream"
"""Folder in the run folder with the server's files, passwords and logs; only its owner enters."""

URL_VARIABLE = "MELLUM2_STREAM_URL"
"""Environment variable by which the launcher names its own server to ranks and streamer."""

HEAP_VARIABLES = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
"""Environment of readers and streamer: glibc's largest thresholds.

With the ones that it begins with, the memory of each batch goes back to the system and is asked for
again. That takes as long as making the samples.
"""

FAILURE_FILE = "failure.txt"
"""File in `STREAM_FOLDER`: why the launcher has given the stream up."""

# Changes with the samples that the same data, seed and length give, and with their bytes.
_VERSION = 2


def window_of(run: Run) -> int:
    """Return the samples kept ahead of the slowest reader."""
    return run.data.stream.window or two_batches(run)


def two_batches(run: Run) -> int:
    """Return the samples of two of the run's largest batches, the least window."""
    return 2 * max(size for _, size in run.schedule.batch_schedule)


def sample_bytes(run: Run) -> int:
    """Return the bytes of a sample in Redis, rounded up generously.

    Four bytes and a bit for each token; a bound of eight for each document, which in packs have
    four tokens or more on the average.
    """
    return 6 * run.data.sequence_length + 2048


def memory_limit(run: Run) -> int:
    """Return the bytes that the launcher's own server may use at most."""
    # Twice the window: samples are removed a moment after the last reader has passed.
    return max(2 * window_of(run) * sample_bytes(run), 16 * 1024 * 1024)


def run_key(run: Run, folder: Path) -> str:
    """Return the name of a run in keys: its name and a hash of its folder."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", run.name)
    return f"{name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]}"


def keys_of(run: Run, data: RunData, folder: Path) -> Keys:
    """Return the names of a run's keys; their plan is a hash of all that decides its samples."""
    # Import NumPy, which planning for another machine does not need.
    from mellum2_megatron.data.feed.order import key_of
    from mellum2_megatron.data.feed.redis_wire import Keys

    parts: list[int | str] = [
        _VERSION,
        run.seed if run.data.seed is None else run.data.seed,
        run.data.sequence_length,
        run.schedule.train_samples,
        run.data.first_sample,
        int(data.document_attention),
        str(data.tokenizer.unique_identifiers["tokenizer"]),
        data.tokenizer.eod,
    ]
    for source in data.train:
        parts += [str(source.weight), source.identity, source.tokens, len(source.shards)]
    return Keys(run_key(run, folder), f"{key_of(*parts):016x}")


def run_stream(run: Run, folder: Path, environment: Mapping[str, str] = os.environ) -> Stream:
    """Return the run's stream with its URL, users and window decided.

    Args:
        run: a resolved run with ``data.feed=redis``.
        folder: the run folder.
        environment: variables, one of which names the launcher's own server; default this
            process's.

    Raises:
        InputError: the run names no server, and no launcher has started one.
    """
    settings, window = run.data.stream, window_of(run)
    if settings.url is not None:
        return dataclasses.replace(settings, window=window)
    url = environment.get(URL_VARIABLE)
    if url is None:
        raise InputError(
            "data.feed=redis without data.stream.url",
            rule="the launcher starts a server then, and this process was started without it",
            fix="use `mellum2 train` or `mellum2 launch`, or name a server in data.stream.url",
        )
    own = folder / STREAM_FOLDER
    return dataclasses.replace(
        settings,
        url=url,
        user="trainer",
        password_file=str(own / "trainer.password"),
        streamer_user="streamer",
        streamer_password_file=str(own / "streamer.password"),
        certificate=None,
        key=None,
        window=window,
    )
