"""Agents of two nodes on this machine; their ranks run a test's Python, no training."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers.early_end import LossLimit
from launchers.outcome import read_attempts, read_reports, start_attempt
from mellum2_megatron.checkpoint import read_run
from mellum2_megatron.config import Run, apply_overrides, to_yaml

pytestmark = pytest.mark.distributed

AGENT = """
import sys
from launchers import agent, local
script = sys.argv.pop()
local.rank_command = lambda run, **_: [sys.executable, script]
sys.exit(agent.main())
"""

WITHOUT_PACKAGE = ["layout.dispatcher=flex", "backend=torch"]
"""A run on GPUs that needs DeepEP, which is not installed where tests run."""

RANK = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(__file__).parent
rank = int(os.environ["RANK"])
names = ("GROUP_RANK", "LOCAL_RANK", "WORLD_SIZE")
(folder / f"rank.{rank}").write_text(" ".join(os.environ[name] for name in names))
"""


class Nodes:
    """A run on two nodes with two ranks each."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.folder = folder
        (folder / "run.yaml").write_text(to_yaml(run))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.agents: list[subprocess.Popen[str]] = []

    def start(
        self, rank: str, *, nodes: tuple[int, ...] = (0, 1), of: int = 2, device: str = "cpu"
    ) -> None:
        """Start agents whose ranks run `rank`, Python source."""
        (self.folder / "rank.py").write_text(RANK + rank)
        for node in nodes:
            environment = {
                **os.environ,
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NUM_NODES": str(of),
                "SLURM_NODEID": str(node),
                "SLURMD_NODENAME": f"n{node}",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.port),
            }
            words = [
                str(self.folder / "run.yaml"),
                "--ranks",
                "2",
                "--device",
                device,
                "--tries",
                "0",
            ]
            self.agents.append(
                subprocess.Popen(
                    [sys.executable, "-c", AGENT, *words, str(self.folder / "rank.py")],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )

    def wait(self) -> list[int]:
        """Return the agents' exit codes; their output is in `output`."""
        self.output = [agent.communicate(timeout=200)[0] for agent in self.agents]
        return [agent.returncode for agent in self.agents]

    def ranks(self) -> list[str]:
        """Return node, local rank and world size of each rank."""
        return [path.read_text() for path in sorted(self.folder.glob("rank.[0-9]"))]

    def until(self, name: str) -> None:
        end = time.monotonic() + 200
        while not all((self.folder / f"{name}.{rank}").exists() for rank in range(4)):
            assert time.monotonic() < end
            assert all(agent.poll() is None for agent in self.agents), self.wait()
            time.sleep(0.05)

    def reports(self) -> list[tuple[str, int]]:
        return [(report.node, report.code) for report in read_reports(self.folder, "7", 0)]


@pytest.fixture
def nodes(run: Run, tmp_path: Path) -> Nodes:
    (tmp_path / "x").mkdir()
    return Nodes(run, tmp_path / "x")


def test_ranks_are_counted_in_the_order_of_the_nodes(nodes: Nodes):
    nodes.start("", nodes=(1, 0))  # in whatever order they arrive
    assert nodes.wait() == [0, 0], nodes.output
    assert nodes.ranks() == ["0 0 4", "0 1 4", "1 0 4", "1 1 4"]
    assert [attempt.kind for attempt in read_attempts(nodes.folder)] == ["done"]
    assert nodes.reports() == []


def test_a_node_without_a_package_ends_before_the_nodes_meet(nodes: Nodes):
    """One message with the node and the package; no rank starts, and the other node may be late."""
    file = nodes.folder / "run.yaml"
    file.write_text(to_yaml(apply_overrides(read_run(file), WITHOUT_PACKAGE)))
    nodes.start("", nodes=(1,), device="cuda")
    assert nodes.wait() == [2]
    (said,) = nodes.output
    assert "error: node n1: " in said
    assert "the package deep_ep is not installed here" in said
    assert nodes.ranks() == []
    assert nodes.reports() == [("n1", 2)]


def test_a_stop_signal_reaches_every_rank(nodes: Nodes):
    nodes.start(
        """
signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))
(folder / f"ready.{rank}").write_text("")
time.sleep(200)
"""
    )
    nodes.until("ready")
    for agent in nodes.agents:
        agent.send_signal(signal.SIGUSR1)
    assert nodes.wait() == [75, 75]
    assert nodes.reports() == [("n0", 75), ("n1", 75)]
    # The batch script records the end.
    assert [attempt.kind for attempt in read_attempts(nodes.folder)] == [None]


