"""Prompts for texts that a model generates while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mellum2_megatron.common.errors import InputError


def encode_prompts(folder: Path, prompts: Sequence[str], *, longest: int) -> list[list[int]]:
    """Return the token ids of each prompt.

    Special tokens are read as such, so that a prompt may hold fill-in-the-middle sentinels.

    Args:
        folder: tokenizer folder.
        prompts: the texts.
        longest: most tokens that a prompt may have.

    Raises:
        InputError: a prompt has no tokens, more than ``longest``, or characters that the tokenizer
            lacks.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = []
    for prompt in prompts:
        ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False).ids
        shown = f"logging.sample_prompts: {prompt!r}"
        if not 0 < len(ids) <= longest:
            raise InputError(
                shown,
                rule=f"a prompt has 1 to {longest} tokens (data.sequence_length less "
                f"logging.sample_tokens), it has {len(ids)}",
                fix="shorten it, or lower logging.sample_tokens" if ids else "write another text",
            )
        unknown = tokenizer.model.unk_token if hasattr(tokenizer.model, "unk_token") else None
        if unknown is not None and tokenizer.token_to_id(unknown) in ids and unknown not in prompt:
            raise InputError(
                shown,
                rule=f"the tokenizer {folder} has no token for a part of it",
                fix="use other characters",
            )
        encoded.append(ids)
    return encoded
