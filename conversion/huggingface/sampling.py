"""Sampled answers of a Hugging Face folder's model, several to each prompt."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from conversion.huggingface.generation import check_request, quiet_transformers
from conversion.huggingface.scoring import check_tokens, load_hf
from mellum2_megatron.common.errors import InputError

END_OF_TURN = "<|im_end|>"
"""Token that ends a turn where the tokenizer has it, beside those of generation_config.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """A sampled answer.

    Attributes:
        text: its text, special tokens such as ``<think>`` among it, without the one that ends it.
        ended: true if it ended itself, false if it was cut off.
    """

    text: str
    ended: bool


def sample_answers(
    hf_path: str | os.PathLike[str],
    prompts: Sequence[tuple[str, str]],
    *,
    answers: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[list[Sampled]]:
    """Yield the answers to each prompt, sampled on the CPU in float32 from all tokens.

    Args:
        hf_path: Hugging Face folder with tokenizer.
        prompts: name for messages, and text, of each prompt; special tokens in it count as such.
        answers: answers to each.
        max_new_tokens: tokens of the longest answer.
        temperature: above 0, default 1: the model's own distribution.
        seed: seed of the first prompt; each further one has the next.

    Raises:
        InputError: the folder is not a complete Mellum 2 model with tokenizer, or a prompt does not
            fit the context with an answer.
    """
    architecture = check_request(hf_path, False, max_new_tokens, temperature)
    if temperature == 0 or answers < 1:
        raise InputError(
            f"temperature={temperature}, answers={answers}",
            rule="answers are sampled, so both are above 0",
            fix="use 1 and 16",
        )
    with quiet_transformers():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(hf_path), local_files_only=True)
        encoded = [tokenizer(text)["input_ids"] for _, text in prompts]
        longest = architecture.max_position_embeddings
        for (name, _), ids in zip(prompts, encoded, strict=True):
            if not 0 < len(ids) <= longest - max_new_tokens:
                raise InputError(
                    f"{name}: a prompt of {len(ids)} tokens, with answers of up to "
                    f"{max_new_tokens}",
                    rule=f"together they are at most max_position_embeddings={longest}",
                    fix="shorten or remove it, or allow shorter answers",
                )
        model, _ = load_hf(hf_path)
        ends = _ends(model.generation_config.eos_token_id, tokenizer.get_vocab())
        for number, ids in enumerate(encoded):
            tokens = torch.tensor([ids])
            check_tokens(tokens, architecture)
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(seed + number)
                rows = model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=max_new_tokens,
                    num_return_sequences=answers,
                    do_sample=True,
                    temperature=temperature,
                    top_p=1.0,
                    top_k=0,
                    eos_token_id=ends or None,
                    pad_token_id=ends[0] if ends else 0,
                )[:, len(ids) :].tolist()
            sampled = []
            for row in rows:
                end = next((place for place, token in enumerate(row) if token in ends), None)
                text = tokenizer.decode(row[:end], skip_special_tokens=False)
                sampled.append(Sampled(text=text, ended=end is not None))
            yield sampled


def _ends(configured: int | list[int] | None, vocabulary: dict[str, int]) -> list[int]:
    """Return the tokens that end an answer."""
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*ends, vocabulary.get(END_OF_TURN)) if token is not None})
