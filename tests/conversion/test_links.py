"""A file that links out of its folder is refused, wherever the folder is read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from conversion.convert import export_hf, import_hf
from mellum2_megatron.architecture import find_architecture
from mellum2_megatron.checkpoint.safe_metadata import read_metadata
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.model_folders import check_inside
from mellum2_megatron.data.tokens.tokenizer import configured_tokens, copy_tokenizer, load_tokenizer

REFUSED = "a link may not leave the model's folder. Fix: copy the file itself"


def move_out(file: Path) -> None:
    """Put a link in place of a file, which moves out of its folder."""
    outside = file.parent.parent / f"outside-{file.name}"
    file.rename(outside)
    file.symlink_to(os.path.relpath(outside, file.parent))


def test_config_json(hf_copy: Path, tmp_path: Path) -> None:
    move_out(hf_copy / "config.json")
    for read in (
        lambda: import_hf(hf_copy, tmp_path / "x"),
        lambda: find_architecture(str(hf_copy)),
    ):
        with pytest.raises(InputError, match=REFUSED):
            read()
    assert not (tmp_path / "x").exists()
    # A file that the user names may be a link.
    assert find_architecture(str(hf_copy / "config.json"))


@pytest.mark.parametrize("name", ["architecture.json", "release/.metadata", "release/__0_0.distcp"])
def test_files_of_a_checkpoint(name: str, checkpoint_copy: Path, tmp_path: Path) -> None:
    move_out(checkpoint_copy / name)
    with pytest.raises(InputError, match=REFUSED):
        export_hf(checkpoint_copy, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_imported_checkpoint_holds_no_path(checkpoint: Path) -> None:
    metadata = read_metadata(checkpoint / "release")
    assert metadata.storage_meta is not None
    assert metadata.storage_meta.checkpoint_id is None
    assert str(checkpoint.parent).encode() not in (checkpoint / "release/.metadata").read_bytes()


def test_files_of_a_tokenizer(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder = tmp_path / name.removesuffix(".json")
        folder.mkdir()
        (folder / name).write_text("{}")
        move_out(folder / name)
        with pytest.raises(InputError, match=REFUSED):
            copy_tokenizer(folder, tmp_path / "x")
        with pytest.raises(InputError, match=REFUSED):
            load_tokenizer(folder) if name == "tokenizer.json" else configured_tokens(folder, "x")


def test_the_hub_cache_is_one_folder(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a/snapshots/1", tmp_path / "models--a/blobs"
    other = tmp_path / "models--b/blobs"
    for folder in (snapshot, blobs, other, snapshot.parent / "2", tmp_path / "snapshots/c"):
        folder.mkdir(parents=True)
    for file in (blobs / "7", other / "7", snapshot.parent / "2/f"):
        file.write_text("x")
    for number, target in enumerate(("../../blobs/7", "../2/f")):
        (snapshot / str(number)).symlink_to(target)
        check_inside(snapshot, snapshot / str(number))
    (snapshot / "other").symlink_to("../../../models--b/blobs/7")
    with pytest.raises(InputError, match=REFUSED):
        check_inside(snapshot, snapshot / "other")
    # A folder of that name alone is no cache.
    (tmp_path / "snapshots/d").write_text("x")
    (tmp_path / "snapshots/c/f").symlink_to("../d")
    with pytest.raises(InputError, match=REFUSED):
        check_inside(tmp_path / "snapshots/c", tmp_path / "snapshots/c/f")


def test_a_circle_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(InputError, match="the link leads nowhere"):
        check_inside(tmp_path, tmp_path / "a")


def test_a_linked_folder_is_read(hf_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(shutil.move(hf_copy, tmp_path / "moved"))
    assert find_architecture(str(tmp_path / "link"))
