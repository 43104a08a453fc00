"""Time one training step of a full-width slice of Mellum 2 12B: our backends, optimizers and
precisions, and transformers' model beside them.

::

    python -m benchmarks.train_step              # all arms on one GPU; without one, --small
    python -m benchmarks.train_step --tune       # and recompute, fusions, cross-entropy, dispatcher
    python -m benchmarks.train_step --arms te-bf16-muon-mtp transformers-bf16-adam
    python -m benchmarks.train_step --ranks 8    # each arm on 8 GPUs, which share the experts
    python -m benchmarks.train_step --small      # a tiny model on a CPU: does it run at all

Each arm runs in a fresh process, so that no memory or kernel state of another arm remains. The
first arm runs again in the middle and at the end: the difference between its runs is the machine's
drift. A large matrix product, before and after, gives the machine's own rate. Writes results.json,
step.png and one log per arm into --output. Exit code 1 if an arm failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.train_step_arm import Spec
from benchmarks.train_step_report import REFERENCE, SMALL_NOTE, draw, tables
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import write_json
from mellum2_megatron.planning.memory import memory_per_rank
from mellum2_megatron.planning.rules import enforce

REPOSITORY = Path(__file__).resolve().parent.parent
NO_GPU = "needs a GPU with Transformer Engine"
MEMORY_SHARE = 0.8  # largest estimate of an arm's memory, as a share of the GPU's
PERIOD = 4  # layers in one period of the attention pattern: three sliding, one full

ARMS = (
    Spec(name="te-bf16-muon-mtp", kind="megatron", backend="te"),
    Spec(name="te-fp8-muon-mtp", kind="megatron", backend="te", compute="fp8"),
    Spec(name="te-bf16-adam-mtp", kind="megatron", backend="te", optimizer="adam"),
    Spec(name="te-bf16-muon", kind="megatron", backend="te", mtp=False),
    Spec(name="te-bf16-adam", kind="megatron", backend="te", optimizer="adam", mtp=False),
    Spec(name="torch-bf16-muon-mtp", kind="megatron"),
    Spec(name="torch-bf16-adam", kind="megatron", optimizer="adam", mtp=False),
    Spec(name="transformers-bf16-adam", kind="transformers", optimizer="adam", mtp=False),
)
SMALL_ARMS = (
    Spec(name="torch-bf16-adam-mtp", kind="megatron", optimizer="adam"),
    Spec(name="torch-bf16-muon", kind="megatron", mtp=False),
)
"""Further arms of the small mode, which cannot run the te arms."""

_BF16, _FP8 = ARMS[:2]
_WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ce-native": (
        ("--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "native"),
        (),
    ),
    "ce-te": (("--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "te"), ()),
    "no-router-fusion": ((), ("--moe-router-fusion",)),
    "no-permute-fusion": ((), ("--moe-permute-fusion",)),
}
_OVERRIDES = (
    (_BF16, "allgather", "layout.dispatcher=allgather"),
    (_BF16, "whole-heads", "loss.head_chunk=null"),
    (_BF16, "recompute-act", "execution.recompute=[moe_act]"),
    (_BF16, "recompute-moe", "execution.recompute=[moe]"),
    (_BF16, "fused-residual-norm", "execution.fused_residual_norm=true"),
    (_BF16, "deterministic", "execution.deterministic=true"),
    (_FP8, "pad-in-router", "execution.pad_expert_tokens=true"),
)
TUNING = (
    *(
        dataclasses.replace(_BF16, name=f"{_BF16.name}/{name}", words=words, without=without)
        for name, (words, without) in _WORDS.items()
    ),
    *(
        dataclasses.replace(base, name=f"{base.name}/{name}", overrides=(override,))
        for base, name, override in _OVERRIDES
    ),
)
"""Variants of the first two arms: settings of a recipe, and words added to and removed from
Megatron's command line where there is no setting (0.19.2). Where an option is repeated, its last
value counts."""

EXCHANGES = tuple(
    dataclasses.replace(_BF16, name=f"{_BF16.name}/{name}", overrides=overrides)
    for name, overrides in (
        ("overlap", ("layout.overlap_expert_comm=true",)),
        ("overlap-wgrad", ("layout.overlap_expert_comm=true", "layout.delay_wgrad=true")),
        ("hybridep", ("layout.dispatcher=flex",)),
    )
)
"""Variants of the first arm in their exchange of tokens; on several ranks only."""

ONE_PROCESS = "runs in one process"

OVERHEAD = ("torch-bf16-adam", "transformers-bf16-adam")
"""Two arms with AdamW and without MTP. Their ratio is the overhead of Megatron on the CPU backend
over plain torch."""


def main(argv: list[str] | None = None) -> int:
    """Measure all arms, print the tables and write the results; return the exit code."""
    options = _parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    options.output.mkdir(parents=True, exist_ok=True)
    # This process never starts CUDA: its context would take memory from the arms. The matrix
    # product therefore reports the machine too.
    first = _run_arm(_gemm(options, small=options.small), options)
    if first["status"] != "measured":
        console.print(f"[red]the matrix product failed: {first['reason']}[/]")
        return 1
    small = first["on"] == "cpu"
    if small:
        console.print(f"[bold yellow]{SMALL_NOTE}[/]")
    try:
        specs, left_out = _plan(options, small, first["machine"])
    except InputError as error:
        console.print(f"[red]{error}[/]")
        return 2
    results = _header(options, small, first, specs)
    for number, spec in enumerate(specs, 1):
        console.print(f"{number}/{len(specs)} {spec.name}")
        arm = _run_arm(spec, options)
        results["arms"].append(_figures(spec, arm))
    last = _run_arm(_gemm(options, small=small), options)
    _finish(results, [first, last], left_out)
    write_json(options.output / "results.json", results)
    draw(results, options.output / "step.png")
    for table in tables(results):
        console.print(table)
    console.print(f"written: {options.output}/results.json, step.png")
    return int(any(run["status"] == "failed" for run in (*results["arms"], last)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    at_least_one = _number(int, least=1)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_train_step"))
    parser.add_argument(
        "--arms", nargs="+", metavar="NAME", help="run these arms only, in this order, repeats too"
    )
    parser.add_argument(
        "--tune", action="store_true", help="also run the variants of te arms (GPU only)"
    )
    parser.add_argument(
        "--small", action="store_true", help="tiny model on a CPU; the default without a GPU"
    )
    parser.add_argument(
        "--layers",
        type=at_least_one,
        help=f"decoder layers; default: the multiple of {PERIOD} that fits",
    )
    parser.add_argument(
        "--batch",
        type=at_least_one,
        help="sequences a step; default: 16 (4,096 sequences on 256 GPUs), small: 4",
    )
    parser.add_argument(
        "--ranks",
        type=at_least_one,
        default=1,
        help="processes of an arm, one GPU each, which share the experts; --batch is for each",
    )
    parser.add_argument(
        "--warmup", type=_number(int, least=0), default=3, help="steps before the timed ones"
    )
    parser.add_argument("--steps", type=at_least_one, default=10, help="timed steps")
    parser.add_argument(
        "--timeout",
        type=_number(float, least=1),
        default=300,
        help="time limit of an arm, seconds",
    )
    return parser


def _number[Number: (int, float)](kind: type[Number], *, least: int) -> Callable[[str], Number]:
    """Return a reader of an option's number, which refuses smaller ones than ``least``."""

    def read(word: str) -> Number:
        found = kind(word)
        if not found >= least:  # NaN too
            raise argparse.ArgumentTypeError(f"{word}: must be {least} or more")
        return found

    read.__name__ = kind.__name__  # of argparse's message on a word that is no number
    return read


