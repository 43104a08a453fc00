"""Is each patch still needed? One probe a patch, run with all the others applied and it left out, and then with it.

Run as a script it prints, as JSON, what each probe did: ``{name: {"without": error or null, "with": error or null}}``.
Megatron is imported once, unpatched, on the CPU stand-ins for ``torch.cuda``; every probe runs in a fork of that
process which installs the patches it is meant to see. `ADAM` is left out as a whole too: its four only make sense
together.
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

from mellum2_megatron.errors import InputError
from mellum2_megatron.patching import Patch

REPOSITORY = Path(__file__).resolve().parents[2]
PROBES: dict[str, Callable[[], None]] = {}


@functools.cache
def outcomes() -> dict[str, dict[str, str | None]]:
    """Run this file as a script, once, and return what it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.cpu.patch_probes"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise AssertionError(done.stdout + done.stderr)
    result: dict[str, dict[str, str | None]] = json.loads(done.stdout.splitlines()[-1])
    return result


def probe(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a probe: it raises when the patch ``name`` is missing, and checks what the patch makes right."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        PROBES[name] = function
        return function

    return register


# ---------------------------------------------------------------------------------------------------------------------
# Probes of mellum2_megatron/cpu/patches.py
# ---------------------------------------------------------------------------------------------------------------------


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

    _one_rank()
    args = _parse()
    initialize_megatron()
    args.iteration = 0
    update_train_iters(args)
    before = torch.get_rng_state()
    iterator, _, _ = build_train_valid_test_data_iterators(datasets)
    assert set(next(iterator)) == {"tokens", "labels"}
    assert torch.equal(torch.get_rng_state(), before), "making the iterators drew random numbers"


@probe("allow-no-cuda")
def _allow_no_cuda() -> None:
    from megatron.core import parallel_state
    from megatron.training.initialize import initialize_megatron

    _one_rank()
    _parse()
    initialize_megatron()
    assert parallel_state.model_parallel_is_initialized()


@probe("expert-splits")
def _expert_splits() -> None:
    import torch
    from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu

    _one_rank()
    splits = maybe_move_tensor_to_cpu(torch.tensor([3]), as_numpy=True)
    output = torch.empty(3)
    torch.distributed.all_to_all_single(output, torch.arange(3.0), splits, splits)
    assert output.tolist() == [0, 1, 2]


def _adam_survives_a_checkpoint() -> None:
    """Build a DistributedOptimizer, step, save, load into a fresh one: saves again, and counts on from there."""
    first, second = _distributed_adam(), _distributed_adam()
    _step(*first)
    saved = first[1].state_dict()
    assert all(group["step"] == 1 for group in saved["optimizer"]["param_groups"]), "a group without its step"
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
    assert isinstance(results, queue.Queue), f"{type(results).__name__}: another process holds the results"
    assert get_write_results_queue() is results


@probe("thd-partition")
def _thd_partition() -> None:
    from types import SimpleNamespace

    import torch
    from megatron.core import utils

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.distributed, "get_world_size", lambda group: 2)
        patched.setattr(torch.distributed, "get_rank", lambda group: 1)
        batch = {"cu_seqlens": torch.tensor([[0, 3, 9]]), "cu_seqlens_padded": torch.tensor([[0, 4, 12]])}
        batch |= {"tokens": torch.arange(12)[None], "labels": torch.arange(12)[None] + 1}
        utils._get_batch_on_this_cp_rank_per_document_balancing(batch, SimpleNamespace())
    assert batch["tokens"].tolist() == [[1, 2, 6, 7, 8, 9]]  # the second and third quarter of each document
    assert batch["labels"].tolist() == [[2, 3, 7, 8, 9, 10]]


# ---------------------------------------------------------------------------------------------------------------------
# Probes of mellum2_megatron/upstream.py
# ---------------------------------------------------------------------------------------------------------------------


@probe("compile-helpers")
def _compile_helpers() -> None:
    from megatron.core.datasets.utils import compile_helpers

    compile_helpers()


