"""Conversations of every layout, and a reason for each that cannot be trained on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mellum2_megatron.data.chat.records import Conversation, Message, RecordError, parse_record
from tests.data.chats import WEATHER, call, turn

USER, ANSWER = turn("user", "Ulm?"), turn("assistant", "Sunny.")
CALLED = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
SIMPLE = Conversation(
    messages=(Message(role="user", content="Ulm?"), Message(role="assistant", content="Sunny."))
)
WITH_SYSTEM = Conversation(messages=(Message(role="system", content="Be brief."), *SIMPLE.messages))
WITH_CALL = Conversation(
    messages=(
        SIMPLE.messages[0],
        Message(role="assistant", content="", tool_calls=(CALLED,)),
        Message(role="tool", content="sunny"),
        SIMPLE.messages[1],
    ),
    tools=(WEATHER,),
)
THOUGHTFUL = Conversation(
    messages=(
        SIMPLE.messages[0],
        Message(role="assistant", content="Sunny.", reasoning="Hm."),
    )
)
OPENAI_CALL = [
    USER,
    turn("assistant", tool_calls=[{"type": "function", "function": CALLED["function"]}]),
    turn("tool", "sunny"),
    ANSWER,
]
SHAREGPT_CALL = [
    {"from": "human", "value": "Ulm?"},
    {"from": "function_call", "value": json.dumps(CALLED["function"])},
    {"from": "observation", "value": "sunny"},
    {"from": "gpt", "value": "Sunny."},
]

LAYOUTS: dict[str, tuple[dict[str, Any], Conversation]] = {
    "openai": ({"messages": [USER, ANSWER], "id": 7}, SIMPLE),
    "list-as-json": ({"messages": json.dumps([USER, ANSWER])}, SIMPLE),
    "parts": (
        {"messages": [turn("user", [{"type": "text", "text": "Ulm"}, "?"]), ANSWER]},  # type: ignore[arg-type]
        SIMPLE,
    ),
    "conversation": ({"conversation": [USER, ANSWER]}, SIMPLE),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Ulm?"}, {"from": "gpt", "value": "Sunny."}]},
        SIMPLE,
    ),
    "prompt-and-completion": ({"prompt": [USER], "completion": [ANSWER]}, SIMPLE),
    "ultrachat": ({"prompt": "Ulm?", "messages": [USER, ANSWER]}, SIMPLE),
    "system-of-the-row": ({"system": "Be brief.", "messages": [USER, ANSWER]}, WITH_SYSTEM),
    "developer": ({"messages": [turn("developer", "Be brief."), USER, ANSWER]}, WITH_SYSTEM),
    "openai-tools": ({"messages": OPENAI_CALL, "tools": [WEATHER]}, WITH_CALL),
    "bare-tools": ({"messages": OPENAI_CALL, "tools": [WEATHER["function"]]}, WITH_CALL),
    "tools-as-json": ({"messages": OPENAI_CALL, "tools": json.dumps([WEATHER])}, WITH_CALL),
    "sharegpt-tools": (
        {"conversations": SHAREGPT_CALL, "tools": json.dumps([WEATHER["function"]])},
        WITH_CALL,
    ),
    "old-openai": (
        {
            "messages": [
                USER,
                turn("assistant", function_call={"name": "weather", "arguments": '{"city":"Ulm"}'}),
                turn("function", "sunny"),
                ANSWER,
            ],
            "functions": [WEATHER["function"]],
        },
        WITH_CALL,
    ),
    "reasoning-content": (
        {"messages": [USER, {**ANSWER, "reasoning_content": "Hm."}]},
        THOUGHTFUL,
    ),
    "thinking": ({"messages": [USER, {**ANSWER, "thinking": "\nHm.\n"}]}, THOUGHTFUL),
    "think-block": (
        {"messages": [USER, turn("assistant", "<think>\nHm.\n</think>\n\nSunny.")]},
        THOUGHTFUL,
    ),
    "reasoning-of-the-row": ({"messages": [USER, ANSWER], "reasoning": "Hm."}, THOUGHTFUL),
    "reasoning-of-each-turn": ({"messages": [USER, ANSWER], "reasoning": ["Hm."]}, THOUGHTFUL),
    "empty-think-block": (
        {"messages": [USER, turn("assistant", "<think>\n\n</think>\n\nSunny.")]},
        SIMPLE,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_give_the_same_conversation(name: str) -> None:
    row, expected = LAYOUTS[name]
    assert parse_record(row) == expected


def test_numbers_of_arguments_stay_whole() -> None:
    row = {"messages": [USER, turn("assistant", tool_calls=[call("Ulm")])], "tools": [WEATHER]}
    arguments = parse_record(row).messages[1].tool_calls[0]["function"]["arguments"]
    assert json.dumps(arguments) == '{"city": "Ulm", "days": 2}'


def test_keys_that_parquet_adds_are_dropped() -> None:
    filled = {"name": "weather", "arguments": {"city": "Ulm", "days": None}}
    row = {
        "messages": [USER, turn("assistant", tool_calls=[{"function": filled, "id": None}])],
        "tools": [{"function": {"name": "weather", "strict": None}}],
    }
    parsed = parse_record(row, nulls_are_absent=True)
    assert parsed.messages[1].tool_calls == (CALLED,)
    assert parsed.tools == ({"type": "function", "function": {"name": "weather"}},)
    kept = parse_record(row).messages[1].tool_calls[0]["function"]["arguments"]
    assert kept == {"city": "Ulm", "days": None}


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no-messages": ({"text": "x"}, "no key 'messages'.*its keys are 'text'"),
    "empty": ({"messages": []}, "there are no messages"),
    "not-a-list": ({"messages": {"role": "user"}}, "messages: it is no list but an object"),
    "no-json": ({"messages": "Ulm?"}, "messages: no valid JSON"),
    "not-an-object": ({"messages": ["Ulm?"]}, "message 1 is no object but a text"),
    "unknown-role": (
        {"messages": [USER, turn("narrator", "x"), ANSWER]},
        "message 2 has the role 'narrator'; known are assistant",
    ),
    "no-role": ({"messages": [{"content": "x"}]}, "message 1 has the role null"),
    "no-assistant": ({"messages": [USER]}, "no turn is the assistant's"),
    "user-last": ({"messages": [USER, ANSWER, USER]}, "last turn is not .* but the user's"),
    "tool-last": (
        {"messages": OPENAI_CALL[:3], "tools": [WEATHER]},
        "last turn is not the assistant's but the tool's",
    ),
    "call-without-tools": (
        {"messages": OPENAI_CALL},
        r"message 2 \(assistant\) calls the tool 'weather', and the row has no 'tools'",
    ),
    "call-of-another-tool": (
        {"messages": OPENAI_CALL, "tools": [{"name": "clock"}]},
        "calls the tool 'weather'; 'tools' has 'clock'",
    ),
    "call-by-the-user": (
        {"messages": [turn("user", "?", tool_calls=[call("Ulm")]), ANSWER], "tools": [WEATHER]},
        r"message 1 \(user\) calls a tool, which only the assistant does",
    ),
    "arguments-no-json": (
        {
            "messages": [
                USER,
                turn("assistant", function_call={"name": "weather", "arguments": "{"}),
            ],
            "tools": [WEATHER],
        },
        "message 2: the arguments of a tool call: no valid JSON",
    ),
    "tool-without-name": (
        {"messages": [USER, ANSWER], "tools": [{"type": "function"}]},
        "an entry of 'tools' has no name",
    ),
    "result-without-call": (
        {"messages": [USER, turn("tool", "sunny"), ANSWER]},
        r"message 2 \(tool\) is a result without a call before it",
    ),
    "reasoning-of-the-user": (
        {"messages": [turn("user", "?", reasoning="Hm."), ANSWER]},
        r"message 1 \(user\) has a reasoning, which only the assistant has",
    ),
    "reasoning-twice": (
        {"messages": [USER, turn("assistant", "<think>a</think>b", reasoning="c")]},
        "message 2 has a reasoning and a <think> block",
    ),
    "reasoning-in-row-and-turn": (
        {"messages": [USER, {**ANSWER, "reasoning": "a"}], "reasoning": "b"},
        "message 2 has a reasoning, and so has the row",
    ),
    "reasoning-of-no-turn": (
        {"messages": [USER, ANSWER], "reasoning": ["a", "b"]},
        "'reasoning' has 2 entries for 1 turns",
    ),
    "open-think-block": (
        {"messages": [USER, turn("assistant", "<think>a")]},
        "message 2 has <think> without </think>",
    ),
    "empty-answer": (
        {"messages": [USER, turn("assistant", " \n")]},
        r"message 2 \(assistant\) has neither content nor a tool call",
    ),
    "picture": (
        {"messages": [turn("user", [{"type": "image_url"}]), ANSWER]},  # type: ignore[arg-type]
        "message 1: a part of its content is no text but 'image_url'",
    ),
    "number": (
        {"messages": [turn("user", 7), ANSWER]},  # type: ignore[arg-type]
        "message 1: the content is not a text but a number",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_conversation_that_cannot_be_trained_on_is_refused(name: str) -> None:
    row, reason = FAULTS[name]
    with pytest.raises(RecordError, match=reason):
        parse_record(row)
