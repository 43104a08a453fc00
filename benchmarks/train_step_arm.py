"""Measure one arm of `train_step.py` in a process of its own.

::

    python -m benchmarks.train_step_arm SPEC.json OUT.json RANK PORT

Megatron's arms run as ``mellum2 train`` does: the run's command line, `megatron.training.pretrain`,
and Megatron's `train_step` between two time stamps. Logging, validation and saving lie outside the
measured step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch

from mellum2_megatron.architecture import Mellum2Architecture, to_hf_config
from mellum2_megatron.common.files import write_json
from mellum2_megatron.config import Run, Schedule, apply_overrides
from mellum2_megatron.recipes import recipe

SEED = 7
TUPLES = ("overrides", "words", "without")
"""Fields of `Spec` that JSON gives back as lists."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """The settings of one arm.

    Attributes:
        name: name in tables and in ``--arms``.
        kind: ``megatron``, ``transformers``, or ``gemm`` for one large matrix product.
        backend, compute, optimizer, mtp: the run's settings that arms differ by; Megatron only.
        overrides: `key=value` words for the run, as `mellum2 train` takes them.
        words: words added to Megatron's command line.
        without: words removed from it.
        small: the tiny model on a CPU instead of the 12B's slice.
        layers: decoder layers.
        ranks: processes, which share the experts; each has a GPU of its own, if there are any.
        batch: sequences a step, of all ranks.
        warmup: steps before the timed ones.
        steps: timed steps.
        profile: run one further step under the profiler, after the timed ones.
    """

    name: str
    kind: Literal["megatron", "transformers", "gemm"]
    backend: Literal["te", "torch"] = "torch"
    compute: Literal["bf16", "fp8"] = "bf16"
    optimizer: Literal["muon", "adam"] = "muon"
    mtp: bool = True
    overrides: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    small: bool = False
    layers: int = 4
    ranks: int = 1
    batch: int = 16
    warmup: int = 3
    steps: int = 10
    profile: bool = True

    @property
    def run(self) -> Run:
        """The arm's variant of a recipe, without data files."""
        base = recipe(
            "mellum2_tiny_pretrain" if self.small else "mellum2_4layer_pretrain_1gpu_h200_fp8"
        )
        architecture = base.architecture.replace(num_hidden_layers=self.layers)
        if not self.mtp:
            architecture = architecture.replace(num_mtp_layers=0, mtp_layer_types=())
        steps = self.warmup + self.steps + self.profile
        run = dataclasses.replace(
            base,
            architecture=architecture,
            layout=dataclasses.replace(base.layout, ep=self.ranks, dp=self.ranks),
            optimizer=dataclasses.replace(base.optimizer, name=self.optimizer),
            precision=dataclasses.replace(base.precision, compute=self.compute),
            schedule=Schedule.from_steps(
                train_steps=steps,
                warmup_steps=1,
                decay_steps=1,
                batch_sizes=((0, self.batch),),
                micro_batch_size=base.schedule.micro_batch_size,
            ),
            # Random tokens need no loader processes.
            data=dataclasses.replace(base.data, workers=0),
            # Megatron logs inside its loop; an interval above all steps keeps it silent.
            logging=dataclasses.replace(
                base.logging, log_interval=1000, eval_iterations=0, tensorboard=False
            ),
        )
        return apply_overrides(run, self.overrides)


