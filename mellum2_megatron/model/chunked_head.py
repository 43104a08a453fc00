"""Cross entropy of both heads in chunks of tokens: no logits are kept for the backward pass.

Megatron keeps the softmax of all tokens in float32, `[s, b, v]`, for each head: 12 GiB of a 12B
rank, and 6 GiB of logits in BF16. Here the forward pass takes the logits of one chunk at a time,
turns them into the gradients of hidden states and weight, and drops them. A token's loss depends on
its own logits alone, so both are known up to the gradient that its loss will get:

- hidden states: each token's is multiplied by that gradient in the backward pass;
- the weight's is a sum over tokens, so their gradients must be known up to a common factor. They
  are the loss mask times that factor, and the backward pass checks it.

No matrix product is computed twice. The main head comes here through `GPTModel`'s
`output_processor`, the MTP head through a wrapper of `process_mtp_loss` (``upstream.patches``).

Letters of shapes: `mellum2_megatron/model/__init__.py`; a rank holds `v / tp` rows of the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

_SCALED_ROWS = 8192
"""Rows of the weight's gradient that are multiplied at a time, in float32."""


class Mellum2Model(GPTModel):
    """`GPTModel` whose heads can take their losses in chunks.

    Attributes:
        head_chunk: tokens whose logits exist at a time; None (default): those of a micro-batch.
    """

    head_chunk: int | None = None

    def chunk_heads(self, chunk: int | None) -> None:
        """Set `head_chunk`."""
        self.head_chunk = chunk
        if self.post_process:
            # The MTP head's function gets the output layer and no other part of the model.
            self.output_layer.head_chunk = chunk

    def _postprocess(self, *args: Any, output_processor: Any = None, **kwargs: Any) -> Any:
        """Turn hidden states into losses `[b, s]` or, without labels, logits `[b, s, v / tp]`."""
        chunk = self.head_chunk
        if chunk is not None and output_processor is None and kwargs["labels"] is not None:
            output_processor = functools.partial(
                _main_loss, chunk=chunk, group=self.pg_collection.tp
            )
        return super()._postprocess(*args, output_processor=output_processor, **kwargs)


def _main_loss(
    *,
    chunk: int,
    group: torch.distributed.ProcessGroup,
    hidden_states: torch.Tensor,
    output_layer: ColumnParallelLinear,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    loss_mask: torch.Tensor | None,
    **_: Any,
) -> torch.Tensor:
    """Return the loss of each token `[b, s]` (`GPTModel`'s `output_processor`)."""
    head = ChunkedHead(output_layer, chunk, group)
    head(hidden_states, weight=output_weight)
    return head.loss(labels, hidden_states, loss_mask)


