"""Quality filters of a corpus: each names its fault, its measure and its threshold.

A filter is a dataclass whose fields are its thresholds. It takes one document's `Content` and
returns None, or the reason to drop it. The report names line length, entropy, comment ratio and a
parse check for code, and 82 unique tokens for all (report §3); it gives no thresholds but the last.
The defaults are those of StarCoder's, Gopher's and FineWeb's filters where they have one, and are
decided here where not.

Measures are made on the document's UTF-8 bytes with numpy, 100 MB/s and more a core. The parse
check (`parse_filters`) is the slow one, so it comes last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mellum2_megatron.common.field_checks import is_number, require

UNIQUE_TOKENS = 82
"""Unique tokens that a document and a finished pack must hold: 1% of 8,192 (report §3.6)."""

_BLANKS = np.zeros(256, dtype=bool)
_BLANKS[list(b" \t\n\r\v\f")] = True


class Content:
    """One document with the views of it that filters share, each made once when needed."""

    def __init__(self, text: str, language: str = "") -> None:
        """Take a document's text; ``language`` is a lower-case name (``python``) or empty."""
        self.text = text
        self.language = language
        self.tree: Any = None
        """Syntax tree, kept by `parse_filters` so that its filters parse once."""

    @cached_property
    def bytes(self) -> NDArray[np.uint8]:
        """UTF-8 bytes ``[n]``."""
        return np.frombuffer(self.text.encode("utf-8", "surrogatepass"), dtype=np.uint8)

    @cached_property
    def line_lengths(self) -> NDArray[np.int64]:
        """Bytes of each line ``[lines]``, line ends not counted; an empty last line is no line."""
        ends = np.flatnonzero(self.bytes == 10)
        if len(self.bytes) and self.bytes[-1] != 10:
            ends = np.append(ends, len(self.bytes))
        return np.diff(ends, prepend=-1) - 1

    @cached_property
    def histogram(self) -> NDArray[np.int64]:
        """Number of each byte value ``[256]``."""
        return np.bincount(self.bytes, minlength=256)

    @cached_property
    def lines(self) -> list[str]:
        """Lines with something on them, blanks at both ends removed."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def words(self) -> tuple[int, int]:
        """Number of words between ASCII blanks, and their bytes in all."""
        in_word = ~_BLANKS[self.bytes]
        starts = np.count_nonzero(in_word[1:] & ~in_word[:-1]) + int(in_word[:1].sum())
        return int(starts), int(np.count_nonzero(in_word))


class Filter(Protocol):
    """A named test of one document."""

    def __call__(self, content: Content) -> str | None:
        """Return None to keep the document, else the reason in a few words, with the measure."""
        ...


class Thresholds:
    """Refuses thresholds that are not finite numbers."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            require(
                is_number(value) and value >= 0,
                f"{type(self).__name__}.{field.name}={value!r}",
                rule="a threshold is a finite number >= 0",
                fix=f"leave it out for {field.default}",
            )


@dataclass(frozen=True, kw_only=True)
class LineLength(Thresholds):
    """Long lines: minified or generated code, data in text form.

    Attributes:
        longest: bytes of the longest line, default 1,000 (StarCoder).
        mean: bytes of a line on average, default 100 (StarCoder).
    """

    longest: int = 1000
    mean: float = 100

    def __call__(self, content: Content) -> str | None:
        """Return the reason to drop the document, or None."""
        lengths = content.line_lengths
        if not len(lengths):
            return None
        if (longest := int(lengths.max())) > self.longest:
            return f"line of {longest:,} bytes"
        if (mean := float(lengths.mean())) > self.mean:
            return f"lines of {mean:.0f} bytes on average"
        return None


@dataclass(frozen=True, kw_only=True)
class ByteEntropy(Thresholds):
    """Entropy of the byte histogram: repeated filler is low, encoded binary data is high.

    Attributes:
        low, high: bits per byte, default 2.5 and 6.2. Source code lies at 4 to 5.3, base64 at 6.
        shortest: bytes below which the measure means nothing and no document is dropped, default
            256.
    """

    low: float = 2.5
    high: float = 6.2
    shortest: int = 256

    def __call__(self, content: Content) -> str | None:
        """Return the reason to drop the document, or None."""
        if len(content.bytes) < self.shortest:
            return None
        share = content.histogram[content.histogram > 0] / len(content.bytes)
        bits = float(-(share * np.log2(share)).sum())
        return None if self.low <= bits <= self.high else f"{bits:.2f} bits per byte"


_LETTERS = np.zeros(256, dtype=bool)
_LETTERS[[*range(ord("a"), ord("z") + 1), *range(ord("A"), ord("Z") + 1), *range(0x80, 0x100)]] = 1
_LETTERS_DIGITS = _LETTERS.copy()
_LETTERS_DIGITS[[*range(ord("0"), ord("9") + 1)]] = True


@dataclass(frozen=True, kw_only=True)
class LetterShare(Thresholds):
    """Share of letters and digits: tables of numbers or signs have few.

    Attributes:
        letters_digits: lowest share of letters and digits, default 0.25 (StarCoder).
        letters: lowest share of letters, default 0.15. Bytes beyond ASCII count as letters.
    """

    letters_digits: float = 0.25
    letters: float = 0.15

    def __call__(self, content: Content) -> str | None:
        """Return the reason to drop the document, or None."""
        total = max(len(content.bytes), 1)
        for name, table, least in (
            ("letters and digits", _LETTERS_DIGITS, self.letters_digits),
            ("letters", _LETTERS, self.letters),
        ):
            if (share := content.histogram[table].sum() / total) < least:
                return f"{share:.0%} {name}"
        return None


