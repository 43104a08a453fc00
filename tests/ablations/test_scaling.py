"""Scaling fits of losses with known constants."""

from __future__ import annotations

import numpy as np
import pytest

from ablations.answering.scaling import SizedRun, fit_scaling
from mellum2_megatron.common.errors import InputError

SIZES = (1e6, 3e6, 1e7, 3e7, 1e8)


def runs(*, seeds: int = 3, noise: float = 0.002, apart: bool = False) -> list[SizedRun]:
    """Return runs of L = 1.7 + 400 N^-0.4 (D / 1e9)^-0.1."""
    rng = np.random.default_rng(4)
    return [
        SizedRun(
            parameters=size,
            tokens=tokens,
            loss=(1.7 + 400 * size**-0.4 * (tokens / 1e9) ** -0.1) * np.exp(rng.normal(0, noise)),
        )
        for size in SIZES
        for tokens in ((1e9, 4e9) if apart else (1e9,))
        for _ in range(seeds)
    ]


def test_constants_are_found() -> None:
    fit = fit_scaling(runs(), draws=30)
    assert not fit.separate
    assert fit.token_exponent == 0
    assert fit.irreducible == pytest.approx(1.7, rel=0.02)
    assert fit.size_exponent == pytest.approx(0.4, rel=0.05)
    for interval, true in ((fit.irreducible_interval, 1.7), (fit.size_interval, 0.4)):
        assert interval is not None
        assert interval.low < true < interval.high
    assert abs(fit.held_out) < 0.05
    assert fit.loss(1e7, 1e9) == pytest.approx(1.7 + 400 * 1e7**-0.4, rel=0.005)


def test_tokens_apart_from_sizes() -> None:
    fit = fit_scaling(runs(seeds=1, noise=0.0, apart=True))
    assert fit.separate
    assert fit.token_exponent == pytest.approx(0.1, rel=0.02)
    assert fit.size_exponent == pytest.approx(0.4, rel=0.02)


def test_one_wild_run_does_not_turn_the_fit() -> None:
    every = runs()
    every[4] = SizedRun(parameters=every[4].parameters, tokens=1e9, loss=every[4].loss * 1.3)
    assert fit_scaling(every, draws=2).size_exponent == pytest.approx(0.4, rel=0.1)


def test_one_run_a_size_has_no_interval() -> None:
    fit = fit_scaling(runs(seeds=1))
    assert fit.irreducible_interval is None
    assert fit.size_interval is None


@pytest.mark.parametrize("kept", [0, 3])
def test_too_few_sizes(kept: int) -> None:
    with pytest.raises(InputError, match=f"over {kept} sizes"):
        fit_scaling([run for run in runs() if run.parameters in SIZES[:kept]])


def test_diverged_run() -> None:
    with pytest.raises(InputError, match="positive numbers"):
        fit_scaling([*runs(), SizedRun(parameters=1e6, tokens=1e9, loss=float("nan"))])
