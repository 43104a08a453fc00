"""`mellum2 info`: what a model weighs and costs, as data and as tables. No torch: instant on a
login node."""

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
_BYTES = {"bfloat16": 2, "float32": 4}


def architecture_report(
    architecture: Mellum2Architecture,
    *,
    sequence_length: int | None = None,
    memory: Memory | None = None,
) -> dict[str, Any]:
    """Return every figure of ``architecture`` as JSON types.

    Args:
        sequence_length: tokens per sequence that FLOPs are averaged over;
            ``max_position_embeddings`` when None.
        memory: estimate for one rank of a layout
            (`mellum2_megatron.planning.memory.memory_per_rank`), where one is known.

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
        "memory_per_rank": None
        if memory is None
        else dataclasses.asdict(memory) | {"total": memory.total},
    }


def _components(architecture: Mellum2Architecture, length: int) -> list[dict[str, Any]]:
    """One row per component of the trunk in the order of a forward pass, then the MTP head as a
    whole."""
    trunk = architecture.flops_by_component(length, mtp=False)
    both = architecture.flops_by_component(length, mtp=True)
    names = list(dict.fromkeys(p.component for p in architecture.parameters(mtp=False)))
    order: list[str] = []
    for name in names:
        order += [name, "attention scores"] if name == "attention" else [name]
    rows: dict[str, dict[str, Any]] = {
        name: {
            "component": name,
            "parameters": 0,
            "active": 0,
            "flops_per_token": trunk.get(name, 0) / length,
        }
        for name in order
    }
    if architecture.num_mtp_layers:
        extra = (sum(both.values()) - sum(trunk.values())) / length
        rows[MTP_ROW] = {
            "component": MTP_ROW,
            "parameters": 0,
            "active": 0,
            "flops_per_token": extra,
        }
    for parameter in architecture.parameters():
        rows[MTP_ROW if parameter.mtp else parameter.component]["parameters"] += parameter.numel
    for parameter in architecture.active_parameters():
        rows[MTP_ROW if parameter.mtp else parameter.component]["active"] += parameter.numel
    return list(rows.values())


def _layers(architecture: Mellum2Architecture, length: int) -> list[dict[str, Any]]:
    kinds: tuple[LayerType, ...] = ("sliding_attention", "full_attention")
    rows = []
    for kind in kinds:
        indices = [i for i, layer in enumerate(architecture.layer_types) if layer == kind]
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
    parts: list[RenderableType] = [
        _summary_table(report, title),
        _component_table(report),
        _layer_table(report),
    ]
    if report["memory_per_rank"] is not None:
        parts.append(_memory_table(report["memory_per_rank"]))
    parts = [line for part in parts for line in (part, "")][:-1]
    if report["misaligned_dimensions"]:
        sizes = ", ".join(
            f"{name} = {size}" for name, size in report["misaligned_dimensions"].items()
        )
        parts.append(f"Not a multiple of 128 (slower and no FP8 on GPUs, report §2): {sizes}")
    return Group(*parts)


def _summary_table(report: Mapping[str, Any], title: str) -> Table:
    table = _table(title, "", "without MTP", "with MTP")
    parameters, flops = report["parameters"], report["flops_per_token"]
    table.add_row("parameters", f"{parameters['total']:,}", f"{parameters['total_with_mtp']:,}")
    table.add_row(
        "active parameters", f"{parameters['active']:,}", f"{parameters['active_with_mtp']:,}"
    )
    table.add_row(
        f"FLOPs per token at {report['sequence_length']:,}",
        _gflop(flops["total"]),
        _gflop(flops["total_with_mtp"]),
    )
    for dtype in report["bytes"]:
        sizes = [_BYTES[dtype] * parameters[key] for key in ("total", "total_with_mtp")]
        table.add_row(f"weights in {dtype}", *(size_text(size) for size in sizes))
    tensors = report["tensors"]
    table.add_row("tensors", f"{tensors['total']:,}", f"{tensors['total_with_mtp']:,}")
    return table


def _component_table(report: Mapping[str, Any]) -> Table:
    table = _table("By component", "", "parameters", "active", "FLOPs per token")
    for row in report["components"]:
        table.add_row(
            row["component"],
            f"{row['parameters']:,}",
            f"{row['active']:,}",
            _gflop(row["flops_per_token"]),
        )
    return table


def _layer_table(report: Mapping[str, Any]) -> Table:
    table = _table("By layer type", "", "layers", "window", "keys/query", "RoPE")
    for row in report["layers"]:
        layers = _ranges(row["layers"]) + (" + MTP" if row["mtp_layers"] else "")
        rope = f"theta {row['rope_theta']:,.0f}"
        if row["rope_type"] == "yarn":
            rope += f"\nYaRN x{row['rope_factor']:g}\nattention x{row['attention_factor']:.4f}"
        window = "all" if row["window"] is None else f"{row['window']:,}"
        kind = row["layer_type"].removesuffix("_attention")
        table.add_row(kind, layers, window, f"{row['keys_per_query']:,.1f}", rope)
    return table


def _memory_table(memory: Mapping[str, int]) -> Table:
    table = _table("Memory per rank (estimate)", "", "GiB")
    for name, size in memory.items():
        if name != "parameters":
            table.add_row(name, f"{size / 2**30:,.2f}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = plain_table(title=title)
    for column in columns:
        text = column in ("", "layers", "RoPE")
        table.add_column(
            column, justify="left" if text else "right", no_wrap=column not in ("layers", "RoPE")
        )
    return table


def _gflop(flops: float) -> str:
    """Return FLOPs with three decimals of the unit that keeps small models readable."""
    unit, scale = ("GFLOP", 1e9) if flops >= 1e9 else ("MFLOP", 1e6)
    return f"{flops / scale:,.3f} {unit}" if flops else "-"


def _ranges(indices: Sequence[int]) -> str:
    """Write ``[0, 1, 2, 4]`` as ``0-2 4``; a long list as its count and stride.

    >>> _ranges([3, 7, 11, 15, 19])
    '5: 3 7 .. 19'
    """
    runs = [
        [i for _, i in run]
        for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0])
    ]
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    if len(words) > 3:
        words = [*words[:2], "..", words[-1]]
    return f"{len(indices)}: " + " ".join(words) if indices else "0"
