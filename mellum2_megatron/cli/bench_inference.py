"""`mellum2 bench-inference`: how fast a model answers, with and without its MTP draft."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mellum2_megatron.common.console import console, error_console, plain_table, print_line
from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.common.files import check_writable, write_json

if TYPE_CHECKING:
    from mellum2_megatron.architecture import Mellum2Architecture
    from mellum2_megatron.evaluation.inference import Engine

_ENGINES = ("transformers", "vllm")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Request:
    """What is to be measured: a folder, an engine, and the arms beside the plain one."""

    folder: Path
    architecture: Mellum2Architecture
    engine: str
    use_mtp: bool
    dense: Mellum2Architecture | None
    length: int
    python: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class _Running:
    """Started engines by arm, the engine's name and version, its device, and a memory gauge."""

    engines: Mapping[str, Engine]
    name: str
    device: str
    peak_memory: Callable[[], Mapping[str, int]]


def bench_inference(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Hugging Face folder")],
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            help="transformers, in float32 on the CPU; or vllm, from its own environment",
        ),
    ] = "transformers",
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
    python: Annotated[
        Path, typer.Option("--python", help="Python of an environment with vLLM")
    ] = Path(".venv-serve/bin/python"),
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
    from conversion.huggingface.writer import check_tokenizer
    from mellum2_megatron.data.tokens.tokenizer import load_tokenizer
    from mellum2_megatron.evaluation.inference import Bench, measure_arms, real_prompts
    from mellum2_megatron.evaluation.inference_plot import draw_bench
    from mellum2_megatron.upstream import quiet_upstream

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
    request = _request(
        folder, engine, mode, use_mtp=use_mtp, dense=dense, length=prompt + output, python=python
    )
    bench.check(request.architecture)
    out = out or folder / f"bench_{mode}.json"
    check_writable("--out", out, folder=False)
    quiet_upstream()
    check_tokenizer(folder, request.architecture)
    tokenizer = load_tokenizer(folder)
    rounds = real_prompts(
        lambda words: tokenizer.encode(words, add_special_tokens=False).ids, bench, text or ()
    )
    with _vllm(request) if engine == "vllm" else _transformers(request) as running:
        error_console.print(f"measuring {', '.join(running.engines)}: {len(rounds)} rounds")
        answers = measure_arms(running.engines, rounds, bench)
        report = _report(request, running, answers, bench)
    write_json(out, report)
    if plot is not None:
        draw_bench(report, plot)
    _print(report)
    print_line(f"wrote {out}" + (f" and {plot}" if plot is not None else ""))


def _request(
    folder: Path,
    engine: str,
    mode: str,
    *,
    use_mtp: bool,
    dense: bool,
    length: int,
    python: Path,
) -> _Request:
    """Return what is to be measured; refuse what cannot be."""
    from conversion.huggingface.folder import HfFolder
    from mellum2_megatron.planning.reference_shapes import dense_counterpart

    if engine not in _ENGINES:
        raise InputError(f"--engine {engine}", rule="no such engine", fix=nearest(engine, _ENGINES))
    with HfFolder.open(folder) as opened:
        architecture = opened.architecture
    if use_mtp and not architecture.num_mtp_layers:
        raise InputError(
            f"--use-mtp with {folder}", rule="the model has no MTP head", fix="leave --use-mtp out"
        )
    if use_mtp and mode == "throughput" and engine == "transformers":
        raise InputError(
            "--use-mtp --mode throughput",
            rule="transformers drafts for one request at a time",
            fix="use --mode sync, or --engine vllm",
        )
    return _Request(
        folder=folder,
        architecture=architecture,
        engine=engine,
        use_mtp=use_mtp,
        dense=dense_counterpart(architecture) if dense else None,
        length=length,
        python=python,
    )


@contextmanager
def _transformers(request: _Request) -> Iterator[_Running]:
    from conversion.huggingface.timed_engine import peak_memory, transformers_engines
    from conversion.verification.memory import require_huggingface_memory

    require_huggingface_memory(str(request.folder), request.architecture, 1)
    if request.dense is not None:
        require_huggingface_memory("the dense model", request.dense, 1)
    yield _Running(
        engines=transformers_engines(
            str(request.folder), use_mtp=request.use_mtp, dense=request.dense
        ),
        name=f"transformers {importlib.metadata.version('transformers')}",
        device="cpu",
        peak_memory=lambda: {"all arms": peak_memory()},
    )


@contextmanager
def _vllm(request: _Request) -> Iterator[_Running]:
    from mellum2_megatron.evaluation.vllm_engine import vllm_engines
    from mellum2_megatron.serving.command import check_versions, read_versions

    versions = read_versions(request.python)
    check_versions(versions, request.architecture, use_mtp=request.use_mtp)
    error_console.print("starting vLLM, a server for each arm")
    # Kept if something fails: messages name the logs in it.
    work = Path(tempfile.mkdtemp(prefix="mellum2-bench-"))
    with vllm_engines(
        request.python,
        versions,
        request.folder,
        request.architecture,
        length=request.length,
        use_mtp=request.use_mtp,
        dense=request.dense,
        work=work,
    ) as engines:
        yield _Running(
            engines=engines,
            name=f"vllm {versions.vllm}, transformers {versions.transformers}",
            device="cpu" if versions.cpu else "GPU",
            peak_memory=lambda: {name: one.peak_memory() or 0 for name, one in engines.items()},
        )
    shutil.rmtree(work)


def _report(
    request: _Request, running: _Running, answers: Mapping[str, Any], bench: Any
) -> dict[str, Any]:
    """Return the result as JSON types."""
    from mellum2_megatron.evaluation.inference import bench_report

    facts = {}
    for name in running.engines:
        shape = request.architecture
        if name == "dense" and request.dense is not None:
            shape = request.dense
        facts[name] = {
            "same_model": name != "dense",
            "parameters": shape.num_parameters(mtp=name == "mtp"),
        }
    report = bench_report(
        answers,
        bench,
        model=str(request.folder),
        engine=running.name,
        device=running.device,
        facts=facts,
    )
    report["peak_memory"] = dict(running.peak_memory())
    return report


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
    for name, size in report["peak_memory"].items():
        print_line(f"peak memory, {name}: {size / 1e9:.2f} GB")
    for note in report["notes"]:
        print_line(note)
    sys.stdout.flush()


def _cell(figure: Mapping[str, Any]) -> str:
    """Return a value with its 95% interval: half of it, or both ends where they lie unevenly."""
    value, low, high = figure["value"], figure["low"], figure["high"]
    if low is None:
        return f"{value:.4g}"
    if figure["unit"] == "share":
        return f"{value:.3f} ({low:.3f} to {high:.3f})"
    return f"{value:.4g} +- {(high - low) / 2:.2g}"
