"""Text from a Hugging Face folder, by transformers' own generation, with or without the MTP head.

Two rates measure the MTP head as a drafter:

- `Generation.acceptance_rate`, on generated text: share of the drafted tokens that the model
  confirmed. One token is drafted per step, so it is also the share of steps that yield two tokens.
  A draft cut off by the length limit or the end of the text counts as not accepted.
- `mtp_acceptance`, on given text: share of positions t where head and model find the same token
  t + 2 most likely; the head is fed the true token t + 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conversion.huggingface.folder import HfFolder
from conversion.huggingface.format import read_json
from conversion.huggingface.scoring import check_tokens, load_hf, score_hf
from conversion.huggingface.writer import TOKENIZER_FILE, TOKENIZER_FILES, check_tokenizer
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError, WorkError

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """A generated text.

    Attributes:
        prompt: text that was continued.
        completion: generated text, without special tokens.
        prompt_ids: token ids of the prompt.
        token_ids: token ids of the completion, a final end-of-text token included.
        drafted: number of tokens that the MTP head proposed; None without it.
        accepted: number of drafted tokens that the text kept; None without the MTP head.
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
        """``accepted / drafted``; None if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted and self.accepted is not None else None

    def acceptance_line(self) -> str:
        """Return one line about the MTP head."""
        if self.drafted is None:
            return "MTP: not used"
        if self.acceptance_rate is None:
            return "MTP: no token was drafted"
        share = f"{self.acceptance_rate:.1%}"
        return f"MTP: {self.accepted} of {self.drafted} drafted tokens accepted ({share})"


def generate(
    hf_path: str | os.PathLike[str],
    prompt: str,
    *,
    use_mtp: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generation:
    """Continue a text on the CPU in float32.

    Args:
        hf_path: Hugging Face folder with tokenizer.
        prompt: text to continue; special tokens in it (FIM sentinels) count as such.
        use_mtp: draft with the MTP head, default False; greedy text is the same either way.
        max_new_tokens: most tokens to generate, default 64.
        temperature: 0, the default, is greedy; from 0.01 to 100 tokens are sampled.
        seed: seed of the sampling, default 0.

    Raises:
        InputError: the folder is not a complete Mellum 2 model with tokenizer, it has no MTP head
            to use, or the prompt is empty or too long.
        WorkError: transformers did not use the MTP head.
    """
    architecture = check_request(hf_path, use_mtp, max_new_tokens, temperature)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature}
    if temperature == 0:
        # transformers warns about sampling settings in a greedy call; None unsets those of
        # generation_config.json.
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    with quiet_transformers():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(hf_path), local_files_only=True)
        prompt_ids = tokenizer(prompt)["input_ids"]
        if not prompt_ids:
            raise InputError(
                "--prompt ''", rule="there must be a token to continue from", fix="give some text"
            )
        longest = architecture.max_position_embeddings
        if len(prompt_ids) + max_new_tokens > longest:
            raise InputError(
                f"a prompt of {len(prompt_ids)} tokens and max_new_tokens={max_new_tokens}",
                rule=f"together at most max_position_embeddings={longest}",
                fix="shorten the prompt or lower --max-new-tokens",
            )
        tokens = torch.tensor([prompt_ids])
        check_tokens(tokens, architecture)
        # Float32: in bfloat16 two-token steps round differently from one-token steps, so greedy
        # texts with and without drafts may part.
        model, mtp = load_hf(hf_path)
        drafts = watch_drafts(model, mtp) if use_mtp else None
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            ids = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=max_new_tokens,
                use_mtp=use_mtp,
                pad_token_id=0,  # unused: a batch of one row needs no padding
                **sampling,
            )[0].tolist()
    if drafts is not None and not drafts.steps:
        raise WorkError(
            "transformers took no draft from the MTP head", fix="install transformers 5.23"
        )
    new_ids = ids[len(prompt_ids) :]
    return Generation(
        prompt=prompt,
        completion=tokenizer.decode(new_ids, skip_special_tokens=True),
        prompt_ids=tuple(prompt_ids),
        token_ids=tuple(new_ids),
        drafted=drafts.drafted if drafts is not None else None,
        accepted=drafts.accepted if drafts is not None else None,
    )


def mtp_acceptance(hf_path: str | os.PathLike[str], tokens: torch.Tensor) -> float:
    """Return the share of positions where MTP head and model agree on given text, 0 to 1.

    For every t in [0, s - 2] two predictions of token t + 2 are compared: the head's at t, fed the
    true token t + 1, and the model's at t + 1.

    Args:
        hf_path: Hugging Face folder with an MTP head.
        tokens: ids `[b, s]`, s >= 2. Both heads' float32 logits `[b, s, v]` are held in memory.

    Raises:
        InputError: the folder is not a complete Mellum 2 model or has no MTP head, or the tokens do
            not fit it.
    """
    if tokens.dim() == 2 and tokens.shape[1] < 2:
        raise InputError(
            f"tokens {list(tokens.shape)}",
            rule="two tokens a row are needed",
            fix="give longer sequences",
        )
    with quiet_transformers():
        logits, mtp_logits = score_hf(hf_path, tokens)
    if mtp_logits is None:
        raise InputError(
            str(hf_path),
            rule="the model has no MTP head",
            fix="name a folder exported from an MTP run",
        )
    agree = mtp_logits[:, :-1].argmax(-1) == logits[:, 1:].argmax(-1)
    return float(agree.float().mean())


def check_request(
    hf_path: str | os.PathLike[str], use_mtp: bool, max_new_tokens: int, temperature: float
) -> Mellum2Architecture:
    """Check everything that needs no model in memory; return the folder's architecture.

    Raises:
        InputError: see `generate`.
    """
    with HfFolder.open(hf_path) as folder:
        architecture = folder.architecture
    if use_mtp and not architecture.num_mtp_layers:
        raise InputError(
            f"--use-mtp with {hf_path}",
            rule="the model has no MTP head",
            fix="leave --use-mtp out; a head that was dropped comes back with "
            f"`mellum2 convert stitch-mtp SRC {hf_path}`",
        )
    if max_new_tokens < 1:
        raise InputError(
            f"max_new_tokens={max_new_tokens}", rule="at least 1 is needed", fix="use 64"
        )
    # Scores divided by a smaller temperature overflow; the comparison refuses NaN too.
    if temperature != 0 and not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise InputError(
            f"temperature={temperature}",
            rule=f"0 (greedy), or {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}",
            fix="use 0 or 0.7",
        )
    if not (Path(hf_path) / TOKENIZER_FILE).is_file():
        raise InputError(
            str(hf_path),
            rule=f"it has no {TOKENIZER_FILE}",
            fix="copy the tokenizer's files into the folder",
        )
    # transformers would end with errors of many types.
    check_tokenizer(Path(hf_path), architecture)
    for name in TOKENIZER_FILES:
        path = Path(hf_path) / name
        if path.suffix == ".json" and name != TOKENIZER_FILE and path.is_file():
            read_json(path, "it was just there")
    return architecture


@dataclass(slots=True)
class _Drafts:
    """Counts of one generation.

    Attributes:
        steps: number of decoding steps.
        drafted: number of tokens that the MTP head proposed.
        accepted: number of drafted tokens that the model confirmed.
    """

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def update(self, _input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Count a step, in place of the drafter's ``update_candidate_strategy``.

        Args:
            scores: the model's predictions `[1, drafted + 1, v]`, at the drafted positions and one
                more.
            num_matches: number of drafted tokens that the model confirmed.
        """
        self.steps += 1
        # 0 in the first step, which only computes hidden states for the head.
        self.drafted += scores.shape[1] - 1
        self.accepted += int(num_matches)


def watch_drafts(model: Any, mtp: Any) -> _Drafts:
    """Count drafted and accepted tokens of the next ``model.generate(use_mtp=True)``."""
    drafts = _Drafts()
    make_drafter = model._get_candidate_generator

    # `generate` makes the drafter itself, by `_get_candidate_generator`. It passes the number of
    # accepted tokens to `update_candidate_strategy` and nowhere else (generation/utils.py:4171,
    # transformers 5.23). An MTP drafter's own strategy does nothing, so it can be replaced.
    def make_watched(**options: Any) -> Any:
        drafter = make_drafter(**options)
        drafter.update_candidate_strategy = drafts.update
        # `load_hf` has given this head the rotary frequencies that transformers' may lack.
        drafter.mtp_model = mtp
        return drafter

    model._get_candidate_generator = make_watched
    return drafts


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars and warnings: the terminal shows the text."""
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
