"""Lists and YAML documents: words stay as they are written."""

from __future__ import annotations

from typing import Any

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.text import ListError, Plain, read_list, read_yaml


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("a,b", ["a", "b"]),
        ("[a, b]", ["a", "b"]),
        ("(a, b,)", ["a", "b"]),
        ("[]", []),
        ("", []),
        ("[a]", ["a"]),
        ("[a],", [["a"]]),
        ("[0,8],[64,16]", [["0", "8"], ["64", "16"]]),
        ("((0, 8), [64, 16])", [["0", "8"], ["64", "16"]]),
        ("[1, /web (1)/x]", ["1", "/web (1)/x"]),
        ("[1, /web [1]/x]", ["1", "/web [1]/x"]),
        ("[[1, /a(b]]", None),
        ("(1, c: d # e)", ["1", "c: d # e"]),
        ("[1, it's]", ["1", "it's"]),
        ('[1, "/web (1)/a, [b]"]', ["1", "/web (1)/a, [b]"]),
        ('[\'a "b"\', "it\'s"]', ['a "b"', "it's"]),
        ("['']", [""]),
        ("[1, 'a]", None),
        ("[a,,b]", None),
        ("[a", None),
        ("[a]]", None),
        ("[(a)/b]", None),
        ("['a'b]", None),
        ("[" * 3000, None),
        ("[" * 3000 + "]" * 3000, None),
    ],
)
def test_lists_of_the_command_line(text: str, items: list[Any] | None) -> None:
    if items is None:
        with pytest.raises(ListError):
            read_list(text)
    else:
        assert read_list(text) == items


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("[1, (f)/t]", '"(f)/t"'),
        ("[1, [f]/t]", '"[f]/t"'),
        ("[1, a)b]", '"a)b"'),
        ('[1, "a"b]', "'\"a\"b'"),
    ],
)
def test_the_refusal_shows_the_quoted_form(text: str, form: str) -> None:
    with pytest.raises(ListError) as error:
        read_list(text)
    assert str(error.value).endswith(form)
    assert read_list(f"[1, {form}]")[1] == form[1:-1]


def test_only_words_without_quotes_are_plain() -> None:
    assert [type(item) for item in read_list("[a, 'b']")] == [Plain, str]
    document = read_yaml("a: b\nc: 'd'\ne: |\n  f\ng:\n", document="d", fix="f")
    assert {key: type(value) for key, value in document.items()} == {
        "a": Plain,
        "c": str,
        "e": str,
        "g": type(None),
    }


@pytest.mark.parametrize(
    "word", ["010", "1:30", "on", "yes", "1e-3", "1_000", "2026-01-02", "0x1f", ".inf", "<<", "="]
)
def test_yaml_leaves_words_as_they_are(word: str) -> None:
    assert read_yaml(f"a: {word}", document="d", fix="f") == {"a": word}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: !!int x", "line 1: not YAML (tags"),
        ("a: 1\nb: !x {}", "line 2: not YAML (tags"),
        ("a: &b 1\nc: *b", "line 1: not YAML (anchors"),
        ("a: *b", "line 1: not YAML (anchors"),
        ("a: " + "[" * 5000 + "]" * 5000, "line 1: not YAML (nested deeper"),
        ("? [a]\n: b", "line 1: not YAML (a key must be one word"),
        ("a: 1\n---\nb: 2", "not YAML (but found another document)"),
        ("a: \x00", "not YAML (unacceptable character"),
    ],
)
def test_yaml_beyond_plain_data_is_refused(text: str, problem: str) -> None:
    with pytest.raises(InputError) as error:
        read_yaml(text, document="d", fix="f")
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_long_documents_are_refused_at_once() -> None:
    with pytest.raises(
        InputError, match=r"run file of 1,048,577 characters: it may have 1,048,576"
    ):
        read_yaml("#" * ((1 << 20) + 1), document="run file", fix="f")
    with pytest.raises(InputError, match="not YAML"):
        read_yaml("[" * 100_000, document="run file", fix="f")
