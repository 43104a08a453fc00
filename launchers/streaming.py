"""Serve a run's training samples from this machine while its ranks run (``data.feed=redis``)."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launchers.meeting_store import Rendezvous, bound_address
from launchers.stream_keeper import SERVER
from mellum2_megatron.common.errors import InputError, WorkError, first_line
from mellum2_megatron.config import Run, Stream
from mellum2_megatron.data.feed.redis_run import (
    FAILURE_FILE,
    HEAP_VARIABLES,
    STREAM_FOLDER,
    URL_VARIABLE,
    memory_limit,
    run_key,
    run_stream,
)

_START_SECONDS = 30.0
_END_SECONDS = 10.0


@contextmanager
def streaming(
    run: Run, folder: Path, rendezvous: Rendezvous | None = None
) -> Iterator[dict[str, str]]:
    """Keep the run's server and streamer running; nothing to do for other feeds.

    Node 0 starts them, unless ``data.stream.url`` names a server: then the streamer only. On one
    node nothing listens on another address than loopback.

    Args:
        run: a resolved run.
        folder: the run folder, in which ``run.yaml`` lies.
        rendezvous: meeting place of the nodes; None, the default, on a single machine. The server
            takes the port after it.

    Yields:
        Environment variables that the ranks need.

    Raises:
        InputError: there is no program to start, or the named server refuses.
        WorkError: the server does not start, or does not answer.
    """
    if run.data.feed != "redis":
        yield {}
        return
    environment, bind, port = {}, "127.0.0.1", 0
    own = run.data.stream.url is None
    if own:
        address = "127.0.0.1"
        if rendezvous is None:
            port = _free_port()
        else:
            address, port = rendezvous.address, rendezvous.port + 1
            bind = bound_address(address)
        scheme = "redis" if run.data.stream.certificate is None else "rediss"
        host = f"[{address}]" if ":" in address else address
        environment = {URL_VARIABLE: f"{scheme}://{host}:{port}"}
    environment |= {name: os.environ.get(name, size) for name, size in HEAP_VARIABLES.items()}
    if rendezvous is not None and rendezvous.node > 0:
        yield environment
        return
    place = folder / STREAM_FOLDER
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    (place / FAILURE_FILE).unlink(missing_ok=True)
    if own:
        _write_server(run, folder, bind, port)
    else:
        _check_answer(run_stream(run, folder))
    command = [sys.executable, "-m", "launchers.stream_keeper", str(folder / "run.yaml")]
    with (place / "keeper.log").open("ab") as log:
        keeper = subprocess.Popen(
            [*command, "--server"] if own else command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            # A signal to the ranks' process group is not for it.
            start_new_session=True,
        )
    try:
        if own:
            _await_server(bind, port, place, keeper)
            if run.data.stream.certificate is not None:
                # The certificate names one host, and readers would wait for another in vain.
                _check_answer(run_stream(run, folder, environment))
        yield environment
    finally:
        assert keeper.stdin is not None
        keeper.stdin.close()
        try:
            keeper.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            keeper.kill()


def _write_server(run: Run, folder: Path, address: str, port: int) -> None:
    # Imports numpy, which a run from files does not need here.
    from mellum2_megatron.data.feed.redis_server import write_server_files
    from mellum2_megatron.data.feed.redis_wire import Keys

    if shutil.which(SERVER) is None:
        raise InputError(
            "data.feed=redis without data.stream.url",
            rule=f"{SERVER} is not installed on {socket.gethostname()}",
            fix="install it (Debian, Ubuntu: apt-get install redis-server), or name a server in "
            "data.stream.url",
        )
    settings = run.data.stream
    certificate = None
    if settings.certificate is not None and settings.key is not None:
        certificate = settings.certificate, settings.key
    write_server_files(
        folder / STREAM_FOLDER,
        Keys(run_key(run, folder), ""),
        address=address,
        port=port,
        memory=memory_limit(run),
        certificate=certificate,
    )


def _check_answer(stream: Stream) -> None:
    """Refuse a server that does not answer, refuses the users, or drops samples.

    With TLS also one whose certificate the readers would refuse.
    """
    from mellum2_megatron.data.feed.redis_client import connect, is_lost, refusal
    from mellum2_megatron.data.feed.redis_streamer import check_server, connect_streamer

    clients = connect(stream), connect_streamer(stream)
    import redis

    try:
        for client in clients:
            client.ping()
        check_server(clients[1], stream)
    except redis.RedisError as error:
        if is_lost(error):
            raise WorkError(
                f"data.stream.url={stream.url} does not answer ({first_line(error)})",
                fix="start that server, or leave data.stream.url out",
            ) from None
        raise refusal(stream, error) from None


def _await_server(address: str, port: int, place: Path, keeper: subprocess.Popen[bytes]) -> None:
    """Wait until the server listens."""
    end = time.monotonic() + _START_SECONDS
    host = "127.0.0.1" if address == "0.0.0.0" else address
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError as error:
            reason = first_line(error)
        if (place / FAILURE_FILE).exists():
            reason = (place / FAILURE_FILE).read_text().strip()
        elif keeper.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
            continue
        raise WorkError(
            f"{SERVER} does not start on {host}:{port} ({reason})",
            fix=f"see {place}/redis.log and {place}/keeper.log",
        )


def _free_port() -> int:
    """Return a free port below those that Linux gives to outgoing connections (32768 and up)."""
    for _ in range(100):
        port = random.randrange(10_000, 32_768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise WorkError("no free port was found on 127.0.0.1", fix="end what takes them all")
