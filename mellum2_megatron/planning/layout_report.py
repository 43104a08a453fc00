"""Consequences of a layout: process groups, load of each pipeline stage, bytes that ranks send.

No torch: instant on a login node. Bytes follow from the algorithms alone: to gather or
reduce-scatter a buffer of S bytes, each of n ranks sends S (n - 1) / n, as in a ring.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

from rich.table import Table

from mellum2_megatron.architecture import LayerType, Mellum2Architecture
from mellum2_megatron.common.console import plain_table
from mellum2_megatron.config import Layout, Run
from mellum2_megatron.config.layout import pipeline_stages
from mellum2_megatron.planning.gradient_buffers import adam_weights, ownership
from mellum2_megatron.planning.memory import gradient_bytes, memory_by_stage
from mellum2_megatron.planning.rank_weights import stage_layers

BF16_BYTES = 2
"""Size of an activation and of a gathered weight."""


def layout_report(run: Run, *, world_size: int) -> dict[str, Any]:
    """Return everything that follows from a run's layout, as JSON types.

    Args:
        run: a resolved run.
        world_size: number of ranks.

    Returns:
        ``ways`` of each parallelism; ``groups`` by name, with ``size``, ``count`` and the ranks of
        the ``first``; ``cp_comm_types``, one for each layer; ``micro_batches`` of a step;
        ``stages``, one row each: its ``layers`` by virtual stage, its other parts (``also``),
        ``parameters`` and ``memory`` of a rank (bytes), ``flops_share`` of the model's, and
        ``sent``, the bytes that a rank sends in a step, by parallelism.

    Raises:
        InputError: the layout does not fit.
    """
    layout, architecture, length = run.layout, run.architecture, run.data.sequence_length
    layout.validate(architecture, world_size=world_size, sequence_length=length)
    # Figures of GPUs, even if the report is printed on a login node.
    memory = memory_by_stage(run, world_size=world_size, backend=run.resolved_backend("cuda"))
    micro_batches = run.schedule.final_batch_size // (
        run.schedule.micro_batch_size * layout.data_parallel(world_size)
    )
    flops = [_stage_flops(architecture, layout, stage, length) for stage in range(layout.pp)]
    stages = []
    for stage in range(layout.pp):
        parts = dataclasses.asdict(memory[stage])
        parameters = parts.pop("parameters")
        sent = bytes_sent(run, world_size=world_size, stage=stage, micro_batches=micro_batches)
        stages.append(
            {
                "layers": stage_layers(architecture, layout, stage),
                "also": _other_parts(architecture, layout, stage),
                "parameters": parameters,
                "memory": parts | {"total": memory[stage].total},
                "flops_share": flops[stage] / sum(flops),
                "sent": sent,
            }
        )
    return {
        "ways": ways(layout, world_size),
        "groups": {
            name: {"size": len(groups[0]), "count": len(groups), "first": groups[0]}
            for name, groups in process_groups(layout, world_size).items()
        },
        "cp_comm_types": list(layout.cp_comm_types(architecture)) if layout.cp > 1 else [],
        "micro_batches": micro_batches,
        "stages": stages,
    }


def ways(layout: Layout, world_size: int) -> dict[str, int]:
    """Return the number of ways that each parallelism divides, on ``world_size`` ranks."""
    return {
        **{name: getattr(layout, name) for name in ("tp", "cp", "pp", "vpp", "ep", "etp")},
        "dp": layout.data_parallel(world_size),
        "expert dp": layout.expert_data_parallel(world_size),
    }


def process_groups(layout: Layout, world_size: int) -> dict[str, list[list[int]]]:
    """Return the ranks of every process group, by parallelism.

    Megatron numbers ranks with tensor parallelism fastest, then context, data and pipeline
    parallelism; for experts expert-tensor, expert, expert-data and pipeline parallelism
    (``--tp-cp-ep-dp-pp``, megatron/core/parallel_state.py, ``RankGenerator``, 0.19.2).
    """
    sizes = ways(layout, world_size)
    attention = {name: sizes[name] for name in ("tp", "cp", "dp", "pp")}
    experts = {name: sizes[name] for name in ("etp", "ep", "expert dp", "pp")}
    groups = {name: _groups(attention, {name}) for name in attention}
    groups |= {name: _groups(experts, {name}) for name in ("etp", "ep", "expert dp")}
    # Gradients are reduced and optimizer state is divided among these ranks.
    return groups | {"dp with cp": _groups(attention, {"dp", "cp"})}


def _groups(sizes: dict[str, int], varying: set[str]) -> list[list[int]]:
    """Return the groups of ranks whose coordinates differ in ``varying`` alone.

    Args:
        sizes: number of ranks along each dimension; the first runs fastest.
        varying: dimensions along which the ranks of a group differ.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    slowest_first = list(reversed(sizes))
    # product() runs its last factor fastest.
    places = itertools.product(*(range(sizes[name]) for name in slowest_first))
    for rank, place in enumerate(places):
        fixed = tuple(
            index for name, index in zip(slowest_first, place, strict=True) if name not in varying
        )
        groups.setdefault(fixed, []).append(rank)
    return list(groups.values())


