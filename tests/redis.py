"""Debian's redis-server in tests: a mark, a server that can be killed, and a data set for it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mellum2_megatron.config import Stream
from mellum2_megatron.data.feed.redis_server import ServerFiles, write_server_files
from mellum2_megatron.data.feed.redis_streamer import Streamer, connect_streamer
from mellum2_megatron.data.feed.redis_wire import Keys

if os.environ.get("MELLUM2_REQUIRE_REDIS") == "1" and shutil.which("redis-server") is None:
    raise RuntimeError("MELLUM2_REQUIRE_REDIS=1, and there is no redis-server")

needs_server = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="redis-server is not installed"
)

KEYS = Keys("run-1", "plan-a")
LENGTH = 64


class Made:
    """A data set: the sample of an index is a function of index and seed."""

    def __init__(self, length: int = 500, *, tokens: int = LENGTH, seed: int = 0) -> None:
        self._length, self._tokens, self._seed = length, tokens, seed

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((self._seed, index))
        tokens = random.integers(0, 9999, self._tokens, dtype=np.int32)
        return {"tokens": tokens, "loss_mask": (tokens % 7 > 0).astype(np.float32)}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Server:
    """A Redis server that can be killed and started again.

    Args:
        folder: folder for its files.
        memory: bytes that it may use at most.
        certificate: files of certificate and key, for TLS; default none.
        users: true (default): the users of a run's own server; false: no password, all keys.
    """

    def __init__(
        self,
        folder: Path,
        memory: int = 16 * 2**20,
        *,
        certificate: tuple[str, str] | None = None,
        users: bool = True,
    ) -> None:
        self.port = free_port()
        self.tls = certificate is not None
        self.files: ServerFiles = write_server_files(
            folder,
            KEYS,
            address="127.0.0.1",
            port=self.port,
            memory=memory,
            certificate=certificate,
        )
        self.users = users
        if not users:
            lines = self.files.config.read_text().splitlines()
            kept = [line for line in lines if not line.startswith("aclfile")]
            self.files.config.write_text("\n".join(kept) + "\n")
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def stream(self, **settings: Any) -> Stream:
        given: dict[str, Any] = {"window": 50, "timeout_s": 20.0}
        if self.users:
            given["password_file"] = str(self.files.trainer_password)
            given["streamer_password_file"] = str(self.files.streamer_password)
        scheme = "rediss" if self.tls else "redis"
        return Stream(url=f"{scheme}://127.0.0.1:{self.port}", **{**given, **settings})

    def start(self) -> None:
        self.process = subprocess.Popen(
            ["redis-server", str(self.files.config)], stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


def in_process(
    server: Server, samples: Made | None = None, *, keys: Keys = KEYS, **settings: Any
) -> tuple[Streamer, Any]:
    """Return a streamer whose steps the test takes itself, and its client."""
    stream = server.stream(**settings)
    return Streamer(samples or Made(), stream, keys), connect_streamer(stream)


def settle(streamer: Streamer, client: Any) -> None:
    """Let a streamer work until there is nothing to do."""
    while streamer.step(client):
        pass
