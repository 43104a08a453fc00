"""Verdicts against published constants, scipy's own tests, and a measured example."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import optimize, stats

from ablations.answering.seed_plan import SeedPlan, paired_p_values
from ablations.answering.verdicts import Answer, answer, holm, t_interval, weigh
from mellum2_megatron.common.errors import InputError

MUON = {1: 6.731, 2: 6.813, 3: 6.848}
ADAMW = {1: 6.737, 2: 6.848, 3: 6.803}
"""Validation losses of two optimizers after 15 steps of the tiny recipe, by seed."""


def ask(
    *differences: float, delta: float | None = None, plan: SeedPlan | None = None, **kwargs: bool
) -> Answer:
    """Return the answer on one arm whose control is 0 at every seed."""
    seeds = range(len(differences))
    arms = {"arm": dict(zip(seeds, differences, strict=True))}
    control = dict.fromkeys(seeds, 0.0)
    plan = plan or SeedPlan()
    return answer(arms, control, seeds=seeds, plan=plan, delta=delta, **kwargs)[0]


def test_measured_example() -> None:
    (got,) = answer({"muon": MUON}, ADAMW, seeds=(1, 2, 3), plan=SeedPlan(), delta=0.02)
    assert got.difference == pytest.approx(0.00133, abs=1e-5)
    assert got.sd == pytest.approx(0.041, abs=1e-3)
    assert got.interval is not None
    assert (got.interval.high - got.interval.low) / 2 == pytest.approx(0.101, abs=1e-3)
    assert got.word == "undecided"
    assert got.note == "next look at 5 seeds"
    # One unlucky seed alone would have called Muon better by 0.035.
    assert min(MUON[seed] - ADAMW[seed] for seed in MUON) == pytest.approx(-0.035)


def test_p_values_are_scipys() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, (4, 6))
    for got, side in zip(
        paired_p_values(values, against=0.1), ("two-sided", "greater", "less"), strict=True
    ):
        np.testing.assert_allclose(
            got, stats.ttest_1samp(values, 0.1, axis=1, alternative=side).pvalue
        )
    interval = stats.ttest_1samp(values[0], 0).confidence_interval(0.9)
    ours = t_interval(values[0].tolist(), level=0.9)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high))


def normal_level(looks: Sequence[int], error: float) -> float:
    """Return Pocock's level for samples of known variance, by integrating the normal density."""
    n = np.array(looks, dtype=float)
    joint = stats.multivariate_normal(
        cov=np.sqrt(np.minimum.outer(n, n) / np.maximum.outer(n, n)), abseps=1e-6, releps=1e-6
    )

    def missing(p: float) -> float:
        bound = np.full(len(n), stats.norm.isf(p / 2))
        inside = joint.cdf(bound, lower_limit=-bound, rng=np.random.default_rng(0))
        return float(1 - inside - error)

    return float(optimize.brentq(missing, error / len(n) / 2, error, xtol=1e-6))


def test_level_of_a_plan() -> None:
    # Jennison and Turnbull (1999), table 2.1: 2.289 for three equal looks.
    assert normal_level((1, 2, 3), 0.05) == pytest.approx(2 * stats.norm.sf(2.289), abs=5e-5)
    # Many seeds know their variance: the simulated level becomes Pocock's.
    assert SeedPlan(looks=(20, 40)).level == pytest.approx(normal_level((1, 2), 0.05), abs=1e-3)
    # Three seeds do not, so Pocock's level would be wrong more often than it states.
    assert SeedPlan().level == pytest.approx(0.0198, abs=3e-4)
    assert SeedPlan().level < normal_level((3, 5, 8), 0.05) - 2e-3
    assert SeedPlan(looks=(4,)).level == pytest.approx(0.05, abs=1e-3)
    assert SeedPlan().over_looks(SeedPlan().level) == pytest.approx(0.05, abs=1e-4)
    assert SeedPlan().over_looks(1e-6) == pytest.approx(3e-6)


@pytest.mark.parametrize(
    ("looks", "error", "word"),
    [
        ((), 0.05, "looks none"),
        ((1, 3), 0.05, "2 seeds"),
        ((5, 3), 0.05, "rising"),
        ((3,), 0, "error 0"),
    ],
    ids=["none", "one-seed", "falling", "no-error"],
)
def test_bad_plan(looks: tuple[int, ...], error: float, word: str) -> None:
    with pytest.raises(InputError, match=word):
        SeedPlan(looks=looks, error=error)


