"""Cost of the buffers of dense Muon matrices, in whole and in even shares. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mellum2_megatron.config import Run
from mellum2_megatron.planning.gradient_buffers import ownership
from mellum2_megatron.planning.memory import WEIGHT_BYTES, gradient_bytes

WORTH_A_NOTE = 2**27
"""Difference of exposed bytes that a note is worth, 0.125 GiB: about 3 ms at 400 Gbit/s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseShards:
    """Cost of a rank's dense matrices under Muon.

    Attributes:
        buckets: number of buckets. Work on one can overlap the computation of another.
        empty: unused bytes in the buffers of weights and gradients.
        sent: bytes sent in a step, the mean over ranks.
        exposed: bytes of ``sent`` that no backward or forward pass can hide: those of the bucket
            that closes last and is needed first, or of all without overlap, and all that is sent
            inside the optimizer's step.
    """

    buckets: int
    empty: int
    sent: int
    exposed: int


def dense_shards(
    run: Run,
    world_size: int,
    *,
    stage: int = 0,
    shards: Literal["whole", "even"] | None = None,
) -> DenseShards:
    """Return the cost of the dense matrices of a pipeline stage.

    Args:
        run: a resolved run under Muon.
        world_size: number of ranks.
        stage: pipeline stage, from 0 (default).
        shards: ``optimizer.muon_dense_shards`` to assume; None (default): the run's.
    """
    if shards is not None:
        run = replace(run, optimizer=replace(run.optimizer, muon_dense_shards=shards))
    backend = run.resolved_backend("cuda")
    groups = ownership(run, world_size, backend, stage=stage)
    dense = next(each for each in groups if each.group == "dense")
    gradient, weight = gradient_bytes(run.precision), WEIGHT_BYTES
    ranks = len(dense.owned)
    ring = (ranks - 1) / ranks
    last = dense.buckets[-1] if dense.buckets else 0
    reduced = last if run.optimizer.overlap_grad_reduce else dense.buffer
    gathered = last if run.optimizer.overlap_param_gather else dense.buffer
    in_step = dense.exchanged * (gradient + weight) / ranks
    return DenseShards(
        buckets=len(dense.buckets),
        empty=(dense.buffer - sum(dense.elements)) * (gradient + weight),
        sent=round(dense.buffer * (gradient + weight) * ring + in_step),
        exposed=round((reduced * gradient + gathered * weight) * ring + in_step),
    )


def dense_shards_note(run: Run, world_size: int) -> str | None:
    """Return a remark if the other choice of `optimizer.muon_dense_shards` exposes clearly less.

    Args:
        run: a resolved run.
        world_size: number of ranks, which the layout divides.
    """
    if run.optimizer.name != "muon":
        return None
    own = run.optimizer.muon_dense_shards
    other: Literal["whole", "even"] = "whole" if own == "even" else "even"
    # The stages' exchanges run at the same time; the slowest decides.
    found, better = (
        max(
            (
                dense_shards(run, world_size, stage=stage, shards=shards)
                for stage in range(run.layout.pp)
            ),
            key=lambda cost: cost.exposed,
        )
        for shards in (own, other)
    )
    if found.exposed - better.exposed < WORTH_A_NOTE:
        return None
    exposed, less, empty, left = (
        f"{size / 2**30:.2f}" for size in (found.exposed, better.exposed, found.empty, better.empty)
    )
    return (
        f"dense Muon matrices: optimizer.muon_dense_shards={own} sends {exposed} GiB a step that "
        f"no computation hides and leaves {empty} GiB of a rank's buffers empty; {other} would "
        f"send {less} and leave {left} (counted, docs/optimizer.md)"
    )
