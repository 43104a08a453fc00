"""Texts and masks of conversations against strings written by hand; ⟦ ⟧ enclose what is learnt."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.chat.records import RecordError, parse_record
from mellum2_megatron.data.chat.samples import Sample, SampleMaker, chat_tokenizer
from mellum2_megatron.data.chat.template import (
    ChatTemplate,
    Mode,
    check_template,
    choose_template,
    our_template,
)
from tests.data.chats import WEATHER, call, turn, write_tokenizer

# ChatML without marks, as most people's templates: the mask comes from growing prefixes.
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The mark encloses the answer alone: the token that ends the turn stands behind it.
ANSWER_MARKED = PLAIN.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}",
)
# Takes the thoughts of earlier turns back when another question follows.
REWRITING = PLAIN.replace("{% if m.reasoning_content", "{% if loop.last and m.reasoning_content")
# Writes an empty thought into the last turn only, in every mode.
REWRITING_ANSWERS = PLAIN.replace(
    "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}-{% endif %}{{ m.content }}"
)
TOOLS = (
    "<|im_start|>system\n{leading}You may call these functions, one JSON object a line:\n<tools>\n"
    '{{"type": "function", "function": {{"name": "weather", "parameters": '
    '{{"type": "object", "properties": {{}}}}}}}}\n'
    '</tools>\nA call is <tool_call>{{"name": NAME, "arguments": OBJECT}}</tool_call>.<|im_end|>\n'
)
QUESTION = turn("user", "Why?")
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Ulm", "days": 2}}</tool_call>'

CASES: dict[str, tuple[list[dict[str, Any]], bool, str]] = {
    "one-turn": (
        [QUESTION, turn("assistant", "So.")],
        False,
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n⟦So.<|im_end|>⟧",
    ),
    "system-and-two-turns": (
        [
            turn("system", "Be brief."),
            QUESTION,
            turn("assistant", "So."),
            turn("user", "And?"),
            turn("assistant", "No."),
        ],
        False,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n⟦So.<|im_end|>⟧\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n⟦No.<|im_end|>⟧",
    ),
    "several-systems": (
        [
            turn("system", "One."),
            turn("developer", "Two."),
            QUESTION,
            turn("system", "Three."),
            turn("assistant", "So."),
        ],
        False,
        "<|im_start|>system\nOne.<|im_end|>\n<|im_start|>system\nTwo.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>system\nThree.<|im_end|>\n"
        "<|im_start|>assistant\n⟦So.<|im_end|>⟧",
    ),
    "consecutive-turns": (
        [QUESTION, turn("user", "Well?"), turn("assistant", "So."), turn("assistant", "Yes.")],
        False,
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>user\nWell?<|im_end|>\n"
        "<|im_start|>assistant\n⟦So.<|im_end|>⟧\n<|im_start|>assistant\n⟦Yes.<|im_end|>⟧",
    ),
    "assistant-first": (
        [turn("assistant", "Hello."), QUESTION, turn("assistant", "So.")],
        False,
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n⟦So.<|im_end|>⟧",
    ),
    "empty-content": (
        [turn("system", ""), turn("user", None), turn("assistant", "So.")],
        False,
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
        "<|im_start|>assistant\n⟦So.<|im_end|>⟧",
    ),
    "blanks-around-the-answer": (
        [turn("user", "\n\n  Why?\n"), turn("assistant", "\n  So. \n\n")],
        False,
        "<|im_start|>user\n\n\n  Why?\n<|im_end|>\n<|im_start|>assistant\n⟦\n  So. \n\n<|im_end|>⟧",
    ),
    "characters-of-many-bytes": (
        [turn("user", "é 数?"), turn("assistant", "数 \U0001f600é")],
        False,
        "<|im_start|>user\né 数?<|im_end|>\n<|im_start|>assistant\n⟦数 \U0001f600é<|im_end|>⟧",
    ),
    "reasoning-dropped": (
        [
            QUESTION,
            turn("assistant", "So.", reasoning_content="Hm."),
            turn("user", "And?"),
            turn("assistant", "<think>\nOh.\n</think>\n\nNo."),
        ],
        False,
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n⟦So.<|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦No.<|im_end|>⟧",
    ),
    "tools": (
        [
            turn("system", "Be brief."),
            turn("user", "Ulm?"),
            turn("assistant", None, tool_calls=[call("Ulm")]),
            turn("tool", "sunny"),
            turn("assistant", "Sunny."),
        ],
        True,
        TOOLS.format(leading="Be brief.\n\n") + "<|im_start|>user\nUlm?<|im_end|>\n"
        f"<|im_start|>assistant\n⟦{CALL}<|im_end|>⟧\n<|im_start|>tool\nsunny<|im_end|>\n"
        "<|im_start|>assistant\n⟦Sunny.<|im_end|>⟧",
    ),
    "content-and-two-calls": (
        [
            turn("user", "Ulm?"),
            turn("assistant", "I look.", tool_calls=[call("Ulm"), call("Ulm")]),
            turn("tool", "sunny"),
            turn("tool", ""),
            turn("assistant", "Sunny."),
        ],
        True,
        TOOLS.format(leading="") + "<|im_start|>user\nUlm?<|im_end|>\n"
        f"<|im_start|>assistant\n⟦I look.\n{CALL}\n{CALL}<|im_end|>⟧\n"
        "<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>tool\n<|im_end|>\n"
        "<|im_start|>assistant\n⟦Sunny.<|im_end|>⟧",
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def template_of(text: str) -> ChatTemplate:
    return ChatTemplate(text=text, origin="test", tokens={})


def samples(
    tokenizer: Path,
    messages: list[dict[str, Any]],
    *,
    mode: Mode = "instruct",
    template: str | None = None,
    tools: bool = False,
) -> list[Sample]:
    maker = SampleMaker(tokenizer, template_of(template or our_template()), mode)
    row = {"messages": messages, **({"tools": [WEATHER]} if tools else {})}
    return maker.samples(parse_record(row))


def shown(tokenizer: Path, sample: Sample) -> str:
    """Decode a sample, each run of learnt tokens in brackets."""
    loaded, text = chat_tokenizer(tokenizer), ""
    for learnt, group in itertools.groupby(range(sample.tokens.size), sample.learnt.__getitem__):
        part = loaded.decode(sample.tokens[list(group)].tolist(), skip_special_tokens=False)
        text += f"⟦{part}⟧" if learnt else part
    return text


@pytest.mark.parametrize("name", CASES)
def test_instruct_learns_every_answer(name: str, tokenizer: Path) -> None:
    messages, tools, expected = CASES[name]
    (sample,) = samples(tokenizer, messages, tools=tools)
    assert shown(tokenizer, sample) == expected


@pytest.mark.parametrize("template", [PLAIN, ANSWER_MARKED], ids=["prefixes", "answer-marked"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case[1]])
def test_other_chatml_templates_give_the_same_masks(
    name: str, template: str, tokenizer: Path
) -> None:
    (sample,) = samples(tokenizer, CASES[name][0], template=template)
    assert shown(tokenizer, sample) == CASES[name][2]


@pytest.mark.parametrize("name", CASES)
def test_transformers_gives_the_same_tokens_and_mask(name: str, tokenizer: Path) -> None:
    """But where its tokens would cross the beginning of an answer, and after the last answer."""
    from transformers import AutoTokenizer

    messages, tools, _ = CASES[name]
    if name == "blanks-around-the-answer":
        return
    (sample,) = samples(tokenizer, messages, tools=tools)
    plain = parse_record({"messages": messages, "tools": [WEATHER] if tools else None})
    theirs = AutoTokenizer.from_pretrained(tokenizer).apply_chat_template(
        [{**message.plain(), "reasoning_content": None} for message in plain.messages],
        tools=list(plain.tools) or None,
        chat_template=our_template(),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    length = sample.tokens.size
    assert theirs["input_ids"][:length] == sample.tokens.tolist()
    assert theirs["assistant_masks"][:length] == sample.learnt.astype(int).tolist()
    assert not any(theirs["assistant_masks"][length:])


def test_tokens_before_an_answer_are_those_of_the_prompt(tokenizer: Path) -> None:
    """An answer that begins with blanks does not change the prompt's last token."""
    from transformers import AutoTokenizer

    messages = CASES["blanks-around-the-answer"][0]
    (sample,) = samples(tokenizer, messages)
    prompt = AutoTokenizer.from_pretrained(tokenizer).apply_chat_template(
        messages[:1], chat_template=our_template(), add_generation_prompt=True, return_dict=False
    )
    assert sample.tokens[~sample.learnt].tolist() == prompt


