"""Verdicts on the arms of a study, from differences that are paired by seed.

The same seed gives an arm and the control the same data order and, where shapes match, the same
initial weights. So the arm less the control, seed by seed, is what a paired t test needs. Its
assumption is that these differences are about normal; it is exact for any number of seeds then.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from ablations.answering.seed_plan import Floats, SeedPlan, paired_p_values
from mellum2_megatron.common.errors import InputError

Word = Literal["better", "worse", "no difference larger than delta", "undecided"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """Bounds of a confidence interval.

    Attributes:
        low, high: bounds, in the unit of the metric.
    """

    low: float
    high: float

    def __str__(self) -> str:
        return f"[{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The answer on one arm and one metric.

    Attributes:
        arm: name of the arm.
        seeds: seeds of which both arm and control have a value, in the order of the study.
        look: seeds at the last look that was reached; None before the first. A look has the first
            seeds of the study without a gap: seeds that happen to be there would be a choice.
        difference: mean over `seeds` of arm less control; NaN without any.
        sd: standard deviation of the differences; NaN with fewer than 2.
        interval: 95% paired t interval of `seeds`, right if nobody had looked before; None with
            fewer than 2 seeds.
        plan_interval: interval of the plan's last look. In 95% of studies it holds the true
            difference at all looks. None before the first look.
        p: p value of the difference over all looks, after Holm over the arms; 1 before a look.
        p_equivalent: p value of a difference of delta or more, in the same way; 1 without delta.
        word: verdict.
        note: reason why there is no more to tell, or what it needs; may be empty.
    """

    arm: str
    seeds: tuple[int, ...]
    look: int | None
    difference: float
    sd: float
    interval: Interval | None
    plan_interval: Interval | None
    p: float
    p_equivalent: float
    word: Word
    note: str


def t_interval(differences: Sequence[float], *, level: float = 0.95) -> Interval:
    """Return the paired t interval of a mean difference.

    Raises:
        InputError: fewer than two differences.
    """
    if len(differences) < 2:
        raise InputError(
            f"{len(differences)} seeds",
            rule="a spread, and so an interval, needs 2; with 3 it is 2.5 standard deviations wide "
            "to each side",
            fix="run more seeds",
        )
    values = np.asarray(differences, dtype=np.float64)
    reach = stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    mean = float(values.mean())
    return Interval(low=mean - float(reach), high=mean + float(reach))


