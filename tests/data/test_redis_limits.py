"""A small server, a server of several runs, and streamers that follow one another on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.data.feed import redis_streamer
from mellum2_megatron.data.feed.redis_client import RedisReader
from mellum2_megatron.data.feed.redis_streamer import Streamer, connect_streamer
from mellum2_megatron.data.feed.redis_wire import Keys
from tests.redis import KEYS, Made, Server, in_process, needs_server, settle

pytestmark = needs_server

LARGE = 8192
"""Tokens of a large sample; it takes 64 KiB."""


@contextmanager
def server_of(folder: Path, memory: int = 16 * 2**20, *, users: bool = True) -> Iterator[Server]:
    server = Server(folder / "redis", memory, users=users)
    yield server
    server.kill()


@contextmanager
def streaming(server: Server, samples: Made, keys: Keys = KEYS, **settings: Any) -> Iterator[None]:
    """Let a streamer run in a thread."""
    stop, faults = threading.Event(), list[BaseException]()
    streamer = Streamer(samples, server.stream(**settings), keys)

    def work() -> None:
        try:
            streamer.run(stop.is_set)
        except BaseException as fault:
            faults.append(fault)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stop.set()
    thread.join()
    assert not faults


def reader_of(server: Server, samples: Made, keys: Keys = KEYS, **settings: Any) -> RedisReader:
    return RedisReader(
        server.stream(**settings), keys, len(samples), name="dp0", finish=lambda item: item
    )


def check(found: list[dict[str, np.ndarray]], samples: Made, indices: range) -> None:
    for item, index in zip(found, indices, strict=True):
        assert np.array_equal(item["tokens"], samples[index]["tokens"]), index


def keys_in(client: Any) -> set[int]:
    """Return the indices of the samples that lie in the server."""
    answers = [client.exists(KEYS.sample(index)) for index in range(500)]
    return {index for index, there in enumerate(answers) if there}


def test_look_ahead_stays_below_a_limit_that_cannot_hold_it(tmp_path: Path) -> None:
    """The window of 45 samples takes 2.95 MB of 3 MB, and the server itself needs 1 MB."""
    samples, limit = Made(300, tokens=LARGE), 3_000_000
    with server_of(tmp_path, limit) as server, streaming(server, samples, window=45):
        reader = reader_of(server, samples)
        client = connect_streamer(server.stream())
        largest = 0
        for start in range(0, 300, 4):
            check(reader.__getitems__(range(start, start + 4)), samples, range(start, start + 4))
            memory: Any = client.info("memory")
            # Samples alone; the buffers of connections come and go.
            largest = max(largest, memory["used_memory_dataset"])
        assert 1_000_000 < largest < limit


def test_sample_lost_in_a_full_server_is_written_again(tmp_path: Path) -> None:
    samples = Made(300, tokens=LARGE)
    with server_of(tmp_path, 3_000_000, users=False) as server:
        streamer, client = in_process(server, samples, window=60)
        steps = [streamer.step(client) for _ in range(60)]
        assert not all(steps), "the server was never full"
        client.unlink(KEYS.sample(2))
        client.sadd(KEYS.missing, 2)
        deadline = time.monotonic() + 20
        while client.get(KEYS.sample(2)) is None:
            assert time.monotonic() < deadline
            streamer.step(client)
            if not client.scard(KEYS.missing):
                # A reader asks again.
                with suppress(redis_error()):
                    client.sadd(KEYS.missing, 2)


def redis_error() -> type[Exception]:
    import redis

    error: type[Exception] = redis.exceptions.OutOfMemoryError
    return error


def test_message_names_a_server_that_is_full(tmp_path: Path) -> None:
    with server_of(tmp_path, 2_000_000, users=False) as server:
        client = connect_streamer(server.stream())
        with suppress(redis_error()):
            for filler in range(200):
                client.set(f"other:{filler}", b"x" * 50_000)
        with pytest.raises(WorkError, match=r"the server is full \(maxmemory\)"):
            reader_of(server, Made(), timeout_s=0.5)[0]


def test_window_larger_than_the_server_is_refused(tmp_path: Path) -> None:
    with server_of(tmp_path, 3_000_000) as server:
        stream = server.stream(window=60)
        with pytest.raises(InputError, match=r"maxmemory is 3,000,000 bytes, and the window of 60"):
            Streamer(Made(tokens=LARGE), stream, KEYS).run(lambda: False)


def test_successor_removes_what_it_does_not_use(tmp_path: Path) -> None:
    """A run goes on from an earlier sample, with a streamer of its own."""
    with server_of(tmp_path, users=False) as server:
        streamer, client = in_process(server)
        streamer._forget(client)
        client.hset(KEYS.want, "dp0", 300)
        settle(streamer, client)
        assert keys_in(client) == set(range(300, 350))
        client.delete(KEYS.lease)
        successor, client = in_process(server)
        successor._forget(client)
        client.hset(KEYS.want, "dp0", 280)
        settle(successor, client)
        assert keys_in(client) == set(range(280, 330))
        client.hset(KEYS.want, "dp0", 100)
        settle(successor, client)
        assert keys_in(client) == set(range(100, 150))


def test_two_runs_on_one_server_do_not_mix(tmp_path: Path) -> None:
    ones, others = Made(80, seed=1), Made(80, seed=2)
    other_keys = Keys("run-2", KEYS.plan)
    with (
        server_of(tmp_path, users=False) as server,
        streaming(server, ones, window=20),
        streaming(server, others, other_keys, window=20),
    ):
        one, other = reader_of(server, ones), reader_of(server, others, other_keys)
        for start in range(0, 80, 8):
            mine = range(start, start + 8)
            check(one.__getitems__(mine), ones, mine)
            if start < 40:
                check(other.__getitems__(mine), others, mine)
        # The second run is at 40; the first has gone to its end, and taken nothing of it.
        check(other.__getitems__(range(40, 60)), others, range(40, 60))


def test_other_data_under_the_same_run_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their streamer, and by a reader that waits for a sample of its own plan."""
    changed = Keys(KEYS.run, "plan-b")
    with server_of(tmp_path) as server:
        streamer, client = in_process(server)
        settle(streamer, client)
        message = f"serves other data for run {KEYS.run}: plan plan-a, the run's is plan-b"
        with pytest.raises(InputError, match=message):
            reader_of(server, Made(), changed)[0]
        monkeypatch.setattr(redis_streamer, "_LEASE_MS", 50)
        with pytest.raises(InputError, match=message):
            Streamer(Made(), server.stream(), changed).run(lambda: False)
