"""Comparison of a Megatron checkpoint with a Hugging Face folder: logits, main and MTP."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from conversion.huggingface.folder import HfFolder
from conversion.huggingface.scoring import check_tokens, load_hf, score_sequences
from conversion.verification.layer_errors import (
    EMBEDDING,
    Difference,
    LayerError,
    compare_layers,
    type_summary,
    watch_huggingface,
)
from conversion.verification.megatron_scoring import score_rank
from conversion.verification.memory import require_huggingface_memory
from conversion.verification.ranks import Ranks
from conversion.verification.score_folder import (
    LOGITS,
    MTP_LOGITS,
    ScoreFolder,
    score_bytes,
    score_shapes,
)
from conversion.verification.scoring import (
    RankStarter,
    check_ranks,
    score_megatron,
    temporary_scores,
)
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.checkpoint import find_checkpoint
from mellum2_megatron.common.errors import InputError

TOLERANCE = 1e-4
"""Largest relative error that passes, in float32 on both sides.

Another order of sums stays below it; a wrong weight or a misread configuration gives 0.1 or more.
"""

MEGATRON_SCORES = "megatron"
"""Name of Megatron's `ScoreFolder` in the temporary folder, which all ranks write to."""

_LONGEST_OF_TWO = 4096
"""Most tokens of two default sequences; of longer ones there is one."""