@probe("layer-wise-layout")
def _layer_wise_layout() -> None:
    """The config-container path must not get as far as training with Muon: without the patch it does."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

    _one_rank()
    args = _parse()
    container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))

    def datasets(_: object) -> None:
        raise AssertionError("Muon was set up without the layer-wise layout")

    with pytest.raises(InputError, match="layer-wise parameter layout"):
        pretrain(container, datasets, ModelType.encoder_or_decoder, None)


@probe("batch-ramp")
def _batch_ramp() -> None:
    """A ramp from 2 to 4 sequences must not be taken for a constant batch of 4."""
    from megatron.core.num_microbatches_calculator import get_current_global_batch_size

    _one_rank()
    try:
        _parse(rampup_batch_size=[2, 2, 100])
    except InputError as refusal:
        outcome = str(refusal)
    else:
        outcome = f"the ramp is ignored: the first batch has {get_current_global_batch_size()} sequences"
    assert outcome.startswith("--rampup-batch-size 2 2 100"), outcome


@probe("fusion-without-apex")
def _fusion_without_apex() -> None:
    """The output layer beside Transformer Engine's: built, and its gradient accumulates the ordinary way."""
    import torch
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    _one_rank()
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True)
    config.gradient_accumulation_fusion = True
    layer = ColumnParallelLinear(8, 16, config=config, init_method=torch.nn.init.ones_, bias=False)
    layer(torch.ones(3, 1, 8))[0].sum().backward()
    assert torch.equal(layer.weight.grad, torch.full((16, 8), 3.0))
    assert config.gradient_accumulation_fusion


@probe("muon-experts")
def _muon_experts() -> None:
    """Two tensor-parallel ranks that hold the same experts, and no data parallelism."""
    from types import SimpleNamespace

    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    divided: list[tuple[int, int]] = []
    optimizer = SimpleNamespace(
        dp_cp=SimpleNamespace(size=lambda: 1),
        expt_dp=SimpleNamespace(size=lambda: 2),
        _shard_params_from_layout=lambda _optimizers, _layouts, dense, experts: divided.append((dense, experts)),
    )
    LayerWiseDistributedOptimizer.shard_params(optimizer, [], full_param_layouts=[])
    assert divided == [(1, 2)], "every rank owns all experts"


def _muon_groups_fit() -> None:
    """A checkpoint of one parameter group is read by a run whose experts have a group of their own."""
    from types import SimpleNamespace

    from megatron.core.dist_checkpointing.dict_utils import merge
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
    from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    _one_rank()
    groups = [{"params": [number], "is_expert_parallel": number == 1, "max_lr": 0.1, "lr": 0} for number in range(2)]
    asked = [group | {"params": LocalNonpersistentObject(group["params"])} for group in groups]
    loaded: list[dict[str, Any]] = []
    inner = SimpleNamespace(
        sharded_state_dict=lambda *_, **__: {"optimizer": {"state": {}, "param_groups": asked}},
        load_state_dict=lambda state: loaded.extend(state["optimizer"]["param_groups"]),
        optimizer=SimpleNamespace(state_dict=lambda: {"param_groups": groups}),
    )
    optimizer = object.__new__(LayerWiseDistributedOptimizer)
    optimizer.chained_optimizers, optimizer.pg_collection, optimizer.model_chunks = [inner], None, []
    _, local, _ = load_preprocess(optimizer.sharded_state_dict({}, is_loading=True, metadata={}))
    stored = {"optimizer": {"param_groups": [{"is_expert_parallel": False, "max_lr": 0.1, "lr": 0.05}]}}
    optimizer.load_state_dict(merge(stored, local))
    assert [group["params"] for group in loaded] == [[0], [1]], "groups without their parameters"
    assert loaded == [group | {"lr": 0.05} for group in groups]


PROBES["muon-groups-asked"] = PROBES["muon-groups-loaded"] = _muon_groups_fit


