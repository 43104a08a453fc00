"""The plan of seeds of a study: looks fixed before the first run, and the error spent at each.

Looking again after every new seed finds a difference sooner or later, also where there is none.
The plan names the numbers of seeds at which the differences are looked at. At every look the same
nominal level is used (Pocock, Biometrika 64, 1977), so small that all looks together are wrong as
often as one test at `error`. Pocock's bounds are for many samples of known variance; here the level
comes from simulated paired t tests of the plan's own looks, because 3 seeds estimate their variance
badly.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from mellum2_megatron.common.field_checks import require

Floats = npt.NDArray[np.float64]

_DRAWS = 400_000
"""Simulated studies; the standard error of a level of 0.05 is then 0.0003."""
_SEED = 1977
_RARE = 200
"""Simulated studies below which a share of them is too coarse."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedPlan:
    """Looks of a study, and the error that all of them share.

    Attributes:
        looks: numbers of seeds at which the differences are looked at, default 3, 5 and 8.
        error: probability of a false verdict of one arm over all looks, default 0.05.

    Raises:
        InputError: no look, one below 2, looks that do not rise, or an error outside (0, 0.5).
    """

    looks: tuple[int, ...] = (3, 5, 8)
    error: float = 0.05

    def __post_init__(self) -> None:
        shown = ", ".join(map(str, self.looks))
        require(
            bool(self.looks) and self.looks[0] >= 2 and list(self.looks) == sorted({*self.looks}),
            f"looks {shown or 'none'}",
            rule="looks are rising numbers of seeds, and an interval needs 2 seeds",
            fix="use 3, 5, 8",
        )
        require(
            0 < self.error < 0.5,
            f"error {self.error}",
            rule="it is the probability of a false verdict",
            fix="use 0.05",
        )

    @property
    def level(self) -> float:
        """Two-sided level of each look."""
        return float(np.quantile(_least_p_values(self.looks)[0], self.error))

    @property
    def one_sided_level(self) -> float:
        """One-sided level of each look."""
        return float(np.quantile(_least_p_values(self.looks)[1], self.error))

    def reached(self, seeds: int) -> int | None:
        """Return the largest look with at most `seeds` seeds; None before the first."""
        return max((look for look in self.looks if look <= seeds), default=None)

    def following(self, seeds: int) -> int | None:
        """Return the next look after `seeds` seeds; None after the last."""
        return min((look for look in self.looks if look > seeds), default=None)

    def over_looks(self, least_p: npt.ArrayLike, *, one_sided: bool = False) -> Floats:
        """Return the p value of a whole plan from the least p value of its looks.

        It is the probability that, without a difference, some look of the plan has so small a p
        value: no more than the p value times the number of looks.
        """
        simulated = _least_p_values(self.looks)[int(one_sided)]
        p = np.asarray(least_p, dtype=np.float64)
        below = np.searchsorted(simulated, p, side="right")
        bound = np.minimum(1.0, len(self.looks) * p)
        share = np.maximum(below / len(simulated), p)
        result: Floats = np.where(below < _RARE, bound, np.minimum(bound, share))
        return result


def paired_p_values(
    differences: npt.ArrayLike, *, against: float = 0.0
) -> tuple[Floats, Floats, Floats]:
    """Return the p values of a paired t test over the last axis: two-sided, greater, less.

    Args:
        differences: arm less control, one a seed, `[..., n]`, n 2 or more.
        against: difference under test, default 0.
    """
    values = np.asarray(differences, dtype=np.float64)
    n = values.shape[-1]
    mean, sd = values.mean(-1) - against, values.std(-1, ddof=1)
    # Equal runs have no spread: 0 / 0 is no evidence, and anything else is infinite.
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(mean == 0, 0.0, mean / (sd / np.sqrt(n)))
    greater, less = special.stdtr(n - 1, -t), special.stdtr(n - 1, t)
    return np.minimum(1.0, 2 * np.minimum(greater, less)), greater, less


@functools.lru_cache(maxsize=16)
def _least_p_values(looks: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Return the least p value over the looks of studies without a difference, sorted.

    Two-sided and one-sided. Always the same draws, so that a report is the same every time.
    """
    draws = np.random.default_rng(_SEED).standard_normal((looks[-1], _DRAWS))
    two = np.ones(_DRAWS)
    one = np.ones(_DRAWS)
    for look in looks:
        both, greater, _ = paired_p_values(draws[:look].T)
        two, one = np.minimum(two, both), np.minimum(one, greater)
    return np.sort(two), np.sort(one)
