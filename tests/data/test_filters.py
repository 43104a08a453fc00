"""Quality filters: each drops what it names, keeps what just does not reach its threshold."""

import math
from collections import Counter

import numpy as np
import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.corpus.parse_filters import (
    CommentShare,
    Parses,
    check_languages,
    python_fault,
)
from mellum2_megatron.data.corpus.quality_filters import (
    CODE_FILTERS,
    PROSE_FILTERS,
    ByteEntropy,
    Content,
    LetterShare,
    LineLength,
    ProseShape,
    RepeatedLines,
    reason_to_drop,
    too_few_unique,
)

TEXTS = ["", "\n", "a", "a\n", "\n\n", "ab\n\ncd", "é\n€€\n", "x" * 300, "no end\nof line\n\n"]
SENTENCE = "The house that they had built stood with its windows open to the sea.\n"


@pytest.mark.parametrize("text", TEXTS)
def test_views_equal_plain_python(text: str) -> None:
    content = Content(text)
    raw = text.encode()
    lines = raw.split(b"\n")
    if not lines[-1]:
        lines.pop()
    assert content.line_lengths.tolist() == [len(line) for line in lines]
    words = raw.split()
    assert content.words == (len(words), sum(map(len, words)))
    counted = Counter(raw)
    assert {byte: n for byte, n in enumerate(content.histogram.tolist()) if n} == counted


@pytest.mark.parametrize("text", TEXTS)
def test_no_filter_fails_on_small_texts(text: str) -> None:
    for language in ("", "python", "java"):
        for test in (*CODE_FILTERS, *PROSE_FILTERS, Parses(), CommentShare()):
            test(Content(text, language))


def test_line_length_at_its_thresholds() -> None:
    assert LineLength()(Content("x" * 1000 + "\n" * 10)) is None
    assert LineLength()(Content("x" * 1001 + "\n" * 11)) == "line of 1,001 bytes"
    assert LineLength()(Content("x" * 100)) is None
    assert LineLength()(Content("x" * 101)) == "lines of 101 bytes on average"
    # Bytes, not characters.
    assert LineLength()(Content("é" * 501 + "\n" * 11)) == "line of 1,002 bytes"


def test_entropy_is_shannons() -> None:
    text = "aab" * 100
    bits = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert ByteEntropy()(Content(text)) == f"{bits:.2f} bits per byte"
    assert ByteEntropy(low=bits - 1e-9)(Content(text)) is None
    assert ByteEntropy()(Content("aab")) is None
    every = bytes(range(128)).decode() * 4
    assert ByteEntropy()(Content(every)) == "7.00 bits per byte"


def test_letters() -> None:
    assert LetterShare()(Content("ab12" + "+" * 9)) is None
    assert LetterShare()(Content("ab12" + "+" * 13)) == "24% letters and digits"
    assert LetterShare()(Content("1234567890")) == "0% letters"
    assert LetterShare()(Content("привет")) is None


def test_repeated_lines() -> None:
    lines = [f"line number {n}" for n in range(20)]
    assert RepeatedLines()(Content("\n".join(lines))) is None
    assert RepeatedLines()(Content("\n".join(lines + lines[:4]))) is None
    assert "lines repeated" in str(RepeatedLines()(Content("\n".join(lines + lines[:9]))))
    long = [*lines, *["long " * 40] * 4]
    assert "text in repeated" in str(RepeatedLines()(Content("\n".join(long))))
    assert RepeatedLines()(Content("same\n" * 9)) is None


def test_prose_shape() -> None:
    shape = ProseShape()
    prose = SENTENCE * 10
    assert shape(Content(prose)) is None
    assert shape(Content(SENTENCE)) == "14 words"
    assert shape(Content("ab cd to be the of " * 40)) == "words of 2.2 bytes on average"
    assert "# for each word" in str(shape(Content(prose + "# " * 20)))
    assert "ellipses for each word" in str(shape(Content(prose + "hmm... " * 30)))
    assert "frequent English" in str(shape(Content("diese kurzen Zeilen kennt niemand. " * 20)))
    bullets = "".join("- " + SENTENCE for _ in range(20))
    assert "begin with a bullet" in str(shape(Content(bullets)))
    assert shape(Content(bullets + SENTENCE * 3)) is None
    ellipses = "The house that they had built with their own hands…\n" * 20
    assert "ellipsis" in str(ProseShape(signs=1)(Content(ellipses)))
    short = "that house have with stood.\n" * 30
    assert "up to 30 bytes" in str(shape(Content(short)))
    open_ended = SENTENCE.replace(".", "") * 20
    assert "0% of the lines end a sentence" in str(shape(Content(open_ended)))
    assert shape(Content(open_ended + SENTENCE * 3)) is None


def test_82_unique_tokens() -> None:
    assert too_few_unique(np.arange(82)) is None
    assert too_few_unique(np.arange(8192) % 81) == "81 unique tokens"


def test_first_reason_is_told_with_its_filter() -> None:
    table = Content("17 4 28 9 350 6 71 82 93 40\n" * 30)
    assert reason_to_drop(table, CODE_FILTERS) == ("LetterShare", "0% letters")
    assert reason_to_drop(Content("def f():\n    return 1\n"), CODE_FILTERS) is None


def test_thresholds_are_checked() -> None:
    with pytest.raises(InputError, match=r"LineLength\.mean=nan"):
        LineLength(mean=float("nan"))
    with pytest.raises(InputError, match=r"ByteEntropy\.low=-1"):
        ByteEntropy(low=-1)


@pytest.mark.parametrize(
    ("language", "good", "bad"),
    [
        ("python", "def f(x):\n    return x\n", "def f(x:\n    return x\n"),
        ("java", "class A { int f() { return 1; } }", "class A { int f( { return 1; "),
        ("javascript", "const f = (x) => x + 1;\n", "const f = (x => x + 1;;;)(\n"),
        ("c", "int main(void) { return 0; }\n", "int main(void { return 0; \n"),
        ("cpp", "template <class T> T f(T x) { return x; }\n", "template <class T> T f(T x { ;\n"),
        ("go", "package a\nfunc f() int { return 1 }\n", "package a\nfunc f( int { return 1\n"),
        ("rust", "fn f() -> i32 { 1 }\n", "fn f( -> i32 { 1 \n"),
    ],
)
def test_parse_check(language: str, good: str, bad: str) -> None:
    check_languages([language])
    assert Parses()(Content(good, language)) is None
    assert Parses()(Content(bad, language)) is not None


def test_python_faults_name_line_and_cause() -> None:
    assert python_fault("x = 1\nprint 'two'\n") == (
        "line 2: Missing parentheses in call to 'print'. Did you mean print(...)?"
    )
    assert python_fault("x = '\\d'\n") is None
    for text in ("(" * 100_000, "x = 1\0", "-" * 200_000 + "1", "a" + ".a" * 100_000):
        python_fault(text)
    assert python_fault("x = 1\0") is not None


def test_comment_share() -> None:
    code = "// one\nint f() { return 1; }\n"
    java = "class A {\n/* a b */ // c\n}\n"
    assert CommentShare(most=0.1)(Content(java, "java")) == "48% comments"
    assert CommentShare()(Content(code, "c")) is None
    assert CommentShare()(Content("# note\n" * 20 + "x = 1\n", "python")) == "82% comments"
    assert CommentShare(least=0.01)(Content("x = 1\n", "python")) == "0% comments"
    assert CommentShare()(Content("# not code", "markdown")) is None


def test_unknown_language_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'python'"):
        check_languages(["pyton"])
