"""The store in which the ranks of a run find each other, hosted by the launcher of node 0.

torch's elastic rendezvous listens on every interface and unpickles what anybody writes into its
store (``c10d_rendezvous_backend.py``, torch 2.15). Here the launcher hosts torch's `TCPStore`
itself, on a socket that it bound before: to loopback on one machine, to the address of node 0 on
several. The ranks write only addresses and counters into it, and nothing in it is unpickled.
"""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from mellum2_megatron.common.errors import WorkError, first_line

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_PAUSE = 0.1
_LEAVE_TOGETHER = 300.0
"""Seconds that node 0 keeps the store for nodes whose ranks still end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendezvous:
    """Meeting place of the nodes of one run.

    Attributes:
        nodes: number of nodes.
        node: number of this node; ranks count up from node 0.
        address, port: address of node 0, reachable from all nodes.
        name: name of this start, the same on all nodes and new for every start.
        timeout: seconds to wait for the other nodes, default 900.
    """

    nodes: int
    node: int
    address: str
    port: int
    name: str
    timeout: float = 900


@dataclass(frozen=True, slots=True)
class MeetingStore:
    """A store that all nodes have joined.

    Attributes:
        address, port, name: for the ranks' environment.
        store: the store, or a connection to it.
        rendezvous: meeting place; None on one machine.
    """

    address: str
    port: int
    name: str
    store: Store
    rendezvous: Rendezvous | None

    def leave(self) -> None:
        """Wait, on node 0, until the ranks of all nodes have ended well; other nodes leave at once.

        The store lives in this process, and ranks of other nodes may still use it.
        """
        if self.rendezvous is None:
            return
        key = f"{self.rendezvous.name}/left"
        self.store.add(key, 1)
        end = time.monotonic() + _LEAVE_TOGETHER
        while self.rendezvous.node == 0 and self.store.add(key, 0) < self.rendezvous.nodes:
            if time.monotonic() > end:
                return
            time.sleep(_PAUSE)


@contextmanager
def meeting_store(rendezvous: Rendezvous | None) -> Iterator[MeetingStore]:
    """Host or join the store, and wait until all nodes have.

    Args:
        rendezvous: meeting place of the nodes; None on one machine.

    Raises:
        WorkError: the port is taken, or the other nodes do not arrive in time.
    """
    import torch.distributed

    if rendezvous is None:
        listener = _listen("127.0.0.1", 0)
        port = listener.getsockname()[1]
        store = _host(listener, timeout=60)
        yield MeetingStore("127.0.0.1", port, uuid.uuid4().hex, store, None)
        return
    where = f"{rendezvous.address}:{rendezvous.port}"
    end = time.monotonic() + rendezvous.timeout
    try:
        if rendezvous.node == 0:
            store = _host(_listen(rendezvous.address, rendezvous.port), timeout=rendezvous.timeout)
        else:
            _await_listener(rendezvous, end)
            store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
                rendezvous.address,
                rendezvous.port,
                is_master=False,
                timeout=timedelta(seconds=rendezvous.timeout),
            )
        # The name keeps a node of an earlier start, which found the same port, from being counted.
        arrived = store.add(f"{rendezvous.name}/arrived", 1)
        while arrived < rendezvous.nodes:
            if time.monotonic() > end:
                raise TimeoutError(f"{arrived} of {rendezvous.nodes} arrived")
            time.sleep(_PAUSE)
            arrived = store.add(f"{rendezvous.name}/arrived", 0)
    except (OSError, RuntimeError) as error:  # torch's errors are RuntimeErrors
        raise WorkError(
            f"the {rendezvous.nodes} nodes did not meet at {where} ({first_line(error)})",
            fix="look for a node that did not start, and for another job on that port",
        ) from error
    yield MeetingStore(rendezvous.address, rendezvous.port, rendezvous.name, store, rendezvous)


def _host(listener: socket.socket, *, timeout: float) -> Store:
    """Host a store on a bound socket, which the store then owns."""
    import torch.distributed

    port = listener.getsockname()[1]
    return torch.distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1"
        if listener.getsockname()[0] in ("0.0.0.0", "::")
        else listener.getsockname()[0],
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout),
        master_listen_fd=listener.detach(),
    )


def bound_address(address: str) -> str:
    """Return the IP address to listen on, so that other nodes reach `address` of this machine.

    A cluster may resolve a node's own name to loopback (Debian's 127.0.1.1), where other nodes
    would not find it; only then every interface is taken.
    """
    found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4]
    host = str(found[0])
    own_name = host.startswith("127.") and not address.startswith("127.")
    return "0.0.0.0" if own_name else host


def _listen(address: str, port: int) -> socket.socket:
    """Return a socket that listens on one address of this machine, see `bound_address`."""
    host = bound_address(address)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except BaseException:
        listener.close()
        raise
    return listener


def _await_listener(rendezvous: Rendezvous, end: float) -> None:
    """Wait until node 0 listens; torch's own client fills the log with stack traces meanwhile."""
    while True:
        try:
            socket.create_connection((rendezvous.address, rendezvous.port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise TimeoutError(f"node 0 does not answer: {first_line(error)}") from None
            time.sleep(_PAUSE)
