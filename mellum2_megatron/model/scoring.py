"""Main and MTP logits of a Megatron Mellum 2 for whole sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel


@torch.no_grad()
def score_tokens(model: GPTModel, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the model on whole sequences and return its logits at every position.

    Args:
        model: a model without pipeline stages; it is run in evaluation mode.
        tokens: token ids `[b, s]`.

    Returns:
        Main logits `[b, s, v]`, float32, position i predicting token i + 1; and MTP logits of the
        same shape, position i predicting token i + 2, or None without an MTP head. Of several MTP
        layers they are the first one's. The last MTP
        position is fed token 0 in place of the next token it lacks
        (megatron/core/transformer/multi_token_prediction.py, `roll_tensor`, 0.19.2): leave it out
        of comparisons.
    """
    heads_sbv: list[torch.Tensor] = []
    # Even without labels Megatron computes the MTP logits for a loss, then the main ones: the head
    # runs once for each MTP layer and once for the trunk, in that order (`GPTModel._postprocess`).
    # The cross entropy of that loss then overwrites the MTP logits
    # (megatron/core/tensor_parallel/cross_entropy.py, 0.19.2), hence the copy.
    hook = model.output_layer.register_forward_hook(
        lambda _module, _inputs, output: heads_sbv.append(output[0].detach().float().clone())
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
    if len(heads_sbv) != heads:
        raise RuntimeError(f"the output head ran {len(heads_sbv)} times, {heads} expected")
    heads_bsv = [logits.transpose(0, 1) for logits in heads_sbv]
    return heads_bsv[-1], heads_bsv[0] if heads > 1 else None