def _gemm(options: argparse.Namespace, *, small: bool) -> Spec:
    return Spec(
        name="gemm",
        kind="gemm",
        small=small,
        warmup=options.warmup,
        steps=options.steps,
        profile=False,
    )


def _plan(
    options: argparse.Namespace, small: bool, machine: dict[str, Any]
) -> tuple[list[Spec], dict[str, str]]:
    """Choose the arms to run.

    Returns:
        The arms in the order of their runs, and the reason for each arm left out, by its name.

    Raises:
        InputError: an unknown arm, one that cannot run on this machine, or a batch or number of
            ranks that no arm can have.
    """
    has_te = not small and machine["versions"]["transformer-engine"] is not None
    tuning = (*TUNING, *(EXCHANGES if options.ranks > 1 else ())) if options.tune else ()
    known = (*ARMS, *(SMALL_ARMS if small else ()), *tuning)
    left_out = {spec.name: NO_GPU for spec in known if spec.backend == "te" and not has_te}
    if options.ranks > 1:
        left_out |= {spec.name: ONE_PROCESS for spec in known if spec.kind != "megatron"}
    able = {spec.name: spec for spec in known if spec.name not in left_out}
    names = options.arms
    if not names:
        # The first arm again in the middle and at the end, for the drift.
        every = list(able)
        middle = (len(every) + 1) // 2
        names = [*every[:middle], every[0], *every[middle:], every[0]]
    for name in names:
        if name not in able:
            rule = left_out.get(name, "there is no such arm")
            raise InputError(f"--arms {name}", rule=rule, fix=f"choose among {', '.join(able)}")
    layers = options.layers or (
        PERIOD
        if small
        else _fitting_layers(
            dataclasses.replace(able[names[0]], ranks=options.ranks), machine["memory_bytes"]
        )
    )
    settings = {"small": small, "layers": layers, "warmup": options.warmup, "steps": options.steps}
    settings |= {"batch": (options.batch or (4 if small else 16)) * options.ranks}
    settings |= {"ranks": options.ranks}
    # One profile per arm: a repetition is there for its times.
    specs = [
        dataclasses.replace(able[name], **settings, profile=name not in names[:number])
        for number, name in enumerate(names)
    ]
    for spec in specs:
        if spec.kind == "megatron":
            enforce(spec.run, spec.ranks, "cpu" if small else "cuda", machine=False)
    return specs, left_out


