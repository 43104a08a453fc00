"""Intervals over documents."""

from __future__ import annotations

import numpy as np
import pytest

from ablations.answering.document_bootstrap import document_interval, effective_documents
from mellum2_megatron.common.errors import InputError


def test_long_documents_count_more() -> None:
    rng = np.random.default_rng(0)
    tokens = np.exp(rng.normal(5, 1, 300))
    control = tokens * rng.normal(3, 0.5, 300)
    arm = control + tokens * 0.02 + rng.normal(0, 0.3, 300)
    got = document_interval(arm, control, tokens)
    ratio = (arm - control).sum() / tokens.sum()
    assert got.low < ratio < got.high
    # The delta method for a ratio of means, an independent formula.
    residual = (arm - control) - ratio * tokens
    error = residual.std(ddof=1) / np.sqrt(300) / tokens.mean()
    assert got.high - got.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert document_interval(arm, control, tokens) == got


def test_pairs_stay_together() -> None:
    rng = np.random.default_rng(1)
    tokens = np.full(200, 100.0)
    control = tokens * rng.normal(3, 1, 200)
    got = document_interval(control + 1, control, tokens)
    assert (got.low, got.high) == pytest.approx((0.01, 0.01))


def test_many_documents() -> None:
    rng = np.random.default_rng(2)
    tokens = np.ones(3000)
    arm = rng.normal(0.1, 1, 3000)
    got = document_interval(arm, np.zeros(3000), tokens, draws=500)
    assert got.high - got.low == pytest.approx(2 * 1.96 / np.sqrt(3000), rel=0.15)


def test_one_document() -> None:
    with pytest.raises(InputError, match="1 documents"):
        document_interval([1.0], [2.0], [3.0])


def test_effective_documents() -> None:
    assert effective_documents([5.0] * 7) == pytest.approx(7)
    assert effective_documents([1.0, 1e9]) == pytest.approx(1)
