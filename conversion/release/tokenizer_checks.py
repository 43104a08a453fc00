"""The checks of a release folder's tokenizer: files, vocabulary, special tokens, chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conversion.huggingface.format import CONFIG_FILE, GENERATION_CONFIG_FILE, listed, read_json
from conversion.release.chat_template import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    end_of_turn,
    render_template,
    special_tokens,
)
from conversion.release.check import Check, named_check
from conversion.release.config_checks import NEEDS_CONFIG
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.chat.template import CHAT_TEMPLATE_FILE, read_template
from mellum2_megatron.data.tokens.tokenizer import check_fim, load_tokenizer, special_ids

_ROLES = ("bos", "eos", "pad")


def tokenizer_checks(
    folder: Path, architecture: Mellum2Architecture | None, *, chat: bool
) -> list[Check]:
    """Return every check of the tokenizer.

    Args:
        folder: Hugging Face folder.
        architecture: architecture of its config.json; None if that cannot be read.
        chat: True if the folder must have a chat template.
    """
    checks = [tokenizer_files(folder)]
    if checks[0].status == "fail":
        later = (vocabulary, agreeing_ids, fim_tokens, chat_template)
        return checks + [check.left_out("needs a tokenizer that can be read") for check in later]
    if architecture is None:
        checks += [check.left_out(NEEDS_CONFIG) for check in (vocabulary, agreeing_ids)]
    else:
        checks += [vocabulary(folder, architecture), agreeing_ids(folder, architecture)]
    return [*checks, fim_tokens(folder), chat_template(folder, required=chat)]


@named_check("tokenizer files")
def tokenizer_files(folder: Path) -> str:
    """The tokenizer's two files are there and can be read."""
    names = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{listed(missing)} missing",
            rule="a release has its tokenizer",
            fix="copy the tokenizer's files too",
        )
    load_tokenizer(folder)
    read_json(folder / TOKENIZER_CONFIG_FILE, "")
    return f"{TOKENIZER_FILE}, {TOKENIZER_CONFIG_FILE}"


@named_check("tokenizer vocabulary")
def vocabulary(folder: Path, architecture: Mellum2Architecture) -> str:
    """Every token id has a row in the embedding."""
    ids = load_tokenizer(folder).get_vocab(with_added_tokens=True).values()
    highest, rows = max(ids, default=-1), architecture.vocab_size
    if not 0 <= highest < rows:
        raise InputError(
            f"highest token id {highest}",
            rule=f"ids run from 0 to {rows - 1} (vocab_size - 1)",
            fix="give the tokenizer the model was trained with",
        )
    return f"highest token id {highest:,}, vocab_size {rows:,}"


