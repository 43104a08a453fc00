"""`mellum2 info --optimizer`: which weight is updated how, and by whom. No torch: instant on a
login node."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from mellum2_megatron.architecture import Mellum2Architecture, Shape
from mellum2_megatron.common.console import plain_table
from mellum2_megatron.config import Backend, Layout, Optimizer, Run
from mellum2_megatron.planning.rank_weights import (
    Ownership,
    Weight,
    local_weights,
    ownership,
    uses_muon,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """What Muon orthogonalises at once.

    Attributes:
        part: of a weight that is split, which part; ``weight`` for a whole one.
        shape: ``[out, in]``.
        scale: factor of the orthogonalised update, without the learning rate.
    """

    part: str
    shape: Shape
    scale: float


def decayed(weight: Weight) -> bool:
    """Whether weight decay applies: to matrices only (megatron/core/optimizer/__init__.py:112-116,
    0.19.2)."""
    return len(weight.shape) > 1


def matrices(
    weight: Weight, architecture: Mellum2Architecture, layout: Layout, optimizer: Optimizer
) -> list[Matrix]:
    """Return what Muon orthogonalises of a weight that it updates.

    Queries, keys and values are interleaved by group in one weight; Muon takes the queries of all
    groups as one matrix, likewise keys and values
    (megatron/core/optimizer/emerging_optimizers.py:294-330, 0.19.2).
    """
    rows, columns = weight.shape
    parts = {"weight": rows}
    if weight.name.endswith("linear_qkv.weight") and optimizer.muon_split_qkv:
        heads = architecture.num_attention_heads // architecture.num_key_value_heads
        group = rows // (heads + 2)
        parts = {"query": heads * group, "key": group, "value": group}
    elif ".linear_fc1." in weight.name and optimizer.muon_split_gate_up:
        parts = {"gate": rows // 2, "up": rows // 2}
    ways = layout.etp if weight.component == "experts" else layout.tp
    if optimizer.muon_tp_mode == "blockwise" or weight.split is None:
        ways = 1
    found = []
    for part, size in parts.items():
        shape = (size * ways, columns) if weight.split == 0 else (size, columns * ways)
        found.append(Matrix(part=part, shape=shape, scale=scale(shape, optimizer)))
    return found


def scale(shape: Shape, optimizer: Optimizer) -> float:
    """Return the factor of a matrix' update
    (emerging_optimizers/orthogonalized_optimizers/muon.py:136, 0.3.0)."""
    rows, columns = shape
    factor = {
        "spectral": max(rows, columns),
        "unit_rms_norm": rows / columns,
        "shape_scaling": max(1.0, rows / columns),
    }[optimizer.muon_scale_mode]
    return math.sqrt(factor) * optimizer.muon_extra_scale


def optimizer_report(run: Run, *, world_size: int, backend: Backend) -> dict[str, Any]:
    """Return how every weight of the run is updated, as JSON types.

    Args:
        run: a resolved run.
        world_size: ranks of the run.
        backend: whose modules the model is made of.

    Returns:
        ``optimizer``, ``lr``, ``weight_decay``, ``world_size``; ``weights``, one row a kind:
        ``name``, ``count`` over one rank of each pipeline stage, ``shape`` on a rank,
        ``optimizer``, ``weight_decay``, ``lr``, ``matrices`` (``part``, ``shape``, ``scale``);
        ``owners``, one row for each pipeline stage and group of ranks: ``stage``, ``group``,
        ``ranks``, ``matrices``, ``matrices_per_rank`` and ``elements_per_rank`` (lists),
        ``balance`` (most over mean), ``buffer_elements``; ``warnings``.

    Raises:
        InputError: the layout does not fit.
    """
    architecture, layout, optimizer = run.architecture, run.layout, run.optimizer
    layout.validate(architecture, world_size=world_size, sequence_length=run.data.sequence_length)
    weights = [
        weight
        for stage in range(layout.pp)
        for chunk in range(layout.vpp)
        for weight in local_weights(architecture, layout, backend, stage=stage, chunk=chunk)
    ]
    rows = [
        _owner_row(stage, owners)
        for stage in range(layout.pp if optimizer.name == "muon" else 0)
        for owners in ownership(run, world_size, backend, stage=stage)
    ]
    return {
        "optimizer": optimizer.name,
        "lr": optimizer.lr,
        "weight_decay": optimizer.weight_decay,
        "world_size": world_size,
        "weights": _weight_rows(weights, run),
        "owners": rows,
        "warnings": _warnings(run, rows),
    }


def _weight_rows(weights: Sequence[Weight], run: Run) -> list[dict[str, Any]]:
    optimizer = run.optimizer
    rows: dict[str, dict[str, Any]] = {}
    for weight in weights:
        muon = uses_muon(weight, optimizer)
        found = matrices(weight, run.architecture, run.layout, optimizer) if muon else []
        row = rows.setdefault(
            weight.kind,
            {
                "name": weight.kind,
                "count": 0,
                "shape": list(weight.shape),
                "optimizer": "muon" if muon else "adam",
                "weight_decay": optimizer.weight_decay if decayed(weight) else 0.0,
                "lr": optimizer.lr,
                "matrices": [
                    {"part": m.part, "shape": list(m.shape), "scale": m.scale} for m in found
                ],
            },
        )
        row["count"] += 1
    return list(rows.values())


def _owner_row(stage: int, owners: Ownership) -> dict[str, Any]:
    elements = owners.elements
    total = sum(elements)
    return {
        "stage": stage,
        "group": owners.group,
        "ranks": len(elements),
        "matrices": sum(map(len, owners.owned)),
        "matrices_per_rank": [len(own) for own in owners.owned],
        "elements_per_rank": elements,
        "balance": max(elements) * len(elements) / total if total else 1.0,
        "buffer_elements": owners.buffer,
    }


def _warnings(run: Run, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    optimizer, layout = run.optimizer, run.layout
    if (
        optimizer.name == "muon"
        and optimizer.muon_tp_mode == "blockwise"
        and (layout.tp > 1 or layout.etp > 1)
    ):
        found.append(
            f"optimizer.muon_tp_mode=blockwise with layout.tp={layout.tp}, layout.etp={layout.etp}: each rank "
            "orthogonalises its part of a matrix, so the update depends on the layout; duplicated does not"
        )
    bytes_each = 2 + (
        4 if run.precision.grad_reduce_in_fp32 else 2
    )  # weights in BF16, and gradients
    for row in rows:
        where = f"{row['group']} matrices" + (f" of stage {row['stage']}" if layout.pp > 1 else "")
        idle, empty = (
            row["matrices_per_rank"].count(0),
            row["buffer_elements"] - sum(row["elements_per_rank"]),
        )
        if idle and row["matrices"]:
            found.append(
                f"{where}: a matrix has one owner, so {idle} of {row['ranks']} ranks update none of the "
                f"{row['matrices']}, and {empty * bytes_each / 2**30:.1f} GiB of every rank's buffers stay empty"
            )
    return found


# -- as tables
# --------------------------------------------------------------------------------------------------------


def render_optimizer(report: Mapping[str, Any], *, title: str) -> RenderableType:
    """Return the report of `optimizer_report` as rich tables."""
    lr, decay = report["lr"], report["weight_decay"]
    parts: list[RenderableType] = [
        _weight_table(
            report, f"{title}: peak learning rate {lr:g}, weight decay {decay:g} on matrices"
        )
    ]
    if report["owners"]:
        parts.append(_owner_table(report["owners"]))
    parts += [f"Note: {warning}." for warning in report["warnings"]]
    return Group(*[line for part in parts for line in (part, "")][:-1])


def _weight_table(report: Mapping[str, Any], title: str) -> Table:
    columns = {
        "": "right",
        "weight": "left",
        "shape": "right",
        "by": "left",
        "matrices": "left",
        "scale": "right",
    }
    table = _table(title, columns)
    for name, count, row in _short_rows(report["weights"]):
        parts = row["matrices"]
        named = [
            f"{m['part']} {_shape(m['shape'])}" if len(parts) > 1 else _shape(m["shape"])
            for m in parts
        ]
        if not row["weight_decay"]:
            named.append("no decay")
        scales = [f"{m['scale']:.4g}" for m in parts]
        table.add_row(
            count, name, _shape(row["shape"]), row["optimizer"], "\n".join(named), "\n".join(scales)
        )
    return table


def _short_rows(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Return name inside its layer, count (``28 + 1`` with the MTP layer's) and row, for rows that
    differ otherwise."""
    inside = re.compile(
        r"^(decoder|mtp)\.layers\.\*\.|(mtp_model_layer|self_attention|mlp)\.|\.weight\*?$"
    )
    found: dict[str, tuple[str, str, Mapping[str, Any]]] = {}
    for row in rows:
        name = inside.sub("", row["name"])
        if row["name"].startswith("mtp.") and name not in found:
            name = f"MTP {name}"
        count = f"{found[name][1]} + {row['count']}" if name in found else f"{row['count']:,}"
        found[name] = (name, count, row)
    return list(found.values())


def _owner_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = ("stage", "group", "ranks", "matrices", "a rank", "most / mean")
    table = _table(
        "Owners of Muon's matrices",
        {name: "left" if name == "group" else "right" for name in names},
    )
    for row in rows:
        counts = row["matrices_per_rank"]
        spread = f"{min(counts)} to {max(counts)}" if min(counts) != max(counts) else str(counts[0])
        table.add_row(
            str(row["stage"]),
            row["group"],
            f"{row['ranks']:,}",
            f"{row['matrices']:,}",
            spread,
            f"{row['balance']:.2f}",
        )
    return table


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _table(title: str, columns: Mapping[str, Any]) -> Table:
    table = plain_table(title=title)
    for column, justify in columns.items():
        table.add_column(column, justify=justify, no_wrap=column != "weight", overflow="fold")
    return table
