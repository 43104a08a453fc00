"""Errors of hidden states, layer by layer: Megatron's against transformers'.

Forward hooks record the hidden states. The first layer beyond the tolerance is where two models
depart from each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from mellum2_megatron.architecture import Mellum2Architecture

Recorded = dict[str, list[torch.Tensor]]
"""Place -> hidden states `[b, s, h]`, one tensor a forward pass; places in order of computation."""

EMBEDDING, FINAL_NORM, MTP_LAYER = "embedding", "final norm", "mtp layer 0"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerError:
    """Difference between the hidden states after one place.

    Attributes:
        name: place, such as ``layer 3`` or ``mtp layer 0``; in a summary ``21 layers``.
        kind: attention type of a layer; for any other place its name.
        max_error, mean_error: absolute difference.
        relative_error: ``max_error`` divided by the largest absolute reference value.
    """

    name: str
    kind: str
    max_error: float
    mean_error: float
    relative_error: float


@contextmanager
def record_huggingface(main: Any, mtp: Any | None) -> Iterator[Recorded]:
    """Record the hidden states of `MellumForCausalLM` and `MtpModel`.

    Those of the MTP layer are taken before its last norm, as in `record_megatron`.
    """
    places = {EMBEDDING: main.model.embed_tokens}
    places |= {_layer(index): layer for index, layer in enumerate(main.model.layers)}
    places[FINAL_NORM] = main.model.norm
    if mtp is not None:
        places[MTP_LAYER] = mtp.layers[0].mtp_block
    with _record(places, lambda output: output) as recorded:
        yield recorded
    if mtp is not None:
        # MtpModel embeds through the trunk's own module: each pass calls it twice, first for the
        # trunk.
        recorded[EMBEDDING] = recorded[EMBEDDING][::2]


@contextmanager
def record_megatron(model: Any) -> Iterator[Recorded]:
    """Record the hidden states, `[s, b, h]`, of a `GPTModel` without pipeline stages."""
    places = {EMBEDDING: model.embedding}
    places |= {_layer(index): layer for index, layer in enumerate(model.decoder.layers)}
    places[FINAL_NORM] = model.decoder.final_layernorm
    if getattr(model, "mtp", None) is not None:
        places[MTP_LAYER] = model.mtp.layers[0].mtp_model_layer
    with _record(places, lambda output: output.transpose(0, 1)) as recorded:
        yield recorded
    # A second call embeds the next tokens for the MTP head, through the same module.
    recorded[EMBEDDING] = recorded[EMBEDDING][:1]


def compare_layers(
    ours: Recorded, theirs: Recorded, architecture: Mellum2Architecture
) -> tuple[LayerError, ...]:
    """Compare two models' hidden states, place by place.

    The last MTP position is left out: it has no next token to read.

    Args:
        ours: Megatron's hidden states.
        theirs: hidden states of the reference.
        architecture: architecture of both, for the layer types.

    Raises:
        RuntimeError: a place has another shape in one of the models.
    """
    kinds: dict[str, str] = {
        _layer(index): kind for index, kind in enumerate(architecture.layer_types)
    }
    if architecture.mtp_layer_types:
        kinds[MTP_LAYER] = f"mtp {architecture.mtp_layer_types[0]}"
    errors = []
    for name, reference_parts in theirs.items():
        value, reference = torch.cat(ours[name]), torch.cat(reference_parts)
        # A difference of unequal shapes might broadcast, and would show no error.
        if value.shape != reference.shape:
            raise RuntimeError(
                f"{name}: {list(value.shape)} and {list(reference.shape)} were recorded"
            )
        if name == MTP_LAYER:
            value, reference = value[:, :-1], reference[:, :-1]
        if not reference.numel():  # the MTP layer of sequences of one token
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
    """Return the largest and the mean errors of each layer type, in order of first appearance."""
    by_kind: dict[str, list[LayerError]] = {}
    for layer in layers:
        by_kind.setdefault(layer.kind, []).append(layer)
    return {
        kind: replace(
            same_kind[0],
            name=same_kind[0].name if len(same_kind) == 1 else f"{len(same_kind)} layers",
            max_error=_worst(layer.max_error for layer in same_kind),
            mean_error=sum(layer.mean_error for layer in same_kind) / len(same_kind),
            relative_error=_worst(layer.relative_error for layer in same_kind),
        )
        for kind, same_kind in by_kind.items()
    }


def _worst(values: Iterable[float]) -> float:
    # NaN is the worst. Python's max() drops or keeps it, depending on its place in the list.
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def _layer(index: int) -> str:
    return f"layer {index}"


@contextmanager
def _record(
    places: dict[str, Any], to_batch_first: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[Recorded]:
    """Record the outputs of modules, by name, on the CPU in float32.

    Args:
        places: name -> module.
        to_batch_first: brings an output into the shape `[b, s, h]`.
    """
    recorded: Recorded = {name: [] for name in places}

    def hook(name: str) -> Callable[[Any, Any, Any], None]:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            # Megatron's layers return (hidden states, context).
            hidden = output[0] if isinstance(output, tuple) else output
            # On a CPU in float32 only the clone copies, and later modules may write in place.
            recorded[name].append(to_batch_first(hidden).detach().float().cpu().clone())

        return keep

    with ExitStack() as stack:
        for name, module in places.items():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        yield recorded
