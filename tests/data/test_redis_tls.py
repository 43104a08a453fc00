"""TLS between readers, streamer and a real Redis server."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.feed.redis_client import RedisReader, connect
from mellum2_megatron.data.feed.redis_server import check_certificate
from mellum2_megatron.data.feed.redis_streamer import Streamer
from tests.certificates import certificate, needs_openssl
from tests.redis import KEYS, Made, Server, needs_server

pytestmark = [needs_server, needs_openssl]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return certificate(tmp_path_factory.mktemp("tls") / "good")


@pytest.fixture
def server(good: tuple[str, str], tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "redis", certificate=good)
    yield made
    made.kill()


def reader(server: Server, **settings: object) -> RedisReader:
    return RedisReader(server.stream(**settings), KEYS, 500, name="dp0", finish=lambda item: item)


def test_samples_come_through_tls(server: Server, good: tuple[str, str]) -> None:
    stop = threading.Event()
    streamer = Streamer(Made(), server.stream(ca_file=good[0]), KEYS)
    thread = threading.Thread(target=streamer.run, args=(stop.is_set,))
    thread.start()
    found = reader(server, ca_file=good[0]).__getitems__(range(100))
    stop.set()
    thread.join()
    assert all(np.array_equal(found[index]["tokens"], Made()[index]["tokens"]) for index in (0, 99))
    assert found[0]["tokens"].dtype == np.int32


def test_certificate_of_another_authority_is_refused(server: Server, tmp_path: Path) -> None:
    """At once, by reader and streamer; not after `data.stream.timeout_s`."""
    other, _ = certificate(tmp_path / "other")
    message = "its certificate is refused .self-signed certificate"
    with pytest.raises(InputError, match=message):
        reader(server, ca_file=other)[0]
    with pytest.raises(InputError, match=message):
        Streamer(Made(), server.stream(ca_file=other), KEYS).run(lambda: False)
    # Nor is it one of the system's.
    with pytest.raises(InputError, match=message):
        reader(server)[0]


@pytest.mark.parametrize(
    ("expired", "names", "message"),
    [
        (True, "own", "certificate has expired"),
        (False, "node", "certificate is not valid for '127.0.0.1'"),
    ],
    ids=["expired", "another-host"],
)
def test_bad_certificate_is_refused(
    expired: bool, names: str, message: str, tmp_path: Path
) -> None:
    pair = certificate(tmp_path / "tls", expired=expired, names=names)
    server = Server(tmp_path / "redis", certificate=pair)
    try:
        with pytest.raises(InputError, match=message) as caught:
            reader(server, ca_file=pair[0])[0]
    finally:
        server.kill()
    assert f"valid today for 127.0.0.1 and signed by data.stream.ca_file ({pair[0]})" in str(
        caught.value
    )


def test_bad_authority_files(server: Server, good: tuple[str, str], tmp_path: Path) -> None:
    for file, message in ((good[1], "holds no certificate"), ("/no/such", "cannot be read")):
        with pytest.raises(InputError, match=f"data.stream.ca_file={file}: .*{message}"):
            connect(server.stream(ca_file=file))


def test_bad_certificate_files(good: tuple[str, str], tmp_path: Path) -> None:
    check_certificate(*good)
    other = certificate(tmp_path / "other")
    locked = tmp_path / "locked.pem"
    words = ["openssl", "ec", "-in", good[1], "-aes128", "-passout", "pass:secret", "-out", locked]
    subprocess.run(words, check=True, capture_output=True)
    for pair, message in (
        ((good[0], other[1]), "mismatch"),
        ((good[0], str(locked)), "the key has a password"),
        ((good[1], good[1]), "a server cannot use them"),
        ((good[0], "/no/such"), "data.stream.key=/no/such: cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            check_certificate(*pair)
