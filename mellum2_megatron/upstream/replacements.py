"""Code of the work-arounds, in the order of the table `patches.PATCHES`, which gives the reasons.

Each public function takes an upstream function and returns the one to put in its place.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.common.torch_checksums import call_without_crc32

if TYPE_CHECKING:
    from argparse import Namespace

    import torch
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer import TransformerConfig


def import_helpers(original: Callable[[], None]) -> Callable[[], None]:
    """Replace `compile_helpers`: check that the helpers which the wheel ships import."""

    @functools.wraps(original)
    def compile_helpers() -> None:
        try:
            import megatron.core.datasets.helpers_cpp  # noqa: F401
        except ImportError as error:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise WorkError(
                f"megatron-core's dataset helpers do not import with Python {version} ({error})",
                fix="use Python 3.12, the version for which the wheel ships "
                "megatron/core/datasets/helpers_cpp",
            ) from error

    return compile_helpers


def shuffle_in_place(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace `_build_document_index`: the same array, `[epochs * documents]`, without copies."""
    import numpy as np

    @functools.wraps(original)
    def build_document_index(
        documents: Any, num_epochs: int, numpy_random_state: Any, separate_final_epoch: bool
    ) -> Any:
        index = np.empty((num_epochs, len(documents)), dtype=np.int32)
        index[:] = documents
        last = num_epochs - 1 if separate_final_epoch and num_epochs > 1 else num_epochs
        # The generator's draws depend on the lengths alone.
        for part in (index[:last], index[last:]):
            numpy_random_state.shuffle(part.reshape(-1))
        return index.reshape(-1)

    return build_document_index


