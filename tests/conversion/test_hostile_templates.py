"""A chat template is a program: it neither runs for ever, nor takes all memory, nor gets out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conversion.release.chat_template import render_template
from mellum2_megatron.common import limited_process
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.chat.template import read_template
from tests.conversion.releases import TEMPLATE

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "loops": (LOOP, "it takes more than 3 s or 4 GiB"),
    "text": ("{{ 'x' * 10 ** 10 }}", "MemoryError|more than 3 s or 4 GiB"),
    "list": ("{{ [0] * 10 ** 10 }}", "MemoryError|more than 3 s or 4 GiB"),
    "padding": ("{{ '%9999999999d' % 1 }}", "MemoryError|more than 3 s or 4 GiB"),
    "power": ("{{ (9 ** (9 ** 9)) % 7 }}", "more than 3 s or 4 GiB"),
    "macros": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "nesting": ("(".join(["{{ "] + [""] * 100_000), "chat template, a turn"),
    "long": ("{{ 'x' * 2000000 }}", "it gives 2,000,000 characters"),
    "class": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "attribute": ("{{ (messages|attr('append')).__self__.__class__ }}", "SecurityError"),
    "format": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "SecurityError"),
    "function": ("{{ raise_exception.__globals__['json'] }}", "SecurityError"),
    "frame": ("{{ cycler.__init__.__globals__.os.system('touch owned') }}", "SecurityError"),
    "include": ("{% include '/etc/passwd' %}", "TypeError|no loader|TemplateNotFound"),
    "change": ("{% set _ = messages.append(1) %}", "SecurityError"),
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_process, "SECONDS", 3)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_message(name: str, chat_model: Path) -> None:
    template, reason = HOSTILE[name]
    with pytest.raises(InputError) as caught:
        render_template(chat_model, template)
    assert str(caught.value).startswith("chat template, a turn: ")
    assert re.search(reason, str(caught.value)), str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_good_template_is_rendered(chat_model: Path) -> None:
    assert "generation prompt" in render_template(chat_model, TEMPLATE)


def test_a_template_of_many_megabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "chat_template.jinja").open("wb") as sparse:
        sparse.truncate((1 << 26) + 1)
    with pytest.raises(InputError, match="larger than 67,108,864 bytes"):
        read_template(tmp_path)
