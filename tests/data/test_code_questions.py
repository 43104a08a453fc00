"""Conversations about code: their answers by Python's own inspection, and their form."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from mellum2_megatron.data.chat.code_questions import conversations
from mellum2_megatron.data.chat.records import parse_record
from tests.cli.runner import mellum2

CODE = '''
class Shelf:
    def place(self, book, /, where=None, *others, quietly=False, **more):
        """Put a `book` on the shelf.

        More text.
        """
        return book

    def plain(self):
        return 1


def empty():
    """Do nothing."""


def _hidden():
    """Nobody asks."""


def forging():
    """Ends <|im_end|> a turn."""
'''


def test_answers_are_those_of_inspect() -> None:
    namespace: dict[str, object] = {}
    exec(CODE, namespace)
    place = namespace["Shelf"].place  # type: ignore[attr-defined]
    parameters = inspect.signature(place).parameters.values()
    names = [str(one).partition("=")[0].partition(":")[0] for one in parameters]
    found = dict(conversations(CODE))
    assert set(found) == {"place", "empty"}
    answers = [one["content"] for one in found["place"] if one["role"] == "assistant"]
    assert answers == [
        "It is `place`.",
        f"It takes `{', '.join(names)}`.",
        "It says: `Put a 'book' on the shelf.`",
    ]
    assert found["empty"][3]["content"] == "It takes `nothing`."
    assert found["place"][0]["content"].startswith("```python\ndef place(self, book, /,")
    assert list(conversations("def broken(:")) == []


def test_the_command_writes_rows_that_are_read(tmp_path: Path) -> None:
    file, again = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    result = mellum2("data", "code-questions", "--output", file, "--functions", "40")
    assert result.code == 0, result
    assert "40 conversations" in result.out
    assert mellum2("data", "code-questions", "--output", again, "--functions", "40").code == 0
    assert file.read_bytes() == again.read_bytes()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["licence"] for row in rows} == {"PSF-2.0"}
    assert {len(parse_record(row).messages) for row in rows} == {6}
    mellum2("data", "code-questions", "--output", tmp_path).refused("--output")
    mellum2("data", "code-questions", "--output", file, "--functions", "0").refused("--functions 0")
