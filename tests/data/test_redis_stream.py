"""Samples through a real Redis: the same bytes as from the files, whatever is killed meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.config import Stream
from mellum2_megatron.data.feed.redis_client import RedisReader, connect, read_password
from mellum2_megatron.data.feed.redis_server import write_server_files
from mellum2_megatron.data.feed.redis_streamer import Streamer, connect_streamer
from mellum2_megatron.data.feed.redis_wire import WireError, decode, encode
from tests.redis import KEYS, Made, Server, in_process, needs_server, settle


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    # Blanks and quotes in a path are the configuration's to spell.
    made = Server(tmp_path / "redis of 'a' \"run\"")
    yield made
    made.kill()


def stream_process(stream: Stream, first: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Streamer(Made(), stream, KEYS, first=first).run(lambda: False)


def start_streamer(server: Server, first: int = 0) -> Any:
    process = multiprocessing.get_context("spawn").Process(
        target=stream_process,
        args=(server.stream(), first),
        daemon=True,
    )
    process.start()
    return process


def reader(server: Server, name: str = "dp0", **settings: Any) -> RedisReader:
    return RedisReader(server.stream(**settings), KEYS, 500, name=name, finish=lambda item: item)


def equal(item: dict[str, np.ndarray], index: int) -> bool:
    wanted = Made()[index]
    return list(item) == list(wanted) and all(
        item[name].dtype == array.dtype and np.array_equal(item[name], array)
        for name, array in wanted.items()
    )


def test_bytes_come_back_as_they_were() -> None:
    sample = {
        "tokens": np.arange(6, dtype=np.int32).reshape(2, 3),
        "big": np.arange(3, dtype=">i8"),
        "mask": np.array([True, False]),
        "none": np.zeros((0, 4), dtype=np.float32),
        "one": np.array(3.5),
    }
    found = decode(7, encode(7, sample))
    assert list(found) == list(sample)
    for name, array in sample.items():
        assert found[name].shape == array.shape
        assert np.array_equal(found[name], array)


def test_damage_is_seen() -> None:
    data = encode(7, Made()[7])
    for place in range(0, len(data), 41):
        broken = bytearray(data)
        broken[place] ^= 1
        with pytest.raises(WireError):
            decode(7, bytes(broken))
    for size in (0, 10, len(data) - 1):
        with pytest.raises(WireError):
            decode(7, data[:size])
    with pytest.raises(WireError, match="sample 7 under the key of 8"):
        decode(8, data)
    with pytest.raises(ValueError, match="text"):
        encode(1, {"text": np.array(["a"])})


@needs_server
def test_kills_change_nothing(server: Server) -> None:
    """Redis, the streamer, both again; two streamers at once; a reader that begins anew."""
    streamer = start_streamer(server)
    one, other = reader(server, "dp0"), reader(server, "dp1")
    events: dict[int, Any] = {
        40: lambda: (server.kill(), server.start()),
        80: lambda: os.kill(streamer.pid, signal.SIGKILL),
    }
    streamers = [streamer]
    for start in range(0, 300, 8):
        for index in range(start, start + 8):
            for at in [at for at in events if at == index]:
                events.pop(at)()
                if at == 80:
                    streamers += [start_streamer(server), start_streamer(server)]
        batch = list(range(start, start + 8))
        for rank, source in enumerate((one, other)):
            mine = batch[rank::2]
            assert all(map(equal, source.__getitems__(mine), mine))
        if start == 200:
            # Both ranks resume from an earlier checkpoint.
            one, other = reader(server, "dp0"), reader(server, "dp1")
            mine = list(range(96, 104))
            assert all(map(equal, one.__getitems__(mine), mine))
    for process in streamers:
        process.kill()
        process.join()


@needs_server
def test_memory_is_bounded_by_the_window(server: Server) -> None:
    streamer = start_streamer(server)
    source = reader(server)
    client = connect_streamer(server.stream())
    for start in range(0, 400, 20):
        source.__getitems__(list(range(start, start + 20)))
    deadline = time.monotonic() + 10
    # The reader's place is in 380 to 399: what lies before goes, a window ahead comes.
    while client.get(KEYS.sample(379)) is not None or client.get(KEYS.sample(429)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert client.get(KEYS.sample(450)) is None
    assert client.info("memory")["used_memory_dataset"] < 2 * 2**20
    streamer.kill()
    streamer.join()


@needs_server
def test_reader_that_gives_up_names_streamer_and_sample(server: Server) -> None:
    with pytest.raises(WorkError, match=r"sample 3 did not come .* no streamer has written"):
        reader(server, timeout_s=0.3)[3]
    streamer = start_streamer(server)
    reader(server)[0]
    streamer.kill()
    streamer.join()
    with pytest.raises(WorkError, match=rf"\(process {streamer.pid}\) was at sample \d+"):
        reader(server, timeout_s=0.5)[490]
    server.kill()
    with pytest.raises(WorkError, match="the server does not answer"):
        reader(server, timeout_s=0.3)[0]


@needs_server
def test_damaged_sample_is_written_again(server: Server) -> None:
    streamer = start_streamer(server)
    source = reader(server)
    assert equal(source[5], 5)
    client = connect_streamer(server.stream())
    client.set(KEYS.sample(6), b"damaged")
    assert equal(source[6], 6)
    streamer.kill()
    streamer.join()


@needs_server
def test_users_can_do_their_work_and_no_more(server: Server, tmp_path: Path) -> None:
    import redis

    trainer = connect(server.stream())
    for attempt in (
        lambda: trainer.flushall(),
        lambda: trainer.config_get("*"),
        lambda: trainer.set(KEYS.sample(1), b"x"),
        lambda: trainer.mget(["{run-2}:plan-a:s:1"]),
        lambda: trainer.execute_command("ACL", "LIST"),
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            attempt()
    wrong = tmp_path / "wrong"
    wrong.write_text("guess")
    wrong.chmod(0o600)
    stream = Stream(url=f"redis://127.0.0.1:{server.port}", password_file=str(wrong), timeout_s=5)
    with pytest.raises(InputError, match="refuses user trainer"):
        RedisReader(stream, KEYS, 10, name="x", finish=lambda item: item)[0]
    open_stream = Stream(url=f"redis://127.0.0.1:{server.port}", timeout_s=5)
    with pytest.raises(InputError, match="refuses user trainer"):
        RedisReader(open_stream, KEYS, 10, name="x", finish=lambda item: item)[0]


@needs_server
def test_full_server_waits_for_readers(tmp_path: Path) -> None:
    """2.5 MB are less than the server itself and the window need: the streamer waits."""
    large = Server(tmp_path / "redis", memory=2_500_000)
    streamer = start_streamer(large)
    source = reader(large)
    for start in range(0, 400, 10):
        mine = list(range(start, start + 10))
        assert all(map(equal, source.__getitems__(mine), mine))
    streamer.kill()
    streamer.join()
    large.kill()


@needs_server
def test_streamer_follows_readers_back(server: Server) -> None:
    """To a run resumed from an earlier sample, before any reader has missed one."""
    streamer, client = in_process(server)
    client.hset(KEYS.want, "dp0", 200)
    settle(streamer, client)
    assert client.get(KEYS.sample(249)) is not None
    assert client.get(KEYS.sample(150)) is None
    client.hset(KEYS.want, "dp0", 150)
    settle(streamer, client)
    assert client.get(KEYS.sample(150)) is not None


@needs_server
def test_streamer_fills_a_server_that_came_back_empty(server: Server) -> None:
    streamer, client = in_process(server)
    streamer._forget(client)
    settle(streamer, client)
    assert client.get(KEYS.sample(0)) is not None
    server.kill()
    server.start()
    client = connect_streamer(server.stream())
    assert client.get(KEYS.sample(0)) is None
    streamer._forget(client)
    settle(streamer, client)
    assert client.get(KEYS.sample(0)) is not None


@needs_server
def test_server_that_drops_samples_is_refused(server: Server) -> None:
    config = server.files.config
    config.write_text(config.read_text().replace("noeviction", "allkeys-lru"))
    server.kill()
    server.start()
    streamer = Streamer(Made(), server.stream(), KEYS)
    stop = threading.Event()
    with pytest.raises(InputError, match="allkeys-lru"):
        streamer.run(stop.is_set)


def test_passwords_are_private(tmp_path: Path) -> None:
    files = write_server_files(tmp_path / "x", KEYS, address="127.0.0.1", port=1, memory=1)
    assert files.trainer_password.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o700
    for file in (files.config, tmp_path / "x/users.acl"):
        assert read_password(files.trainer_password) not in file.read_text()
    files.trainer_password.chmod(0o644)
    with pytest.raises(InputError, match="others on this machine may read it"):
        read_password(files.trainer_password)
    with pytest.raises(InputError, match="control characters"):
        write_server_files(tmp_path / "a\nb", KEYS, address="127.0.0.1", port=1, memory=1)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://user:pass@h:1", "a password in the URL"),
        ("http://h:1", "redis://HOST:PORT"),
        ("redis://h", "redis://HOST:PORT"),
        ("redis://h:1/0", "redis://HOST:PORT"),
        ("redis://h:99999999", "redis://HOST:PORT"),
        ("", "must not be empty"),
    ],
)
def test_bad_urls(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Stream(url=url)
    assert "pass@" not in str(caught.value)
