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
EVEN = "optimizer.muon_dense_shards=even"


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
        (4, (EVEN, "optimizer.overlap_grad_reduce=true", "layout.ep=2")),
        (2, (EVEN, "layout.pp=2", "layout.vpp=2")),
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
    state = one.weights + one.gradients + one.padding + one.optimizer
    assert one.imbalance == 0  # one rank has all experts
    assert one.allocated == (state + one.activations, state + one.activations + one.transients)
    assert one.total == one.allocated[1] + one.buffers


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
    run = recipe("mellum2_12b_pretrain_phase1")
    whole = apply_overrides(run, ["optimizer.muon_dense_shards=whole"])
    even, found = (memory_per_rank(each, world_size=256) for each in (run, whole))
    dense = 29 * (2304 * (4096 + 2 * 512) + 4096 * 2304 + 64 * 2304) + 2304 * 4608
    empty = 256 * 5120 * 2304 - dense
    experts = 29 * 8 * 3 * 896 * 2304
    largest = 47_480_832  # elements of the fullest of 32 ranks: as many as 23 matrices fc2
    assert largest == 23 * 896 * 2304
    assert found.padding == 6 * (empty + 32 * largest - experts)
    # In even shares only each of three buckets is rounded up to a multiple of 256.
    assert 0 <= even.padding - 6 * (32 * largest - experts) < 3 * 6 * 256
    assert (even.optimizer, even.gradients) == (found.optimizer, found.gradients)
    assert found.optimizer < 8 * (largest + 5120 * 2304) + 12 * (2 * 226_492_416 + 200_000) / 256


def test_the_fullest_rank_owns_matrices_of_both_groups() -> None:
    """The sum of one rank's dense and expert shares, not of the largest of each."""
    from mellum2_megatron.planning.gradient_buffers import ownership
    from mellum2_megatron.planning.memory import _most_owned

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


# Bytes that one token keeps in a layer of `tests.layouts.worker.ARCHITECTURE` with te modules:
# elements, bytes of each in BF16, bytes under FP8.
KEPT = {
    "input of the first norm, its mean square": (64 + 2, 2, 2),
    "output of that norm, to project": (64, 2, 1),
    "queries and keys before their norms": (4 * 16 + 2 * 16, 2, 2),
    "mean squares of heads": (4 + 2, 4, 4),
    "queries and keys after rotation": (4 * 16 + 2 * 16, 2, 2),
    "values": (2 * 16, 2, 2),
    "output of the attention, which its projection reads": (4 * 16, 2, 2),
    "logarithms of sums": (4, 4, 4),
    "input of the second norm, its mean square": (64 + 2, 2, 2),
    "output of that norm, to route": (64, 2, 2),
    "router logits and their logarithm": (4 + 1, 4, 4),
    "map of the chosen experts": (4, 1, 1),
    "scores of the choice and of the balance": (4 + 4, 4, 4),
    "places of tokens, sent and twice received": (2 * 4 + 1 + 2 * 2, 4, 4),
    "tokens as two experts got them": (2 * 64, 2, 1),
    "gate and up in two experts": (2 * 2 * 32, 2, 2),
    "weights of two experts": (2, 4, 4),
    "product in two experts": (2 * 32, 2, 1),
}
BF16_LAYER = sum(count * size for count, size, _ in KEPT.values())
FP8_LAYER = sum(count * size for count, _, size in KEPT.values())


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
@pytest.mark.parametrize("compute", ["bf16", "fp8"])
def test_activations_are_those_of_a_count_by_hand(
    layout: Layout, ranks: int, tokens: int, compute: str
) -> None:
    """Two of four layers a stage; the first has two micro-batches in flight."""
    run = run_with(
        ARCHITECTURE,
        layout,
        "schedule.micro_batch_size=2",
        "loss.head_chunk=null",
        f"precision.compute={compute}",
    )
    first, last = memory_by_stage(run, world_size=ranks)
    layer = tokens * (FP8_LAYER if compute == "fp8" else BF16_LAYER)
    assert first.activations == 2 * 2 * layer
    around = 4 * (2 * 64 + 4) + (1 if compute == "fp8" else 2) * 128  # four norms, a projection
    heads = 2 * (2 * 64 + 4 * 96 + 9)  # input, softmax, label
    assert last.activations == 2 * layer + layer + tokens * (around + heads)


