"""The patching machinery, on a package made for the purpose."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.upstream import patching
from mellum2_megatron.upstream.patching import Patch


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package `hostpkg`: `base.greet`, bound in `user` and, by an import cycle, in `early`."""
    package = tmp_path / "hostpkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "base.py").write_text(
        "def greet():\n    return 'hello'\n\n"
        "class Thing:\n    def __init__(self): self.made = 'plainly'\n"
        "    @classmethod\n    def kind(cls): return cls.__name__\n\n"
        "FLAG = False\n"
        "from hostpkg import early\n"
    )
    (package / "early.py").write_text("from hostpkg.base import greet\nFLAG = False\n")
    (package / "user.py").write_text("from hostpkg.base import greet, FLAG\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(patching, "_applied", set())
    monkeypatch.setattr(patching._after_import, "callbacks", {})
    yield "hostpkg"
    for name in [name for name in sys.modules if name.partition(".")[0] == "hostpkg"]:
        del sys.modules[name]


def make(name: str, target: str, replacement: Any, **changes: Any) -> Patch:
    # pytest stands for the distribution: any that is installed will do.
    settings = {"versions": ">0", "distribution": "pytest", "why": "a test"} | changes
    return Patch(name=name, target=target, replacement=replacement, **settings)


def louder(original: Any) -> Any:
    return lambda: original().upper()


@pytest.mark.parametrize("imported_first", [False, True], ids=["before-import", "after-import"])
def test_function_is_replaced_everywhere(host: str, imported_first: bool) -> None:
    patch = make("greet", "hostpkg.base:greet", louder)
    if imported_first:
        importlib.import_module("hostpkg.user")
    patching.install([patch])
    user = importlib.import_module("hostpkg.user")
    base, early = sys.modules["hostpkg.base"], sys.modules["hostpkg.early"]
    assert base.greet() == user.greet() == early.greet() == "HELLO"


def test_installing_twice_applies_once(host: str) -> None:
    patch = make("greet", "hostpkg.base:greet", lambda original: lambda: original() + "!")
    patching.install([patch])
    patching.install([patch])
    importlib.import_module("hostpkg.base")
    patching.install([patch])
    assert sys.modules["hostpkg.base"].greet() == "hello!"


def test_two_patches_of_one_object_stack(host: str) -> None:
    asking = make("b", "hostpkg.base:greet", lambda original: lambda: original() + "?")
    patching.install([make("a", "hostpkg.base:greet", louder), asking])
    assert importlib.import_module("hostpkg.user").greet() == "HELLO?"


def test_methods_and_flags_are_replaced(host: str) -> None:
    def made_otherwise(original: Any) -> Any:
        def init(self: Any) -> None:
            original(self)
            self.made += ", and patched"

        return init

    patching.install(
        [
            make("init", "hostpkg.base:Thing.__init__", made_otherwise),
            make(
                "kind",
                "hostpkg.base:Thing.kind",
                lambda kind: classmethod(lambda cls: kind.__func__(cls) * 2),
            ),
            make("flag", "hostpkg.base:FLAG", lambda original: not original),
        ]
    )
    base = importlib.import_module("hostpkg.base")
    assert base.Thing().made == "plainly, and patched"
    assert base.Thing.kind() == "ThingThing"
    assert base.FLAG is True
    assert importlib.import_module("hostpkg.user").FLAG is True
    assert sys.modules["hostpkg.early"].FLAG is False, (
        "a constant of the same name elsewhere is not this one"
    )


def test_unknown_version_is_refused_before_anything_is_patched(host: str) -> None:
    base = importlib.import_module("hostpkg.base")
    good = make("greet", "hostpkg.base:greet", louder)
    bad = make("flag", "hostpkg.base:FLAG", lambda _: True, versions="==0.0.1")
    with pytest.raises(
        InputError, match=r"'flag' was written for pytest ==0.0.1.*install pytest==0.0.1"
    ):
        patching.install([good, bad])
    assert base.greet() == "hello"


def test_a_target_that_is_gone_is_an_error(host: str) -> None:
    importlib.import_module("hostpkg.base")
    with pytest.raises(KeyError, match="farewell"):
        patching.install([make("gone", "hostpkg.base:farewell", louder)])


def test_modules_load_as_they_would_without_the_hook(host: str) -> None:
    patching.install([make("greet", "hostpkg.base:greet", louder)])
    base = importlib.import_module("hostpkg.base")
    loader: Any = base.__loader__
    assert str(base.__file__).endswith("base.py")
    assert "hello" in loader.get_source("hostpkg.base")