class Clock:
    """Times the steps of one arm: CUDA events on a GPU, `perf_counter` on a CPU.

    Attributes:
        seconds: wall time of each timed step.
        cpu_seconds: processor time of each timed step, all threads; on a CPU only. A busy machine
            changes it less than the wall time.
        profile: result of the profiled step, as `profiled` returns it; None before it.
    """

    def __init__(self, spec: Spec, *, cuda: bool) -> None:
        self.spec, self.cuda = spec, cuda
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.profile: dict[str, Any] | None = None
        self._calls = 0

    def step(self, work: Callable[[], Any], model: torch.nn.Module | None = None) -> Any:
        """Run one step and return its result: first the warm-up, then the timed steps, then the
        profiled one."""
        self._calls += 1
        if self._calls > self.spec.warmup + self.spec.steps:
            # Not timed: the profiler slows the step down.
            from benchmarks.train_step_profile import named_parts, profiled

            results: list[Any] = []
            with nullcontext() if model is None else named_parts(model):
                self.profile = profiled(lambda: results.append(work()), cuda=self.cuda)
            return results[0]
        if self._calls <= self.spec.warmup:
            return work()
        if not self.cuda:
            start, busy = time.perf_counter(), time.process_time()
            result = work()
            self.seconds.append(time.perf_counter() - start)
            self.cpu_seconds.append(time.process_time() - busy)
            return result
        # Kernels of the step before must not run inside this one's events.
        torch.cuda.synchronize()
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        result = work()
        after.record()
        torch.cuda.synchronize()
        self.seconds.append(before.elapsed_time(after) / 1e3)  # milliseconds
        return result


