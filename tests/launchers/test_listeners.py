"""While a run trains on one machine, none of its processes can be reached from another one."""

import ipaddress
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launchers.meeting_store import Rendezvous, meeting_store
from mellum2_megatron.common.errors import WorkError

PROGRAM = """
import sys
from launchers.local import run_ranks
sys.exit(run_ranks([sys.executable, "-c", sys.argv[1]], nproc=2))
"""

# A world as Megatron makes one: a default group, one more, and a collective in both.
RANK = """
import os, pathlib, sys, time
import torch
torch.distributed.init_process_group("gloo", init_method="env://")
group = torch.distributed.new_group([0, 1])
for where in (None, group):
    torch.distributed.all_reduce(torch.ones(3), group=where)
torch.distributed.all_gather_object([None, None], {"rank": os.environ["RANK"]})
folder = pathlib.Path(FOLDER)
(folder / os.environ["RANK"]).touch()
while not (folder / "stop").exists():
    time.sleep(0.05)
torch.distributed.destroy_process_group()
"""


def listeners(process: psutil.Process) -> set[str]:
    """Addresses on which a process and its descendants wait for connections, or take datagrams."""
    found = set()
    for one in (process, *process.children(recursive=True)):
        for connection in one.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN or not connection.raddr:
                found.add(connection.laddr.ip)
    return found


@pytest.mark.distributed
def test_nothing_listens_off_loopback(tmp_path: Path) -> None:
    rank = RANK.replace("FOLDER", repr(str(tmp_path)))
    with subprocess.Popen([sys.executable, "-c", PROGRAM, rank]) as launcher:
        process = psutil.Process(launcher.pid)
        seen: set[str] = set()
        try:
            end = time.monotonic() + 120
            while not all((tmp_path / name).exists() for name in "01"):
                seen |= listeners(process)
                assert launcher.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
            seen |= listeners(process)
        finally:
            (tmp_path / "stop").touch()
        assert launcher.wait(60) == 0
    # The store and gloo's pairs do listen: an empty set would show that the test looks at nothing.
    assert seen
    assert {ip for ip in seen if not ipaddress.ip_address(ip).is_loopback} == set()


def meeting(*, nodes: int, node: int, port: int, name: str = "7.0") -> Rendezvous:
    return Rendezvous(
        nodes=nodes, node=node, address="127.0.0.1", port=port, name=name, timeout=0.5
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize(("node", "reason"), [(0, "1 of 2 arrived"), (1, "node 0 does not answer")])
def test_missing_node_is_told(node: int, reason: str) -> None:
    alone = meeting(nodes=2, node=node, port=free_port())
    with pytest.raises(WorkError, match=reason), meeting_store(alone):
        pass


def test_taken_port_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        late = meeting(nodes=2, node=0, port=taken.getsockname()[1])
        with pytest.raises(WorkError, match="already in use"), meeting_store(late):
            pass


def test_node_of_another_start_is_not_counted() -> None:
    """A node that an earlier start left behind finds the port, and waits in vain."""
    port = free_port()
    with meeting_store(meeting(nodes=1, node=0, port=port, name="7.1")):
        stale = meeting(nodes=2, node=1, port=port, name="7.0")
        with pytest.raises(WorkError, match="1 of 2 arrived"), meeting_store(stale):
            pass
