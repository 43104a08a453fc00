"""Estimate of a rank's memory before it starts. No torch: instant on a login node.

Weights, gradients and the padding of their buffers are exact: tests/planning/test_memory.py
compares them with the buffers that Megatron makes. Activations are counted tensor by tensor
(`activations`). Buffers of libraries are assumptions. What a GPU reports was never measured.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.config import Backend, Precision, Run
from mellum2_megatron.planning.activations import (
    Kept,
    Modules,
    chunked_head_size,
    head_transient,
    kept_size,
    layer_tensors,
    layer_transient,
    mask_size,
    mtp_tensors,
    norm_tensors,
    whole_head_tensors,
)
from mellum2_megatron.planning.gradient_buffers import adam_weights, buffer_elements, ownership
from mellum2_megatron.planning.rank_weights import Weight, local_weights, stage_layers

WEIGHT_BYTES = 2
"""Size of a weight, which is BF16 under FP8 compute too."""

HOTTEST_LOAD = 1.5
"""Tokens that the experts of the fullest rank get, over the mean. An assumption of ours: room for a
router that is not balanced yet. The log of a run has the figure (docs/training.md)."""

CONTEXT_BYTES = 3 * 2**29
"""CUDA's context, workspaces of matrix products, and what the driver takes of a card's memory.
1.5 GiB, an assumption."""

COMMUNICATOR_BYTES = 2**29
"""NCCL's buffers of one process group. 0.5 GiB, an assumption."""


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
        activations: tensors kept for the backward pass, at an even load of the experts or, with
            ``loss.capacity_factor``, at full ones.
        transients: what exists on top at the worst moment: logits and gradients of a head, or
            copies of tokens in a layer and its recomputed tensors.
        imbalance: room for experts that get `HOTTEST_LOAD` times the mean. 0 with one rank for all
            experts.
        buffers: CUDA's context and buffers of communication; assumptions.
    """

    parameters: int
    weights: int
    gradients: int
    padding: int
    optimizer: int
    activations: int
    transients: int
    imbalance: int
    buffers: int

    @property
    def state(self) -> int:
        """Bytes that exist from the start to the end: weights, gradients, padding, optimizer."""
        return self.weights + self.gradients + self.padding + self.optimizer

    @property
    def total(self) -> int:
        """Sum of all parts, in bytes."""
        return self.allocated[1] + self.buffers

    @property
    def allocated(self) -> tuple[int, int]:
        """Least and most bytes of torch's allocator at its peak: without buffers of libraries.

        The least has an even load and no transients, the most all of both.
        """
        least = self.state + self.activations
        return least, least + self.transients + self.imbalance


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
        activations, transients = _activations(run, stage, backend, _expert_rows(run))
        hottest = sum(_activations(run, stage, backend, _hottest_rows(run)))
        stages.append(
            Memory(
                parameters=count,
                weights=WEIGHT_BYTES * count + 2 * fp8,
                gradients=gradient * count,
                padding=(WEIGHT_BYTES + gradient) * unused,
                optimizer=8 * muon + 12 * adam,
                activations=round(activations),
                transients=round(transients),
                imbalance=round(hottest - activations - transients),
                buffers=_buffers(run, world_size),
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
    # A decoder layer has a number here. The MTP layer has none.
    return _layer_in_fp8(int(layer) if layer.isdigit() else None, precision, architecture)


def _layer_in_fp8(
    layer: int | None, precision: Precision, architecture: Mellum2Architecture
) -> bool:
    """True if a layer's products are FP8; None is the MTP layer, which follows the precision."""
    if precision.compute != "fp8":
        return False
    end = architecture.num_hidden_layers - precision.bf16_last_layers
    return layer is None or precision.bf16_first_layers <= layer < end


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


