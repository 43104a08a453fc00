"""Readers of samples in Redis, and the connection that readers and streamer share.

A reader writes which sample it reads next, asks for its samples, and waits for those that are not
there yet. It reconnects when the server goes away. Nothing is taken out of Redis: a sample may be
read again, by any reader, after any crash.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from mellum2_megatron.common.errors import InputError, WorkError, first_line
from mellum2_megatron.common.field_checks import require
from mellum2_megatron.common.files import read_text
from mellum2_megatron.data.feed.redis_wire import Keys, WireError, decode

if TYPE_CHECKING:
    import redis

    from mellum2_megatron.config import Stream

logger = logging.getLogger(__name__)

# The first lets a streamer get ahead: each look in vain costs as much as reading a sample.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.05
_READ_BYTES = 256 * 1024
_ASK_AFTER = 0.25
"""Seconds after which a reader enters a missing sample in the list of wanted ones."""
_LOOK_AFTER = 1.0
"""Seconds between two looks for the launcher's note that nothing will come any more."""
_FIX = (
    "see the streamer's log, or train with data.feed=files; the run resumes from its last "
    "checkpoint"
)


def connect(
    stream: Stream, *, user: str | None = None, password_file: str | None = None
) -> redis.Redis:
    """Return a client; it connects at its first command.

    Args:
        stream: server; its URL is set.
        user: ACL user; default this stream's.
        password_file: file with that user's password; default this stream's.

    Raises:
        InputError: the package is missing; the password's file is missing, unreadable or readable
            by others; or the authority's certificate is none.
    """
    try:
        import redis
    except ModuleNotFoundError:
        raise InputError(
            "data.feed=redis",
            rule="it needs the package redis, which is not installed",
            fix="install the stream extra: pip install 'mellum2-megatron[stream]'",
        ) from None
    parts = urlsplit(str(stream.url))
    file = password_file or stream.password_file
    options: dict[str, Any] = {}
    if file is not None:
        options = {"username": user or stream.user, "password": read_password(Path(file))}
    if parts.scheme == "rediss":
        check_authority(stream)
        # The server's name is checked against its certificate.
        options |= {"ssl": True, "ssl_ca_certs": stream.ca_file, "ssl_check_hostname": True}
    return redis.Redis(
        host=str(parts.hostname),
        port=int(parts.port or 0),
        socket_timeout=10,
        socket_connect_timeout=5,
        # redis-py's 32 KiB would take two calls for a sample.
        socket_read_size=_READ_BYTES,
        # Waiting is this module's own, with a deadline and a message.
        retry=None,
        **options,
    )


def read_password(file: Path) -> str:
    """Return the password in a file.

    Raises:
        InputError: the file cannot be read, is empty, or others may read it.
    """
    name = f"data.stream.password_file={file}"
    fix = f"make it with: (umask 077; openssl rand -hex 24 > {file})"
    password = read_text(file, name, fix=fix).strip()
    require(bool(password), name, rule="the file is empty", fix=fix)
    require(
        file.stat().st_mode & 0o077 == 0,
        name,
        rule="others on this machine may read it",
        fix=f"chmod 600 {file}",
    )
    return password


def check_authority(stream: Stream) -> None:
    """Refuse a `data.stream.ca_file` that is no certificate.

    Raises:
        InputError: it is missing, unreadable or something else.
    """
    if stream.ca_file is None:
        return
    name, fix = f"data.stream.ca_file={stream.ca_file}", "name a file with PEM certificates"
    read_text(Path(stream.ca_file), name, fix=fix)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(stream.ca_file)
    except ssl.SSLError as error:
        raise InputError(
            name, rule=f"it holds no certificate ({first_line(error)})", fix=fix
        ) from None


def is_lost(error: BaseException) -> bool:
    """Return true for an error that a server that comes back would cure."""
    import redis

    if isinstance(error, redis.AuthenticationError | redis.exceptions.NoPermissionError):
        return False
    if _bad_certificate(error) is not None:
        return False
    # BusyLoading: the server is starting.
    return isinstance(
        error, redis.ConnectionError | redis.TimeoutError | redis.exceptions.BusyLoadingError
    )


