"""CPU time of a machine and of a run's own processes on it: whether the run had it to itself."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuSeconds:
    """Clocks at one moment, in seconds.

    Attributes:
        clock: monotonic clock.
        machine: CPU seconds of all processes and of the kernel since the machine started.
        own: CPU seconds of a process and of all that descend from it, ended ones included.
    """

    clock: float
    machine: float
    own: float


def cpu_seconds(root: int) -> CpuSeconds:
    """Return the clocks now.

    Args:
        root: number of the process whose descendants count as own, such as a run's launcher.
    """
    total = psutil.cpu_times()
    busy = total.user + total.nice + total.system + total.irq + total.softirq + total.steal
    own = 0.0
    # A process may end between the list and the look at it.
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(root)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                times = one.cpu_times()
                own += times.user + times.system + times.children_user + times.children_system
    return CpuSeconds(clock=time.monotonic(), machine=busy, own=own)


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineLoad:
    """Mean load of a machine while a run trained on it.

    Attributes:
        cores: cores of the machine, all of which other processes may use.
        own: cores that the run's processes there kept busy.
        others: cores that all other processes, the kernel, and a virtual machine's host did.
    """

    cores: int
    own: float
    others: float

    @classmethod
    def between(cls, before: CpuSeconds, after: CpuSeconds) -> MachineLoad:
        """Return the mean load between two moments."""
        seconds = max(after.clock - before.clock, 1e-3)
        own = max(0.0, after.own - before.own)
        others = max(0.0, after.machine - before.machine - own)
        return cls(
            cores=psutil.cpu_count() or 1,
            own=round(own / seconds, 3),
            others=round(others / seconds, 3),
        )

    @classmethod
    def of(cls, value: object) -> MachineLoad | None:
        """Return the load in a line of `provenance.jsonl`; None if it holds none."""
        if not isinstance(value, Mapping):
            return None
        numbers: list[Any] = [value.get(name) for name in ("cores", "own", "others")]
        if not all(isinstance(one, int | float) for one in numbers) or numbers[0] < 1:
            return None
        return cls(cores=int(numbers[0]), own=float(numbers[1]), others=float(numbers[2]))

    @property
    def share_of_others(self) -> float:
        """Share of the machine that other processes kept busy, 0 to 1."""
        return self.others / self.cores
