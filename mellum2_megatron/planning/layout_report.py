"""What a layout comes to: who talks to whom, what each pipeline stage holds and computes, and what
ranks send.

No torch: instant on a login node. Bytes sent follow from the algorithms alone: of a buffer of S
bytes that n ranks gather or reduce-scatter each rank sends S (n - 1) / n, as in a ring.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from rich.table import Table

from mellum2_megatron.architecture import LayerType, Mellum2Architecture
from mellum2_megatron.common.console import plain_table
from mellum2_megatron.config import Layout, Run
from mellum2_megatron.config.layout import pipeline_stages
from mellum2_megatron.planning.memory import gradient_bytes, memory_by_stage
from mellum2_megatron.planning.rank_weights import adam_weights, ownership

BF16_BYTES = 2


def layout_report(run: Run, *, world_size: int) -> dict[str, Any]:
    """Return everything that follows from a run's layout on ``world_size`` ranks, as JSON types.

    Returns:
        ``ways`` of each parallelism; ``groups`` by name, with ``size``, ``count`` and the ranks of
        the ``first``; ``cp_comm_types``, one for each layer; ``micro_batches`` a step; ``stages``,
        one row each: its ``layers`` by virtual stage, what ``also`` stands there, ``parameters``
        and ``memory`` of a rank (bytes), ``flops_share`` of the model's, and ``sent``, the bytes
        that a rank sends in a step, by parallelism.

    Raises:
        InputError: the layout does not fit.
    """
    layout, architecture, length = run.layout, run.architecture, run.data.sequence_length
    layout.validate(architecture, world_size=world_size, sequence_length=length)
    memory = memory_by_stage(run, world_size=world_size, backend=run.resolved_backend("cuda"))
    micro_batches = run.schedule.final_batch_size // (
        run.schedule.micro_batch_size * layout.data_parallel(world_size)
    )
    flops = [_stage_flops(architecture, layout, stage, length) for stage in range(layout.pp)]
    return {
        "ways": ways(layout, world_size),
        "groups": {
            name: {"size": len(groups[0]), "count": len(groups), "first": groups[0]}
            for name, groups in process_groups(layout, world_size).items()
        },
        "cp_comm_types": list(layout.cp_comm_types(architecture)) if layout.cp > 1 else [],
        "micro_batches": micro_batches,
        "stages": [
            {
                "layers": stage_layers(architecture, layout, stage),
                "also": _extras(architecture, layout, stage),
                "parameters": memory[stage].parameters,
                "memory": {
                    field.name: getattr(memory[stage], field.name)
                    for field in dataclasses.fields(memory[stage])
                    if field.name != "parameters"
                }
                | {"total": memory[stage].total},
                "flops_share": flops[stage] / sum(flops),
                "sent": bytes_sent(
                    run, world_size=world_size, stage=stage, micro_batches=micro_batches
                ),
            }
            for stage in range(layout.pp)
        ],
    }


def ways(layout: Layout, world_size: int) -> dict[str, int]:
    """Return how many ways each parallelism divides on ``world_size`` ranks."""
    return {
        **{name: getattr(layout, name) for name in ("tp", "cp", "pp", "vpp", "ep", "etp")},
        "dp": layout.data_parallel(world_size),
        "expert dp": layout.expert_data_parallel(world_size),
    }


def process_groups(layout: Layout, world_size: int) -> dict[str, list[list[int]]]:
    """Return the ranks of every group, by parallelism.

    Megatron numbers ranks with tensor parallelism fastest, then context, data and pipeline
    parallelism; for experts expert-tensor, expert, expert-data and pipeline parallelism
    (``--tp-cp-ep-dp-pp``, megatron/core/parallel_state.py, ``RankGenerator``, 0.19.2).
    """
    sizes = ways(layout, world_size)
    attention = {name: sizes[name] for name in ("tp", "cp", "dp", "pp")}
    experts = {name: sizes[name] for name in ("etp", "ep", "expert dp", "pp")}
    groups = {name: _groups(attention, {name}) for name in attention}
    groups |= {name: _groups(experts, {name}) for name in ("etp", "ep", "expert dp")}
    return groups | {"dp with cp": _groups(attention, {"dp", "cp"})}


def _groups(sizes: dict[str, int], varying: set[str]) -> list[list[int]]:
    """Return the ranks that differ in ``varying`` coordinates alone; the first name of ``sizes``
    runs fastest."""
    found: dict[tuple[int, ...], list[int]] = {}
    names = list(sizes)
    for rank, reversed_place in enumerate(
        itertools.product(*(range(sizes[name]) for name in reversed(names)))
    ):
        place = dict(zip(reversed(names), reversed_place, strict=True))
        found.setdefault(tuple(place[name] for name in names if name not in varying), []).append(
            rank
        )
    return list(found.values())


def stage_layers(architecture: Mellum2Architecture, layout: Layout, stage: int) -> list[list[int]]:
    """Return the decoder layers of a pipeline stage, from 0, one list for each of its virtual
    stages."""
    each = architecture.num_hidden_layers // (layout.pp * layout.vpp)
    starts = [(part * layout.pp + stage) * each for part in range(layout.vpp)]
    return [list(range(start, start + each)) for start in starts]


def _extras(architecture: Mellum2Architecture, layout: Layout, stage: int) -> list[str]:
    first, last = stage == 0, stage == layout.pp - 1
    mtp = last and architecture.num_mtp_layers > 0
    words = {"embedding": first or mtp, "output head": last, "MTP": mtp}
    return [word for word, here in words.items() if here]


def _kinds(architecture: Mellum2Architecture, layout: Layout, stage: int) -> list[LayerType]:
    """Return the attention types of all layers of a stage, MTP included."""
    kinds = [
        architecture.layer_types[layer]
        for part in stage_layers(architecture, layout, stage)
        for layer in part
    ]
    return kinds + (list(architecture.mtp_layer_types) if stage == layout.pp - 1 else [])


def _stage_flops(architecture: Mellum2Architecture, layout: Layout, stage: int, length: int) -> int:
    """Return the FLOPs of one sequence, forward and backward, in a stage; counted as
    `flops_by_component` does."""
    weights = 0
    for parameter in architecture.active_parameters():
        if len(parameter.shape) != 2 or parameter.component == "embedding":
            continue
        if stage in pipeline_stages(parameter, architecture, layout):
            uses = 1 + architecture.num_mtp_layers if parameter.component == "output head" else 1
            weights += uses * parameter.numel
    pairs = sum(
        architecture.visible_pairs(kind, length) for kind in _kinds(architecture, layout, stage)
    )
    return (
        6 * length * weights + 12 * architecture.num_attention_heads * architecture.head_dim * pairs
    )


def bytes_sent(
    run: Run, *, world_size: int, stage: int, micro_batches: int, element: int = BF16_BYTES
) -> dict[str, int]:
    """Return the bytes that a rank of a pipeline stage sends in one step, by parallelism.

    Experts are taken to be evenly loaded. Left out as small: routing weights, norms, counts and
    losses.

    Args:
        micro_batches: of the step, on each data-parallel rank.
        element: bytes of an activation or a gathered weight.
    """
    layout, model = run.layout, run.architecture
    tokens = run.data.sequence_length * run.schedule.micro_batch_size // layout.cp
    hidden = tokens * model.hidden_size * element
    counts: dict[str, Callable[[], float]] = {
        "tp": lambda: _tensor_parallel(model, layout, stage) * hidden * micro_batches,
        "cp": lambda: _context_parallel(model, layout, stage, tokens * element) * micro_batches,
        "ep": lambda: _expert_parallel(model, layout, stage) * hidden / layout.tp * micro_batches,
        "pp": lambda: _pipeline_parallel(layout, stage) * hidden / layout.tp * micro_batches,
        "dp": lambda: _data_parallel(run, world_size, stage, element),
    }
    return {name: round(count()) for name, count in counts.items()}


def _of_ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def _tensor_parallel(model: Mellum2Architecture, layout: Layout, stage: int) -> float:
    """Return the hidden states ``[tokens, hidden]`` that sequence parallelism gathers and scatters,
    in their number.

    A column-parallel projection gathers its input, and once more for its weight's gradient, and
    scatters its input's gradient; a row-parallel one scatters its output and gathers that one's
    gradient (megatron/core/tensor_parallel/layers.py:480-620, 0.19.2).
    """
    column, row = 3, 2
    extras = _extras(model, layout, stage)
    count = (column + row) * len(_kinds(model, layout, stage))
    count += row * ((stage == 0) + ("MTP" in extras))  # the embedding
    count += column * (1 + model.num_mtp_layers) if "output head" in extras else 0
    # The MTP projection reads two hidden states and gathers its output, which is divided by
    # columns.
    count += 2 * column + 2 if "MTP" in extras else 0
    return count * _of_ring(layout.tp)


def _context_parallel(model: Mellum2Architecture, layout: Layout, stage: int, unit: int) -> float:
    """Return bytes for keys and values: gathered (or passed around) forward, their gradients
    scattered backward.

    Transformer Engine fetches them a second time for the backward pass: half as much again, not
    counted here.
    """
    width = 2 * model.num_key_value_heads * model.head_dim / layout.tp
    return 2 * len(_kinds(model, layout, stage)) * width * unit * (layout.cp - 1)


def _expert_parallel(model: Mellum2Architecture, layout: Layout, stage: int) -> float:
    """Return the hidden states of a rank's tokens that travel to experts and back, forward and
    backward."""
    layers = 4 * len(_kinds(model, layout, stage))
    if layout.dispatcher == "allgather":
        return layers * float(layout.ep * layout.etp - 1)
    copies = model.num_experts_per_tok
    return layers * copies * (_of_ring(layout.ep) + (layout.etp - 1))


def _pipeline_parallel(layout: Layout, stage: int) -> float:
    """Return the hidden states sent to the next stage, and the gradients sent to the one before,
    per micro-batch."""
    if layout.pp == 1:
        return 0.0
    ends = (stage == 0) + (
        stage == layout.pp - 1
    )  # the first sends no gradient, the last no activation, once each
    return 2 * layout.vpp - ends


def _data_parallel(run: Run, world_size: int, stage: int, element: int) -> float:
    """Return bytes of gradients reduced and weights gathered, once a step; those of Muon with the
    buffers' padding."""
    layout, model = run.layout, run.architecture
    gradient = gradient_bytes(run.precision)
    backend = run.resolved_backend("cuda")
    parts = [
        (ranks, sum(weight.numel for weight in weights))
        for ranks, weights in adam_weights(run, world_size, backend, stage=stage)
    ]
    parts += [
        (len(each.owned), each.buffer) for each in ownership(run, world_size, backend, stage=stage)
    ]
    total = sum(elements * (gradient + element) * _of_ring(ranks) for ranks, elements in parts)
    if layout.pp > 1 and "embedding" in _extras(model, layout, stage) and model.num_mtp_layers:
        total += (
            gradient * model.vocab_size * model.hidden_size / layout.tp
        )  # the first and the last stage share it
    return total


