"""Memory of a rank: buffers compared with Megatron's, and figures computed by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Layout, apply_overrides
from mellum2_megatron.planning.memory import Memory, memory_by_stage, memory_per_rank
from mellum2_megatron.recipes import recipe
from tests import parameter_id
from tests.distributed import run_distributed
from tests.layouts.worker import ARCHITECTURE
from tests.model.test_muon import run_of

BIG = Mellum2Architecture.preset("mellum2-12b")
TINY = Mellum2Architecture.preset("mellum2-tiny")
TP = ("layout.tp=2", "layout.sp=true")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("nproc", "overrides"),
    [
        (1, ()),
        (2, ("optimizer.overlap_grad_reduce=true",)),
        (2, ("optimizer.name=adam", "precision.grad_reduce_in_fp32=false")),
        (2, ("layout.pp=2", "layout.vpp=2")),
        (2, ("layout.etp=2", "optimizer.muon_router=false")),
        (4, (*TP, "layout.ep=2")),
        # An odd vocabulary: the bucket of the shared embedding changes the padding.
        (4, ("layout.pp=2", "layout.ep=2", "architecture.vocab_size=97")),
        (4, ("layout.cp=2", "optimizer.name=adam", "layout.ep=2")),
    ],
    ids=parameter_id,
)
def test_buffers_are_those_that_megatron_makes(nproc: int, overrides: tuple[str, ...]) -> None:
    run = run_of(*overrides)
    stages = memory_by_stage(run, world_size=nproc, backend="torch")
    ranks = run_distributed("tests.model.optimizer_worker:buffer_bytes", nproc, run)
    for rank, (parameters, size) in enumerate(ranks):
        estimate = stages[rank * run.layout.pp // nproc]
        assert (estimate.parameters, estimate.weights + estimate.gradients + estimate.padding) == (
            parameters,
            size,
        )


def memory(
    architecture: Mellum2Architecture, layout: Layout, world_size: int, *overrides: str
) -> Memory:
    return memory_per_rank(run_with(architecture, layout, *overrides), world_size=world_size)


def run_with(architecture: Mellum2Architecture, layout: Layout, *overrides: str) -> Any:
    run = dataclasses.replace(
        recipe("mellum2_tiny_pretrain"), architecture=architecture, layout=layout
    )
    return apply_overrides(
        run, ["data.sequence_length=256", "schedule.micro_batch_size=1", *overrides]
    )


def test_memory_of_one_rank_is_the_whole_model() -> None:
    one = memory(BIG, Layout(), 1)
    assert one.parameters == 12_578_294_528
    assert one.weights == 2 * one.parameters
    assert one.gradients == 4 * one.parameters
    assert one.padding == 0  # all sizes of the 12B are multiples of 128
    embeddings = 2 * 226_492_416
    norms = 29 * (2 * 2304 + 2 * 128) + 2304 + 3 * 2304
    assert one.optimizer == 8 * (one.parameters - embeddings - norms) + 12 * (embeddings + norms)
    adam = memory(BIG, Layout(), 1, "optimizer.name=adam")
    assert adam.optimizer == 12 * one.parameters
    assert one.total == one.weights + one.gradients + one.padding + one.optimizer + one.activations


def test_memory_divides_what_the_layout_divides() -> None:
    # EP 8 leaves 8 of 64 experts, as many as a token activates: the report's 2.52B active
    # parameters.
    shared = memory(BIG, Layout(ep=8), 256)
    assert shared.parameters == 2_520_615_680
    expert_matrices = 29 * 8 * 3 * 896 * 2304
    dense_matrices = 29 * (2304 * (4096 + 2 * 512) + 4096 * 2304 + 64 * 2304) + 2304 * 4608
    halves = [memory(BIG, Layout(ep=8, pp=2), 16), memory(BIG, Layout(ep=8), 16)]
    assert halves[0].parameters < halves[1].parameters
    tensor = memory(BIG, Layout(tp=2, sp=True), 2)
    qkv_and_output = 29 * 2304 * (2 * 4096 + 2 * 512)
    assert (
        tensor.parameters == 12_578_294_528 - (qkv_and_output + 2 * 226_492_416 + 2304 * 4608) // 2
    )
    plain, fp8 = memory(BIG, Layout(ep=8), 8), memory(BIG, Layout(ep=8), 8, "precision.compute=fp8")
    in_fp8 = expert_matrices + dense_matrices - 29 * 64 * 2304
    assert fp8.weights - plain.weights == 2 * in_fp8
    ends = [
        "precision.compute=fp8",
        "precision.bf16_first_layers=1",
        "precision.bf16_last_layers=2",
    ]
    layer = (in_fp8 - 2304 * 4608) // 29
    assert memory(BIG, Layout(ep=8), 8, *ends).weights - plain.weights == 2 * (in_fp8 - 3 * layer)
    projection = memory(
        BIG, Layout(ep=8), 8, "precision.compute=fp8", "precision.bf16_mtp_projection=true"
    )
    assert fp8.weights - projection.weights == 2 * 2304 * 4608


def test_at_256_ranks_most_of_the_dense_buffer_is_empty() -> None:
    """88 dense matrices on 256 ranks: each share is as long as the largest matrix, fused QKV."""
    found = memory_per_rank(recipe("mellum2_12b_pretrain_phase1"), world_size=256)
    dense = 29 * (2304 * (4096 + 2 * 512) + 4096 * 2304 + 64 * 2304) + 2304 * 4608
    empty = 256 * 5120 * 2304 - dense
    experts = 29 * 8 * 3 * 896 * 2304
    largest = 47_480_832  # elements of the fullest of 32 ranks: as many as 23 matrices fc2
    assert largest == 23 * 896 * 2304
    assert found.padding == 6 * (empty + 32 * largest - experts)
    assert found.optimizer < 8 * (largest + 5120 * 2304) + 12 * (2 * 226_492_416 + 200_000) / 256


def test_the_fullest_rank_owns_matrices_of_both_groups() -> None:
    """The sum of one rank's dense and expert shares, not of the largest of each."""
    from mellum2_megatron.planning.memory import _most_owned
    from mellum2_megatron.planning.rank_weights import ownership

    run = run_with(BIG, Layout(ep=4, tp=2, sp=True))
    dense, experts = ownership(run, 64, "te")
    assert (len(dense.owned), len(experts.owned)) == (32, 16)
    # Megatron's order of ranks: tp, then dp; and etp, ep, then expert dp.
    pairs = [(rank // 2, rank // 4) for rank in range(64)]
    expected = max(dense.elements[one] + experts.elements[other] for one, other in pairs)
    assert _most_owned(run, 64, "te", 0) == expected


def test_memory_of_a_pipeline_covers_every_parameter() -> None:
    """Summed over stages each weight counts once, and the embedding twice for the MTP layer."""
    for layout in (Layout(pp=2), Layout(pp=4), Layout(pp=2, vpp=2)):
        stages = memory_by_stage(run_with(TINY, layout), world_size=layout.pp)
        held = sum(stage.parameters for stage in stages)
        assert held == TINY.num_parameters() + TINY.vocab_size * TINY.hidden_size


# Elements that one token keeps in a layer of `tests.layouts.worker.ARCHITECTURE`.
KEPT = {
    "input of the attention's norm": 64,
    "output of that norm": 64,
    "queries before and after rotation": 2 * 4 * 16,
    "keys before and after rotation": 2 * 2 * 16,
    "values, twice": 2 * 2 * 16,
    "output of the attention": 4 * 16,
    "input of the experts' norm": 64,
    "output of that norm, to route": 64,
    "tokens as two experts got them": 2 * 64,
    "gate, up and product in two experts": 2 * 3 * 32,
}


@pytest.mark.parametrize(
    ("layout", "ranks", "tokens"),
    [
        (Layout(pp=2), 2, 512),
        (Layout(pp=2, tp=2, sp=True), 4, 256),
        (Layout(pp=2, cp=2), 4, 256),
        (Layout(pp=2, tp=2, sp=True, cp=2), 8, 128),
    ],
    ids=["pp2", "pp2_tp2", "pp2_cp2", "pp2_tp2_cp2"],
)
def test_activations_are_those_of_a_count_by_hand(layout: Layout, ranks: int, tokens: int) -> None:
    """Two of four layers a stage; the first has two micro-batches in flight."""
    changes = ("schedule.micro_batch_size=2", "loss.head_chunk=null")
    run = run_with(ARCHITECTURE, layout, *changes)
    first, last = memory_by_stage(run, world_size=ranks)
    layer = 2 * tokens * sum(KEPT.values())
    assert first.activations == 2 * 2 * layer
    logits = 2 * tokens * 96 * (2 + 4)  # of two heads, in BF16 and in FP32
    assert last.activations == 2 * layer + layer + logits


@pytest.mark.parametrize(
    ("capacity", "ep", "factor"), [(1.25, 2, 1.25), (1.25, 1, 1), (4.0, 2, 2), (0.5, 1, 0.5)]
)
def test_experts_with_a_capacity_are_full(capacity: float, ep: int, factor: float) -> None:
    """A rank's experts hold no more than its expert-parallel group has."""
    even, full = (
        memory_by_stage(
            run_with(
                ARCHITECTURE,
                Layout(ep=ep),
                "schedule.micro_batch_size=2",
                f"loss.capacity_factor={value}",
            ),
            world_size=ep,
        )[0].activations
        for value in ("null", capacity)
    )
    layers, tokens, rows = 4 + 1, 512, 2 * (64 + 3 * 32)
    assert full - even == 2 * tokens * layers * rows * (factor - 1)


@pytest.mark.parametrize("chunk", [100, 512])
def test_chunked_heads_keep_no_logits(chunk: int) -> None:
    """512 tokens on each of two tensor-parallel ranks, with half of the vocabulary each."""
    layout = Layout(tp=2, sp=True)
    whole, chunked = (
        memory_by_stage(
            run_with(
                ARCHITECTURE, layout, "schedule.micro_batch_size=2", f"loss.head_chunk={size}"
            ),
            world_size=2,
        )[0].activations
        for size in ("null", chunk)
    )
    kept = 2 * (512 * 64 + 48 * 64) * 2  # gradients of hidden states and weight, of two heads
    running = chunk * 48 * (2 + 4 + 2) + (chunk == 100) * 48 * 64 * (4 + 2)
    assert whole - chunked == 2 * 256 * 96 * (2 + 4) - kept - running


def test_memory_refuses_a_misfit() -> None:
    with pytest.raises(InputError, match=r"layout.ep=3"):
        memory(BIG, Layout(ep=3), 3)
