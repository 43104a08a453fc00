"""Gradients of the projections that heads of latent attention share, on tensor-parallel ranks."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import run_distributed

pytestmark = pytest.mark.distributed

WORKER = "tests.layouts.latent_worker:gradients"
ROTATED = 6
"""Rows of the rotated key, the last of its projection."""


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    """Gradients on one process."""
    return run_distributed(WORKER, 1, False, True)[0]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_ranks_have_the_gradients_of_one(
    whole: dict[str, torch.Tensor], sequence_parallel: bool
):
    for found in run_distributed(WORKER, 2, sequence_parallel, True):
        assert found.keys() == whole.keys()
        assert len(found) == 2
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_megatron_leaves_out_other_ranks_heads(
    whole: dict[str, torch.Tensor], sequence_parallel: bool
):
    """Megatron 0.19.2 alone: `_sum_rotated_key_gradients` can go when this test fails."""
    found = run_distributed(WORKER, 2, sequence_parallel, False)[0]
    name = "linear_kv_down_proj.weight"
    torch.testing.assert_close(found[name][:-ROTATED], whole[name][:-ROTATED], rtol=1e-4, atol=1e-4)
    difference = (found[name] - whole[name])[-ROTATED:].abs().max()
    assert difference > 0.1 * whole[name][-ROTATED:].abs().max()
