"""Script that loads a ``tokenizer.json`` and encodes texts; see `tokenizer.load_tokenizer`.

It runs with limits of time and memory, and imports nothing of this project. A tokenizer's regular
expressions may search for ever, and its replacements may grow a text without end.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tokenizers import Tokenizer


def _answer(path: str, texts: list[str]) -> dict[str, Any]:
    try:
        with open(path, "rb") as stream:
            tokenizer = Tokenizer.from_buffer(stream.read())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        for text in texts:
            tokenizer.encode(text)
    # The library's panics are no subclass of Exception.
    except BaseException as error:
        return {"error": (str(error).strip().splitlines() or [type(error).__name__])[0][:500]}
    return {}


if __name__ == "__main__":
    job = json.load(sys.stdin)
    json.dump(_answer(job["path"], job["texts"]), sys.stdout)
