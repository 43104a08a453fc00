"""Work-arounds that every user of the megatron-core 0.19.2 wheel needs, on a GPU as on a CPU.

`activate` applies the table `PATCHES`. Call it before training starts; Megatron may be imported
already. Each entry states the upstream fact and the version in which it was read. Each has a test
(``tests/upstream/test_patches.py``) that fails once upstream no longer needs the entry. The code is
in `replacements`, or in a module of its own. Faults that a subclass can mend are mended in
``model/``, for one the router's load counts in BF16. Replacements in the training loop are in
``training/hooks.py``.
"""

from __future__ import annotations

import importlib.util
import os

from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.upstream import (
    async_writer,
    muon_groups,
    patching,
    replacements,
    safe_loading,
    save_plans,
)
from mellum2_megatron.upstream.patching import Patch

PATCHES: tuple[Patch, ...] = (
    Patch(
        name="compile-helpers",
        target="megatron.core.datasets.utils:compile_helpers",
        replacement=replacements.import_helpers,
        why="core/datasets/utils.py:25 runs make in a folder where the wheel has no Makefile, and "
        "exits the process",
    ),
    Patch(
        name="document-index",
        target="megatron.core.datasets.gpt_dataset:_build_document_index",
        replacement=replacements.shuffle_in_place,
        why="core/datasets/gpt_dataset.py:714-732 makes two int64 arrays to get one of int32, 20 "
        "bytes for each document of each epoch where 4 do: 43 GB for 2**31 documents",
    ),
    Patch(
        name="layer-wise-layout",
        target="megatron.core.optimizer:_get_megatron_emerging_optimizer",
        replacement=replacements.refuse_wrong_muon_setup,
        why="core/optimizer/__init__.py:820 silently falls back to another algorithm when DDP was "
        "not given the layer-wise layout, and training/models/dist_utils.py:243 never gives it",
    ),
    Patch(
        name="batch-ramp",
        target="megatron.training.arguments:validate_args",
        replacement=replacements.refuse_batch_ramp,
        why="training/global_vars.py:127 does not pass --rampup-batch-size on: the batch stays "
        "constant",
    ),
    Patch(
        name="muon-experts",
        target="megatron.core.optimizer.layer_wise_optimizer:"
        "LayerWiseDistributedOptimizer.shard_params",
        replacement=replacements.shard_experts,
        why="core/optimizer/layer_wise_optimizer.py:552 lets every rank own all matrices when data "
        "parallelism is 1; but with tp > etp several tensor-parallel ranks hold the same experts, "
        "and DDP gives each rank a part of their gradients: wrong gradient norm and momentum, and "
        "a checkpoint that two ranks write",
    ),
    Patch(
        name="muon-groups-asked",
        target="megatron.core.optimizer.layer_wise_optimizer:"
        "LayerWiseDistributedOptimizer.sharded_state_dict",
        replacement=muon_groups.omit_param_groups_from_request,
        why="core/dist_checkpointing/dict_utils.py:227 merges parameter groups by position; "
        "layer-wise Muon has one more with expert parallelism: a checkpoint of ep=1 cannot be "
        "resumed on ep>1, nor the other way round",
    ),
    Patch(
        name="muon-groups-loaded",
        target="megatron.core.optimizer.layer_wise_optimizer:"
        "LayerWiseDistributedOptimizer.load_state_dict",
        replacement=muon_groups.restore_param_groups,
        why="the other half of muon-groups-asked: core/optimizer/optimizer.py:637 wants as many "
        "groups as the run has",
    ),
    Patch(
        name="gloo-group-timeout",
        target="megatron.core.parallel_state:initialize_model_parallel",
        replacement=replacements.give_gloo_group_its_timeout,
        why="core/parallel_state.py:1465 gives the gloo group of the experts' data parallelism no "
        "timeout, and torch's is 30 minutes: a set-up that may take 60 ends after half of it",
    ),
    Patch(
        name="muon-gloo-group",
        target="megatron.core.optimizer.distrib_optimizer:"
        "DistributedOptimizer.get_parameter_state_dp_zero",
        replacement=replacements.gather_over_gloo,
        why="core/optimizer/__init__.py:853 gives the Adam part of a Muon run no gloo group, over "
        "which --distrib-optim-fully-reshardable-mem-efficient collects its state: the first save "
        "ends in an assertion (core/optimizer/distrib_optimizer.py:1299)",
    ),
    Patch(
        name="save-checksums",
        target="megatron.core.dist_checkpointing.strategies.filesystem_async:"
        "FileSystemWriterAsync.get_save_function_and_args",
        replacement=replacements.save_without_checksums,
        why="core/dist_checkpointing/strategies/filesystem_async.py:415 writes tensors with "
        "torch.save, which computes a CRC-32 that nothing reads; torch's switch is one of the "
        "process, and an asynchronous save writes in a spawned one (async_utils.py:370)",
    ),
    Patch(
        name="kept-plans",
        target="megatron.core.dist_checkpointing.strategies.fully_parallel:"
        "FullyParallelSaveStrategyWrapper.apply_saving_parallelization",
        replacement=save_plans.replan_on_change,
        why="core/dist_checkpointing/strategies/state_dict_saver.py:110 takes the last save's list "
        "of tensors under --ckpt-assume-constant-structure, whatever there is to save now: a "
        "tensor that is new is missing in the checkpoint, without a message",
    ),
    Patch(
        name="writer-loop",
        target="megatron.core.dist_checkpointing.strategies.async_utils:"
        "PersistentAsyncCaller.async_loop",
        replacement=async_writer.loop_of_rank,
        why="core/dist_checkpointing/strategies/async_utils.py:573 waits for the next save even "
        "when the rank is gone: the process stays and holds memory of the GPU",
    ),
    Patch(
        name="writer-handed-over",
        target="megatron.core.dist_checkpointing.strategies.async_utils:"
        "PersistentAsyncCaller.schedule_async_call",
        replacement=async_writer.hand_over_to_living,
        why="core/dist_checkpointing/strategies/async_utils.py:424 waits without end for a process "
        "that was killed",
    ),
    Patch(
        name="writer-awaited",
        target="megatron.core.dist_checkpointing.strategies.async_utils:"
        "PersistentAsyncCaller.is_current_async_call_done",
        replacement=async_writer.wait_for_living,
        why="core/dist_checkpointing/strategies/async_utils.py:462 takes a process that was killed "
        "for one that still writes: no checkpoint is ever complete, and the last save never ends",
    ),
    Patch(
        name="writer-closed",
        target="megatron.core.dist_checkpointing.strategies.async_utils:"
        "PersistentAsyncCaller.close",
        replacement=async_writer.close_without_waiting,
        why="core/dist_checkpointing/strategies/async_utils.py:507 waits without end for a process "
        "that was killed, so that a rank that fails of it never ends",
    ),
    Patch(
        name="fusion-without-apex",
        target="megatron.core.tensor_parallel.layers:ColumnParallelLinear.__init__",
        replacement=replacements.drop_missing_fusion,
        why="core/tensor_parallel/layers.py:1070 ends the run in the output layer without NVIDIA "
        "apex, unless --no-gradient-accumulation-fusion takes the fusion from Transformer Engine's "
        "layers too",
    ),
    Patch(
        name="packed-mtp",
        target="megatron.core.transformer.multi_token_prediction:_roll_tensor_packed_seq",
        replacement=replacements.roll_within_documents,
        why="core/transformer/multi_token_prediction.py:249 shifts MTP's tokens, labels and mask "
        "at the boundaries of documents without their padding, in a stream that has it: wrong "
        "tokens on every rank, and with context parallelism a loop of point-to-point messages for "
        "each document (Megatron-LM pull requests 4495, 6205, 7278)",
    ),
    Patch(
        name="padded-counts",
        target="megatron.core.transformer.moe.router:get_tokens_per_expert_and_token_count",
        replacement=replacements.count_padded,
        why="core/transformer/moe/moe_utils.py:272-277: with a padding mask a rank's own number of "
        "tokens is counted after the counts were summed over ranks in place, so that "
        "calculate_per_token_loss weights the load-balancing loss too much by the number of ranks; "
        "and the number of all tokens is a float, where Transformer Engine's kernel reads an int64 "
        "(transformer_engine/pytorch/router.py:545, 2.20.2)",
    ),
    Patch(
        name="context-mtp",
        target="megatron.core.transformer.multi_token_prediction:process_mtp_loss",
        replacement=replacements.share_mtp_count,
        why="core/transformer/multi_token_prediction.py:873-891 weights the MTP loss of each "
        "context-parallel rank by that rank's own number of tokens; these differ by the tokens "
        "that have no next one (Megatron-LM pull request 7498)",
    ),
    Patch(
        name="chunked-mtp",  # after context-mtp, whose share multiplies the chunked loss too
        target="megatron.core.transformer.multi_token_prediction:process_mtp_loss",
        replacement=replacements.chunk_mtp_loss,
        why="core/transformer/multi_token_prediction.py:839 takes the logits of all tokens at "
        "once, and GPTModel's output_processor replaces the main head's only",
    ),
    Patch(
        name="chunked-acceptance",
        target="megatron.core.transformer.multi_token_prediction:_compute_mtp_acceptance_counts",
        replacement=replacements.chunk_acceptance,
        why="the other half of chunked-mtp: core/transformer/multi_token_prediction.py:544 counts "
        "predictions in the logits of all tokens",
    ),
    Patch(
        name="planned-documents",
        target="megatron.core.models.common.fine_grained_callables:build_mtp_layer_callables",
        replacement=replacements.plan_documents,
        why="core/models/common/fine_grained_callables.py:87 asserts in the plan of overlapped "
        "exchanges that there are no packed documents beside MTP, which its other lines pass on",
    ),
    Patch(
        name="metadata-pickle",
        target="torch.distributed.checkpoint.filesystem:FileSystemReader.read_metadata",
        replacement=safe_loading.read_records,
        why="torch/distributed/checkpoint/filesystem.py:938 (2.15) unpickles .metadata, which runs "
        "any program that the file's author wrote",
        distribution="torch",
        versions=">=2.6",
    ),
    Patch(
        name="object-pickle",
        target="torch.distributed.checkpoint.default_planner:DefaultLoadPlanner.load_bytes",
        replacement=safe_loading.load_plain_objects,
        why="torch/distributed/checkpoint/default_planner.py:388 (2.15) loads stored objects with "
        "weights_only=False, which does the same",
        distribution="torch",
        versions=">=2.6",
    ),
)


def activate() -> None:
    """Apply `PATCHES` for the rest of the process. Calling it again does nothing.

    Raises:
        InputError: the installed megatron-core is not the one the table was written for.
        WorkError: psutil is missing. Megatron needs it for its first checkpoint and does not
            declare it (core/dist_checkpointing/strategies/filesystem_async.py:665, 0.19.2).
    """
    if importlib.util.find_spec("psutil") is None:
        raise WorkError(
            "psutil is not installed, and saving a checkpoint needs it", fix="pip install psutil"
        )
    # core/package_info.py:20 calls git, and adds the revision of whatever repository site-packages
    # lies in.
    os.environ.setdefault("NO_VCS_VERSION", "1")
    patching.install(PATCHES)
