"""Remarks of a start: the strength of the load-balancing loss on the ranks of a run."""

from __future__ import annotations

import pytest

from mellum2_megatron.config import apply_overrides
from mellum2_megatron.planning.start_notes import start_notes
from mellum2_megatron.recipes import recipe

BIG = recipe("mellum2_12b_pretrain_phase1")


def test_the_coefficient_is_told_as_it_acts_on_one_rank() -> None:
    (note,) = start_notes(BIG, 256)
    assert "on 256 data-parallel ranks loss.aux_loss_coef=0.001 acts like 3.9e-06" in note
    # Ranks that share a sequence count once.
    halves = apply_overrides(BIG, ["layout.cp=2", "layout.dp=128"])
    assert "on 128 data-parallel ranks" in start_notes(halves, 256)[0]


@pytest.mark.parametrize(
    "override",
    ["loss.aux_loss_gradient=exact", "loss.aux_loss_type=aux_loss", "loss.aux_loss_coef=0"],
)
def test_nothing_is_said_where_the_coefficient_acts_as_it_stands(override: str) -> None:
    assert start_notes(apply_overrides(BIG, [override]), 256) == []


def test_nothing_is_said_on_one_rank() -> None:
    assert start_notes(recipe("mellum2_4layer_pretrain_1gpu_h200_fp8"), 1) == []
