"""The angles of rotary tables against transformers, where YaRN's ramp has room: 64 frequencies."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from transformers import MellumConfig
from transformers.models.mellum.modeling_mellum import MellumRotaryEmbedding

from mellum2_megatron.architecture import PRESETS, RopeParameters, to_hf_config
from mellum2_megatron.model.rotary import RotaryTable

pytestmark = pytest.mark.usefixtures("megatron_world")

MODEL = PRESETS["mellum2-12b-128k"]
YARN = MODEL.rope_full_attention
CHANGES: dict[str, dict[str, Any]] = {
    "released": {},
    "beta_fast": {"beta_fast": 20.0},
    "beta_slow": {"beta_slow": 3.0},
    "not_truncated": {"truncate": False},
    "not_truncated_other_betas": {"beta_fast": 20.0, "beta_slow": 3.0, "truncate": False},
    "original_context": {"original_max_position_embeddings": 4096},
    "factor": {"factor": 4.0},
    "theta": {"rope_theta": 10_000.0},
}


def transformers_frequencies(rope: RopeParameters) -> torch.Tensor:
    """Return the angles of one position, `[d / 2]`."""
    config = MellumConfig(**to_hf_config(MODEL.replace(rope_full_attention=rope), "float32"))
    frequencies: torch.Tensor = MellumRotaryEmbedding(config).full_attention_inv_freq
    return frequencies


def frequencies(rope: RopeParameters) -> torch.Tensor:
    """Return the angles of one position, `[d / 2]`, from the table that the model uses."""
    angles = RotaryTable(rope, MODEL.head_dim)(2, packed=False, cp_group=None)[1, 0, 0]
    first, second = angles.chunk(2)
    assert torch.equal(first, second)
    return first


@pytest.mark.parametrize("change", CHANGES)
def test_frequencies_are_transformers(change: str) -> None:
    rope = dataclasses.replace(YARN, **CHANGES[change])
    expected = transformers_frequencies(rope)
    assert expected.shape == (MODEL.head_dim // 2,)
    torch.testing.assert_close(frequencies(rope), expected, rtol=1e-6, atol=0)


def test_every_field_changes_the_frequencies() -> None:
    """So that the comparison above can fail for each of them."""
    tables = {
        name: transformers_frequencies(dataclasses.replace(YARN, **change))
        for name, change in CHANGES.items()
    }
    for one, other in itertools.combinations(tables, 2):
        largest = ((tables[one] - tables[other]) / tables[one]).abs().max()
        assert largest > 1e-3, (one, other)
