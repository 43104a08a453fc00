"""CPU seconds of a machine: what counts as one's own, and what as others'."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mellum2_megatron.common.machine_load import CpuSeconds, MachineLoad, cpu_seconds

BURN = """
import sys, time
while time.process_time() < 0.4: pass
print("burnt", flush=True)
sys.stdin.read()
"""


def test_children_are_own_alive_and_ended_and_to_no_other_root() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        before, other = cpu_seconds(os.getpid()), cpu_seconds(stranger.pid)
        words = [sys.executable, "-S", "-c", BURN]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"burnt\n"
            alive = cpu_seconds(os.getpid())
        ended = cpu_seconds(os.getpid())
        # psutil counts in hundredths of a second.
        assert alive.own - before.own >= 0.35
        assert ended.own >= alive.own - 0.05
        assert ended.machine - before.machine >= 0.35
        assert cpu_seconds(stranger.pid).own - other.own < 0.35


def test_a_load_is_what_the_clocks_differ_by() -> None:
    before = CpuSeconds(clock=10, machine=1000, own=5)
    load = MachineLoad.between(before, CpuSeconds(clock=20, machine=1018, own=14))
    assert (load.own, load.others) == (0.9, 0.9)
    assert load.share_of_others == pytest.approx(0.9 / (os.cpu_count() or 1))
    # Clocks of processes and of the machine are not of one moment.
    assert MachineLoad.between(before, CpuSeconds(clock=20, machine=1001, own=14)).others == 0


def test_a_load_is_read_again_or_not_at_all() -> None:
    assert MachineLoad.of({"cores": 4, "own": 1, "others": 0.5, "more": 1}) == MachineLoad(
        cores=4, own=1.0, others=0.5
    )
    for damaged in (None, 3, {}, {"cores": 0, "own": 1, "others": 1}, {"cores": "4"}):
        assert MachineLoad.of(damaged) is None
