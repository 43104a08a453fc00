"""The report's pre-training as recipes: one schedule over three phases, accepted by Megatron."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from mellum2_megatron.config import Optimizer, Run
from mellum2_megatron.recipes import recipe, recipe_names
from mellum2_megatron.recipes.pretraining import PHASE_ENDS, SCHEDULE
from tests.upstream.parsed import megatron_scheduler, stub_te, validated

PHASES = tuple(f"mellum2_12b_pretrain_phase{number}" for number in (1, 2, 3))
SFT = ("mellum2_12b_sft_instruct", "mellum2_12b_sft_thinking")
ON_GPUS = tuple(name for name in recipe_names() if "tiny" not in name)
ENDINGS = ("", "_256gpu_h200_fp8", "_128gpu_h200_fp8", "_8gpu_h200_fp8")
UNCHANGED = ("architecture", "layout", "optimizer", "loss", "precision", "seed", "backend")
"""Fields of `Run` that all phases of one training share."""


def world_size(run: Run) -> int:
    assert run.layout.world_size is not None
    return run.layout.world_size


def test_phases_end_where_the_reports_tokens_do() -> None:
    trillions = [round(end * 8192 / 1e12, 2) for end in PHASE_ENDS]
    assert trillions == [6.18, 8.97, 10.65]  # 6.18, 6.18 + 2.79, and the total
    on_whole_steps = tuple(SCHEDULE.samples(SCHEDULE.steps(end)) for end in PHASE_ENDS)
    assert on_whole_steps == PHASE_ENDS
    assert SCHEDULE.steps(PHASE_ENDS[-1]) == 323_459
    # The decay, the report's mark of phase 3, lies in it; rounding leaves 762 steps of hold before.
    assert SCHEDULE.steps(PHASE_ENDS[1]) + 762 == 323_459 - 49_306


@pytest.mark.parametrize("ending", ENDINGS)
def test_phases_are_one_training(ending: str) -> None:
    """Each begins where the former ends, in data and state; no other training setting changes."""
    runs = [recipe(name + ending) for name in PHASES]
    assert runs[0].data.first_sample == 0
    assert runs[0].checkpoint.continue_from is None
    for before, after in itertools.pairwise(runs):
        assert after.data.first_sample == before.schedule.train_samples
        assert after.checkpoint.continue_from == f"runs/{before.name}"
        assert after.checkpoint.load is None
        same = (after.data.path, after.data.phase) == (before.data.path, before.data.phase)
        assert not same
    for run in runs:
        for field in UNCHANGED:
            assert getattr(run, field) == getattr(runs[0], field), field
        assert (
            dataclasses.replace(
                run.schedule, train_samples=SCHEDULE.train_samples, horizon_samples=None
            )
            == SCHEDULE
        )


@pytest.mark.parametrize("number", [0, 1, 2])
def test_rates_at_the_boundaries_are_the_schedules(number: int) -> None:
    run = recipe(PHASES[number])
    first, end = run.data.first_sample, run.schedule.train_samples
    decay = SCHEDULE.train_samples - SCHEDULE.decay_samples
    samples = [
        first,
        first + 1,
        SCHEDULE.warmup_samples,
        decay,
        decay + 4096,
        end - 4096,
        end,
        (first + end) // 2,
    ]
    for sample in samples:
        assert run.learning_rate(sample) == SCHEDULE.learning_rate(sample, peak=3e-4, minimum=0.0)
    expected = [(0.0, 3e-4), (3e-4, 3e-4), (3e-4, 0.0)][number]
    assert (run.learning_rate(first), run.learning_rate(end)) == expected


def test_megatrons_scheduler_carries_on_over_the_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scheduler, built from each phase's arguments, loads the state the former phase saved."""
    state = None
    for name in PHASES:
        run = recipe(name)
        args = validated(run, monkeypatch, world_size=world_size(run), device="cuda")
        with megatron_scheduler(args, monkeypatch) as (scheduler, group, _):
            assert args.train_iters == SCHEDULE.steps(run.schedule.train_samples)
        if state is not None:
            scheduler.load_state_dict(state)
        assert scheduler.num_steps == run.data.first_sample
        for sample in (
            run.data.first_sample,
            SCHEDULE.train_samples - SCHEDULE.decay_samples // 2,
            run.schedule.train_samples,
        ):
            if run.data.first_sample <= sample <= run.schedule.train_samples:
                scheduler.step(sample - scheduler.num_steps)
                assert group["lr"] == SCHEDULE.learning_rate(sample, peak=3e-4, minimum=0.0)
        state = scheduler.state_dict()


