"""Texts that tell two tokenizers apart: blanks, digits, marks and bytes of every kind."""

from __future__ import annotations

import random
from collections.abc import Iterable

_WORDS = (
    "def return self import the of and __init__ camelCase snake_case HTTPServer naïve straße "
    "Ελλάδα Привет 你好世界 日本語テキスト 한국어 עברית العربية हिन्दी ไทย ﬁle Ⅷ ǅ \u02bbokina"
).split()
_BLANKS = (
    " ",
    "  ",
    "    ",
    "\t",
    "\n",
    "\r\n",
    "\r",
    "\n\n",
    "\v",
    "\f",
    "\x1c",
    "\x1f",
    "\x85",
    "\xa0",
    "\u1680",
    "\u180e",
    "\u2003",
    "\u200b",
    "\u2028",
    "\u202f",
    "\u3000",
    "\ufeff",
)
_DIGITS = (
    "0",
    "7",
    "42",
    "1234567",
    "\u0663",
    "\u00b2",
    "\u00bd",
    "\u2167",
    "\u3007",
    "\U0001d7d9",
)
_MARKS = (
    "'s 'S \u2019s 't 're 've 'm 'll 'd 'LL '' \" . , ; ... == != -> => :: // /* */ # ## ``` ( ) [ "
    "] { } < > </ <| |> @ $ % ^ & * ~ \\ \\n _ - -- — … € ™ \u0301 \u200d \u20e3 \x00 \x07 \x7f "
    "\ufffd \ue000 \U0003ffff 😀 👩\u200d🚀 🇩🇪"
).split(" ")
_LONG = (" " * 1500, "=" * 3000, "a" * 3000, "9" * 500, "\n" * 700, "\t \t" * 300, "ab" * 2000)


def probe_texts(spellings: Iterable[str] = (), *, count: int = 2000) -> list[str]:
    """Return the same texts at every call.

    Args:
        spellings: further texts, such as those of added tokens, mixed into the others.
        count: number of texts made of random pieces; default 2,000.

    Returns:
        The random texts, ``spellings``, and a few long runs.
    """
    rng = random.Random(0)
    further = list(spellings)
    pieces = (_WORDS, _BLANKS, _DIGITS, _MARKS, _BLANKS, further or _WORDS)
    texts = []
    for number in range(count):
        parts = [
            rng.choice(rng.choice(pieces)) if rng.random() < 0.9 else _any_character(rng)
            for _ in range(rng.randrange(1, 24))
        ]
        # Every fifth text is of neighbours in one block of Unicode.
        texts.append("".join(parts) if number % 5 else _neighbours(rng))
    return [*texts, *further, *_LONG]


def _any_character(rng: random.Random) -> str:
    code = rng.randrange(0x110000)
    return chr(code) if not 0xD800 <= code < 0xE000 else "\u00e9"


def _neighbours(rng: random.Random) -> str:
    start = rng.choice((0x00, 0x80, 0x300, 0x600, 0x900, 0x2000, 0x2150, 0x3000, 0xFE00, 0x1F300))
    return "".join(chr(start + rng.randrange(256)) for _ in range(rng.randrange(1, 40)))
