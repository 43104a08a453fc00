"""Script that renders conversations with a chat template; see `template.render_limited`.

It runs with limits of time and memory, and imports nothing of this project: a template is a
program. transformers renders in a sandbox without the attributes by which Python's objects lead to
others (utils/chat_template_utils.py, 5.23).
"""

from __future__ import annotations

import json
import sys
from typing import Any

_MOST_CHARACTERS = 1_000_000


def _rendered(template: str, tokens: dict[str, Any], request: dict[str, Any]) -> dict[str, str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template(
            [request["messages"]],
            tools=request["tools"],
            chat_template=template,
            add_generation_prompt=request["add_generation_prompt"],
            **tokens,
        )
    # Jinja raises many types, and a template raises its own with raise_exception.
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0][:500]}"}
    if len(texts[0]) > _MOST_CHARACTERS:
        return {"error": f"it gives {len(texts[0]):,} characters"}
    return {"text": str(texts[0])}


if __name__ == "__main__":
    job = json.load(sys.stdin)
    answers = [_rendered(job["template"], job["tokens"], request) for request in job["requests"]]
    json.dump({"answers": answers}, sys.stdout)
