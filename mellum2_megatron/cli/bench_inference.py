"""`mellum2 bench-inference`: how fast a model answers, with and without its MTP draft."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mellum2_megatron.common.console import console, error_console, plain_table, print_line
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import check_writable, write_json

_ENGINE = "transformers"


def bench_inference(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Hugging Face folder")],
    engine: Annotated[
        str, typer.Option("--engine", help="transformers, in float32 on the CPU")
    ] = _ENGINE,
    mode: Annotated[
        str, typer.Option("--mode", help="sync: one request at a time; throughput: many at once")
    ] = "sync",
    use_mtp: Annotated[
        bool,
        typer.Option("--use-mtp", help="measure the MTP head as a draft, beside the plain way"),
    ] = False,
    dense: Annotated[
        bool,
        typer.Option(
            "--dense/--no-dense",
            help="measure a dense model beside it, as Qwen2.5-7B stands beside the 12B",
        ),
    ] = True,
    prompt: Annotated[int, typer.Option("--prompt", help="tokens of a request")] = 2304,
    output: Annotated[int, typer.Option("--output", help="tokens of an answer")] = 256,
    repeats: Annotated[
        int, typer.Option("--repeats", help="measured rounds; one more warms up")
    ] = 5,
    batch: Annotated[int, typer.Option("--batch", help="requests at once, for throughput")] = 8,
    seed: Annotated[int, typer.Option("--seed", help="seed of the prompts")] = 1,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", help="files of the prompts (repeatable); default: Python's standard library"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="JSON file of the result; default: bench_MODE.json in FOLDER"),
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="PNG file; default: none")] = None,
) -> None:
    """Measure how fast a model answers.

    Times to the first token and between tokens, tokens a second, memory, accepted drafts.
    On a CPU the figures prove that the bench works, and nothing about any GPU.
    """
    from conversion.huggingface.folder import HfFolder
    from conversion.huggingface.timed_engine import peak_memory, transformers_engines
    from conversion.huggingface.writer import check_tokenizer
    from conversion.verification.memory import require_huggingface_memory
    from mellum2_megatron.data.tokens.tokenizer import load_tokenizer
    from mellum2_megatron.evaluation.inference import (
        Bench,
        bench_report,
        measure_arms,
        real_prompts,
    )
    from mellum2_megatron.evaluation.inference_plot import draw_bench
    from mellum2_megatron.planning.reference_shapes import dense_counterpart
    from mellum2_megatron.upstream import quiet_upstream

    if engine != _ENGINE:
        raise InputError(f"--engine {engine}", rule="no such engine", fix=f"use {_ENGINE}")
    if plot is not None and plot.suffix.lower() != ".png":
        raise InputError(f"--plot {plot}", rule="the picture is a PNG file", fix="end it in .png")
    bench = Bench(
        mode=mode,  # type: ignore[arg-type]  # Bench refuses others
        prompt=prompt,
        output=output,
        repeats=repeats,
        batch=batch,
        seed=seed,
    )
    with HfFolder.open(folder) as opened:
        architecture = opened.architecture
    bench.check(architecture)
    if use_mtp and not architecture.num_mtp_layers:
        raise InputError(
            f"--use-mtp with {folder}", rule="the model has no MTP head", fix="leave --use-mtp out"
        )
    if use_mtp and mode == "throughput":
        raise InputError(
            "--use-mtp --mode throughput",
            rule="transformers drafts for one request at a time",
            fix="use --mode sync",
        )
    out = out or folder / f"bench_{mode}.json"
    check_writable("--out", out, folder=False)
    quiet_upstream()
    check_tokenizer(folder, architecture)
    tokenizer = load_tokenizer(folder)
    rounds = real_prompts(
        lambda words: tokenizer.encode(words, add_special_tokens=False).ids, bench, text or ()
    )
    shape = dense_counterpart(architecture) if dense else None
    require_huggingface_memory(str(folder), architecture, 1)
    if shape is not None:
        require_huggingface_memory("the dense model", shape, 1)
    engines = transformers_engines(str(folder), use_mtp=use_mtp, dense=shape)
    error_console.print(f"measuring {', '.join(engines)}: {len(rounds)} rounds")
    answers = measure_arms(engines, rounds, bench)
    report = bench_report(
        answers,
        bench,
        model=str(folder),
        engine=f"{engine} {importlib.metadata.version('transformers')}",
        device="cpu",
        facts={
            name: {
                "same_model": name != "dense",
                "parameters": (shape if name == "dense" and shape else architecture).num_parameters(
                    mtp=name == "mtp"
                ),
            }
            for name in engines
        },
    )
    report["peak_memory"] = peak_memory()
    write_json(out, report)
    if plot is not None:
        draw_bench(report, plot)
    _print(report)
    print_line(f"wrote {out}" + (f" and {plot}" if plot is not None else ""))


def _print(report: Mapping[str, Any]) -> None:
    arms = report["arms"]
    bench = report["bench"]
    table = plain_table(
        title=f"{bench['mode']}: {bench['prompt']:,} tokens in, {bench['output']:,} out, "
        f"{report['engine']} on {report['device']}"
    )
    table.add_column("")
    for name in arms:
        table.add_column(name, justify="right", no_wrap=True)
    names = dict.fromkeys((f["name"], f["unit"]) for arm in arms.values() for f in arm["figures"])
    for name, unit in names:
        cells = []
        for arm in arms.values():
            found = next((f for f in arm["figures"] if f["name"] == name), None)
            cells.append("" if found is None else _cell(found))
        table.add_row(f"{name}, {unit}", *cells)
    table.add_row("parameters", *(f"{arm['parameters']:,}" for arm in arms.values()))
    console.print(table)
    for name, share in report["equal"].items():
        print_line(f"{name}: {share:.0%} of the answers equal those of plain")
    print_line(f"peak memory of the process, all arms: {report['peak_memory'] / 1e9:.2f} GB")
    for note in report["notes"]:
        print_line(note)
    sys.stdout.flush()


def _cell(figure: Mapping[str, Any]) -> str:
    """Return a value with half of its 95% interval."""
    if figure["low"] is None:
        return f"{figure['value']:.4g}"
    return f"{figure['value']:.4g} +- {(figure['high'] - figure['low']) / 2:.2g}"
