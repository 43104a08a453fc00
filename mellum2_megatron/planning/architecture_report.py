"""`mellum2 info`: size and cost of a model, as data and as tables.

No torch: instant on a login node.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from mellum2_megatron.architecture import LayerType, Mellum2Architecture
from mellum2_megatron.common.console import plain_table
from mellum2_megatron.common.files import size_text
from mellum2_megatron.planning.memory import Memory

MTP_ROW = "MTP head"
"""Name of the row that adds up all components of the multi-token-prediction head."""

_BYTES = {"bfloat16": 2, "float32": 4}
"""Bytes of one weight, by dtype."""


def architecture_report(
    architecture: Mellum2Architecture,
    *,
    sequence_length: int | None = None,
    memory: Memory | None = None,
) -> dict[str, Any]:
    """Return every figure of an architecture as JSON types.

    Args:
        architecture: the model.
        sequence_length: tokens of the sequence that FLOPs are averaged over, default
            ``max_position_embeddings``.
        memory: memory of one rank of a layout (`planning.memory.memory_per_rank`), default none.

    Returns:
        ``sequence_length``; ``parameters`` (``total``, ``total_with_mtp``, ``active``,
        ``active_with_mtp``); ``tensors`` of the released folder (``total``, ``total_with_mtp``);
        ``bytes`` of the weights with MTP by dtype; ``flops_per_token`` (forward and backward;
        ``total``, ``total_with_mtp``); ``components``, one row each, the MTP head as one row;
        ``layers``, one row per layer type; ``misaligned_dimensions``; ``memory_per_rank`` in bytes
        or None.

    Raises:
        InputError: ``sequence_length`` is not positive.
    """
    length = architecture.max_position_embeddings if sequence_length is None else sequence_length
    total = architecture.num_parameters(mtp=True)
    memory_row = None
    if memory is not None:
        memory_row = dataclasses.asdict(memory) | {"total": memory.total}
    return {
        "sequence_length": length,
        "parameters": {
            "total": architecture.num_parameters(mtp=False),
            "total_with_mtp": total,
            "active": architecture.num_active_parameters(mtp=False),
            "active_with_mtp": architecture.num_active_parameters(mtp=True),
        },
        "tensors": {
            "total": sum(1 for _ in architecture.parameters(mtp=False)),
            "total_with_mtp": sum(1 for _ in architecture.parameters(mtp=True)),
        },
        "bytes": {dtype: size * total for dtype, size in _BYTES.items()},
        "flops_per_token": {
            "total": architecture.flops_per_token(length, mtp=False),
            "total_with_mtp": architecture.flops_per_token(length, mtp=True),
        },
        "components": _components(architecture, length),
        "layers": _layers(architecture, length),
        "misaligned_dimensions": architecture.misaligned_dimensions(),
        "memory_per_rank": memory_row,
    }


def _components(architecture: Mellum2Architecture, length: int) -> list[dict[str, Any]]:
    """Return one row per component of the trunk in forward order, then one of the MTP head."""
    trunk = architecture.flops_by_component(length, mtp=False)
    flops: dict[str, float] = {}
    for parameter in architecture.parameters(mtp=False):
        flops[parameter.component] = trunk.get(parameter.component, 0)
        if parameter.component == "attention":
            # Products of queries, keys and values: FLOPs without parameters, in a row of their own.
            flops["attention scores"] = trunk.get("attention scores", 0)
    if architecture.num_mtp_layers:
        with_mtp = architecture.flops_by_component(length, mtp=True)
        flops[MTP_ROW] = sum(with_mtp.values()) - sum(trunk.values())
    rows: dict[str, dict[str, Any]] = {
        name: {
            "component": name,
            "parameters": 0,
            "active": 0,
            "flops_per_token": total / length,
        }
        for name, total in flops.items()
    }
    for parameter in architecture.parameters():
        rows[MTP_ROW if parameter.mtp else parameter.component]["parameters"] += parameter.numel
    for parameter in architecture.active_parameters():
        rows[MTP_ROW if parameter.mtp else parameter.component]["active"] += parameter.numel
    return list(rows.values())


def _layers(architecture: Mellum2Architecture, length: int) -> list[dict[str, Any]]:
    """Return one row for each type of layer that the model has."""
    kinds: tuple[LayerType, ...] = ("sliding_attention", "full_attention")
    rows = []
    for kind in kinds:
        indices = [index for index, layer in enumerate(architecture.layer_types) if layer == kind]
        mtp = architecture.mtp_layer_types.count(kind)
        if not indices and not mtp:
            continue
        rope = architecture.rope(kind)
        rows.append(
            {
                "layer_type": kind,
                "layers": indices,
                "mtp_layers": mtp,
                "window": architecture.sliding_window if kind == "sliding_attention" else None,
                "rope_type": rope.rope_type,
                "rope_theta": rope.rope_theta,
                "rope_factor": rope.factor,
                "attention_factor": rope.resolved_attention_factor,
                "keys_per_query": architecture.visible_pairs(kind, length) / length,
            }
        )
    return rows


def render(report: Mapping[str, Any], *, title: str = "Mellum 2") -> RenderableType:
    """Return the report of `architecture_report` as rich tables that fit 80 columns."""
    summary = _table(title, "", "without MTP", "with MTP")
    parameters, flops = report["parameters"], report["flops_per_token"]
    summary.add_row("parameters", f"{parameters['total']:,}", f"{parameters['total_with_mtp']:,}")
    summary.add_row(
        "active parameters", f"{parameters['active']:,}", f"{parameters['active_with_mtp']:,}"
    )
    summary.add_row(
        f"FLOPs per token at {report['sequence_length']:,}",
        _gflop(flops["total"]),
        _gflop(flops["total_with_mtp"]),
    )
    for dtype in report["bytes"]:
        sizes = [_BYTES[dtype] * parameters[key] for key in ("total", "total_with_mtp")]
        summary.add_row(f"weights in {dtype}", *(size_text(size) for size in sizes))
    tensors = report["tensors"]
    summary.add_row("tensors", f"{tensors['total']:,}", f"{tensors['total_with_mtp']:,}")

    components = _table("By component", "", "parameters", "active", "FLOPs per token")
    for row in report["components"]:
        components.add_row(
            row["component"],
            f"{row['parameters']:,}",
            f"{row['active']:,}",
            _gflop(row["flops_per_token"]),
        )

    layer_types = _table("By layer type", "", "layers", "window", "keys/query", "RoPE")
    for row in report["layers"]:
        layers = _ranges(row["layers"])
        if row["mtp_layers"]:
            layers += " + MTP"
        # On lines of its own: the table must fit 80 columns.
        rope = f"theta {row['rope_theta']:,.0f}"
        if row["rope_type"] == "yarn":
            rope += f"\nYaRN x{row['rope_factor']:g}\nattention x{row['attention_factor']:.4f}"
        window = "all" if row["window"] is None else f"{row['window']:,}"
        kind = row["layer_type"].removesuffix("_attention")
        layer_types.add_row(kind, layers, window, f"{row['keys_per_query']:,.1f}", rope)

    tables = [summary, components, layer_types]
    if report["memory_per_rank"] is not None:
        memory = _table("Memory per rank (estimate)", "", "GiB")
        for name, size in report["memory_per_rank"].items():
            if name != "parameters":  # a number of weights, not bytes
                memory.add_row(name, f"{size / 2**30:,.2f}")
        tables.append(memory)
    parts: list[RenderableType] = []
    for table in tables:
        parts += ["", table] if parts else [table]
    if report["misaligned_dimensions"]:
        dimensions = ", ".join(
            f"{name} = {size}" for name, size in report["misaligned_dimensions"].items()
        )
        parts.append(f"Not a multiple of 128 (slower and no FP8 on GPUs, report §2): {dimensions}")
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    """Return an empty table: text columns to the left, numbers to the right."""
    table = plain_table(title=title)
    for column in columns:
        wraps = column in ("layers", "RoPE")
        is_text = wraps or column == ""
        table.add_column(column, justify="left" if is_text else "right", no_wrap=not wraps)
    return table


def _gflop(flops: float) -> str:
    """Return FLOPs in GFLOP or MFLOP with three decimals, ``-`` for none."""
    if not flops:
        return "-"
    unit, scale = ("GFLOP", 1e9) if flops >= 1e9 else ("MFLOP", 1e6)
    return f"{flops / scale:,.3f} {unit}"


def _ranges(indices: Sequence[int]) -> str:
    """Return ascending layer numbers as count and ranges, shortened to three.

    >>> _ranges([0, 1, 2, 4]), _ranges([3, 7, 11, 15, 19]), _ranges([])
    ('4: 0-2 4', '5: 3 7 .. 19', '0')
    """
    if not indices:
        return "0"
    words = []
    # Within a range of consecutive numbers, number minus place is constant.
    for _, group in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in group]
        first, last = numbers[0], numbers[-1]
        words.append(str(first) if first == last else f"{first}-{last}")
    if len(words) > 3:
        words = [*words[:2], "..", words[-1]]
    return f"{len(indices)}: " + " ".join(words)
