"""Roofline of inference: sums compared with the architecture's own counts and plain formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from mellum2_megatron.architecture import PRESETS, LatentAttention, Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.planning.gpus import GPUS, Machine, find_gpu
from mellum2_megatron.planning.latency import (
    BF16,
    CostModel,
    Workload,
    rank_correlation,
    require_context,
)
from mellum2_megatron.planning.reference_shapes import QWEN25_7B, dense_counterpart

BIG = PRESETS["mellum2-12b"]
VARIANTS = {
    "released": BIG,
    "dense": QWEN25_7B,
    "shared": PRESETS["mellum2-tiny"].replace(shared_expert_intermediate_size=64),
    "dense_in_turn": PRESETS["mellum2-tiny"].replace(mlp_layer_types=("dense", "sparse")),
}


LATENT = BIG.replace(
    latent_attention=LatentAttention(
        kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=128
    )
)


def _flops(model: Mellum2Architecture, sequences: int, new: int, past: int) -> float:
    return sum(
        count * operation.flops
        for count, operation in CostModel(model).operations(sequences, new, past)
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_a_prompt_costs_the_forward_flops_of_the_architecture(name: str) -> None:
    """All but the output head, which inference computes for one position."""
    model, length = VARIANTS[name], 300
    components = model.flops_by_component(length, mtp=False)
    head = components.pop("output head")
    expected = sum(components.values()) / 3 + head / 3 / length
    assert _flops(model, 1, length, 0) == pytest.approx(expected, rel=1e-12)
    # Token by token it is the same work, with a head for each.
    steps = sum(_flops(model, 1, 1, past) for past in range(length))
    assert steps == pytest.approx(sum(components.values()) / 3 + head / 3, rel=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_all_experts_touched_reads_every_weight_once(name: str) -> None:
    model = VARIANTS[name]
    costs = CostModel(model)
    sequences = 100_000  # so many that uniform routing leaves no expert out
    activations = _activation_bytes(costs, sequences)
    read = sum(c * o.bytes for c, o in costs.operations(sequences, 1, 1)) - activations
    matrices = sum(
        p.numel
        for p in model.parameters(mtp=False)
        if len(p.shape) == 2 and p.component != "embedding"
    )
    assert read == pytest.approx(BF16 * matrices, rel=1e-3)


def _activation_bytes(costs: CostModel, sequences: int) -> float:
    """Bytes that grow with the batch: twice the batch less once, weights being read once."""
    once, twice = (
        sum(c * o.bytes for c, o in costs.operations(n, 1, 1)) for n in (sequences, 2 * sequences)
    )
    return twice - once


def test_experts_touched_equal_a_simulation() -> None:
    costs = CostModel(BIG)
    random = np.random.default_rng(1)
    for tokens in (1, 4, 16, 64):
        drawn = [
            len({e for _ in range(tokens) for e in random.choice(64, 8, replace=False)})
            for _ in range(300)
        ]
        assert costs.touched_experts(tokens) == pytest.approx(np.mean(drawn), rel=0.02)


def test_decoding_alone_takes_the_bytes_of_the_active_weights() -> None:
    """On a machine without launches and with free arithmetic only bytes count."""
    machine = Machine(
        label="",
        memory=1e12,
        bandwidth=1e9,
        flops=math.inf,
        launch=0.0,
        source="a test",
        memory_source="a test",
    )
    active = BIG.num_active_parameters(mtp=False) - BIG.vocab_size * BIG.hidden_size
    seconds = CostModel(BIG).seconds(machine, sequences=1, new=1, past=1)
    assert seconds == pytest.approx(BF16 * active / 1e9, rel=0.01)


def test_keys_are_read_and_kept_up_to_the_window() -> None:
    costs = CostModel(BIG)
    per_token = 2 * 4 * 128 * BF16
    assert costs.key_bytes(500) == 28 * 500 * per_token
    assert costs.key_bytes(5000) == (7 * 5000 + 21 * 1024) * per_token

    def read(past: int) -> float:
        return sum(c * o.bytes for c, o in costs.operations(1, 1, past) if o.name == "attention")

    assert read(5000) - read(4000) == 7 * 1000 * per_token
    assert read(500) - read(400) == 28 * 100 * per_token


def test_latent_attention_keeps_and_reads_its_latents() -> None:
    """Decoding meets the latents themselves; a prompt makes keys and values of them."""
    costs, per_token = CostModel(LATENT), (256 + 32) * BF16
    assert costs.key_bytes(500) == 28 * 500 * per_token

    def attention(new: int, past: int, what: str) -> float:
        return sum(
            count * getattr(operation, what)
            for count, operation in costs.operations(1, new, past)
            if operation.name == "attention"
        )

    assert attention(1, 500, "bytes") - attention(1, 400, "bytes") == 28 * 100 * per_token
    more = attention(1, 500, "flops") - attention(1, 400, "flops")
    assert more == 28 * 100 * 2 * 32 * (256 + 32 + 256)
    components = LATENT.flops_by_component(300, mtp=False)
    assert attention(300, 0, "flops") == pytest.approx(components["attention scores"] / 3)
    head = components.pop("output head")
    expected = sum(components.values()) / 3 + head / 3 / 300
    assert _flops(LATENT, 1, 300, 0) == pytest.approx(expected, rel=1e-12)


def test_the_middle_step_stands_for_all() -> None:
    costs, workload = CostModel(BIG), Workload(prompt=900, output=301)
    for gpu in GPUS.values():
        for batch in (1, 64):
            every = sum(
                costs.seconds(gpu, sequences=batch, new=1, past=900 + step) for step in range(300)
            )
            middle = 300 * costs.seconds(gpu, sequences=batch, new=1, past=1050)
            assert middle == pytest.approx(every, rel=0.01)
    latency = costs.latency(GPUS["h100"], workload)
    assert latency.sync - latency.first_token == pytest.approx(
        300 * costs.seconds(GPUS["h100"], sequences=1, new=1, past=1050)
    )


def test_throughput_mode_fills_the_memory() -> None:
    costs = CostModel(BIG)
    gpu, workload = GPUS["l40s"], Workload()
    batch = costs.largest_batch(gpu, workload)
    kept = BF16 * BIG.num_parameters(mtp=False) + batch * costs.key_bytes(2304 + 256)
    assert kept <= 0.9 * gpu.memory < kept + costs.key_bytes(2304 + 256)
    assert costs.latency(gpu, workload).throughput < costs.latency(gpu, workload).sync
    deep = CostModel(BIG.replace(num_hidden_layers=96))
    assert not deep.latency(gpu, workload).fits
    assert deep.latency(gpu, workload).throughput == math.inf


def test_the_reference_has_the_published_size() -> None:
    """Qwen2.5-7B has 7,615,616,512 weights; biases go, norms of queries and keys come."""
    biases = 28 * (3584 + 2 * 512)
    assert QWEN25_7B.num_parameters() == 7_615_616_512 - biases + 28 * 2 * 128
    dense = dense_counterpart(BIG)
    for field in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim"):
        assert getattr(dense, field) == getattr(QWEN25_7B, field)
    tiny = dense_counterpart(PRESETS["mellum2-tiny"])
    assert not tiny.has_experts
    assert tiny.vocab_size == 4096


def test_rank_correlation_is_spearmans() -> None:
    random = np.random.default_rng(2)
    for _ in range(5):
        first, second = random.integers(0, 6, (2, 12)).astype(float)
        expected = scipy.stats.spearmanr(first, second).statistic
        assert rank_correlation(list(first), list(second)) == pytest.approx(expected)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'l40s'"):
        find_gpu("l40")
    with pytest.raises(InputError, match="max_position_embeddings=8192"):
        require_context(BIG, Workload(prompt=8000, output=193))
    with pytest.raises(InputError, match="--output=0"):
        Workload(output=0)