THINKING = [
    turn("user", "A?"),
    turn("assistant", "a", reasoning="1"),
    turn("user", "B?"),
    turn("assistant", "b"),
    turn("user", "C?"),
    turn("assistant", None, reasoning="3", tool_calls=[call("Ulm")]),
    turn("tool", "sunny"),
    turn("assistant", "c", reasoning="4"),
    turn("user", "D?"),
    turn("assistant", "d"),
]
_A = "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\n"
_C = (
    _A + "a<|im_end|>\n<|im_start|>user\nB?<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    "<|im_start|>user\nC?<|im_end|>\n<|im_start|>assistant\n"
)
_THOUGHT_OF_CALL = f"<think>\n3\n</think>\n\n{CALL}<|im_end|>"


def test_thinking_learns_one_turn_a_sample(tokenizer: Path) -> None:
    """A sample for each turn with a reasoning, and the history that it has in use.

    Thoughts before the last question are gone; those since then, over a tool's result, are there.
    """
    unfolded = samples(tokenizer, THINKING, mode="thinking", tools=True)
    tools = TOOLS.format(leading="")
    assert [shown(tokenizer, sample) for sample in unfolded] == [
        f"{tools}{_A}⟦<think>\n1\n</think>\n\na<|im_end|>⟧",
        f"{tools}{_C}⟦{_THOUGHT_OF_CALL}⟧",
        f"{tools}{_C}{_THOUGHT_OF_CALL}\n<|im_start|>tool\nsunny<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n4\n</think>\n\nc<|im_end|>⟧",
    ]


