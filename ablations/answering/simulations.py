"""Simulated studies with known effects: the error rates that docs/ablation_statistics.md states.

The rate of an interval is the share of studies in which it holds the true difference.

``python -m ablations.answering.simulations [STUDIES]`` prints the table of that page, in a minute
or two for the 20,000 studies of the default.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ablations.answering.document_bootstrap import document_interval
from ablations.answering.seed_plan import Floats, SeedPlan, paired_p_values
from ablations.answering.verdicts import holm, weigh

STUDIES = 20_000
_SEED = 11
_ARMS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """A simulated rate beside the stated one.

    Attributes:
        name: statement under test.
        rate: share of the simulated studies.
        stated: share that the statement promises; None for a warning about another method.
        studies: number of simulated studies.
    """

    name: str
    rate: float
    stated: float | None
    studies: int


def rates(studies: int = STUDIES) -> Iterator[Rate]:
    """Yield every simulated rate.

    Args:
        studies: simulated studies of each rate; a tenth of them for intervals over documents.
    """
    rng = np.random.default_rng(_SEED)
    plan = SeedPlan()
    seeds = plan.looks[-1]

    def row(name: str, hits: npt.NDArray[Any], stated: float | None) -> Rate:
        return Rate(name=name, rate=float(np.mean(hits)), stated=stated, studies=len(hits))

    shape = studies, seeds
    # Differences of two arms of one shape are symmetric; an exponential is as far off as can be.
    for kind, drawn, stated in (
        ("normal", rng.standard_normal(shape), 0.95),
        ("heavy-tailed (t, 5 df)", rng.standard_t(5, shape), 0.95),
        ("exponential (not assumed)", rng.exponential(size=shape) - 1, None),
    ):
        for look in plan.looks:
            kept = paired_p_values(drawn[:, :look])[0] > 0.05
            yield row(f"95% t interval, {look} seeds, {kind}", kept, stated)
    null = rng.standard_normal(shape)
    looks = [paired_p_values(null[:, :look])[0] for look in plan.looks]
    yield row(
        "the plan's interval, at every look",
        np.min(looks, axis=0) > plan.level,
        0.95,
    )
    yield row("false better or worse, plan 3, 5, 8", weigh(null, plan, None).p <= plan.error, 0.05)
    yield row(
        "false better or worse, three looks at 5% each (not used)",
        np.min(looks, axis=0) <= 0.05,
        None,
    )
    # Arms share the control, so their differences correlate by one half.
    arms = rng.standard_normal((studies, _ARMS, seeds)) - rng.standard_normal((studies, 1, seeds))
    p = weigh(arms, plan, None).p
    yield row(f"any false verdict, {_ARMS} arms, Holm", holm(p).min(1) <= plan.error, 0.05)
    yield row(
        f"any false verdict, {_ARMS} arms, without Holm (not used)", p.min(1) <= plan.error, None
    )
    # Small beside delta, the spread lets every study come to a verdict.
    apart = weigh(1 + 0.3 * null, plan, 1.0).p_equivalent
    yield row("false 'no difference' where it is delta", apart <= plan.error, 0.05)
    yield row("95% bootstrap over 3 seeds (not used)", _seed_bootstrap(null), None)
    for documents, stated in ((100, None), (400, 0.95)):
        hits = np.array([_documents_hold(rng, documents) for _ in range(studies // 10)])
        warning = "" if stated else " (too few, noted in reports)"
        yield row(f"95% interval over {documents} documents{warning}", hits, stated)


def powers(studies: int = STUDIES) -> Iterator[tuple[float, int, float]]:
    """Yield (difference in standard deviations, seeds, share of better or worse verdicts)."""
    rng = np.random.default_rng(_SEED)
    plan = SeedPlan()
    noise = rng.standard_normal((studies, plan.looks[-1]))
    for effect in (1.0, 2.0, 3.0, 5.0):
        for look in plan.looks:
            found = weigh(effect + noise[:, :look], plan, None).p <= plan.error
            yield effect, look, float(found.mean())


def _seed_bootstrap(null: Floats) -> Floats:
    """Return 1 where the percentile bootstrap over the first 3 seeds holds 0, exactly."""
    # All 27 resamples of 3 seeds.
    draws = np.array(np.meshgrid(*[range(3)] * 3)).reshape(3, -1)
    means = null[:, :3][:, draws].mean(1)
    low, high = np.quantile(means, (0.025, 0.975), axis=1)
    result: Floats = ((low <= 0) & (high >= 0)).astype(np.float64)
    return result


def _documents_hold(rng: np.random.Generator, documents: int) -> bool:
    """Return true if the interval over documents of log-normal length holds the difference."""
    tokens = np.exp(rng.normal(6, 1, documents))
    control = tokens * rng.normal(3, 0.5, documents)
    arm = control + tokens * rng.normal(0.01, 0.05, documents)
    interval = document_interval(arm, control, tokens, draws=999)
    return interval.low <= 0.01 <= interval.high


def main(studies: int = STUDIES) -> None:
    """Print both tables."""
    lines = ["| statement | studies | simulated | stated |", "|---|---|---|---|"]
    for rate in rates(studies):
        stated = "" if rate.stated is None else f"{rate.stated:.1%}"
        lines.append(f"| {rate.name} | {rate.studies:,} | {rate.rate:.1%} | {stated} |")
    lines += ["", "| true difference / sd | seeds | verdict |", "|---|---|---|"]
    lines += [f"| {effect:g} | {look} | {share:.0%} |" for effect, look, share in powers(studies)]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else STUDIES)
