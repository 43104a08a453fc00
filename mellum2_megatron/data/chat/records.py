"""Conversations from rows, in the layouts that people have, each checked with a reason.

========================  ==============================================================
OpenAI, Hugging Face      ``messages``: ``role``, ``content``, ``tool_calls``; ``tools``
ShareGPT                  ``conversations``: ``from``, ``value``; ``system``, ``tools``
prompt and completion     ``prompt`` and ``completion``, each a list of messages
========================  ==============================================================

Lists may be JSON texts, as in parquet files. Reasoning is a message's ``reasoning_content``,
``reasoning`` or ``thinking``; a ``<think>`` block at the start of its content; or the row's
``reasoning``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mellum2_megatron.common.errors import shown
from mellum2_megatron.common.json_files import JsonError, parse_json

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "tool": "tool",
    "function": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""Role in a row -> role here. A turn of the last two is a call in JSON, as ShareGPT writes it."""

MESSAGE_KEYS = ("messages", "conversations", "conversation")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
OTHER_KEYS = ("prompt", "completion", "system", "system_prompt", "tools", "functions", "reasoning")
_CALL_ROLES = ("function_call", "tool_call")
_THINK, _END_THINK = "<think>", "</think>"


class RecordError(Exception):
    """A conversation that cannot be used; the message is the reason, in a few words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """A turn.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or ``tool``.
        content: text, possibly empty.
        reasoning: text of an assistant's thoughts; default None.
        tool_calls: calls, each ``{"type": "function", "function": {"name", "arguments"}}`` with
            arguments as an object; default none.
        more: ``name`` and ``tool_call_id``, where the row has them.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    more: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return the message in the form that chat templates read."""
        value: dict[str, Any] = {"role": self.role, "content": self.content, **self.more}
        if self.reasoning is not None:
            value["reasoning_content"] = self.reasoning
        if self.tool_calls:
            value["tool_calls"] = list(self.tool_calls)
        return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Turns, of which the last is the assistant's (`parse_prompt`: not yet), and offered tools.

    Attributes:
        messages: the turns.
        tools: descriptions, each ``{"type": "function", "function": {"name", ...}}``.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


def parse_record(row: Mapping[str, Any], *, nulls_are_absent: bool = False) -> Conversation:
    """Return a row's conversation.

    Args:
        row: the row.
        nulls_are_absent: drop keys without a value from tools and arguments. Parquet gives every
            object of a column all keys of any.

    Raises:
        RecordError: the row has another layout, or a conversation that breaks a rule.
    """
    messages, tools = _turns(row, nulls_are_absent)
    _check(messages, tools)
    return Conversation(messages=messages, tools=tools)


def parse_prompt(row: Mapping[str, Any]) -> Conversation:
    """Return the conversation of a row that ends where the assistant is to answer.

    Raises:
        RecordError: see `parse_record`, or the last turn is not the user's or a tool's.
    """
    messages, tools = _turns(row, nulls_are_absent=False)
    if messages[-1].role not in ("user", "tool"):
        raise RecordError(
            f"the last turn is the {messages[-1].role}'s; the model answers the user or a tool"
        )
    _check_turns(messages, tools)
    return Conversation(messages=messages, tools=tools)


def _turns(
    row: Mapping[str, Any], nulls_are_absent: bool
) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
    """Return the turns and tools of a row."""
    items = _items(row)
    messages = [_message(item, number, nulls_are_absent) for number, item in enumerate(items, 1)]
    system = next((row[key] for key in ("system", "system_prompt") if row.get(key)), None)
    if system is not None:
        if not isinstance(system, str):
            raise RecordError(f"'system' is not a text but {_kind(system)}")
        if messages[0].role != "system":
            messages.insert(0, Message(role="system", content=system))
    messages = _with_reasoning(messages, row.get("reasoning"))
    given = row.get("tools") or row.get("functions")
    tools = tuple(_tool(tool, nulls_are_absent) for tool in _list(given, "tools"))
    return tuple(messages), tools


def _items(row: Mapping[str, Any]) -> list[Any]:
    """Return a row's turns as they are."""
    key = next((key for key in MESSAGE_KEYS if row.get(key) is not None), None)
    if key is not None:
        items = _list(row[key], key)
    elif row.get("prompt") is not None and row.get("completion") is not None:
        items = [item for part in ("prompt", "completion") for item in _list(row[part], part)]
    else:
        keys = ", ".join(repr(name) for name in list(row)[:20]) or "none"
        wanted = ", ".join(map(repr, MESSAGE_KEYS))
        raise RecordError(f"no key {wanted} or 'prompt' and 'completion'; its keys are {keys}")
    if not items:
        raise RecordError("there are no messages")
    return items


