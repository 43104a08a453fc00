"""The process that keeps Redis filled ahead of the readers.

It reads samples from the files and writes each under its key, from the slowest reader's sample to
`window` samples ahead. It also writes what a reader looked for in vain. Two streamers at once, or
one that begins again, write the same bytes, so neither can do harm. The lease only spares work.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.data.feed.redis_client import connect, is_lost, other_plan, refusal
from mellum2_megatron.data.feed.redis_wire import Keys, Sample, encode

if TYPE_CHECKING:
    import redis

    from mellum2_megatron.config import Stream

logger = logging.getLogger(__name__)

_BATCH = 16
_LEASE_MS = 3000
_IDLE = 0.01
_MOST_MISSING = 64
_MOST_STALE = 1_000_000
_LITTER_S = 24 * 3600
"""Seconds after which samples vanish that nobody removed, as after a killed job."""


class Samples(Protocol):
    """A map-style data set: the same index always gives the same sample."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """Return one sample."""
        ...


def connect_streamer(stream: Stream) -> redis.Redis:
    """Return a client of the user that writes; it connects at its first command."""
    if stream.streamer_password_file is None:
        return connect(stream)
    return connect(stream, user=stream.streamer_user, password_file=stream.streamer_password_file)


def check_server(client: redis.Redis, stream: Stream) -> None:
    """Refuse a server that drops keys by itself when it is full.

    Raises:
        InputError: it does.
    """
    memory: Any = client.info("memory")
    policy = memory.get("maxmemory_policy", "noeviction")
    if policy != "noeviction" and memory.get("maxmemory", 0):
        raise InputError(
            f"data.stream.url={stream.url}",
            rule=f"its maxmemory-policy is {policy}: it drops samples when it is full",
            fix="set maxmemory-policy noeviction",
        )


class Streamer:
    """Fills Redis with the samples of one run.

    Args:
        samples: the data set.
        stream: server and window.
        keys: names of the keys.
        first: sample to begin with while no reader has asked, such as a resumed run's.
    """

    def __init__(
        self,
        samples: Samples,
        stream: Stream,
        keys: Keys,
        *,
        first: int = 0,
    ) -> None:
        self._samples, self._stream, self._keys, self._first = samples, stream, keys, first
        assert stream.window is not None
        self._window = stream.window
        self._name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._client: redis.Redis | None = None
        # Samples [_low, _next) are in Redis, as far as this process knows; of `_stale` some may be.
        self._low = self._next = first
        self._stale: list[range] = []
        # The window, or less of it while the server is full.
        self._ahead = self._window
        self._lease_due = 0.0
        self._server = ""

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Stream until told to stop.

        Raises:
            InputError: the server refuses the user, or drops keys by itself when it is full.
        """
        told = False
        while not should_stop():
            try:
                if self._client is None:
                    client = connect_streamer(self._stream)
                    check_server(client, self._stream)
                    self._check_room(client)
                    self._await_plan(client, should_stop)
                    self._forget(client)
                    self._client = client
                busy = self.step(self._client)
                told = False
            except InputError:
                raise
            except Exception as error:
                if not is_lost(error):
                    import redis

                    if isinstance(error, redis.RedisError):
                        raise refusal(self._stream, error) from error
                    raise
                if not told:
                    logger.warning("%s is gone (%s); waiting", self._stream.url, first_line(error))
                    told = True
                self._client, busy = None, False
                time.sleep(0.2)
            if not busy:
                time.sleep(_IDLE)

    def _forget(self, client: redis.Redis) -> None:
        """Forget the readers of an earlier start, and what an earlier server held."""
        server: Any = client.info("server")
        if server["run_id"] != self._server:
            # A new server, or the same one after a restart: it holds nothing of this process.
            self._server = server["run_id"]
            self._next = self._low
        state: Any = client.hgetall(self._keys.state)
        if b"low" in state and b"next" in state:
            # An earlier streamer's samples would take room until they expire.
            first = int(state[b"low"])
            self._stale.append(range(first, min(int(state[b"next"]), first + _MOST_STALE)))
        client.delete(self._keys.want)
        self._lease_due = 0.0

    def _check_room(self, client: redis.Redis) -> None:
        """Refuse a server that cannot hold the window."""
        memory: Any = client.info("memory")
        limit = int(memory.get("maxmemory", 0))
        needed = self._window * len(encode(self._first, self._samples[self._first]))
        if 0 < limit < needed:
            raise InputError(
                f"data.stream.url={self._stream.url}",
                rule=f"its maxmemory is {limit:,} bytes, and the window of {self._window} samples "
                f"takes {needed:,}",
                fix="raise the server's maxmemory, or lower data.stream.window",
            )

    def _await_plan(self, client: redis.Redis, should_stop: Callable[[], bool]) -> None:
        """Refuse other data of the same run, unless their streamer has just ended."""
        end = time.monotonic() + 2 * _LEASE_MS / 1000
        while not should_stop():
            found: Any = client.get(self._keys.plan_in_use)
            if found is None or found.decode() == self._keys.plan:
                return
            if time.monotonic() > end:
                raise other_plan(self._stream, self._keys, found.decode())
            time.sleep(0.1)

    def step(self, client: redis.Redis) -> bool:
        """Do a little work; return false if there was none, or no room for it."""
        import redis

        try:
            return self._holds_lease(client) and self._fill(client)
        except redis.exceptions.OutOfMemoryError:
            self._make_room(client)
            return False

    def _fill(self, client: redis.Redis) -> bool:
        """Write wanted samples and the next ones; remove those that every reader has passed.

        It takes two round trips, one to ask and one to write.
        """
        pipe = client.pipeline(transaction=False)
        pipe.hvals(self._keys.want)
        pipe.spop(self._keys.missing, _MOST_MISSING)
        places, missing = pipe.execute()
        low = min((int(place) for place in places), default=self._first)
        # Elsewhere: a run that resumed from an earlier sample, or readers ahead of a new streamer.
        next_ = self._next if self._low <= low <= self._next else low
        end = min(low + self._ahead, len(self._samples))
        batch = range(next_, max(next_, min(next_ + _BATCH, end)))
        wanted = {int(index) for index in missing or ()}.difference(batch)
        indices = [index for index in sorted(wanted) if 0 <= index < len(self._samples)]
        indices += batch
        removed: list[int] = []
        for held in (range(self._low, self._next), *self._stale):
            removed += range(held.start, min(held.stop, low))
            removed += range(max(held.start, low + self._window), held.stop)
        if not indices and not removed:
            return False
        pipe = client.pipeline(transaction=False)
        self._unlink(pipe, removed)
        for index in indices:
            data = encode(index, self._samples[index])
            pipe.execute_command("SET", self._keys.sample(index), data, "EX", _LITTER_S)
        place = {"low": low, "next": batch.stop, "time": time.time()}
        pipe.hset(self._keys.state, mapping=place)
        pipe.execute()
        self._low, self._next, self._stale = low, batch.stop, []
        self._ahead = min(self._window, self._ahead + 1)
        return bool(indices)

    def _make_room(self, client: redis.Redis) -> None:
        """Remove what is furthest ahead: in a full server readers cannot even note their place."""
        first = max(self._low + 1, self._next - _BATCH // 2)
        # Of the batch that found no room, some may have found it.
        removed = list(range(first, self._next + _BATCH))
        for held in self._stale:
            removed += held
        self._unlink(client, removed)
        self._next, self._stale = max(self._low, min(first, self._next)), []
        self._ahead = max(1, self._next - self._low)

    def _unlink(self, client: redis.Redis, indices: Sequence[int]) -> None:
        for first in range(0, len(indices), 1024):
            client.unlink(*(self._keys.sample(index) for index in indices[first : first + 1024]))

    def _holds_lease(self, client: redis.Redis) -> bool:
        """Return true if no other streamer is at work; ask again only in good time."""
        now = time.monotonic()
        if now < self._lease_due:
            return True
        pipe = client.pipeline(transaction=False)
        pipe.set(self._keys.lease, self._name, nx=True, px=_LEASE_MS)
        pipe.get(self._keys.lease)
        # In a full server the first is refused, and the second still tells whose it is.
        refused, holder = pipe.execute(raise_on_error=False)
        if isinstance(holder, bytes) and holder.decode() != self._name:
            return False
        for answer in (refused, holder):
            if isinstance(answer, Exception):
                raise answer
        pipe = client.pipeline(transaction=False)
        pipe.pexpire(self._keys.lease, _LEASE_MS)
        pipe.set(self._keys.plan_in_use, self._keys.plan, px=_LEASE_MS)
        who = {"name": self._name, "host": socket.gethostname(), "pid": os.getpid()}
        pipe.hset(self._keys.state, mapping={**who, "time": time.time(), "next": self._next})
        pipe.execute()
        self._lease_due = now + _LEASE_MS / 6000
        return True
