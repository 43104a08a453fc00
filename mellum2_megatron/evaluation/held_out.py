"""Source code that measures cut lines out of: blocks of our own, or the user's held-out files."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.evaluation.texts import shuffled_texts

_FILE = "held_out_code.md"
_SHORTEST = 8
"""Characters of the shortest line that is asked for: below it stand brackets and `else:`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CutText:
    """A document with a part taken out.

    Attributes:
        before: text in front of the part.
        middle: the part, within one line.
        after: text behind it, from the line end on.
    """

    before: str
    middle: str
    after: str


def own_documents() -> list[str]:
    """Return the blocks of ``held_out_code.md``."""
    text = files("mellum2_megatron.evaluation").joinpath(_FILE).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def documents(paths: Sequence[str], seed: int, limit: int) -> list[str]:
    """Return at most ``limit`` documents: own blocks, or those of the user's files."""
    if not paths:
        return own_documents()[:limit]
    found: list[str] = []
    for text in shuffled_texts(paths, seed):
        if len(found) == limit:
            break
        found.append(text)
    return found


def cut_lines(
    name: str, paths: Sequence[str], *, items: int, seed: int, inside: bool, most: int = 2000
) -> list[CutText]:
    """Return documents with a part of one line taken out, spread evenly over documents.

    Args:
        name: measure, for messages.
        paths: see `documents`.
        items: number of cuts.
        seed: seed of the lines and places.
        inside: cut at a place inside the line; else the whole line but its indentation.
        most: most characters kept before and behind the cut.

    Raises:
        InputError: there are fewer lines to cut than ``items``.
    """
    texts = documents(paths, seed, items)
    rng = random.Random(f"{name} {seed}")
    lines = [_lines(text) for text in texts]
    for places in lines:
        rng.shuffle(places)
    if sum(map(len, lines)) < items:
        raise InputError(
            f"{name}.items={items}",
            rule=f"the texts have {sum(map(len, lines))} lines to ask for",
            fix=f"lower {name}.items, or name more files with {name}.text",
        )
    cuts: list[CutText] = []
    while len(cuts) < items:
        for text, places in zip(texts, lines, strict=True):
            if places and len(cuts) < items:
                start, end = places.pop()
                if inside:
                    start += rng.randrange(end - start - _SHORTEST // 2)
                before, after = text[:start], text[end:]
                cuts.append(
                    CutText(before=before[-most:], middle=text[start:end], after=after[:most])
                )
    return cuts


def _lines(text: str) -> list[tuple[int, int]]:
    """Return start and end of the lines that can be asked for, indentation left out.

    They lie in the second half, so that there is something to go by, and are no comments.
    """
    places = []
    for found in re.finditer(r"^[ \t]*(\S.*?)[ \t]*$", text, re.MULTILINE):
        start, end = found.span(1)
        if start >= len(text) // 3 and end - start >= _SHORTEST and text[start] != "#":
            places.append((start, end))
    return places