_LONGEST_ORIGINAL = 16_384
"""Longest original context of YaRN that default sequences exceed. Time and disk grow with it."""

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
        difference = Difference.of(logits, reference)
        return cls(
            max_error=difference.max_error,
            mean_error=difference.mean_error,
            relative_error=difference.relative_error,
            top1=difference.same_top,
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
        unseen: a line for each part of the model that the tokens cannot test (`unseen`).
    """

    sequences: int
    length: int
    tolerance: float
    main: Agreement
    mtp: Agreement | None
    layers: tuple[LayerError, ...] = ()
    unseen: tuple[str, ...] = ()

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
            "unseen": list(self.unseen),
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
    ranks: Ranks | None = None,
    start: RankStarter | None = None,
    work_dir: Path | None = None,
) -> VerifyReport:
    """Compare the logits and hidden states of a Megatron checkpoint and a Hugging Face folder.

    transformers runs first, in this process. Both sides write their results to a temporary folder.

    Args:
        megatron_path: checkpoint folder, or one iteration inside it.
        hf_path: Hugging Face folder.
        tokens: token ids `[b, s]`; None: `default_tokens`.
        tolerance: largest relative error that passes, default `TOLERANCE`.
        ranks: processes that run the Megatron model, default this one alone.
        start: starter of several processes.
        work_dir: folder to make the temporary folder in, default the system's own.

    Raises:
        InputError: a folder is invalid, the two describe different models, the tokens do not fit
            the model, or memory is short.
        WorkError: the disk is too full, or a rank failed.
    """
    ranks = ranks or Ranks()
    checkpoint = find_checkpoint(megatron_path)
    architecture = checkpoint.architecture
    # Different models would differ in every logit, and the report would not show the reason.
    with HfFolder.open(hf_path) as folder:
        require_same_model(architecture, folder.architecture)
    if tokens is None:
        tokens = default_tokens(architecture)
    check_tokens(tokens, architecture)
    length = tokens.shape[1]
    check_ranks(architecture, ranks, length)
    require_huggingface_memory(str(hf_path), architecture, length)
    shapes = score_shapes(architecture, tokens, hidden=True)
    with temporary_scores(work_dir, 2 * score_bytes(shapes)) as temporary:
        theirs = ScoreFolder.create(temporary / "huggingface", shapes)
        score_huggingface(hf_path, tokens, theirs)
        ours = ScoreFolder.create(temporary / MEGATRON_SCORES, shapes)
        score_megatron(checkpoint.iteration_dir, tokens, ours, ranks, start)
        return compare_scores(
            ours.arrays(), theirs.arrays(), architecture, tolerance=tolerance, length=length
        )


def assist(
    megatron_path: str | os.PathLike[str],
    tokens: torch.Tensor | None,
    ranks: Ranks,
    work_dir: Path | None,
) -> None:
    """Take part in a `verify` of the first rank, as another rank that torchrun or srun has started.

    Arguments and errors are those of `verify`.
    """
    checkpoint = find_checkpoint(megatron_path)
    if tokens is None:
        tokens = default_tokens(checkpoint.architecture)
    check_tokens(tokens, checkpoint.architecture)
    check_ranks(checkpoint.architecture, ranks, tokens.shape[1])
    with temporary_scores(work_dir, 0) as temporary:
        score_rank(checkpoint.iteration_dir, tokens, temporary / MEGATRON_SCORES, ranks)


def score_huggingface(
    hf_path: str | os.PathLike[str], tokens: torch.Tensor, scores: ScoreFolder
) -> None:
    """Write the logits of a Hugging Face folder, and the hidden states if ``scores`` has them."""
    main, mtp = load_hf(hf_path)
    row, positions = 0, range(tokens.shape[1])

    def keep(name: str, values: torch.Tensor) -> None:
        scores.write(name, row, positions, values)

    with watch_huggingface(main, mtp, keep) if EMBEDDING in scores.shapes else nullcontext():
        for logits, mtp_logits in score_sequences(main, mtp, tokens):
            keep(LOGITS, logits[0])
            if mtp_logits is not None:
                keep(MTP_LOGITS, mtp_logits[0])
            row += 1
    scores.finish(0)


def compare_scores(
    ours: Mapping[str, torch.Tensor],
    theirs: Mapping[str, torch.Tensor],
    architecture: Mellum2Architecture,
    *,
    length: int,
    tolerance: float = TOLERANCE,
) -> VerifyReport:
    """Compare the arrays of two `ScoreFolder`s.

    Args:
        ours: arrays to judge.
        theirs: reference.
        architecture: architecture of both.
        length: tokens of a sequence.
        tolerance: largest relative error that passes, default `TOLERANCE`.
    """
    report = compare(
        ours[LOGITS],
        ours.get(MTP_LOGITS),
        theirs[LOGITS],
        theirs.get(MTP_LOGITS),
        tolerance=tolerance,
    )
    layers = compare_layers(ours, theirs, architecture)
    return replace(report, layers=layers, unseen=unseen(architecture, length))


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
    """Return random sequences of token ids, `[b, s]`, the same on every call.

    They are longer than two windows and than the context that YaRN extends, if the model's context
    allows it: two sequences, or one of more than 4,096 tokens.
    """
    # A wrong window shows only beyond one window. The 17 avoids a multiple of any block size.
    wanted = 2 * (architecture.sliding_window or 0) + 17
    rope = architecture.rope_full_attention
    original = rope.original_max_position_embeddings or 0
    if original <= _LONGEST_ORIGINAL:
        wanted = max(wanted, original + 17)
    length = min(max(wanted, 64), architecture.max_position_embeddings)
    batch = 2 if length <= _LONGEST_OF_TWO else 1
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, architecture.vocab_size, (batch, length), generator=generator)


def unseen(architecture: Mellum2Architecture, length: int) -> tuple[str, ...]:
    """Return a line for each part of the model that sequences of ``length`` tokens cannot test."""
    lines, window = [], architecture.sliding_window
    slides = "sliding_attention" in (*architecture.layer_types, *architecture.mtp_layer_types)
    if slides and window is not None and length <= window:
        lines.append(
            f"the sliding window ({window}) was not tested: it hides a token only from "
            f"{window + 1} tokens on, the sequences have {length}"
        )
    rope = architecture.rope_full_attention
    original = rope.original_max_position_embeddings or 0
    if length <= original < architecture.max_position_embeddings:
        lines.append(
            f"positions beyond YaRN's original context ({original}) were not tested: "
            f"the sequences have {length} tokens"
        )
    return tuple(lines)


def require_same_model(megatron: Mellum2Architecture, huggingface: Mellum2Architecture) -> None:
    """Check that two architectures give the same logits for the same weights.

    Raises:
        InputError: they differ in a field that the logits depend on; the message names the first.
    """
    ours, theirs = megatron.to_dict(), huggingface.to_dict()
    for name, value in ours.items():
        if value != theirs[name] and name not in _WITHOUT_EFFECT:
            fix = "give the folder that was converted from this checkpoint"
            if name == "num_mtp_layers" and not theirs[name]:
                fix += "; a head that was dropped comes back with `mellum2 convert stitch-mtp`"
            raise InputError(
                f"{name}={value!r} in the Megatron checkpoint, "
                f"{theirs[name]!r} in the Hugging Face folder",
                rule="both must describe the same model",
                fix=fix,
            )
