"""Logits of a Megatron Mellum 2, main and MTP, for whole sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel


@torch.no_grad()
def score_tokens(model: GPTModel, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the model on whole sequences and return what it predicts at every position.

    Args:
        model: a model without pipeline stages, on the device of its parameters.
        tokens: token ids `[b, s]`.

    Returns:
        Main logits `[b, s, v]`, float32, position t predicting token t + 1; and MTP logits of the
        same shape, position t predicting token t + 2, or None without an MTP head. The last MTP
        position has no next token to read and is fed token 0 in its place
        (megatron/core/transformer/multi_token_prediction.py, `roll_tensor`, 0.19.2): comparisons
        leave it out.
    """
    captured: list[torch.Tensor] = []
    # Without labels Megatron computes the MTP logits for a loss that nobody asked for, then the
    # main ones: the head is called once for each MTP layer and once for the trunk, in that order
    # (`GPTModel._postprocess`). The cross entropy of that loss then overwrites the MTP logits
    # (megatron/core/tensor_parallel/cross_entropy.py), hence the copy.
    hook = model.output_layer.register_forward_hook(
        lambda _module, _inputs, output: captured.append(output[0].detach().float().clone())
    )
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        tokens = tokens.to(device=device, dtype=torch.long)
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        model(tokens, positions, None)
    finally:
        hook.remove()
        model.train(was_training)
    heads = 1 + (model.config.mtp_num_layers or 0)
    if len(captured) != heads:
        raise RuntimeError(f"the output head ran {len(captured)} times, {heads} expected")
    logits = [head.transpose(0, 1) for head in captured]
    return logits[-1], logits[0] if heads > 1 else None
