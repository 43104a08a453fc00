"""One micro-batch: this rank's part of the batch, the forward pass, and the sum of the loss."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
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

from mellum2_megatron.model.context_parallel import partition_indices
from mellum2_megatron.model.transformer_layer import MaskedDocuments

Batch = dict[str, torch.Tensor | None]
"""Field -> tensor `[b, s]`; None where this pipeline stage does not read the field."""

LOSS_CHECK = "loss of a micro-batch"
"""Name of our check in Megatron's message about a bad value; its own checks are on gradients."""

_FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


def forward_step(
    data_iterator: Iterator[Batch],
    model: torch.nn.Module,
    *_: Any,
    return_schedule_plan: bool = False,
    validation_sets: Sequence[str] = (),
    documents: bool = False,
    on_validation: Callable[[Batch, torch.Tensor], None] | None = None,
) -> tuple[Any, functools.partial[Any]]:
    """Run one micro-batch through this stage of the model (Megatron's `forward_step_func`).

    Args:
        data_iterator: samples of this data-parallel rank.
        model: this stage.
        return_schedule_plan: return Megatron's plan of the forward pass in the place of its result.
            Megatron asks for it with `layout.overlap_expert_comm`, to run it beside the backward
            pass of another micro-batch. Default false.
        validation_sets: names of the sources of a blended validation; each then has a loss of its
            own besides the total. Default none.
        documents: tokens attend only within their own document; the samples then describe their
            documents. Default false.
        on_validation: called with each micro-batch of a validation as it was read, and its losses
            per token, where a rank has both; default none.

    Returns:
        Per-token loss `[b, s]` in nats on the last pipeline stage (hidden states `[s, b, h]`
        elsewhere), and the function that sums it. With `documents` b is 1, and the sequences of the
        micro-batch follow each other.
    """
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    samples = _LastSample(data_iterator)
    packed = None
    if documents:
        batch, packed = get_document_batch(samples, vp_stage)
    else:
        batch = get_batch(samples, vp_stage)
    source = None
    if validation_sets and not model.training:
        source = get_source(samples.last, batch)
    # Called by Megatron, the plan's function is a method of the model without its wrappers.
    forward: Callable[..., Any] = model
    if return_schedule_plan:
        forward = model.build_schedule_plan  # type: ignore[assignment]  # of a GPTModel
    output = forward(
        batch["tokens"],
        batch["position_ids"],
        None,  # attention mask: causal and windows are the attention's own
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=packed,
    )
    on_loss = None
    if on_validation is not None and not model.training and samples.last is not None:
        on_loss = functools.partial(on_validation, samples.last)
    return output, functools.partial(
        sum_loss,
        batch["loss_mask"],
        source=source,
        names=() if source is None else validation_sets,
        on_loss=on_loss,
    )


class _LastSample:
    """Iterator that keeps the sample it gave last; None before, and where no samples are read."""

    def __init__(self, samples: Iterator[Batch]) -> None:
        self.samples = samples
        self.last: Batch | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.last = next(self.samples)
        return self.last


def get_batch(
    data_iterator: Iterator[Batch], vp_stage: int | None = None, *, more: Sequence[str] = ()
) -> Batch:
    """Return this rank's part of the next micro-batch.

    Tensor-parallel rank 0 reads and the others receive. Context parallelism keeps two zigzag chunks
    of each sequence.

    Args:
        data_iterator: samples of this data-parallel rank; read on tensor-parallel rank 0 only.
        vp_stage: virtual pipeline stage; None without virtual stages.
        more: further fields of a sample, float32, that the last stage reads; default none.

    Returns:
        `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32), each `[b, s / cp]`,
        and the further fields; None for what the pipeline stage does not read.
    """
    first, last = _first_and_last(vp_stage)
    if not (first or last):
        return dict.fromkeys((*_FIELDS, *more))
    sample = next(data_iterator) if mpu.get_tensor_model_parallel_rank() == 0 else None
    batch = get_batch_on_this_cp_rank(
        _undivided(sample, vp_stage) | (_further(sample, more) if last else {}),
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
    )
    return {name: batch.get(name) for name in (*_FIELDS, *more)}


