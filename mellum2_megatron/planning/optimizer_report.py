"""`mellum2 info --optimizer`: the update of every weight, and the ranks that compute it.

No torch: instant on a login node.
"""

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
from mellum2_megatron.planning.gradient_buffers import ownership
from mellum2_megatron.planning.memory import WEIGHT_BYTES, gradient_bytes
from mellum2_megatron.planning.rank_weights import Weight, local_weights, uses_muon


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """A matrix that Muon orthogonalises as one: a weight, or a part of a split weight.

    Attributes:
        part: ``query``, ``key``, ``value``, ``gate`` or ``up``; ``weight`` for an unsplit weight.
        shape: ``[out, in]``, over the tensor-parallel ranks that orthogonalise it together.
        scale: factor of the orthogonalised update, without the learning rate.
    """

    part: str
    shape: Shape
    scale: float


def decayed(weight: Weight) -> bool:
    """True if weight decay applies: to matrices only.

    megatron/core/optimizer/__init__.py:112-116 (0.19.2).
    """
    return len(weight.shape) > 1


def matrices(
    weight: Weight, architecture: Mellum2Architecture, layout: Layout, optimizer: Optimizer
) -> list[Matrix]:
    """Return the matrices into which Muon splits a weight.

    Queries, keys and values are interleaved by group in one weight. Muon takes the queries of all
    groups as one matrix, likewise keys and values
    (megatron/core/optimizer/emerging_optimizers.py:294-330, 0.19.2).

    Args:
        weight: a weight that Muon updates, as one rank holds it.
        architecture, layout, optimizer: parts of the run.
    """
    rows, columns = weight.shape
    parts = {"weight": rows}
    if weight.name.endswith("linear_qkv.weight") and optimizer.muon_split_qkv:
        # Rows of a group: its query heads, then one key and one value head.
        heads = architecture.num_attention_heads // architecture.num_key_value_heads
        group = rows // (heads + 2)
        parts = {"query": heads * group, "key": group, "value": group}
    elif weight.name.endswith("linear_kv_up_proj.weight") and optimizer.muon_split_qkv:
        latent = architecture.latent_attention
        assert latent is not None
        # Rows of a head: its key without rotation, then its value.
        heads = rows // (latent.qk_nope_head_dim + latent.v_head_dim)
        parts = {"key": heads * latent.qk_nope_head_dim, "value": heads * latent.v_head_dim}
    elif ".linear_fc1." in weight.name and optimizer.muon_split_gate_up:
        parts = {"gate": rows // 2, "up": rows // 2}
    # Unless blockwise, ranks that divide a matrix gather it before they orthogonalise it.
    ways = layout.etp if weight.component == "experts" else layout.tp
    if optimizer.muon_tp_mode == "blockwise" or weight.split is None:
        ways = 1
    result = []
    for part, size in parts.items():
        shape = (size * ways, columns) if weight.split == 0 else (size, columns * ways)
        result.append(Matrix(part=part, shape=shape, scale=scale(shape, optimizer)))
    return result


def scale(shape: Shape, optimizer: Optimizer) -> float:
    """Return the factor of a matrix's orthogonalised update, without the learning rate.

    emerging_optimizers/orthogonalized_optimizers/muon.py:136 (0.3.0).
    """
    rows, columns = shape
    factor = {
        "spectral": max(rows, columns),
        "unit_rms_norm": rows / columns,
        "shape_scaling": max(1.0, rows / columns),
    }[optimizer.muon_scale_mode]
    return math.sqrt(factor) * optimizer.muon_extra_scale


def optimizer_report(run: Run, *, world_size: int, backend: Backend) -> dict[str, Any]:
    """Return the update of every weight of the run, as JSON types.

    Args:
        run: a resolved run.
        world_size: number of ranks.
        backend: backend of the modules.

    Returns:
        ``optimizer``, ``lr``, ``weight_decay``, ``world_size``; ``weights``, one row for each kind:
        ``name``, ``count`` over one rank of each pipeline stage, ``shape`` on a rank,
        ``optimizer``, ``weight_decay``, ``lr``, ``matrices`` (``part``, ``shape``, ``scale``);
        ``owners``, one row for each pipeline stage and group of ranks: ``stage``, ``group``,
        ``ranks``, ``matrices``, ``matrices_per_rank`` and ``elements_per_rank`` (lists),
        ``balance`` (most over mean), ``buckets``, ``buffer_elements`` and ``exchanged_elements``
        (sent to owners and back inside the step, by all ranks); ``warnings``.

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
    owner_rows = []
    if optimizer.name == "muon":
        for stage in range(layout.pp):
            for owners in ownership(run, world_size, backend, stage=stage):
                elements, total = owners.elements, sum(owners.elements)
                owner_rows.append(
                    {
                        "stage": stage,
                        "group": owners.group,
                        "ranks": len(elements),
                        "matrices": sum(map(len, owners.owned)),
                        "matrices_per_rank": list(map(len, owners.owned)),
                        "elements_per_rank": elements,
                        "balance": max(elements) * len(elements) / total if total else 1.0,
                        "buckets": len(owners.buckets),
                        "buffer_elements": owners.buffer,
                        "exchanged_elements": owners.exchanged,
                    }
                )
    return {
        "optimizer": optimizer.name,
        "lr": optimizer.lr,
        "weight_decay": optimizer.weight_decay,
        "world_size": world_size,
        "weights": _weight_rows(weights, run),
        "owners": owner_rows,
        "warnings": _warnings(run, owner_rows),
    }


def _weight_rows(weights: Sequence[Weight], run: Run) -> list[dict[str, Any]]:
    """Return one row for each kind of weight, in order of first occurrence."""
    optimizer = run.optimizer
    rows: dict[str, dict[str, Any]] = {}
    for weight in weights:
        # Weights of one kind have one shape, on every stage.
        if weight.kind in rows:
            rows[weight.kind]["count"] += 1
            continue
        muon = uses_muon(weight, optimizer)
        parts = matrices(weight, run.architecture, run.layout, optimizer) if muon else []
        rows[weight.kind] = {
            "name": weight.kind,
            "count": 1,
            "shape": list(weight.shape),
            "optimizer": "muon" if muon else "adam",
            "weight_decay": optimizer.weight_decay if decayed(weight) else 0.0,
            "lr": optimizer.lr,
            "matrices": [
                {"part": matrix.part, "shape": list(matrix.shape), "scale": matrix.scale}
                for matrix in parts
            ],
        }
    return list(rows.values())


def _warnings(run: Run, owner_rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return warnings of updates that depend on the layout, and of idle ranks."""
    warnings = []
    optimizer, layout = run.optimizer, run.layout
    if (
        optimizer.name == "muon"
        and optimizer.muon_tp_mode == "blockwise"
        and (layout.tp > 1 or layout.etp > 1)
    ):
        warnings.append(
            f"optimizer.muon_tp_mode=blockwise with layout.tp={layout.tp}, "
            f"layout.etp={layout.etp}: each rank orthogonalises its part of a matrix, "
            "so the update depends on the layout; duplicated does not"
        )
    element_bytes = WEIGHT_BYTES + gradient_bytes(run.precision)
    for row in owner_rows:
        idle = row["matrices_per_rank"].count(0)
        if not idle or not row["matrices"]:
            continue
        group = f"{row['group']} matrices"
        if layout.pp > 1:
            group += f" of stage {row['stage']}"
        # Every rank holds the whole buffer, and all shares of it are equally long. In whole shares
        # that of an idle rank is therefore padding on every rank.
        unused = row["buffer_elements"] - sum(row["elements_per_rank"])
        room = f"{unused * element_bytes / 2**30:.1f} GiB of every rank's buffers stay empty"
        if row["group"] == "dense" and optimizer.muon_dense_shards == "even":
            room = "all hold an even share of the buffers"
        warnings.append(
            f"{group}: a matrix has one owner, so {idle} of {row['ranks']} ranks update none of "
            f"the {row['matrices']}, and {room}"
        )
    return warnings


def render_optimizer(report: Mapping[str, Any], *, title: str) -> RenderableType:
    """Return the report of `optimizer_report` as rich tables."""
    lr, decay = report["lr"], report["weight_decay"]
    heading = f"{title}: peak learning rate {lr:g}, weight decay {decay:g} on matrices"
    weights = _table(
        heading,
        {
            "": "right",
            "weight": "left",
            "shape": "right",
            "by": "left",
            "matrices": "left",
            "scale": "right",
        },
    )
    for name, count, row in _short_rows(report["weights"]):
        lines = [_shape(matrix["shape"]) for matrix in row["matrices"]]
        if len(lines) > 1:
            names = [matrix["part"] for matrix in row["matrices"]]
            lines = [f"{part} {shape}" for part, shape in zip(names, lines, strict=True)]
        if not row["weight_decay"]:
            lines.append("no decay")
        scales = [f"{matrix['scale']:.4g}" for matrix in row["matrices"]]
        weights.add_row(
            count, name, _shape(row["shape"]), row["optimizer"], "\n".join(lines), "\n".join(scales)
        )
    parts: list[RenderableType] = [weights]
    if report["owners"]:
        columns = ("stage", "group", "ranks", "matrices", "a rank", "most / mean", "buckets")
        owners = _table(
            "Owners of Muon's matrices",
            {column: "left" if column == "group" else "right" for column in columns},
        )
        for row in report["owners"]:
            counts = row["matrices_per_rank"]
            fewest, most = min(counts), max(counts)
            owners.add_row(
                str(row["stage"]),
                row["group"],
                f"{row['ranks']:,}",
                f"{row['matrices']:,}",
                str(most) if fewest == most else f"{fewest} to {most}",
                f"{row['balance']:.2f}",
                f"{row['buckets']:,}",
            )
        parts += ["", owners]
    for warning in report["warnings"]:
        parts += ["", f"Note: {warning}."]
    return Group(*parts)


def _short_rows(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Return short name, count and row of each kind of weight.

    A kind of the MTP layer joins the decoder's kind of the same name, with a count like ``28 + 1``.
    """
    surroundings = re.compile(
        r"^(decoder|mtp)\.layers\.\*\.|(mtp_model_layer|self_attention|mlp)\.|\.weight\*?$"
    )
    joined: dict[str, tuple[str, str, Mapping[str, Any]]] = {}
    for row in rows:
        name, count = surroundings.sub("", row["name"]), f"{row['count']:,}"
        if name in joined:
            _, decoder_count, _ = joined[name]
            count = f"{decoder_count} + {row['count']}"
        elif row["name"].startswith("mtp."):
            name = f"MTP {name}"  # norms and projection that only the MTP head has
        joined[name] = (name, count, row)
    return list(joined.values())


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _table(title: str, columns: Mapping[str, Any]) -> Table:
    table = plain_table(title=title)
    for column, justify in columns.items():
        table.add_column(column, justify=justify, no_wrap=column != "weight", overflow="fold")
    return table