class _RandomTokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Uniformly random tokens, `[samples, length + 1]`; sample ``i`` is the same in every arm."""

    def __init__(self, architecture: Mellum2Architecture, length: int, samples: int) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.text = torch.randint(
            0, architecture.vocab_size, (samples, length + 1), generator=generator
        )

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        text = self.text[index]
        length = len(text) - 1
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(length),
            "position_ids": torch.arange(length),
        }


def megatron(spec: Spec, clock: Clock, device: Literal["cpu", "cuda"]) -> None:
    """Train through `megatron.training.pretrain`, timing each of its steps."""
    from mellum2_megatron import cpu, upstream
    from mellum2_megatron.upstream import megatron_arguments

    run = spec.run
    upstream.quiet_upstream()
    if device == "cpu":
        cpu.activate()
    else:
        upstream.activate()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from benchmarks.train_step_profile import in_part
    from mellum2_megatron.model.provider import run_model_provider
    from mellum2_megatron.training.step import forward_step

    words = megatron_arguments(run, world_size=spec.ranks, device=device, backend=spec.backend)
    missing = set(spec.without) - set(words)
    assert not missing, f"{missing} are not among the words of {spec.name}"
    sys.argv = [sys.argv[0], *(word for word in words if word not in spec.without), *spec.words]
    original = training.train_step

    def train_step(
        step: Any, data: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # Megatron makes the optimizer inside `pretrain`, so its first step is the first chance to
        # wrap it; an attribute of the instance marks it as wrapped.
        if "step" not in vars(optimizer):
            optimizer.step = in_part("optimizer", optimizer.step)
        return clock.step(lambda: original(step, data, model, optimizer, *args, **kwargs), model[0])

    def datasets(
        samples: tuple[int, int, int], vp_stage: int | None = None
    ) -> tuple[Any, None, None]:
        return _RandomTokens(run.architecture, run.data.sequence_length, samples[0]), None, None

    # Without the mark Megatron asks the provider on the first tensor-parallel rank only
    # (megatron/training/training.py:4547-4550, 0.19.2).
    datasets.is_distributed = True  # type: ignore[attr-defined]  # a mark on the function itself
    with mock.patch.object(training, "train_step", train_step):
        pretrain(
            pretrain_cfg_container_from_args(parse_and_validate_args()),
            datasets,
            ModelType.encoder_or_decoder,
            forward_step,
            model_provider=run_model_provider(run, spec.backend),
        )


def transformers(spec: Spec, clock: Clock, device: Literal["cpu", "cuda"]) -> None:
    """Train `MellumForCausalLM` as its users would: weights and AdamW state in BF16, no auxiliary
    loss, no MTP head."""
    from transformers import AutoConfig, MellumForCausalLM

    from benchmarks.train_step_profile import in_part

    run = spec.run
    settings = to_hf_config(run.architecture, "bfloat16")
    config = AutoConfig.for_model(**settings)
    torch.manual_seed(SEED)
    with torch.device(device):
        model = MellumForCausalLM._from_config(
            config, attn_implementation="sdpa", dtype=torch.bfloat16
        )
    model.train()  # gradient checkpointing is off unless asked for
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=run.optimizer.lr,
        betas=(run.optimizer.adam_beta1, run.optimizer.adam_beta2),
        eps=run.optimizer.adam_eps,
        weight_decay=run.optimizer.weight_decay,
        fused=True,
    )
    size, length = run.schedule.micro_batch_size, run.data.sequence_length
    total = spec.warmup + spec.steps + spec.profile
    text = _RandomTokens(run.architecture, length, total * spec.batch).text
    update = in_part("optimizer", optimizer.step)

    def train_step(batch: torch.Tensor) -> None:
        for rows in batch.split(size):
            tokens = rows[:, :-1].to(device, non_blocking=True)
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            (loss * (len(rows) / len(batch))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip_grad)
        update()
        optimizer.zero_grad(set_to_none=True)

    # Each pass of the loop is a step: warm-up, timed and profiled steps take `total` batches.
    for batch in text.split(spec.batch):
        clock.step(lambda batch=batch: train_step(batch), model)


def gemm(spec: Spec, clock: Clock, device: Literal["cpu", "cuda"]) -> dict[str, Any]:
    """Multiply two random square BF16 matrices.

    Returns:
        ``size`` of the matrices, ``flops_per_second`` and ``machine``.
    """
    # 20 products a step, so that the launch of a kernel does not count.
    size, repeats = (8192, 20) if device == "cuda" else (512, 1)
    generator = torch.Generator(device).manual_seed(SEED)
    left, right = (
        torch.randn(size, size, device=device, generator=generator).bfloat16() for _ in range(2)
    )
    for _ in range(clock.spec.warmup + clock.spec.steps):
        clock.step(lambda: [left @ right for _ in range(repeats)])
    seconds = sorted(clock.seconds)[len(clock.seconds) // 2] / repeats
    return {"size": size, "flops_per_second": 2 * size**3 / seconds, "machine": _machine(device)}


def _machine(device: Literal["cpu", "cuda"]) -> dict[str, Any]:
    """Return the device, its memory in bytes (GPU only) and the versions of packages."""

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    names = ("torch", "megatron-core", "transformers", "transformer-engine", "emerging-optimizers")
    machine: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {name: version(name) for name in names},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine |= {"device": properties.name, "memory_bytes": properties.total_memory}
    return machine


def set_environment(spec: Spec) -> None:
    """Set the variables that `mellum2 train` sets for such a run; before CUDA starts.

    Those that are set already win, except the ones that Megatron asserts.
    """
    if spec.kind != "megatron":
        return
    from mellum2_megatron.upstream import environment, gpu_environment

    os.environ.update(environment(spec.run))
    if not spec.small:
        for name, value in gpu_environment(spec.run).items():
            os.environ.setdefault(name, value)


def measure(spec: Spec) -> dict[str, Any]:
    """Run one arm in this process.

    Returns:
        ``on``, the device; ``seconds`` and ``cpu_seconds`` of each timed step; ``profile``;
        ``peak_memory_bytes``, torch's own on a GPU, the process's on a CPU. For ``gemm`` also the
        figures of `gemm`.
    """
    device: Literal["cpu", "cuda"] = (
        "cpu" if spec.small or not torch.cuda.is_available() else "cuda"
    )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    clock = Clock(spec, cuda=device == "cuda")
    result: dict[str, Any] = {"on": device}
    if spec.kind == "gemm":
        result |= gemm(spec, clock, device)
    else:
        {"megatron": megatron, "transformers": transformers}[spec.kind](spec, clock, device)
    assert len(clock.seconds) == spec.steps, (
        f"{len(clock.seconds)} of {spec.steps} steps were timed"
    )
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return result | {
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "peak_memory_bytes": peak,
        "profile": clock.profile,
    }


def main() -> int:
    """Read a `Spec`, measure it and write the first rank's figures, both as JSON."""
    spec_path, out, rank, port = sys.argv[1:5]
    values = json.loads(Path(spec_path).read_text())
    spec = Spec(**values | {name: tuple(values[name]) for name in TUPLES})
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(spec.ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
    set_environment(spec)
    figures = measure(spec)
    if rank == "0":
        write_json(out, figures)
    sys.stdout.flush()
    os._exit(0)  # the figures are written, and NCCL may wait at a normal exit


if __name__ == "__main__":
    sys.exit(main())
