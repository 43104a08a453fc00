"""Updates of Megatron's distributed Muon, against the formula in float64 and one process."""

from __future__ import annotations

import math
import re
from functools import cache

import pytest
import torch

from mellum2_megatron.config import Run, apply_overrides
from mellum2_megatron.recipes import recipe
from tests.distributed import run_distributed
from tests.model.optimizer_worker import Outcome, gradient, initial

pytestmark = pytest.mark.distributed

STEPS = 3
SMALL = [
    "architecture.vocab_size=96",
    "architecture.hidden_size=64",
    "architecture.head_dim=16",
    "architecture.num_attention_heads=8",
    "architecture.moe_intermediate_size=32",
    "architecture.num_experts=4",
    "architecture.num_hidden_layers=4",
    "data.sequence_length=64",
    "layout.ep=1",
    "optimizer.lr=0.01",
    "schedule.warmup_samples=0",
    "schedule.micro_batch_size=2",
]


EVEN = "optimizer.muon_dense_shards=even"
SMALL_BUCKETS = "execution.extra_arguments=[--ddp-bucket-size,20000]"
OVERLAPS = ("optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true")


def run_of(*overrides: str) -> Run:
    return apply_overrides(recipe("mellum2_tiny_pretrain"), [*SMALL, *overrides])


@cache
def updated(nproc: int, *overrides: str, precision: str = "medium") -> list[Outcome]:
    """Return every rank's outcome of `STEPS` steps."""
    return run_distributed(
        "tests.model.optimizer_worker:update",
        nproc,
        run_of(*overrides),
        steps=STEPS,
        precision=precision,
    )


# -- against the formula

# Coefficients of emerging_optimizers/orthogonalized_optimizers/muon_utils.py:42 (0.3.0).
QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Return five quintic Newton-Schulz steps in float64, times Moonlight's 0.2 sqrt(max).

    The factor is that of arXiv 2502.16982, §2.2.
    """
    x = matrix.double() / matrix.double().norm()
    for a, b, c in QUINTIC:
        if x.shape[0] <= x.shape[1]:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        else:
            gram = x.T @ x
            x = a * x + x @ (b * gram + c * gram @ gram)
    return x * 0.2 * math.sqrt(max(matrix.shape))


def blocks(name: str, rows: int, *, gate_up: bool) -> list[list[int]]:
    """Return the rows of a weight that form each orthogonalised matrix.

    `SMALL` has two groups of four query heads, a key and a value, of 16 rows each.
    """
    if "linear_qkv" in name:
        groups = [list(range(start, start + 96)) for start in (0, 96)]
        return [
            [row for group in groups for row in group[part]]
            for part in (slice(64), slice(64, 80), slice(80, 96))
        ]
    if "linear_fc1" in name and gate_up:
        return [list(range(32)), list(range(32, 64))]
    return [list(range(rows))]


def muon_formula(name: str, shape: torch.Size, *, gate_up: bool = False) -> torch.Tensor:
    """Return a weight after `STEPS` steps of Muon, in float64."""
    weight = initial(name, shape).double()
    momentum = torch.zeros_like(weight)
    for step in range(1, STEPS + 1):
        slope = gradient(name, shape, step).double()
        weight *= 1 - 0.01 * 0.1
        momentum = 0.95 * momentum + 0.05 * slope
        nesterov = 0.05 * slope + 0.95 * momentum
        for rows in blocks(name, shape[0], gate_up=gate_up):
            weight[rows] -= 0.01 * orthogonalized(nesterov[rows])
    return weight


def adam_formula(name: str, shape: torch.Size) -> torch.Tensor:
    """Return a weight after `STEPS` steps of Adam(0.9, 0.95, 1e-8), decoupled decay on matrices."""
    weight = initial(name, shape).double()
    first = second = torch.zeros_like(weight)
    for step in range(1, STEPS + 1):
        slope = gradient(name, shape, step).double()
        first, second = 0.9 * first + 0.1 * slope, 0.95 * second + 0.05 * slope**2
        weight *= 1 - 0.01 * (0.1 if len(shape) == 2 else 0.0)
        weight -= 0.01 * (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
    return weight


def master(outcome: Outcome, name: str) -> torch.Tensor:
    """Return a weight's FP32 master; one process holds all of it."""
    return outcome.parts[name].values["master"].view(outcome.weights[name].shape).double()


def error(outcome: Outcome, name: str, expected: torch.Tensor) -> float:
    """Return the distance from the formula, relative to the change of the weight."""
    start = initial(name, expected.shape).double()
    return float((master(outcome, name) - expected).norm() / (expected - start).norm())


def test_every_weight_follows_its_formula_in_fp32() -> None:
    """In FP32 only rounding differs; Newton-Schulz amplifies it by at most 493 (linear terms)."""
    (outcome,) = updated(1, precision="highest")
    used = {"TensorParallelMuon": muon_formula, "FusedAdam": adam_formula}
    assert {part.optimizer for part in outcome.parts.values()} == set(used)
    for name, weight in outcome.weights.items():
        expected = used[outcome.parts[name].optimizer](name, weight.shape)
        assert error(outcome, name, expected) < 493 * 2**-24, name
        assert torch.equal(weight, master(outcome, name).to(torch.bfloat16)), name


