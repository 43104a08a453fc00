"""Errors of hidden states, layer by layer: Megatron's against transformers'.

Forward hooks record the hidden states. The first layer beyond the tolerance is where two models
depart from each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from mellum2_megatron.architecture import Mellum2Architecture

Keep = Callable[[str, torch.Tensor], None]
"""Function that takes the hidden states after one place: its name, and the values `[s, h]`."""

EMBEDDING, FINAL_NORM, MTP_LAYER = "embedding", "final norm", "mtp layer 0"

_POSITIONS = 512
"""Positions that are compared at a time; it bounds the memory."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Difference of two arrays `[b, s, n]`.

    Attributes:
        max_error, mean_error: absolute difference.
        relative_error: ``max_error`` divided by the largest absolute reference value.
        same_top: share of positions whose largest value is in the same column, 0 to 1.
    """

    max_error: float
    mean_error: float
    relative_error: float
    same_top: float

    @classmethod
    def of(cls, values: torch.Tensor, reference: torch.Tensor) -> Difference:
        """Compare two arrays, some positions at a time; NaN is the largest error."""
        largest, scale, total, same = [], [], 0.0, 0
        for value, expected in zip(values, reference, strict=True):
            for ours, theirs in zip(
                value.split(_POSITIONS), expected.split(_POSITIONS), strict=True
            ):
                error = (ours - theirs).abs()
                largest.append(error.max())
                scale.append(theirs.abs().max())
                total += float(error.sum(dtype=torch.float64))
                same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        # torch's max keeps NaN. Python's drops or keeps it, depending on its place.
        worst, most = float(torch.stack(largest).max()), float(torch.stack(scale).max())
        return cls(
            max_error=worst,
            mean_error=total / reference.numel(),
            relative_error=worst / most if most else worst,
            same_top=same / (reference.shape[0] * reference.shape[1]),
        )


def layer_places(architecture: Mellum2Architecture) -> dict[str, str]:
    """Return the kind of every place, by name, in order of computation."""
    places: dict[str, str] = {EMBEDDING: EMBEDDING}
    places |= {_layer(index): kind for index, kind in enumerate(architecture.layer_types)}
    places[FINAL_NORM] = FINAL_NORM
    if architecture.num_mtp_layers:
        places[MTP_LAYER] = f"mtp {architecture.mtp_layer_types[0]}"
    return places


@contextmanager
def watch_huggingface(main: Any, mtp: Any | None, keep: Keep) -> Iterator[None]:
    """Call ``keep`` for the hidden states of `MellumForCausalLM` and `MtpModel`.

    Those of the MTP layer are taken before its last norm, as in `watch_megatron`. A pass must hold
    one sequence.
    """
    places = {EMBEDDING: main.model.embed_tokens}
    places |= {_layer(index): layer for index, layer in enumerate(main.model.layers)}
    places[FINAL_NORM] = main.model.norm
    if mtp is not None:
        places[MTP_LAYER] = mtp.layers[0].mtp_block
    # MtpModel embeds through the trunk's own module: with it each pass calls that twice, first
    # for the trunk.
    with _watch(places, keep, lambda output: output[0], calls=1 if mtp is None else 2):
        yield


@contextmanager
def watch_megatron(model: Any, keep: Keep) -> Iterator[None]:
    """Call ``keep`` for the hidden states, `[s, 1, h]`, of this rank's part of a `GPTModel`.

    A pass must hold one sequence.
    """
    places: dict[str, Any] = {}
    if model.pre_process:
        places[EMBEDDING] = model.embedding
    # Megatron numbers its layers from 1, over all pipeline stages.
    places |= {_layer(layer.layer_number - 1): layer for layer in model.decoder.layers}
    if model.decoder.final_layernorm is not None:
        places[FINAL_NORM] = model.decoder.final_layernorm
    mtp = getattr(model, "mtp", None)
    if mtp is not None:
        places[MTP_LAYER] = mtp.layers[0].mtp_model_layer
    # A second call embeds the next tokens for the MTP head, through the same module.
    calls = 1 if mtp is None else 1 + len(mtp.layers)
    with _watch(places, keep, lambda output: output[:, 0], calls=calls):
        yield


def compare_layers(
    ours: Mapping[str, torch.Tensor],
    theirs: Mapping[str, torch.Tensor],
    architecture: Mellum2Architecture,
) -> tuple[LayerError, ...]:
    """Compare two models' hidden states `[b, s, h]`, place by place.

    The last MTP position is left out: it has no next token to read.

    Args:
        ours: Megatron's hidden states by place; other names are ignored.
        theirs: hidden states of the reference.
        architecture: architecture of both.

    Raises:
        RuntimeError: a place has another shape in one of the models.
    """
    errors = []
    for name, kind in layer_places(architecture).items():
        if name not in theirs:
            continue
        value, reference = ours[name], theirs[name]
        # A difference of unequal shapes might broadcast, and would show no error.
        if value.shape != reference.shape:
            raise RuntimeError(
                f"{name}: {list(value.shape)} and {list(reference.shape)} were recorded"
            )
        if name == MTP_LAYER:
            value, reference = value[:, :-1], reference[:, :-1]
        if not reference.numel():  # the MTP layer of sequences of one token
            continue
        difference = Difference.of(value, reference)
        errors.append(
            LayerError(
                name=name,
                kind=kind,
                max_error=difference.max_error,
                mean_error=difference.mean_error,
                relative_error=difference.relative_error,
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
def _watch(
    places: Mapping[str, Any],
    keep: Keep,
    of_sequence: Callable[[torch.Tensor], torch.Tensor],
    *,
    calls: int,
) -> Iterator[None]:
    """Pass the outputs of modules to ``keep``.

    Args:
        places: name -> module.
        keep: function to call.
        of_sequence: cuts an output to `[s, h]`.
        calls: calls of the embedding in a pass, of which the first counts.
    """
    embedded = 0

    def hook(name: str) -> Callable[[Any, Any, Any], None]:
        def taken(_module: Any, _inputs: Any, output: Any) -> None:
            nonlocal embedded
            if name == EMBEDDING:
                embedded += 1
                if (embedded - 1) % calls:
                    return
            # Megatron's layers return (hidden states, context).
            keep(name, of_sequence(output[0] if isinstance(output, tuple) else output))

        return taken

    with ExitStack() as stack:
        for name, module in places.items():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        yield