def test_layers_and_projections_in_bf16_keep_bf16() -> None:
    """The first layer and the MTP projection of an FP8 run."""

    def kept(*overrides: str) -> int:
        run = run_with(ARCHITECTURE, Layout(), "precision.compute=fp8", *overrides)
        return memory_per_rank(run, world_size=1).activations

    assert kept("precision.bf16_first_layers=1") - kept() == 256 * (BF16_LAYER - FP8_LAYER)
    assert kept("precision.bf16_mtp_projection=true") - kept() == 256 * 128


# Parts of KEPT that go, in BF16 and under FP8, in each of five layers.
FREED = {
    "recompute=moe_act": (2 * 32 * 2, 2 * 32),
    "recompute=layernorm": (64 * 2, 64 * 2),
    "recompute=moe": (
        5 * 4 + 4 + 8 * 4 + 13 * 4 + 2 * 64 * 2 + 2 * 2 * 32 * 2 + 2 * 4 + 2 * 32 * 2,
        5 * 4 + 4 + 8 * 4 + 13 * 4 + 2 * 64 + 2 * 2 * 32 * 2 + 2 * 4 + 2 * 32,
    ),
    "offload=expert_fc1": (2 * 64 * 2, 2 * 64),
    "offload=moe_act": (2 * 2 * 32 * 2, 2 * 2 * 32 * 2),
    "offload=core_attn": ((96 + 32) * 2, (96 + 32) * 2),
    "offload=core_attn,attn_proj": ((96 + 32 + 64) * 2, (96 + 32 + 64) * 2),
    "offload=qkv_linear": (64 * 2, 64),
    "offload=mlp_norm": (64 * 2, 64 * 2),
}


@pytest.mark.parametrize("word", FREED)
@pytest.mark.parametrize("compute", ["bf16", "fp8"])
def test_what_is_computed_again_or_offloaded_is_not_kept(word: str, compute: str) -> None:
    kept, less = (
        memory_per_rank(
            run_with(ARCHITECTURE, Layout(), f"precision.compute={compute}", *words), world_size=1
        )
        for words in ((), (f"execution.{word}",))
    )
    freed = FREED[word][compute == "fp8"]
    assert kept.activations - less.activations == 256 * 5 * freed
    # What comes back exists for one layer at least.
    assert less.transients >= min(kept.transients, 256 * freed)


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
        )[0]
        for value in ("null", capacity)
    )
    layers, tokens, row = 4 + 1, 512, 2 * (64 + 3 * 32) + 4 + 2 * 4
    assert full.activations - even.activations == tokens * layers * 2 * row * (factor - 1)
    assert full.imbalance == 0
    parts = (even.activations, even.transients, even.imbalance, even.buffers)
    assert even.total == even.state + sum(parts)
    # Without a capacity: room for half as much again, in all layers.
    assert (even.imbalance >= tokens * layers * 2 * row / 2) is (ep > 1)
    assert even.imbalance < 1.2 * tokens * (layers + 1) * 2 * row / 2


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
        )[0]
        for size in ("null", chunk)
    )
    # Gradients of hidden states and weight, and the tokens' weights, of two heads.
    kept = 2 * (2 * (512 * 64 + 48 * 64) + 4 * 512)
    assert whole.activations - chunked.activations == 2 * 256 * (2 * 64 + 4 * 96 + 9) - kept


def test_buffers_grow_with_the_ways_to_communicate() -> None:
    one, many = memory(BIG, Layout(), 1), memory(BIG, Layout(ep=8), 16)
    # Expert parallelism, data parallelism and that of the experts.
    assert many.buffers - one.buffers == 3 * 2**29
    flex = memory(BIG, Layout(ep=8, dispatcher="flex"), 16)
    assert flex.buffers - many.buffers == 2 * 8 * 256 * 2 * 2304


def test_memory_refuses_a_misfit() -> None:
    with pytest.raises(InputError, match=r"layout.ep=3"):
        memory(BIG, Layout(ep=3), 3)
