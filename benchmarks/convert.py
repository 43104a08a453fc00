"""Conversion against a plain copy of the same bytes and against other converters, in one run.

::

    python benchmarks/convert.py                       # 8 full-width layers, 7.6 GB
    python benchmarks/convert.py --layers 2 4          # and does memory grow with the model?
    python benchmarks/convert.py --layers 2 --small    # megabytes: does it run at all

Each step is a process of its own, so that its peak memory is its own. Every step ends with its
bytes on the disk (fsync). The page cache is warm for all of them: the source was just written.

The disk of --folder needs room for five times the model. transformers and Megatron-Bridge need
twice the model's size in memory; --skip-transformers and --skip-bridge leave them out. Bridge takes
part where it can be imported beside Transformer Engine (scripts/setup_bridge.sh), on a CPU by the
same means as its tests.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mellum2_megatron.architecture import PRESETS, Mellum2Architecture, to_hf_config
from mellum2_megatron.common.files import size_text

_CHUNK = 16 * 2**20


def architecture(layers: int, small: bool) -> Mellum2Architecture:
    """Return the architecture of the released model, or of the tiny one, with ``layers`` layers."""
    return PRESETS["mellum2-tiny" if small else "mellum2-12b"].replace(num_hidden_layers=layers)


def make(folder: Path, layers: int, small: bool) -> None:
    """Write a Hugging Face folder of random weights."""
    import torch

    from conversion.huggingface.dtypes import Dtypes
    from conversion.huggingface.format import CONFIG_FILE
    from conversion.huggingface.writer import create_shard, plan_shards, write_index, write_tensor
    from conversion.mapping import derive

    model = architecture(layers, small)
    folder.mkdir(parents=True)
    dtypes = Dtypes.uniform(derive(model), torch.bfloat16)
    shards = plan_shards(derive(model), dtypes)
    largest = max(
        torch.Size(source.shape).numel()
        for shard in shards
        for entry in shard.entries
        for source in entry.sources
    )
    # One pool of random numbers for all tensors, shifted for each: to draw billions of them would
    # take longer than the benchmark.
    pool = torch.randn(largest + 4096).mul_(0.02).bfloat16()
    for shard in shards:
        positions = create_shard(folder, shard, dtypes)
        with (folder / shard.file).open("r+b", buffering=0) as stream:
            for number, source in enumerate(
                source for entry in shard.entries for source in entry.sources
            ):
                start = number % 4096
                values = pool[start : start + torch.Size(source.shape).numel()]
                write_tensor(stream.fileno(), positions[source.name], values)
            os.fsync(stream.fileno())
    write_index(folder, shards, dtypes)
    (folder / CONFIG_FILE).write_text(json.dumps(to_hf_config(model, "bfloat16")))


def copy(source: Path, target: Path) -> None:
    """Copy every file through memory and fsync it."""
    target.mkdir()
    for path in source.iterdir():
        with (
            path.open("rb", buffering=0) as read,
            (target / path.name).open("wb", buffering=0) as write,
        ):
            while data := read.read(_CHUNK):
                write.write(data)
            os.fsync(write.fileno())


def transformers(source: Path, target: Path) -> None:
    """Load the whole model with transformers and save it: the Hugging Face half of converters that
    build the model."""
    import torch
    from transformers import MellumForCausalLM

    MellumForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)
    _sync(target)


def bridge_import(source: Path, target: Path) -> None:
    """Import with Megatron-Bridge, through a model in memory."""
    bridge = _bridge(source)
    model = bridge.to_megatron_model(wrap_with_ddp=False, use_cpu_initialization=True)
    bridge.save_megatron_model(model, target)
    _sync(target)


def bridge_export(source: Path, target: Path) -> None:
    """Export with Megatron-Bridge: ``bridge_import``'s checkpoint, which lies beside ``source``."""
    bridge = _bridge(source)
    model = bridge.load_megatron_model(source.with_name("bridge"))
    bridge.save_hf_weights(model, target, show_progress=False)
    _sync(target)


