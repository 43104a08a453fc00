"""Small chat data for tests: a tokenizer with all reserved tokens, and files of conversations."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from mellum2_megatron.data.tokens.tokenizer import train_tokenizer
from tests.small import python_like

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


def write_tokenizer(folder: Path, *, vocab_size: int = 320) -> Path:
    train_tokenizer(map(python_like, range(20)), folder, vocab_size=vocab_size)
    return folder


def turn(role: str, content: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(city: str) -> dict[str, Any]:
    """Return a tool call as OpenAI writes it, arguments as a text."""
    arguments = json.dumps({"city": city, "days": 2})
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


def random_rows(seed: int, count: int, *, longest: int = 30) -> list[dict[str, Any]]:
    """Return conversations of one to three questions; about half of the answers have reasoning."""
    rng = random.Random(seed)

    def words() -> str:
        return " ".join(f"w{rng.randrange(100)}" for _ in range(1 + rng.randrange(longest)))

    rows = []
    for _ in range(count):
        messages = [turn("system", words())] if rng.random() < 0.5 else []
        for _ in range(1 + rng.randrange(3)):
            messages.append(turn("user", words()))
            thought = {"reasoning": words()} if rng.random() < 0.5 else {}
            messages.append(turn("assistant", words(), **thought))
        rows.append({"messages": messages})
    return rows


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