def refuse_wrong_muon_setup(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the factory of Muon: check the parameter layout and the weights' attributes first."""
    from mellum2_megatron.model.muon_attributes import require_muon_matrices

    @functools.wraps(original)
    def get_emerging_optimizer(
        config: OptimizerConfig,
        model_chunks: Sequence[torch.nn.Module],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        require_layer_wise_layout(config, model_chunks)
        if "muon" in config.optimizer:
            require_muon_matrices(config, model_chunks)
        return original(config, model_chunks, *args, **kwargs)

    return get_emerging_optimizer


def require_layer_wise_layout(
    config: OptimizerConfig, model_chunks: Sequence[torch.nn.Module]
) -> None:
    """Refuse layer-wise Muon on a model that was not wrapped with the layer-wise parameter layout.

    Args:
        config: Megatron's optimizer configuration.
        model_chunks: model parts of this rank, wrapped in DistributedDataParallel.

    Raises:
        InputError: Muon would run its legacy path. There gradients are all-reduced instead of
            reduce-scattered, Adam's parameters are inside the layer-wise optimizer, and parameters
            are broadcast by an uneven all-gather.
    """
    ddp_config = getattr(model_chunks[0], "ddp_config", None)
    has_layout = getattr(ddp_config, "use_distributed_optimizer", False)
    if config.use_layer_wise_distributed_optimizer and not has_layout:
        raise InputError(
            f"optimizer={config.optimizer} without the layer-wise parameter layout",
            rule="only megatron.training.training.get_model applies it (training.py:1880, 0.19.2); "
            "models built through a config container (training/models/dist_utils.py:243) silently "
            "train another way",
            fix="pass model_provider= to megatron.training.pretrain, and not "
            "--no-use-layer-wise-param-layout",
        )


def refuse_batch_ramp(original: Callable[..., Namespace]) -> Callable[..., Namespace]:
    """Wrap `validate_args`: refuse ``--rampup-batch-size``."""

    @functools.wraps(original)
    def validate_args(args: Namespace, *rest: Any, **kwargs: Any) -> Namespace:
        ramp = getattr(args, "rampup_batch_size", None)
        if ramp is not None:
            raise InputError(
                f"--rampup-batch-size {' '.join(map(str, ramp))}",
                rule="megatron-core 0.19.2 accepts it and trains with a constant batch",
                fix="use --step-batch-size-schedule with sample-based training and learning-rate "
                "lengths",
            )
        return original(args, *rest, **kwargs)

    return validate_args


def shard_experts(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `shard_params`: divide experts that several ranks hold, even without data parallelism.

    The sizes 1 and `experts` are those of dense and expert data-parallel groups.
    """

    @functools.wraps(original)
    def shard_params(
        self: LayerWiseDistributedOptimizer, optimizers: Any, full_param_layouts: Any = None
    ) -> None:
        experts = self.expt_dp.size()
        if self.dp_cp.size() == 1 and experts > 1 and full_param_layouts is not None:
            self._shard_params_from_layout(optimizers, full_param_layouts, 1, experts)
        else:
            original(self, optimizers, full_param_layouts)

    return shard_params


def give_gloo_group_its_timeout(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `initialize_model_parallel`: the experts' gloo group gets the limit that is asked for.

    All other groups are made with it.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def initialize_model_parallel(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        import torch
        from megatron.core import parallel_state

        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        group = parallel_state._EXPERT_DATA_PARALLEL_GROUP_GLOO
        if group is not None:
            limit = timedelta(minutes=given.arguments["distributed_timeout_minutes"])
            torch.distributed.set_timeout(limit, group)

    return initialize_model_parallel


def gather_over_gloo(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_parameter_state_dp_zero`: an optimizer without a gloo group takes Megatron's own.

    Only Muon's Adam part lacks it. Its data-parallel ranks are those with context parallelism.
    """

    @functools.wraps(original)
    def get_parameter_state_dp_zero(
        self: DistributedOptimizer, use_gloo_comm: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        if use_gloo_comm and self.data_parallel_group_gloo is None:
            from megatron.core import parallel_state

            self.data_parallel_group_gloo = parallel_state.get_data_parallel_group_gloo(
                with_context_parallel=True
            )
        return original(self, use_gloo_comm, *args, **kwargs)

    return get_parameter_state_dp_zero


def save_without_checksums(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_save_function_and_args`: what it returns writes no CRC-32, in any process."""

    @functools.wraps(original)
    def get_save_function_and_args(self: FileSystemWriterAsync) -> Any:
        write, preload, args = original(self)
        # A rank with nothing to write has no function.
        return write and functools.partial(call_without_crc32, write), preload, args

    return get_save_function_and_args


def drop_missing_fusion(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `ColumnParallelLinear.__init__`: build it without the fusion that is not installed."""

    @functools.wraps(original)
    def init(
        self: ColumnParallelLinear, *args: Any, config: TransformerConfig, **kwargs: Any
    ) -> None:
        from megatron.core.tensor_parallel import layers

        if config.gradient_accumulation_fusion and not layers._grad_accum_fusion_available:
            # A copy, for this module alone: Transformer Engine's layers bring the fusion
            # themselves and keep it.
            config = copy.copy(config)
            config.gradient_accumulation_fusion = False
        original(self, *args, config=config, **kwargs)

    return init


def roll_within_documents(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace the shift of packed documents: each position gets its document's next value."""

    @functools.wraps(original)
    def roll(
        tensor: torch.Tensor,
        shifts: int,
        dims: int,
        packed_seq_params: PackedSeqParams,
        cp_group: torch.distributed.ProcessGroup | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the shifted tensor `[..., t / cp]`, 0 at a document's end, and its sum."""
        from mellum2_megatron.model.context_parallel import document_boundaries, next_tokens

        assert shifts == -1, "only the next token"
        assert dims in (-1, tensor.dim() - 1), "only along the last dimension"
        cp = 1 if cp_group is None else cp_group.size()
        boundaries, lengths = document_boundaries(packed_seq_params, tensor.size(-1) * cp, cp)
        rolled = next_tokens(tensor, boundaries, lengths, cp_group)
        return rolled, rolled.sum()

    return roll


def count_padded(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the router's counts: right numbers of tokens where there is a padding mask."""

    @functools.wraps(original)
    def get_tokens_per_expert_and_token_count(
        routing_map: torch.Tensor,
        reduce_group: torch.distributed.ProcessGroup,
        topk: int,
        with_padding_mask: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | float, torch.Tensor | int]:
        """Return tokens of each expert `[e]`, tokens of the average rank, and of all ranks."""
        counts, local, total = original(
            routing_map, reduce_group, topk=topk, with_padding_mask=with_padding_mask
        )
        if with_padding_mask:
            total = total.round().long()
            local = total / reduce_group.size()
        return counts, local, total

    return get_tokens_per_expert_and_token_count


def share_mtp_count(
    original: Callable[..., torch.Tensor],
) -> Callable[..., torch.Tensor]:
    """Wrap `process_mtp_loss`: weight each context-parallel rank by the average rank's counts.

    Let f be the MTP factor, and n and m the counted and predicted tokens of this rank. Upstream
    weights a token's loss by f n / m with ``calculate_per_token_loss``, else by f / m. Correct are
    f n' / m' and f / m', with n' and m' of the average rank. Two changes lead there:

    - the loss is multiplied by m / m', those of the MTP layer, so that upstream's 1 / m becomes
      1 / m';
    - with ``calculate_per_token_loss``, f is multiplied by n' and the flag is turned off, so that
      upstream adds no factor n.
    """

    @functools.wraps(original)
    def process_mtp_loss(
        *args: Any,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        config: TransformerConfig,
        compute_language_model_loss: Callable[..., torch.Tensor],
        cp_group: torch.distributed.ProcessGroup | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        import torch

        compute_loss = compute_language_model_loss
        if (
            cp_group is not None
            and cp_group.size() > 1
            and labels is not None
            and config.mtp_num_layers
        ):
            mask = torch.ones_like(labels) if loss_mask is None else loss_mask
            predicted = torch.stack(
                [
                    count
                    for _, count in _rolled_masks(
                        mask,
                        config.mtp_num_layers,
                        cp_group=cp_group,
                        packed_seq_params=packed_seq_params,
                    )
                ]
            )
            counts = torch.cat((mask.sum()[None], predicted)).float()
            torch.distributed.all_reduce(counts, group=cp_group)
            mean_counted, *mean_predicted = counts / cp_group.size()
            if config.calculate_per_token_loss:
                # A copy: the run's own configuration is shared by all micro-batches.
                config = copy.copy(config)
                config.mtp_loss_scaling_factor = config.mtp_loss_scaling_factor * mean_counted
                config.calculate_per_token_loss = False
            # Upstream divides by max(m, 1), which cancels. The mean is 0 only where no rank has a
            # loss; otherwise it is at least 1 / cp, well above 1e-3.
            shares = iter(predicted.clamp(min=1) / torch.stack(mean_predicted).clamp(min=1e-3))

            def compute_shared_loss(*args: Any) -> torch.Tensor:
                loss: torch.Tensor = compute_language_model_loss(*args) * next(shares)
                return loss

            compute_loss = compute_shared_loss
        return original(
            *args,
            labels=labels,
            loss_mask=loss_mask,
            config=config,
            compute_language_model_loss=compute_loss,
            cp_group=cp_group,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )

    return process_mtp_loss


def _rolled_masks(
    mask: torch.Tensor, layers: int, **places: Any
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the loss mask of each MTP layer, `[b, s]`, and its sum; ``places`` are `roll_tensor`'s.

    A layer's mask is that of the layer before it, one token further.
    """
    from megatron.core.transformer.multi_token_prediction import roll_tensor

    for _ in range(layers):
        mask, count = roll_tensor(mask, shifts=-1, dims=-1, **places)
        yield mask, count


def chunk_mtp_loss(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap `process_mtp_loss`: chunks where the output layer has a `head_chunk`."""

    @functools.wraps(original)
    def process_mtp_loss(
        *args: Any,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        output_layer: Any,
        config: TransformerConfig,
        tp_group: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        import torch

        from mellum2_megatron.model.chunked_head import ChunkedHead

        chunk = getattr(output_layer, "head_chunk", None)
        if chunk is not None and labels is not None:
            head = ChunkedHead(output_layer, chunk, tp_group)
            places = {name: kwargs.get(name) for name in ("cp_group", "packed_seq_params")}
            mask = torch.ones_like(labels) if loss_mask is None else loss_mask
            rolled = _rolled_masks(mask, config.mtp_num_layers or 0, **places)

            def compute_loss(rolled_labels: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
                return head.loss(rolled_labels, hidden, next(rolled)[0])

            output_layer = head
            kwargs["compute_language_model_loss"] = compute_loss
        return original(
            *args,
            labels=labels,
            loss_mask=loss_mask,
            output_layer=output_layer,
            config=config,
            tp_group=tp_group,
            **kwargs,
        )

    return process_mtp_loss


def chunk_acceptance(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_compute_mtp_acceptance_counts`: take the logits of a chunked head in chunks too."""

    @functools.wraps(original)
    def count(
        mtp_logits: torch.Tensor,
        mtp_labels: torch.Tensor,
        loss_mask: torch.Tensor,
        output_layer: Any,
        *rest: Any,
    ) -> Any:
        from mellum2_megatron.model.chunked_head import ChunkedHead

        if not isinstance(output_layer, ChunkedHead):
            return original(mtp_logits, mtp_labels, loss_mask, output_layer, *rest)
        # In the place of the logits there are the hidden states.
        return output_layer.acceptance(original, mtp_logits, mtp_labels, loss_mask, *rest)

    return count


def plan_documents(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wrap `build_mtp_layer_callables`: hand packed documents around its assertion.

    The rest of the plan passes them on: to MTP's embeddings, its attention and its loss.
    """

    @functools.wraps(original)
    def build_mtp_layer_callables(layer: Any) -> Any:
        (before_dispatch, *others), weights = original(layer)
        inner = layer.mtp_model_layer

        def dispatch_documents(node: Any, hidden_states: torch.Tensor) -> Any:
            state = node.chunk_state
            packed = state.packed_seq_params
            if packed is None:
                return before_dispatch(node, hidden_states)
            state.packed_seq_params = None
            try:
                with (
                    _with_documents(layer, "_get_embeddings", packed),
                    _with_documents(inner, "_forward_attention", packed),
                ):
                    return before_dispatch(node, hidden_states)
            finally:
                state.packed_seq_params = packed

        return [dispatch_documents, *others], weights

    return build_mtp_layer_callables


@contextlib.contextmanager
def _with_documents(owner: Any, name: str, packed: PackedSeqParams) -> Iterator[None]:
    """Give one object's method the documents inside, whatever its caller passes."""
    method = getattr(owner, name)
    object.__setattr__(
        owner, name, lambda **kwargs: method(**kwargs | {"packed_seq_params": packed})
    )
    try:
        yield
    finally:
        object.__delattr__(owner, name)
