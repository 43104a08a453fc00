"""Packed documents: each is computed as it is alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from mellum2_megatron import upstream
from mellum2_megatron.model.provider import build_model
from tests.layouts.worker import ARCHITECTURE
from tests.model.packing import packed_documents

pytestmark = pytest.mark.usefixtures("megatron_world")

LENGTHS, ROOMS = (5, 17, 1, 8), (8, 20, 4, 8)
"""Longer and shorter than the window of 7; padded and not."""


@pytest.fixture(scope="module")
def model():
    upstream.activate()
    torch.manual_seed(0)
    model = build_model(ARCHITECTURE, backend="torch", mtp_loss_scaling_factor=0.0).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:  # sharp enough for a wrong key to show
            torch.nn.init.normal_(parameter, std=parameter.size(1) ** -0.5)
    return model


def heads(
    model: torch.nn.Module, tokens: torch.Tensor, packed: PackedSeqParams | None
) -> list[torch.Tensor]:
    """Return MTP and main logits `[s, v]` of one sequence, with their graph."""
    logits: list[torch.Tensor] = []

    def keep(
        _module: torch.nn.Module, _inputs: object, output: tuple[torch.Tensor, None]
    ) -> tuple[torch.Tensor, None]:
        logits.append(output[0][:, 0])
        # Megatron's MTP loss, computed without labels too, overwrites the logits it gets.
        return output[0].detach().clone(), None

    hook = model.output_layer.register_forward_hook(keep)
    model(tokens[None], torch.arange(len(tokens))[None], None, packed_seq_params=packed)
    hook.remove()
    return logits


def test_packing_changes_nothing(model):
    generator = torch.Generator().manual_seed(1)
    documents = [
        torch.randint(1, ARCHITECTURE.vocab_size, (length,), generator=generator)
        for length in LENGTHS
    ]
    weights = [
        torch.randn(2, length, ARCHITECTURE.vocab_size, generator=generator) for length in LENGTHS
    ]
    starts = list(itertools.accumulate(ROOMS, initial=0))
    stream = torch.full((sum(ROOMS),), 3)
    for start, document in zip(starts, documents, strict=False):
        stream[start : start + len(document)] = document
    packed = packed_documents(LENGTHS, ROOMS)
    alone = [torch.stack(heads(model, document, None)) for document in documents]
    of_stream = torch.stack(heads(model, stream, packed))
    together = [
        of_stream[:, start : start + length] for start, length in zip(starts, LENGTHS, strict=False)
    ]
    gradients = []
    for logits in (alone, together):
        model.zero_grad()
        products = [(head * weight).sum() for head, weight in zip(logits, weights, strict=True)]
        sum(products).backward()
        gradients.append(
            {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        )
    for expected, actual in zip(alone, together, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max()
        assert scale > 0, name
        assert (gradients[1][name] - gradient).abs().max() < 1e-5 * scale, name
