"""One probe for each patch: it fails without the patch and passes with it, all others applied.

`main` prints the outcomes as JSON: ``{name: {"without": error or null, "with": error or null}}``.
Megatron is imported once, unpatched, on the CPU stand-ins for ``torch.cuda``; every probe
runs in a fork of that process which installs the patches it is meant to see. `ADAM` is left out as
a whole too: its four only make sense together.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mellum2_megatron.upstream.patching import Patch
from tests import REPOSITORY

PROBES: dict[str, Callable[[], None]] = {}


@functools.cache
def outcomes(*names: str) -> dict[str, dict[str, str | None]]:
    """Run `main` for these patches in a fresh process, once, and return what it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    # upstream_probes registers its own: those of mellum2_megatron/upstream/patches.py.
    command = [
        sys.executable,
        "-c",
        "from tests.cpu import patch_probes, upstream_probes; patch_probes.main()",
        *names,
    ]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise AssertionError(done.stdout + done.stderr)
    result: dict[str, dict[str, str | None]] = json.loads(done.stdout.splitlines()[-1])
    return result


def check_still_needed(patch: Patch, without: dict[str, str]) -> None:
    """Check that the probe fails as in `without` when the patch is left out, and passes with it."""
    outcome = outcomes(*without)[patch.name]
    error = outcome["without"]
    assert error is not None, (
        f"{patch.target} works as it is: drop the patch {patch.name!r} ({patch.why})"
    )
    assert error.startswith(without[patch.name]), error
    assert outcome["with"] is None, outcome["with"]


def probe(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a probe: it raises without the patch ``name``, and checks the patched result."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        PROBES[name] = function
        return function

    return register


# ------------------------------------------------------------------------------------------------
# Probes of mellum2_megatron/cpu/patches.py
# ------------------------------------------------------------------------------------------------


@probe("rng-state")
def _rng_state() -> None:
    import torch
    from megatron.core.tensor_parallel import random

    state = torch.get_rng_state()
    drawn = torch.rand(3)
    random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), drawn), "setting the state changed nothing"


@probe("loader-seed")
def _loader_seed() -> None:
    import torch
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import build_train_valid_test_data_iterators, update_train_iters

    from tests.cpu.tiny_pretrain import datasets

    one_rank()
    args = parse()
    initialize_megatron()
    args.iteration = 0
    update_train_iters(args)
    before = torch.get_rng_state()
    iterator, _, _ = build_train_valid_test_data_iterators(datasets)
    assert set(next(iterator)) == {"tokens", "labels"}
    assert torch.equal(torch.get_rng_state(), before), "making the iterators drew random numbers"


@probe("warmup-seed")
def _warmup_seed() -> None:
    import torch
    from megatron.training.initialize import initialize_megatron, set_jit_fusion_options

    one_rank()
    parse()
    initialize_megatron()
    before = torch.get_rng_state()
    set_jit_fusion_options()
    assert torch.equal(torch.get_rng_state(), before), "the warm-up drew random numbers"


@probe("allow-no-cuda")
def _allow_no_cuda() -> None:
    from megatron.core import parallel_state
    from megatron.training.initialize import initialize_megatron

    one_rank()
    parse()
    initialize_megatron()
    assert parallel_state.model_parallel_is_initialized()


@probe("expert-splits")
def _expert_splits() -> None:
    import torch
    from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu

    one_rank()
    splits = maybe_move_tensor_to_cpu(torch.tensor([3]), as_numpy=True)
    output = torch.empty(3)
    torch.distributed.all_to_all_single(output, torch.arange(3.0), splits, splits)
    assert output.tolist() == [0, 1, 2]


