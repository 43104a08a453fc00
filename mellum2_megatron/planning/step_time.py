"""Estimated time of a training step on Hopper GPUs, by part. No torch.

Each part is a number of operations or bytes over a rate that can be had (`RATES`). One rate is
fitted so that the published run of Moonlight-16B-A3B comes out, 387 model TFLOP/s on 16 H100 with
natural routing (`tests/planning/test_step_time.py`); the others have their source, or are named as
assumptions. So an absolute time is a guess, and only a difference of more than 5% between two
settings means something. No GPU of this project has measured any of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from mellum2_megatron.common.console import plain_table
from mellum2_megatron.config import Run
from mellum2_megatron.planning.dense_shards import dense_shards
from mellum2_megatron.planning.gpus import Machine
from mellum2_megatron.planning.layout_report import layout_report
from mellum2_megatron.planning.memory import WEIGHT_BYTES, gradient_bytes

NODE = 8
"""GPUs that NVLink joins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Rates that training kernels reach on H100 and H200.

    Attributes:
        gemm: share of the dense BF16 peak that large products reach inside a long step. Fitted:
            Moonlight's published run comes out with it. cuBLAS alone reaches 0.80 on a cool card.
        grouped: share of ``gemm`` in the experts' grouped products.
        fp8: FLOP/s of large FP8 products over those in BF16; 1,250 over 790 TFLOP/s.
        grouped_fp8: share of FP8's rate in grouped products as wide as these experts.
        head: share of ``gemm`` in the output heads, whose results are large.
        attention_forward, attention_backward: shares of the BF16 peak in flash attention; 550 and
            400 TFLOP/s (FlashAttention-3).
        window: time of a sliding layer's tiles over that of a full layer's, for each visible pair.
        memory: share of the memory's bandwidth in kernels that only move data.
        nvlink: bytes a second that NCCL's all-to-all sends inside a node.
        hybridep: the same with HybridEP or DeepEP.
        network: bytes a second that a GPU sends to other nodes, at 400 Gbit/s.
        imbalance: tokens of the fullest expert rank over the mean, natural routing.
        overlap: share of the exchange hidden by `layout.overlap_expert_comm`; an assumption.
        overlap_wgrad: the same with `layout.delay_wgrad`; an assumption.
        launch, launch_fp8: seconds that the host holds up a rank, for each layer and micro-batch;
            assumptions.
        launch_overlapped: part of them that is left where exchanges overlap; an assumption.
    """

    gemm: float = 0.59
    grouped: float = 0.80
    fp8: float = 1.58
    grouped_fp8: float = 0.62
    head: float = 0.85
    attention_forward: float = 0.556
    attention_backward: float = 0.404
    window: float = 1.2
    memory: float = 0.83
    nvlink: float = 330e9
    hybridep: float = 300e9
    network: float = 45e9
    imbalance: float = 1.10
    overlap: float = 0.60
    overlap_wgrad: float = 0.75
    launch: float = 1.3e-3
    launch_fp8: float = 2.0e-3
    launch_overlapped: float = 0.25


RATES = Rates()
"""Rates of the estimate."""

CARDS = ("h100", "h200")
"""Cards, by the names of `gpus.GPUS`, for which the rates hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Estimate of a step.

    Attributes:
        parts: seconds of each part, in the order of a step's work.
        tokens: tokens of the step, all ranks together.
        flops_per_token: model FLOPs of a token, forward and backward.
        ranks: number of ranks.
    """

    parts: dict[str, float]
    tokens: int
    flops_per_token: float
    ranks: int

    @property
    def seconds(self) -> float:
        """Time of the step, seconds."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of all ranks together."""
        return self.tokens / self.seconds

    @property
    def tflops(self) -> float:
        """Model TFLOP/s of a rank."""
        return self.tokens_per_second * self.flops_per_token / self.ranks / 1e12


