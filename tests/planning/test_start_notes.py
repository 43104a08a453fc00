"""Remarks of a start: strength of the load-balancing loss, and shares of dense matrices."""

from __future__ import annotations

import pytest

from mellum2_megatron.config import apply_overrides
from mellum2_megatron.planning.gpus import GPUS
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


@pytest.mark.parametrize(
    ("ranks", "worse", "better"),
    [(256, "whole", "even"), (128, "whole", "even"), (8, None, None)],
)
def test_the_choice_that_exposes_less_is_named(
    ranks: int, worse: str | None, better: str | None
) -> None:
    """At 8 ranks even shares expose 0.09 GiB more, which is less than a note is worth."""
    run = apply_overrides(BIG, [f"layout.dp={ranks}", "loss.aux_loss_coef=0"])
    for shards in ("whole", "even"):
        chosen = apply_overrides(run, [f"optimizer.muon_dense_shards={shards}"])
        notes = start_notes(chosen, ranks)
        assert len(notes) == (shards == worse)
        for note in notes:
            assert f"muon_dense_shards={worse} sends" in note
            assert f"{better} would send 0.6" in note
    # Without overlap nothing hides, and at 8 ranks the exchange is more than the empty room.
    alone = ["optimizer.overlap_grad_reduce=false", "optimizer.overlap_param_gather=false"]
    chosen = apply_overrides(run, ["optimizer.muon_dense_shards=even", *alone])
    assert ["whole would send" in note for note in start_notes(chosen, ranks)] == [True] * (
        ranks == 8
    )
    assert start_notes(apply_overrides(run, ["optimizer.name=adam"]), ranks) == []


def test_deterministic_runs_on_cards_before_hopper_are_told_what_they_need() -> None:
    run = apply_overrides(BIG, ["execution.deterministic=true"])
    told = {
        name: any("flash-attn 2" in note for note in start_notes(run, 256, card))
        for name, card in GPUS.items()
    }
    assert told == {name: name in ("a100-80", "a100-40", "l40s") for name in GPUS}
    assert not any("flash-attn" in note for note in start_notes(BIG, 256, GPUS["a100-80"]))
