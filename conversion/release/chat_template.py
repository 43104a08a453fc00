"""Render conversations with a model folder's chat template, as a trial.

`data.chat.template` renders, in a process with limits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.huggingface.format import listed, read_json
from mellum2_megatron.common.errors import InputError, shown
from mellum2_megatron.data.chat.template import render_limited, special_tokens_map

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


def render_template(folder: Path, template: str) -> list[str]:
    """Render conversations with ``template`` and the folder's tokenizer.

    Returns:
        Titles of the rendered conversations. A turn and a generation prompt are always among them;
        a system message, tools and reasoning only if the template reads them.

    Raises:
        InputError: a rendering fails, loses part of its conversation, or contains markers that are
            no tokens.
    """
    conversations = list(_conversations(template))
    question = [{"role": "user", "content": _QUESTION}]
    # Training and generation must see the same tokens: the prompt may only add to the conversation.
    prompts = [
        _Conversation(title="generation prompt", messages=question),
        _Conversation(title="generation prompt", messages=question, add_generation_prompt=True),
    ]
    texts = _render(folder, template, [*conversations, *prompts])
    titles = []
    special = special_tokens(folder)
    for conversation in conversations:
        title, text = conversation.title, next(texts)
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
    bare, prompt = texts
    if not prompt.startswith(bare) or len(prompt) <= len(bare):
        added = prompt[len(bare) :]
        raise InputError(
            f"chat template: add_generation_prompt gives {shown(added)} after the question",
            rule="it opens the assistant's turn",
            fix="end the template with a block for add_generation_prompt",
        )
    return [*titles, prompts[0].title]


def end_of_turn(folder: Path, template: str) -> int | None:
    """Return the id of the first special token after an assistant's answer; None without one."""
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    conversation = _Conversation(title="end of turn", messages=messages)
    tail = next(_render(folder, template, [conversation])).rpartition(_ANSWER)[2]
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
        add_generation_prompt: open the assistant's turn at the end, default False.
        expected: texts that the rendering must contain; default none.
    """

    title: str
    messages: list[Message]
    tools: list[Any] | None = None
    add_generation_prompt: bool = False
    expected: tuple[str, ...] = ()


def _conversations(template: str) -> Iterator[_Conversation]:
    """Yield a turn, and a conversation with each further part that ``template`` reads."""
    user = {"role": "user", "content": _QUESTION}
    answer = {"role": "assistant", "content": _ANSWER}
    yield _Conversation(title="a turn", messages=[user, answer], expected=(_QUESTION, _ANSWER))
    # Parts that a template does not read are left out: some templates refuse a system message.
    if re.search(r"\bsystem\b", template):
        system = {"role": "system", "content": _SYSTEM}
        yield _Conversation(
            title="a system message",
            messages=[system, user, answer],
            expected=(_SYSTEM, _ANSWER),
        )
    if re.search(r"\btools\b", template):
        yield _Conversation(
            title="tools",
            messages=[user],
            tools=[_TOOL],
            expected=("multiply_numbers", _QUESTION),
        )
    for field in _REASONING_FIELDS:
        # message.reasoning, message['reasoning'] or message.get('reasoning')
        if re.search(rf"\.{field}\b|\[['\"]{field}['\"]\]|\.get\(['\"]{field}['\"]", template):
            yield _Conversation(
                title=f"reasoning ({field})",
                messages=[user, {**answer, field: _THOUGHT}],
                expected=(_THOUGHT, _ANSWER),
            )
            return


def _render(folder: Path, template: str, conversations: Sequence[_Conversation]) -> Iterator[str]:
    """Render conversations with limits of time and memory, and yield their texts in order.

    Raises:
        InputError: the text that is asked for next could not be rendered.
    """
    requests = [
        {
            "messages": conversation.messages,
            "tools": conversation.tools,
            "add_generation_prompt": conversation.add_generation_prompt,
        }
        for conversation in conversations
    ]
    answers = render_limited(template, special_tokens_map(folder), requests)
    for conversation, answer in zip(conversations, answers, strict=False):
        if "error" in answer:
            raise InputError(
                f"chat template, {conversation.title}: {answer['error']}",
                rule="it must render",
                fix="repair the template",
            )
        yield answer["text"]