@pytest.mark.parametrize("name", ON_GPUS)
def test_megatron_accepts_every_recipe_at_its_size(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_te(monkeypatch)
    run = recipe(name)
    args = validated(run, monkeypatch, world_size=world_size(run), device="cuda")
    assert (args.world_size, args.expert_model_parallel_size) == (world_size(run), run.layout.ep)
    rlvr = "rlvr" in name
    assert args.use_layer_wise_distributed_optimizer is not rlvr  # Muon's
    fp8 = None if "bf16" in name or rlvr else "hybrid"
    assert (args.fp8, args.fp8_param_gather) == (fp8, False)
    assert fp8 is None or args.fp8_recipe == "tensorwise"
    assert args.train_samples == run.schedule.train_samples
    assert args.seq_length == run.data.sequence_length
    assert args.max_position_embeddings == run.architecture.max_position_embeddings
    if run.layout.cp > 1:
        assert args.cp_comm_type == ["all_gather", "all_gather", "all_gather", "p2p"] * 7


@pytest.mark.parametrize("base", [*PHASES, "mellum2_12b_long_context", *SFT])
def test_a_short_name_is_the_reports_hardware(base: str) -> None:
    full = base + ("_256gpu_h200_fp8" if "pretrain" in base else "_128gpu_h200_fp8")
    short, long = recipe(base), recipe(full)
    same = dataclasses.replace(long, name=short.name, checkpoint=short.checkpoint)
    assert short == same
    assert long.checkpoint.load == (
        short.checkpoint.load and short.checkpoint.load + full.removeprefix(base)
    )


def test_long_context_is_the_reports() -> None:
    run = recipe("mellum2_12b_long_context")
    assert run.architecture.max_position_embeddings == run.data.sequence_length == 131_072
    assert run.architecture.rope_full_attention.rope_type == "yarn"
    assert run.architecture.rope_sliding_attention.rope_type == "default"
    assert (run.optimizer.lr, run.optimizer.min_lr) == (3e-5, 0.0)
    schedule = run.schedule
    assert (schedule.style, schedule.train_steps) == ("whd", 3_500)
    assert schedule.decay_samples == 500 * schedule.final_batch_size
    assert round(run.train_tokens / 1e9) == 117
    assert (run.layout.ep, run.layout.cp) == (8, 8)


@pytest.mark.parametrize(
    ("name", "packs", "tokens"), [(SFT[0], 119_334, 47), (SFT[1], 425_322, 167)]
)
def test_fine_tuning_is_the_reports(
    name: str, packs: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, base = recipe(name), recipe("mellum2_12b_long_context")
    assert run.architecture == base.architecture
    assert run.checkpoint.load == f"runs/{base.name}"
    assert (run.layout.ep, run.layout.cp, run.layout.world_size) == (8, 8, 128)
    assert (run.optimizer.lr, run.optimizer.min_lr) == (3e-5, 3e-6)
    assert dataclasses.replace(run.optimizer, lr=3e-4, min_lr=0.0) == recipe(PHASES[0]).optimizer
    assert (run.loss.aux_loss_coef, run.loss.mtp_factor) == (1e-4, 0.1)
    assert run.precision == base.precision
    schedule = run.schedule
    assert schedule.batch_schedule == ((0, 64),)
    assert 3 * packs <= schedule.train_samples < 3 * packs + 64
    assert round(run.train_tokens / 1e9) == tokens
    assert schedule.warmup_samples == 100 * 64
    args = validated(run, monkeypatch, world_size=128, device="cuda")
    with megatron_scheduler(args, monkeypatch) as (scheduler, group, _):
        assert args.train_iters == schedule.train_steps
        for sample, rate in ((6400, 3e-5), (schedule.train_samples, 3e-6)):
            scheduler.step(sample - scheduler.num_steps)
            assert group["lr"] == pytest.approx(rate)
            assert run.learning_rate(sample) == pytest.approx(rate)
    assert (args.lr_decay_style, args.calculate_per_token_loss) == ("cosine", True)


def test_fine_tuning_starts_from_long_context_in_every_size() -> None:
    for kind in ("instruct", "thinking"):
        for beginning, ending in (
            ("mellum2_12b", ""),
            ("mellum2_12b", "_8gpu_h200_fp8"),
            ("mellum2_tiny", ""),
        ):
            run = recipe(f"{beginning}_sft_{kind}{ending}")
            assert run.checkpoint.load == f"runs/{beginning}_long_context{ending}"
            assert run.schedule.style == "cosine"
            assert run.loss.aux_loss_coef == 1e-4


def shared(big: Run) -> Optimizer:
    """Return the optimizer of a big run as one GPU has it: with nobody to share buffers with."""
    return dataclasses.replace(big.optimizer, muon_dense_shards="whole")


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("pretrain", PHASES[0]),
        ("pretrain_phase1", PHASES[0]),
        ("pretrain_phase2", PHASES[1]),
        ("pretrain_phase3", PHASES[2]),
    ],
)
def test_the_slice_is_the_12b_but_for_depth(name: str, of: str) -> None:
    run, big = recipe(f"mellum2_4layer_{name}_1gpu_h200_fp8"), recipe(of)
    assert run.architecture == big.architecture.replace(num_hidden_layers=4)
    assert run.data.path == big.data.path
    assert set(run.architecture.layer_types) == set(big.architecture.layer_types)
    assert run.architecture.num_parameters() == 2_552_349_440
    assert (run.optimizer, run.precision, run.loss) == (shared(big), big.precision, big.loss)