class ChunkedHead:
    """Output layer that takes its logits chunk by chunk, and only inside of `loss`.

    Args:
        layer: output layer; its weight is `[v / tp, h]`.
        chunk: tokens in a chunk.
        group: tensor-parallel group.
    """

    def __init__(
        self, layer: ColumnParallelLinear, chunk: int, group: torch.distributed.ProcessGroup
    ) -> None:
        self.layer, self.chunk, self.group = layer, chunk, group
        self.gather_output = False  # Megatron reads it: logits are divided by tensor parallelism
        self._weight: torch.Tensor | None = None

    def __call__(
        self, hidden_states: torch.Tensor, weight: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """Return the hidden states themselves, in the place of their logits."""
        self._weight = self.layer.weight if weight is None else weight
        return hidden_states, None

    def loss(
        self, labels: torch.Tensor, hidden_states: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the loss of each token in nats, `[b, s]`, float32.

        Args:
            labels: `[b, s]`.
            hidden_states: `[s, b, h]`, divided by sequence parallelism.
            mask: weight of each token's loss in the sum that will be differentiated, `[b, s]`;
                None: all alike.
        """
        hidden_th = self._whole(hidden_states)
        weights_t = torch.ones_like(labels) if mask is None else mask
        loss_t = _HeadLoss.apply(
            hidden_th,
            self._weight,
            labels.transpose(0, 1).reshape(-1),
            weights_t.transpose(0, 1).reshape(-1).float(),
            self.chunk,
            self.group,
            torch.is_grad_enabled(),
        )
        loss: torch.Tensor = loss_t.view(labels.size(1), -1).transpose(0, 1).contiguous()
        return loss

    @torch.no_grad()
    def acceptance(
        self,
        count: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor,
        *rest: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum Megatron's counts of accepted and of all predictions over the chunks.

        Args:
            count: Megatron's function, of the logits, labels and mask of a chunk.
            hidden_states, labels, mask: as for `loss`.
            *rest: further arguments of `count`.
        """
        assert self._weight is not None
        whole_th = torch.split(self._whole(hidden_states), self.chunk)
        labels_t, mask_t = (
            torch.split(x.transpose(0, 1).reshape(-1), self.chunk) for x in (labels, mask)
        )
        counts = [
            count((part @ self._weight.t()).unsqueeze(1), own[None], counted[None], self, *rest)
            for part, own, counted in zip(whole_th, labels_t, mask_t, strict=True)
        ]
        correct, total = (torch.stack(column).sum() for column in zip(*counts, strict=True))
        return correct, total

    def _whole(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the hidden states of all tokens of this tensor-parallel group, `[t, h]`."""
        if self.layer.sequence_parallel:
            # Each rank's gradient is that of its part of the vocabulary: the gather's backward pass
            # sums them.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.group)
        elif self.group.size() > 1:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=self.group)
        return hidden_states.reshape(-1, hidden_states.size(-1))


class _HeadLoss(torch.autograd.Function):
    """Loss of each token from hidden states and the head's weight, without keeping logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_th: torch.Tensor,
        weight_vh: torch.Tensor,
        labels_t: torch.Tensor,
        weights_t: torch.Tensor,
        chunk: int,
        group: torch.distributed.ProcessGroup,
        with_gradient: bool,
    ) -> torch.Tensor:
        """Return the losses `[t]`, and keep the gradients of hidden states and weight."""
        losses, hidden_gradients, weight_gradient = [], [], None
        rows = weight_vh.size(0)
        first = group.rank() * rows
        for hidden, labels, weights in zip(
            *(torch.split(part_t, chunk) for part_t in (hidden_th, labels_t, weights_t)),
            strict=True,
        ):
            logits, largest = VocabParallelCrossEntropy.calculate_logits_max(
                (hidden @ weight_vh.t()).float()
            )
            _reduce(largest, torch.distributed.ReduceOp.MAX, group)
            elsewhere, own_labels, predicted, total, exponentials = (
                VocabParallelCrossEntropy.calculate_predicted_logits(
                    logits, labels, largest, first, first + rows
                )
            )
            _reduce(predicted, torch.distributed.ReduceOp.SUM, group)
            _reduce(total, torch.distributed.ReduceOp.SUM, group)
            softmax, loss = VocabParallelCrossEntropy.calculate_cross_entropy_loss(
                exponentials, predicted, total
            )
            losses.append(loss)
            if not with_gradient:
                continue
            softmax[torch.arange(len(labels), device=labels.device), own_labels] -= (
                1.0 - elsewhere.float()
            )
            gradient = softmax.to(hidden.dtype)
            hidden_gradients.append(gradient @ weight_vh)
            weighted = (hidden * weights.unsqueeze(1)).to(hidden.dtype)
            part = gradient.t() @ weighted
            if weight_gradient is None:
                # In float32 where there is something to add.
                weight_gradient = part.float() if len(labels) < len(labels_t) else part
            else:
                weight_gradient += part
            # Else they would exist beside those of the next chunk.
            del logits, exponentials, softmax, gradient, part
        if with_gradient:
            assert weight_gradient is not None
            ctx.save_for_backward(torch.cat(hidden_gradients), weights_t)
            # Not through `save_for_backward`: the backward pass changes it in place.
            ctx.weight_gradient = weight_gradient.to(weight_vh.dtype)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of hidden states and weight, scaled by those of the losses."""
        (gradient_t,) = gradients
        hidden_gradient, weights_t = ctx.saved_tensors
        weight_gradient, ctx.weight_gradient = ctx.weight_gradient, None
        # A token's gradient over its weight; the largest weight is the safest divisor.
        place = weights_t.argmax()
        factor = gradient_t[place] / weights_t[place].clamp(min=torch.finfo(torch.float32).tiny)
        difference = (gradient_t - factor * weights_t).abs().max()
        # Comparisons with NaN are false: a step that is not finite is left to the step guard.
        torch._assert_async(
            (difference > 1e-5 * gradient_t.abs().max()).logical_not(),
            "head_chunk: the gradients of the tokens' losses are not proportional to the loss mask",
        )
        # The weight's gradient is not finite either where one token's is not.
        factor = factor + 0.0 * difference
        hidden_gradient = (hidden_gradient * gradient_t.unsqueeze(1)).to(hidden_gradient.dtype)
        for rows in torch.split(weight_gradient, _SCALED_ROWS):
            # In float32: the factor itself must not be rounded to BF16.
            rows.copy_(rows.float() * factor)
        return hidden_gradient, weight_gradient, None, None, None, None, None


def _reduce(
    tensor: torch.Tensor,
    operation: Any,
    group: torch.distributed.ProcessGroup,
) -> None:
    """Reduce in place over the tensor-parallel ranks."""
    if group.size() > 1:
        torch.distributed.all_reduce(tensor, op=operation, group=group)
