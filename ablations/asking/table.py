"""A study as a table: the arms' differences, sizes and cost, before anything runs."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column

from ablations.asking.planned import Plan, PlannedArm, differences, missing_data, ranks
from mellum2_megatron.common.console import plain_table
from mellum2_megatron.config import Device

ASSUMED_TFLOPS: dict[Device, float] = {"cpu": 0.04, "cuda": 200.0}
"""Model TFLOP/s of a rank for the cost; assumptions, no measurements: small models run slowly."""


def study_rows(plan: Plan) -> list[dict[str, Any]]:
    """Return the arms as rows of JSON types: name, overrides, sizes, tokens, cost."""
    changed = differences(plan)
    rows = []
    for index, arm in enumerate(plan.arms):
        flops = arm.amount("flops")
        rows.append(
            {
                "arm": arm.arm.name,
                "control": arm.arm.name == plan.study.control,
                "note": arm.arm.note,
                "differs": {key: values[index] for key, values in changed.items()},
                "parameters": arm.amount("parameters"),
                "active_parameters": arm.amount("active_parameters"),
                "flops_per_token": arm.flops_per_token,
                "tokens": arm.amount("tokens"),
                "flops": flops,
                "rank_hours": _hours(arm, plan.device),
                "ranks": ranks(arm.run),
            }
        )
    return rows


def render_study(plan: Plan) -> RenderableType:
    """Return the tables of `mellum2 ablate show`."""
    rows, study = study_rows(plan), plan.study
    arms = [row["arm"] + (" (control)" if row["control"] else "") for row in rows]
    # A key is folded, never cut: a reader copies it.
    keys = Column("key", overflow="fold")
    changes = plain_table(keys, *arms, title=f"{plan.name}, {plan.scale}: what differs")
    for key, values in differences(plan).items():
        changes.add_row(key, *values)
    sizes = plain_table("", *arms, title="size and cost of one run")
    for label, texts in (
        ("parameters", [_count(row["parameters"]) for row in rows]),
        ("active parameters", [_count(row["active_parameters"]) for row in rows]),
        ("FLOPs a token", [_count(row["flops_per_token"]) for row in rows]),
        ("tokens", [_count(row["tokens"]) for row in rows]),
        ("FLOPs", [f"{row['flops']:.3g}" for row in rows]),
        (
            f"{'CPU' if plan.device == 'cpu' else 'GPU'} hours*",
            [f"{row['rank_hours']:,.3g}" for row in rows],
        ),
    ):
        sizes.add_row(label, *texts)
    hours = sum(row["rank_hours"] for row in rows)
    lines = [study.question]
    if study.claim is not None:
        lines.append(f"claim: {study.claim.text} ({study.claim.source})")
    looks = ", then ".join(map(str, study.seeds))
    lines += [f"{arm.arm.name}: {arm.arm.note}" for arm in plan.arms if arm.arm.note]
    matched = ", ".join(
        match.quantity.replace("_", " ")
        + (f" within {match.tolerance:.1%}" if match.tolerance else " exactly")
        for match in study.matched
    )
    after = [
        f"arms have in common: {matched or 'nothing is claimed'} (checked)",
        "metrics: "
        + "; ".join(
            f"{metric.name}, {metric.better} is better, smallest difference of interest "
            f"{metric.delta:g}"
            for metric in study.metrics
        ),
        f"seeds: {looks}; {study.seeds[0]} seeds of all arms take {hours * study.seeds[0]:,.3g} "
        f"hours*",
        f"* at an assumed {ASSUMED_TFLOPS[plan.device]:g} model TFLOP/s a rank; not measured",
    ]
    if plan.start is not None:
        after.append(f"all arms start from weights of {plan.start.name}, trained once a seed")
    if study.gpu:
        after.append(f"needs a GPU: {study.gpu}")
    if study.note:
        after.append(study.note)
    after += [f"data: {data.path} is not there yet" for data in missing_data(plan)]
    return Group(*lines, "", changes, "", sizes, "", *after)


def _hours(arm: PlannedArm, device: Device) -> float:
    return arm.amount("flops") / (ASSUMED_TFLOPS[device] * 1e12) / 3600


def _count(value: float) -> str:
    """Return a number with three digits and a unit: ``12.6B``, ``5.91M``."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return (
                f"{value / size:.3g}{unit}" if value < 1e3 * size else f"{value / size:,.0f}{unit}"
            )
    return f"{value:g}"
