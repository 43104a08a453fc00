"""One rank that scores a checkpoint, for `run_distributed`."""

from __future__ import annotations

from pathlib import Path

import torch

from conversion.verification.megatron_scoring import score_rank
from conversion.verification.ranks import Ranks


def score(checkpoint: Path, tokens: torch.Tensor, folder: Path, ranks: Ranks) -> int:
    """Score as `python -m conversion.verification` does; return the rank's number of weights."""
    from conversion.verification import megatron_scoring

    counts: list[int] = []
    load = megatron_scoring.load_megatron_model

    def counted(*args: object, **options: object) -> object:
        model = load(*args, **options)  # type: ignore[arg-type]
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
        return model

    megatron_scoring.load_megatron_model = counted  # type: ignore[assignment]
    score_rank(checkpoint, tokens, folder, ranks)
    return counts[0]
