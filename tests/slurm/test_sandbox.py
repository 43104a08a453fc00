"""The sandbox inside of Slurm steps: every hostile program on two nodes at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import REPOSITORY
from tests.sandbox import needs_sandbox
from tests.slurm.cluster import Cluster

pytestmark = [needs_sandbox, pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]

TESTS = str(REPOSITORY / "tests/rlvr/test_sandbox.py")


def test_hostile_programs_fail_under_two_slurmd(slurm: Cluster) -> None:
    """`tests/rlvr/test_sandbox.py` as a step of two tasks, one for each node."""
    step = ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--label"]
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", ""]
    output = slurm.run(
        *step,
        "env",
        f"PYTHONPATH={REPOSITORY}",
        "MELLUM2_REQUIRE_SANDBOX=1",
        *tests,
        # Both nodes are this machine: one sees the programs of the other until both have ended.
        *("-k", "not test_nothing_is_left"),
        TESTS,
        timeout=580,
    )
    ends = [line for line in output.splitlines() if " passed" in line]
    assert len(ends) == 2, output
    assert {line.partition(":")[0] for line in ends} == {"0", "1"}
    assert not any(word in line for line in ends for word in ("failed", "skipped", "error")), ends
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert "/program/main.py" not in listed.stdout
