"""Ingredients of a small release, for the release tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mellum2_megatron.data.tokens.tokenizer import train_tokenizer
from tests.conversion.folders import write_folder
from tests.small import python_like

VOCABULARY = 320

TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.reasoning_content -%}
{{- '<think>' + message.reasoning_content + '</think>' -}}
{%- endif -%}
{{- message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""


def write_model(folder: Path, **changes: Any) -> Path:
    """A random Hugging Face folder with a tokenizer whose ids are those of its config."""
    write_folder(folder, {"vocab_size": VOCABULARY, **changes})
    train_tokenizer(map(python_like, range(20)), folder, vocab_size=VOCABULARY)
    # A text ends with another token than a turn of a chat (id 8): generation must stop at both.
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        text = (folder / name).read_text()
        text = text.replace('"<|im_end|>"', '"</s>"').replace('"<filename>"', '"<|im_end|>"')
        (folder / name).write_text(text)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
