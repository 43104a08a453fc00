"""The form of a rule: a named, registered check of a planned run; `rules` runs them all.

A rule is a small function from a `PlannedRun` to its problems. A problem is an `InputError` that is
yielded, not raised; `rules.enforce` raises it in the end. To add a rule, in the module of its
subject (`settings_rules`, `machine_rules`, `resume_rules`)::

    @rule(evidence="megatron/core/some_file.py:123 (0.19.2)")
    def new_rule(planned: PlannedRun) -> Problems:
        \"\"\"One line that states what must hold.\"\"\"
        if planned.run.layout.ep == 7:
            yield InputError("layout.ep=7", rule="seven is unlucky", fix="set layout.ep=8")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mellum2_megatron.checkpoint import StartingPoint
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Backend, Device, Run
from mellum2_megatron.planning.gpus import Machine

Problems = Iterator[InputError]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """A run that is about to start.

    Attributes:
        run: the resolved run.
        world_size: number of ranks.
        device: device that the ranks compute on.
        start: starting point of the run; always a new start in checks for another machine.
        gpu: the card of each rank, if it is named; default none.
    """

    run: Run
    world_size: int
    device: Device
    start: StartingPoint
    gpu: Machine | None = None

    @property
    def backend(self) -> Backend:
        """The run's backend on this device."""
        return self.run.resolved_backend(self.device)

    @property
    def data_parallel(self) -> int:
        """Number of ranks that see different sequences."""
        return self.run.layout.data_parallel(self.world_size)

    @property
    def checkpoint_run(self) -> Run | None:
        """The run whose optimizer state this one loads; None if it loads none."""
        return self.start.before if self.start.has_state else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A named check.

    Attributes:
        name: name of the function, with dashes.
        statement: condition that must hold, as one sentence.
        evidence: source of the statement, such as a file of Megatron with version, or a test.
        find: function that yields one problem for each violation.
        machine: true if the rule needs this machine's files or packages; default false.
        after: rule without which this one has no meaning, default none.
    """

    name: str
    statement: str
    evidence: str
    find: Callable[[PlannedRun], Problems]
    machine: bool = False
    after: Rule | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Violation:
    """A broken rule and one of its problems: refused value, rule and fix."""

    rule: Rule
    problem: InputError

    def __str__(self) -> str:
        return f"{self.problem} [{self.rule.name}: {self.rule.evidence}]"


RULES: list[Rule] = []
"""All rules, in the order in which they are checked."""


def rule(
    *, evidence: str, machine: bool = False, after: Rule | None = None
) -> Callable[[Callable[[PlannedRun], Problems]], Rule]:
    """Register a function as a rule; the first paragraph of its docstring is the statement.

    Args:
        evidence, machine, after: fields of `Rule`.
    """

    def register(find: Callable[[PlannedRun], Problems]) -> Rule:
        new = Rule(
            name=find.__name__.replace("_", "-"),
            statement=" ".join((find.__doc__ or "").partition("\n\n")[0].split()),
            evidence=evidence,
            find=find,
            machine=machine,
            after=after,
        )
        RULES.append(new)
        return new

    return register
