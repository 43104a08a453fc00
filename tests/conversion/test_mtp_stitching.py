"""An MTP head that `save_pretrained` dropped is restored byte by byte, on its own model only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MellumForCausalLM
from transformers.modeling_layers import MtpModel

from conversion.convert import import_hf, stitch_mtp
from conversion.release.check_release import check_release
from conversion.release.release import ReleaseResult
from mellum2_megatron.common.errors import InputError
from tests.conversion.folders import VARIANTS, load_tensors, save_tensors, unfused, write_folder


@pytest.fixture
def lost(hf_folder: Path, tmp_path: Path) -> Path:
    """`hf_folder` saved by transformers: without the head that its config still announces."""
    folder = tmp_path / "lost"
    MellumForCausalLM.from_pretrained(hf_folder, dtype=torch.bfloat16).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert not [name for name in load_tensors(folder) if name.startswith("mtp.")]
    return folder


@pytest.mark.parametrize("announced", [True, False])
def test_the_head_comes_back(announced: bool, lost: Path, hf_folder: Path, tmp_path: Path) -> None:
    tensors = load_tensors(lost)
    tensors["model.norm.weight"] += 1  # trained on meanwhile
    save_tensors(lost, tensors)
    if not announced:
        config = json.loads((lost / "config.json").read_text())
        config |= {"num_nextn_predict_layers": 0, "num_mtp_layers": 0, "mtp_layer_types": []}
        (lost / "config.json").write_text(json.dumps(config))
    before = {path: path.read_bytes() for path in [*lost.iterdir(), *hf_folder.iterdir()]}
    report = stitch_mtp(hf_folder, lost, tmp_path / "out")
    expected = load_tensors(hf_folder) | {"model.norm.weight": tensors["model.norm.weight"]}
    stitched = load_tensors(tmp_path / "out")
    assert stitched.keys() == expected.keys()
    assert all(torch.equal(stitched[name], expected[name]) for name in expected)
    assert report.tensors == len(expected)
    assert {path: path.read_bytes() for path in before} == before
    head = MtpModel.from_pretrained(
        MellumForCausalLM.from_pretrained(tmp_path / "out")
    ).state_dict()
    assert torch.equal(head["layers.0.eh_proj.weight"].bfloat16(), expected["mtp.fc.weight"])
    import_hf(tmp_path / "out", tmp_path / "megatron")  # a complete model, manifest included


def test_a_float32_trunk_gets_the_head_without_loss(
    lost: Path, hf_folder: Path, tmp_path: Path
) -> None:
    save_tensors(lost, {name: tensor.float() for name, tensor in load_tensors(lost).items()})
    stitch_mtp(hf_folder, lost, tmp_path / "out")
    stitched, head = load_tensors(tmp_path / "out"), load_tensors(hf_folder)
    assert torch.equal(stitched["mtp.fc.weight"], head["mtp.fc.weight"].float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (VARIANTS["no_mtp"], "has no MTP head"),
        ({"sliding_window": 6}, r"sliding_window=6 in .*, 5 in"),
        ({"num_experts": 4}, r"num_experts=4 in .*, 3 in"),
        ({"layer_types": ["sliding_attention"] * 3}, r"layer_types=.*full_attention"),
    ],
)
def test_head_of_another_model_is_refused(
    changes: dict[str, Any], message: str, lost: Path, tmp_path: Path
) -> None:
    other = write_folder(tmp_path / "other", changes)
    with pytest.raises(InputError, match=message):
        stitch_mtp(other, lost, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_invalid_stitching_is_refused(lost: Path, hf_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only a lost one is put back"):
        stitch_mtp(hf_folder, hf_folder, tmp_path / "out")
    precise = write_folder(tmp_path / "precise", dtype=torch.float32)
    with pytest.raises(InputError, match="not rounded in passing"):
        stitch_mtp(precise, lost, tmp_path / "out")
    for taken in (lost, hf_folder):
        with pytest.raises(InputError, match="source"):
            stitch_mtp(hf_folder, lost, taken, overwrite=True)
    tensors = unfused(load_tensors(hf_folder))
    tensors["mtp.fc.weight"][0, 0] = float("nan")
    save_tensors(precise, tensors)
    with pytest.raises(InputError, match=r"mtp\.fc\.weight' has 1 of"):
        stitch_mtp(precise, lost, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_release_saved_over_by_transformers_is_whole_again(
    released: ReleaseResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every file is the original, to the byte; hidden files and programs stay behind."""
    original = released.path
    damaged = Path(shutil.copytree(original, tmp_path / "damaged"))
    MellumForCausalLM.from_pretrained(original, dtype=torch.bfloat16).save_pretrained(damaged)
    shutil.copyfile(original / "generation_config.json", damaged / "generation_config.json")
    (damaged / "assets").mkdir()
    (damaged / "assets" / "logo.svg").write_text("<svg/>")
    (damaged / "training_args.bin").write_bytes(b"pickle")
    (damaged / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    with pytest.raises(InputError, match=r"convert stitch-mtp SRC .*damaged"):
        import_hf(damaged, tmp_path / "megatron")
    assert "stitch-mtp" in str(check_release(damaged, skip_run=True))
    stitch_mtp(original, damaged, tmp_path / "out")
    assert caplog.messages == ["left out, because they can run code: training_args.bin"]
    restored = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*")}
    assert restored == {
        *(path.relative_to(original) for path in original.iterdir() if "." in path.name),
        Path("assets/logo.svg"),
    }
    for path in original.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path
    assert check_release(tmp_path / "out", skip_run=True).ok


def test_a_trunk_trained_since_is_named_and_its_card_dropped(
    released: ReleaseResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = released.path
    trained = Path(shutil.copytree(original, tmp_path / "trained"))
    model = MellumForCausalLM.from_pretrained(original, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(trained)
    stitch_mtp(original, trained, tmp_path / "out")
    old, left_out = caplog.messages
    assert "model.norm.weight changed since" in old
    assert "verification.json is left out" in left_out
    assert not (tmp_path / "out" / "verification.json").exists()
    assert check_release(tmp_path / "out", skip_run=True).ok
    # Without the lost head in it a manifest is believed: the same change is then damage.
    manifest = trained / "weights_manifest.json"
    records = json.loads(manifest.read_text())["weights"]
    kept = [record for record in records if not record["name"].startswith("mtp.")]
    manifest.write_text(json.dumps({"weights": kept}))
    with pytest.raises(InputError, match=r"'model\.norm\.weight' has SHA-256"):
        stitch_mtp(original, trained, tmp_path / "again")


def test_a_new_folder_gets_what_save_pretrained_does_not_write(
    released: ReleaseResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original, saved = released.path, tmp_path / "saved"
    MellumForCausalLM.from_pretrained(original, dtype=torch.bfloat16).save_pretrained(saved)
    stitch_mtp(original, saved, tmp_path / "out")
    (line,) = caplog.messages
    assert "taken from" in line
    assert all(name in line for name in ("LICENSE", "README.md", "tokenizer.json"))
    assert check_release(tmp_path / "out", skip_run=True).ok
