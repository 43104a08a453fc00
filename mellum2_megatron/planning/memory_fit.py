"""Whether a run fits a card, and settings with which it would.

The count is `memory.memory_per_rank`, with room for unequal experts and for libraries. Settings are
tried one by one, then two and three together, and named only if the same count accepts them and
they break no other rule. No torch: instant on a login node.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mellum2_megatron.checkpoint import StartingPoint
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Run, apply_overrides
from mellum2_megatron.planning.gpus import GPUS, Machine
from mellum2_megatron.planning.memory import Memory, memory_per_rank
from mellum2_megatron.planning.rule import RULES, PlannedRun, Problems, rule

GIB = 2**30

SHOWN = 3
"""Settings that a refusal names, at most."""


class TooLittleMemoryError(InputError):
    """A run that needs more memory than its card has (exit code 2).

    Args:
        value, rule, fix: as for `InputError`.
        settings: lines of overrides with which the run would fit; maybe none.
    """

    def __init__(self, value: str, *, rule: str, fix: str, settings: tuple[str, ...]) -> None:
        super().__init__(value, rule=rule, fix=fix)
        self.settings = settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """Settings and the memory that a rank then needs.

    Attributes:
        overrides: `key=value` words.
        memory: memory of the fullest rank with them.
    """

    overrides: tuple[str, ...]
    memory: Memory

    def __str__(self) -> str:
        return f"{' '.join(self.overrides)} ({self.memory.total / GIB:,.1f} GiB)"


@rule(evidence="mellum2_megatron/planning/memory.py: counted, no GPU has measured it")
def memory_fits_the_card(planned: PlannedRun) -> Problems:
    """A rank's memory fits the card that is named (`--gpu`, or `gpu` of a profile)."""
    if planned.gpu is None or planned.device != "cuda":
        return
    # Without a layout that fits there is no count; another rule says so.
    if planned.run.layout.problems(
        planned.run.architecture,
        world_size=planned.world_size,
        sequence_length=planned.run.data.sequence_length,
    ):
        return
    memory = _memory(planned)
    if memory.total <= planned.gpu.memory:
        return
    found = tuple(itertools.islice(remedies(planned), SHOWN))
    card, ranks = planned.gpu, planned.world_size
    yield TooLittleMemoryError(
        f"{planned.run.name} on {ranks} {card.label}",
        rule=f"a rank needs {parts_text(memory)}, the card has {card.memory / GIB:,.1f} GiB",
        fix="set " + ", or ".join(map(str, found))
        if found
        else "no setting of recomputation, batch or layout is enough: take more or larger cards",
        settings=tuple(" ".join(remedy.overrides) for remedy in found),
    )


def card_problem(run: Run, *, world_size: int, gpu: Machine) -> TooLittleMemoryError | None:
    """Return why a run does not fit a card, with settings that would; None if it fits.

    Args:
        run: a resolved run, whose layout fits.
        world_size: number of ranks.
        gpu: the card of each rank.
    """
    planned = PlannedRun(
        run=run, world_size=world_size, device="cuda", start=StartingPoint(kind="new"), gpu=gpu
    )
    for problem in memory_fits_the_card.find(planned):
        assert isinstance(problem, TooLittleMemoryError)
        return problem
    return None


def memory_note(run: Run, *, world_size: int) -> str:
    """Return the memory of a run whose card nobody has named, and the cards that have enough.

    Args:
        run: a resolved run, whose layout fits.
        world_size: number of ranks.
    """
    memory = memory_per_rank(run, world_size=world_size, backend=run.resolved_backend("cuda"))
    enough = [name for name, card in GPUS.items() if memory.total <= card.memory]
    return (
        f"Memory is not checked: no card is named (gpu of the profile, or --gpu). A rank needs "
        f"{memory.total / GIB:,.1f} GiB; "
        + (f"these have enough: {', '.join(enough)}." if enough else "no known card has enough.")
    )