def _bad_certificate(error: BaseException) -> str | None:
    """Return why the server's certificate was refused, or None if it was not."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cause.verify_message.rstrip(".")
        cause = cause.__cause__ or cause.__context__
    return None


def refusal(stream: Stream, error: BaseException) -> InputError:
    """Return the message for a server that answers and refuses, or whose certificate is refused."""
    url, reason = f"data.stream.url={stream.url}", _bad_certificate(error)
    if reason is not None:
        authority = stream.ca_file or "the system's authorities"
        return InputError(
            url,
            rule=f"its certificate is refused ({reason})",
            fix=f"use a certificate that is valid today for {urlsplit(str(stream.url)).hostname} "
            f"and signed by data.stream.ca_file ({authority})",
        )
    return InputError(
        url,
        rule=f"the server refuses user {stream.user} ({first_line(error)})",
        fix="check data.stream.user and data.stream.password_file against the server's ACL",
    )


class RedisReader:
    """A map-style data set whose samples come from Redis.

    It is made in every process that reads: ranks, or their loader workers after a fork or spawn.

    Args:
        stream: server and limits.
        keys: names of the keys.
        length: number of samples.
        name: name of the reader, unique among all readers of the run: ``dp3``.
        finish: function from a sample's arrays to the item, such as a copy to tensors.
        failure: file that appears, with the reason in it, when nothing will be streamed any more;
            default none.
    """

    def __init__(
        self,
        stream: Stream,
        keys: Keys,
        length: int,
        *,
        name: str,
        finish: Callable[[dict[str, NDArray[np.generic]]], Any],
        failure: Path | None = None,
    ) -> None:
        self._stream, self._keys, self._length, self._name = stream, keys, length, name
        self._finish, self._failure = finish, failure
        self._client: tuple[int, redis.Redis] | None = None
        self._full = False

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._length

    def __getitem__(self, index: int) -> Any:
        """Return one sample; see `__getitems__`."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return the samples of a micro-batch; PyTorch's loader calls this when it is there.

        Raises:
            IndexError: an index outside the data.
            InputError: the server refuses the user, or a streamer serves other data.
            WorkError: a sample did not come in ``timeout_s``, or the launcher has given up; names
                the index and the streamer.
        """
        for index in indices:
            if not 0 <= index < self._length:
                raise IndexError(f"sample {index} of {self._length}")
        found: dict[int, dict[str, NDArray[np.generic]]] = {}
        began = looked = time.monotonic()
        pause, told, asked = _FIRST_PAUSE, False, 0.0
        while True:
            lacking = [index for index in indices if index not in found]
            try:
                client = self._connection()
                self._read(client, lacking, found)
                lacking = [index for index in lacking if index not in found]
                if not lacking:
                    return [self._finish(found[index]) for index in indices]
                waited = time.monotonic() - began
                # Samples come in order, so a short wait is normal; a longer one means that the
                # streamer does not know that this sample is needed, as after a restart.
                if waited - asked > _ASK_AFTER:
                    self._ask_for(client, lacking)
                    asked = waited
            except Exception as error:
                if not is_lost(error):
                    import redis

                    if isinstance(error, redis.RedisError):
                        raise refusal(self._stream, error) from error
                    raise
                self._client = None
                if not told:
                    logger.warning(
                        "%s is gone (%s); waiting up to %g s for it",
                        self._stream.url,
                        first_line(error),
                        self._stream.timeout_s,
                    )
                    told = True
            if self._failure is not None and time.monotonic() - looked > _LOOK_AFTER:
                looked = time.monotonic()
                if self._failure.exists():
                    raise WorkError(
                        f"sample {lacking[0]} did not come: {self._failure.read_text().strip()}",
                        fix=_FIX,
                    )
            if time.monotonic() - began > self._stream.timeout_s:
                raise self._gave_up(lacking)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _read(
        self,
        client: redis.Redis,
        lacking: Sequence[int],
        found: dict[int, dict[str, NDArray[np.generic]]],
    ) -> None:
        import redis

        pipe = client.pipeline(transaction=False)
        pipe.hset(self._keys.want, self._name, min(lacking))
        pipe.mget([*(self._keys.sample(index) for index in lacking), self._keys.plan_in_use])
        noted, answers = pipe.execute(raise_on_error=False)
        # A full server takes no note; the streamer makes room in it.
        self._full = isinstance(noted, redis.exceptions.OutOfMemoryError)
        for answer in (None if self._full else noted, answers):
            if isinstance(answer, Exception):
                raise answer
        *values, plan = answers
        if plan is not None and plan.decode() != self._keys.plan and None in values:
            raise other_plan(self._stream, self._keys, plan.decode())
        for index, value in zip(lacking, values, strict=True):
            if value is None:
                continue
            try:
                found[index] = decode(index, value)
            except WireError as error:
                # The streamer writes it again.
                logger.warning("sample %d in Redis: %s; asking for it again", index, error)
                self._ask_for(client, [index])

    def _ask_for(self, client: redis.Redis, indices: Sequence[int]) -> None:
        """Enter samples in the list of wanted ones; a full server takes no note."""
        import redis

        try:
            client.sadd(self._keys.missing, *indices)
        except redis.exceptions.OutOfMemoryError:
            self._full = True

    def _connection(self) -> redis.Redis:
        # A forked loader worker must not share its parent's connection.
        if self._client is None or self._client[0] != os.getpid():
            self._client = (os.getpid(), connect(self._stream))
        return self._client[1]

    def _gave_up(self, lacking: Sequence[int]) -> WorkError:
        try:
            answer: Any = self._connection().hgetall(self._keys.state)
            state = {key.decode(): value.decode() for key, value in answer.items()}
            if state:
                age = time.time() - float(state.get("time", "0"))
                streamer = (
                    f"the streamer on {state.get('host')} (process {state.get('pid')}) was at "
                    f"sample {state.get('next')}, {age:.0f} s ago"
                )
            else:
                streamer = "no streamer has written to it"
        except Exception as error:
            streamer = f"the server does not answer ({first_line(error)})"
        return WorkError(
            f"sample {lacking[0]} did not come from {self._stream.url} within "
            f"{self._stream.timeout_s:g} s; {streamer}"
            + ("; the server is full (maxmemory)" if self._full else ""),
            fix=_FIX,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave the connection out: a spawned loader worker opens its own."""
        return {**self.__dict__, "_client": None}


def other_plan(stream: Stream, keys: Keys, found: str) -> InputError:
    """Return the message for a streamer at work that serves other data under the run's name."""
    return InputError(
        f"data.stream.url={stream.url}",
        rule=f"a streamer there serves other data for run {keys.run}: plan {found}, the run's is "
        f"{keys.plan}",
        fix="end that streamer, or train in another run folder",
    )


def reader_name(*parts: str | int) -> str:
    """Return a reader's name, with its host: ``node3:dp12``."""
    return ":".join([socket.gethostname(), *(str(part) for part in parts)])