def get_document_batch(
    data_iterator: Iterator[Batch], vp_stage: int | None = None
) -> tuple[Batch, MaskedDocuments]:
    """Return this rank's part of the next micro-batch of packs, and its documents.

    The sequences of the micro-batch follow each other in one stream. Context parallelism keeps two
    zigzag chunks of each document. Every pipeline stage reads, because its attention needs the
    documents.

    Args:
        data_iterator, vp_stage: as for `get_batch`.

    Returns:
        The fields of `get_batch`, `[1, b * s / cp]` each, and the documents of the whole stream.
    """
    sample = next(data_iterator) if mpu.get_tensor_model_parallel_rank() == 0 else None
    bounds, counted = _document_bounds(sample)
    boundaries = bounds[1].tolist()
    longest = max(end - start for start, end in itertools.pairwise(boundaries))
    packed = MaskedDocuments(
        counted_share=counted / bounds[0, -1],
        qkv_format="thd",
        cu_seqlens_q=bounds[0],
        cu_seqlens_kv=bounds[0],
        cu_seqlens_q_padded=bounds[1],
        cu_seqlens_kv_padded=bounds[1],
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    first, last = _first_and_last(vp_stage)
    if not (first or last):
        return dict.fromkeys(_FIELDS), packed
    batch = _undivided(sample, vp_stage)
    cp = mpu.get_context_parallel_world_size()
    held = partition_indices(boundaries, cp, mpu.get_context_parallel_rank()) if cp > 1 else None
    for name in _FIELDS:
        tensor = batch.get(name)
        if tensor is not None:
            tensor = tensor.reshape(1, -1)
            if held is not None:
                tensor = tensor.index_select(1, held.to(tensor.device))
        batch[name] = tensor
    return {name: batch[name] for name in _FIELDS}, packed


def get_source(sample: Batch | None, batch: Batch) -> torch.Tensor | None:
    """Return the number of each sequence's source, int64 `[b]`; None on stages without a batch.

    Args:
        sample: the sample as it was read; None except on tensor-parallel rank 0, which sends.
        batch: this rank's part of it.
    """
    read = batch["tokens"] if batch["loss_mask"] is None else batch["loss_mask"]
    if read is None:
        return None
    sequences = read.numel() * mpu.get_context_parallel_world_size() // get_args().seq_length
    source = torch.empty(sequences, dtype=torch.int64, device=read.device)
    if sample is not None:
        assert sample["source"] is not None
        source = sample["source"].to(read.device)
    torch.distributed.broadcast(
        source,
        mpu.get_tensor_model_parallel_src_rank(),
        group=mpu.get_tensor_model_parallel_group(),
    )
    return source


def _first_and_last(vp_stage: int | None) -> tuple[bool, bool]:
    """Return true for the first, and for the last pipeline stage."""
    stage: dict[str, Any] = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    return mpu.is_pipeline_first_stage(**stage), mpu.is_pipeline_last_stage(**stage)


def _undivided(sample: Batch | None, vp_stage: int | None) -> Batch:
    """Return the fields of a micro-batch, `[b, s]`, on all tensor-parallel ranks.

    Args:
        sample: the micro-batch as it was read; None except on tensor-parallel rank 0, which sends.
        vp_stage: virtual pipeline stage; None without virtual stages.
    """
    args = get_args()
    first, last = _first_and_last(vp_stage)
    batch: Batch = {}
    if sample is not None:
        device = torch.cuda.current_device()
        for name in _FIELDS:
            tensor = sample[name]
            assert tensor is not None
            batch[name] = tensor.to(device, non_blocking=True)
    whole: Batch = get_batch_on_this_tp_rank(
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
    return whole


def _further(sample: Batch | None, names: Sequence[str]) -> Batch:
    """Return further fields of a micro-batch, float32 `[b, s]`, on all tensor-parallel ranks."""
    args, device = get_args(), torch.cuda.current_device()
    fields: Batch = {}
    for name in names:
        value = torch.empty(args.micro_batch_size, args.seq_length, device=device)
        if sample is not None:
            given = sample[name]
            assert given is not None
            value = given.to(device)
        if mpu.get_tensor_model_parallel_world_size() > 1:
            torch.distributed.broadcast(
                value,
                mpu.get_tensor_model_parallel_src_rank(),
                group=mpu.get_tensor_model_parallel_group(),
            )
        fields[name] = value
    return fields


def _document_bounds(sample: Batch | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bounds of a micro-batch's documents, and its tokens that count in the loss.

    Tensor-parallel rank 0 sends.

    Returns:
        Bounds in the stream, int32 `[2, documents + 1]`: the first row counts real tokens only, the
        second has the places. The number of tokens, a scalar.
    """
    device = torch.cuda.current_device()
    bounds = torch.empty(2, 0, dtype=torch.int32)
    counted = 0
    if sample is not None:
        real, padded, mask = (
            sample[name] for name in ("cu_seqlens", "cu_seqlens_padded", "loss_mask")
        )
        assert real is not None
        assert padded is not None
        assert mask is not None
        bounds, counted = documents_of_stream(real, padded), int(mask.sum())
    sizes = torch.tensor([bounds.size(1), counted], device=device)
    if mpu.get_tensor_model_parallel_world_size() == 1:
        return bounds.to(device), sizes[1]
    source, group = mpu.get_tensor_model_parallel_src_rank(), mpu.get_tensor_model_parallel_group()
    torch.distributed.broadcast(sizes, source, group=group)
    if sample is None:
        bounds = torch.empty(2, int(sizes[0]), dtype=torch.int32)
    bounds = bounds.to(device)
    torch.distributed.broadcast(bounds, source, group=group)
    return bounds, sizes[1]


def documents_of_stream(real: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
    """Return the bounds of the documents of several packs that follow each other.

    Args:
        real, padded: `cu_seqlens` and `cu_seqlens_padded` of each pack, `[b, n]`, as
            `PackedDataset` gives them.

    Returns:
        Bounds counted in real tokens, and in places, int32 `[2, documents + 1]`.
    """
    lengths: list[int] = []
    starts: list[int] = []
    length = int(padded[0, -1])
    for row, (real_row, padded_row) in enumerate(zip(real.tolist(), padded.tolist(), strict=True)):
        # Unused entries repeat the last one, the end of the pack.
        count = padded_row.index(length)
        starts += [row * length + start for start in padded_row[:count]]
        lengths += [end - start for start, end in itertools.pairwise(real_row[: count + 1])]
    rows = list(itertools.accumulate(lengths, initial=0)), [*starts, len(real) * length]
    return torch.tensor(rows, dtype=torch.int32)


def sum_loss(
    loss_mask: torch.Tensor | None,
    output: torch.Tensor,
    *,
    source: torch.Tensor | None = None,
    names: Sequence[str] = (),
    on_loss: Callable[[torch.Tensor], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the loss over the tokens that count (Megatron's loss function, its three-value form).

    Args:
        loss_mask: `[b, s]`, 1 where the token counts. None on a stage without a loss, where
            Megatron does not call this.
        output: per-token loss `[b, s]`, nats.
        source: number of each sequence's source in `names`, `[b]`; default none.
        names: sources to sum apart as well, default none.
        on_loss: called with `output`, default none.

    Returns:
        Loss sum, number of tokens, and for the log `{"lm loss": [sum, number]}`; Megatron divides.
        Before it comes `"lm loss/NAME"` for each of `names`.

    Raises:
        RuntimeError: the sum is not finite (``faults.failures.explained`` puts it in words).
    """
    assert loss_mask is not None
    if on_loss is not None:
        on_loss(output)
    loss = torch.sum(output.view(-1).float() * loss_mask.view(-1))
    # As in Megatron-LM's pretrain_gpt.py. Gradients are checked by Megatron's
    # DistributedDataParallel.
    get_rerun_state_machine().validate_result(
        result=loss.detach(),
        rejection_func=lambda value: not value.isfinite(),
        message=LOSS_CHECK,
    )
    tokens = loss_mask.sum().to(torch.int)
    log = {}
    if source is not None:
        # Packed sequences of a micro-batch follow each other in one row.
        mask_bs = loss_mask.view(len(source), -1)
        loss_b = (output.detach().float().view_as(mask_bs) * mask_bs).sum(1)
        for number, name in enumerate(names):
            of_source_b = source == number
            sums = (loss_b * of_source_b).sum(), (mask_bs.sum(1) * of_source_b).sum()
            log[f"lm loss/{name}"] = torch.stack(sums)
    log["lm loss"] = torch.stack([loss.detach(), tokens.float()])
    return loss, tokens, log
