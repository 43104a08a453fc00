"""Logits of a Hugging Face folder, main and MTP, by transformers: the reference for verification.

transformers is imported inside the functions. The import takes seconds, and other modules work with
an older transformers that lacks Mellum's model or MTP head.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from conversion.huggingface.folder import HfFolder
from conversion.huggingface.format import GENERATION_CONFIG_FILE, read_json
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError


def score_hf(
    hf_path: str | os.PathLike[str], tokens: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run ``MellumForCausalLM`` and, with an MTP head, ``MtpModel`` over whole sequences.

    Args:
        hf_path: Hugging Face folder; checked first, so that no weight is initialised at random.
        tokens: token ids `[b, s]`.
        dtype: dtype of weights and arithmetic, default float32.

    Returns:
        Float32 main logits `[b, s, v]`: position t predicts token t + 1.
        MTP logits of the same shape, or None without an MTP head: position t predicts token t + 2,
        from the trunk's normed hidden state at t and the embedding of token t + 1. The last
        position has no next token. It is fed token 0, as in Megatron
        (``multi_token_prediction.py:roll_tensor``, 0.19.2); comparisons leave it out.

    Raises:
        InputError: the folder is not a complete Mellum 2 model, or token ids lie outside the
            vocabulary.
    """
    with HfFolder.open(hf_path) as folder:
        check_tokens(tokens, folder.architecture)
    main, mtp = load_hf(hf_path, dtype)
    return score_loaded(main, mtp, tokens)


def score_loaded(
    main: Any, mtp: Any | None, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run models that `load_hf` returned on tokens that passed `check_tokens`; see `score_hf`."""
    rows = list(score_sequences(main, mtp, tokens))
    logits = torch.cat([row for row, _ in rows])
    heads = [head for _, head in rows if head is not None]
    return logits, torch.cat(heads) if heads else None


def score_sequences(
    main: Any, mtp: Any | None, tokens: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Yield main and MTP logits `[1, s, v]` of one sequence after the other; see `score_hf`."""
    # One at a time, to bound the memory for activations.
    for row in tokens:
        yield _score_row(main, mtp, row[None].long())


def load_hf(
    hf_path: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> tuple[Any, Any | None]:
    """Load transformers' trunk (`MellumForCausalLM`) and its MTP head (`MtpModel`) or None.

    Both are in evaluation mode, on the CPU, with weights of ``dtype`` (default float32).

    Raises:
        InputError: transformers could not read the folder's generation_config.json.
    """
    # transformers reads it with the model.
    generation_config = Path(hf_path) / GENERATION_CONFIG_FILE
    if generation_config.is_file():
        read_json(generation_config, "it was just there")
    from transformers import MellumForCausalLM
    from transformers.modeling_layers import MtpModel

    with bars_on_terminals_only():
        main = MellumForCausalLM.from_pretrained(
            str(hf_path),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="sdpa",
            experts_implementation="eager",
        ).eval()
        if not main.config.num_mtp_layers:
            return main, None
        mtp = MtpModel.from_pretrained(main).eval()
    if missing := set(mtp.config.layer_types) - set(main.config.layer_types):
        # MtpModel borrows the trunk's rotary embedding, which lacks the frequencies of a layer type
        # that only the head has (transformers 5.23).
        assert missing <= set(main.config.rope_parameters)
        mtp.rotary_emb = type(main.model.rotary_emb)(config=mtp.config)
    return main, mtp


def check_tokens(tokens: torch.Tensor, architecture: Mellum2Architecture) -> None:
    """Check that ``tokens`` are token ids `[b, s]` of the model's vocabulary.

    Raises:
        InputError: another shape, an empty batch, or an id outside the vocabulary.
    """
    if tokens.dim() != 2 or tokens.numel() == 0 or tokens.is_floating_point():
        raise InputError(
            f"tokens {list(tokens.shape)} {tokens.dtype}",
            rule="token ids are whole numbers of shape [batch, sequence]",
            fix="save them as a two-dimensional integer array",
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= architecture.vocab_size:
        raise InputError(
            f"token id {low if low < 0 else high}",
            rule=f"ids run from 0 to {architecture.vocab_size - 1} (vocab_size - 1)",
            fix="tokenize with the model's own tokenizer",
        )


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Hide transformers' loading bar unless standard error is a terminal."""
    # transformers draws it into log files too.
    from transformers.utils import logging

    hide = not sys.stderr.isatty() and logging.is_progress_bar_enabled()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            logging.enable_progress_bar()


@torch.no_grad()
def _score_row(
    main: Any, mtp: Any | None, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return main and MTP logits `[1, s, v]` of one sequence, token ids `[1, s]`."""
    hidden = main.model(input_ids=tokens, use_cache=False).last_hidden_state
    logits = main.lm_head(hidden).float()
    if mtp is None:
        return logits, None
    from transformers.cache_utils import MtpCache

    following = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], dim=1)
    # Positions 1..s, as in transformers' generation (`MTPCandidateGenerator`); Megatron's are
    # 0..s-1. RoPE depends on differences of positions only, so both give the same logits.
    positions = torch.arange(1, tokens.shape[1] + 1)[None]
    cache = MtpCache(config=mtp.config)
    mtp_hidden = mtp.forward_layer(0, hidden, positions, cache, input_ids=following)
    return logits, main.lm_head(mtp_hidden).float()
