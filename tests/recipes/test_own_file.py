"""Recipes in a file of the user's own, as the command line takes them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from mellum2_megatron.checkpoint.run_folder import RECIPE_FILE, write_run_folder
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Run, apply_overrides, from_yaml, to_yaml
from mellum2_megatron.planning.resolve import resolve_run
from mellum2_megatron.recipes import describe_recipes, recipe, recipe_origin, register
from mellum2_megatron.recipes.registry import _RECIPES

BASE = "mellum2_tiny_pretrain"
HEAD = f"""\
from dataclasses import replace
from mellum2_megatron.config import Run
from mellum2_megatron.recipes import recipe

base = recipe({BASE!r})
"""
TWO = (
    HEAD
    + """
def window() -> Run:
    \"\"\"A window of 32 keys.

    More lines.
    \"\"\"
    return replace(base, architecture=base.architecture.replace(sliding_window=32))

def faster():
    return replace(base, optimizer=replace(base.optimizer, lr=1e-3))

def _hidden():
    return base

def of_a_width(width: int) -> Run:
    return base

def parse(text="") -> str:
    return text
"""
)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    path = tmp_path / "my_recipes.py"
    path.write_text(TWO)
    return path


def test_a_recipe_gets_its_functions_name_and_description(two: Path) -> None:
    run, base = resolve_run(f"{two}:window", ["optimizer.lr=5e-4"]), recipe(BASE)
    assert (run.name, run.description) == ("window", "A window of 32 keys.")
    assert run.checkpoint.output == "runs/window"
    assert (run.architecture.sliding_window, run.optimizer.lr) == (32, 5e-4)
    assert run.schedule == base.schedule
    assert describe_recipes(two) == {
        "window": "A window of 32 keys.",
        "faster": f"Variant of {BASE}.",
    }


def test_a_changed_value_loses_the_parents_source(two: Path) -> None:
    run, base = recipe(f"{two}:faster"), recipe(BASE)
    assert run.source("optimizer.lr") == "recipe faster"
    assert base.source("optimizer.lr") != run.source("optimizer.lr")
    assert run.source("optimizer.weight_decay") == base.source("optimizer.weight_decay")


def test_a_name_and_description_of_its_own_stay(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(f"{HEAD}def f():\n    return replace(base, name='mine', description='Mine.')\n")
    run = recipe(str(path))
    assert (run.name, run.description) == ("mine", "Mine.")


def test_a_variant_of_another_function_of_the_file_has_its_own_text(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        f"{HEAD}def a():\n    return replace(base, name='a', description='A.')\n"
        "def b():\n    return replace(a(), seed=7)\n"
    )
    assert describe_recipes(path) == {"a": "A.", "b": "Variant of a."}
    assert recipe(f"{path}:b").name == "b"


def test_a_broken_recipe_does_not_block_another(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(f"{HEAD}def good():\n    return base\n\ndef bad():\n    return 1 / 0\n")
    assert recipe(f"{path}:good").name == "good"


def test_registered_variants_do_not_show_their_parents_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mellum2_megatron.recipes.registry._RECIPES", {**_RECIPES})

    @register
    def renamed() -> Run:
        return replace(recipe(BASE), name="renamed", seed=9)

    @register
    def documented() -> Run:
        """A seed of its own."""
        return replace(recipe(BASE), seed=9)

    described = describe_recipes()
    assert described["renamed"] == f"Variant of {BASE}."
    assert described["documented"] == "A seed of its own."
    assert recipe("documented").name == "documented"


def test_the_file_and_its_hash_are_the_source_of_the_name(two: Path) -> None:
    run = recipe(f"{two}:window")
    origin = recipe_origin(run)
    assert origin is not None
    assert (origin.path, origin.function) == (two, "window")
    assert origin.sha256 == hashlib.sha256(two.read_bytes()).hexdigest()
    # It survives run.yaml and later overrides, and a recipe of this project has none.
    assert recipe_origin(from_yaml(to_yaml(apply_overrides(run, ["seed=3"])))) == origin
    assert recipe_origin(recipe(BASE)) is None


def test_the_file_travels_into_the_run_folder(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mellum2_megatron.checkpoint.run_folder.copy_tokenizer", lambda *_: None)
    folder = tmp_path / "run"
    run = resolve_run(f"{two}:window", [], output=folder)
    write_run_folder(run)
    assert (folder / RECIPE_FILE).read_text() == TWO
    # A resume of that run on another machine, or after an edit, keeps the copy it started from.
    two.write_text("edited")
    write_run_folder(run)
    assert (folder / RECIPE_FILE).read_text() == TWO
    write_run_folder(resolve_run(BASE, [], output=folder))
    assert not (folder / RECIPE_FILE).exists()


def test_modules_beside_the_file_can_be_imported(tmp_path: Path) -> None:
    (tmp_path / "rates_of_mine.py").write_text("LR = 7e-4\n")
    path = tmp_path / "own.py"
    path.write_text(
        f"{HEAD}def f():\n    from rates_of_mine import LR\n"
        "    return replace(base, optimizer=replace(base.optimizer, lr=LR))\n"
    )
    assert recipe(str(path)).optimizer.lr == 7e-4
    assert not (tmp_path / "__pycache__" / "own.cpython-312.pyc").exists()


REFUSED = {
    "several_recipes": ("{file}", TWO, "2 recipes.*my_recipes.py:window, .*my_recipes.py:faster"),
    "unknown_name": ("{file}:windw", TWO, "no recipe 'windw'.*did you mean 'window'"),
    "needs_arguments": ("{file}:of_a_width", TWO, r"needs arguments \(width\).*default"),
    "no_function": ("{file}:base", TWO, "a value of type Run.*function that returns it"),
    "no_recipe": ("{file}", "X = 1\n", "has no recipe"),
    "returns_text": ("{file}:parse", TWO, "returns str, a recipe returns a Run"),
    "returns_nothing": ("{file}", "def f():\n    pass\n", "returns NoneType.*`return`"),
    "not_python": ("{file}", "def f(:\n", "my_recipes.py:1: it must be Python"),
    "fails_at_import": ("{file}", "\nimport no_such_module\n", "my_recipes.py:2: .*ModuleNotFound"),
    "fails_when_called": ("{file}", "def f():\n    return 1 / 0\n", "recipes.py:2: .*ZeroDivision"),
    "ends_the_process": ("{file}", "import sys\nsys.exit(3)\n", "my_recipes.py:2: .*SystemExit"),
    "refused_by_the_run": (
        "{file}",
        f"{HEAD}def f():\n    return replace(base, timeout_minutes=-1)\n",
        "my_recipes.py:7: timeout_minutes=-1",
    ),
    "without_the_ending": ("{stem}:window", TWO, "write .*my_recipes.py:window"),
    "missing": ("{folder}/nowhere.py:f", TWO, "nowhere.py.*No such file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_file_is_one_message_with_its_line(case: str, tmp_path: Path) -> None:
    word, content, message = REFUSED[case]
    file = tmp_path / "my_recipes.py"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        recipe(word.format(file=file, stem=file.with_suffix(""), folder=tmp_path))


def test_a_tilde_behind_a_key_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    keys = ("data.path", "data.cache", "data.tokenizer", "checkpoint.load", "checkpoint.output")
    run = resolve_run(BASE, [*(f"{key}=~/x" for key in keys), "data.train=[[1,~/y],[1,z~]]"])
    data, checkpoint = run.data, run.checkpoint
    paths = (data.path, data.cache, data.tokenizer, checkpoint.load, checkpoint.output)
    assert set(paths) == {"/home/me/x"}
    assert data.train == ((1.0, "/home/me/y"), (1.0, "z~"))