@probe("expert-rows")
def _expert_rows() -> None:
    """Experts see whole blocks of rows; outputs and gradients are those of their tokens alone."""
    import types

    import torch
    from megatron.core.transformer.moe.experts import SequentialMLP

    counts, generator = [3, 0, 40], torch.Generator().manual_seed(1)
    tokens_th, other_th = torch.randn(2, 43, 16, generator=generator)
    weights = torch.randn(3, 16, 16, generator=generator)
    rows = []

    def expert(weight: torch.Tensor) -> Callable[..., Any]:
        def multiply(hidden: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, None]:
            rows.append(len(hidden))
            return (hidden @ weight) * probs[:, None] + 1, None

        return multiply

    def run(forward: Callable[..., Any], dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [
            x.to(dtype).requires_grad_() for x in (tokens_th, torch.arange(43.0) / 43, *weights)
        ]
        hidden, probs, *own = inputs
        experts = types.SimpleNamespace(
            num_local_experts=3,
            local_experts=[expert(weight) for weight in own],
            config=types.SimpleNamespace(moe_apply_probs_on_input=False, fp8=None, fp4=None),
        )
        output, _ = forward(experts, hidden, torch.tensor(counts), probs)
        output.backward(other_th.to(dtype))
        return [output, *(x.grad for x in inputs)]

    def plain(experts: Any, hidden: torch.Tensor, _: Any, probs: torch.Tensor) -> Any:
        parts = zip(experts.local_experts, hidden.split(counts), probs.split(counts), strict=True)
        return torch.cat([own(*given)[0] for own, *given in parts]), None

    for dtype, seen in ((torch.float32, counts), (torch.bfloat16, [32, 0, 64])):
        rows.clear()
        found = run(SequentialMLP.forward, dtype)
        assert rows == seen, f"rows of the experts in {dtype}: {rows}"
        torch.testing.assert_close(found, run(plain, dtype))


def _adam_survives_a_checkpoint() -> None:
    """Build a DistributedOptimizer, step, save, load into a fresh one, save and step again."""
    first, second = _distributed_adam(), _distributed_adam()
    _step(*first)
    saved = first[1].state_dict()
    assert all(group["step"] == 1 for group in saved["optimizer"]["param_groups"]), (
        "a group without its step"
    )
    second[1].load_state_dict(saved)
    assert second[1].state_dict()["optimizer"]["param_groups"] == saved["optimizer"]["param_groups"]
    _step(*second)
    steps = {group["step"] for group in second[1].state_dict()["optimizer"]["param_groups"]}
    assert steps == {2}, f"steps after two updates: {steps}"


ADAM = ("fused-adam", "fused-adam-arguments", "fused-adam-state", "fused-adam-step")
for _name in ADAM:
    PROBES[_name] = _adam_survives_a_checkpoint


@probe("type-names-float16")
def _type_names_float16() -> None:
    import torch
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    halves = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    floats = torch.nn.Parameter(torch.ones(2))
    inner = torch.optim.SGD([halves, floats], lr=0.1)
    optimizer = Float16OptimizerWithFloat16Params(inner, OptimizerConfig(bf16=True), None, None)
    assert optimizer.float16_groups == [[halves]]
    assert optimizer.fp32_from_fp32_groups == [[floats]]
    assert optimizer.fp32_from_float16_groups[0][0].dtype == torch.float32


@probe("type-names-distributed")
def _type_names_distributed() -> None:
    _distributed_adam()


@probe("type-names-clip")
def _type_names_clip() -> None:
    import torch
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))


@probe("write-results")
def _write_results() -> None:
    import queue

    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

    results = get_write_results_queue()
    assert isinstance(results, queue.Queue), (
        f"{type(results).__name__}: another process holds the results"
    )
    assert get_write_results_queue() is results


@probe("thd-partition")
def _thd_partition() -> None:
    from types import SimpleNamespace

    import torch
    from megatron.core import utils

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.distributed, "get_world_size", lambda group: 2)
        patched.setattr(torch.distributed, "get_rank", lambda group: 1)
        batch = {
            "cu_seqlens": torch.tensor([[0, 3, 9]]),
            "cu_seqlens_padded": torch.tensor([[0, 4, 12]]),
        }
        batch |= {"tokens": torch.arange(12)[None], "labels": torch.arange(12)[None] + 1}
        utils._get_batch_on_this_cp_rank_per_document_balancing(batch, SimpleNamespace())
    assert batch["tokens"].tolist() == [
        [1, 2, 6, 7, 8, 9]
    ]  # the second and third quarter of each document
    assert batch["labels"].tolist() == [[2, 3, 7, 8, 9, 10]]


