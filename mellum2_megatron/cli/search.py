"""`mellum2 search`: shapes of a model that are equally fast."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mellum2_megatron.cli.options import AsJson
from mellum2_megatron.common.console import console, plain_table, print_line
from mellum2_megatron.common.errors import InputError

_MOST_VALUES = 64
"""Values of one axis; the map counts the weights of every pair."""


def search(
    base: Annotated[
        str,
        typer.Argument(
            metavar="PRESET|FOLDER", help="shape that all others change; a preset or a folder"
        ),
    ] = "mellum2-12b",
    gpu: Annotated[
        str, typer.Option("--gpu", help="h100, h200, b200, a100-80, a100-40 or l40s")
    ] = "h100",
    layers: Annotated[
        str, typer.Option("--layers", help="depths: FIRST:LAST:STEP, or a list")
    ] = "16:48:4",
    hidden: Annotated[
        str, typer.Option("--hidden", help="widths: FIRST:LAST:STEP, or a list")
    ] = "1536:4096:256",
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="FIELD=VALUES",
            help="values of num_experts, num_experts_per_tok, num_key_value_heads or "
            "sliding_window (repeatable); default: half and twice the base's",
        ),
    ] = None,
    prompt: Annotated[int, typer.Option("--prompt", help="tokens of a request's input")] = 2304,
    output: Annotated[int, typer.Option("--output", help="tokens that a request asks for")] = 256,
    max_batch: Annotated[
        int, typer.Option("--max-batch", help="most requests at a time in throughput mode")
    ] = 256,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="time the map's shapes on this CPU too, random weights; for small shapes",
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="PNG file for the map; default: none")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Map analytic latency over the shapes of a model.

    It is computed from data sheets, not measured; docs/iso_latency.md tells how.
    """
    from mellum2_megatron.architecture import find_architecture
    from mellum2_megatron.planning.gpus import find_gpu
    from mellum2_megatron.planning.latency import Workload
    from mellum2_megatron.planning.latency_map import draw_map
    from mellum2_megatron.planning.shape_search import render, search_shapes

    if out is not None and out.suffix.lower() != ".png":
        raise InputError(f"--out {out}", rule="the picture is a PNG file", fix="end it in .png")
    varied = None
    if vary:
        pairs = [word.partition("=") for word in vary]
        varied = {field: _values(f"--vary {field}", text) for field, _, text in pairs}
    model, machine = find_architecture(base)[0], find_gpu(gpu)
    workload = Workload(prompt=prompt, output=output, max_batch=max_batch)
    depths, widths = _values("--layers", layers), _values("--hidden", hidden)
    report = search_shapes(model, machine, workload, layers=depths, hidden=widths, varied=varied)
    if measure:
        from conversion.huggingface.measured_shapes import measure_shapes
        from mellum2_megatron.upstream import quiet_upstream

        quiet_upstream()
        shapes = [
            model.replace(num_hidden_layers=depth, hidden_size=width, num_mtp_layers=0)
            for depth in depths
            for width in widths
        ]
        report["measured"] = measure_shapes(shapes, workload)
    if out is not None:
        draw_map(report, out, base=base)
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return
    console.print(render(report, base=base))
    if measure:
        _print_measured(report["measured"])
    if out is not None:
        print_line(f"wrote {out}")


def _print_measured(measured: Mapping[str, Any]) -> None:
    print_line("\nThe map's shapes with transformers on this CPU, one request alone")
    table = plain_table()
    for column in ("layers", "hidden", "measured ms", "analytic ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in measured["rows"]:
        table.add_row(
            str(row["layers"]),
            str(row["hidden"]),
            *(f"{1e3 * row[key]:,.2f}" for key in ("measured", "analytic")),
        )
    console.print(table)
    print_line(
        f"rank correlation {measured['rank_correlation']:.3f} over {len(measured['rows'])} shapes; "
        "the analytic times use measured speeds of this CPU"
    )


def _values(option: str, text: str) -> list[int]:
    """Return the whole numbers of ``FIRST:LAST:STEP`` or of a list with commas, ascending.

    Raises:
        InputError: another form, no value, or too many.
    """
    parts = text.split(":" if ":" in text else ",")
    numbers = [int(part) for part in parts if part.isascii() and part.isdecimal() and int(part)]
    # 10 digits are beyond any size, and a range of them would fill the memory.
    fits = len(numbers) == len(parts) and max(map(len, parts)) < 10
    if fits and ":" in text and len(parts) == 3:
        span = range(numbers[0], numbers[1] + 1, numbers[2])
        values = list(span) if len(span) <= _MOST_VALUES else []
    else:
        values = sorted(set(numbers)) if fits and ":" not in text else []
    if not values or len(values) > _MOST_VALUES:
        raise InputError(
            f"{option} {text}",
            rule=f"it must name 1 to {_MOST_VALUES} positive whole numbers",
            fix="write FIRST:LAST:STEP such as 16:48:4, or a list such as 16,28,40",
        )
    return values