@probe("packed-mtp")
def _packed_mtp() -> None:
    """Two documents, of three tokens in four places and of two in four."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.multi_token_prediction import roll_tensor

    real, padded = torch.tensor([0, 3, 5]), torch.tensor([0, 4, 8])
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=real,
        cu_seqlens_kv=real,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
    )
    tokens = torch.tensor([[11, 12, 13, 9, 21, 22, 9, 9]])
    rolled, total = roll_tensor(tokens, packed_seq_params=packed)
    assert rolled.tolist() == [[12, 13, 0, 0, 22, 0, 0, 0]], f"{rolled.tolist()} after {tokens.tolist()}"
    assert total == 47


@probe("context-mtp")
def _context_mtp() -> None:
    """Eight tokens on two ranks, seven of them with a next one: each of the seven has the same weight."""
    for per_token, weight in ((False, 2 / 7), (True, 8 / 7)):  # DDP divides by two ranks, or finalize by eight tokens
        for rank, found in enumerate(_on_two_ranks(functools.partial(_mtp_weights, per_token))):
            has_next = [1, 1, 1, 0] if rank == 0 else [1, 1, 1, 1]
            assert found == pytest.approx([weight * each for each in has_next]), f"rank {rank} of 2 weighs {found}"


def _mtp_weights(per_token: bool) -> list[float]:
    """The gradient of the MTP loss in each token's logit, on one of two context-parallel ranks."""
    import torch
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer import multi_token_prediction as mtp

    config = TransformerConfig(
        num_layers=1,
        hidden_size=1,
        num_attention_heads=1,
        mtp_num_layers=1,
        mtp_loss_scaling_factor=1.0,
        calculate_per_token_loss=per_token,
    )
    hidden = torch.zeros(8, 1, 1, requires_grad=True)  # four tokens of the trunk, four of the MTP layer
    mtp.process_mtp_loss(
        hidden_states=hidden,
        labels=torch.zeros(1, 4, dtype=torch.long),
        loss_mask=torch.ones(1, 4),
        output_layer=lambda states, **_: (states, None),
        output_weight=None,
        runtime_gather_output=None,
        is_training=False,
        compute_language_model_loss=lambda labels, logits: logits[..., 0].T,
        config=config,
        cp_group=torch.distributed.group.WORLD,
    ).sum().backward()
    assert hidden.grad is not None
    return [float(weight) for weight in hidden.grad[4:].flatten()]


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def _one_rank() -> None:
    import torch

    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def _on_two_ranks(function: Callable[[], Any]) -> list[Any]:
    """Call ``function`` in two forks that form a gloo world; return what each returned, as JSON brings it back."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(2):
            children.append(os.fork())
            if children[-1] == 0:
                try:
                    store = torch.distributed.FileStore(f"{folder}/store", 2)
                    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
                    Path(folder, str(rank)).write_text(json.dumps(function()))
                finally:
                    os._exit(0)
        for child in children:
            os.waitpid(child, 0)
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(2)]


def _parse(**changes: Any) -> Any:
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
        _one_rank()
        parallel_state.initialize_model_parallel()
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, bf16=True)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, ddp_config, torch.nn.Linear(4, 4, dtype=torch.bfloat16))
    settings = OptimizerConfig(
        optimizer="adam", lr=0.1, bf16=True, use_distributed_optimizer=True, params_dtype=torch.bfloat16
    )
    optimizer = get_megatron_optimizer(settings, [model])
    inner = optimizer.chained_optimizers[0]
    # A rank that owns nothing of a group still saves the group.
    inner.optimizer.add_param_group(inner.optimizer.param_groups[0] | {"params": [], "wd_mult": 0.5})
    return model, inner


def _step(model: Any, optimizer: Any) -> None:
    import torch

    model.zero_grad_buffer()
    model(torch.ones(1, 4, dtype=torch.bfloat16)).float().sum().backward()
    model.finish_grad_sync()
    optimizer.step()


# ---------------------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------------------


def _fork(name: str, patches: list[Patch]) -> str | None:
    """Run one probe in a fork with ``patches``; return what it raised, in a line."""
    from mellum2_megatron import patching

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


def _main() -> None:
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
    result = {
        patch.name: {
            "without": _fork(patch.name, [other for other in table if other is not patch]),
            "with": _fork(patch.name, table),
        }
        for patch in table
        if patch.name in PROBES
    }
    result["all of Adam's"] = {"without": _fork(ADAM[0], [patch for patch in table if patch.name not in ADAM])}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    _main()
