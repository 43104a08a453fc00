"""Each kind of folder that can be mistaken for a model gets a message that leads to one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.model_folders import (
    kind_of,
    not_checkpoint,
    not_huggingface,
    refuse_lfs_pointers,
)

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def _files(**content: str) -> Callable[[Path], Path]:
    """Return a maker of a folder of files; ``__`` in a name is a dot, ``_in_`` a slash."""

    def make(folder: Path) -> Path:
        for name, text in content.items():
            file = folder / name.replace("_in_", "/").replace("__", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return folder

    return make


def _iteration(folder: Path) -> Path:
    (folder / "iter_0000100").mkdir()
    return folder / "iter_0000100"


def _released_by_name(folder: Path) -> Path:
    return _files(release_in_config__json="{}")(folder) / "release"


ADAPTER = json.dumps({"base_model_name_or_path": "JetBrains/Mellum2", "peft_type": "LORA"})
KINDS: dict[str, tuple[Callable[[Path], Path], str, str, str]] = {
    # kind: how to make it, the fix where Hugging Face is wanted, the fix where Megatron is wanted
    "huggingface": (_files(config__json="{}"), "huggingface", "", "mellum2 convert import"),
    "a_huggingface_folder_named_release": (_released_by_name, "huggingface", "", "convert import"),
    "checkpoint": (
        _files(latest_checkpointed_iteration__txt="5", architecture__json="{}"),
        "checkpoint",
        "mellum2 convert export --megatron-path",
        "",
    ),
    "one_iteration": (_iteration, "checkpoint", "mellum2 convert export", ""),
    "run_without_checkpoint": (_files(run__yaml="name: x"), "run", "first save", "first save"),
    "adapter": (
        _files(adapter_config__json=ADAPTER, config__json="{}"),
        "adapter",
        "merge it into JetBrains/Mellum2",
        "merge it into JetBrains/Mellum2",
    ),
    "hub_cache": (
        _files(refs_in_main="abc", snapshots_in_abc_in_config__json="{}"),
        "hub cache",
        "snapshots/abc",
        "snapshots/abc",
    ),
    "data": (_files(corpus__json="{}"), "data", "data.path", "data.path"),
    "weights_alone": (_files(model__safetensors="x"), "unknown", "complete", "complete"),
    "anything_else": (_files(notes__txt="x"), "unknown", "complete folder", "complete folder"),
    "missing": (lambda folder: folder / "x", "missing", "path of a model", "path of a model"),
    "file": (
        lambda folder: _files(architecture__json="{}")(folder) / "architecture.json",
        "file",
        "give its folder",
        "give its folder",
    ),
    "lfs_pointer": (
        lambda folder: _files(model__safetensors=POINTER)(folder) / "model.safetensors",
        "lfs pointer",
        "git lfs pull",
        "git lfs pull",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_recognised_and_leads_to_a_model(name: str, tmp_path: Path) -> None:
    make, kind, for_huggingface, for_megatron = KINDS[name]
    path = make(tmp_path)
    assert kind_of(path) == kind
    for error, fix in (
        (not_huggingface(path), for_huggingface),
        (not_checkpoint(path), for_megatron),
    ):
        if not fix:
            assert error is None
        else:
            assert error is not None
            assert fix in error.fix
            assert str(path) in error.value


def test_the_command_names_the_run_not_its_iteration(tmp_path: Path) -> None:
    error = not_huggingface(_iteration(tmp_path))
    assert error is not None
    assert f"--megatron-path {tmp_path}/iter_0000100 --hf-path {tmp_path}-hf" in error.fix


def test_a_name_of_the_hub_leads_to_its_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = not_huggingface(Path("JetBrains/Mellum2"))
    assert error is not None
    assert "hf download JetBrains/Mellum2" in error.fix


def test_lfs_pointers_are_refused_together(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_text(POINTER)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"model-1.safetensors \(and 1 more\).*Git LFS pointer"):
        refuse_lfs_pointers(sorted(tmp_path.iterdir()))
