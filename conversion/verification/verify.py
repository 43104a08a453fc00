"""Comparison of a Megatron checkpoint with a Hugging Face folder: logits, main and MTP."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.table import Table

from conversion.huggingface.folder import HfFolder
from conversion.huggingface.scoring import check_tokens, load_hf, score_loaded
from conversion.verification.layer_errors import (
    LayerError,
    compare_layers,
    record_huggingface,
    record_megatron,
    type_summary,
)
from conversion.verification.megatron_scoring import load_megatron_model
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.checkpoint import find_checkpoint
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.model.scoring import score_tokens

TOLERANCE = 1e-4
"""Largest relative error that passes, in float32 on both sides.

Another order of sums stays below it; a wrong weight or a misread configuration gives 0.1 or more.
"""

_LONGEST_DEFAULT = 4096
"""Most tokens of a default sequence, whatever the window."""

_WITHOUT_EFFECT = {
    "intermediate_size",
    "router_aux_loss_coef",
    "initializer_range",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
"""Fields of the architecture that do not affect the logits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Difference between two sets of logits.

    Attributes:
        max_error, mean_error: absolute difference.
        relative_error: ``max_error`` divided by the largest absolute reference logit.
        top1: share of positions with the same most likely token, 0 to 1.
    """

    max_error: float
    mean_error: float
    relative_error: float
    top1: float

    @classmethod
    def of(cls, logits: torch.Tensor, reference: torch.Tensor) -> Agreement:
        """Compare two `[b, s, v]` tensors."""
        difference, scale = (logits - reference).abs(), float(reference.abs().max())
        largest = float(difference.max())
        return cls(
            max_error=largest,
            mean_error=float(difference.mean()),
            relative_error=largest / scale if scale else largest,
            top1=float((logits.argmax(-1) == reference.argmax(-1)).float().mean()),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """Megatron's logits and hidden states against Hugging Face's, in float32 on the same tokens.

    Attributes:
        sequences, length: shape of the tokens.
        tolerance: largest relative error that passes.
        main: agreement of the main head.
        mtp: agreement of the MTP head; None without one.
        layers: errors of the hidden states, in order of computation; empty if not compared.
    """

    sequences: int
    length: int
    tolerance: float
    main: Agreement
    mtp: Agreement | None
    layers: tuple[LayerError, ...] = ()

    @property
    def first_departing(self) -> LayerError | None:
        """First place whose hidden states differ by more than the tolerance; None: all agree."""
        # "not <=" instead of ">", so that NaN departs too.
        departing = (layer for layer in self.layers if not layer.relative_error <= self.tolerance)
        return next(departing, None)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values, for JSON; layers by type."""
        departing = self.first_departing
        return {
            "sequences": self.sequences,
            "length": self.length,
            "tolerance": self.tolerance,
            "main": asdict(self.main),
            "mtp": asdict(self.mtp) if self.mtp is not None else None,
            "layers": {kind: asdict(error) for kind, error in type_summary(self.layers).items()},
            "first_departing": departing.name if departing is not None else None,
        }

    def layer_table(self, *, every: bool = False) -> Table:
        """Return the errors of the hidden states as a table.

        Args:
            every: one row for each layer; default one for each layer type.
        """
        title = "hidden states: no layer departs"
        departing = self.first_departing
        if departing is not None:
            title = f"hidden states: departs first at {departing.name} ({departing.kind})"
        columns = ("layers", "type", "max error", "mean error", "relative error")
        table = Table(*columns, title=title)
        shown = self.layers if every else tuple(type_summary(self.layers).values())
        for layer in shown:
            errors = (layer.max_error, layer.mean_error, layer.relative_error)
            table.add_row(layer.name, layer.kind, *(f"{error:.2e}" for error in errors))
        return table

    @property
    def ok(self) -> bool:
        """True if every head's relative error is within the tolerance; False for NaN."""
        heads = [head for head in (self.main, self.mtp) if head is not None]
        return all(head.relative_error <= self.tolerance for head in heads)

    def table(self) -> Table:
        """Return the agreement of the heads as a table."""
        verdict = "agree" if self.ok else "DIFFER"
        title = (
            f"{self.sequences} x {self.length} tokens: "
            f"logits {verdict} (tolerance {self.tolerance:g}, relative)"
        )
        columns = ("head", "max error", "mean error", "relative error", "same top-1")
        table = Table(*columns, title=title)
        for name, head in (("main", self.main), ("mtp", self.mtp)):
            if head is not None:
                errors = (head.max_error, head.mean_error, head.relative_error)
                table.add_row(name, *(f"{error:.2e}" for error in errors), f"{head.top1:.2%}")
        return table


