"""Find a model folder's chat template, and render conversations with it.

Templates are programs (Jinja) and not trusted: transformers renders them in an
`ImmutableSandboxedEnvironment` (utils/chat_template_utils.py, 5.23).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.huggingface.format import listed, read_json
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import read_text

CHAT_TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

_QUESTION = "What is 6 times 7?"
_ANSWER = "It is forty-two."
_THOUGHT = "Six sevens add up."
_SYSTEM = "Be brief."
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
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_MARKER = re.compile(r"<\|[^|<>\s]+\|>")

Message = dict[str, Any]


def read_template(folder: Path) -> str | None:
    """Return the folder's chat template; None if it has none.

    Raises:
        InputError: the file is unreadable or not UTF-8.
    """
    # In transformers' order: the file before the key in tokenizer_config.json.
    path = folder / CHAT_TEMPLATE_FILE
    if path.is_file():
        return read_text(path, str(path), fix="copy it again")
    if not (folder / TOKENIZER_CONFIG_FILE).is_file():
        return None
    template = read_json(folder / TOKENIZER_CONFIG_FILE, "").get("chat_template")
    if isinstance(template, list):  # several named templates, as older transformers wrote them
        rows = [row for row in template if isinstance(row, dict) and row.get("name") == "default"]
        template = rows[0].get("template") if rows else None
    return template if isinstance(template, str) else None


def render_template(folder: Path, template: str) -> list[str]:
    """Render conversations with ``template`` and the folder's tokenizer.

    Returns:
        Titles of the rendered conversations. A turn and a generation prompt are always among them;
        a system message, tools and reasoning only if the template reads them.

    Raises:
        InputError: a rendering fails, loses part of its conversation, or contains markers that are
            no tokens.
    """
    titles = []
    special = special_tokens(folder)
    for conversation in _conversations(template):
        title = conversation.title
        text = _render(folder, template, title, conversation.messages, tools=conversation.tools)
        lost = [part for part in conversation.expected if part not in text]
        if lost:
            raise InputError(
                f"chat template, {title}: {lost[0]!r} is not in the text",
                rule="every part of a conversation reaches the model",
                fix="repair the template",
            )
        unknown = sorted(set(_MARKER.findall(text)) - special.keys())
        if unknown:
            raise InputError(
                f"chat template, {title}: {listed(unknown)}",
                rule="markers are special tokens of the tokenizer",
                fix="use the template that belongs to this tokenizer, or add the tokens",
            )
        titles.append(title)
    title = "generation prompt"
    question = [{"role": "user", "content": _QUESTION}]
    # Training and generation must see the same tokens: the prompt may only add to the conversation.
    bare = _render(folder, template, title, question)
    prompt = _render(folder, template, title, question, add_generation_prompt=True)
    if not prompt.startswith(bare) or len(prompt) <= len(bare):
        added = prompt[len(bare) :]
        raise InputError(
            f"chat template: add_generation_prompt gives {added!r} after the question",
            rule="it opens the assistant's turn",
            fix="end the template with a block for add_generation_prompt",
        )
    return [*titles, title]


def end_of_turn(folder: Path, template: str) -> int | None:
    """Return the id of the first special token after an assistant's answer; None without one."""
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    tail = _render(folder, template, "end of turn", messages).rpartition(_ANSWER)[2]
    special = special_tokens(folder)
    positions = [(tail.index(token), token) for token in special if token in tail]
    return special[min(positions)[1]] if positions else None


def special_tokens(folder: Path) -> dict[str, int]:
    """Return the tokens that ``tokenizer.json`` marks special, with their ids."""
    added = read_json(folder / TOKENIZER_FILE, "").get("added_tokens") or []
    return {token["content"]: token["id"] for token in added if token.get("special")}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Conversation:
    """A conversation to render.

    Attributes:
        title: subject, for messages.
        messages, tools: arguments of the template; tools default to none.
        expected: texts that the rendering must contain.
    """

    title: str
    messages: list[Message]
    tools: list[Any] | None = None
    expected: list[str]


def _conversations(template: str) -> Iterator[_Conversation]:
    """Yield a turn, and a conversation with each further part that ``template`` reads."""
    user = {"role": "user", "content": _QUESTION}
    answer = {"role": "assistant", "content": _ANSWER}
    yield _Conversation(title="a turn", messages=[user, answer], expected=[_QUESTION, _ANSWER])
    # Parts that a template does not read are left out: some templates refuse a system message.
    if re.search(r"\bsystem\b", template):
        system = {"role": "system", "content": _SYSTEM}
        yield _Conversation(
            title="a system message",
            messages=[system, user, answer],
            expected=[_SYSTEM, _ANSWER],
        )
    if re.search(r"\btools\b", template):
        yield _Conversation(
            title="tools",
            messages=[user],
            tools=[_TOOL],
            expected=["multiply_numbers", _QUESTION],
        )
    for field in _REASONING_FIELDS:
        # message.reasoning, message['reasoning'] or message.get('reasoning')
        if re.search(rf"\.{field}\b|\[['\"]{field}['\"]\]|\.get\(['\"]{field}['\"]", template):
            yield _Conversation(
                title=f"reasoning ({field})",
                messages=[user, {**answer, field: _THOUGHT}],
                expected=[_THOUGHT, _ANSWER],
            )
            return


def _render(
    folder: Path,
    template: str,
    title: str,
    messages: list[Message],
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
    # Jinja raises many types, and a template raises its own with raise_exception.
    except Exception as error:
        raise InputError(
            f"chat template, {title}: {type(error).__name__}: {error}",
            rule="it must render",
            fix="repair the template",
        ) from error
    return str(text)
