"""A conversation's text, and the parts of it that are learnt: the assistant's turns.

A template that encloses the assistant's turns in ``{% generation %}`` names the parts itself. With
any other they are what each turn adds to the prompt before it, and the text must grow by appending
only: a template that rewrites earlier turns gives no such parts, and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mellum2_megatron.data.chat.records import Conversation, Message, RecordError
from mellum2_megatron.data.chat.template import ChatTemplate

Span = tuple[int, int]
"""Begin and end of a part of a text, in characters."""


def learnt_spans(
    template: ChatTemplate, conversation: Conversation, special: re.Pattern[str], *, last_only: bool
) -> tuple[str, list[Span]]:
    """Return a conversation's text and the spans of the assistant's turns in it.

    A span begins after the prompt that opens the turn, and ends with the special token that ends
    it.

    Args:
        template: the template.
        conversation: the conversation; its last turn is the assistant's.
        special: pattern of the tokenizer's special tokens.
        last_only: the last turn alone; default all of the assistant's.

    Raises:
        RecordError: the template fails, drops a part of the conversation, rewrites earlier turns,
            marks another's turn as the assistant's, or does not end a turn with a special token.
    """
    messages = [message.plain() for message in conversation.messages]
    text, marked = _render(template, messages, conversation.tools)
    turns = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    if template.marks_turns:
        if len(marked) != len(turns):
            raise RecordError(
                f"the template marks {len(marked)} of {len(turns)} turns of the assistant"
            )
        spans = marked
    else:
        spans = [
            _grown(template, conversation, messages, turn, text)
            for turn in (turns[-1:] if last_only else turns)
        ]
        turns = turns[-len(spans) :]
    if last_only:
        turns, spans = turns[-1:], spans[-1:]
    spans = [_ended(text, span, special) for span in spans]
    _check_complete(conversation, text, dict(zip(turns, spans, strict=True)))
    return text, spans


def _render(
    template: ChatTemplate,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]],
    *,
    prompt: bool = False,
) -> tuple[str, list[Span]]:
    try:
        return template.render(messages, tools, add_generation_prompt=prompt)
    except ValueError as error:
        raise RecordError(f"the chat template fails: {error}") from None


def _grown(
    template: ChatTemplate,
    conversation: Conversation,
    messages: Sequence[dict[str, Any]],
    turn: int,
    text: str,
) -> Span:
    """Return the span that a turn adds to its prompt, in the text of the whole conversation."""
    prompt, _ = _render(template, messages[:turn], conversation.tools, prompt=True)
    until, _ = _render(template, messages[: turn + 1], conversation.tools)
    if not until.startswith(prompt) or not text.startswith(until):
        raise RecordError(
            f"the template writes the turns up to message {turn + 1} differently once others "
            "follow, so their loss has no mask; use a template that appends, or has generation "
            "marks (--chat-template)"
        )
    return len(prompt), len(until)


def _ended(text: str, span: Span, special: re.Pattern[str]) -> Span:
    """Return a span that ends with the token that ends the turn, and no blanks after it."""
    begin, end = span
    found = [match.end() for match in special.finditer(text, begin, end)]
    if found and not text[found[-1] : end].strip():
        return begin, found[-1]
    # A mark may enclose the answer alone.
    after = special.match(text, end)
    if after is None:
        raise RecordError("the template ends a turn of the assistant without a special token")
    return begin, after.end()


def _check_complete(conversation: Conversation, text: str, learnt: dict[int, Span]) -> None:
    """Refuse a template that drops a part, or marks other turns than the assistant's as learnt."""
    for number, message in enumerate(conversation.messages):
        following = next((begin for turn, (begin, _) in learnt.items() if turn > number), len(text))
        inside = text[slice(*learnt[number])] if number in learnt else text
        for part in _parts(message, learnt=number in learnt):
            if part not in inside:
                raise RecordError(
                    f"the chat template drops a part of message {number + 1} ({message.role}): "
                    f"{part[:60]!r}"
                )
            if number not in learnt and part not in text[:following]:
                raise RecordError(
                    f"the template marks message {number + 1} ({message.role}) as part of an "
                    "answer, so it would be learnt"
                )
    for tool in conversation.tools:
        if tool["function"]["name"] not in text:
            raise RecordError(f"the chat template drops the tool {tool['function']['name']!r}")


def _parts(message: Message, *, learnt: bool) -> list[str]:
    """Return texts of a message that its rendering must contain; thoughts only if learnt."""
    parts = [message.content.strip(), *(call["function"]["name"] for call in message.tool_calls)]
    if learnt and message.reasoning is not None:
        parts.append(message.reasoning.strip())
    return parts
