"""What every user of the megatron-core 0.19.2 wheel needs worked around, on a GPU as on a CPU.

`activate` applies the table `PATCHES`; call it before training, in any order with megatron's
import. Each entry states the upstream fact and the version it was read in, and has a test
(``tests/upstream/test_patches.py``) that fails when upstream no longer needs it. What a subclass
can put right is in ``model/`` instead (the router's load counts in float32, for one).
`quiet_upstream` is a matter of taste.
"""

from __future__ import annotations

import builtins
import copy
import functools
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.upstream import patching
from mellum2_megatron.upstream.muon_groups import (
    omit_param_groups_from_request,
    restore_param_groups,
)
from mellum2_megatron.upstream.patching import Patch

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def activate() -> None:
    """Apply `PATCHES` for the rest of the process. Calling it again does nothing.

    Raises:
        InputError: the installed megatron-core is not the one the table was written for.
        WorkError: psutil is missing: ``core/dist_checkpointing/strategies/filesystem_async.py:665``
            (0.19.2) needs it, does not declare it, and would only say so when it writes the first
            checkpoint.
    """
    if importlib.util.find_spec("psutil") is None:
        raise WorkError(
            "psutil is not installed, and saving a checkpoint needs it", fix="pip install psutil"
        )
    # core/package_info.py:20 calls git, and adds the revision of whatever repository site-packages
    # lies in.
    os.environ.setdefault("NO_VCS_VERSION", "1")
    patching.install(PATCHES)


# ---------------------------------------------------------------------------------------------------------------------
# The patches
# ---------------------------------------------------------------------------------------------------------------------