def _fitting_layers(spec: Spec, memory_bytes: int) -> int:
    """Return the number of layers of all arms: whole periods that fit, at least one, at most the
    12B's 28."""
    layers = PERIOD
    # AdamW with MTP takes the most memory; all arms get the depth that it allows.
    while layers + PERIOD <= 28:
        run = dataclasses.replace(spec, layers=layers + PERIOD, mtp=True).run
        run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, name="adam"))
        estimate = memory_per_rank(run, world_size=spec.ranks)
        if estimate.total > MEMORY_SHARE * memory_bytes:
            break
        layers += PERIOD
    return layers


def _run_arm(spec: Spec, options: argparse.Namespace) -> dict[str, Any]:
    """Measure an arm in a fresh process, with its output in a log.

    Returns:
        ``status``: ``measured`` with the figures of `train_step_arm.measure`, or ``failed`` with a
        ``reason``.
    """
    logs = options.output / "logs"
    logs.mkdir(exist_ok=True)
    log = logs / f"{spec.name.replace('/', '_')}.log"
    with tempfile.TemporaryDirectory(prefix="mellum2-benchmark-") as folder:
        spec_file, figures_file = Path(folder, "spec.json"), Path(folder, "out.json")
        write_json(spec_file, dataclasses.asdict(spec))
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if spec.small else {}
        command = [sys.executable, "-m", "benchmarks.train_step_arm"]
        command += [str(spec_file), str(figures_file)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        with log.open("a") as stream:
            ranks = [
                subprocess.Popen(
                    [*command, str(rank), port],
                    cwd=REPOSITORY,
                    env=os.environ | hidden,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                )
                for rank in range(spec.ranks)
            ]
            code = _wait(ranks, options.timeout)
        if code is None:
            return {"status": "failed", "reason": f"not done in {options.timeout:g} s"}
        if code == 0 and figures_file.exists():
            return {"status": "measured", **json.loads(figures_file.read_text())}
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    reasons = [line for line in lines if "Error" in line] or lines or ["no output"]
    return {
        "status": "failed",
        "reason": f"exit code {code}: {reasons[-1].strip()[:300]} (see {log})",
    }


def _wait(ranks: list[subprocess.Popen[bytes]], seconds: float) -> int | None:
    """Wait for all ranks; end them when one fails or the time is over.

    Returns:
        0, the exit code of the first rank that failed, or None if the time is over.
    """
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            codes = [rank.poll() for rank in ranks]
            failed = [code for code in codes if code]
            if failed or None not in codes:
                return failed[0] if failed else 0
            time.sleep(0.1)
        return None
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def _figures(spec: Spec, arm: dict[str, Any]) -> dict[str, Any]:
    """Add the figures derived from the times: median, spread, tokens and model FLOPs a second."""
    figures = {"arm": spec.name, **arm}
    if arm["status"] != "measured":
        return figures
    run, seconds = spec.run, sorted(arm["seconds"])
    median = statistics.median(seconds)
    # Of one rank, as rates and memory are.
    tokens = spec.batch * run.data.sequence_length / spec.ranks
    flops = run.architecture.flops_per_token(run.data.sequence_length, mtp=spec.mtp)
    # Of torch's allocator, as the peak is: without the buffers of libraries.
    least = most = None
    if spec.kind == "megatron":
        memory = memory_per_rank(run, world_size=spec.ranks, backend=spec.backend)
        least, most = memory.allocated
    return figures | {
        "estimated_memory_bytes": most,
        "least_memory_bytes": least,
        "median_seconds": median,
        "spread": (seconds[-1] - seconds[0]) / median,
        "tokens_per_second": tokens / median,
        "model_flops_per_token": flops,
        "model_flops_per_second": flops * tokens / median,
    }


def _header(
    options: argparse.Namespace, small: bool, gemm: dict[str, Any], specs: list[Spec]
) -> dict[str, Any]:
    """Return the results before the first arm: machine, code, and the settings of all arms."""
    run = specs[0].run
    return {
        "mode": "small" if small else "gpu",
        "note": SMALL_NOTE if small else "random tokens: routing is more even than on text",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.train_step", *sys.argv[1:]]),
        "commit": _commit(),
        "machine": gemm["machine"],
        "slice": {
            "recipe": run.name,
            "layers": run.architecture.num_hidden_layers,
            "parameters": run.architecture.num_parameters(mtp=True),
            "sequence_length": run.data.sequence_length,
            "micro_batch": run.schedule.micro_batch_size,
            "batch": specs[0].batch,
            "ranks": specs[0].ranks,
            "warmup_steps": options.warmup,
            "timed_steps": options.steps,
        },
        "reference": None if small else REFERENCE,
        "arms": [],
    }


def _commit() -> str | None:
    """Return the repository's commit, with a + for uncommitted changes; None outside Git."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout

    try:
        changed = bool(git("status", "--porcelain").strip())
        return git("rev-parse", "HEAD").strip() + "+" * changed
    except (OSError, subprocess.CalledProcessError):
        return None


def _finish(results: dict[str, Any], gemms: list[dict[str, Any]], left_out: dict[str, str]) -> None:
    """Add the figures that need all arms: shares of the matrix product's rate, drift, the CPU
    backend's overhead, and the arms left out."""
    rates = [gemm["flops_per_second"] for gemm in gemms if gemm["status"] == "measured"]
    results["gemm"] = {
        "size": gemms[0]["size"],
        "runs": rates,
        "flops_per_second": statistics.median(rates),
    }
    measured = [arm for arm in results["arms"] if arm["status"] == "measured"]
    for arm in measured:
        arm["share_of_gemm"] = arm["model_flops_per_second"] / results["gemm"]["flops_per_second"]
    medians: dict[str, list[float]] = {}
    for arm in measured:
        medians.setdefault(arm["arm"], []).append(arm["median_seconds"])
    results["drift"] = {
        name: max(runs) / min(runs) - 1 for name, runs in medians.items() if len(runs) > 1
    }
    results["cpu_overhead"] = None
    ours, plain = ([arm for arm in measured if arm["arm"] == name] for name in OVERHEAD)
    if results["mode"] == "small" and ours and plain:
        results["cpu_overhead"] = {
            "of": OVERHEAD[0],
            "over": OVERHEAD[1],
            "wall": _median(ours, "seconds") / _median(plain, "seconds"),
            "processor": _median(ours, "cpu_seconds") / _median(plain, "cpu_seconds"),
        }
    results["arms"] += [
        {"arm": name, "status": "not measured", "reason": why} for name, why in left_out.items()
    ]


def _median(runs: list[dict[str, Any]], times: str) -> float:
    """Return the median over the steps of all runs of an arm, seconds."""
    return statistics.median(seconds for run in runs for seconds in run[times])


if __name__ == "__main__":
    sys.exit(main())
