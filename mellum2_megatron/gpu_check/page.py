"""The page of a check's results, ``gpu_check.md``, and the same as ``gpu_check.json``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mellum2_megatron.common.files import size_text, write_json, write_text
from mellum2_megatron.common.provenance import Code
from mellum2_megatron.gpu_check.piece import Piece, stored_result

PAGE, RESULTS = "gpu_check.md", "gpu_check.json"

NOT_RUN = "not run"

REHEARSAL = (
    "**Rehearsal on a CPU with a tiny model: it shows that the check runs. "
    "No figure means anything for a GPU.**"
)


def write(
    folder: Path,
    pieces: Sequence[Piece],
    *,
    machine: dict[str, Any],
    code: Code,
    rehearsal: bool,
) -> dict[str, Any]:
    """Write both files from the stored results; return the content of the JSON file.

    Args:
        folder: folder of the results.
        pieces: all pieces, in order.
        machine: facts of `machine.facts`.
        code: origin of the running code.
        rehearsal: a tiny model on a CPU.
    """
    rows = {
        piece.name: {
            "title": piece.title,
            **(stored_result(folder, piece.name) or {"status": NOT_RUN, "reason": ""}),
        }
        for piece in pieces
    }
    counts = {
        status: sum(row["status"] == status for row in rows.values())
        for status in ("passed", "failed", "skipped", NOT_RUN)
    }
    results = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "rehearsal": rehearsal,
        "machine": machine,
        "code": asdict(code),
        "counts": counts,
        "pieces": rows,
        "decides": [line for row in rows.values() for line in row.get("decides", ())],
    }
    write_json(folder / RESULTS, results)
    text = "\n".join(_lines(results, str(code)))
    write_text(folder / PAGE, f"{text}\n")
    return results


def _lines(results: dict[str, Any], code: str) -> Iterator[str]:
    """Yield the lines of the page."""
    rows = results["pieces"]
    counts = results["counts"]
    yield "# GPU check"
    yield ""
    if results["rehearsal"]:
        yield REHEARSAL
        yield ""
    gpus = [gpu["name"] for gpu in results["machine"]["gpus"]]
    yield f"- machine: {f'{len(gpus)} x {gpus[0]}' if gpus else 'CPU'}"
    for name in ("driver", "cuda", "nccl", "transformer_engine"):
        if name in results["machine"]:
            yield f"- {name.replace('_', ' ')}: {results['machine'][name]}"
    yield f"- code: {code}"
    yield f"- time: {results['time']}"
    yield f"- result: {', '.join(f'{count} {status}' for status, count in counts.items() if count)}"
    yield from _table(
        ("piece", "question", "result", "seconds", "reason"),
        [
            (name, row["title"], row["status"], _seconds(row), row["reason"])
            for name, row in rows.items()
        ],
    )
    yield from _heading("Settings that these figures decide")
    yield ""
    yield from [f"- {line}" for line in results["decides"]] or ["None yet."]
    yield from _speed(rows)
    yield from _memory(rows)
    yield from _differences(rows)


def _speed(rows: dict[str, Any]) -> Iterator[str]:
    """Yield the tables of speed and of time by part."""
    measured = {
        name: row["figures"] for name, row in rows.items() if row.get("figures", {}).get("arms")
    }
    if not measured:
        return
    yield from _heading("Speed of a training step")
    table = []
    for name, figures in measured.items():
        for setting, arm in figures["arms"].items():
            speed = f"{arm['seconds a step'] * 1e3:.1f} ms", f"{arm['tokens a second']:,.0f}"
            rate = f"{arm['model TFLOP/s']:.4g}", f"{arm['share of the matrix product']:.1%}"
            memory = size_text(arm["peak memory"])
            table.append((name, setting, str(figures["GPUs"]), *speed, *rate, memory))
    titles = (
        "piece",
        "setting",
        "GPUs",
        "step",
        "tokens/s",
        "model TFLOP/s",
        "of GEMM",
        "peak memory",
    )
    yield from _table(titles, table)
    rates = ", ".join(f"{figures['matrix product TFLOP/s']:.4g}" for figures in measured.values())
    layers = ", ".join(sorted({str(figures["layers"]) for figures in measured.values()}))
    yield ""
    yield (
        f"Layers: {layers}. BF16 matrix product beside each piece, TFLOP/s: {rates}. "
        "Rates are those of one GPU. Random tokens are routed evenly, and one GPU alone exchanges "
        "none: a real run is slower."
    )
    name, figures = next(iter(measured.items()))
    profile = figures["profile"]
    yield from _heading("Time of a step by part")
    yield ""
    yield f"First setting of {name}, in {profile['unit']}."
    shares = sorted(profile["share"].items(), key=lambda item: -item[1])
    yield from _table(("part", "share"), [(part, f"{share:.1%}") for part, share in shares])
    longest = [(kernel, f"{share:.1%}") for kernel, share in profile["top"].items()]
    yield from _table(("longest", "share"), longest)


def _memory(rows: dict[str, Any]) -> Iterator[str]:
    figures = rows["memory"].get("figures")
    if not figures:
        return
    yield from _heading("Memory against the estimate")
    table = [
        (
            name,
            *(size_text(row[column]) for column in ("measured", "least", "estimated")),
            f"{row['ratio']:.2f}",
        )
        for name, row in figures.items()
    ]
    yield from _table(("arm", "measured", "least", "most", "measured / most"), table)


def _differences(rows: dict[str, Any]) -> Iterator[str]:
    """Yield the differences that the pieces about exactness have found."""
    table = [
        # Null: not a number, which is what a broken kernel returns.
        (name, f"{what}: {value}", "not finite" if difference is None else f"{difference:.2g}")
        for name in ("resume", "deterministic", "backends", "fp8", "logits")
        for what, values in rows[name].get("figures", {}).items()
        for value, difference in values.items()
    ]
    if table:
        yield from _heading("Differences")
        yield from _table(("piece", "of", "relative"), table)


def _seconds(row: dict[str, Any]) -> str:
    return f"{row['seconds']:.0f}" if "seconds" in row else ""


def _heading(title: str) -> list[str]:
    return ["", f"## {title}"]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a table of Markdown, with an empty line before it."""
    yield ""
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * len(titles)}"
    for row in rows:
        # A bar or a new line in a message would break the row.
        cells = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in row]
        yield f"| {' | '.join(cells)} |"