def _import_helpers(original: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(original)
    def compile_helpers() -> None:
        """Check that the compiled dataset helpers, which the wheel ships, import."""
        try:
            import megatron.core.datasets.helpers_cpp  # noqa: F401
        except ImportError as error:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise WorkError(
                f"megatron-core's dataset helpers do not import with Python {version} ({error})",
                fix="use Python 3.12, the version for which the wheel ships megatron/core/datasets/helpers_cpp",
            ) from error

    return compile_helpers


def _require_layer_wise_layout(original: Callable[..., Any]) -> Callable[..., Any]:
    from mellum2_megatron.model.muon_attributes import require_muon_matrices

    @functools.wraps(original)
    def get_emerging_optimizer(config: Any, model_chunks: Any, *args: Any, **kwargs: Any) -> Any:
        require_layer_wise_layout(config, model_chunks)
        if "muon" in config.optimizer:
            require_muon_matrices(config, model_chunks)
        return original(config, model_chunks, *args, **kwargs)

    return get_emerging_optimizer


def require_layer_wise_layout(config: Any, model_chunks: Any) -> None:
    """Refuse layer-wise Muon on a model that was not wrapped with the layer-wise parameter layout.

    Args:
        config: Megatron's OptimizerConfig.
        model_chunks: the model's chunks, wrapped in DistributedDataParallel.

    Raises:
        InputError: Muon would run its legacy path: gradients all-reduced instead of
            reduce-scattered, Adam's parameters inside the layer-wise optimizer, parameters
            broadcast by an uneven all-gather.
    """
    ddp_config = getattr(model_chunks[0], "ddp_config", None)
    if config.use_layer_wise_distributed_optimizer and not getattr(
        ddp_config, "use_distributed_optimizer", False
    ):
        raise InputError(
            f"optimizer={config.optimizer} without the layer-wise parameter layout",
            rule="only megatron.training.training.get_model applies it (training.py:1880, 0.19.2); models built "
            "through a config container (training/models/dist_utils.py:243) silently train another way",
            fix="pass model_provider= to megatron.training.pretrain, and not --no-use-layer-wise-param-layout",
        )


def _refuse_batch_ramp(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def validate_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
        ramp = getattr(args, "rampup_batch_size", None)
        if ramp is not None:
            raise InputError(
                f"--rampup-batch-size {' '.join(map(str, ramp))}",
                rule="megatron-core 0.19.2 accepts it and trains with a constant batch",
                fix="use --step-batch-size-schedule with sample-based training and learning-rate lengths",
            )
        return original(args, *rest, **kwargs)

    return validate_args


def _without_missing_fusion(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, *args: Any, config: Any, **kwargs: Any) -> None:
        from megatron.core.tensor_parallel import layers

        if config.gradient_accumulation_fusion and not layers._grad_accum_fusion_available:
            # For this module alone: Transformer Engine's layers bring the fusion themselves and
            # keep it.
            config = copy.copy(config)
            config.gradient_accumulation_fusion = False
        original(self, *args, config=config, **kwargs)

    return init


def _roll_within_documents(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def roll(
        tensor: torch.Tensor, shifts: int, dims: int, packed_seq_params: Any, cp_group: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next token of each position within its document, 0 where there is none, and
        the sum."""
        from mellum2_megatron.model.context_parallel import document_boundaries, next_tokens

        assert shifts == -1, "only the next token"
        assert dims in (-1, tensor.dim() - 1), "only along the last dimension"
        cp = 1 if cp_group is None else cp_group.size()
        boundaries, lengths = document_boundaries(packed_seq_params, tensor.size(-1) * cp, cp)
        rolled = next_tokens(tensor, boundaries, lengths, cp_group)
        return rolled, rolled.sum()

    return roll


def _share_mtp_count(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_mtp_loss(
        *args: Any,
        labels: Any,
        loss_mask: Any,
        config: Any,
        compute_language_model_loss: Callable[..., Any],
        cp_group: Any = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        import torch
        from megatron.core.transformer.multi_token_prediction import roll_tensor

        if (
            cp_group is not None
            and cp_group.size() > 1
            and labels is not None
            and config.mtp_num_layers == 1
        ):
            mask = torch.ones_like(labels) if loss_mask is None else loss_mask
            shifted = roll_tensor(mask, cp_group=cp_group, packed_seq_params=packed_seq_params)[1]
            counts = torch.stack((mask.sum(), shifted)).float()
            torch.distributed.all_reduce(counts, group=cp_group)
            counted, predicted = counts / cp_group.size()  # of the average rank
            config = copy.copy(config)
            if config.calculate_per_token_loss:
                config.mtp_loss_scaling_factor = config.mtp_loss_scaling_factor * counted
                config.calculate_per_token_loss = False
            share = shifted.clamp(min=1) / predicted.clamp(
                min=1e-3
            )  # upstream divides by this rank's own count
            compute_language_model_loss = _scaled(compute_language_model_loss, share)
        return original(
            *args,
            labels=labels,
            loss_mask=loss_mask,
            config=config,
            compute_language_model_loss=compute_language_model_loss,
            cp_group=cp_group,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )

    return process_mtp_loss


def _scaled(
    function: Callable[..., torch.Tensor], factor: torch.Tensor
) -> Callable[..., torch.Tensor]:
    return lambda *args: function(*args) * factor


def _count_padded(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_tokens_per_expert_and_token_count(
        routing_map: Any, reduce_group: Any, topk: int, with_padding_mask: bool = False
    ) -> tuple[Any, Any, Any]:
        """Return the tokens of each expert, of the average rank and of all ranks in the group."""
        counts, local, total = original(
            routing_map, reduce_group, topk=topk, with_padding_mask=with_padding_mask
        )
        if with_padding_mask:
            total = total.round().long()
            local = total / reduce_group.size()
        return counts, local, total

    return get_tokens_per_expert_and_token_count


def _shard_experts(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def shard_params(self: Any, optimizers: Any, full_param_layouts: Any = None) -> None:
        experts = self.expt_dp.size()
        if self.dp_cp.size() == 1 and experts > 1 and full_param_layouts is not None:
            self._shard_params_from_layout(optimizers, full_param_layouts, 1, experts)
        else:
            original(self, optimizers, full_param_layouts)

    return shard_params


PATCHES: tuple[Patch, ...] = (
    Patch(
        name="compile-helpers",
        target="megatron.core.datasets.utils:compile_helpers",
        replacement=_import_helpers,
        why="core/datasets/utils.py:25 runs make in a folder where the wheel has no Makefile, and exits the process",
    ),
    Patch(
        name="layer-wise-layout",
        target="megatron.core.optimizer:_get_megatron_emerging_optimizer",
        replacement=_require_layer_wise_layout,
        why="core/optimizer/__init__.py:820 falls back to another algorithm without a word when DDP was not given the "
        "layer-wise layout, and training/models/dist_utils.py:243 never gives it",
    ),
    Patch(
        name="batch-ramp",
        target="megatron.training.arguments:validate_args",
        replacement=_refuse_batch_ramp,
        why="training/global_vars.py:127 does not pass --rampup-batch-size on: the batch stays constant",
    ),
    Patch(
        name="muon-experts",
        target="megatron.core.optimizer.layer_wise_optimizer:LayerWiseDistributedOptimizer.shard_params",
        replacement=_shard_experts,
        why="core/optimizer/layer_wise_optimizer.py:552 lets every rank own all matrices when data parallelism is 1, "
        "but with tp > etp tensor-parallel ranks hold the same experts, of whose gradients DDP gives each a part: "
        "wrong gradient norm and momentum, and a checkpoint that two ranks write",
    ),
    Patch(
        name="muon-groups-asked",
        target="megatron.core.optimizer.layer_wise_optimizer:LayerWiseDistributedOptimizer.sharded_state_dict",
        replacement=omit_param_groups_from_request,
        why="core/dist_checkpointing/dict_utils.py:227 merges parameter groups by position; layer-wise Muon has one "
        "more with expert parallelism: a checkpoint of ep=1 cannot be resumed on ep>1, nor the other way round",
    ),
    Patch(
        name="muon-groups-loaded",
        target="megatron.core.optimizer.layer_wise_optimizer:LayerWiseDistributedOptimizer.load_state_dict",
        replacement=restore_param_groups,
        why="the other half of muon-groups-asked: core/optimizer/optimizer.py:637 wants as many groups as the run has",
    ),
    Patch(
        name="fusion-without-apex",
        target="megatron.core.tensor_parallel.layers:ColumnParallelLinear.__init__",
        replacement=_without_missing_fusion,
        why="core/tensor_parallel/layers.py:1070 ends the run in the output layer without NVIDIA apex, unless "
        "--no-gradient-accumulation-fusion takes the fusion from Transformer Engine's layers too",
    ),
    Patch(
        name="packed-mtp",
        target="megatron.core.transformer.multi_token_prediction:_roll_tensor_packed_seq",
        replacement=_roll_within_documents,
        why="core/transformer/multi_token_prediction.py:249 shifts MTP's tokens, labels and mask at the boundaries of "
        "documents without their padding, in a stream that has it: wrong tokens on every rank, and with context "
        "parallelism a loop of point-to-point messages for each document (Megatron-LM pull requests 4495, 6205, 7278)",
    ),
    Patch(
        name="padded-counts",
        target="megatron.core.transformer.moe.router:get_tokens_per_expert_and_token_count",
        replacement=_count_padded,
        why="core/transformer/moe/moe_utils.py:272-277: with a padding mask a rank's own number of tokens is counted "
        "after the counts were summed over ranks in place, so that calculate_per_token_loss weights the load-balancing "
        "loss too much by the number of ranks; and the number of all tokens is a float, where Transformer Engine's "
        "kernel reads an int64 (transformer_engine/pytorch/router.py:545, 2.20.2)",
    ),
    Patch(
        name="context-mtp",
        target="megatron.core.transformer.multi_token_prediction:process_mtp_loss",
        replacement=_share_mtp_count,
        why="core/transformer/multi_token_prediction.py:873-891 weights the MTP loss of each context-parallel rank by "
        "that rank's own number of tokens, which differ by those that have no next one (Megatron-LM pull request 7498)",
    ),
)


# ---------------------------------------------------------------------------------------------------------------------
# Noise
# ---------------------------------------------------------------------------------------------------------------------

_NOISY = ("megatron", "emerging_optimizers")


def quiet_upstream() -> None:
    """Hide what Megatron prints, warns and logs below an error; exceptions and logged errors are
    shown as before.

    Its printed lines go to this module's logger at DEBUG level instead. For the rest of the
    process.
    """
    for name in (*_NOISY, "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # It logs an error of a checkpoint's writer and then raises it
    # (core/dist_checkpointing/strategies, 0.19.2).
    logging.getLogger("megatron.core.dist_checkpointing.strategies.filesystem_async").setLevel(
        logging.CRITICAL
    )
    warnings.filterwarnings("ignore", module=rf"(.*/)?({'|'.join(_NOISY)})([./]|$)")
    # Loading a checkpoint with the APIs that Megatron still calls (torch 2.15).
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint\.")
    warnings.filterwarnings(
        "ignore", message="'pin_memory' argument is set as true but no accelerator"
    )
    if not hasattr(builtins.print, "__wrapped__"):
        builtins.print = _quiet(builtins.print)


def _quiet(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def print_(*values: Any, **options: Any) -> None:
        caller = sys._getframe(1).f_globals.get("__name__") or ""
        if caller.partition(".")[0] in _NOISY and options.get("file") in (None, sys.stdout):
            logger.debug("%s: %s", caller, " ".join(map(str, values)))
        else:
            original(*values, **options)

    return print_
