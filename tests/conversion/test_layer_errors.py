"""Errors of each layer: the first wrong layer is the damaged one."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from conversion.verification.layer_errors import LayerError, compare_layers, type_summary
from conversion.verification.verify import VerifyReport, verify
from mellum2_megatron.architecture import PRESETS
from tests.conversion.folders import load_tensors, save_tensors

PLACES = ["embedding", "layer 0", "layer 1", "layer 2", "final norm", "mtp layer 0"]


def verified(folder: Path, checkpoint: Path) -> VerifyReport:
    return verify(
        checkpoint,
        folder,
        torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(3)),
    )


def test_equal_models_agree_at_every_place(hf_folder: Path, checkpoint: Path) -> None:
    report = verified(hf_folder, checkpoint)
    assert [layer.name for layer in report.layers] == PLACES
    assert report.first_departing is None
    assert report.layers[0].max_error == 0.0  # a lookup rounds nothing
    assert all(layer.relative_error < 1e-5 for layer in report.layers)
    kinds = [
        "embedding",
        "sliding_attention",
        "full_attention",
        "final norm",
        "mtp sliding_attention",
    ]
    assert list(type_summary(report.layers)) == kinds


@pytest.mark.parametrize(
    ("tensor", "place"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.0.mlp.experts.0.up_proj.weight", "layer 0"),
        ("model.layers.1.self_attn.k_norm.weight", "layer 1"),
        ("model.layers.2.mlp.gate.weight", "layer 2"),
        ("model.norm.weight", "final norm"),
        ("mtp.layers.0.self_attn.v_proj.weight", "mtp layer 0"),
        ("mtp.fc.weight", "mtp layer 0"),
    ],
)
def test_the_first_layer_that_departs_is_the_damaged_one(
    tensor: str, place: str, hf_folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(hf_folder, tmp_path / "copy"))
    tensors = load_tensors(folder)
    tensors[tensor].copy_(tensors[tensor].flip(0))
    save_tensors(folder, tensors)
    report = verified(folder, checkpoint)
    assert report.first_departing is not None
    assert report.first_departing.name == place
    assert report.to_dict()["first_departing"] == place
    assert place in str(report.layer_table().title)
    assert not report.ok


def test_errors_are_those_of_the_definition() -> None:
    architecture = PRESETS["mellum2-tiny"]
    reference = torch.tensor([[[0.0, 4.0], [1.0, 0.0]]])
    (error,) = compare_layers(
        {"layer 3": reference + torch.tensor([0.0, 0.5])}, {"layer 3": reference}, architecture
    )
    assert error == LayerError(
        name="layer 3", kind="full_attention", max_error=0.5, mean_error=0.25, relative_error=0.125
    )
    with pytest.raises(RuntimeError, match="layer 3"):
        compare_layers(
            {"layer 3": reference}, {"layer 3": torch.cat([reference, reference])}, architecture
        )


def test_a_nan_is_the_worst_of_its_type() -> None:
    layers = [
        LayerError(
            name=f"layer {i}",
            kind="full_attention",
            max_error=value,
            mean_error=value,
            relative_error=value,
        )
        for i, value in enumerate((1e-9, math.nan, 1e-7))
    ]
    assert math.isnan(type_summary(layers)["full_attention"].max_error)
    assert type_summary(layers[::2])["full_attention"].max_error == 1e-7
    assert type_summary(layers[::2])["full_attention"].name == "2 layers"
