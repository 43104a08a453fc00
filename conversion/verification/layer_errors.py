"""Where two models part: hidden states of Megatron and transformers after every layer, recorded by
forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from mellum2_megatron.architecture import Mellum2Architecture

Recorded = dict[str, list[torch.Tensor]]
"""Hidden states `[b, s, h]` by place, one tensor a forward pass, in the order of computation."""

EMBEDDING, FINAL_NORM, MTP_LAYER = "embedding", "final norm", "mtp layer 0"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerError:
    """How far the hidden states behind one place are apart.

    Attributes:
        name: ``layer 3``, ``mtp layer 0``; of a summary, which layers.
        kind: the layer's attention type, or the place's own name.
        max_error, mean_error: absolute difference.
        relative_error: ``max_error`` over the largest absolute reference value.
    """

    name: str
    kind: str
    max_error: float
    mean_error: float
    relative_error: float


@contextmanager
def record_huggingface(main: Any, mtp: Any | None) -> Iterator[Recorded]:
    """Record what `MellumForCausalLM` and `MtpModel` compute; the MTP layer's output is taken
    before its last norm."""
    places = {EMBEDDING: main.model.embed_tokens}
    places |= {_layer(index): layer for index, layer in enumerate(main.model.layers)}
    places[FINAL_NORM] = main.model.norm
    if mtp is not None:
        places[MTP_LAYER] = mtp.layers[0].mtp_block
    # MtpModel reads token embeddings through the trunk's own module: only the first call of a pass
    # is the trunk's.
    with _record(places, lambda output: output) as recorded:
        yield recorded
    if mtp is not None:
        recorded[EMBEDDING] = recorded[EMBEDDING][::2]


@contextmanager
def record_megatron(model: Any) -> Iterator[Recorded]:
    """Record what a `GPTModel` without pipeline stages computes; its hidden states are `[s, b,
    h]`."""
    places = {EMBEDDING: model.embedding}
    places |= {_layer(index): layer for index, layer in enumerate(model.decoder.layers)}
    places[FINAL_NORM] = model.decoder.final_layernorm
    if getattr(model, "mtp", None) is not None:
        places[MTP_LAYER] = model.mtp.layers[0].mtp_model_layer
    with _record(places, lambda output: output.transpose(0, 1)) as recorded:
        yield recorded
    recorded[EMBEDDING] = recorded[EMBEDDING][:1]  # the MTP head embeds the following tokens


def compare_layers(
    ours: Recorded, theirs: Recorded, architecture: Mellum2Architecture
) -> tuple[LayerError, ...]:
    """Compare what both recorded, place by place; the last MTP position, which reads no next token,
    is left out.

    Args:
        ours: Megatron's hidden states.
        theirs: the reference.
    """
    kinds: dict[str, str] = {
        _layer(index): kind for index, kind in enumerate(architecture.layer_types)
    }
    if architecture.mtp_layer_types:
        kinds[MTP_LAYER] = f"mtp {architecture.mtp_layer_types[0]}"
    errors = []
    for name, reference_parts in theirs.items():
        value, reference = torch.cat(ours[name]), torch.cat(reference_parts)
        if value.shape != reference.shape:  # would broadcast
            raise RuntimeError(
                f"{name}: {list(value.shape)} and {list(reference.shape)} were recorded"
            )
        if name == MTP_LAYER:
            value, reference = value[:, :-1], reference[:, :-1]
        if not reference.numel():
            continue
        difference, scale = (value - reference).abs(), float(reference.abs().max())
        largest = float(difference.max())
        errors.append(
            LayerError(
                name=name,
                kind=kinds.get(name, name),
                max_error=largest,
                mean_error=float(difference.mean()),
                relative_error=largest / scale if scale else largest,
            )
        )
    return tuple(errors)


def type_summary(layers: Iterable[LayerError]) -> dict[str, LayerError]:
    """The worst and the mean of each layer type, in the order in which types come first."""
    by_kind: dict[str, list[LayerError]] = {}
    for layer in layers:
        by_kind.setdefault(layer.kind, []).append(layer)
    return {
        kind: replace(
            found[0],
            name=found[0].name if len(found) == 1 else f"{len(found)} layers",
            max_error=_worst(layer.max_error for layer in found),
            mean_error=sum(layer.mean_error for layer in found) / len(found),
            relative_error=_worst(layer.relative_error for layer in found),
        )
        for kind, found in by_kind.items()
    }


def _worst(values: Iterable[float]) -> float:
    return float(
        torch.tensor(list(values), dtype=torch.float64).max()
    )  # NaN stays NaN, unlike in max()


def _layer(index: int) -> str:
    return f"layer {index}"


@contextmanager
def _record(
    places: dict[str, Any], form: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[Recorded]:
    recorded: Recorded = {name: [] for name in places}

    def hook(name: str) -> Callable[[Any, Any, Any], None]:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            recorded[name].append(form(hidden).detach().float().cpu().clone())

        return keep

    with ExitStack() as stack:
        for name, module in places.items():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        yield recorded