def step_time(run: Run, *, world_size: int, gpu: Machine, rates: Rates = RATES) -> StepTime:
    """Return the estimate of a step of the final batch size, for the slowest pipeline stage.

    Args:
        run: a resolved run.
        world_size: number of ranks.
        gpu: card of each rank, one of `CARDS`.
        rates: rates to assume, default `RATES`.

    Raises:
        InputError: the layout does not fit.
    """
    layout, model, length = run.layout, run.architecture, run.data.sequence_length
    report = layout_report(run, world_size=world_size)
    stages = report["stages"]
    stage = max(range(layout.pp), key=lambda index: float(stages[index]["flops_share"]))
    # The slowest stage's part of all that layers do, over the ranks that share a token.
    share = stages[stage]["flops_share"] / layout.tp
    tokens = run.schedule.final_batch_size * length // layout.data_parallel(world_size) // layout.cp
    parts = _computed(run, gpu, rates, tokens * share)
    parts |= _exchanged(run, rates, stages[stage]["sent"])
    parts["data parallelism"] = _data_parallel(
        run, world_size, stage, rates, sent=stages[stage]["sent"]["dp"]
    )
    layers = (model.num_hidden_layers + model.num_mtp_layers) * stages[stage]["flops_share"]
    fp8 = run.precision.compute == "fp8"
    parts["host"] = (
        layers
        * report["micro_batches"]
        * (rates.launch_fp8 if fp8 else rates.launch)
        * (rates.launch_overlapped if layout.overlap_expert_comm else 1.0)
    )
    parts |= _repeated(run, parts)
    if layout.pp > 1:
        busy = sum(parts.values())
        parts["pipeline's bubble"] = busy * (layout.pp - 1) / (layout.vpp * report["micro_batches"])
    return StepTime(
        parts={name: seconds for name, seconds in parts.items() if seconds},
        tokens=run.schedule.final_batch_size * length,
        flops_per_token=model.flops_per_token(length),
        ranks=world_size,
    )


def _computed(run: Run, gpu: Machine, rates: Rates, tokens: float) -> dict[str, float]:
    """Return the seconds of a rank's products and of kernels that only move data.

    Args:
        run: a resolved run.
        gpu: card.
        rates: rates to assume.
        tokens: tokens of a step whose whole model the rank would compute in its time.
    """
    model, length = run.architecture, run.data.sequence_length
    flops = {
        name: count / length * tokens for name, count in model.flops_by_component(length).items()
    }
    experts = flops.pop("experts", 0.0) * rates.imbalance
    head, scores = flops.pop("output head"), flops.pop("attention scores")
    fp8 = run.precision.compute == "fp8"
    gemm = rates.gemm * gpu.flops
    dense = gemm * (rates.fp8 if fp8 else 1.0)
    # One third forward; a sliding layer's tiles hold pairs outside of the window.
    pairs = {
        kind: model.visible_pairs(kind, length)
        for kind in {*model.layer_types, *model.mtp_layer_types}
    }
    layers = [*model.layer_types, *model.mtp_layer_types]
    windowed = sum(pairs[kind] for kind in layers if kind == "sliding_attention")
    tiles = 1 + (rates.window - 1) * windowed / sum(pairs[kind] for kind in layers)
    attention = scores * tiles / gpu.flops
    moved = rates.memory * gpu.bandwidth
    sparse = sum(model.mlp_type(layer) == "sparse" for layer in range(model.num_hidden_layers))
    sparse += (model.mtp_mlp_type == "sparse") * model.num_mtp_layers
    hidden, width = model.hidden_size, model.moe_intermediate_size
    copies = tokens * sparse * model.num_experts_per_tok * rates.imbalance
    parts = {
        "experts' products": experts / (dense * (rates.grouped_fp8 if fp8 else rates.grouped)),
        "attention": attention / 3 / rates.attention_forward
        + attention * 2 / 3 / rates.attention_backward,
        "other products": sum(flops.values()) / dense,
        "output heads": head / (gemm * rates.head),
        # Each copy is permuted twice and put back twice, read and written, in both passes; SwiGLU
        # reads two halves and writes one, and backward reads three and writes two.
        "permutation, SwiGLU": copies * 2 * (8 * hidden + 8 * width) / moved,
        # Norms and residual sums of a layer, both passes; logits of a head six times in FP32.
        "norms, losses": tokens
        * (len(layers) * 2 * 16 * hidden + (1 + model.num_mtp_layers) * 6 * 4 * model.vocab_size)
        / moved,
    }
    if fp8:
        # Inputs and gradients of each product are read in BF16 and written in FP8.
        queries = model.num_attention_heads * sum(model.head_widths) // 2
        dense_elements = tokens * len(layers) * 2 * (hidden + queries)
        parts["FP8 casts"] = 3 * (copies * (2 * hidden + 3 * width) + dense_elements) / moved
    return parts


