"""An MTP head that `save_pretrained` dropped is restored byte by byte, on its own model only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MellumForCausalLM
from transformers.modeling_layers import MtpModel

from conversion.convert import import_hf, stitch_mtp
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
