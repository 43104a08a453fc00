"""Text from a Hugging Face folder, by transformers' own generation, with or without the MTP head as
its drafter.

Two rates say how good the MTP head is; they are different questions.

* :attr:`Generation.acceptance_rate`, of one generated text: tokens that the MTP head drafted and
  the model then confirmed and kept, divided by all drafted tokens. One token is drafted a step, so
  it is also the share of steps that yield two tokens at once. A drafted token cut off by the length
  limit or the end of text counts as not accepted.
* :func:`mtp_acceptance`, over given text: the share of positions where the head's most likely token
  for position t + 2, seen from t with the true token t + 1, is the model's own most likely token
  for t + 2, seen from the true token t + 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mellum2_megatron.common.errors import InputError, WorkError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """A generated text.

    Attributes:
        prompt: what was continued.
        completion: what was generated, without special tokens.
        prompt_ids, token_ids: the same as ids; ``token_ids`` includes a final end-of-text token.
        drafted: tokens that the MTP head proposed; None without it.
        accepted: those of them that are part of the text.
    """

    prompt: str
    completion: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    drafted: int | None = None
    accepted: int | None = None

    @property
    def text(self) -> str:
        """Prompt and completion."""
        return self.prompt + self.completion

    @property
    def acceptance_rate(self) -> float | None:
        """``accepted / drafted``; None when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted and self.accepted is not None else None

    def acceptance_line(self) -> str:
        """One line about the MTP head, for a person."""
        if self.drafted is None:
            return "MTP: not used"
        if self.acceptance_rate is None:
            return "MTP: no token was drafted"
        return f"MTP: {self.accepted} of {self.drafted} drafted tokens accepted ({self.acceptance_rate:.1%})"


def generate(
    hf_path: str | os.PathLike[str],
    prompt: str,
    *,
    use_mtp: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generation:
    """Continue a text.

    Args:
        hf_path: Hugging Face folder with tokenizer.
        prompt: text to continue; special tokens in it (FIM sentinels) count as such.
        use_mtp: let the MTP head draft. Greedy text is the same with and without.
        max_new_tokens: upper limit.
        temperature: 0 is greedy; above, samples.
        seed: of the samples.

    Runs on the CPU in float32: in bfloat16 the two-token steps of drafting round differently from
    one-token steps, and greedy texts with and without MTP may part.

    Raises:
        InputError: the folder is not a complete Mellum 2 model with tokenizer, has no MTP head
            though asked to use it, or the prompt is empty or too long.
    """
    from conversion.huggingface.folder import HfFolder

    with HfFolder.open(hf_path) as folder:
        architecture = folder.architecture
    if use_mtp and not architecture.num_mtp_layers:
        raise InputError(
            f"--use-mtp with {hf_path}", rule="the model has no MTP head", fix="leave --use-mtp out"
        )
    if max_new_tokens < 1 or temperature < 0:
        value = f"max_new_tokens={max_new_tokens}, temperature={temperature}"
        raise InputError(value, rule="at least 1 and at least 0 are needed", fix="use 64 and 0")
    if not (Path(hf_path) / "tokenizer.json").is_file():
        raise InputError(
            str(hf_path),
            rule="it has no tokenizer.json",
            fix="copy the tokenizer's files into the folder",
        )
    with _quiet():
        import torch
        from transformers import AutoTokenizer

        from conversion.huggingface.scoring import check_tokens, load_hf

        tokenizer = AutoTokenizer.from_pretrained(str(hf_path), local_files_only=True)
        prompt_ids = tokenizer(prompt)["input_ids"]
        _check_prompt(len(prompt_ids), max_new_tokens, architecture.max_position_embeddings)
        tokens = torch.tensor([prompt_ids])
        check_tokens(tokens, architecture)
        model, mtp = load_hf(hf_path)
        drafts = _watch_drafts(model, mtp) if use_mtp else None
        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature}
        if temperature == 0:
            sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            ids = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=max_new_tokens,
                use_mtp=use_mtp,
                pad_token_id=0,  # only ever needed to fill up batches
                **sampling,
            )[0].tolist()
    if drafts is not None and not drafts.steps:
        raise WorkError(
            "transformers never asked the MTP head for a draft", fix="install transformers 5.23"
        )
    new = ids[len(prompt_ids) :]
    return Generation(
        prompt=prompt,
        completion=tokenizer.decode(new, skip_special_tokens=True),
        prompt_ids=tuple(prompt_ids),
        token_ids=tuple(new),
        drafted=drafts.drafted if drafts is not None else None,
        accepted=drafts.accepted if drafts is not None else None,
    )


def mtp_acceptance(hf_path: str | os.PathLike[str], tokens: torch.Tensor) -> float:
    """Share of positions where the MTP head and the model agree on the most likely token after
    next, given true text.

    For every t in [0, s - 2]: the head at t, fed the true token t + 1, against the model at t + 1.
    Both predict t + 2.

    Args:
        hf_path: Hugging Face folder with an MTP head.
        tokens: ids `[b, s]`, s >= 2. Both heads' float32 logits `[b, s, vocab]` are held in memory.

    Raises:
        InputError: the folder is not a complete Mellum 2 model or has no MTP head, or the tokens do
            not fit it.
    """
    from conversion.huggingface.scoring import score_hf

    if tokens.dim() == 2 and tokens.shape[1] < 2:
        raise InputError(
            f"tokens {list(tokens.shape)}",
            rule="two tokens a row are needed",
            fix="give longer sequences",
        )
    with _quiet():
        logits, mtp_logits = score_hf(hf_path, tokens)
    if mtp_logits is None:
        raise InputError(
            str(hf_path),
            rule="the model has no MTP head",
            fix="name a folder exported from an MTP run",
        )
    agree = mtp_logits[:, :-1].argmax(-1) == logits[:, 1:].argmax(-1)
    return float(agree.float().mean())


@dataclass(slots=True)
class _Drafts:
    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def update(self, _input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Stand in for ``update_candidate_strategy``, which is told what became of each draft.

        ``scores`` `[1, drafted + 1, v]`: the model's own predictions at the drafted positions and
        one further. The first step drafts nothing, it only gives the head hidden states to start
        from.
        """
        self.steps += 1
        self.drafted += scores.shape[1] - 1
        self.accepted += int(num_matches)


def _watch_drafts(model: Any, mtp: Any) -> _Drafts:
    """Count drafted and accepted tokens of the next ``model.generate(use_mtp=True)``.

    ``GenerationMixin._get_candidate_generator`` makes the drafter inside ``generate`` (transformers
    5.23), which tells nobody else what became of the drafts.
    """
    drafts = _Drafts()
    make = model._get_candidate_generator

    def make_watched(**options: Any) -> Any:
        generator = make(**options)
        generator.update_candidate_strategy = drafts.update
        generator.mtp_model = (
            mtp  # has rotary frequencies for its layer type even if no trunk layer shares it
        )
        return generator

    model._get_candidate_generator = make_watched
    return drafts


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice out of the generated text's terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_prompt(length: int, max_new_tokens: int, limit: int) -> None:
    if length == 0:
        raise InputError(
            "--prompt ''", rule="there must be a token to continue from", fix="give some text"
        )
    if length + max_new_tokens > limit:
        raise InputError(
            f"a prompt of {length} tokens and max_new_tokens={max_new_tokens}",
            rule=f"together at most max_position_embeddings={limit}",
            fix="shorten the prompt or lower --max-new-tokens",
        )