# ------------------------------------------------------------------------------------------------
# Parts
# ------------------------------------------------------------------------------------------------


def one_rank() -> None:
    import torch

    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def on_two_ranks(function: Callable[[], Any]) -> list[Any]:
    """Call ``function`` in two forks that form a gloo world; return both results, through JSON."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(2):
            children.append(os.fork())
            if children[-1] == 0:
                try:
                    store = torch.distributed.FileStore(f"{folder}/store", 2)
                    torch.distributed.init_process_group(
                        "gloo", store=store, rank=rank, world_size=2
                    )
                    Path(folder, str(rank)).write_text(json.dumps(function()))
                finally:
                    os._exit(0)
        for child in children:
            os.waitpid(child, 0)
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(2)]


def parse(**changes: Any) -> Any:
    from megatron.training.arguments import parse_and_validate_args

    from tests.cpu.tiny_pretrain import arguments

    sys.argv = ["probe", *arguments(**changes)]
    return parse_and_validate_args()


def _distributed_adam() -> tuple[Any, Any]:
    """A linear layer in DistributedDataParallel and Megatron's distributed Adam for it."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    if not torch.distributed.is_initialized():
        one_rank()
        parallel_state.initialize_model_parallel()
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, bf16=True)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=True
    )
    model = DistributedDataParallel(config, ddp_config, torch.nn.Linear(4, 4, dtype=torch.bfloat16))
    settings = OptimizerConfig(
        optimizer="adam",
        lr=0.1,
        bf16=True,
        use_distributed_optimizer=True,
        params_dtype=torch.bfloat16,
    )
    optimizer = get_megatron_optimizer(settings, [model])
    inner = optimizer.chained_optimizers[0]
    # A rank that owns nothing of a group still saves the group.
    inner.optimizer.add_param_group(
        inner.optimizer.param_groups[0] | {"params": [], "wd_mult": 0.5}
    )
    return model, inner


def _step(model: Any, optimizer: Any) -> None:
    import torch

    model.zero_grad_buffer()
    model(torch.ones(1, 4, dtype=torch.bfloat16)).float().sum().backward()
    model.finish_grad_sync()
    optimizer.step()


# ------------------------------------------------------------------------------------------------
# The script
# ------------------------------------------------------------------------------------------------


def _fork(name: str, patches: list[Patch]) -> str | None:
    """Run one probe in a fork with ``patches``; return what it raised, in a line."""
    from mellum2_megatron.upstream import patching

    with tempfile.TemporaryFile("w+") as answer:
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            try:
                patching.install(patches)
                PROBES[name]()
            except BaseException as error:
                answer.write(f"{type(error).__name__}: {error}".splitlines()[0][:400])
            finally:
                answer.flush()
                os._exit(0)
        os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what the probe has started
        answer.seek(0)
        return answer.read() or None


def main() -> None:
    """Probe the patches named in the arguments; `ADAM` too if the first of it is one of them."""
    from mellum2_megatron.cpu import compiling, device
    from mellum2_megatron.cpu.activation import HIDDEN
    from mellum2_megatron.cpu.patches import PATCHES
    from mellum2_megatron.upstream import PATCHES as UPSTREAM

    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    for name in HIDDEN:
        sys.modules[name] = None  # type: ignore[assignment]
    device.install()
    compiling.install()
    import emerging_optimizers.orthogonalized_optimizers  # noqa: F401
    import megatron.core.tokenizers.text
    import megatron.training  # noqa: F401
    import torch._dynamo  # noqa: F401

    table = [*PATCHES, *UPSTREAM]
    names = sys.argv[1:]
    result = {
        patch.name: {
            "without": _fork(patch.name, [other for other in table if other is not patch]),
            "with": _fork(patch.name, table),
        }
        for patch in table
        if patch.name in names
    }
    if ADAM[0] in names:
        result["all of Adam's"] = {
            "without": _fork(ADAM[0], [patch for patch in table if patch.name not in ADAM])
        }
    sys.stdout.write(json.dumps(result) + "\n")