def _bridge(folder: Path) -> Any:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.te.worker import activate_beside_transformer_engine

    activate_beside_transformer_engine()
    from megatron.bridge import AutoBridge

    import conversion.bridge  # noqa: F401  # registers Mellum 2
    from mellum2_megatron.cpu import init_single_process

    init_single_process()
    return AutoBridge.from_hf_pretrained(folder)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def step(name: str, source: Path, target: Path, workers: int | None) -> None:
    """Do one step in this process and print its seconds and peak resident bytes as JSON."""
    # Outside the clock, as torch's import is for every step.
    from conversion.convert import export_hf, import_hf

    steps: dict[str, Callable[[Path, Path], object]] = {
        "import": functools.partial(import_hf, workers=workers),
        "export": functools.partial(export_hf, workers=workers),
        "copy": copy,
        "transformers": transformers,
        "bridge-import": bridge_import,
        "bridge-export": bridge_export,
    }
    start, cpu = time.monotonic(), time.process_time()
    steps[name](source, target)
    result = {
        "seconds": time.monotonic() - start,
        "cpu": time.process_time() - cpu,
        "peak": peak_memory(),
    }
    sys.stdout.write(json.dumps(result) + "\n")


def peak_memory() -> int:
    """Return the peak resident bytes of this process."""
    # Not getrusage: its figure includes the parent's memory before exec.
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def measure(name: str, source: Path, target: Path, workers: int | None) -> dict[str, Any]:
    """Do one step in a process of its own."""
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--step",
        name,
        str(source),
        str(target),
    ]
    command += ["--workers", str(workers)] if workers else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run(layers: int, arguments: argparse.Namespace, work: Path) -> dict[str, dict[str, Any]]:
    """Do all steps for one size, print a line for each and return their results by name."""
    hf, megatron = work / "hf", work / "megatron"
    make(hf, layers, arguments.small)
    nbytes = sum(path.stat().st_size for path in hf.glob("*.safetensors"))
    sys.stdout.write(f"{layers} layers, {size_text(nbytes)}\n")
    # The copy twice, before and after: a disk is seldom equally fast throughout.
    steps = [
        ("copy", hf, work / "copy"),
        ("import", hf, megatron),
        ("export", megatron, work / "exported"),
        ("copy again", hf, work / "copy"),
    ]
    if not arguments.skip_transformers:
        steps.append(("transformers", hf, work / "transformers"))
    if not arguments.skip_bridge:
        steps += [
            ("bridge-import", hf, work / "bridge"),
            ("bridge-export", hf, work / "bridge-exported"),
        ]
    results = {}
    for name, source, target in steps:
        result = results[name] = measure(name.split()[0], source, target, arguments.workers)
        if target not in (megatron, work / "bridge"):
            shutil.rmtree(target)
        speed = nbytes / result["seconds"] / 1e6
        measured = f"{result['seconds']:8.1f} s {speed:8,.0f} MB/s  cpu {result['cpu']:6.1f} s"
        sys.stdout.write(f"  {name:<14}{measured}  peak {size_text(result['peak'])}\n")
        sys.stdout.flush()
    for folder in (megatron, hf, work / "bridge"):
        shutil.rmtree(folder, ignore_errors=True)
    best_copy = min(results["copy"]["seconds"], results["copy again"]["seconds"])
    for name in ("import", "export"):
        seconds = results[name]["seconds"]
        line = f"  {name} at {best_copy / seconds:.2f} of the faster copy's speed"
        for rival, label in (
            ("transformers", "transformers"),
            (f"bridge-{name}", "Megatron-Bridge"),
        ):
            if rival in results:
                line += f", {results[rival]['seconds'] / seconds:.2f} times that of {label}"
        sys.stdout.write(line + "\n")
    return results


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[8], help="sizes to measure")
    parser.add_argument("--small", action="store_true", help="layers of mellum2-tiny")
    parser.add_argument("--workers", type=int, help="of import and export")
    parser.add_argument(
        "--folder", type=Path, help="disk to measure; default: the system's temporary folder"
    )
    parser.add_argument("--skip-transformers", action="store_true")
    parser.add_argument("--skip-bridge", action="store_true")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        name, source, target = arguments.step
        step(name, Path(source), Path(target), arguments.workers)
        return
    if missing := [
        name for name in ("megatron.bridge", "transformer_engine") if find_spec(name) is None
    ]:
        arguments.skip_bridge = True
        sys.stdout.write(f"without Megatron-Bridge: no {' and no '.join(missing)} here\n")
    peaks = {}
    with tempfile.TemporaryDirectory(prefix="mellum2-convert-", dir=arguments.folder) as work:
        for layers in arguments.layers:
            peaks[layers] = run(layers, arguments, Path(work))
    if len(peaks) > 1:
        for name in ("import", "export"):
            grown = ", ".join(
                f"{size_text(results[name]['peak'])} ({layers})"
                for layers, results in peaks.items()
            )
            sys.stdout.write(f"peak memory of {name} by layers: {grown}\n")


if __name__ == "__main__":
    main()