def verify(
    megatron_path: str | os.PathLike[str],
    hf_path: str | os.PathLike[str],
    tokens: torch.Tensor | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> VerifyReport:
    """Compare the logits and hidden states of a Megatron checkpoint and a Hugging Face folder.

    Args:
        megatron_path: checkpoint folder, or one iteration inside it.
        hf_path: Hugging Face folder.
        tokens: token ids `[b, s]`; None: `default_tokens`.
        tolerance: largest relative error that passes, default `TOLERANCE`.

    Raises:
        InputError: a folder is invalid, the two describe different models, or the tokens do not
            fit the model.
    """
    checkpoint = find_checkpoint(megatron_path)
    # Different models would differ in every logit, and the report would not show the reason.
    with HfFolder.open(hf_path) as folder:
        require_same_model(checkpoint.architecture, folder.architecture)
    if tokens is None:
        tokens = default_tokens(checkpoint.architecture)
    check_tokens(tokens, checkpoint.architecture)
    main, mtp = load_hf(hf_path)
    with record_huggingface(main, mtp) as theirs:
        reference, mtp_reference = score_loaded(main, mtp, tokens)
    del main, mtp  # one model in memory at a time: 50 GB each for the 12B
    model = load_megatron_model(megatron_path)
    with record_megatron(model) as ours:
        logits, mtp_logits = score_tokens(model, tokens)
    report = compare(logits, mtp_logits, reference, mtp_reference, tolerance=tolerance)
    return replace(report, layers=compare_layers(ours, theirs, checkpoint.architecture))


def compare(
    logits: torch.Tensor,
    mtp_logits: torch.Tensor | None,
    reference: torch.Tensor,
    mtp_reference: torch.Tensor | None,
    *,
    tolerance: float = TOLERANCE,
) -> VerifyReport:
    """Compare two models' logits `[b, s, v]`.

    Args:
        logits, mtp_logits: logits to judge; MTP logits are None without an MTP head.
        reference, mtp_reference: reference logits.
        tolerance: largest relative error that passes, default `TOLERANCE`.
    """
    sequences, length = logits.shape[:2]
    mtp = None
    # The last MTP position has no next token to read.
    if mtp_logits is not None and mtp_reference is not None and length > 1:
        mtp = Agreement.of(mtp_logits[:, :-1].cpu(), mtp_reference[:, :-1])
    return VerifyReport(
        sequences=sequences,
        length=length,
        tolerance=tolerance,
        main=Agreement.of(logits.cpu(), reference),
        mtp=mtp,
    )


def default_tokens(architecture: Mellum2Architecture) -> torch.Tensor:
    """Return two random sequences of token ids, `[2, s]`, the same on every call."""
    # A wrong window shows only beyond two windows; the 17 avoids a multiple of any block size.
    wanted = 2 * (architecture.sliding_window or 0) + 17
    length = min(max(wanted, 64), _LONGEST_DEFAULT, architecture.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, architecture.vocab_size, (2, length), generator=generator)


def require_same_model(megatron: Mellum2Architecture, huggingface: Mellum2Architecture) -> None:
    """Check that two architectures give the same logits for the same weights.

    Raises:
        InputError: they differ in a field that the logits depend on; the message names the first.
    """
    ours, theirs = megatron.to_dict(), huggingface.to_dict()
    for name, value in ours.items():
        if value != theirs[name] and name not in _WITHOUT_EFFECT:
            raise InputError(
                f"{name}={value!r} in the Megatron checkpoint, "
                f"{theirs[name]!r} in the Hugging Face folder",
                rule="both must describe the same model",
                fix="give the folder that was converted from this checkpoint",
            )
