"""One micro-batch: this rank's share of the batch, the model's forward pass, and the sum of the
loss."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


Batch = dict[str, "torch.Tensor | None"]


_TEXT = ("tokens", "labels", "loss_mask", "position_ids")


def forward_step(
    data_iterator: Iterator[Batch], model: torch.nn.Module, *_: Any
) -> tuple[torch.Tensor, functools.partial[Any]]:
    """Run one micro-batch through this stage of the model (Megatron's `forward_step_func`).

    Returns:
        Per-token loss `[b, s]` on the last pipeline stage (hidden states elsewhere), and the
        function that sums it.
    """
    from megatron.core.utils import get_attr_wrapped_model

    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, functools.partial(sum_loss, batch["loss_mask"])


def get_batch(data_iterator: Iterator[Batch], vp_stage: int | None = None) -> Batch:
    """Return this rank's share of the next micro-batch, with None for what its pipeline stage does
    not read.

    Tensor-parallel rank 0 reads, the others receive; context parallelism keeps two zigzag chunks of
    each sequence.

    Returns:
        `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32), each `[b, s / cp]`.
    """
    import torch
    from megatron.core import parallel_state as mpu
    from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
    from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
    from megatron.training import get_args

    args = get_args()
    stage: dict[str, Any] = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    first, last = mpu.is_pipeline_first_stage(**stage), mpu.is_pipeline_last_stage(**stage)
    if not (first or last):
        return dict.fromkeys(_TEXT)
    batch: Batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        device = torch.cuda.current_device()
        for name in _TEXT:
            tensor = sample[name]
            assert tensor is not None
            batch[name] = tensor.to(device, non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp_on_this_rank(
            layout=None,
            mtp_num_layers=args.mtp_num_layers,
            ignore_virtual=vp_stage is None,
            vp_stage=vp_stage,
        ),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    return {name: batch.get(name) for name in _TEXT}


def sum_loss(
    loss_mask: torch.Tensor | None, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the loss over the tokens that count (Megatron's loss function, its three-value form).

    Args:
        loss_mask: `[b, s]`, 1 where the token counts; None on a stage that has no loss, where this
            is never called.
        output: per-token loss `[b, s]`, nats.

    Raises:
        RuntimeError: the sum is not finite (`failures.explained` puts it in words).

    Returns:
        The sum, the number of tokens, and for the log `{"lm loss": [sum, number]}`; Megatron
        divides.
    """
    import torch
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    assert loss_mask is not None
    loss = torch.sum(output.view(-1).float() * loss_mask.view(-1))
    # As Megatron-LM's pretrain_gpt.py; gradients are checked by its DistributedDataParallel.
    get_rerun_state_machine().validate_result(
        result=loss.detach(),
        rejection_func=lambda value: not value.isfinite(),
        message="loss of a micro-batch",
    )
    tokens = loss_mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}
