"""The checks of a release folder's tokenizer: files, vocabulary, special tokens, FIM sentinels,
chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conversion.huggingface.folder import CONFIG_FILE, GENERATION_CONFIG_FILE, listed, read_json
from conversion.release.check import Check
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.tokens.tokenizer import check_fim, load_tokenizer, special_ids

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"

_NO_TOKENIZER = "needs a tokenizer that can be read"
_ROLES = ("bos", "eos", "pad")
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_QUESTION, _ANSWER, _THOUGHT, _SYSTEM = (
    "What is 6 times 7?",
    "It is forty-two.",
    "Six sevens add up.",
    "Be brief.",
)
_TOOL = {
    "type": "function",
    "function": {
        "name": "multiply_numbers",
        "description": "Multiply two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}},
            "required": ["a"],
        },
    },
}
_MARKER = re.compile(r"<\|[^|<>\s]+\|>")


def tokenizer_checks(
    folder: Path, architecture: Mellum2Architecture | None, *, chat: bool
) -> list[Check]:
    """Every check of the tokenizer; ``chat``: the member is one that must have a chat template."""
    later = ("tokenizer vocabulary", "special tokens", "FIM tokens", "chat template")
    missing = [
        name for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE) if not (folder / name).is_file()
    ]
    try:
        if missing:
            raise InputError(
                f"{listed(missing)} missing",
                rule="a release has its tokenizer",
                fix="copy the tokenizer's files too",
            )
        vocabulary = load_tokenizer(folder).get_vocab(with_added_tokens=True)
        read_json(folder / TOKENIZER_CONFIG_FILE, "")
    except InputError as error:
        return [
            Check.refused("tokenizer files", error),
            *(Check.not_applicable(name, _NO_TOKENIZER) for name in later),
        ]
    checks = [Check.passed("tokenizer files", f"{TOKENIZER_FILE}, {TOKENIZER_CONFIG_FILE}")]
    if architecture is None:
        checks += [
            Check.not_applicable(name, "needs a config.json that can be read") for name in later[:2]
        ]
    else:
        known = architecture
        checks.append(_vocabulary(vocabulary, known))
        checks.append(_guard("special tokens", lambda: _special_tokens(folder, known)))
    checks.append(_guard("FIM tokens", lambda: _fim(folder)))
    checks.append(_guard("chat template", lambda: _chat_template(folder, required=chat)))
    return checks


def _guard(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except InputError as error:
        return Check.refused(name, error)


def _vocabulary(vocabulary: dict[str, int], architecture: Mellum2Architecture) -> Check:
    top, rows = max(vocabulary.values(), default=-1), architecture.vocab_size
    if not 0 <= top < rows:
        return Check.failed(
            "tokenizer vocabulary", f"highest token id {top}", rule=f"ids run from 0 to {rows - 1} (vocab_size - 1)",
            fix="give the tokenizer the model was trained with",
        )  # fmt: skip
    return Check.passed("tokenizer vocabulary", f"highest token id {top:,}, vocab_size {rows:,}")


def _special_tokens(folder: Path, architecture: Mellum2Architecture) -> Check:
    """config.json, generation_config.json and the tokenizer must name the same ids."""
    name = "special tokens"
    by_tokenizer: dict[str, int] = special_ids(folder)
    special = _added_special(folder)
    plain = sorted(
        role
        for role in _ROLES
        if role in by_tokenizer and by_tokenizer[role] not in special.values()
    )
    if plain:
        return Check.failed(
            name, f"{listed(plain)} token not marked special in {TOKENIZER_FILE}",
            rule="a special token is never part of a text", fix="mark it special in added_tokens",
        )  # fmt: skip
    generation = _generation_config(folder)
    config = {role: getattr(architecture, f"{role}_token_id") for role in _ROLES}
    stated = {
        CONFIG_FILE: {role: _ids(value) for role, value in config.items()},
        GENERATION_CONFIG_FILE: {role: _ids(generation.get(f"{role}_token_id")) for role in _ROLES},
        "tokenizer": {role: _ids(by_tokenizer.get(role)) for role in _ROLES},
    }
    if not stated[CONFIG_FILE]["eos"] | stated[GENERATION_CONFIG_FILE]["eos"]:
        return Check.failed(
            name, f"no eos_token_id in {CONFIG_FILE} or {GENERATION_CONFIG_FILE}",
            rule="generation must know where to stop", fix=f"set it to {by_tokenizer['eos']}",
        )  # fmt: skip
    for role in _ROLES:
        found = {where: ids[role] for where, ids in stated.items() if ids[role]}
        if _agree(role, found):
            continue
        seen = ", ".join(f"{sorted(ids)} in {where}" for where, ids in found.items())
        return Check.failed(
            name, f"{role}_token_id: {seen}", rule="config, generation config and tokenizer agree",
            fix=f"write {sorted(found.get('tokenizer', ()))} wherever it is named" if "tokenizer" in found
            else f"name the {role}_token in {TOKENIZER_CONFIG_FILE} and write its id",
        )  # fmt: skip
    outside = sorted(
        i
        for ids in stated[GENERATION_CONFIG_FILE].values()
        for i in ids
        if i >= architecture.vocab_size
    )
    if outside:
        return Check.failed(
            name, f"{GENERATION_CONFIG_FILE} names id {outside[0]}", rule=f"vocab_size is {architecture.vocab_size}",
            fix="write the tokenizer's own ids",
        )  # fmt: skip
    return Check.passed(
        name, ", ".join(f"{role} {by_tokenizer[role]}" for role in _ROLES if role in by_tokenizer)
    )


def _agree(role: str, found: dict[str, frozenset[int]]) -> bool:
    """The same ids everywhere; generation may also stop at others than the tokenizer's end of
    text."""
    smallest = min(found.values(), key=len, default=frozenset())
    if role == "eos":
        return all(smallest <= ids for ids in found.values())
    return all(smallest == ids for ids in found.values())


def _generation_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / GENERATION_CONFIG_FILE, "it says where generation stops")
    for role in _ROLES:
        value = config.get(f"{role}_token_id")
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in _listed(value)):
            raise InputError(
                f"{GENERATION_CONFIG_FILE}: {role}_token_id={value!r}", rule="ids are whole numbers, 0 or more",
                fix="write the tokenizer's own id",
            )  # fmt: skip
    return config


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _ids(value: Any) -> frozenset[int]:
    return frozenset(_listed(value))


def _added_special(folder: Path) -> dict[str, int]:
    """The tokens that ``tokenizer.json`` marks special."""
    added = read_json(folder / TOKENIZER_FILE, "").get("added_tokens") or []
    return {token["content"]: token["id"] for token in added if token.get("special")}


def _fim(folder: Path) -> Check:
    found, special = check_fim(folder), _added_special(folder)
    plain = sorted(role for role, identifier in found.items() if identifier not in special.values())
    if plain:
        return Check.failed(
            "FIM tokens", f"{listed(plain)} not marked special in {TOKENIZER_FILE}",
            rule="a sentinel must be encoded as one token wherever it stands", fix="mark it special in added_tokens",
        )  # fmt: skip
    return Check.passed(
        "FIM tokens", ", ".join(f"{role} {identifier}" for role, identifier in found.items())
    )


# -- chat template
# ----------------------------------------------------------------------------------------------------


def read_template(folder: Path) -> str | None:
    """The folder's chat template: its own file, or the key in ``tokenizer_config.json``; None when
    it has neither."""
    path = folder / CHAT_TEMPLATE_FILE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                str(path), rule=f"it must be UTF-8 text ({error})", fix="copy it again"
            ) from error
    config = (
        read_json(folder / TOKENIZER_CONFIG_FILE, "")
        if (folder / TOKENIZER_CONFIG_FILE).is_file()
        else {}
    )
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones, as older transformers wrote them
        template = next(
            (
                row.get("template")
                for row in template
                if isinstance(row, dict) and row.get("name") == "default"
            ),
            None,
        )
    return template if isinstance(template, str) else None


def _chat_template(folder: Path, *, required: bool) -> Check:
    name, template = "chat template", read_template(folder)
    if template is None:
        if required:
            return Check.failed(
                name, f"no {CHAT_TEMPLATE_FILE}", rule="instruct and thinking members are used through it",
                fix=f"copy the template the model was trained with into the folder as {CHAT_TEMPLATE_FILE}",
            )  # fmt: skip
        return Check.not_applicable(
            name, f"no {CHAT_TEMPLATE_FILE}; give --member when there should be one"
        )
    with_fields = render_template(folder, template)
    ends = _ids(_generation_config(folder).get("eos_token_id"))
    end = end_of_turn(folder, template)
    if end is not None and end not in ends:
        return Check.failed(
            name, f"an answer ends with token {end}, eos_token_id of {GENERATION_CONFIG_FILE} is {sorted(ends)}",
            rule="generation must stop where a turn ends", fix=f"add {end} to eos_token_id there",
        )  # fmt: skip
    return Check.passed(name, f"renders {', '.join(with_fields)}; a turn ends with token {end}")


def render_template(folder: Path, template: str) -> list[str]:
    """Render conversations with ``template`` and the folder's tokenizer, in transformers' sandbox.

    Returns:
        What was rendered: always a conversation with and without a generation prompt; tools and the
        reasoning field where the template reads them.

    Raises:
        InputError: a rendering fails, leaves out what it was given, or writes markers that are no
            tokens.
    """
    done = []
    special = _added_special(folder)
    for title, messages, tools, expected in _conversations(template):
        text = _render(folder, template, title, messages, tools=tools)
        lost = [part for part in expected if part not in text]
        if lost:
            raise InputError(
                f"chat template, {title}: {lost[0]!r} is not in the text",
                rule="what a conversation holds reaches the model", fix="repair the template",
            )  # fmt: skip
        unknown = sorted(set(_MARKER.findall(text)) - special.keys())
        if unknown:
            raise InputError(
                f"chat template, {title}: {listed(unknown)}", rule="markers are special tokens of the tokenizer",
                fix="use the template that belongs to this tokenizer, or add the tokens",
            )  # fmt: skip
        done.append(title)
    ask = [{"role": "user", "content": _QUESTION}]
    bare = _render(folder, template, "generation prompt", ask)
    prompt = _render(folder, template, "generation prompt", ask, add_generation_prompt=True)
    if not prompt.startswith(bare) or len(prompt) <= len(bare):
        raise InputError(
            f"chat template: add_generation_prompt gives {prompt[len(bare) :]!r} after the question",
            rule="it opens the assistant's turn", fix="end the template with a block for add_generation_prompt",
        )  # fmt: skip
    return [*done, "generation prompt"]


def end_of_turn(folder: Path, template: str) -> int | None:
    """Id of the first special token after an assistant's answer; None when the template writes
    none."""
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    tail = _render(folder, template, "end of turn", messages).rpartition(_ANSWER)[2]
    special = _added_special(folder)
    placed = [(tail.index(token), token) for token in special if token in tail]
    return special[min(placed)[1]] if placed else None


def _conversations(
    template: str,
) -> Iterator[tuple[str, list[dict[str, Any]], list[Any] | None, list[str]]]:
    user = {"role": "user", "content": _QUESTION}
    answer = {"role": "assistant", "content": _ANSWER}
    yield "a turn", [user, answer], None, [_QUESTION, _ANSWER]
    if re.search(r"\bsystem\b", template):
        yield (
            "a system message",
            [{"role": "system", "content": _SYSTEM}, user, answer],
            None,
            [_SYSTEM, _ANSWER],
        )
    if re.search(r"\btools\b", template):
        yield "tools", [user], [_TOOL], ["multiply_numbers", _QUESTION]
    for field in _REASONING_FIELDS:
        if re.search(rf"\.{field}\b|\[['\"]{field}['\"]\]|\.get\(['\"]{field}['\"]", template):
            yield (
                f"reasoning ({field})",
                [user, {**answer, field: _THOUGHT}],
                None,
                [_THOUGHT, _ANSWER],
            )
            return


def _render(
    folder: Path,
    template: str,
    title: str,
    messages: list[dict[str, Any]],
    *,
    tools: list[Any] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (
        Exception
    ) as error:  # a template may fail in any way jinja or its own raise_exception can
        raise InputError(
            f"chat template, {title}: {type(error).__name__}: {error}",
            rule="it must render",
            fix="repair the template",
        ) from error
    return str(text)