@pytest.mark.parametrize("template", [our_template(), REWRITING], ids=["ours", "rewriting"])
def test_thinking_unfolds_the_last_five(template: str, tokenizer: Path) -> None:
    """Also with a template that takes thoughts back: each sample is a conversation of its own."""
    messages = [
        message
        for number in range(7)
        for message in (turn("user", "?"), turn("assistant", f"{number}", reasoning=f"t{number}"))
    ]
    unfolded = samples(tokenizer, messages, mode="thinking", template=template)
    learnt = [shown(tokenizer, sample).partition("⟦")[2] for sample in unfolded]
    assert learnt == [f"<think>\nt{n}\n</think>\n\n{n}<|im_end|>⟧" for n in range(2, 7)]
    assert all(shown(tokenizer, sample).count("<think>") == 1 for sample in unfolded)


def test_thinking_leaves_out_conversations_without_reasoning(tokenizer: Path) -> None:
    assert samples(tokenizer, CASES["one-turn"][0], mode="thinking") == []


FAULTS: dict[str, tuple[str, Mode, list[dict[str, Any]], bool, str]] = {
    "rewrites-history": (
        REWRITING_ANSWERS,
        "instruct",
        CASES["system-and-two-turns"][0],
        False,
        r"writes the turns up to message 3 differently once others follow.*--chat-template",
    ),
    "no-end-of-turn": (
        PLAIN.replace("<|im_end|>", ""),
        "instruct",
        CASES["one-turn"][0],
        False,
        "ends a turn of the assistant without a special token",
    ),
    "no-mark-around-it": (
        ANSWER_MARKED.replace("m.role == 'assistant'", "m.role == 'tool'"),
        "instruct",
        CASES["one-turn"][0],
        False,
        "marks 0 of 1 turns",
    ),
    "everything-marked": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ messages[0].content + m.content }}<|im_end|>{% endgeneration %}{% endif %}{% endfor %}",
        "instruct",
        [turn("assistant", "So.")],
        False,
        "every token is learnt",
    ),
    "one-mark-around-all": (
        "{% generation %}" + PLAIN + "{% endgeneration %}",
        "instruct",
        CASES["one-turn"][0],
        False,
        r"marks message 1 \(user\) as part of an answer",
    ),
    "drops-the-system": (
        PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
        "instruct",
        CASES["system-and-two-turns"][0],
        False,
        r"drops a part of message 1 \(system\): 'Be brief.'",
    ),
    "drops-the-tools": (PLAIN, "instruct", CASES["tools"][0], True, "drops .*'weather'"),
    "refuses-a-system": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + PLAIN,
        "instruct",
        CASES["system-and-two-turns"][0],
        False,
        "the chat template fails: no system",
    ),
    "drops-the-reasoning": (
        PLAIN.replace("reasoning_content", "thoughts"),
        "thinking",
        THINKING[:2],
        False,
        r"drops a part of message 2 \(assistant\): '1'",
    ),
    "forged-turn": (
        PLAIN,
        "instruct",
        [turn("user", "x<|im_end|>y"), turn("assistant", "So.")],
        False,
        r"message 1 \(user\) spells the special token '<\|im_end\|>'",
    ),
    "forged-in-a-call": (
        our_template(),
        "instruct",
        [turn("user", "?"), turn("assistant", "", tool_calls=[call("<|im_start|>")])],
        True,
        r"message 2 \(assistant\) spells the special token",
    ),
    "half-a-character": (
        PLAIN,
        "instruct",
        [turn("user", "\ud83d"), turn("assistant", "So.")],
        False,
        r"message 1 \(user\) has the lone surrogate \\ud83d",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_template_that_does_not_fit_is_refused(name: str, tokenizer: Path) -> None:
    template, mode, messages, tools, expected = FAULTS[name]
    with pytest.raises(RecordError, match=expected):
        samples(tokenizer, messages, mode=mode, template=template, tools=tools)


CHECKED = {
    "broken": ("{% for %}", "instruct", "it must render"),
    "no-such-tokens": (PLAIN.replace("im_end", "eot"), "instruct", r"<\|eot\|>: the tokenizer"),
    "no-reasoning": (PLAIN.replace("reasoning_content", "x"), "thinking", "reads? `reasoning_"),
    "other-prompt": (
        PLAIN.replace("<|im_start|>assistant\n{% endif", "<|im_start|>model\n{% endif"),
        "instruct",
        "training and generation see the same prompt",
    ),
}


@pytest.mark.parametrize("name", CHECKED)
def test_a_template_is_tried_before_anything_is_read(name: str, tokenizer: Path) -> None:
    text, mode, expected = CHECKED[name]
    added = chat_tokenizer(tokenizer).get_added_tokens_decoder().values()
    known = frozenset(token.content for token in added)
    with pytest.raises(InputError, match=expected):
        check_template(template_of(text), mode, known)  # type: ignore[arg-type]


def test_the_tokenizers_own_template_comes_before_ours(tokenizer: Path, tmp_path: Path) -> None:
    assert choose_template(tokenizer, None).text == our_template()
    own = tmp_path / "own"
    write_tokenizer(own)
    (own / "chat_template.jinja").write_text(PLAIN)
    assert choose_template(own, None).text == PLAIN
    assert choose_template(own, "mellum").text == our_template()
    with pytest.raises(InputError, match="name a Jinja file"):
        choose_template(own, str(tmp_path / "none.jinja"))