def test_the_slices_long_context_is_shorter() -> None:
    run, big = (
        recipe("mellum2_4layer_long_context_1gpu_h200_fp8"),
        recipe("mellum2_12b_long_context"),
    )
    assert run.architecture == big.architecture.replace(num_hidden_layers=4)
    assert (run.optimizer, run.precision, run.loss) == (shared(big), big.precision, big.loss)
    assert run.data.sequence_length == big.data.sequence_length // 4


@pytest.mark.parametrize("training", ["mellum2_4layer_{}_1gpu_h200_fp8", "mellum2_tiny_{}"])
def test_small_trainings_are_one_in_the_reports_proportions(training: str) -> None:
    """The report's shares of the steps: 59, 26 and 15 percent, with the decay in the last."""
    runs = [recipe(training.format(f"pretrain_phase{number}")) for number in (1, 2, 3)]
    horizon = runs[-1].schedule.train_samples
    steps = [run.schedule.steps(run.schedule.train_samples) for run in runs]
    reported = [SCHEDULE.steps(end) for end in PHASE_ENDS]
    assert [step / steps[-1] for step in steps] == pytest.approx(
        [step / reported[-1] for step in reported], abs=0.01
    )
    for before, after in itertools.pairwise(runs):
        assert after.data.first_sample == before.schedule.train_samples
        for field in UNCHANGED:
            assert getattr(after, field) == getattr(before, field), field
    for run in runs:
        assert run.schedule.horizon_samples == horizon
        assert horizon - run.schedule.decay_samples > runs[1].schedule.train_samples
        assert 0 < run.schedule.warmup_samples < runs[0].schedule.train_samples
        assert len(run.schedule.batch_schedule) == 2


def test_the_tiny_long_context_is_the_released_one_at_another_size() -> None:
    run, big = recipe("mellum2_tiny_long_context"), recipe("mellum2_12b_long_context")
    phase = recipe("mellum2_tiny_pretrain_phase3")
    rope, theirs = run.architecture.rope_full_attention, big.architecture.rope_full_attention
    assert (rope.rope_type, rope.rope_theta) == (theirs.rope_type, theirs.rope_theta)
    assert (rope.beta_fast, rope.beta_slow) == (theirs.beta_fast, theirs.beta_slow)
    assert (
        rope.factor * rope.original_max_position_embeddings
        == run.architecture.max_position_embeddings
    )
    assert (rope.factor, rope.attention_factor) == (
        theirs.factor,
        pytest.approx(theirs.attention_factor),
    )
    assert rope.original_max_position_embeddings == phase.data.sequence_length
    assert run.architecture.rope_sliding_attention.rope_type == "default"
    assert run.optimizer.lr / phase.optimizer.lr == pytest.approx(
        big.optimizer.lr / recipe(PHASES[2]).optimizer.lr
    )
    assert (run.layout.ep, run.layout.cp) == (2, 2)
    assert run.data.sequence_length == run.architecture.max_position_embeddings


@pytest.mark.parametrize(
    ("kind", "tokens", "steps"), [("instruct", 16_384, 500), ("thinking", 40_960, 100)]
)
def test_reinforcement_learning_is_the_reports(
    kind: str, tokens: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recipe(f"mellum2_12b_rlvr_{kind}")
    assert run.checkpoint.load == f"runs/mellum2_12b_sft_{kind}"
    assert run.data.tokenizer == f"{run.checkpoint.load}/tokenizer"
    assert run.architecture == recipe(f"mellum2_12b_sft_{kind}").architecture
    objective = run.rl.objective
    assert (objective.group_size, objective.prompts, objective.oversampling) == (16, 256, 1.5)
    assert (objective.clip_low, objective.clip_high) == (0.2, 0.28)
    assert (objective.band_low, objective.band_high) == (0.5, 5.0)
    assert (objective.max_age, objective.max_tokens) == (2, tokens)
    assert (run.schedule.train_steps, run.schedule.final_batch_size) == (steps, 4096)
    args = validated(run, monkeypatch, world_size=128, device="cuda")
    assert (args.optimizer, args.adam_beta1, args.adam_beta2) == ("adam", 0.9, 0.999)
    assert (args.weight_decay, args.mtp_num_layers, args.mtp_detach_heads) == (0.01, 1, True)
    assert (args.calculate_per_token_loss, args.global_batch_size) == (True, 4096)
    with megatron_scheduler(args, monkeypatch) as (scheduler, group, _):
        for step, rate in ((50, 1e-6), (steps, 1e-7)):
            scheduler.step(4096 * step - scheduler.num_steps)
            assert group["lr"] == pytest.approx(rate)