def _message(item: Any, number: int, nulls_are_absent: bool) -> Message:
    where = f"message {number}"
    if not isinstance(item, Mapping):
        raise RecordError(f"{where} is no object but {_kind(item)}")
    given = item.get("role") if item.get("role") is not None else item.get("from")
    if not isinstance(given, str) or given.lower() not in ROLES:
        raise RecordError(
            f"{where} has the role {shown(given)}; known are {', '.join(sorted(ROLES))}"
        )
    role = ROLES[given.lower()]
    content = _text(item.get("content", item.get("value")), where)
    calls = [*_list(item.get("tool_calls"), f"{where}, tool_calls")]
    if item.get("function_call"):
        calls.append(item["function_call"])
    if given.lower() in _CALL_ROLES:
        calls, content = [*_list(content, where, one=True), *calls], ""
    reasoning = next((item[key] for key in REASONING_KEYS if item.get(key)), None)
    if reasoning is not None and not isinstance(reasoning, str):
        raise RecordError(f"{where}: the reasoning is not a text but {_kind(reasoning)}")
    if role == "assistant" and content.lstrip().startswith(_THINK):
        if reasoning is not None:
            raise RecordError(f"{where} has a reasoning and a {_THINK} block in its content")
        reasoning, content = _split_think(content, where)
    return Message(
        role=role,
        content=content,
        reasoning=reasoning.strip("\n") or None if reasoning else None,
        tool_calls=tuple(_call(call, where, nulls_are_absent) for call in calls),
        more={
            key: value
            for key in ("name", "tool_call_id")
            if isinstance(value := item.get(key), str) and value
        },
    )


def _text(value: Any, where: str) -> str:
    """Return a content: a text, none, or the texts of a list of parts."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RecordError(f"{where}: the content is not a text but {_kind(value)}")
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise RecordError(f"{where}: a part of its content is no text but {shown(kind)}")
        texts.append(text)
    return "".join(texts)


def _split_think(content: str, where: str) -> tuple[str, str]:
    """Return the thoughts in front of an answer, and the answer."""
    inside, end, answer = content.lstrip().removeprefix(_THINK).partition(_END_THINK)
    if not end:
        raise RecordError(f"{where} has {_THINK} without {_END_THINK}")
    return inside, answer.lstrip("\n")


def _with_reasoning(messages: list[Message], given: Any) -> list[Message]:
    """Give the row's own reasoning to the assistant's turns.

    A text belongs to the last one, a list has an entry for each.
    """
    if given is None or given == "" or given == []:
        return messages
    turns = [number for number, message in enumerate(messages) if message.role == "assistant"]
    entries = given if isinstance(given, list) else [None] * (len(turns) - 1) + [given]
    if not turns or len(entries) != len(turns):
        raise RecordError(
            f"'reasoning' has {len(entries)} entries for {len(turns)} turns of the assistant"
        )
    result = list(messages)
    for number, entry in zip(turns, entries, strict=True):
        if not entry:
            continue
        if not isinstance(entry, str):
            raise RecordError(f"'reasoning' is not a text but {_kind(entry)}")
        if result[number].reasoning is not None:
            raise RecordError(f"message {number + 1} has a reasoning, and so has the row")
        result[number] = dataclasses.replace(result[number], reasoning=entry)
    return result


def _call(value: Any, where: str, nulls_are_absent: bool) -> dict[str, Any]:
    """Return a tool call with its arguments as an object."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RecordError(f"{where}: a tool call has no name of its function")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments or "{}")
        except JsonError as error:
            raise RecordError(f"{where}: the arguments of a tool call: {error}") from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise RecordError(f"{where}: the arguments of a tool call are {_kind(arguments)}")
    call = {
        "type": "function",
        "function": {
            "name": function["name"],
            "arguments": _without_nulls(arguments) if nulls_are_absent else dict(arguments),
        },
    }
    identifier = value.get("id")
    return {"id": identifier, **call} if isinstance(identifier, str) and identifier else call


def _tool(value: Any, nulls_are_absent: bool) -> dict[str, Any]:
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RecordError("an entry of 'tools' has no name of its function")
    return {
        "type": "function",
        "function": _without_nulls(function) if nulls_are_absent else dict(function),
    }


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _list(value: Any, name: str, *, one: bool = False) -> list[Any]:
    """Return a list that may be written as JSON; with ``one``, also a single object as a list."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except JsonError as error:
            raise RecordError(f"{name}: {error}") from None
    if one and isinstance(value, Mapping):
        return [value]
    if not isinstance(value, list):
        raise RecordError(f"{name}: it is no list but {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a truth value"
    names = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _check(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a conversation that cannot be trained on."""
    if not any(message.role == "assistant" for message in messages):
        raise RecordError("no turn is the assistant's")
    if messages[-1].role != "assistant":
        raise RecordError(f"the last turn is not the assistant's but the {messages[-1].role}'s")
    _check_turns(messages, tools)


def _check_turns(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
    names = [tool["function"]["name"] for tool in tools]
    before: Message | None = None
    for number, message in enumerate(messages, 1):
        for reason in _faults(message, before, names):
            raise RecordError(f"message {number} ({message.role}) {reason}")
        before = message


def _faults(message: Message, before: Message | None, tools: Sequence[str]) -> Iterator[str]:
    assistant = message.role == "assistant"
    if not assistant and message.reasoning is not None:
        yield "has a reasoning, which only the assistant has"
    if not assistant and message.tool_calls:
        yield "calls a tool, which only the assistant does"
    if assistant and not message.content.strip() and not message.tool_calls:
        yield "has neither content nor a tool call"
    for call in message.tool_calls:
        name = call["function"]["name"]
        if not tools:
            yield f"calls the tool {name!r}, and the row has no 'tools'"
        elif name not in tools:
            yield f"calls the tool {name!r}; 'tools' has {', '.join(map(repr, tools))}"
    if message.role == "tool" and not (
        before is not None and (before.role == "tool" or before.tool_calls)
    ):
        yield "is a result without a call before it"