@named_check("special tokens")
def agreeing_ids(folder: Path, architecture: Mellum2Architecture) -> str:
    """config.json, generation_config.json and the tokenizer name the same special tokens."""
    by_tokenizer: dict[str, int] = special_ids(folder)
    roles = [role for role in _ROLES if role in by_tokenizer]
    # An added token that is not marked special is also encoded where a text quotes it: a document
    # would end at a quoted end-of-text token.
    marked = special_tokens(folder).values()
    plain = sorted(role for role in roles if by_tokenizer[role] not in marked)
    if plain:
        raise InputError(
            f"{listed(plain)} token not marked special in {TOKENIZER_FILE}",
            rule="a special token is never part of a text",
            fix="mark it special in added_tokens",
        )
    generation = _generation_config(folder)
    ids = {
        CONFIG_FILE: {role: _ids(getattr(architecture, f"{role}_token_id")) for role in _ROLES},
        GENERATION_CONFIG_FILE: {role: _ids(generation.get(f"{role}_token_id")) for role in _ROLES},
        "tokenizer": {role: _ids(by_tokenizer.get(role)) for role in _ROLES},
    }
    if not ids[CONFIG_FILE]["eos"] | ids[GENERATION_CONFIG_FILE]["eos"]:
        raise InputError(
            f"no eos_token_id in {CONFIG_FILE} or {GENERATION_CONFIG_FILE}",
            rule="generation stops at this token",
            fix=f"set it to {by_tokenizer['eos']}",
        )
    for role in _ROLES:
        # A field may be absent: only fields that have ids are compared.
        named = {file: by_role[role] for file, by_role in ids.items() if by_role[role]}
        fewest = min(named.values(), key=len, default=frozenset())
        if role == "eos":
            # More ids are fine: generation may stop at the end of a turn too.
            agree = all(fewest <= numbers for numbers in named.values())
        else:
            agree = all(fewest == numbers for numbers in named.values())
        if agree:
            continue
        fix = f"name the {role}_token in {TOKENIZER_CONFIG_FILE} and write its id"
        if "tokenizer" in named:
            fix = f"write {sorted(named['tokenizer'])} wherever it is named"
        stated = ", ".join(f"{sorted(numbers)} in {file}" for file, numbers in named.items())
        raise InputError(
            f"{role}_token_id: {stated}",
            rule="config, generation config and tokenizer agree",
            fix=fix,
        )
    # Only the generation config is left: read_config refuses ids beyond vocab_size in config.json,
    # and `vocabulary` checks the tokenizer's.
    generated = [number for numbers in ids[GENERATION_CONFIG_FILE].values() for number in numbers]
    outside = sorted(number for number in generated if number >= architecture.vocab_size)
    if outside:
        raise InputError(
            f"{GENERATION_CONFIG_FILE} names id {outside[0]}",
            rule=f"vocab_size is {architecture.vocab_size}",
            fix="write the tokenizer's own ids",
        )
    return ", ".join(f"{role} {by_tokenizer[role]}" for role in roles)


@named_check("FIM tokens")
def fim_tokens(folder: Path) -> str:
    """The three fill-in-the-middle sentinels are special tokens."""
    sentinels, marked = check_fim(folder), special_tokens(folder).values()
    plain = sorted(role for role, number in sentinels.items() if number not in marked)
    if plain:
        raise InputError(
            f"{listed(plain)} not marked special in {TOKENIZER_FILE}",
            rule="a sentinel must be encoded as one token wherever it stands",
            fix="mark it special in added_tokens",
        )
    return ", ".join(f"{role} {number}" for role, number in sentinels.items())


@named_check("chat template")
def chat_template(folder: Path, *, required: bool) -> str | Check:
    """The template renders every part of a conversation, and generation stops where a turn ends."""
    template = read_template(folder)
    if template is None:
        if required:
            raise InputError(
                f"no {CHAT_TEMPLATE_FILE}",
                rule="instruct and thinking members are used through it",
                fix="copy the template the model was trained with into the folder "
                f"as {CHAT_TEMPLATE_FILE}",
            )
        return chat_template.left_out(
            f"no {CHAT_TEMPLATE_FILE}; give --member when there should be one"
        )
    titles = render_template(folder, template)
    stops = _ids(_generation_config(folder).get("eos_token_id"))
    end = end_of_turn(folder, template)
    if end is not None and end not in stops:
        raise InputError(
            f"an answer ends with token {end}, "
            f"eos_token_id of {GENERATION_CONFIG_FILE} is {sorted(stops)}",
            rule="generation must stop where a turn ends",
            fix=f"add {end} to eos_token_id there",
        )
    return f"renders {', '.join(titles)}; a turn ends with token {end}"


def _generation_config(folder: Path) -> dict[str, Any]:
    """Return generation_config.json; InputError unless its token ids are whole numbers."""
    config = read_json(folder / GENERATION_CONFIG_FILE, "generation reads its stop tokens there")
    for role in _ROLES:
        value = config.get(f"{role}_token_id")
        # Python counts JSON's true as an int.
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in _as_list(value)):
            raise InputError(
                f"{GENERATION_CONFIG_FILE}: {role}_token_id={value!r}",
                rule="ids are whole numbers, 0 or more",
                fix="write the tokenizer's own id",
            )
    return config


def _as_list(value: Any) -> list[Any]:
    """Return the ids of a field that holds none, one or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _ids(value: Any) -> frozenset[int]:
    return frozenset(_as_list(value))
