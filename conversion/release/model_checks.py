"""The checks of a release folder that load the model: transformers' loader, greedy text, the MTP
head's drafts."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING

from conversion.huggingface.folder import listed
from conversion.huggingface.generation import Generation, generate, mtp_acceptance
from conversion.huggingface.scoring import bars_on_terminals_only
from conversion.release.check import Check
from mellum2_megatron.common.errors import InputError, WorkError

if TYPE_CHECKING:
    import torch

LOADS, GENERATES, SAME_GREEDY, ACCEPTANCE = (
    "loads in transformers", "generates", "greedy equals use_mtp", "MTP acceptance",
)  # fmt: skip

PROMPT = "def fibonacci(n: int) -> int:\n    "
_NEW_TOKENS = 32
_ROW = 512
_MOST_TOKENS = (
    4096  # of the evaluation text: logits of both heads are held, 3.2 GB at a vocabulary of 98,304
)


def skipped_checks(why: str) -> list[Check]:
    """The checks of this module, left out."""
    return [Check.not_applicable(name, why) for name in (LOADS, GENERATES, SAME_GREEDY, ACCEPTANCE)]


def running_checks(folder: Path, *, text: str | None, min_acceptance: float) -> list[Check]:
    """Every check that loads the model, in float32 on the CPU, one model at a time."""
    loads = _loads(folder)
    if loads.status == "fail":
        return [loads, *skipped_checks("the model does not load")[1:]]
    generates, plain = _generates(folder)
    checks = [loads, generates]
    if plain is None:
        checks.append(Check.not_applicable(SAME_GREEDY, "the model does not generate"))
    elif not _has_mtp(folder):
        checks.append(Check.not_applicable(SAME_GREEDY, "no MTP head"))
    else:
        checks.append(_same_greedy(folder, plain))
    checks.append(_acceptance(folder, text, min_acceptance))
    return checks


def _has_mtp(folder: Path) -> bool:
    from conversion.huggingface.folder import read_config

    return read_config(folder).num_mtp_layers > 0


def _loads(folder: Path) -> Check:
    """As a user loads it: ``AutoModelForCausalLM`` must find every weight it has, and want every
    weight it finds."""
    from transformers import AutoModelForCausalLM

    try:
        with bars_on_terminals_only():
            model, info = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype="auto",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # whatever its readers raise
        return Check.failed(
            LOADS, f"{type(error).__name__}: {error}", rule="AutoModelForCausalLM.from_pretrained must take the folder",
            fix="repair what it names; transformers 5.23 or later is needed",
        )  # fmt: skip
    loaded, dtype = type(model).__name__, str(model.dtype).removeprefix("torch.")
    del model
    gc.collect()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info.get(kind) or ())):
            return Check.failed(
                LOADS, f"{kind.replace('_', ' ')}: {listed(keys)}", rule="no weight is left random and none unused",
                fix="export the folder again",
            )  # fmt: skip
    return Check.passed(LOADS, f"{loaded}, {dtype}, no weight missing or unexpected")


def _generates(folder: Path) -> tuple[Check, Generation | None]:
    try:
        plain = generate(folder, PROMPT, max_new_tokens=_new_tokens(folder))
    except InputError as error:
        return Check.refused(GENERATES, error), None
    except Exception as error:
        return Check.failed(
            GENERATES,
            f"{type(error).__name__}: {error}",
            rule="model.generate must run",
            fix="export the folder again",
        ), None
    text = plain.completion if len(plain.completion) <= 40 else plain.completion[:40] + "..."
    return Check.passed(
        GENERATES, f"{len(plain.token_ids)} tokens: {text!r}", new_tokens=len(plain.token_ids)
    ), plain


def _new_tokens(folder: Path) -> int:
    """Half the context where that is short, so that the prompt fits too."""
    from conversion.huggingface.folder import read_config

    return max(1, min(_NEW_TOKENS, read_config(folder).max_position_embeddings // 2))


def _same_greedy(folder: Path, plain: Generation) -> Check:
    try:
        drafted = generate(folder, PROMPT, max_new_tokens=_new_tokens(folder), use_mtp=True)
    except (InputError, WorkError) as error:
        return Check.failed(
            SAME_GREEDY, str(error), rule="generate(use_mtp=True) must run", fix="export again"
        )
    figures = {"drafted": drafted.drafted, "accepted": drafted.accepted}
    if drafted.token_ids != plain.token_ids:
        pairs = zip(drafted.token_ids, plain.token_ids, strict=False)
        first = next(
            (i for i, (a, b) in enumerate(pairs) if a != b),
            min(len(drafted.token_ids), len(plain.token_ids)),
        )
        return Check.failed(
            SAME_GREEDY, f"the texts part at new token {first}",
            rule="a drafted token is kept only where the model itself would have written it (float32)",
            fix="install transformers 5.23; if it is, the model's logits depend on how many tokens a step has",
            **figures,
        )  # fmt: skip
    return Check.passed(
        SAME_GREEDY,
        f"the same {len(plain.token_ids)} tokens; {drafted.acceptance_line()}",
        **figures,
    )


def _acceptance(folder: Path, text: str | None, floor: float) -> Check:
    if not _has_mtp(folder):
        return Check.not_applicable(ACCEPTANCE, "no MTP head")
    if text is None:
        return Check.not_applicable(ACCEPTANCE, "no evaluation text (--text FILE)")
    try:
        tokens = evaluation_tokens(folder, text)
        share = mtp_acceptance(folder, tokens)
    except InputError as error:
        return Check.refused(ACCEPTANCE, error)
    value = f"{share:.1%} of {tokens.numel():,} tokens"
    if not share >= floor:
        return Check.failed(
            ACCEPTANCE, value, rule=f"at least {floor:.0%} on text like the training data (a broken head has 1 to 2%)",
            fix="export the MTP head again, or train it longer", acceptance=share, tokens=tokens.numel(),
        )  # fmt: skip
    return Check.passed(ACCEPTANCE, value, acceptance=share, tokens=tokens.numel())


def evaluation_tokens(folder: Path, text: str) -> torch.Tensor:
    """The first tokens of ``text`` as rows `[b, s]`, at most 4,096 in all; a last row that is too
    short is left out."""
    import torch

    from conversion.huggingface.folder import read_config
    from mellum2_megatron.data.tokens.tokenizer import load_tokenizer

    ids = (
        load_tokenizer(folder)
        .encode(text[: 16 * _MOST_TOKENS], add_special_tokens=False)
        .ids[:_MOST_TOKENS]
    )
    length = min(_ROW, read_config(folder).max_position_embeddings, len(ids))
    if length < 8:
        raise InputError(
            f"--text: {len(ids)} tokens",
            rule="acceptance is a share of many positions",
            fix="give a longer text",
        )
    rows = len(ids) // length
    return torch.tensor(ids[: rows * length]).reshape(rows, length)
