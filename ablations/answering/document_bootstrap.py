"""Interval of a difference over documents, given the checkpoints that there are.

It answers another question than the interval over seeds: with these very checkpoints, would other
documents of the same kind give another difference? Tokens of one document are alike, so documents
are drawn, not tokens. No verdict comes from it: another seed may move both arms.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from ablations.answering.verdicts import Interval
from mellum2_megatron.common.errors import InputError

_DRAWS, _FEWER_DRAWS = 9999, 1999
"""Resamples of few and of many documents."""
_SEED = 1987
_LARGEST_BCA = 1000
"""Documents up to which the interval is BCa (Efron, 1987). Its correction costs the square of
their number, and with more documents it no longer shows."""
ENOUGH = 100
"""Effective documents below which an interval is too narrow (docs/ablation_statistics.md)."""
_BATCH = 4_000_000
"""Numbers drawn at once, 32 MB each of index and values."""


def document_interval(
    arm_nats: npt.ArrayLike,
    control_nats: npt.ArrayLike,
    units: npt.ArrayLike,
    *,
    level: float = 0.95,
    draws: int | None = None,
) -> Interval:
    """Return the bootstrap interval of a difference in nats per unit.

    The difference is a ratio of sums, as in a validation loss: long documents count more. BCa for
    up to 1,000 documents, percentiles for more. The same draws every time.

    Args:
        arm_nats, control_nats: sums of nats of each document, `[documents]`, or their means over
            seeds.
        units: tokens or bytes of each document.
        level: share of intervals that hold the true difference, default 0.95.
        draws: resamples; None (default): 9,999, and 1,999 of more than 1,000 documents.

    Raises:
        InputError: fewer than two documents.
    """
    nats = np.asarray(arm_nats, dtype=np.float64) - np.asarray(control_nats, dtype=np.float64)
    sizes = np.asarray(units, dtype=np.float64)
    if len(nats) < 2:
        raise InputError(
            f"{len(nats)} documents",
            rule="an interval over documents needs 2, and is right with 100 or so",
            fix="validate on more documents (logging.eval_iterations)",
        )
    if np.array_equal(nats * sizes[0], nats[0] * sizes):
        # Every resample gives the same number, of which scipy makes NaN.
        same = float(nats[0] / sizes[0])
        return Interval(low=same, high=same)
    few = len(nats) <= _LARGEST_BCA
    result: Any = stats.bootstrap(
        (nats, sizes),
        _ratio,
        paired=True,
        vectorized=True,
        n_resamples=draws or (_DRAWS if few else _FEWER_DRAWS),
        batch=max(1, _BATCH // len(nats)),
        confidence_level=level,
        method="BCa" if few else "percentile",
        rng=np.random.default_rng(_SEED),
    )
    bounds = result.confidence_interval
    return Interval(low=float(bounds.low), high=float(bounds.high))


def effective_documents(units: npt.ArrayLike) -> float:
    """Return the number of equal documents that vary like these: few long ones weigh most."""
    sizes = np.asarray(units, dtype=np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum()) if len(sizes) else 0.0


def _ratio(nats: Any, sizes: Any, axis: int) -> Any:
    return nats.sum(axis=axis) / sizes.sum(axis=axis)