def _other_parts(architecture: Mellum2Architecture, layout: Layout, stage: int) -> list[str]:
    """Return the parts of the model on a stage other than decoder layers."""
    first, last = stage == 0, stage == layout.pp - 1
    mtp = last and architecture.num_mtp_layers > 0
    # The MTP layer embeds the next token itself, with a copy of the embedding.
    present = {"embedding": first or mtp, "output head": last, "MTP": mtp}
    return [part for part, is_present in present.items() if is_present]


def _kinds(architecture: Mellum2Architecture, layout: Layout, stage: int) -> list[LayerType]:
    """Return the attention types of all layers of a stage, MTP included."""
    kinds = [
        architecture.layer_types[layer]
        for part in stage_layers(architecture, layout, stage)
        for layer in part
    ]
    if stage == layout.pp - 1:
        kinds += architecture.mtp_layer_types
    return kinds


def _stage_flops(architecture: Mellum2Architecture, layout: Layout, stage: int, length: int) -> int:
    """Return the FLOPs of one sequence in a stage, forward and backward.

    Counted as in `Mellum2Architecture.flops_by_component`: 6 for each weight and token, 6 for each
    pair of query and key and each channel of the heads' keys and values.
    """
    weights = 0
    for parameter in architecture.active_parameters():
        if len(parameter.shape) != 2 or parameter.component == "embedding":
            continue
        if stage in pipeline_stages(parameter, architecture, layout):
            # Main head and MTP head share the output head's weight.
            is_shared = parameter.component == "output head"
            weights += parameter.numel * (1 + architecture.num_mtp_layers * is_shared)
    pairs = sum(
        architecture.visible_pairs(kind, length) for kind in _kinds(architecture, layout, stage)
    )
    channels = architecture.num_attention_heads * sum(architecture.head_widths)
    return 6 * length * weights + 6 * channels * pairs


def bytes_sent(
    run: Run, *, world_size: int, stage: int, micro_batches: int, element: int = BF16_BYTES
) -> dict[str, int]:
    """Return the bytes that a rank of a pipeline stage sends in one step, by parallelism.

    Experts are assumed evenly loaded. Routing weights, norms, counts and losses are left out as
    small.

    Args:
        run: a resolved run.
        world_size: number of ranks.
        stage: pipeline stage, from 0.
        micro_batches: micro-batches of the step on each data-parallel rank.
        element: size of an activation or a gathered weight, in bytes, default BF16's.
    """
    layout, model = run.layout, run.architecture
    tokens = run.data.sequence_length * run.schedule.micro_batch_size // layout.cp
    # Hidden states [tokens, hidden] of one micro-batch, in bytes.
    hidden = tokens * model.hidden_size * element
    # Outside of attention and experts, sequence parallelism leaves a rank 1/tp of the tokens.
    part = hidden / layout.tp
    sent = {
        "tp": _tensor_parallel(model, layout, stage) * hidden * micro_batches,
        "cp": _context_parallel(model, layout, stage, tokens * element) * micro_batches,
        "ep": _expert_parallel(model, layout, stage) * part * micro_batches,
        "pp": _pipeline_parallel(layout, stage) * part * micro_batches,
        "dp": _data_parallel(run, world_size, stage, element),
    }
    return {name: round(count) for name, count in sent.items()}


def _ring_share(ranks: int) -> float:
    """Return the share of a buffer that a rank sends in a gather or a reduce-scatter."""
    return (ranks - 1) / ranks


def _tensor_parallel(model: Mellum2Architecture, layout: Layout, stage: int) -> float:
    """Return the number of hidden states ``[tokens, hidden]`` that sequence parallelism sends.

    A column-parallel projection gathers its input, gathers it again for the weight's gradient, and
    scatters the input's gradient. A row-parallel one scatters its output and gathers the output's
    gradient (megatron/core/tensor_parallel/layers.py:480-620, 0.19.2).
    """
    column, row = 3, 2
    other_parts = _other_parts(model, layout, stage)
    count = (column + row) * len(_kinds(model, layout, stage))
    if stage == 0:
        count += row  # the embedding
    if "output head" in other_parts:
        count += column * (1 + model.num_mtp_layers)
    if "MTP" in other_parts:
        # The embedding of the next token; then the projection, which reads two hidden states, and
        # whose output is divided by columns and gathered.
        count += row + 2 * column + 2
    return count * _ring_share(layout.tp)


def _context_parallel(model: Mellum2Architecture, layout: Layout, stage: int, unit: int) -> float:
    """Return the bytes of keys and values sent for one micro-batch.

    They are gathered (or passed around) forward, and their gradients are scattered backward. Not
    counted: Transformer Engine fetches them again for the backward pass, which is half as much.
    """
    # Latent attention gathers the keys and values of all heads, not their latents.
    latent = model.latent_attention is not None
    heads = model.num_attention_heads if latent else model.num_key_value_heads
    width = heads * sum(model.head_widths) / layout.tp
    return 2 * len(_kinds(model, layout, stage)) * width * unit * (layout.cp - 1)