@dataclass(frozen=True, kw_only=True)
class RepeatedLines(Thresholds):
    """Lines that occur again in the same document (Gopher).

    Attributes:
        share: highest share of lines that repeat an earlier one, default 0.3 (Gopher).
        bytes_share: highest share of the text in such lines, default 0.2 (Gopher).
        fewest: lines below which no document is dropped, default 10.
    """

    share: float = 0.3
    bytes_share: float = 0.2
    fewest: int = 10

    def __call__(self, content: Content) -> str | None:
        """Return the reason to drop the document, or None."""
        lines = content.lines
        if len(lines) < self.fewest:
            return None
        unique = set(lines)
        if (share := 1 - len(unique) / len(lines)) > self.share:
            return f"{share:.0%} of the lines repeated"
        characters = len("".join(lines))
        if (share := 1 - len("".join(unique)) / characters) > self.bytes_share:
            return f"{share:.0%} of the text in repeated lines"
        return None


@dataclass(frozen=True, kw_only=True)
class ProseShape(Thresholds):
    """Shape of running text (Gopher, and FineWeb for line ends).

    Attributes:
        fewest_words, most_words: words of a document, default 50 and 100,000 (Gopher).
        shortest_word, longest_word: mean bytes of a word, default 3 and 10 (Gopher).
        signs: highest number of ``#`` and of ellipses for each word, default 0.1 (Gopher).
        bullets: highest share of lines that begin with a bullet, default 0.9 (Gopher).
        ellipses: highest share of lines that end with an ellipsis, default 0.3 (Gopher).
        stop_words: fewest of eight frequent English words, default 2 (Gopher); 0 for text in other
            languages.
        short_lines: highest share of lines up to 30 bytes, default 0.67 (FineWeb).
        line_ends: lowest share of lines that end with punctuation, default 0.12 (FineWeb).
    """

    fewest_words: int = 50
    most_words: int = 100_000
    shortest_word: float = 3
    longest_word: float = 10
    signs: float = 0.1
    bullets: float = 0.9
    ellipses: float = 0.3
    stop_words: int = 2
    short_lines: float = 0.67
    line_ends: float = 0.12

    def __call__(self, content: Content) -> str | None:
        """Return the reason to drop the document, or None."""
        words, size = content.words
        if not self.fewest_words <= words <= self.most_words:
            return f"{words:,} words"
        if not self.shortest_word <= (mean := size / words) <= self.longest_word:
            return f"words of {mean:.1f} bytes on average"
        text = content.text
        for name, number in (
            ("#", text.count("#")),
            ("ellipses", text.count("...") + text.count("…")),
        ):
            if number / words > self.signs:
                return f"{number / words:.2f} {name} for each word"
        # The beginning is enough, and splitting all of a text is the slowest step here.
        if len(_STOP_WORDS.intersection(text[:20_000].split())) < self.stop_words:
            return "hardly any frequent English words"
        # A blank at a line's end is rare enough to be left; lines shorter than two bytes as well.
        lengths = content.line_lengths
        ends = np.cumsum(lengths + 1) - 1
        real = lengths > 1
        lines = max(int(np.count_nonzero(real)), 1)
        first, last, before = (
            content.bytes[place[real]] for place in (ends - lengths, ends - 1, ends - 2)
        )
        # The last byte of an ellipsis in one character is A6; in UTF-8 a bullet begins with E2.
        tests: tuple[tuple[str, NDArray[np.bool_], float], ...] = (
            ("begin with a bullet", np.isin(first, list(b"-*\xe2")), self.bullets),
            (
                "end with an ellipsis",
                (last == ord(".")) & (before == ord(".")) | (last == 0xA6),
                self.ellipses,
            ),
            ("have up to 30 bytes", lengths[real] <= 30, self.short_lines),
        )
        for ending, holds, most in tests:
            if (share := float(holds.sum()) / lines) > most:
                return f"{share:.0%} of the lines {ending}"
        # Bytes beyond ASCII: closing quotes and the full stops of other scripts.
        closed = float((np.isin(last, list(b".!?:;\"')")) | (last >= 0x80)).sum()) / lines
        return None if closed >= self.line_ends else f"{closed:.0%} of the lines end a sentence"


_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))


def too_few_unique(ids: NDArray[np.integer], *, fewest: int = UNIQUE_TOKENS) -> str | None:
    """Return the reason to drop a document's or a pack's ids ``[n]``, or None.

    The report names the rule for samples, the cause of loss spikes (report §3.6). Here it holds for
    documents before packing and for finished packs.
    """
    unique = len(np.unique(ids))
    return None if unique >= fewest else f"{unique} unique tokens"


CODE_FILTERS: tuple[Filter, ...] = (LineLength(), ByteEntropy(), LetterShare())
"""Filters of source code that need no parser, in order of cost."""

PROSE_FILTERS: tuple[Filter, ...] = (
    # A paragraph of prose is often one line.
    LineLength(longest=100_000, mean=10_000),
    ByteEntropy(),
    LetterShare(letters_digits=0.5, letters=0.4),
    RepeatedLines(),
    ProseShape(),
)
"""Filters of web and other running text, in order of cost."""


def reason_to_drop(content: Content, filters: Sequence[Filter]) -> tuple[str, str] | None:
    """Return name and reason of the first filter that drops the document, or None."""
    for test in filters:
        if (reason := test(content)) is not None:
            return type(test).__name__, reason
    return None