def _activations(run: Run, stage: int, backend: Backend, rows: float) -> tuple[float, float]:
    """Return the bytes that a rank of a stage keeps, and those on top of them at its peak.

    Args:
        run: the run.
        stage: pipeline stage, from 0.
        backend: backend of the modules.
        rows: tokens that the rank's experts get, for each token of the rank.
    """
    a, layout, execution = run.architecture, run.layout, run.execution
    # Sequence parallelism divides the tokens among tensor-parallel ranks too.
    tokens = run.data.sequence_length * run.schedule.micro_batch_size // (layout.cp * layout.tp)
    layers: list[int | None] = list(itertools.chain(*stage_layers(a, layout, stage)))
    last = stage == layout.pp - 1
    decoder = after = working = 0.0
    for layer in [*layers, *([None] * a.num_mtp_layers if last else [])]:
        modules = Modules.of(run, backend, fp8=_layer_in_fp8(layer, run.precision, a))
        mlp = a.mtp_mlp_type if layer is None else a.mlp_type(layer)
        kind = a.mtp_layer_types[0] if layer is None else a.layer_types[layer]
        tensors = layer_tensors(a, layout, modules, mlp, rows=rows)
        size = tokens * kept_size(tensors, execution) + mask_size(run, modules, kind)
        transient = layer_transient(a, layout, tensors, execution, mlp, rows=rows)
        if layout.overlap_expert_comm:
            # One micro-batch has gone a layer forward before the other has gone one back.
            transient += kept_size(tensors, execution)
        working = max(working, tokens * transient)
        if layer is None:
            after += size + tokens * kept_size(_around_mtp(run, backend), execution)
        else:
            decoder += size
    kept = decoder * _in_flight(run, stage) + after
    if not last:
        return kept, working
    heads = 1 + a.num_mtp_layers
    final = norm_tensors("final norm", a.hidden_size, Modules.of(run, backend, fp8=False))
    kept += tokens * kept_size(final, execution)
    chunk = run.loss.head_chunk
    if chunk is None:
        head = tokens * kept_size(whole_head_tensors(a), execution)
    else:
        head = chunked_head_size(a, layout, tokens)
    # The peak is that of a head beside the other's tensors, or that of a layer without any head's.
    running = head_transient(a, layout, tokens, chunk)
    return kept + heads * head, max(running, working - heads * head, 0.0)


def _around_mtp(run: Run, backend: Backend) -> list[Kept]:
    """Return the tensors of the MTP layer beside those of its transformer layer."""
    fp8 = run.precision.compute == "fp8" and not run.precision.bf16_mtp_projection
    return mtp_tensors(run.architecture, Modules.of(run, backend, fp8=fp8))


def _in_flight(run: Run, stage: int) -> float:
    """Return the micro-batches whose activations a stage keeps at a time, in its decoder layers.

    One forward, one backward: before the first gradient comes back, a stage starts one micro-batch
    for itself and one for each stage after it. With virtual stages it counts parts of its layers
    (megatron/core/pipeline_parallel/schedules.py:929-943, 0.19.2).
    """
    layout = run.layout
    if layout.vpp == 1:
        return layout.pp - stage
    parts = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
    return (parts + layout.overlap_expert_comm) / layout.vpp


def _expert_rows(run: Run) -> float:
    """Return the tokens of the experts of a rank, for each token that the rank has.

    Without a capacity the load is even. With one, all experts of the rank are full.
    """
    rows = float(run.architecture.num_experts_per_tok)
    if run.loss.capacity_factor is None:
        return rows
    # An expert-parallel group as a whole has no more rows than its tokens need.
    return rows * min(run.loss.capacity_factor, run.layout.ep)


def _hottest_rows(run: Run) -> float:
    """Return the tokens of the experts of the fullest rank, for each token that the rank has."""
    if run.loss.capacity_factor is not None:
        return _expert_rows(run)
    return _expert_rows(run) * min(HOTTEST_LOAD, run.layout.ep)


def _buffers(run: Run, world_size: int) -> int:
    """Return the bytes of CUDA's context and of buffers of communication."""
    a, layout = run.architecture, run.layout
    degrees = (
        layout.tp,
        layout.cp,
        layout.pp,
        layout.ep,
        layout.etp,
        layout.data_parallel(world_size),
        layout.expert_data_parallel(world_size),
    )
    size = CONTEXT_BYTES + COMMUNICATOR_BYTES * sum(ranks > 1 for ranks in degrees)
    if layout.dispatcher == "flex" and layout.ep > 1:
        # The library registers room for the tokens of all ranks, on the way there and back.
        tokens = run.data.sequence_length * run.schedule.micro_batch_size // (layout.cp * layout.tp)
        size += 2 * layout.ep * tokens * WEIGHT_BYTES * a.hidden_size
    return size
