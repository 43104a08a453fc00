"""Estimated step time: a published run of another model, sums by hand, and directions."""

from __future__ import annotations

import dataclasses

import pytest

from mellum2_megatron.architecture import LatentAttention
from mellum2_megatron.config import Run, apply_overrides
from mellum2_megatron.planning.gpus import GPUS
from mellum2_megatron.planning.step_time import RATES, StepTime, step_time
from mellum2_megatron.recipes import recipe

BIG = "mellum2_12b_pretrain_phase1_256gpu_h200_bf16"


def moonlight() -> Run:
    """Return Moonlight-16B-A3B as Megatron-Bridge trains it on 16 H100.

    Shape: config.json of moonshotai/Moonlight-16B-A3B. Settings:
    megatron/bridge/recipes/moonlight/h100/moonlight_16b.py, the 16-GPU performance recipe.
    """
    base = recipe(BIG)
    architecture = base.architecture.replace(
        vocab_size=163840,
        hidden_size=2048,
        intermediate_size=11264,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        moe_intermediate_size=1408,
        num_experts=64,
        num_experts_per_tok=6,
        shared_expert_intermediate_size=2816,
        latent_attention=LatentAttention(
            kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        layer_types=("full_attention",) * 27,
        mlp_layer_types=("dense", *("sparse",) * 26),
        sliding_window=None,
        num_mtp_layers=0,
    )
    run = dataclasses.replace(base, architecture=architecture)
    return apply_overrides(
        run,
        [
            "layout.dp=16",
            "data.sequence_length=4096",
            "layout.dispatcher=flex",
            "layout.dispatcher_backend=hybridep",
            "layout.overlap_expert_comm=true",
            "layout.delay_wgrad=true",
            "optimizer.name=adam",
            "precision.grad_reduce_in_fp32=false",
            "schedule.micro_batch_size=2",
            "schedule.batch_schedule=[[0,1024]]",
            "execution.gc_interval=5",
        ],
    )


def test_moonlights_published_rate_comes_out() -> None:
    """Published: 22,528 tokens/s and 386.6 model TFLOP/s a GPU, natural routing."""
    found = step_time(moonlight(), world_size=16, gpu=GPUS["h100"])
    assert found.flops_per_token == pytest.approx(386.6e12 / 22_528, rel=0.01)
    assert found.tflops == pytest.approx(386.6, rel=0.05)
    assert found.tokens_per_second / 16 == pytest.approx(22_528, rel=0.05)


def found(*overrides: str, name: str = BIG, ranks: int = 256) -> StepTime:
    return step_time(apply_overrides(recipe(name), overrides), world_size=ranks, gpu=GPUS["h200"])


def test_parts_are_those_of_a_sum_by_hand() -> None:
    """The 12B in BF16 on 256 H200: 16 sequences of 8,192 tokens a rank, 28 layers and MTP."""
    parts = found("optimizer.muon_dense_shards=whole").parts
    tokens, layers, hidden, width, experts = 16 * 8192, 29, 2304, 896, 8
    gemm = RATES.gemm * 989.5e12
    products = 6 * tokens * layers * experts * 3 * hidden * width
    assert parts["experts' products"] == pytest.approx(
        products * RATES.imbalance / (gemm * RATES.grouped), rel=1e-6
    )
    heads = 6 * tokens * 2 * 98_304 * hidden
    assert parts["output heads"] == pytest.approx(heads / (gemm * RATES.head), rel=1e-6)
    # Eight copies of BF16 to experts and back, in both passes; seven of eight leave the rank.
    sent = tokens * layers * experts * hidden * 2 * 4 * 7 / 8
    assert sent == pytest.approx(490e9, rel=0.01)
    assert parts["expert parallelism"] == pytest.approx(sent * RATES.imbalance / 330e9, rel=1e-6)
    # Two layers in three see a window, whose tiles cost a fifth more.
    assert 0.7 < parts["attention"] < 0.95
    # docs/optimizer.md: 16.81 GiB that nothing hides; and the embedding's gradient and weight.
    exposed = 16.81 * 2**30 + 98_304 * hidden * 6 * 255 / 256
    assert parts["data parallelism"] == pytest.approx(exposed / 45e9, rel=2e-3)
    assert sum(parts.values()) == pytest.approx(found("optimizer.muon_dense_shards=whole").seconds)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["layout.overlap_expert_comm=true"], "expert parallelism"),
        (["layout.dispatcher=flex"], "expert parallelism"),
        (["schedule.micro_batch_size=4"], "host"),
    ],
)
def test_a_faster_setting_takes_less(overrides: list[str], part: str) -> None:
    plain, fast = found(), found(*overrides)
    assert fast.parts[part] < 0.75 * plain.parts[part]
    assert fast.seconds < plain.seconds


def test_a_slower_setting_takes_more() -> None:
    plain = found()
    assert found("optimizer.muon_dense_shards=whole").seconds > plain.seconds + 0.2
    assert found("execution.recompute=moe").parts["recomputation"] > 0.5
    piped = found("layout.pp=2", "layout.dp=128")
    assert piped.parts["pipeline's bubble"] > 0
    # Half of the ranks take twice the time for the same batch.
    half = found(name=BIG.replace("256gpu", "128gpu"), ranks=128)
    assert half.seconds == pytest.approx(2 * plain.seconds, rel=0.05)


def test_fp8_gains_products_and_pays_casts() -> None:
    plain, fp8 = found(), found(name=BIG.replace("bf16", "fp8"))
    assert fp8.parts["experts' products"] < plain.parts["experts' products"]
    assert fp8.parts["FP8 casts"] > 0
    assert 0.90 < fp8.seconds / plain.seconds < 0.99