def test_bf16_newton_schulz_stays_near_the_formula() -> None:
    """By default Newton-Schulz runs in BF16: each step rounds by up to 2**-9, some three times."""
    (outcome,) = updated(1)
    errors = {
        name: error(outcome, name, muon_formula(name, outcome.weights[name].shape))
        for name, part in outcome.parts.items()
        if part.optimizer == "TensorParallelMuon"
    }
    assert max(errors.values()) < 2**-6, max(errors.items(), key=lambda item: item[1])


def test_clipping_scales_every_gradient_by_one_norm() -> None:
    """An update hardly depends on a gradient's length; the momentum does."""
    (free,), (clipped,) = updated(1), updated(1, "optimizer.clip_grad=0.01")
    shapes = {name: weight.shape for name, weight in free.weights.items()}
    norms = {
        step: math.sqrt(
            sum(
                gradient(name, shape, step).double().square().sum()
                for name, shape in shapes.items()
            )
        )
        for step in range(1, STEPS + 1)
    }
    assert all(0.01 < norm < 1 for norm in norms.values()), (
        "GRADIENT must lie between the two limits"
    )
    for name in (
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "mtp.layers.0.eh_proj.weight",
    ):
        for outcome, limit in ((free, 1.0), (clipped, 0.01)):
            momentum = torch.zeros(shapes[name], dtype=torch.float64)
            for step, norm in norms.items():
                factor = min(1.0, limit / (norm + 1e-6))
                momentum = (
                    0.95 * momentum + 0.05 * factor * gradient(name, shapes[name], step).double()
                )
            actual = outcome.parts[name].values["momentum_buffer"].view_as(momentum).double()
            assert (actual - momentum).norm() < 1e-6 * momentum.norm()


def test_options_reach_the_update() -> None:
    """Gate and up as two matrices; router and MTP projection by Adam."""
    chosen = [
        "optimizer.muon_split_gate_up=true",
        "optimizer.muon_router=false",
        "optimizer.muon_mtp_projection=false",
    ]
    (outcome,) = updated(1, *chosen, precision="highest")
    (plain,) = updated(1, precision="highest")
    for name, weight in outcome.weights.items():
        if "router" in name or "eh_proj" in name:
            assert outcome.parts[name].optimizer == "FusedAdam"
            assert error(outcome, name, adam_formula(name, weight.shape)) < 493 * 2**-24, name
        elif "linear_fc1" in name:
            assert (
                error(outcome, name, muon_formula(name, weight.shape, gate_up=True)) < 493 * 2**-24
            ), name
            assert error(outcome, name, muon_formula(name, weight.shape)) > 0.1, (
                "split or not must differ"
            )
        else:
            assert torch.equal(weight, plain.weights[name]), name


# -- against one process


@pytest.mark.parametrize(
    ("nproc", "overrides"),
    [
        (2, ()),
        (2, ("layout.ep=2",)),
        (
            2,
            ("layout.ep=2", *OVERLAPS),
        ),
        (4, ("layout.ep=2", "optimizer.muon_split_gate_up=true", "optimizer.muon_router=false")),
        (4, (EVEN, "layout.ep=2", SMALL_BUCKETS, *OVERLAPS)),
        (2, (EVEN, SMALL_BUCKETS)),
        (2, (EVEN, "layout.cp=2")),
    ],
    ids=[
        *("dp2", "ep2", "ep2_overlapped", "ep2_dp2_options"),
        *("ep2_dp2_even", "dp2_even", "cp2_even"),
    ],
)
def test_distributed_update_is_that_of_one_process(nproc: int, overrides: tuple[str, ...]) -> None:
    """Weights, masters and states, Muon's and Adam's, to the bit."""
    (alone,) = updated(
        1, *(word for word in overrides if not re.search("layout|overlap|shards|extra", word))
    )
    seen: dict[tuple[str, str], torch.Tensor] = {}
    for outcome in updated(nproc, *overrides):
        for name, weight in outcome.weights.items():
            assert torch.equal(weight, alone.weights[name]), name
        for name, part in outcome.parts.items():
            full = alone.parts[name]
            assert (part.optimizer, part.group, part.values.keys()) == (
                full.optimizer,
                full.group,
                full.values.keys(),
            )
            for key, values in part.values.items():
                covered = slice(part.start, part.start + len(values))
                assert torch.equal(values, full.values[key][covered]), (name, key)
                seen.setdefault((name, key), torch.zeros(len(full.values[key])))[covered] += 1
    # Every element of every state has one owner.
    assert seen
    assert seen.keys() == {(name, key) for name, part in alone.parts.items() for key in part.values}
    assert all(torch.all(count == 1) for count in seen.values())
