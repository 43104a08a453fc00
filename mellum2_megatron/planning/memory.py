"""Estimate of a rank's memory before it starts. No torch: instant on a login node.

Weights, gradients and the padding of their buffers are exact: tests/planning/test_memory.py
compares them with the buffers that Megatron makes. Activations are a rough count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.config import Backend, Precision, Run
from mellum2_megatron.planning.rank_weights import (
    Weight,
    adam_weights,
    buffer_elements,
    local_weights,
    ownership,
    stage_layers,
)

WEIGHT_BYTES = 2
"""Size of a weight, which is BF16 under FP8 compute too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Memory of one rank, in bytes.

    Attributes:
        parameters: number of weights on the rank (not bytes).
        weights: BF16 weights, and the two FP8 copies (plain and transposed) that Transformer Engine
            keeps for FP8 compute.
        gradients: accumulation buffers, which are not sharded.
        padding: unused parts of the buffers of weights and gradients. They come from alignment, and
            from shares of a buffer that are all as long as the largest (docs/optimizer.md).
        optimizer: FP32 masters and states, on the rank with the most.
        activations: tensors kept for the backward pass, without recomputation, and the logits that
            exist with them; a rough count, at an even load of the experts or, with
            ``loss.capacity_factor``, at full ones.
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
    """Estimate the memory of the fullest rank: the largest of `memory_by_stage`.

    Args:
        run: a resolved run.
        world_size: number of ranks.
        backend: backend of the modules.

    Raises:
        InputError: the layout does not fit.
    """
    stages = memory_by_stage(run, world_size=world_size, backend=backend)
    return max(stages, key=lambda memory: memory.total)


def memory_by_stage(run: Run, *, world_size: int, backend: Backend = "te") -> list[Memory]:
    """Estimate the memory of a rank of each pipeline stage.

    Muon keeps master and momentum (8 bytes a weight) of a whole matrix on one of the ranks that
    hold it. Adam keeps a master and two moments (12 bytes), divided evenly. Weights gathered in FP8
    are counted as BF16. Arguments and errors as for `memory_per_rank`.
    """
    layout, model = run.layout, run.architecture
    layout.validate(model, world_size=world_size, sequence_length=run.data.sequence_length)
    tokens = run.data.sequence_length * run.schedule.micro_batch_size
    gradient = gradient_bytes(run.precision)
    stages = []
    for stage in range(layout.pp):
        weights = [
            weight
            for chunk in range(layout.vpp)
            for weight in local_weights(model, layout, backend, stage=stage, chunk=chunk)
        ]
        count = sum(weight.numel for weight in weights)
        # Under FP8 compute the BF16 weight stays as well, because ranks gather it.
        fp8 = sum(
            weight.numel for weight in weights if computes_in_fp8(weight, run.precision, model)
        )
        # Buffers are longer than the weights in them, and nothing else uses the rest.
        unused = buffer_elements(run, world_size, backend, stage=stage) - count
        adam = sum(
            math.ceil(sum(weight.numel for weight in divided) / ranks)
            for ranks, divided in adam_weights(run, world_size, backend, stage=stage)
        )
        muon = _most_owned(run, world_size, backend, stage)
        stages.append(
            Memory(
                parameters=count,
                weights=WEIGHT_BYTES * count + 2 * fp8,
                gradients=gradient * count,
                padding=(WEIGHT_BYTES + gradient) * unused,
                optimizer=8 * muon + 12 * adam,
                activations=_activations(run, stage, tokens),
            )
        )
    return stages


def gradient_bytes(precision: Precision) -> int:
    """Return the size of one accumulated gradient, in bytes."""
    return 4 if precision.grad_reduce_in_fp32 else 2


def computes_in_fp8(
    weight: Weight, precision: Precision, architecture: Mellum2Architecture
) -> bool:
    """True if the weight is multiplied in FP8: Transformer Engine then keeps two FP8 copies."""
    if precision.compute != "fp8":
        return False
    if weight.component == "mtp projection":
        return not precision.bf16_mtp_projection
    if weight.component not in ("attention", "experts", "shared expert", "dense MLP"):
        return False
    layer = weight.name.removeprefix("decoder.layers.").split(".")[0]
    # A decoder layer has a number here. The MTP layer has none: it follows precision.compute.
    if layer.isdigit():
        end = architecture.num_hidden_layers - precision.bf16_last_layers
        return precision.bf16_first_layers <= int(layer) < end
    return True


