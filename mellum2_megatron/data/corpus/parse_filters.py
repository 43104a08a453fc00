"""Filters of source code that parse it: syntax, and the share of comments.

Python is parsed by its own `ast`, so a file must be valid in the grammar of this interpreter. The
other languages are parsed by tree-sitter, whose grammars are packages of their own
(``tree-sitter-java``). A language whose grammar is missing is refused: a filter that is skipped in
silence would look like a corpus without faults.
"""

from __future__ import annotations

import ast
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.data.corpus.quality_filters import Content, Thresholds

if TYPE_CHECKING:
    from tree_sitter import Parser, Query, Tree

LANGUAGES = ("python", "javascript", "java", "c", "cpp", "go", "rust")
"""Languages with a grammar. C is parsed as C++, as which nearly all of it is valid."""

COMMENTS = {
    "java": "[(line_comment) (block_comment)] @found",
    "rust": "[(line_comment) (block_comment)] @found",
}
"""Pattern of comments, where it is not ``(comment)``."""


def _grammar(name: str) -> object:
    """Return tree-sitter's grammar of one of `LANGUAGES`."""
    match name:
        case "python":
            from tree_sitter_python import language as grammar
        case "javascript":
            from tree_sitter_javascript import language as grammar
        case "java":
            from tree_sitter_java import language as grammar
        case "go":
            from tree_sitter_go import language as grammar
        case "rust":
            from tree_sitter_rust import language as grammar
        case _:
            from tree_sitter_cpp import language as grammar
    return grammar()


@cache
def _parser(language: str) -> Parser:
    try:
        from tree_sitter import Language, Parser

        return Parser(Language(_grammar(language)))
    except ModuleNotFoundError as error:
        raise InputError(
            f"parse check of {language}",
            rule=f"it needs the package {error.name}, which is not installed",
            fix="install the data extra: pip install 'mellum2-megatron[data]'",
        ) from error


def check_languages(languages: list[str]) -> None:
    """Refuse languages that cannot be parsed, before any document is read.

    Raises:
        InputError: there is no grammar of a language, or its package is not installed.
    """
    for language in languages:
        if language not in LANGUAGES:
            raise InputError(
                f"parse check of {language}",
                rule=f"there are grammars of {', '.join(LANGUAGES)}",
                fix=nearest(language, LANGUAGES),
            )
        _parser(language)


@dataclass(frozen=True, kw_only=True)
class Parses(Thresholds):
    """Syntax errors. Documents in languages without a grammar are kept.

    Attributes:
        errors: highest share of the text inside syntax errors, default 0.02. tree-sitter accepts
            errors and marks them, and unusual valid code can hold one. Python allows none.
    """

    errors: float = 0.02

    def __call__(self, content: Content) -> str | None:
        """Return the reason to drop the document, or None."""
        if content.language == "python":
            return python_fault(content.text)
        if content.language not in LANGUAGES:
            return None
        if not _tree(content).root_node.has_error:
            return None
        wrong = _bytes_in(content, "[(ERROR) (MISSING)] @found")
        share = wrong / max(len(content.bytes), 1)
        return None if share <= self.errors else f"{share:.0%} of the text in syntax errors"


@dataclass(frozen=True, kw_only=True)
class CommentShare(Thresholds):
    """Files that are mostly comments (code that was commented out, licences).

    Attributes:
        most: highest share of the text in comments, default 0.8 (StarCoder).
        least: lowest share, default 0. StarCoder dropped files below 0.01.
    """

    most: float = 0.8
    least: float = 0.0

    def __call__(self, content: Content) -> str | None:
        """Return the reason to drop the document, or None."""
        if content.language not in LANGUAGES or not len(content.bytes):
            return None
        comments = _bytes_in(content, COMMENTS.get(content.language, "(comment) @found"))
        share = comments / len(content.bytes)
        return None if self.least <= share <= self.most else f"{share:.0%} comments"


def python_fault(text: str) -> str | None:
    """Return the reason why Python cannot parse a text, or None."""
    try:
        with warnings.catch_warnings():
            # A doubtful escape in a string is a SyntaxWarning, and no reason to drop the file.
            warnings.simplefilter("ignore")
            ast.parse(text)
    except SyntaxError as error:
        return f"line {error.lineno}: {error.msg}"
    # Deep nesting, and a null character in the source.
    except (RecursionError, MemoryError, ValueError) as error:
        return type(error).__name__
    return None


def _tree(content: Content) -> Tree:
    """Return the document's syntax tree, parsed once for all filters."""
    tree: Tree | None = content.tree
    if tree is None:
        tree = content.tree = _parser(content.language).parse(content.bytes.tobytes())
    return tree


@cache
def _query(language: str, pattern: str) -> Query:
    from tree_sitter import Query

    grammar = _parser(language).language
    assert grammar is not None
    return Query(grammar, pattern)


def _bytes_in(content: Content, pattern: str) -> int:
    """Return the bytes inside the nodes that a pattern finds; a nested node counts once."""
    from tree_sitter import QueryCursor

    nodes = QueryCursor(_query(content.language, pattern)).captures(_tree(content).root_node)
    spans = sorted((node.start_byte, node.end_byte) for node in nodes.get("found", ()))
    total = reached = 0
    for start, end in spans:
        # A missing token has no bytes, and counts as one.
        end = max(end, start + 1)
        total += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return total