def _expert_parallel(model: Mellum2Architecture, layout: Layout, stage: int) -> float:
    """Return the number of hidden states of a rank's tokens sent to experts and back."""
    # To the experts and back, in the forward and in the backward pass.
    mlps = [model.mlp_type(layer) for part in stage_layers(model, layout, stage) for layer in part]
    if stage == layout.pp - 1:
        mlps += [model.mtp_mlp_type] * model.num_mtp_layers
    passes = 4 * mlps.count("sparse")
    if layout.dispatcher == "allgather":
        # Every rank of the expert groups gets all tokens, whether its experts use them or not.
        return passes * float(layout.ep * layout.etp - 1)
    # All-to-all sends a copy to each expert of a token. Expert-tensor ranks then gather copies.
    copies = model.num_experts_per_tok
    return passes * copies * (_ring_share(layout.ep) + (layout.etp - 1))


def _pipeline_parallel(layout: Layout, stage: int) -> float:
    """Return the number of hidden states and gradients sent to other stages in a micro-batch."""
    if layout.pp == 1:
        return 0.0
    # Two messages for each virtual stage, except no gradient from the first of all and no
    # activation from the last.
    ends = (stage == 0) + (stage == layout.pp - 1)
    return 2 * layout.vpp - ends


def _data_parallel(run: Run, world_size: int, stage: int, element: int) -> float:
    """Return the bytes of gradients reduced and weights gathered, once a step.

    Muon's buffers are sent in full length, padding included. Matrices in even shares go to their
    owner and back as well.
    """
    layout, model = run.layout, run.architecture
    gradient = gradient_bytes(run.precision)
    backend = run.resolved_backend("cuda")
    # The alignment of weights in Adam's buffers is too small to matter.
    parts = [
        (ranks, sum(weight.numel for weight in weights))
        for ranks, weights in adam_weights(run, world_size, backend, stage=stage)
    ]
    groups = ownership(run, world_size, backend, stage=stage)
    parts += [(len(owners.owned), owners.buffer) for owners in groups]
    total = sum(elements * (gradient + element) * _ring_share(ranks) for ranks, elements in parts)
    # Owners' exchange of matrices in even shares: the mean over ranks.
    total += sum(owners.exchanged * (gradient + element) / len(owners.owned) for owners in groups)
    if layout.pp > 1 and "embedding" in _other_parts(model, layout, stage) and model.num_mtp_layers:
        # The first and the last stage hold the same embedding and sum its gradient.
        total += gradient * model.vocab_size * model.hidden_size / layout.tp
    return total


def render_layout(report: dict[str, Any]) -> list[Table]:
    """Return the report of `layout_report` as rich tables that fit 80 columns."""
    title = (
        "Pipeline stages, of one rank "
        f"({report['micro_batches']} micro-batches a step; GiB, estimates)"
    )
    stages = _table(
        title, "stage", "layers", "parameters", "memory", "activations", "FLOPs", "sent a step"
    )
    for index, stage in enumerate(report["stages"]):
        parts = [f"{part[0]}-{part[-1]}" for part in stage["layers"]]
        sent = [f"{name} {size / 2**30:,.2f}" for name, size in stage["sent"].items() if size]
        stages.add_row(
            str(index),
            " ".join([", ".join(parts), *stage["also"]]),
            f"{stage['parameters']:,}",
            f"{stage['memory']['total'] / 2**30:,.1f}",
            f"{stage['memory']['activations'] / 2**30:,.1f}",
            f"{stage['flops_share']:.1%}",
            "\n".join(sent) or "-",
        )
    if all(group["size"] == 1 for group in report["groups"].values()):
        return [stages]

    groups = _table("Process groups", "parallelism", "ranks", "groups", "the first of them")
    for name, group in report["groups"].items():
        if group["size"] > 1:
            ranks = _shortened(map(str, group["first"]), 8)
            groups.add_row(name, str(group["size"]), str(group["count"]), ranks)
    if report["cp_comm_types"]:
        kinds = _shortened(
            (
                f"{len(list(layers))} {kind}"
                for kind, layers in itertools.groupby(report["cp_comm_types"])
            ),
            4,
        )
        groups.caption, groups.caption_justify = f"context parallelism by layer: {kinds}", "left"
    return [stages, groups]


def _shortened(words: Iterable[str], most: int) -> str:
    """Return at most ``most`` of the words, joined by commas; ``...`` stands for the rest."""
    shown = list(words)
    if len(shown) > most:
        shown = [*shown[:most], "..."]
    return ", ".join(shown)


def _table(title: str, *columns: str) -> Table:
    table = plain_table(title=title)
    for column in columns:
        is_text = column in ("stage", "layers", "sent a step", "parallelism", "the first of them")
        table.add_column(column, justify="left" if is_text else "right")
    return table
