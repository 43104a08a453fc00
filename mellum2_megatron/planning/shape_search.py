"""`mellum2 search`: analytic latency over the shapes of a model (report §2.1).

A map over depth and width shows which shapes cost the same. Around one shape, experts, active
experts, key heads and window are changed one at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.console import plain_table
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.planning.gpus import Machine
from mellum2_megatron.planning.latency import CostModel, Workload, require_context
from mellum2_megatron.planning.reference_shapes import QWEN25_7B

MODES = ("sync", "throughput")
"""Keys of a row's latencies: one request alone, and machine time of one request among many."""

VARIED = ("num_experts", "num_experts_per_tok", "num_key_value_heads", "sliding_window")
"""Fields that are changed one at a time around the base, in this order."""


def search_shapes(
    base: Mellum2Architecture,
    machine: Machine,
    workload: Workload,
    *,
    layers: Sequence[int],
    hidden: Sequence[int],
    varied: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Return the latency map around a shape, as JSON types.

    Args:
        base: shape that all others change.
        machine: GPU.
        workload: request.
        layers, hidden: depths and widths of the map. All other sizes are the base's.
        varied: values of the fields in `VARIED`; None (default): half and twice the base's value.

    Returns:
        ``gpu`` and ``workload`` as given; ``base`` and ``dense`` (Qwen2.5-7B's shape), a row each;
        ``grid``, rows in the order of layers, then hidden; ``frontier``, for ``base`` and ``dense``
        and each mode, the widest row of each depth that is not slower; ``varied``, rows with
        ``field``, ``value`` and the ratios to the base, or ``refused``, why there is none. A row
        has ``layers``, ``hidden``, ``parameters``, ``active``, and the fields of `Latency`, seconds
        that cannot be as None.

    Raises:
        InputError: a shape of the map that no model can have, an unknown field of ``varied``, or a
            request longer than the context.
    """
    require_context(base, workload)
    grid = [
        _row(
            base.replace(num_hidden_layers=depth, hidden_size=width, num_mtp_layers=0),
            machine,
            workload,
        )
        for depth in layers
        for width in hidden
    ]
    base_row = _row(base, machine, workload)
    dense_row = _row(QWEN25_7B, machine, workload)
    return {
        "gpu": dataclasses.asdict(machine),
        "workload": dataclasses.asdict(workload),
        "base": base_row,
        "dense": dense_row,
        "grid": grid,
        "frontier": {
            name: {mode: _frontier(grid, row[mode], mode) for mode in MODES}
            for name, row in (("base", base_row), ("dense", dense_row))
        },
        "varied": _vary(base, base_row, machine, workload, varied),
    }


def _row(model: Mellum2Architecture, machine: Machine, workload: Workload) -> dict[str, Any]:
    costs = CostModel(model)
    latency = dataclasses.asdict(costs.latency(machine, workload))
    if not latency["fits"]:
        latency["throughput"] = None  # JSON has no infinity
    return {
        "layers": model.num_hidden_layers,
        "hidden": model.hidden_size,
        "parameters": costs.weights,
        "active": model.num_active_parameters(mtp=False),
        **latency,
    }


def _frontier(
    grid: Sequence[dict[str, Any]], budget: float | None, mode: str
) -> list[dict[str, Any]]:
    """Return the widest row of each depth that fits and takes ``budget`` seconds at most."""
    widest: dict[int, dict[str, Any]] = {}
    for row in grid:
        if budget is None or not row["fits"] or row[mode] > budget:
            continue
        if row["hidden"] > widest.get(row["layers"], {"hidden": 0})["hidden"]:
            widest[row["layers"]] = row
    return list(widest.values())


def _vary(
    base: Mellum2Architecture,
    base_row: Mapping[str, Any],
    machine: Machine,
    workload: Workload,
    varied: Mapping[str, Sequence[int]] | None,
) -> list[dict[str, Any]]:
    """Return the rows of changed fields; a value that no model can have says so when not asked."""
    rows = []
    for field in VARIED if varied is None else varied:
        if field not in VARIED:
            raise InputError(
                f"--vary {field}", rule="is no field to vary", fix=f"use {', '.join(VARIED)}"
            )
        middle = getattr(base, field)
        given = varied[field] if varied is not None else _around(middle)
        for value in given:
            entry: dict[str, Any] = {"field": field, "value": value}
            try:
                row = _row(base.replace(**{field: value}), machine, workload)
            except InputError as error:
                if varied is not None:
                    raise
                rows.append({**entry, "refused": error.rule})
                continue
            ratios = {
                f"{mode}_ratio": row[mode] / base_row[mode]
                if row["fits"] and base_row["fits"]
                else None
                for mode in MODES
            }
            rows.append({**entry, **row, **ratios})
    return rows


def _around(middle: int | None) -> tuple[int, ...]:
    if middle is None:
        return ()
    return tuple(value for value in (middle // 2, 2 * middle) if value)


def render(report: Mapping[str, Any], *, base: str) -> RenderableType:
    """Return the report of `search_shapes` as rich tables that fit 80 columns."""
    workload = report["workload"]
    title = (
        f"Analytic latency on {report['gpu']['label']}, "
        f"{workload['prompt']:,} tokens in, {workload['output']:,} out"
    )
    first = _table(title, base)
    for name, row in (("base", report["base"]), ("Qwen2.5-7B", report["dense"])):
        _add(first, name, row)
    parts: list[RenderableType] = [first]
    for mode in MODES:
        table = _table(f"\nWidest shape of each depth not slower than the base, {mode}", "")
        for row in report["frontier"]["base"][mode]:
            _add(table, "", row)
        parts.append(table)
    table = plain_table(title="\nOne size changed at a time")
    for column in ("", "parameters", "active", "sync", "throughput"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    refused = []
    for row in report["varied"]:
        name = f"{row['field']}={row['value']}"
        if "refused" in row:
            refused.append(f"{name}: {row['refused']}")
            continue
        table.add_row(
            name,
            _billions(row["parameters"]),
            _billions(row["active"]),
            *("-" if row[f"{m}_ratio"] is None else f"x {row[f'{m}_ratio']:.3f}" for m in MODES),
        )
    if report["varied"]:
        parts.append(table)
    parts += refused
    parts.append(
        f"\nRoofline at sheet figures ({report['gpu']['source']}); a launch takes at least "
        f"{report['gpu']['launch'] * 1e6:g} us (assumed).\n"
        "It compares shapes. It does not predict the milliseconds of an engine."
    )
    return Group(*parts)


def _table(title: str, name: str) -> Any:
    table = plain_table(title=title)
    for column in (
        name,
        "layers",
        "hidden",
        "parameters",
        "active",
        "first\ntoken ms",
        "sync\nms",
        "throughput\nms",
    ):
        table.add_column(column, justify="left" if column == name else "right", no_wrap=True)
    return table


def _add(table: Any, name: str, row: Mapping[str, Any]) -> None:
    table.add_row(
        name,
        str(row["layers"]),
        str(row["hidden"]),
        _billions(row["parameters"]),
        _billions(row["active"]),
        _milliseconds(row["first_token"]),
        _milliseconds(row["sync"]),
        _milliseconds(row["throughput"]),
    )


def _milliseconds(seconds: float | None) -> str:
    return "too large" if seconds is None else f"{seconds * 1e3:,.2f}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e8 else f"{count / 1e6:.2f}M"
