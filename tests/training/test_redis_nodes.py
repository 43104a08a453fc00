"""Training on two nodes from one Redis server with TLS, and certificates refused at the start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from launchers.streaming import streaming
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.prepared_folder import PreparedData
from tests.certificates import certificate, needs_openssl
from tests.data.packs import write_folder
from tests.redis import needs_server
from tests.training.test_packs import run_on_packs
from tests.training.test_redis_feed import REDIS, descendants, write_run
from tests.training.test_train import losses, small_run, train

pytestmark = [needs_server, needs_openssl]

ADDRESS = "127.0.0.2"
"""Address of node 0: loopback too, and not the one that a run on a single node would use."""


def start_agent(folder: Path, node: int, port: int) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NODEID": str(node),
        "SLURMD_NODENAME": f"n{node}",
        "MASTER_ADDR": ADDRESS,
        "MASTER_PORT": str(port),
    }
    words = f"-m launchers.agent {folder}/run.yaml --ranks 1 --device cpu --tries 0"
    return subprocess.Popen(
        [sys.executable, *words.split()],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.distributed
@pytest.mark.slow
def test_second_node_reads_from_the_server_of_the_first(
    small_data: PreparedData, tmp_path: Path
) -> None:
    """Packs of two sources, documents apart: the numbers of two ranks that read files."""
    folders = tuple(
        write_folder(tmp_path / name, small_data.tokenizer_dir, align=4, seed=seed)
        for seed, name in enumerate(("web", "code"))
    )
    short = ["schedule.train_samples=16", "schedule.batch_schedule=[[0,8]]"]
    of_files = train(run_on_packs(small_data, folders, tmp_path / "files", *short), 2)
    pair = certificate(tmp_path / "tls", names="node")
    tls = [f"data.stream.certificate={pair[0]}", f"data.stream.key={pair[1]}"]
    words = [*short, *REDIS, *tls, f"data.stream.ca_file={pair[0]}"]
    folder = write_run(run_on_packs(small_data, folders, tmp_path / "redis", *words))
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        port = probe.getsockname()[1]
    agents = [start_agent(folder, node, port) for node in (0, 1)]
    servers: set[int] = set()
    nodes: dict[int, set[str]] = {0: set(), 1: set()}
    while any(agent.poll() is None for agent in agents):
        for node, agent in enumerate(agents):
            nodes[node] |= names(agent.pid)
        servers |= {
            connection.laddr.port
            for process in descendants("redis-server")
            for connection in connections(process)
            if connection.status == psutil.CONN_LISTEN and connection.laddr.ip == ADDRESS
        }
        # Each look reads every process of the machine; a server lives as long as the training.
        time.sleep(0.5)
    output = [agent.communicate()[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], output
    assert servers == {port + 1}
    assert "redis-server" in nodes[0]
    assert "redis-server" not in nodes[1]
    for name in ("lm_loss", "grad_norm"):
        assert losses(folder, name) == losses(of_files, name), name


def names(number: int) -> set[str]:
    """Return the names of a process's descendants; none if one ends while they are read."""
    try:
        return {process.name() for process in psutil.Process(number).children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def connections(process: psutil.Process) -> list[Any]:
    """Return a server's connections; none if it has ended since it was listed."""
    try:
        return process.net_connections("tcp")
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize(
    ("expired", "names", "message"),
    [(True, "own", "certificate has expired"), (False, "node", "not valid for '127.0.0.1'")],
    ids=["expired", "another-node"],
)
def test_certificate_is_looked_at_before_the_ranks_start(
    expired: bool, names: str, message: str, small_data: PreparedData, tmp_path: Path
) -> None:
    pair = certificate(tmp_path / "tls", expired=expired, names=names)
    words = [f"data.stream.certificate={pair[0]}", f"data.stream.key={pair[1]}"]
    run = small_run(small_data, tmp_path / "run", *REDIS, *words, f"data.stream.ca_file={pair[0]}")
    folder = write_run(run)
    with pytest.raises(InputError, match=message), streaming(run, folder):
        pass
    assert not descendants("redis-server")
