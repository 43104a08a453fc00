"""The checks of a release folder that load the model: loader, greedy text, the MTP head's drafts.

Each loads the model anew on the CPU, so that only one copy is in memory. All but the loader's check
run in float32: 4 bytes per parameter.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from conversion.huggingface.folder import read_config
from conversion.huggingface.format import listed
from conversion.huggingface.generation import Generation, generate, mtp_acceptance
from conversion.huggingface.scoring import bars_on_terminals_only
from conversion.release.check import Check, named_check
from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.data.tokens.tokenizer import load_tokenizer

GENERATES = "generates"
PROMPT = "def fibonacci(n: int) -> int:\n    "

_NEW_TOKENS = 32
"""Number of tokens to generate."""
_ROW_LENGTH = 512
"""Most tokens of a row of the evaluation text."""
_SHORTEST_ROW = 8
"""Fewest tokens of a row of the evaluation text."""
_MAX_EVALUATION_TOKENS = 4096
"""Most tokens of the evaluation text.

Float32 logits of both heads are held in memory: 3.2 GB with a vocabulary of 98,304.
"""


def model_checks(folder: Path, *, text: str | None, min_acceptance: float) -> list[Check]:
    """Return every check that loads the model.

    Args:
        folder: Hugging Face folder.
        text: evaluation text for the MTP head's acceptance; None leaves that check out.
        min_acceptance: smallest acceptance that passes, 0 to 1.
    """
    checks = [loads(folder)]
    if checks[0].status == "fail":
        # The first check has run: only the others are left out.
        return checks + model_checks_left_out("the model does not load")[1:]
    outcome, greedy = _generate(folder)
    checks.append(outcome)
    has_mtp = read_config(folder).num_mtp_layers > 0
    if greedy is None:
        checks.append(same_greedy.left_out("the model does not generate"))
    elif not has_mtp:
        checks.append(same_greedy.left_out("no MTP head"))
    else:
        checks.append(same_greedy(folder, greedy))
    if not has_mtp:
        checks.append(acceptance.left_out("no MTP head"))
    elif text is None:
        checks.append(acceptance.left_out("no evaluation text (--text FILE)"))
    else:
        checks.append(acceptance(folder, text, min_acceptance))
    return checks


def model_checks_left_out(why: str) -> list[Check]:
    """Return the outcomes of this module's checks when none of them runs."""
    names = (loads.name, GENERATES, same_greedy.name, acceptance.name)
    return [Check.not_applicable(name, why) for name in names]


@named_check("loads in transformers")
def loads(folder: Path) -> str:
    """AutoModelForCausalLM loads the folder, with no weight missing and none left over."""
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
    # Configuration, weights and model code raise errors of many types.
    except Exception as error:
        raise InputError(
            f"{type(error).__name__}: {error}",
            rule="AutoModelForCausalLM.from_pretrained must take the folder",
            fix="repair what it names; transformers 5.23 or later is needed",
        ) from error
    model_name, dtype = type(model).__name__, str(model.dtype).removeprefix("torch.")
    # The next check loads another copy: free this one at once.
    del model
    gc.collect()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, info.get(kind) or ()))
        if keys:
            title = kind.replace("_", " ")
            raise InputError(
                f"{title}: {listed(keys)}",
                rule="no weight is left random and none unused",
                fix="export the folder again",
            )
    return f"{model_name}, {dtype}, no weight missing or unexpected"


def _generate(folder: Path) -> tuple[Check, Generation | None]:
    """Run model.generate; return the outcome, and the greedy text or None after a failure."""
    try:
        greedy = generate(folder, PROMPT, max_new_tokens=_new_tokens(folder))
    except InputError as error:
        return Check.failed(GENERATES, error), None
    # Generation runs the model's code, which may fail in any way.
    except Exception as error:
        failure = InputError(
            f"{type(error).__name__}: {error}",
            rule="model.generate must run",
            fix="export the folder again",
        )
        return Check.failed(GENERATES, failure), None
    shown = greedy.completion if len(greedy.completion) <= 40 else greedy.completion[:40] + "..."
    count = len(greedy.token_ids)
    return Check.passed(GENERATES, f"{count} tokens: {shown!r}", new_tokens=count), greedy


@named_check("greedy equals use_mtp")
def same_greedy(folder: Path, greedy: Generation) -> Check:
    """The MTP head's drafts leave the greedy text as it is."""
    try:
        drafted = generate(folder, PROMPT, max_new_tokens=_new_tokens(folder), use_mtp=True)
    except (InputError, WorkError) as error:
        raise InputError(
            str(error), rule="generate(use_mtp=True) must run", fix="export again"
        ) from error
    figures = {"drafted": drafted.drafted, "accepted": drafted.accepted}
    ours, theirs = drafted.token_ids, greedy.token_ids
    if ours == theirs:
        value = f"the same {len(theirs)} tokens; {drafted.acceptance_line()}"
        return Check.passed(same_greedy.name, value, **figures)
    # If one text is the beginning of the other, they part where it ends.
    shorter = min(len(ours), len(theirs))
    first = next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)
    failure = InputError(
        f"the texts part at new token {first}",
        rule="a drafted token is kept only where the model itself would have written it (float32)",
        fix="install transformers 5.23; with it installed, "
        "the model's logits depend on the number of tokens in a step",
    )
    return Check.failed(same_greedy.name, failure, **figures)


@named_check("MTP acceptance")
def acceptance(folder: Path, text: str, min_acceptance: float) -> Check:
    """The MTP head and the model agree on enough positions of the evaluation text."""
    tokens = evaluation_tokens(folder, text)
    share = mtp_acceptance(folder, tokens)
    figures = {"acceptance": share, "tokens": tokens.numel()}
    value = f"{share:.1%} of {tokens.numel():,} tokens"
    # False for NaN: it fails.
    if share >= min_acceptance:
        return Check.passed(acceptance.name, value, **figures)
    failure = InputError(
        value,
        rule=f"at least {min_acceptance:.0%} on text like the training data "
        "(a broken head has 1 to 2%)",
        fix="export the MTP head again, or train it longer",
    )
    return Check.failed(acceptance.name, failure, **figures)


def evaluation_tokens(folder: Path, text: str) -> torch.Tensor:
    """Return the first tokens of ``text`` as rows `[b, s]`, at most 4,096 in all.

    Rows have 512 tokens, or fewer if context or text are shorter. A short last row is left out.

    Raises:
        InputError: fewer than 8 tokens.
    """
    # Time and memory for encoding grow with the text. Texts have fewer than 16 characters per
    # token.
    beginning = text[: 16 * _MAX_EVALUATION_TOKENS]
    ids = load_tokenizer(folder).encode(beginning, add_special_tokens=False).ids
    ids = ids[:_MAX_EVALUATION_TOKENS]
    length = min(_ROW_LENGTH, read_config(folder).max_position_embeddings, len(ids))
    if length < _SHORTEST_ROW:
        raise InputError(
            f"--text: {len(ids)} tokens",
            rule="acceptance is a share of many positions",
            fix="give a longer text",
        )
    rows = len(ids) // length
    return torch.tensor(ids[: rows * length]).reshape(rows, length)


def _new_tokens(folder: Path) -> int:
    """Return the number of tokens to generate."""
    # Half of a short context, so that the prompt fits in.
    return max(1, min(_NEW_TOKENS, read_config(folder).max_position_embeddings // 2))
