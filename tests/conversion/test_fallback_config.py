"""The fallback configuration class against transformers' own, which is hidden for it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, MellumConfig, MellumForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conversion.huggingface import fallback_config
from conversion.huggingface.fallback_config import register_fallback_config
from tests.conversion.folders import SMALL


def without_mtp_fields() -> type:
    """Return the class of transformers 5.10 to 5.19: no MTP fields, and no alias of them."""

    class Older(MellumConfig):
        attribute_map = {"num_experts": "num_local_experts"}  # noqa: RUF012

    Older.__name__ = "MellumConfig"
    return Older


@pytest.fixture(params=["absent", "without MTP fields"])
def older_transformers(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    host = None if request.param == "absent" else without_mtp_fields()
    monkeypatch.setattr(fallback_config, "host_config", lambda: host)
    yield request.param
    CONFIG_MAPPING._extra_content.pop("mellum", None)


def plain(config: Any) -> dict[str, Any]:
    return json.loads(config.to_json_string(use_diff=False))


@pytest.mark.parametrize("mtp", [1, None])
def test_it_reads_a_config_as_transformers_does(
    mtp: int | None, older_transformers: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    changes = {"num_mtp_layers": mtp, "mtp_layer_types": None, "mtp_mlp_layer_types": None}
    MellumConfig(
        **SMALL | changes, architectures=["MellumForCausalLM"], dtype="bfloat16"
    ).save_pretrained(tmp_path)
    expected = AutoConfig.from_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert register_fallback_config()
    assert ("no MellumConfig" if older_transformers == "absent" else "no MTP fields") in caplog.text
    fallback = AutoConfig.from_pretrained(tmp_path)
    assert type(fallback) is not type(expected)
    assert plain(fallback) == plain(expected)
    assert (fallback.num_mtp_layers, fallback.num_experts) == (mtp, 3)
    fallback.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (
        tmp_path / "config.json"
    ).read_text()


def test_its_defaults_are_those_of_transformers(older_transformers: str):
    register_fallback_config()
    fallback = CONFIG_MAPPING["mellum"]
    assert plain(fallback()) == plain(MellumConfig())
    assert plain(fallback(num_mtp_layers=1)) == plain(MellumConfig(num_mtp_layers=1))
    assert {field.name for field in dataclasses.fields(MellumConfig)} <= {
        field.name for field in dataclasses.fields(fallback)
    }


def test_the_model_class_is_still_found(older_transformers: str):
    register_fallback_config()
    config = CONFIG_MAPPING["mellum"](
        **SMALL | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    )
    assert isinstance(AutoModelForCausalLM.from_config(config), MellumForCausalLM)


def test_a_complete_transformers_keeps_its_own(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        assert not register_fallback_config()
    assert "nothing registered" in caplog.text
    assert CONFIG_MAPPING["mellum"] is MellumConfig