def render_layout(report: dict[str, Any]) -> list[Table]:
    """Return the report of `layout_report` as rich tables that fit 80 columns."""
    tables = [_stage_table(report)]
    return (
        [*tables, _group_table(report)]
        if any(group["size"] > 1 for group in report["groups"].values())
        else tables
    )


def _stage_table(report: dict[str, Any]) -> Table:
    title = f"Pipeline stages, of one rank ({report['micro_batches']} micro-batches a step; GiB, estimates)"
    table = _table(
        title, "stage", "layers", "parameters", "memory", "activations", "FLOPs", "sent a step"
    )
    for number, stage in enumerate(report["stages"]):
        parts = [f"{part[0]}-{part[-1]}" for part in stage["layers"]]
        sent = [f"{name} {size / 2**30:,.2f}" for name, size in stage["sent"].items() if size]
        table.add_row(
            str(number),
            " ".join([", ".join(parts), *stage["also"]]),
            f"{stage['parameters']:,}",
            f"{stage['memory']['total'] / 2**30:,.1f}",
            f"{stage['memory']['activations'] / 2**30:,.1f}",
            f"{stage['flops_share']:.1%}",
            "\n".join(sent) or "-",
        )
    return table


def _group_table(report: dict[str, Any]) -> Table:
    table = _table("Process groups", "parallelism", "ranks", "groups", "the first of them")
    for name, group in report["groups"].items():
        if group["size"] > 1:
            shown = ", ".join(map(str, group["first"][:8])) + (", ..." if group["size"] > 8 else "")
            table.add_row(name, str(group["size"]), str(group["count"]), shown)
    if report["cp_comm_types"]:
        kinds = [
            f"{len(list(run))} {kind}" for kind, run in itertools.groupby(report["cp_comm_types"])
        ]
        shown = ", ".join(kinds[:4]) + (", ..." if len(kinds) > 4 else "")
        table.caption, table.caption_justify = f"context parallelism by layer: {shown}", "left"
    return table


def _table(title: str, *columns: str) -> Table:
    table = plain_table(title=title)
    for column in columns:
        text = column in ("stage", "layers", "sent a step", "parallelism", "the first of them")
        table.add_column(column, justify="left" if text else "right")
    return table