def card_report(gpu: Machine, problem: TooLittleMemoryError | None) -> dict[str, Any]:
    """Return a card and the verdict on it as JSON types.

    Returns:
        ``label``, ``memory`` in bytes with its ``source``, ``fits``, and ``settings`` with which
        the run would fit.
    """
    return {
        "label": gpu.label,
        "memory": gpu.memory,
        "source": gpu.memory_source,
        "fits": problem is None,
        "settings": [] if problem is None else list(problem.settings),
    }


def parts_text(memory: Memory) -> str:
    """Return the total in GiB and its parts, such as ``94.9 GiB (weights 8.5, ...)``."""
    parts = dataclasses.asdict(memory)
    del parts["parameters"]
    text = ", ".join(f"{name} {size / GIB:,.1f}" for name, size in parts.items())
    return f"{memory.total / GIB:,.1f} GiB ({text})"


def remedies(planned: PlannedRun) -> Iterator[Remedy]:
    """Yield settings with which the run fits, the cheapest first, none inside of another.

    Args:
        planned: a run on a named card that it does not fit.
    """
    assert planned.gpu is not None
    changes = list(_changes(planned))
    enough: list[set[str]] = []
    for count in (1, 2, 3):
        for chosen in itertools.combinations(changes, count):
            keys = [word.partition("=")[0] for words in chosen for word in words]
            names = {word for words in chosen for word in words}
            # Two values of one key, or more than what is enough already.
            if len(keys) != len(set(keys)) or any(found <= names for found in enough):
                continue
            remedy = _tried(planned, tuple(itertools.chain(*chosen)))
            if remedy is not None and remedy.memory.total <= planned.gpu.memory:
                enough.append(names)
                yield remedy


def _changes(planned: PlannedRun) -> Iterator[tuple[str, ...]]:
    """Yield single changes that save memory, from the least to the most costly in time."""
    run = planned.run
    execution, layout, size = run.execution, run.layout, run.schedule.micro_batch_size
    if run.loss.head_chunk is None:
        yield ("loss.head_chunk=2048",)
    if run.optimizer.name == "muon" and run.optimizer.muon_dense_shards == "whole":
        yield ("optimizer.muon_dense_shards=even",)
    recomputed = set(execution.recompute)
    if "moe" not in recomputed:
        for names in (["moe_act"], ["moe_act", "layernorm"]):
            if not recomputed.issuperset(names):
                new = ",".join(dict.fromkeys([*execution.recompute, *names]))
                yield (f"execution.recompute={new}",)
    if size > 1:
        yield (f"schedule.micro_batch_size={max(1, size // 2)}",)
    if planned.run.precision.grad_reduce_in_fp32:
        yield ("precision.grad_reduce_in_fp32=false",)
    if "moe" not in recomputed:
        kept = [name for name in ("layernorm",) if name in recomputed]
        again = f"execution.recompute={','.join(['moe', *kept])}"
        # The two go not together (`overlap_without_moe_recompute`).
        plain = ("layout.overlap_expert_comm=false", "layout.delay_wgrad=false")
        yield (again, *plain) if layout.overlap_expert_comm else (again,)
    for key in ("ep", "cp", "pp"):
        for factor in (2, 4):
            words = [f"layout.{key}={factor * getattr(layout, key)}"]
            if key != "ep" and layout.dp is not None:
                if layout.dp % factor:
                    continue
                words.append(f"layout.dp={layout.dp // factor}")
            yield tuple(words)


def _tried(planned: PlannedRun, overrides: tuple[str, ...]) -> Remedy | None:
    """Return the memory with the overrides; None if they break a rule."""
    try:
        run: Run = apply_overrides(planned.run, overrides)
        tried = dataclasses.replace(planned, run=run)
        memory = _memory(tried)
    except InputError:
        return None
    for entry in RULES:
        # What this machine lacks, and what the run itself breaks, has its own message.
        if entry is memory_fits_the_card or entry.machine:
            continue
        if list(map(str, entry.find(tried))) != list(map(str, entry.find(planned))):
            return None
    return Remedy(overrides=overrides, memory=memory)


def _memory(planned: PlannedRun) -> Memory:
    return memory_per_rank(planned.run, world_size=planned.world_size, backend=planned.backend)