def test_a_limit_of_the_loss_ends_the_ranks_of_all_nodes_for_good(nodes: Nodes):
    LossLimit(step=2, train_loss_above=8.5).write(nodes.folder)
    # As Megatron's ranks, which save together: one that was not told leaves with the others.
    rank = """
import json
signal.signal(signal.SIGTERM, lambda *_: (folder / "told").write_text(""))
rows = [{"kind": "train", "step": step, "lm_loss": 9.0} for step in (1, 2)]
if rank == 3:
    text = "".join(json.dumps(row) + chr(10) for row in rows)
    (folder / "metrics.jsonl").write_text(text)
(folder / f"ready.{rank}").write_text("")
while not (folder / "told").exists():
    time.sleep(0.05)
os._exit(75)
"""
    nodes.start(rank)
    assert nodes.wait() == [0, 0], nodes.output
    (attempt,) = read_attempts(nodes.folder)
    assert (attempt.kind, attempt.code) == ("early", 0)
    assert attempt.reason == "stop rule: loss 9.000 at step 2 > 8.5"
    for path in nodes.folder.glob("ready.*"):
        path.unlink()
    nodes.agents.clear()
    nodes.start(rank)
    assert nodes.wait() == [0, 0], nodes.output
    assert not list(nodes.folder.glob("ready.*"))


def test_a_loss_below_its_limit_is_no_reason_to_end(nodes: Nodes):
    LossLimit(step=2, train_loss_above=8.5).write(nodes.folder)
    (nodes.folder / "metrics.jsonl").write_text('{"kind": "train", "step": 2, "lm_loss": 8.5}\n')
    nodes.start("time.sleep(7)", nodes=(0,), of=1)
    assert nodes.wait() == [0], nodes.output
    assert [attempt.kind for attempt in read_attempts(nodes.folder)] == ["done"]


def test_a_signal_that_comes_before_the_ranks(nodes: Nodes):
    nodes.start("time.sleep(200)", nodes=(0,), of=1)
    end = time.monotonic() + 200
    while not (nodes.folder / "attempts.jsonl").exists():  # before torch is imported
        assert time.monotonic() < end
        time.sleep(0.01)
    nodes.agents[0].send_signal(signal.SIGTERM)
    assert nodes.wait() == [75]
    assert nodes.reports() == [("n0", 75)]


def test_failures_name_node_and_rank(nodes: Nodes):
    nodes.start(
        """
if rank == 3:
    (folder / "gone").write_text("")
    os.kill(os.getpid(), signal.SIGKILL)
while not (folder / "gone").exists():
    time.sleep(0.01)
sys.exit("the other one is gone")
"""
    )
    assert nodes.wait() == [1, 1]
    assert "error: node n1: rank 3 was ended by SIGKILL" in nodes.output[1]
    failed = {
        report.node: {failure.rank for failure in report.failures}
        for report in read_reports(nodes.folder, "7", 0)
    }
    assert 3 in failed["n1"]
    assert failed["n0"] <= {0, 1}


def test_bad_input(nodes: Nodes):
    (nodes.folder / "run.yaml").write_text("name: [")
    nodes.start("", nodes=(0,))
    assert nodes.wait() == [2]
    assert "error: node n0: " in nodes.output[0]
    assert "not YAML" in nodes.output[0]
    assert nodes.reports() == [("n0", 2)]


def test_a_port_that_is_taken(nodes: Nodes):
    with socket.socket() as other:
        other.bind(("0.0.0.0", nodes.port))
        other.listen()
        nodes.start("", nodes=(0,))
        assert nodes.wait() == [1]
    assert f"the 2 nodes did not meet at 127.0.0.1:{nodes.port}" in nodes.output[0]


def test_a_job_that_failed_too_often_is_not_started(nodes: Nodes, monkeypatch: pytest.MonkeyPatch):
    for restart in range(2):
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        start_attempt(nodes.folder, tries=9)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    nodes.start("", nodes=(0,))
    assert nodes.wait() == [1]
    assert "not started: it ended without a report" in nodes.output[0]
    assert nodes.ranks() == []
    events = [
        json.loads(line) for line in (nodes.folder / "attempts.jsonl").read_text().splitlines()
    ]
    assert [event["event"] for event in events] == ["begin", "end", "begin", "end", "begin"]
