"""Changes that Megatron-Core 0.19.2 needs to run on a CPU: one entry for each upstream object.

Each entry has a probe in ``tests/cpu/patch_probes.py``. The code is in `replacements` and `optim`.
"""

from __future__ import annotations

from mellum2_megatron.cpu import replacements
from mellum2_megatron.cpu.optim import FusedAdam, with_cuda_type_names
from mellum2_megatron.upstream.patching import Patch

PATCHES: tuple[Patch, ...] = (
    Patch(
        name="rng-state",
        target="megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        replacement=replacements.set_rng_state_now,
        why="tensor_parallel/random.py:175 queues the change until CUDA is initialised, which "
        "never happens",
    ),
    Patch(
        name="loader-seed",
        target="megatron.training.training:build_train_valid_test_data_iterators",
        replacement=replacements.keep_rng_state,
        why="training/training.py:4601 makes the loaders' iterators after the checkpoint is "
        "loaded, and each draws a seed from the CPU's generator (torch/utils/data/dataloader.py), "
        "here also dropout's: no resume would be exact",
    ),
    Patch(
        name="warmup-seed",
        target="megatron.training.initialize:_warmup_jit_function",
        replacement=replacements.keep_rng_state,
        why="training/initialize.py:497 draws tensors of the micro-batch's size, here from the "
        "generator that draws the weights next: those of a seed would change with the batch",
    ),
    Patch(
        name="allow-no-cuda",
        target="megatron.training.initialize:initialize_megatron",
        replacement=replacements.initialize_on_cpu,
        why="training/initialize.py:66 asserts torch.cuda.is_available(), and pretrain() does not "
        "pass allow_no_cuda",
    ),
    Patch(
        name="expert-splits",
        target="megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu",
        replacement=replacements.splits_as_numpy,
        why="core/transformer/moe/moe_utils.py:1184 turns the split sizes of the expert all-to-all "
        "into numpy arrays only if they are on a GPU; all_to_all_single takes no tensors for them",
    ),
    Patch(
        name="expert-rows",
        target="megatron.core.transformer.moe.experts:SequentialMLP.forward",
        replacement=replacements.whole_blocks_of_rows,
        why="core/transformer/moe/experts.py:1364 multiplies as many rows as an expert has tokens, "
        "and oneDNN compiles a kernel for each number of rows that it has not seen lately: 0.5 ms, "
        "where the product of 256 rows takes 0.1 ms",
    ),
    Patch(
        name="fused-adam",
        target="megatron.core.optimizer:Adam",
        replacement=lambda _: FusedAdam,
        why="core/optimizer/__init__.py:33 falls back to torch's AdamW, whose `step` tensors "
        "DistributedOptimizer mishandles (distrib_optimizer.py:838, 1028)",
    ),
    Patch(
        name="fused-adam-arguments",
        target="megatron.core.optimizer:USING_PYTORCH_OPTIMIZER",
        replacement=lambda _: False,
        why="core/optimizer/__init__.py:556 uses torch.optim.AdamW whatever `Adam` is when this "
        "is set",
    ),
    Patch(
        name="fused-adam-state",
        target="megatron.core.optimizer.distrib_optimizer:HAVE_APEX_OR_TE",
        replacement=lambda _: True,
        why="core/optimizer/distrib_optimizer.py:837, 869, 1025 look for per-parameter steps "
        "unless this is set",
    ),
    Patch(
        name="fused-adam-step",
        target="megatron.core.optimizer.distrib_optimizer:USING_APEX_OPTIMIZER",
        replacement=lambda _: True,
        why="core/optimizer/distrib_optimizer.py:851, 874 take the step from the parameter groups "
        "when this is set",
    ),
    Patch(
        name="type-names-float16",
        target="megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__",
        replacement=with_cuda_type_names,
        why="core/optimizer/optimizer.py:1009 accepts parameters only if their type string is "
        "torch.cuda.*Tensor",
    ),
    Patch(
        name="type-names-distributed",
        target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.__init__",
        replacement=with_cuda_type_names,
        why="core/optimizer/distrib_optimizer.py:401, 466, 758 compare type strings with "
        "torch.cuda.*Tensor",
    ),
    Patch(
        name="type-names-clip",
        target="megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32",
        replacement=with_cuda_type_names,
        why="core/optimizer/clip_grads.py:174 asserts that gradients are of type "
        "torch.cuda.FloatTensor",
    ),
    Patch(
        name="write-results",
        target="megatron.core.dist_checkpointing.strategies.filesystem_async:"
        "get_write_results_queue",
        replacement=replacements.results_in_process,
        why="core/dist_checkpointing/strategies/filesystem_async.py:65 starts a fresh Python "
        "process on every rank (it imports torch again: seconds, hundreds of megabytes) for a "
        "queue that only asynchronous saving needs",
    ),
    Patch(
        name="thd-partition",
        target="megatron.core.utils:tex",
        replacement=replacements.partition_documents,
        why="core/utils.py:2441 divides packed documents among context-parallel ranks with a CUDA "
        "function of Transformer Engine",
    ),
)
