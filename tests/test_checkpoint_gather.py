"""benchmarks/checkpoint_gather.py: its count against a plain sum, and one small measurement."""

from __future__ import annotations

import pytest

from benchmarks.checkpoint_gather import Cost, costs, measure, table
from benchmarks.muon_layouts import RECIPE
from mellum2_megatron.config import apply_overrides
from mellum2_megatron.recipes import recipe
from tests import REPOSITORY

VOCABULARY = 98_304 * 2_304
"""Elements of the embedding and of the head."""


def costs_at(ranks: int) -> list[Cost]:
    return list(costs(apply_overrides(recipe(RECIPE), [f"layout.dp={ranks}"]), ranks))


@pytest.mark.parametrize(("ranks", "bucket", "buckets"), [(256, 2, 1), (8, 1, 2)])
def test_peaks_are_the_state_and_three_buckets(ranks: int, bucket: int, buckets: int) -> None:
    """Both vocabulary matrices share a bucket at 256 ranks; norms are a thousandth of them."""
    every, one = costs_at(ranks)
    state, own = 3 * 4 * 2 * VOCABULARY, buckets * 3 * 4 * bucket * VOCABULARY / ranks
    assert every.first == every.other == one.first
    assert every.first == pytest.approx(state + 3 * 4 * bucket * VOCABULARY + own, rel=1e-3)
    assert one.other == pytest.approx(own, rel=1e-2)
    assert (every.written, one.written) == (4 * VOCABULARY, pytest.approx(state, rel=1e-3))
    assert one.gpu == 0 < every.gpu


def test_the_documented_table_is_the_printed_one() -> None:
    assert table() in (REPOSITORY / "docs" / "checkpoints.md").read_text()


@pytest.mark.distributed
def test_the_other_rank_needs_less_main_memory() -> None:
    """Two ranks, 24 MB of state and 16 MB of buckets, collected by Megatron's own function."""
    _, _, every, one = measure(2, 2_000_000).splitlines()
    first, other = ([float(peak) for peak in row.split("|")[3].split(",")] for row in (every, one))
    assert min(first) >= 0.04
    assert other[0] >= 0.04 > other[1] + 0.01
