"""What a rank holds in its memory, before it is started. No torch: instant on a login node.

Weights, gradients and the padding of their buffers follow from the layout exactly: they are held
against the buffers that Megatron makes (tests/planning/test_memory.py). Activations are a rough
count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.config import Backend, Layout, Precision, Run
from mellum2_megatron.planning.rank_weights import (
    Weight,
    adam_weights,
    buffer_elements,
    local_weights,
    ownership,
)

WEIGHT_BYTES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """What one rank holds, in bytes.

    Attributes:
        parameters: number of weights on the rank.
        weights: BF16 copies, plus the FP8 ones (plain and transposed) that Transformer Engine keeps
            for FP8 compute.
        gradients: the accumulation buffers; they are not sharded.
        padding: of the buffers of weights and gradients: what stays empty because every
            data-parallel rank's share is as long as the largest (docs/optimizer.md), and what
            aligns weights and buckets.
        optimizer: FP32 masters and states of the rank that has most.
        activations: what the backward pass needs, without recomputation. A rough count of the
            tensors kept.
    """

    parameters: int
    weights: int
    gradients: int
    padding: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of the five parts, in bytes."""
        return self.weights + self.gradients + self.padding + self.optimizer + self.activations


def memory_per_rank(run: Run, *, world_size: int, backend: Backend = "te") -> Memory:
    """Estimate the memory of the fullest rank: the largest of `memory_by_stage`."""
    return max(
        memory_by_stage(run, world_size=world_size, backend=backend),
        key=lambda estimate: estimate.total,
    )


def memory_by_stage(run: Run, *, world_size: int, backend: Backend = "te") -> list[Memory]:
    """Estimate the memory of a rank of each pipeline stage.

    Muon keeps master and momentum (8 bytes a weight) of whole matrices, each on one of the ranks
    that hold the same ones; Adam keeps a master and two moments (12 bytes), divided evenly. Weights
    gathered in FP8 are counted as BF16.

    Raises:
        InputError: the layout does not fit.
    """
    run.layout.validate(
        run.architecture, world_size=world_size, sequence_length=run.data.sequence_length
    )
    return [_stage(run, world_size, backend, stage) for stage in range(run.layout.pp)]


def _stage(run: Run, world_size: int, backend: Backend, stage: int) -> Memory:
    layout, model = run.layout, run.architecture
    held = [
        weight
        for chunk in range(layout.vpp)
        for weight in local_weights(model, layout, backend, stage=stage, chunk=chunk)
    ]
    count = sum(weight.numel for weight in held)
    fp8 = sum(weight.numel for weight in held if computes_in_fp8(weight, run.precision, model))
    gradient = gradient_bytes(run.precision)
    empty = buffer_elements(run, world_size, backend, stage=stage) - count
    return Memory(
        parameters=count,
        weights=WEIGHT_BYTES * count + 2 * fp8,
        gradients=gradient * count,
        padding=(WEIGHT_BYTES + gradient) * empty,
        optimizer=8 * _most_owned(run, world_size, backend, stage)
        + 12 * _adam_share(run, world_size, backend, stage),
        activations=_activations(
            model, layout, stage, run.data.sequence_length * run.schedule.micro_batch_size
        ),
    )


def gradient_bytes(precision: Precision) -> int:
    """Return the bytes of an accumulated gradient."""
    return 4 if precision.grad_reduce_in_fp32 else 2


def computes_in_fp8(
    weight: Weight, precision: Precision, architecture: Mellum2Architecture
) -> bool:
    """Whether the weight's products take FP8 inputs, of which Transformer Engine then keeps two
    copies."""
    if precision.compute != "fp8" or weight.component not in (
        "attention",
        "experts",
        "mtp projection",
    ):
        return False
    if weight.component == "mtp projection":
        return not precision.bf16_mtp_projection
    layer = weight.name.removeprefix("decoder.layers.").split(".")[0]
    if layer.isdigit():  # of the decoder
        end = architecture.num_hidden_layers - precision.bf16_last_layers
        return precision.bf16_first_layers <= int(layer) < end
    return True


def _most_owned(run: Run, world_size: int, backend: Backend, stage: int) -> int:
    """Return the elements of the matrices that Muon updates on the rank that has most of them."""
    layout = run.layout
    owned = {each.group: each.elements for each in ownership(run, world_size, backend, stage=stage)}
    # Tensor-parallel ranks are neighbours, and so are the ranks with different experts
    # (layout_report.process_groups).
    neighbours = {"dense": layout.tp, "experts": layout.etp * layout.ep}
    return max(
        sum(elements[rank // neighbours[group]] for group, elements in owned.items())
        for rank in range(world_size // layout.pp)
    )


def _adam_share(run: Run, world_size: int, backend: Backend, stage: int) -> int:
    """Return the elements that Adam updates on a rank."""
    return sum(
        math.ceil(sum(weight.numel for weight in weights) / ranks)
        for ranks, weights in adam_weights(run, world_size, backend, stage=stage)
    )


def _activations(architecture: Mellum2Architecture, layout: Layout, stage: int, tokens: int) -> int:
    """Return the bytes that the backward pass of ``tokens`` tokens needs on a rank of pipeline
    stage ``stage``."""
    a = architecture
    queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    attention = (
        3 * a.hidden_size + 2 * (queries + 2 * keys) + queries
    )  # two norms' inputs, q/k/v before and after RoPE
    experts = a.hidden_size + a.num_experts_per_tok * (a.hidden_size + 3 * a.moe_intermediate_size)
    local = tokens // (layout.cp * layout.tp)
    layers = a.num_hidden_layers // layout.pp
    in_flight = min(
        layout.pp, layout.pp - stage
    )  # one-forward-one-backward keeps that many micro-batches
    kept = 2 * local * (attention + experts) * layers * in_flight
    if stage == layout.pp - 1:
        heads = 1 + a.num_mtp_layers
        kept += heads * 6 * local * a.vocab_size + a.num_mtp_layers * 2 * local * (
            attention + experts
        )  # BF16 and FP32
    return kept
