"""Does a Megatron checkpoint compute what a Hugging Face folder computes? Logits of both, main and
MTP."""

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
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.checkpoint import find_checkpoint
from mellum2_megatron.common.errors import InputError

# Float32 on both sides; rounding differs by the order of sums, a wrong weight or reading by 0.1 and
# more.
TOLERANCE = 1e-4
_MAX_DEFAULT_LENGTH = 4096

# Fields that no logit depends on.
_WITHOUT_EFFECT = {
    "intermediate_size",
    "router_aux_loss_coef",
    "initializer_range",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far two sets of logits are apart.

    Attributes:
        max_error, mean_error: absolute difference.
        relative_error: ``max_error`` over the largest absolute reference logit.
        top1: share of positions whose most likely token is the same.
    """

    max_error: float
    mean_error: float
    relative_error: float
    top1: float

    @classmethod
    def of(cls, logits: torch.Tensor, reference: torch.Tensor) -> Agreement:
        """Compare two `[b, s, v]` tensors."""
        difference = (logits - reference).abs()
        scale = float(reference.abs().max())
        return cls(
            max_error=float(difference.max()),
            mean_error=float(difference.mean()),
            relative_error=float(difference.max()) / scale if scale else float(difference.max()),
            top1=float((logits.argmax(-1) == reference.argmax(-1)).float().mean()),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """Megatron's logits against Hugging Face's, in float32 on the same tokens."""

    sequences: int
    length: int
    tolerance: float
    main: Agreement
    mtp: Agreement | None
    layers: tuple[LayerError, ...] = ()

    @property
    def first_departing(self) -> LayerError | None:
        """The first place, in the order of computation, whose hidden states differ by more than the
        tolerance."""
        return next(
            (layer for layer in self.layers if not layer.relative_error <= self.tolerance), None
        )

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON holds them, layers by type."""
        departs = self.first_departing
        return {
            "sequences": self.sequences,
            "length": self.length,
            "tolerance": self.tolerance,
            "main": asdict(self.main),
            "mtp": asdict(self.mtp) if self.mtp is not None else None,
            "layers": {kind: asdict(error) for kind, error in type_summary(self.layers).items()},
            "first_departing": departs.name if departs is not None else None,
        }

    def layer_table(self, *, every: bool = False) -> Table:
        """Hidden states by layer type, or one row a layer; the title names the first layer that
        departs."""
        departs = self.first_departing
        told = (
            f"departs first at {departs.name} ({departs.kind})"
            if departs is not None
            else "no layer departs"
        )
        table = Table(
            "layers",
            "type",
            "max error",
            "mean error",
            "relative error",
            title=f"hidden states: {told}",
        )
        shown = self.layers if every else tuple(type_summary(self.layers).values())
        for layer in shown:
            errors = (layer.max_error, layer.mean_error, layer.relative_error)
            table.add_row(layer.name, layer.kind, *(f"{error:.2e}" for error in errors))
        return table

    @property
    def ok(self) -> bool:
        """Every head's relative error is within the tolerance (a NaN is not)."""
        return all(
            head.relative_error <= self.tolerance
            for head in (self.main, self.mtp)
            if head is not None
        )

    def table(self) -> Table:
        """The figures for a console."""
        verdict = "agree" if self.ok else "DIFFER"
        table = Table(
            "head", "max error", "mean error", "relative error", "same top-1",
            title=f"{self.sequences} x {self.length} tokens: logits {verdict} (tolerance {self.tolerance:g}, relative)",
        )  # fmt: skip
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
    """Compare the logits of a Megatron checkpoint and a Hugging Face folder.

    Args:
        megatron_path: checkpoint folder, or one iteration inside it.
        hf_path: Hugging Face folder.
        tokens: token ids `[b, s]`; `default_tokens` when None.
        tolerance: largest relative error that passes.

    Raises:
        InputError: either folder is invalid, they describe different models, or the tokens do not
            fit.
    """
    from conversion.verification.megatron_scoring import load_megatron_model
    from mellum2_megatron.model.scoring import score_tokens

    checkpoint = find_checkpoint(megatron_path)
    with HfFolder.open(hf_path) as folder:
        require_same_model(checkpoint.architecture, folder.architecture)
    if tokens is None:
        tokens = default_tokens(checkpoint.architecture)
    check_tokens(tokens, checkpoint.architecture)
    main, mtp = load_hf(hf_path)
    with record_huggingface(main, mtp) as theirs:
        reference, mtp_reference = score_loaded(main, mtp, tokens)
    del main, mtp  # one model in memory at a time
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
    """Compare two models' logits `[b, s, v]`; the last MTP position, which has no next token to
    read, is left out."""
    sequences, length = logits.shape[:2]
    mtp = None
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
    """Two random sequences `[2, s]`, the same on every call, long enough to leave the sliding
    window behind."""
    wanted = 2 * (architecture.sliding_window or 0) + 17
    length = min(max(wanted, 64), _MAX_DEFAULT_LENGTH, architecture.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, architecture.vocab_size, (2, length), generator=generator)


def require_same_model(megatron: Mellum2Architecture, huggingface: Mellum2Architecture) -> None:
    """Refuse to compare different models.

    Raises:
        InputError: naming the first field in which they differ.
    """
    ours, theirs = megatron.to_dict(), huggingface.to_dict()
    for name, value in ours.items():
        if value != theirs[name] and name not in _WITHOUT_EFFECT:
            raise InputError(
                f"{name}={value!r} in the Megatron checkpoint, {theirs[name]!r} in the Hugging Face folder",
                rule="both must describe the same model",
                fix="give the folder that was converted from this checkpoint",
            )
