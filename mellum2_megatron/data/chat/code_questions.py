"""Conversations about real functions, with answers that can be checked: Python's standard library.

Each function gives one conversation: its code, and three questions whose answers are in it (name,
arguments, first line of the docstring). What varies in an answer stands in backticks; the words
around it do not, so that the form of an answer can be judged apart from its content.
"""

from __future__ import annotations

import ast
import json
import random
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import check_writable, write_text
from mellum2_megatron.data.corpus.discovery import standard_library
from mellum2_megatron.data.corpus.left_out import LeftOut

_MOST_CHARACTERS = 600
"""Characters of the longest function, so that several conversations fit into a small pack."""
_MOST_WORDS = 80
"""Characters of the longest first line of a docstring."""


def write_code_questions(file: Path, *, functions: int, seed: int) -> int:
    """Write conversations as ``.jsonl``, a function each, and return their number.

    Args:
        file: file to write; rows have ``messages``, ``function``, ``source`` and ``licence``.
        functions: most functions; fewer if the library has no more that fit.
        seed: seed that draws them.

    Raises:
        InputError: the file cannot be written.
    """
    check_writable("--output", file, folder=False)
    if functions < 1:
        raise InputError(f"--functions {functions}", rule="there must be one", fix="use 2000")
    library = standard_library(LeftOut())
    source = f"Python {library.version} standard library"
    rows = []
    for one in library.files:
        # Some files of the library's own are not UTF-8 on purpose.
        text = one.path.read_text(encoding="utf-8", errors="replace")
        module = one.relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        rows += [
            {
                "messages": messages,
                "function": f"{module}.{name}",
                "source": source,
                "licence": library.licence,
            }
            for name, messages in conversations(text)
        ]
    random.Random(seed).shuffle(rows)
    rows = rows[:functions]
    write_text(file, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    return len(rows)


def conversations(text: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield name and messages for each short documented function of a Python file.

    A file that Python cannot parse has none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # doubtful escapes
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        summary = (ast.get_docstring(node) or "").partition("\n")[0].strip().replace("`", "'")
        code = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
        # What spells a special token would forge the end of a turn.
        if 0 < len(summary) <= _MOST_WORDS and len(code) <= _MOST_CHARACTERS and "<" not in code:
            yield node.name, _messages(node, code, summary)


def _messages(node: ast.FunctionDef, code: str, summary: str) -> list[dict[str, Any]]:
    taken = ", ".join(_arguments(node.args))
    turns = (
        (
            f"```python\n{code.rstrip()}\n```\nWhat is this function called?",
            f"It is `{node.name}`.",
        ),
        ("Which arguments does it take?", f"It takes `{taken or 'nothing'}`."),
        ("What does it do?", f"It says: `{summary}`"),
    )
    return [
        {"role": role, "content": content}
        for question, answer in turns
        for role, content in (("user", question), ("assistant", answer))
    ]


def _arguments(arguments: ast.arguments) -> list[str]:
    """Return the names of a function's arguments in order, with ``*`` and ``**``."""
    names = [one.arg for one in (*arguments.posonlyargs, *arguments.args)]
    if arguments.vararg is not None:
        names.append(f"*{arguments.vararg.arg}")
    names += [one.arg for one in arguments.kwonlyargs]
    if arguments.kwarg is not None:
        names.append(f"**{arguments.kwarg.arg}")
    return names
