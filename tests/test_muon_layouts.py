"""benchmarks/muon_layouts.py: bucket bounds and bytes, against the counts of the planning room."""

from __future__ import annotations

import pytest

from benchmarks.muon_layouts import RANKS, RECIPE, Cost, costs, dense_sizes, table
from mellum2_megatron.config import Run, apply_overrides
from mellum2_megatron.planning.dense_shards import dense_shards
from mellum2_megatron.planning.gradient_buffers import bucket_size, even_buffer, ownership
from mellum2_megatron.recipes import recipe
from tests import REPOSITORY

GRADIENT, WEIGHT = 4, 2
"""Bytes of an element: gradients in FP32, weights in BF16."""

ALIGNED = 4 * (GRADIENT + WEIGHT) * 2**20
"""Upper bound of what alignment leaves empty in the even layout, in bytes."""


def run_at(ranks: int) -> Run:
    return apply_overrides(
        recipe(RECIPE), [f"layout.dp={ranks}", "optimizer.muon_dense_shards=whole"]
    )


@pytest.mark.parametrize("ranks", RANKS)
def test_buffers_are_those_of_the_plan(ranks: int) -> None:
    """Megatron's layout functions against the planning room's own count."""
    run = run_at(ranks)
    sizes = dense_sizes(run)
    assert (len(sizes), sum(sizes)) == (88, 630_669_312)
    dense = next(each for each in ownership(run, ranks, "te") if each.group == "dense")
    today, reduced_twice, to_owner, even = costs(run, ranks)
    assert today.empty == (dense.buffer - sum(sizes)) * (GRADIENT + WEIGHT)
    assert today.sent == round(dense.buffer * (GRADIENT + WEIGHT) * (ranks - 1) / ranks)
    length = even_buffer(sizes, ranks, bucket_size(run, ranks, stage=0, chunk=0)).length
    for each, element in ((reduced_twice, 2 * GRADIENT + WEIGHT), (to_owner, GRADIENT + WEIGHT)):
        assert each.empty == (length - sum(sizes)) * (GRADIENT + WEIGHT) < ALIGNED
        assert each.sent == round(length * element * (ranks - 1) / ranks)
    # What is left of the matrices, from the last on, once full buckets are closed.
    last = 0
    for size in reversed(sizes):
        last = last + size if last < bucket_size(run, ranks, stage=0, chunk=0) else size
    left = last * (GRADIENT + WEIGHT) * (ranks - 1) / ranks
    assert left <= to_owner.exposed < left + ALIGNED
    # The exchange with owners is a rank's even share: it shrinks with the ranks.
    extra = sum(sizes) / ranks * (GRADIENT + WEIGHT) * (ranks - 1) / ranks
    assert even.sent - to_owner.sent == even.exposed - to_owner.exposed
    assert abs(even.sent - to_owner.sent - extra) <= 1
    for counted, shards in ((today, "whole"), (even, "even")):
        planned = dense_shards(run, ranks, shards=shards)
        assert (planned.buckets, planned.empty) == (counted.buckets, counted.empty)
        # Some matrices lie in their owner's share and are not exchanged; the benchmark's mean is
        # that of places at random.
        assert planned.sent == pytest.approx(counted.sent, rel=2e-3)
        assert planned.exposed == pytest.approx(counted.exposed, rel=1e-2)


def test_one_bucket_of_the_12b_hides_nothing() -> None:
    """At 256 and 128 ranks all dense matrices are one bucket; the even layout has several."""
    for ranks, buckets in ((256, 1), (128, 1), (8, 8)):
        found: list[Cost] = list(costs(run_at(ranks), ranks))
        assert found[0].buckets == buckets
        assert (found[0].exposed == found[0].sent) is (buckets == 1)
        assert all(each.buckets > buckets and each.exposed < each.sent for each in found[1:])
    assert dense_buffer(256) == 3_019_898_880


def dense_buffer(ranks: int) -> int:
    today = next(costs(run_at(ranks), ranks))
    return today.empty // (GRADIENT + WEIGHT) + sum(dense_sizes(run_at(ranks)))


def test_the_page_has_the_counted_table() -> None:
    page = (REPOSITORY / "docs" / "optimizer.md").read_text(encoding="utf-8")
    assert table() in page, "replace its table by the output of python -m benchmarks.muon_layouts"
