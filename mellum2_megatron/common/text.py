"""Text that people type: lists on the command line, and YAML documents.

Both leave a word without quotes as `Plain` text. The field that it is meant for decides what it
is (`mellum2_megatron.common.values`), so a file and the command line read a word in the same way.
YAML itself would read ``010`` as 8, ``1:30`` as 90, ``on`` as true, ``3e-4`` as text and
``2026-01-02`` as a date.
"""

from __future__ import annotations

from typing import Any

import yaml

from mellum2_megatron.common.errors import InputError

MAX_DEPTH = 20
"""Deepest nesting of a document or list; a run needs four levels."""

_OPENING = {"[": "]", "(": ")"}
_BLANKS = " \t\n"


class Plain(str):
    """Text without quotes, to be read as any type; a plain str was quoted and is only text."""

    __slots__ = ()


class Items(list[Any]):
    """List as it was read, with the text between its brackets.

    Attributes:
        source: that text.
    """

    __slots__ = ("source",)

    def __init__(self, items: list[Any], source: str) -> None:
        super().__init__(items)
        self.source = source


class ListError(ValueError):
    """Text that is no list; the message is the fix."""


def read_list(text: str) -> list[Any]:
    """Read ``[a, [b, "c, d"]]`` as nested lists of `Plain` and quoted text.

    Brackets may be parentheses, and the outer pair may be left out. A word keeps all its
    characters: brackets count only where an item begins. A word with a comma, or with a bracket
    that has no partner, needs quotes.

    Raises:
        ListError: an unclosed bracket or quote, or text after either.
    """
    items, end = _items(text, 0, "", 0)
    if end < len(text):
        raise ListError(f"there is a {text[end]!r} too many")
    # `[[0, 8], [64, 16]]` is a list with its outer brackets, `[0, 8], [64, 16]` one without.
    alone = len(items) == 1 and isinstance(items[0], Items) and not text.rstrip().endswith(",")
    return items[0] if alone else Items(items, text)


def _items(text: str, start: int, closing: str, depth: int) -> tuple[list[Any], int]:
    """Read items from ``start`` to the bracket ``closing``, or to the end if it is empty.

    Returns:
        The items, and the position of the bracket or the end.
    """
    if depth > MAX_DEPTH:
        raise ListError(f"nest {MAX_DEPTH} lists at most")
    items: list[Any] = []
    position = _skip_blanks(text, start)
    while position < len(text) and text[position] != closing:
        begin = position
        item, position = _item(text, position, closing, depth)
        items.append(item)
        position = _skip_blanks(text, position)
        if position < len(text) and text[position] == ",":
            position = _skip_blanks(text, position + 1)
        elif position < len(text) and text[position] != closing:
            word = text[begin : _word_end(text, begin, closing, strict=False)].strip()
            quote = "'" if '"' in word else '"'
            raise ListError(f"put this text in quotes: {quote}{word}{quote}")
    if closing and position == len(text):
        raise ListError(f"close the list with {closing!r}")
    return items, position


def _item(text: str, start: int, closing: str, depth: int) -> tuple[Any, int]:
    """Read the list, quoted text or word at ``start``; return it with the position behind it."""
    first = text[start]
    if first in _OPENING:
        items, end = _items(text, start + 1, _OPENING[first], depth + 1)
        return Items(items, text[start + 1 : end]), end + 1
    if first in "\"'":
        end = text.find(first, start + 1)
        if end < 0:
            raise ListError(f"close the quote {first}")
        return text[start + 1 : end], end + 1
    end = _word_end(text, start, closing)
    word = text[start:end].rstrip(_BLANKS)
    if not word:
        raise ListError("there is an item without text")
    return Plain(word), end


def _word_end(text: str, start: int, closing: str, *, strict: bool = True) -> int:
    """Return the end of the word at ``start``: a comma, ``closing``, or the end of the text.

    Pairs of brackets inside a word are characters of it, as in ``/web (1)/[a]``. With ``strict``
    a closing bracket without partner ends the word too.
    """
    end, open_brackets = start, 0
    while end < len(text) and text[end] != ",":
        if text[end] in "[(":
            open_brackets += 1
        elif text[end] in "])" and open_brackets:
            open_brackets -= 1
        elif text[end] == closing or (strict and text[end] in "])"):
            break
        end += 1
    return end


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in _BLANKS:
        position += 1
    return position


LONGEST_YAML = 1 << 20
"""Characters of the longest document; the reader is written in Python and slow."""


def read_yaml(text: str, *, document: str, fix: str) -> Any:
    """Return the content of a YAML document: mappings, lists, `Plain` and quoted text, None.

    Args:
        text: the document.
        document: its kind, for the message (``run file``).
        fix: fix in the message.

    Raises:
        InputError: not YAML, longer than `LONGEST_YAML`, a key given twice in one mapping, nesting
            deeper than `MAX_DEPTH`, or a tag, anchor or alias. The message names the line.
    """
    if len(text) > LONGEST_YAML:
        raise InputError(
            f"{document} of {len(text):,} characters",
            rule=f"it may have {LONGEST_YAML:,}",
            fix=fix,
        )
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _value(node)
    except yaml.YAMLError as error:
        # Only marked errors have a line; the plain message spans several lines.
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        place = f"{document}, line {mark.line + 1}" if mark else document
        raise InputError(place, rule=f"not YAML ({problem})", fix=fix) from None


class _Loader(yaml.BaseLoader):
    """YAML reader without tags, anchors and aliases: values are plain data, written once."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # of PyYAML
        problem = ""
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            problem = "anchors (&) and aliases (*) are not read: write the value itself, "
            problem += "or in quotes if it is text"
        elif event.tag is not None:
            problem = "tags (!) are not read: write the value alone, or in quotes if it is text"
        elif self._depth > MAX_DEPTH:
            problem = f"nested deeper than {MAX_DEPTH} levels"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _value(node: yaml.Node) -> Any:
    """Return a node's content; an empty scalar is None."""
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key, item in node.value:
            problem = None
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key must be one word"
            elif key.value in values:  # PyYAML would silently take the last
                problem = f"key {key.value} is given twice"
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            values[str(key.value)] = _value(item)
        return values
    if getattr(node, "style", None) is not None:  # quoted, or a block
        return str(node.value)
    return Plain(node.value) if node.value else None
