"""Every file of a folder damaged in every way: one InputError, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conversion.convert import export_hf, import_hf, roundtrip, stitch_mtp
from conversion.release.check_release import check_release
from conversion.release.release import release
from conversion.verification.megatron_scoring import load_megatron_model
from mellum2_megatron.common.errors import InputError, Mellum2Error

Damage = Callable[[Path], None]


def write(data: bytes) -> Damage:
    return lambda path: path.write_bytes(data) and None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def link_out(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


def link_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/file")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Damage] = {
    "empty": write(b""),
    "truncated": truncate,
    "null": write(b"null"),
    "list": write(b"[]"),
    "number": write(b"1"),
    "object": write(b"{}"),
    "binary": write(bytes(range(256))),
    "half_a_character": write(b'{"a": "\\ud83d"}'),
    "link_out": link_out,
    "link_nowhere": link_nowhere,
    "folder": make_folder,
    "missing": Path.unlink,
}


def refused_or_done(result: Path, act: Callable[..., object], *args: Path, **options: Any) -> str:
    """Return the message of a refusal, which leaves nothing; empty if it was done."""
    try:
        act(*args, **options)
    except Mellum2Error as error:
        assert not result.exists()
        assert not list(result.parent.glob(f".{result.name}*"))
        return str(error)
    return ""


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_of_a_model_folder(damage: str, chat_model: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        folder = Path(shutil.copytree(chat_model, tmp_path / name))
        DAMAGES[damage](folder / name)
        out = tmp_path / "out"
        messages = [
            refused_or_done(out, roundtrip, folder),
            refused_or_done(out, stitch_mtp, folder, folder, out),
            refused_or_done(out, check_release, folder, skip_run=True),
            refused_or_done(out, import_hf, folder, out),
        ]
        assert messages[1]  # it has its head, if it can be read
        # A model without a tokenizer converts; one that cannot be read is no tokenizer.
        tolerated = name == "tokenizer_config.json" or (
            name == "tokenizer.json" and damage in ("link_nowhere", "folder", "missing")
        )
        if not tolerated:
            assert str(folder) in messages[0], messages
            assert str(folder) in messages[3], messages
        shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_of_a_checkpoint(
    damage: str, chat_checkpoint: Path, template: Path, tmp_path: Path
) -> None:
    for name in (
        "architecture.json",
        "latest_checkpointed_iteration.txt",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "release/metadata.json",
        "release/.metadata",
        "release/weights_manifest.json",
    ):
        folder = Path(shutil.copytree(chat_checkpoint, tmp_path / name.replace("/", "_")))
        DAMAGES[damage](folder / name)
        out = tmp_path / "out"
        message = refused_or_done(out, export_hf, folder, out)
        shutil.rmtree(out, ignore_errors=True)
        options = {"member": "instruct", "chat_template": template, "skip_run": True}
        refused_or_done(out, release, folder, out, **options)
        shutil.rmtree(out, ignore_errors=True)
        absent = damage in ("link_nowhere", "folder", "missing")
        if name.endswith(("tokenizer_config.json", "weights_manifest.json")):
            continue  # copied as it is; may be absent
        if name.endswith("tokenizer.json") and absent:
            continue
        assert str(folder) in message, (name, message)


def test_weights_that_cannot_be_read_are_one_message(
    checkpoint_copy: Path, megatron_world: None
) -> None:
    """Megatron's loader raises an exception of its own, with a traceback of every rank."""
    file = checkpoint_copy / "release" / "__1_0.distcp"
    file.write_bytes(b"?" * file.stat().st_size)
    with pytest.raises(InputError, match="release: its tensors must be readable"):
        load_megatron_model(checkpoint_copy)


def test_tokenizer_larger_than_the_model_is_refused_at_the_import(
    chat_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(chat_model, tmp_path / "hf"))
    values = json.loads((folder / "tokenizer.json").read_text())
    last = dict(values["added_tokens"][-1], id=320, content="<one_more>")
    values["added_tokens"].append(last)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="token id 320"):
        import_hf(folder, tmp_path / "megatron")
