"""Chat templates: the one that belongs to a tokenizer, its check, and rendering with the spans.

Templates are programs (Jinja) and not trusted. transformers renders them in an
`ImmutableSandboxedEnvironment` (utils/chat_template_utils.py, 5.23), which does not end an endless
loop, so a template is first tried in a process with limits (`render_limited`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mellum2_megatron.common.errors import InputError, first_line, shown
from mellum2_megatron.common.files import read_text
from mellum2_megatron.common.json_files import load_json
from mellum2_megatron.common.limited_process import LimitError, run_limited

CHAT_TEMPLATE_FILE = "chat_template.jinja"
OURS = "mellum"
"""Name of our own template, for the command line."""

Mode = Literal["instruct", "thinking"]

_OUR_FILE = Path(__file__).with_name("mellum.jinja")
_SCRIPT = Path(__file__).with_name("render_script.py")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKERS = re.compile(r"<\|[^|<>\s]+\|>|</?think>")
_QUESTION, _ANSWER, _THOUGHT = "What is 6 times 7?", "It is forty-two.", "Six sevens add up."


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """A chat template.

    Attributes:
        text: the Jinja source.
        origin: its origin, for the user.
        tokens: special tokens that the template may name, such as ``bos_token``.
    """

    text: str
    origin: str
    tokens: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """SHA-256 of the text, hexadecimal."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()

    @property
    def marks_turns(self) -> bool:
        """True if the template encloses the assistant's turns in generation blocks."""
        return _GENERATION.search(self.text) is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and begin and end of each generation block (none without marks).

        Raises:
            ValueError: the template fails on this conversation.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                tools=list(tools) or None,
                chat_template=self.text,
                return_assistant_tokens_mask=self.marks_turns,
                add_generation_prompt=add_generation_prompt,
                **self.tokens,
            )
        # Jinja raises many types, and a template raises its own with raise_exception.
        except Exception as error:
            raise ValueError(first_line(error)) from error
        return texts[0], [tuple(span) for span in spans[0]] if self.marks_turns else []


def our_template() -> str:
    """Return the text of our own template."""
    return _OUR_FILE.read_text(encoding="utf-8").removesuffix("\n")


def read_template(folder: Path) -> str | None:
    """Return a folder's chat template; None if it has none.

    Raises:
        InputError: the file is unreadable or not UTF-8.
    """
    # In transformers' order: the file before the key in tokenizer_config.json.
    path = folder / CHAT_TEMPLATE_FILE
    if path.is_file():
        return read_text(path, str(path), fix="copy it again")
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return None
    try:
        template = load_json(config).get("chat_template")
    except (OSError, ValueError) as error:
        raise InputError(
            str(config),
            rule=f"it must be a JSON object ({first_line(error)})",
            fix="fetch or write the file again",
        ) from error
    if isinstance(template, list):  # several named templates, as older transformers wrote them
        rows = [row for row in template if isinstance(row, dict) and row.get("name") == "default"]
        template = rows[0].get("template") if rows else None
    return template if isinstance(template, str) else None


def choose_template(tokenizer: Path, given: str | None) -> ChatTemplate:
    """Return the template to train with.

    Args:
        tokenizer: Hugging Face tokenizer folder.
        given: Jinja file, or ``mellum`` for ours; default None: the tokenizer's own, else ours.
    """
    text, origin = None, ""
    if given is not None and given != OURS:
        text = read_text(Path(given), f"--chat-template {given}", fix="name a Jinja file")
        origin = given
    elif given is None:
        text, origin = read_template(tokenizer), f"that of {tokenizer}"
    if text is None:
        text, origin = our_template(), "ours (mellum)"
    return ChatTemplate(text=text, origin=origin, tokens=special_tokens_map(tokenizer))


def special_tokens_map(folder: Path) -> dict[str, Any]:
    """Return the special tokens of a tokenizer folder by role, as transformers names them."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises nearly anything on damaged files
        raise InputError(
            f"tokenizer {folder}",
            rule=f"transformers must be able to read it ({first_line(error)})",
            fix="give the tokenizer's complete folder",
        ) from error
    return dict(tokenizer.special_tokens_map)


def render_limited(
    template: str, tokens: Mapping[str, Any], requests: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """Render conversations with limits of time and memory; a second time they are remembered.

    Args:
        template: Jinja source.
        tokens: special tokens by role.
        requests: ``messages``, ``tools`` and ``add_generation_prompt`` of each conversation.

    Returns:
        For each conversation ``text`` or ``error``; a single error if a limit was passed.
    """
    job = {"template": template, "tokens": dict(tokens), "requests": [dict(r) for r in requests]}
    try:
        return list(json.loads(_render_once(json.dumps(job))))
    except LimitError as error:
        return [{"error": str(error)}]


@functools.lru_cache(maxsize=32)
def _render_once(job: str) -> str:
    """Return the answers to a job of `render_script`, both as JSON.

    A template sees nothing but its job and the date, so it answers alike; a passed limit is not
    remembered. A release asks for the same texts several times, each a second of imports.
    """
    # Without torch transformers loads in a second; templates do not need it.
    answers = run_limited(_SCRIPT, json.loads(job), environment={"USE_TORCH": "0"})["answers"]
    return json.dumps(answers)


def check_template(template: ChatTemplate, mode: Mode, known: frozenset[str]) -> None:
    """Refuse a template that cannot be trained with, before any conversation is read.

    Args:
        template: the template.
        mode: kind of training.
        known: added tokens of the tokenizer.

    Raises:
        InputError: it fails or never ends, has markers that are no tokens, opens no assistant's
            turn as it is opened for generation, or in thinking mode drops the reasoning.
    """
    user = {"role": "user", "content": _QUESTION}
    answer = {"role": "assistant", "content": _ANSWER}
    if mode == "thinking":
        answer["reasoning_content"] = _THOUGHT
    requests = [
        {"messages": messages, "tools": None, "add_generation_prompt": prompt}
        for messages, prompt in (([user], True), ([user, answer], False))
    ]
    label = f"chat template ({template.origin})"
    answers = render_limited(template.text, template.tokens, requests)
    for result in answers:
        if "error" in result:
            raise InputError(
                f"{label}: {result['error']}", rule="it must render", fix="repair the template"
            )
    prompt, text = (result["text"] for result in answers)
    unknown = sorted(set(_MARKERS.findall(text)) - known)
    if unknown:
        raise InputError(
            f"{label}: {', '.join(unknown)}",
            rule="the tokenizer has no such tokens, so a turn would not end with one token",
            fix="use the template that belongs to this tokenizer (--chat-template FILE), "
            "or add the tokens to the tokenizer",
        )
    if mode == "thinking" and _THOUGHT not in text:
        raise InputError(
            f"{label}: the reasoning is not in the text",
            rule="thinking mode trains on it, so the template must read `reasoning_content`",
            fix=f"use --chat-template {OURS} or another template that does",
        )
    if not text.startswith(prompt):
        raise InputError(
            f"{label}: an answer follows other text than the prompt {shown(prompt[-60:])}",
            rule="training and generation see the same prompt",
            fix="repair add_generation_prompt in the template",
        )
