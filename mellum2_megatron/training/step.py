"""One micro-batch: this rank's part of the batch, the forward pass, and the sum of the loss."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args

Batch = dict[str, torch.Tensor | None]
"""Field -> tensor `[b, s]`; None where this pipeline stage does not read the field."""

LOSS_CHECK = "loss of a micro-batch"
"""Name of our check in Megatron's message about a bad value; its own checks are on gradients."""

_FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


def forward_step(
    data_iterator: Iterator[Batch], model: torch.nn.Module, *_: Any
) -> tuple[torch.Tensor, functools.partial[Any]]:
    """Run one micro-batch through this stage of the model (Megatron's `forward_step_func`).

    Returns:
        Per-token loss `[b, s]` in nats on the last pipeline stage (hidden states `[s, b, h]`
        elsewhere), and the function that sums it.
    """
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,  # attention mask: causal and windows are the attention's own
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, functools.partial(sum_loss, batch["loss_mask"])


def get_batch(data_iterator: Iterator[Batch], vp_stage: int | None = None) -> Batch:
    """Return this rank's part of the next micro-batch.

    Tensor-parallel rank 0 reads and the others receive. Context parallelism keeps two zigzag chunks
    of each sequence.

    Args:
        data_iterator: samples of this data-parallel rank; read on tensor-parallel rank 0 only.
        vp_stage: virtual pipeline stage; None without virtual stages.

    Returns:
        `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32), each `[b, s / cp]`;
        None for what the pipeline stage does not read.
    """
    args = get_args()
    stage: dict[str, Any] = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    first, last = mpu.is_pipeline_first_stage(**stage), mpu.is_pipeline_last_stage(**stage)
    if not (first or last):
        return dict.fromkeys(_FIELDS)
    batch: Batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        device = torch.cuda.current_device()
        for name in _FIELDS:
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
        mtp_on_this_rank=mtp_on_this_rank(layout=None, mtp_num_layers=args.mtp_num_layers, **stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    return {name: batch.get(name) for name in _FIELDS}


def sum_loss(
    loss_mask: torch.Tensor | None, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the loss over the tokens that count (Megatron's loss function, its three-value form).

    Args:
        loss_mask: `[b, s]`, 1 where the token counts. None on a stage without a loss, where
            Megatron does not call this.
        output: per-token loss `[b, s]`, nats.

    Returns:
        Loss sum, number of tokens, and for the log `{"lm loss": [sum, number]}`; Megatron divides.

    Raises:
        RuntimeError: the sum is not finite (``faults.failures.explained`` puts it in words).
    """
    assert loss_mask is not None
    loss = torch.sum(output.view(-1).float() * loss_mask.view(-1))
    # As in Megatron-LM's pretrain_gpt.py. Gradients are checked by Megatron's
    # DistributedDataParallel.
    get_rerun_state_machine().validate_result(
        result=loss.detach(),
        rejection_func=lambda value: not value.isfinite(),
        message=LOSS_CHECK,
    )
    tokens = loss_mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}
