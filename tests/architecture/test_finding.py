"""`architecture=`: a preset, a folder or a file, and what a folder without one must hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mellum2_megatron.architecture import PRESETS, find_architecture, to_hf_config
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import apply_overrides, from_yaml, overridden, to_yaml
from mellum2_megatron.recipes import recipe
from tests.architecture.variants import VARIANTS
from tests.cli.runner import mellum2

MODEL = VARIANTS["two_periods_yarn"]
CONFIG = json.dumps(to_hf_config(MODEL))
OURS = json.dumps(MODEL.to_dict())


def _write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder


def _iteration(folder: Path) -> Path:
    _write(folder, "architecture.json", OURS)
    _write(folder, "latest_checkpointed_iteration.txt", "7")
    (folder / "iter_0000007").mkdir()
    return folder / "iter_0000007"


FORMS: dict[str, Callable[[Path], Path]] = {
    "huggingface_folder": lambda folder: _write(folder, "config.json", CONFIG),
    "its_config": lambda folder: _write(folder, "config.json", CONFIG) / "config.json",
    "run_folder": lambda folder: _write(folder, "architecture.json", OURS),
    "its_architecture": lambda folder: (
        _write(folder, "architecture.json", OURS) / "architecture.json"
    ),
    "renamed": lambda folder: _write(folder, "my-model.json", CONFIG) / "my-model.json",
    "checkpoint": lambda folder: _iteration(folder).parent,
    "iteration": _iteration,
    "release_with_a_config": lambda folder: _write(folder / "release", "config.json", CONFIG),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_model(form: str, tmp_path: Path) -> None:
    path = FORMS[form](tmp_path / "model")
    architecture, origin = find_architecture(str(path))
    assert architecture == MODEL
    file = Path(origin.partition(", sha256 ")[0])
    assert origin.endswith(hashlib.sha256(file.read_bytes()).hexdigest())


def test_a_folder_replaces_the_model_and_overrides_change_it(tmp_path: Path) -> None:
    folder = FORMS["huggingface_folder"](tmp_path / "model")
    words = ["architecture.num_experts=16", f"architecture={folder}"]  # applied first, given last
    run = apply_overrides(recipe("mellum2_tiny_pretrain"), words)
    assert run.architecture == MODEL.replace(num_experts=16)
    source = run.sources["architecture"]
    assert source.startswith(f"override architecture={folder / 'config.json'}, sha256 ")
    # run.yaml has the whole model: the folder may go.
    (folder / "config.json").unlink()
    assert from_yaml(to_yaml(run)) == run
    assert overridden(run)[0].startswith(f"architecture={folder}")


def test_presets_come_before_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    FORMS["huggingface_folder"](tmp_path / "mellum2-12b")
    assert find_architecture("mellum2-12b") == (PRESETS["mellum2-12b"], "mellum2-12b")
    assert find_architecture("./mellum2-12b")[0] == MODEL


REFUSED: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "nothing_there": (lambda folder: folder, ["no preset, folder or file", "mellum2-12b-128k"]),
    "empty_folder": (
        lambda folder: _write(folder, "notes.txt", "x"),
        ["neither config.json", "notes.txt", "mellum2-tiny", "architecture.json (Megatron)"],
    ),
    "prepared_data": (lambda folder: _write(folder, "corpus.json", "{}"), ["a prepared corpus"]),
    "adapter": (
        lambda folder: _write(folder, "adapter_config.json", "{}"),
        ["LoRA adapter", "merge it"],
    ),
    "hub_cache": (
        lambda folder: _write(folder / "snapshots" / "abc", "config.json", CONFIG).parent.parent,
        ["snapshots/abc"],
    ),
    "another_file": (
        lambda folder: _write(folder, "run.yaml", "x") / "run.yaml",
        ["only config.json and architecture.json"],
    ),
    "pointer": (
        lambda folder: _write(folder, "config.json", "version https://git-lfs.github.com/spec/v1"),
        ["Git LFS pointer", "git lfs pull"],
    ),
    "half_a_file": (lambda folder: _write(folder, "config.json", CONFIG[:50]), ["valid JSON"]),
    "a_list": (lambda folder: _write(folder, "config.json", "[1]"), ["a JSON object"]),
    "another_model": (
        lambda folder: _write(folder, "config.json", '{"model_type": "qwen3_moe"}'),
        ["config.json", "model_type='qwen3_moe'"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_holds_no_model_is_refused_with_what_to_give(case: str, tmp_path: Path) -> None:
    make, named = REFUSED[case]
    path = make(tmp_path / "model")
    with pytest.raises(InputError) as refusal:
        apply_overrides(recipe("mellum2_tiny_pretrain"), [f"architecture={path}"])
    for text in named:
        assert text in str(refusal.value), (text, str(refusal.value))


@pytest.mark.parametrize("form", FORMS)
def test_info_describes_every_form(form: str, tmp_path: Path) -> None:
    path = FORMS[form](tmp_path / "model")
    result = mellum2("info", path, "--json")
    assert result.code == 0, result
    assert json.loads(result.out)["parameters"]["total"] == sum(
        parameter.numel for parameter in MODEL.parameters() if not parameter.mtp
    )


def test_info_takes_overrides_with_a_recipe_only(tmp_path: Path) -> None:
    path = FORMS["huggingface_folder"](tmp_path / "model")
    mellum2("info", path, "architecture.num_experts=16").refused(f"architecture={path} after it")