def holm(p_values: npt.ArrayLike) -> Floats:
    """Return p values adjusted for their number along the last axis (Holm, 1979).

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, axis=-1)
    factors = np.arange(p.shape[-1], 0, -1)
    stepped = np.maximum.accumulate(np.take_along_axis(p, order, -1) * factors, axis=-1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(1.0, stepped), -1)
    return adjusted


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """P values of arms over all looks of a plan, before Holm; arrays of one shape.

    Attributes:
        p: of no difference.
        sign: -1 or 1, of the mean at the look with the least p value.
        p_equivalent: of a difference of delta or more, in either direction.
    """

    p: Floats
    sign: Floats
    p_equivalent: Floats


def weigh(differences: npt.ArrayLike, plan: SeedPlan, delta: float | None) -> Evidence:
    """Return the evidence of differences `[..., n]`, at the looks that n seeds reach.

    A verdict that an early look reached therefore stays when seeds are added.

    Args:
        differences: arm less control, seeds in the order of the study.
        plan: looks and error.
        delta: largest difference without importance; None: none was stated.
    """
    values = np.asarray(differences, dtype=np.float64)
    shape = values.shape[:-1]
    least, sign, least_equivalent = np.ones(shape), np.ones(shape), np.ones(shape)
    for look in (look for look in plan.looks if look <= values.shape[-1]):
        seen = values[..., :look]
        p, _, _ = paired_p_values(seen)
        sign = np.where(p < least, np.sign(seen.mean(-1)), sign)
        least = np.minimum(least, p)
        if delta is not None:
            # Two one-sided tests: both bounds must be refused.
            above_low = paired_p_values(seen, against=-delta)[1]
            below_high = paired_p_values(seen, against=delta)[2]
            least_equivalent = np.minimum(least_equivalent, np.maximum(above_low, below_high))
    return Evidence(
        p=plan.over_looks(least),
        sign=sign,
        p_equivalent=plan.over_looks(least_equivalent, one_sided=True),
    )


def answer(
    arms: Mapping[str, Mapping[int, float]],
    control: Mapping[int, float],
    *,
    seeds: Sequence[int],
    plan: SeedPlan,
    delta: float | None,
    lower_is_better: bool = True,
) -> list[Answer]:
    """Return the answer on each arm, by one metric.

    Args:
        arms: value of the metric by arm and seed; the control is not among them.
        control: value of the metric of the control, by seed.
        seeds: seeds of the study, in its order.
        plan: looks and error.
        delta: largest difference without importance, stated before the runs; None: none was.
        lower_is_better: true for losses.
    """
    paired = {
        name: tuple(seed for seed in seeds if seed in values and seed in control)
        for name, values in arms.items()
    }
    differences = {
        name: np.array([arms[name][seed] - control[seed] for seed in kept], dtype=np.float64)
        for name, kept in paired.items()
    }
    whole = {name: _without_gap(seeds, kept) for name, kept in paired.items()}
    # A run that diverged is a result, but not one that an interval could hold.
    finite = {name: bool(np.isfinite(values).all()) for name, values in differences.items()}
    evidence = {
        name: weigh(values[: whole[name] if finite[name] else 0], plan, delta)
        for name, values in differences.items()
    }
    adjusted = holm([float(evidence[name].p) for name in arms])
    equivalent = holm([float(evidence[name].p_equivalent) for name in arms])
    answers = []
    for number, (name, values) in enumerate(differences.items()):
        word = _word(
            float(adjusted[number]),
            float(equivalent[number]),
            float(evidence[name].sign) * (-1 if lower_is_better else 1),
            plan.error,
        )
        look = plan.reached(whole[name]) if finite[name] else None
        enough = finite[name] and len(values) >= 2
        answers.append(
            Answer(
                arm=name,
                seeds=paired[name],
                look=look,
                difference=float(values.mean()) if len(values) else math.nan,
                sd=float(values.std(ddof=1)) if enough else math.nan,
                interval=t_interval(values.tolist()) if enough else None,
                plan_interval=None
                if look is None
                else t_interval(values[:look].tolist(), level=1 - plan.level),
                p=float(adjusted[number]),
                p_equivalent=float(equivalent[number]),
                word=word,
                note=_note(seeds, paired[name], values, word, plan),
            )
        )
    return answers


def without_verdict(one: Answer, note: str) -> Answer:
    """Return an answer whose figures are no evidence: undecided, with the reason."""
    return dataclasses.replace(one, p=1.0, p_equivalent=1.0, word="undecided", note=note)


def _word(p: float, p_equivalent: float, gain: float, error: float) -> Word:
    # First, because delta was stated as the least difference that matters.
    if p_equivalent <= error:
        return "no difference larger than delta"
    if p <= error:
        return "better" if gain > 0 else "worse"
    return "undecided"


def _without_gap(seeds: Sequence[int], paired: Sequence[int]) -> int:
    """Return the number of paired seeds before the first seed of the study that is none."""
    return next((number for number, seed in enumerate(seeds) if seed not in paired), len(seeds))


def _note(
    seeds: Sequence[int], paired: Sequence[int], values: Floats, word: Word, plan: SeedPlan
) -> str:
    broken = [
        str(seed) for seed, value in zip(paired, values, strict=True) if not np.isfinite(value)
    ]
    if broken:
        return f"no number at seed {', '.join(broken)}: a run diverged, so there is no interval"
    whole = _without_gap(seeds, paired)
    if whole < len(paired):
        return f"seed {seeds[whole]} has no pair, so looks have the {whole} before it alone"
    if whole < plan.looks[0]:
        return f"too few seeds: {whole} of the {plan.looks[0]} of the plan's first look"
    if word != "undecided":
        return ""
    following = plan.following(whole)
    return (
        "the plan has no further look" if following is None else f"next look at {following} seeds"
    )
