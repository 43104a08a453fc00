"""Recipes: complete, sourced, free of broken rules; the 12B's values are the report's."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

import pytest

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import (
    Device,
    Precision,
    apply_overrides,
    from_yaml,
    keys,
    to_yaml,
)
from mellum2_megatron.planning.dense_shards import dense_shards_note
from mellum2_megatron.planning.gpus import GPUS
from mellum2_megatron.planning.memory_fit import card_problem
from mellum2_megatron.planning.rules import check
from mellum2_megatron.planning.step_time import step_time
from mellum2_megatron.recipes import describe_recipes, recipe, recipe_names
from tests.recipes.golden_recipes import GOLDEN, digests

HARDWARE: dict[str, tuple[int, Device]] = {
    "mellum2_tiny_pretrain": (2, "cpu"),
    **{
        f"mellum2_12b_{stage}_{gpus}gpu_{card}": (gpus, "cuda")
        for stage, numbers in {
            **{f"pretrain_phase{number}": (8, 128, 256) for number in (1, 2, 3)},
            "long_context": (8, 128, 256),
            **{f"sft_{kind}": (8, 128) for kind in ("instruct", "thinking")},
        }.items()
        for gpus in numbers
        for card in (
            *("h200_fp8", "h200_fp8_fast", "h200_bf16", "h200_bf16_fast"),
            *("h100_fp8", "h100_fp8_fast", "h100_bf16", "h100_bf16_fast"),
        )
    },
    **{f"mellum2_12b_pretrain_phase{number}": (256, "cuda") for number in (1, 2, 3)},
    **{
        f"mellum2_12b_{stage}": (128, "cuda")
        for stage in (
            "long_context",
            "sft_instruct",
            "sft_thinking",
            "rlvr_instruct",
            "rlvr_thinking",
        )
    },
    **{f"mellum2_12b_rlvr_{kind}_8gpu_h200_bf16": (8, "cuda") for kind in ("instruct", "thinking")},
    **{
        f"mellum2_4layer_{stage}_1gpu_h200_fp8": (1, "cuda")
        for stage in (
            "pretrain",
            "pretrain_phase1",
            "pretrain_phase2",
            "pretrain_phase3",
            "long_context",
        )
    },
    **{
        f"mellum2_tiny_{stage}": (2, "cpu")
        for stage in (
            "pretrain_phase1",
            "pretrain_phase2",
            "pretrain_phase3",
            "long_context",
            "sft_instruct",
            "sft_thinking",
            "rlvr_instruct",
            "rlvr_thinking",
        )
    },
}


def test_every_recipe_is_covered_here() -> None:
    assert set(HARDWARE) == set(recipe_names())
    assert list(recipe_names()) == sorted(recipe_names())


def test_no_recipe_changed_unnoticed() -> None:
    """After a change that is meant: python -m tests.recipes.golden_recipes."""
    assert digests().splitlines() == GOLDEN.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", HARDWARE)
def test_a_recipe_is_complete_and_breaks_no_rule(name: str) -> None:
    run = recipe(name)
    assert run.name == name
    assert from_yaml(to_yaml(run)) == run
    assert check(run, *HARDWARE[name], machine=False) == []
    world_size, device = HARDWARE[name]
    assert world_size % run.layout.smallest_world_size == 0
    if device == "cuda":
        assert run.layout.world_size == world_size
    unsourced = [
        key for key in keys() if key not in ("name", "description") and not run.source(key)
    ]
    assert unsourced == []


def test_descriptions_are_one_line_each() -> None:
    described = describe_recipes()
    assert tuple(described) == recipe_names()
    for name, description in described.items():
        assert recipe(name).description == description
        assert 20 < len(description) <= 120
        assert "\n" not in description


@pytest.mark.parametrize(
    "name",
    [name for name in HARDWARE if "_pretrain_phase" in name or "long" in name or "sft" in name],
)
def test_descriptions_give_the_tokens_of_the_stage(name: str) -> None:
    run = recipe(name)
    stated = re.search(r"([\d.]+)([KMBT]) tokens", run.description)
    assert stated is not None
    unit = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[stated[2]]
    tokens = (run.schedule.train_samples - run.data.first_sample) * run.data.sequence_length
    # Two digits; the report's figures are rounded too, and a phase ends on a whole step.
    assert float(stated[1]) * unit == pytest.approx(tokens, rel=0.03)


@pytest.mark.parametrize("name", ["mellum2_tiny_pretrian", "mellum2-tiny-pretrain"])
def test_an_unknown_recipe_names_the_nearest(name: str) -> None:
    with pytest.raises(InputError, match="did you mean 'mellum2_tiny_pretrain'"):
        recipe(name)


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(InputError, match="size='big'"):
        recipe("mellum2_tiny_pretrain", size="big")


def test_phase1_is_the_reports() -> None:
    run = recipe("mellum2_12b_pretrain_phase1")
    assert run.architecture == Mellum2Architecture.preset("mellum2-12b")
    layout = run.layout
    assert (layout.tp, layout.pp, layout.ep, layout.cp, layout.dp) == (1, 1, 8, 1, 32 * 8)
    optimizer = run.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.min_lr) == ("muon", 3e-4, 0.0)
    assert (optimizer.weight_decay, optimizer.clip_grad) == (0.1, 1.0)
    assert (optimizer.muon_momentum, optimizer.muon_nesterov, optimizer.muon_ns_steps) == (
        0.95,
        True,
        5,
    )
    assert (optimizer.muon_scale_mode, optimizer.muon_extra_scale, optimizer.muon_tp_mode) == (
        "spectral",
        0.2,
        "blockwise",
    )
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.95, 1e-8)
    assert optimizer.overlap_grad_reduce
    assert optimizer.overlap_param_gather
    assert (run.loss.aux_loss_coef, run.loss.z_loss_coef, run.loss.mtp_factor) == (1e-3, 1e-3, 0.1)
    precision = run.precision
    assert (precision.compute, precision.fp8_format, precision.fp8_recipe) == (
        "fp8",
        "hybrid",
        "tensorwise",
    )
    assert precision.grad_reduce_in_fp32
    assert (run.data.sequence_length, run.schedule.micro_batch_size) == (8192, 2)


def test_phase1_schedule_adds_up_to_the_reports_totals() -> None:
    run = recipe("mellum2_12b_pretrain_phase1")
    schedule = run.schedule
    assert schedule.horizon_samples is not None
    assert schedule.steps(schedule.horizon_samples) == 323_459
    assert round(schedule.horizon_samples * 8192 / 1e12, 2) == 10.65
    assert round(run.train_tokens / 1e12, 2) == 6.18
    assert schedule.steps(schedule.warmup_samples) == 2_000
    assert schedule.decay_samples == 49_306 * 4096
    assert [size for _, size in schedule.batch_schedule] == [2048, 4096]
    # phase 1 is warmup and hold: its last step still runs at the peak
    assert run.learning_rate(schedule.train_samples) == 3e-4
    assert run.learning_rate(0) == 0.0
    assert run.learning_rate(schedule.horizon_samples) == 0.0


def test_the_quickstart_is_the_same_kind_of_run() -> None:
    tiny, big = recipe("mellum2_tiny_pretrain"), recipe("mellum2_12b_pretrain_phase1")
    assert tiny.optimizer.name == big.optimizer.name == "muon"
    assert tiny.schedule.style == big.schedule.style
    assert tiny.layout.ep > 1
    assert tiny.loss == big.loss
    assert tiny.architecture.num_mtp_layers == big.architecture.num_mtp_layers == 1
    window = tiny.architecture.sliding_window
    assert window is not None
    assert window < tiny.data.sequence_length, "the window must matter"
    assert set(tiny.architecture.layer_types) == set(big.architecture.layer_types)
    assert tiny.data.path == "data/quickstart"
    # every phase of the schedule is there
    schedule = tiny.schedule
    assert (
        0
        < schedule.warmup_samples
        < schedule.train_samples - schedule.decay_samples
        < schedule.train_samples
    )


@pytest.mark.parametrize("name", [name for name in HARDWARE if "_12b_" in name])
def test_a_variant_trains_the_same(name: str) -> None:
    """Twins differ in precision, exchange, memory and place; never in what is trained."""
    run = recipe(name)
    plain = recipe(re.sub(r"_\d+gpu_.*", "", name))
    for section in ("architecture", "loss", "stability", "data", "logging", "seed"):
        assert getattr(run, section) == getattr(plain, section), section
    gpus = run.layout.world_size or 0
    shards: Literal["whole", "even"] = "even" if gpus >= 128 else "whole"
    assert run.optimizer == replace(plain.optimizer, muon_dense_shards=shards)
    assert dense_shards_note(run, gpus) is None  # the other choice exposes no less
    assert replace(run.schedule, micro_batch_size=1) == replace(plain.schedule, micro_batch_size=1)
    assert run.precision == Precision(compute="bf16" if re.search("bf16|rlvr", name) else "fp8")
    fast = name.endswith("_fast")
    assert (run.layout.dispatcher == "flex", run.execution.gc_interval is not None) == (fast, fast)
    overlaps = fast and not ("h100" in name and run.layout.cp > 1)
    assert (run.layout.overlap_expert_comm, run.layout.delay_wgrad) == (overlaps, overlaps)
    assert (run.checkpoint.keep_last, run.checkpoint.retain_interval is None) == (3, False)


@pytest.mark.parametrize("name", [name for name in HARDWARE if name.endswith("_fast")])
def test_a_fast_recipe_is_estimated_to_be_faster(name: str) -> None:
    gpus, card = HARDWARE[name][0], GPUS["h100" if "h100" in name else "h200"]
    fast, plain = (
        step_time(recipe(one), world_size=gpus, gpu=card)
        for one in (name, name.removesuffix("_fast"))
    )
    # The estimate is for differences of more than 5% (docs/speed.md), but it knows the least gain:
    # a token that goes once to each rank.
    assert fast.seconds < 0.97 * plain.seconds


@pytest.mark.parametrize("gpus", [8, 128, 256])
@pytest.mark.parametrize("compute", ["fp8", "bf16"])
def test_long_context_on_80_gb_has_no_room_for_the_overlap(gpus: int, compute: str) -> None:
    """Why its fast recipes have none: the rule on one side, the count on the other."""
    run = recipe(f"mellum2_12b_long_context_{gpus}gpu_h100_{compute}_fast")
    overlap = ["layout.overlap_expert_comm=true", "layout.delay_wgrad=true"]
    found = check(apply_overrides(run, overlap), gpus, "cuda", machine=False)
    assert [violation.rule.name for violation in found] == ["overlap-without-moe-recompute"]
    kept = apply_overrides(run, [*overlap, "execution.recompute=[moe_act]"])
    assert check(kept, gpus, "cuda", machine=False) == []
    assert card_problem(kept, world_size=gpus, gpu=GPUS["h100"]) is not None


@pytest.mark.parametrize("name", HARDWARE)
def test_a_recipe_fits_the_card_in_its_name(name: str) -> None:
    card = "h100" if "h100" in name else "h200"
    assert card_problem(recipe(name), world_size=HARDWARE[name][0], gpu=GPUS[card]) is None


@pytest.mark.parametrize("name", [name for name in HARDWARE if re.search("_12b_.*h200", name)])
def test_a_recipe_for_h200_does_not_fit_80_gb(name: str) -> None:
    problem = card_problem(recipe(name), world_size=HARDWARE[name][0], gpu=GPUS["h100"])
    assert problem is not None
    assert problem.settings
