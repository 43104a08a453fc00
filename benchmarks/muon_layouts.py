"""Bytes of the dense Muon matrices in whole and in even shares, and under two ways not built.

::

    python -m benchmarks.muon_layouts                    # docs/optimizer.md, "Remedies, counted"

A count, not a measurement: bucket bounds come from Megatron's own layout functions, bytes from
rings. No process group is made.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from mellum2_megatron.config import Run, apply_overrides
from mellum2_megatron.planning.gradient_buffers import bucket_size
from mellum2_megatron.planning.memory import WEIGHT_BYTES, gradient_bytes
from mellum2_megatron.planning.rank_weights import local_weights, uses_muon
from mellum2_megatron.recipes import recipe

RECIPE = "mellum2_12b_pretrain_phase1"
RANKS = (256, 128, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Cost of the dense matrices on a rank, the mean over ranks where they differ.

    Attributes:
        way: how gradients reach owners and weights return.
        buckets: number of buckets. Work on one can overlap the computation of another.
        empty: unused bytes in the buffers of weights and gradients.
        sent: bytes sent in a step.
        exposed: bytes of ``sent`` that no backward or forward pass can hide: those of the bucket
            that closes last and is needed first, and all that happens inside the optimizer's step.
    """

    way: str
    buckets: int
    empty: int
    sent: int
    exposed: int


class _Parameter:
    """What Megatron's layout functions read of a parameter: its number of elements."""

    def __init__(self, size: int) -> None:
        self.data = SimpleNamespace(nelement=lambda: size)


def dense_sizes(run: Run) -> list[int]:
    """Return the elements of each dense Muon matrix, in the order of the forward pass."""
    return [
        weight.numel
        for weight in local_weights(run.architecture, run.layout, "te")
        if weight.component != "experts" and uses_muon(weight, run.optimizer)
    ]


def bucket_lengths(
    optimizer: Any, sizes: Sequence[int], size: int | None, ranks: int
) -> tuple[int, ...]:
    """Return the length of each bucket in elements, in the order of the backward pass.

    Args:
        optimizer: Megatron's optimizer whose layout function is asked.
        sizes: elements of each matrix, in the order of the forward pass.
        size: elements at which a bucket closes; None: one bucket.
        ranks: number of ranks that divide a bucket.
    """
    layout = optimizer._compute_per_buffer_param_layout(
        [_Parameter(each) for each in sizes],
        size,
        ranks,
        SimpleNamespace(pad_buckets_for_high_nccl_busbw=False),
    )
    return tuple(end - start for start, end in layout.bucket_indices)


def costs(run: Run, ranks: int) -> Iterator[Cost]:
    """Yield the cost of each way for the dense matrices of a run without pipeline stages.

    Args:
        run: a resolved run with ``layout.pp=1``; experts have ranks of their own.
        ranks: world size.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    sizes = dense_sizes(run)
    real, most = sum(sizes), bucket_size(run, ranks, stage=0, chunk=0)
    gradient, weight = gradient_bytes(run.precision), WEIGHT_BYTES
    ring = (ranks - 1) / ranks

    def cost(way: str, lengths: Sequence[int], element: float, in_step: float = 0) -> Cost:
        """Return the cost of `element` sent bytes an element, and `in_step` bytes in the step."""
        return Cost(
            way=way,
            buckets=len(lengths),
            empty=(sum(lengths) - real) * (gradient + weight),
            sent=round(sum(lengths) * element * ring + in_step),
            exposed=round(lengths[-1] * element * ring + in_step),
        )

    whole = bucket_lengths(LayerWiseDistributedOptimizer, sizes, most, ranks)
    even = bucket_lengths(DistributedOptimizer, sizes, most, ranks)
    yield cost("`whole` shares", whole, gradient + weight)
    yield cost("not built: all-reduce; owners broadcast", even, 2 * gradient + weight)
    yield cost("not built: reduce to owners; owners broadcast", even, gradient + weight)
    # A rank sends its even share of the gradients to owners, and owners send shares of weights.
    collected = real / ranks * (gradient + weight) * ring
    yield cost("`even` shares", even, gradient + weight, collected)


def table(ranks: Sequence[int] = RANKS) -> str:
    """Return the costs of the 12B's first phase as a Markdown table."""
    lines = [
        "| ranks | dense Muon matrices | buckets | empty, GiB | sent, GiB | not hidden, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for count in ranks:
        run = apply_overrides(recipe(RECIPE), [f"layout.dp={count}"])
        for each in costs(run, count):
            amounts = (each.empty, each.sent, each.exposed)
            figures = " | ".join(f"{amount / 2**30:.2f}" for amount in amounts)
            lines.append(f"| {count} | {each.way} | {each.buckets} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    """Write the table to stdout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="world sizes")
    sys.stdout.write(table(parser.parse_args().ranks) + "\n")


if __name__ == "__main__":
    main()
