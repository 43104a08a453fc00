"""Known-bad combinations, refused before a process is started.

`mellum2 doctor` prints all rules that a run breaks, `mellum2 train` raises them. `rule` has their
form; `settings_rules`, `execution_rules`, `rl_rules`, `machine_rules`, `resume_rules` and
`memory_fit` hold them, and register in this order.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

from mellum2_megatron.checkpoint import StartingPoint
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Device, Run
from mellum2_megatron.planning import settings_rules  # noqa: F401  # registers its rules

# isort: split
from mellum2_megatron.planning import execution_rules  # noqa: F401

# isort: split
from mellum2_megatron.planning import rl_rules  # noqa: F401

# isort: split
from mellum2_megatron.planning import machine_rules  # noqa: F401

# isort: split
from mellum2_megatron.planning import resume_rules  # noqa: F401

# isort: split
from mellum2_megatron.planning import memory_fit  # noqa: F401
from mellum2_megatron.planning.gpus import Machine
from mellum2_megatron.planning.rule import RULES, PlannedRun, Violation
from mellum2_megatron.planning.rule import Rule as Rule
from mellum2_megatron.planning.rule import rule as rule


def check(
    run: Run,
    world_size: int,
    device: Device,
    *,
    start: StartingPoint | None = None,
    machine: bool = True,
    gpu: Machine | None = None,
) -> list[Violation]:
    """Return every violation of every rule.

    Args:
        run: a resolved run.
        world_size: number of ranks to be started.
        device: device that they compute on.
        start: starting point of the run, default `StartingPoint.of(run)`.
        machine: check files and packages of this machine too, default true; false if the run is
            for another machine.
        gpu: card of each rank, whose memory the run must fit; None (default): not checked.
    """
    if start is None:
        # A run for another machine starts from that machine's disks, which are out of reach.
        start = StartingPoint.of(run) if machine else StartingPoint(kind="new")
    with suppress(InputError):  # the rule `resume-ends-on-a-step` reports it
        run = start.joined(run)
    planned = PlannedRun(run=run, world_size=world_size, device=device, start=start, gpu=gpu)
    violations: list[Violation] = []
    for entry in RULES:
        if entry.machine and not machine:
            continue
        if any(violation.rule is entry.after for violation in violations):
            continue  # its divisions would have a remainder, and its messages wrong numbers
        violations += [Violation(rule=entry, problem=problem) for problem in entry.find(planned)]
    return violations


def enforce(
    run: Run,
    world_size: int,
    device: Device,
    *,
    start: StartingPoint | None = None,
    machine: bool = True,
    gpu: Machine | None = None,
    without: Collection[str] = (),
) -> None:
    """Refuse a run that breaks a rule.

    Args:
        run, world_size, device, start, machine, gpu: as for `check`.
        without: names of rules to leave out, default none.

    Raises:
        InputError: the only problem, or a list of all.
    """
    violations = [
        violation
        for violation in check(run, world_size, device, start=start, machine=machine, gpu=gpu)
        if violation.rule.name not in without
    ]
    if len(violations) == 1:
        raise violations[0].problem
    if violations:
        listed = "".join(
            f"\n  {number}. {violation}" for number, violation in enumerate(violations, 1)
        )
        ranks = "rank" if world_size == 1 else "ranks"
        raise InputError(
            f"run {run.name} on {world_size} {device} {ranks}",
            rule=f"breaks {len(violations)} rules",
            fix=f"each of{listed}",
        )
