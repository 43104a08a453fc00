"""The table of what Megatron-Core 0.19.2 needs changed to run on a CPU. One entry per upstream
object."""

from __future__ import annotations

import functools
import queue
import types
from typing import Any

import torch

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.cpu.optim import FusedAdam, with_cuda_type_names
from mellum2_megatron.upstream.patching import Patch


def _set_rng_state(original: Any) -> Any:
    @functools.wraps(original)
    def set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    return set_rng_state


def _initialize_on_cpu(original: Any) -> Any:
    @functools.wraps(original)
    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        check_arguments(get_args())
        return original(*args, **kwargs | {"allow_no_cuda": True})

    return initialize_megatron


def check_arguments(args: Any) -> None:
    """Refuse Megatron arguments that need a GPU, where upstream would fail later and less clearly.

    Raises:
        InputError: names the first such argument.
    """
    if args.distributed_backend != "gloo":
        _refuse(
            f"distributed_backend={args.distributed_backend}",
            "processes on CPUs talk over gloo",
            "gloo",
        )
    if args.async_save:
        _refuse(
            "async_save=True",
            "asynchronous saving stages through page-locked memory and CUDA streams",
            "False",
        )
    if args.fp8 or args.fp4:
        _refuse(
            f"fp8={args.fp8}, fp4={args.fp4}",
            "8- and 4-bit arithmetic is Transformer Engine's",
            "bf16 alone",
        )
    if args.transformer_impl == "transformer_engine":
        _refuse(
            f"transformer_impl={args.transformer_impl}",
            "Transformer Engine runs on GPUs only",
            "local",
        )
    if args.cuda_graph_impl != "none":
        _refuse(
            f"cuda_graph_impl={args.cuda_graph_impl}", "there are no CUDA graphs on a CPU", "none"
        )


def _refuse(value: str, rule: str, instead: str) -> None:
    raise InputError(value, rule=f"{rule} (device=cpu)", fix=f"use {instead}, or device=cuda")


def _results_in_process(original: Any) -> Any:
    results: queue.Queue[Any] | None = None

    @functools.wraps(original)
    def get_write_results_queue(mp_mode: str = "spawn") -> queue.Queue[Any]:
        nonlocal results
        results = results or queue.Queue()
        return results

    return get_write_results_queue


def _keep_rng_state(original: Any) -> Any:
    @functools.wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        state = torch.get_rng_state()
        result = original(*args, **kwargs)
        torch.set_rng_state(state)
        return result

    return build


def _splits_as_numpy(original: Any) -> Any:
    @functools.wraps(original)
    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return maybe_move_tensor_to_cpu


def _partition_documents(_: Any) -> Any:
    def thd_get_partitioned_indices(
        cu_seqlens: torch.Tensor, total_tokens: int, world_size: int, rank: int
    ) -> torch.Tensor:
        from mellum2_megatron.model.context_parallel import partition_indices

        assert cu_seqlens[-1] == total_tokens, "documents that do not fill the stream"
        return partition_indices(cu_seqlens.tolist(), world_size, rank)

    return types.SimpleNamespace(thd_get_partitioned_indices=thd_get_partitioned_indices)


PATCHES: tuple[Patch, ...] = (
    Patch(
        name="rng-state",
        target="megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        replacement=_set_rng_state,
        why="tensor_parallel/random.py:175 queues the change until CUDA is initialised, which never happens",
    ),
    Patch(
        name="loader-seed",
        target="megatron.training.training:build_train_valid_test_data_iterators",
        replacement=_keep_rng_state,
        why="training/training.py:4601 makes the loaders' iterators after the checkpoint is loaded, and each draws a "
        "seed from the CPU's generator (torch/utils/data/dataloader.py), here also dropout's: no resume would be exact",
    ),
    Patch(
        name="allow-no-cuda",
        target="megatron.training.initialize:initialize_megatron",
        replacement=_initialize_on_cpu,
        why="training/initialize.py:66 asserts torch.cuda.is_available(), and pretrain() does not pass allow_no_cuda",
    ),
    Patch(
        name="expert-splits",
        target="megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu",
        replacement=_splits_as_numpy,
        why="core/transformer/moe/moe_utils.py:1184 turns the split sizes of the expert all-to-all into numpy arrays "
        "only if they are on a GPU; all_to_all_single takes no tensors for them",
    ),
    Patch(
        name="fused-adam",
        target="megatron.core.optimizer:Adam",
        replacement=lambda _: FusedAdam,
        why="core/optimizer/__init__.py:33 falls back to torch's AdamW, whose `step` tensors DistributedOptimizer "
        "mishandles (distrib_optimizer.py:838, 1028)",
    ),
    Patch(
        name="fused-adam-arguments",
        target="megatron.core.optimizer:USING_PYTORCH_OPTIMIZER",
        replacement=lambda _: False,
        why="core/optimizer/__init__.py:556 uses torch.optim.AdamW whatever `Adam` is when this is set",
    ),
    Patch(
        name="fused-adam-state",
        target="megatron.core.optimizer.distrib_optimizer:HAVE_APEX_OR_TE",
        replacement=lambda _: True,
        why="core/optimizer/distrib_optimizer.py:837, 869, 1025 look for per-parameter steps unless this is set",
    ),
    Patch(
        name="fused-adam-step",
        target="megatron.core.optimizer.distrib_optimizer:USING_APEX_OPTIMIZER",
        replacement=lambda _: True,
        why="core/optimizer/distrib_optimizer.py:851, 874 take the step from the parameter groups when this is set",
    ),
    Patch(
        name="type-names-float16",
        target="megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__",
        replacement=with_cuda_type_names,
        why="core/optimizer/optimizer.py:1009 accepts parameters only if their type string is torch.cuda.*Tensor",
    ),
    Patch(
        name="type-names-distributed",
        target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.__init__",
        replacement=with_cuda_type_names,
        why="core/optimizer/distrib_optimizer.py:401, 466, 758 compare type strings with torch.cuda.*Tensor",
    ),
    Patch(
        name="type-names-clip",
        target="megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32",
        replacement=with_cuda_type_names,
        why="core/optimizer/clip_grads.py:174 asserts that gradients are of type torch.cuda.FloatTensor",
    ),
    Patch(
        name="write-results",
        target="megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue",
        replacement=_results_in_process,
        why="core/dist_checkpointing/strategies/filesystem_async.py:65 starts a fresh Python process on every rank (it "
        "imports torch again: seconds, hundreds of megabytes) for a queue that only asynchronous saving needs",
    ),
    Patch(
        name="thd-partition",
        target="megatron.core.utils:tex",
        replacement=_partition_documents,
        why="core/utils.py:2441 divides packed documents among context-parallel ranks with a CUDA function of "
        "Transformer Engine",
    ),
)