def _exchanged(run: Run, rates: Rates, sent: dict[str, int]) -> dict[str, float]:
    """Return the seconds of exchanges between the ranks of one model that nothing hides."""
    layout, model = run.layout, run.architecture
    exchange = float(sent["ep"]) * rates.imbalance
    inside = rates.nvlink
    if layout.dispatcher == "flex":
        exchange *= copies_by_rank(model.num_experts, model.num_experts_per_tok, layout.ep)
        inside = rates.hybridep
    reach = layout.ep * layout.etp
    outside = max(0.0, (reach - NODE) / (reach - 1)) if reach > 1 else 0.0
    seconds = exchange * ((1 - outside) / inside + outside / rates.network)
    if layout.overlap_expert_comm:
        seconds *= 1 - (rates.overlap_wgrad if layout.delay_wgrad else rates.overlap)
    context = rates.nvlink if layout.tp * layout.cp <= NODE else rates.network
    return {
        "expert parallelism": seconds,
        "tensor parallelism": sent["tp"] / rates.nvlink,
        "context parallelism": sent["cp"] / context,
    }


def copies_by_rank(experts: int, chosen: int, ranks: int) -> float:
    """Return the messages of a token that goes once to each rank, over one to each of its experts.

    >>> round(copies_by_rank(64, 8, 8) * 7, 2)  # of seven remote copies
    4.76

    Args:
        experts: number of experts.
        chosen: experts of a token, even routing.
        ranks: expert-parallel ranks, which divide the experts.
    """
    missed = math.comb(experts - experts // ranks, chosen) / math.comb(experts, chosen)
    return ranks * (1 - missed) / chosen


def _data_parallel(run: Run, world_size: int, stage: int, rates: Rates, *, sent: float) -> float:
    """Return the seconds of gradients reduced and weights gathered that nothing hides.

    Dense Muon matrices as `dense_shards` counts them. Of the rest only the embedding, whose
    gradient is the last and whose weight is the first. Without overlap all of ``sent``, the bytes
    that a rank of the stage sends for it in a step.
    """
    layout, model = run.layout, run.architecture
    ranks = layout.data_parallel(world_size) * layout.cp
    if ranks == 1:
        return 0.0
    width = gradient_bytes(run.precision) + WEIGHT_BYTES
    exposed = 0.0
    if run.optimizer.name == "muon":
        exposed += dense_shards(run, world_size, stage=stage).exposed
    if run.optimizer.overlap_grad_reduce and run.optimizer.overlap_param_gather:
        exposed += model.vocab_size * model.hidden_size / layout.tp * width * (ranks - 1) / ranks
    else:
        exposed = max(exposed, sent)
    return exposed / (rates.nvlink if world_size <= NODE else rates.network)


def _repeated(run: Run, parts: dict[str, float]) -> dict[str, float]:
    """Return the seconds of what the backward pass computes again (`execution.recompute`).

    The whole expert layer again is its forward pass: a third of its products and half of its
    exchange. The smaller ones by Megatron-Bridge's measurements on H100: 2.0% of a step for
    ``moe_act``, 8.8% for ``layernorm``.
    """
    again = set(run.execution.recompute)
    total = sum(parts.values())
    seconds = 0.0
    if "moe" in again:
        seconds += parts["experts' products"] / 3 + parts["permutation, SwiGLU"] / 2
        seconds += parts["expert parallelism"] / 2
    if "moe_act" in again:
        seconds += 0.020 * total
    if "layernorm" in again:
        seconds += 0.088 * total
    return {"recomputation": seconds}


def step_report(found: StepTime) -> dict[str, Any]:
    """Return an estimate as JSON types: ``parts`` in seconds, and what follows from them."""
    return {
        "parts": found.parts,
        "seconds": found.seconds,
        "tokens_per_second": found.tokens_per_second,
        "tflops": found.tflops,
    }


def render_step(found: StepTime, *, gpu: Machine) -> Table:
    """Return an estimate as a table of its parts, longest first."""
    table = plain_table(
        title=f"Step of {found.tokens:,} tokens on {found.ranks} {gpu.label} "
        f"({found.tflops:,.0f} model TFLOP/s a rank; estimated, not measured)"
    )
    for column in ("part", "seconds", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, seconds in sorted(found.parts.items(), key=lambda part: -part[1]):
        table.add_row(name, f"{seconds:,.3f}", f"{seconds / found.seconds:.0%}")
    table.add_row("all", f"{found.seconds:,.3f}", "")
    return table