def test_words() -> None:
    low = (-0.1001, -0.0999, -0.1, -0.1002, -0.0998)
    high = tuple(-value for value in low)
    assert ask(*low).word == "better"
    assert ask(*high).word == "worse"
    assert ask(*high, lower_is_better=False).word == "better"
    # Delta was stated as the least difference that matters, so it comes before a sure sign.
    assert ask(*low, delta=0.2).word == "no difference larger than delta"
    assert ask(*low, delta=0.05).word == "better"
    assert ask(0.3, -0.2, 0.1, delta=0.2).word == "undecided"
    assert ask(0.0, 0.0, 0.0).word == "undecided"
    assert ask(0.0, 0.0, 0.0, delta=0.01).word == "no difference larger than delta"


def test_too_few_seeds() -> None:
    got = ask(-0.1, -0.1001)
    assert (got.word, got.look, got.plan_interval) == ("undecided", None, None)
    assert got.interval is not None
    assert got.note == "too few seeds: 2 of the 3 of the plan's first look"
    assert ask(-0.1).interval is None
    assert math.isnan(ask().difference)
    with pytest.raises(InputError, match="1 seeds"):
        t_interval([0.1])


def test_missing_and_diverged_seeds() -> None:
    arms = {"a": {1: 1.0, 3: 1.1, 4: 1.2}, "b": {1: math.nan, 2: 1.0, 3: 1.0}}
    control = {1: 2.0, 2: 2.0, 3: 2.1}
    first, second = answer(arms, control, seeds=(1, 2, 3, 4), plan=SeedPlan(), delta=None)
    assert first.seeds == (1, 3)
    assert first.difference == pytest.approx(-1)
    assert second.interval is None
    assert second.word == "undecided"
    assert "seed 1: a run diverged" in second.note


def test_a_look_has_the_first_seeds_without_a_gap() -> None:
    """Seeds that are there by chance, or by choice, make no look."""
    values = {1: -0.1, 3: -0.1001, 4: -0.0999}
    control = dict.fromkeys(range(1, 5), 0.0)
    (got,) = answer({"a": values}, control, seeds=range(1, 5), plan=SeedPlan(), delta=0.02)
    assert (got.word, got.look, got.p) == ("undecided", None, 1.0)
    assert got.note == "seed 2 has no pair, so looks have the 1 before it alone"
    assert got.interval == t_interval([-0.1, -0.1001, -0.0999])
    # A verdict of the seeds before the gap stays.
    values = {1: -0.1, 2: -0.1001, 3: -0.0999, 5: 0.3}
    control = dict.fromkeys(range(1, 6), 0.0)
    (got,) = answer({"a": values}, control, seeds=range(1, 6), plan=SeedPlan(), delta=0.02)
    assert (got.word, got.look) == ("better", 3)
    assert "seed 4 has no pair" in got.note


def test_seeds_between_looks_wait() -> None:
    got = ask(-0.1, -0.1001, 0.3, 0.3)
    assert got.look == 3
    assert got.plan_interval == t_interval([-0.1, -0.1001, 0.3], level=1 - SeedPlan().level)


def test_early_verdict_stays() -> None:
    early = (-0.1, -0.1001, -0.0999)
    assert ask(*early).word == "better"
    assert ask(*early, 0.5, -0.5).word == "better"


def test_holm_against_its_definition() -> None:
    p = np.random.default_rng(3).uniform(0, 0.05, (50, 6))
    adjusted = holm(p)
    for row, got in zip(p, adjusted, strict=True):
        for level in (0.01, 0.03, 0.05):
            refused = set()
            for step, arm in enumerate(np.argsort(row)):
                if row[arm] > level / (len(row) - step):
                    break
                refused.add(arm)
            assert refused == set(np.flatnonzero(got <= level))


def test_holm_counts_all_arms() -> None:
    values = dict(enumerate((-0.10, -0.102, -0.095, -0.101, -0.108)))
    noise = dict(enumerate((0.1, -0.2, 0.05, 0.1, -0.07)))
    control = dict.fromkeys(values, 0.0)
    one = answer({"a": values}, control, seeds=range(5), plan=SeedPlan(), delta=None)[0]
    many = {"a": values} | {f"n{number}": noise for number in range(4)}
    first, *rest = answer(many, control, seeds=range(5), plan=SeedPlan(), delta=None)
    assert first.p == pytest.approx(5 * one.p)
    assert {other.word for other in rest} == {"undecided"}


def test_sign_flips_of_three_seeds_reach_no_verdict() -> None:
    differences = np.array([-0.1, -0.1001, -0.0999])
    flips = np.array(list(itertools.product((-1, 1), repeat=3)))
    means = np.abs((flips * differences).mean(1))
    assert np.mean(means >= abs(differences.mean()) - 1e-12) == 0.25
    assert weigh(differences, SeedPlan(), None).p < 0.05
