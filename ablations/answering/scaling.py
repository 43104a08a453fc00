"""Scaling fit of a loss over sizes and tokens: L = E + A N^-a D^-b.

N is a number of parameters, D of tokens. The fit is Hoffmann et al.'s (2022, appendix D.2): Huber
loss on differences of log L, from a grid of starts. Their two terms, one of N and one of D, need
runs that vary both apart. A study over sizes seldom has them, so both stand in one term here, and
where the runs cannot tell N from D, b is held at 0 and D is part of N's effect.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize

from ablations.answering.seed_plan import Floats
from ablations.answering.verdicts import Interval
from mellum2_megatron.common.errors import InputError

SMALLEST = 4
"""Sizes that a fit needs: the form has three numbers along sizes."""
_HUBER = 1e-3
"""Difference of log L from which on a run counts linearly, as of Hoffmann et al."""
_SEED = 2022
_INDEPENDENT = 1e-3
"""Least share of log D that log N must leave unexplained for b to be fitted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SizedRun:
    """One run of a study over sizes.

    Attributes:
        parameters: number of parameters, embeddings as the study counts them.
        tokens: tokens of the training.
        loss: validation loss, nats a token.
    """

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingFit:
    """Fitted form, and its trust.

    Attributes:
        irreducible: E, nats a token.
        factor: A.
        size_exponent, token_exponent: a and b; b is 0 where `separate` is false.
        separate: the runs vary N and D apart.
        irreducible_interval, size_interval: 95% bootstrap intervals of E and a, runs drawn within
            each size; None where every size has one run.
        held_out: log of the largest size's mean loss over the loss that a fit of the smaller sizes
            foretells, the test of an extrapolation.
    """

    irreducible: float
    factor: float
    size_exponent: float
    token_exponent: float
    separate: bool
    irreducible_interval: Interval | None
    size_interval: Interval | None
    held_out: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the loss that the fit foretells, nats a token."""
        size = parameters**-self.size_exponent * tokens**-self.token_exponent
        return float(self.irreducible + self.factor * size)


def fit_scaling(runs: Sequence[SizedRun], *, draws: int = 200) -> ScalingFit:
    """Fit the form to the runs of one arm.

    Args:
        runs: runs of 4 sizes or more, any number a size.
        draws: bootstrap resamples, default 200.

    Raises:
        InputError: fewer than 4 sizes, or a loss that is not a positive number.
    """
    table = np.array([(run.parameters, run.tokens, run.loss) for run in runs], dtype=np.float64)
    sizes = np.unique(table[:, 0]) if len(table) else np.empty(0)
    if len(sizes) < SMALLEST:
        raise InputError(
            f"a scaling fit over {len(sizes)} sizes",
            rule=f"the form has three numbers along sizes, so a fit needs {SMALLEST} of them to be "
            "wrong at all",
            fix=f"add sizes, {SMALLEST} or more",
        )
    if not (np.isfinite(table).all() and (table > 0).all()):
        raise InputError(
            "a scaling fit",
            rule="sizes, tokens and losses are positive numbers, and a run has another",
            fix="leave the runs that diverged out, and say so",
        )
    separate = _vary_apart(table)
    # Around their centre the factor and the exponents are not tied to each other.
    centre = np.array([*np.log(table[:, :2]).mean(0), 0.0])
    table = table / np.exp(centre)
    best = _fit(table, _starts(table, separate), separate)
    sizes = np.unique(table[:, 0])
    smaller = table[table[:, 0] < sizes[-1]]
    without_largest = _fit(smaller, _starts(smaller, separate), separate and _vary_apart(smaller))
    largest = table[table[:, 0] == sizes[-1]]
    held_out = np.log(largest[:, 2]).mean() - _log_loss(without_largest, largest).mean()
    intervals: list[Interval | None] = [None, None]
    if len(table) > len(sizes):
        rng = np.random.default_rng(_SEED)
        rows = [np.flatnonzero(table[:, 0] == size) for size in sizes]
        fits = np.array(
            [
                _fit(
                    table[np.concatenate([rng.choice(row, len(row)) for row in rows])],
                    [best],
                    separate,
                )
                for _ in range(draws)
            ]
        )
        for number, values in enumerate((np.exp(fits[:, 0]), fits[:, 2])):
            low, high = np.quantile(values, (0.025, 0.975))
            intervals[number] = Interval(low=float(low), high=float(high))
    return ScalingFit(
        irreducible=float(np.exp(best[0])),
        factor=float(np.exp(best[1] + best[2:] @ centre[:2])),
        size_exponent=float(best[2]),
        token_exponent=float(best[3]),
        separate=separate,
        irreducible_interval=intervals[0],
        size_interval=intervals[1],
        held_out=float(held_out),
    )


def _vary_apart(table: Floats) -> bool:
    """Return true if log D is not a linear function of log N in the runs."""
    size, tokens = np.log(table[:, 0]), np.log(table[:, 1])
    around = tokens - tokens.mean()
    spread = float((around**2).sum())
    if spread < 1e-12 or np.ptp(size) < 1e-12:
        return False
    slope = (size - size.mean()) @ around / ((size - size.mean()) ** 2).sum()
    left = around - slope * (size - size.mean())
    return float((left**2).sum()) / spread > _INDEPENDENT


def _log_loss(numbers: npt.ArrayLike, table: Floats) -> Floats:
    """Return log L for each run; the numbers are log E, log A, a and b."""
    log_e, log_a, a, b = np.asarray(numbers, dtype=np.float64)
    term = log_a - a * np.log(table[:, 0]) - b * np.log(table[:, 1])
    result: Floats = np.logaddexp(log_e, term)
    return result


def _starts(table: Floats, separate: bool) -> list[Floats]:
    """Return a grid of starting points: shares of the least loss, and exponents."""
    least, middle = table[:, 2].min(), np.log(table[:, 2]).mean()
    starts = []
    for share, a, b in itertools.product(
        (0.1, 0.5, 0.9), (0.05, 0.2, 0.5, 1.0), (0.05, 0.3) if separate else (0.0,)
    ):
        e = share * least
        starts.append(np.array([np.log(e), np.log(np.exp(middle) - e), a, b]))
    return starts


def _fit(table: Floats, starts: Sequence[Floats], separate: bool) -> Floats:
    """Return the numbers of the best fit from the starts."""
    observed = np.log(table[:, 2])
    free = 4 if separate else 3

    def miss(numbers: Floats) -> Any:
        return _log_loss(np.append(numbers, [0.0] * (4 - free)), table) - observed

    fits = [
        optimize.least_squares(
            miss, start[:free], loss="huber", f_scale=_HUBER, x_scale="jac", max_nfev=400
        )
        for start in starts
    ]
    best = min(fits, key=lambda fit: fit.cost).x
    return np.append(best, [0.0] * (4 - free))
