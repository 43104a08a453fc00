"""`import conversion.bridge` without Megatron-Bridge: its error, and classes Bridge may build."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from megatron.training.config.instantiate_utils import instantiate, target_allowlist

from mellum2_megatron.checkpoint.bridge_config import PROVIDER
from mellum2_megatron.common.errors import InputError

OLD_PROVIDER = "conversion.bridge_model.Mellum2ModelProvider"
"""Written into run_config.yaml by earlier versions of this project; it must stay readable."""

MODULES = ("conversion.bridge", "conversion.bridge.register", "conversion.bridge_model")


class Provider:
    """Stands for the provider, which needs Megatron-Bridge."""


@pytest.fixture
def without_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The modules of the integration not imported, and not left behind."""
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    allowed = target_allowlist.allowed_exact
    yield
    for name in MODULES:
        sys.modules.pop(name, None)
    for target in target_allowlist.allowed_exact - allowed:
        target_allowlist.remove_exact(target)


@pytest.fixture
def provider_alone(monkeypatch: pytest.MonkeyPatch, without_modules: None) -> None:
    """`conversion.bridge.model` with a provider that needs no Bridge."""
    model = ModuleType("conversion.bridge.model")
    model.Mellum2Bridge = model.Mellum2ModelProvider = Provider  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "conversion.bridge.model", model)


# Megatron instantiates with omegaconf, which comes with Megatron-Bridge (`make test-te`).
@pytest.mark.te
@pytest.mark.parametrize("target", [PROVIDER, OLD_PROVIDER])
def test_bridge_builds_the_provider_under_its_present_and_its_old_path(
    target: str, provider_alone: None
) -> None:
    with pytest.raises(Exception, match="not in the allowlist"):
        instantiate({"_target_": target})
    importlib.import_module("conversion.bridge")
    assert isinstance(instantiate({"_target_": target}), Provider)


def test_only_the_provider_is_allowed(provider_alone: None) -> None:
    before = target_allowlist.allowed_exact
    importlib.import_module("conversion.bridge")
    assert target_allowlist.allowed_exact - before == {PROVIDER, OLD_PROVIDER}


def test_without_bridge_the_import_names_the_scripts(
    monkeypatch: pytest.MonkeyPatch, without_modules: None
) -> None:
    monkeypatch.setitem(sys.modules, "conversion.bridge.model", None)
    with pytest.raises(ImportError, match=r"setup_te\.sh and scripts/setup_bridge\.sh") as caught:
        importlib.import_module("conversion.bridge")
    assert isinstance(caught.value, InputError)
