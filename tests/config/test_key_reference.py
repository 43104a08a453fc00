"""The reference of all keys: complete, true to the classes, and the page is up to date."""

from __future__ import annotations

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import apply_overrides, keys
from mellum2_megatron.config.key_reference import find_entries, key_entries, keys_page
from mellum2_megatron.recipes import recipe
from tests.config.keys_page import PAGE


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == keys_page(), "python -m tests.config.keys_page"


def test_every_key_has_a_meaning_and_its_default_can_be_set() -> None:
    entries = key_entries()
    assert [entry.key for entry in entries] == list(keys())
    run = recipe("mellum2_tiny_pretrain")
    for entry in entries:
        assert len(entry.meaning) > 10, entry
        assert "  " not in entry.meaning, entry
        # As a sentence ends: a text cut off in the middle of a docstring would not.
        assert entry.meaning.endswith((".", ")")), entry
    # Together, because some defaults fit only together.
    words = [f"{e.key}={e.default}" for e in entries if e.default not in (None, "''")]
    words = [word for word in words if not word.startswith(("architecture.", "layout.dp="))]
    assert len(words) > 60
    assert apply_overrides(run, words).optimizer.lr == 3e-4


def test_a_key_or_a_section_is_found() -> None:
    (entry,) = find_entries("layout.ep")
    assert (entry.type, entry.default) == ("a whole number", "1")
    assert "expert-parallel ways" in entry.meaning
    assert {entry.section for entry in find_entries("optimizer")} == {"optimizer"}
    assert {e.key.count(".") for e in find_entries("architecture.rope_full_attention")} == {2}
    with pytest.raises(InputError, match=r"did you mean 'layout\.ep'"):
        find_entries("layot.ep")