def _most_owned(run: Run, world_size: int, backend: Backend, stage: int) -> int:
    """Return the largest number of elements that Muon updates on one rank of a stage."""
    layout = run.layout
    owned = {
        owners.group: owners.elements for owners in ownership(run, world_size, backend, stage=stage)
    }
    # A rank owns matrices of both groups, at an index of its own in each. Ranks that hold other
    # parts of the same layers are numbered next to each other (layout_report.process_groups), so
    # dividing by their number gives the index.
    neighbours = {"dense": layout.tp, "experts": layout.etp * layout.ep}
    return max(
        sum(elements[rank // neighbours[group]] for group, elements in owned.items())
        for rank in range(world_size // layout.pp)
    )


def _activations(run: Run, stage: int, tokens: int) -> int:
    """Return the bytes kept for the backward pass on a rank of a pipeline stage.

    Args:
        run: the run.
        stage: pipeline stage, from 0.
        tokens: tokens of a micro-batch, before context parallelism divides them.
    """
    a, layout = run.architecture, run.layout
    # Elements kept for a token in one layer: those of attention; then input and inner activations
    # of each of its experts, or of its MLP.
    attention = _attention_elements(a)
    experts = a.hidden_size + _expert_rows(run) * (a.hidden_size + 3 * a.moe_intermediate_size)
    experts = round(experts - _not_kept(run))
    mlp = {
        "sparse": experts + 3 * (a.shared_expert_intermediate_size or 0) // layout.tp,
        "dense": 3 * a.intermediate_size // layout.tp,
    }
    # Sequence parallelism divides the tokens among tensor-parallel ranks too.
    local = tokens // (layout.cp * layout.tp)
    layers = [a.mlp_type(layer) for part in stage_layers(a, layout, stage) for layer in part]
    # One-forward-one-backward schedule: before the first gradient comes back, a stage starts one
    # micro-batch for itself and one for each stage after it.
    in_flight = layout.pp - stage
    kept = 2 * local * sum(attention + mlp[kind] for kind in layers) * in_flight
    if stage == layout.pp - 1:
        heads = 1 + a.num_mtp_layers
        chunk = run.loss.head_chunk
        if chunk is None:
            # Logits of each head in BF16 and FP32 (6 bytes).
            kept += heads * 6 * local * a.vocab_size
        else:
            # Gradients of each head's hidden states and weight in BF16. On top, while one head
            # runs: a chunk's logits in BF16 and FP32 and their gradient in BF16; and the weight's
            # gradient in FP32 beside a chunk's part of it in BF16.
            rows = a.vocab_size // layout.tp
            kept += heads * 2 * a.hidden_size * (local * layout.tp + rows)
            kept += 8 * min(chunk, local * layout.tp) * rows
            kept += 6 * rows * a.hidden_size * (chunk < local * layout.tp)
        kept += a.num_mtp_layers * 2 * local * (attention + mlp[a.mtp_mlp_type])
    return kept


def _attention_elements(a: Mellum2Architecture) -> int:
    """Return the elements that a layer's attention and norms keep of a token.

    Inputs of the norms, q/k/v before and after RoPE, attention output.
    """
    heads, (width, value) = a.num_attention_heads, a.head_widths
    kept = 3 * a.hidden_size + heads * value
    if (latent := a.latent_attention) is None:
        return kept + 2 * (heads + 2 * a.num_key_value_heads) * width
    # Latents before and after their norms; every head has keys and values of its own.
    latents = (latent.q_lora_rank or 0) + latent.kv_lora_rank + latent.qk_rope_head_dim
    return kept + 2 * latents + 2 * heads * (2 * width + value)


def _expert_rows(run: Run) -> float:
    """Return the tokens of the experts of a rank, for each token that the rank has.

    Without a capacity an even load is assumed, as nothing bounds another. With one, all experts of
    the rank are full.
    """
    rows = run.architecture.num_experts_per_tok
    if run.loss.capacity_factor is None:
        return rows
    # An expert-parallel group as a whole has no more rows than its tokens need.
    return rows * min(run.loss.capacity_factor, run.layout.ep)


def _not_kept(run: Run) -> float:
    """Return the elements of a token in one layer that are computed again or offloaded.

    Of the attention nothing is counted: a layer that attends still holds what it offloads.
    """
    a, execution = run.architecture, run.execution
    rows, inner = _expert_rows(run), a.moe_intermediate_size
    parts = {
        "input of the experts' norm": "moe" in execution.recompute
        or "layernorm" in execution.recompute
        or "mlp_norm" in execution.offload,
        "tokens as the experts got them": "moe" in execution.recompute
        or "expert_fc1" in execution.offload,
        "gate and up": "moe" in execution.recompute or "moe_act" in execution.offload,
        "their product": "moe" in execution.recompute or "moe_act" in execution.recompute,
    }
    sizes = (a.hidden_size, rows * a.hidden_size, rows * 2 * inner, rows * inner)
    return sum(size for size, gone in zip(sizes, parts.values(), strict=True) if gone)
