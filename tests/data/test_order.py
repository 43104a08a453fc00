"""Keyed permutations and the schedule of a blend."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from mellum2_megatron.data.feed.order import BLOCK, BlendSchedule, Permutation, key_of


@pytest.mark.parametrize("count", [1, 2, 3, 64, 4095, 4096, 4097, 16384, 16385, 100_003])
def test_a_permutation_gives_every_item_once(count: int) -> None:
    permutation = Permutation(count, key_of("x", count))
    items = permutation.many(np.arange(count))
    assert sorted(items.tolist()) == list(range(count))
    some = range(0, count, max(1, count // 97))
    assert [permutation(index) for index in some] == items[:: max(1, count // 97)].tolist()
    for outside in (-1, count):
        with pytest.raises(IndexError):
            permutation(outside)


@pytest.mark.parametrize("count", [7, 5000])
def test_every_item_is_equally_likely_at_every_place(count: int) -> None:
    """Chi-square of the cell (place, item), in 7 x 7 cells, over 3,000 keys."""
    cells = np.zeros((7, 7))
    places = np.linspace(0, count - 1, 7).astype(np.int64)
    for key in range(3000):
        items = Permutation(count, key_of("uniform", key)).many(places)
        cells[np.arange(7), items * 7 // count] += 1
    assert stats.chisquare(cells.ravel()).pvalue > 1e-3


def test_neighbours_and_runs_are_those_of_a_random_order() -> None:
    items = Permutation(1_000_000, key_of("runs")).many(np.arange(1_000_000))
    assert abs(stats.spearmanr(items[:-1], items[1:]).statistic) < 0.005
    assert abs(np.mean(np.diff(items) > 0) - 0.5) < 0.003
    # Items of each tenth of the range in each tenth of the places.
    table = np.histogram2d(np.arange(1_000_000), items, bins=10)[0]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_another_key_gives_another_order() -> None:
    orders = {
        tuple(Permutation(count, key).many(np.arange(20)))
        for count in (20, 5000)
        for key in range(50)
    }
    assert len(orders) == 100


def test_the_orders_of_this_version_are_kept() -> None:
    """A resumed run must meet the same order, in whatever version it resumes."""
    assert [Permutation(10, key_of(1, "a"))(index) for index in range(10)] == FIRST_TEN
    assert [Permutation(754_000_000, 5)(index) for index in range(3)] == LARGE
    schedule = BlendSchedule([0.7, 0.3], 5)
    assert "".join(str(schedule.locate(index)[0]) for index in range(20)) == BLENDED


FIRST_TEN = [5, 6, 4, 0, 8, 7, 2, 1, 3, 9]
LARGE = [341769591, 468545139, 34107450]
BLENDED = "00000001010000010011"


def naive_shares(weights: list[float], samples: int) -> list[int]:
    """Sainte-Lague by its definition: each sample to the source with the smallest quotient."""
    exact = [Fraction(str(weight)) for weight in weights]
    counts = [0] * len(exact)
    for _ in range(samples):
        number = min(range(len(exact)), key=lambda k: (Fraction(2 * counts[k] + 1) / exact[k], k))
        counts[number] += 1
    return counts


@pytest.mark.parametrize(
    "weights",
    [[1.0], [1.0, 1.0], [0.7, 0.2, 0.1], [0.7, 0.23, 0.06, 0.001], [3.0, 1e-9], [0.1] * 7],
    ids=lambda weights: "-".join(map(str, weights)),
)
def test_shares_are_those_of_the_definition(weights: list[float]) -> None:
    schedule = BlendSchedule(weights, 1)
    for samples in (0, 1, 2, 5, 63, 64, 200, 641):
        assert schedule.shares(samples) == naive_shares(weights, samples)


def test_a_blend_reads_every_source_in_order_and_exactly_its_share() -> None:
    weights = [0.7, 0.23, 0.06, 0.01]
    schedule = BlendSchedule(weights, 11)
    places = [schedule.locate(sample) for sample in range(10 * BLOCK + 17)]
    for number in range(4):
        numbers = [place for source, place in places if source == number]
        assert numbers == list(range(len(numbers)))
    for end in (BLOCK, 5 * BLOCK, 10 * BLOCK):
        counts = Counter(source for source, _ in places[:end])
        assert [counts[number] for number in range(4)] == naive_shares(weights, end)
    counts = Counter(source for source, _ in places)
    assert schedule.counts(len(places)) == [counts[number] for number in range(4)]
    # Random access, in any order, by a reader that knows nothing of the others.
    again = BlendSchedule(weights, 11)
    for sample in reversed(range(0, len(places), 37)):
        assert again.locate(sample) == places[sample]


def test_no_rank_is_bound_to_a_source() -> None:
    """Even weights must not alternate: every second sample belongs to the same rank."""
    schedule = BlendSchedule([0.5, 0.5], 3)
    first = [schedule.locate(sample)[0] for sample in range(0, 100 * BLOCK, 2)]
    assert 0.45 < np.mean(first) < 0.55
    runs = Counter(len(list(group)) for _, group in itertools.groupby(first))
    assert len(runs) > 4
