"""Optional packages, recognised by their content: on PyPI apex is another project."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mellum2_megatron.planning.optional_packages import (
    find_apex,
    find_deep_ep,
    find_optional_packages,
    find_resiliency,
    missing_dispatcher,
)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable folder in which apex is not hidden, as the CPU backend otherwise does."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]


def _package(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()


def test_missing_apex_is_absent(site: Path) -> None:
    assert find_apex().state == "absent"


def test_the_package_that_pip_install_apex_gives_is_recognised(site: Path) -> None:
    _package(site / "apex")
    found = find_apex()
    assert found.state == "wrong"
    assert "pip uninstall apex" in found.detail


def test_nvidia_apex_without_and_with_its_kernels(site: Path) -> None:
    _package(site / "apex")
    _package(site / "apex" / "multi_tensor_apply")
    assert find_apex().state == "present"
    assert "--cuda_ext" in find_apex().detail
    (site / "amp_C.py").touch()
    assert "amp_C" in find_apex().detail


@pytest.mark.parametrize(
    ("version", "state"), [("0.4.1", "wrong"), ("0.6.0", "present"), ("0.10.0", "present")]
)
def test_an_old_resiliency_extension_is_recognised(version: str, state: str, site: Path) -> None:
    assert find_resiliency().state == "absent"
    _package(site / "nvidia_resiliency_ext")
    metadata = site / f"nvidia_resiliency_ext-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: nvidia-resiliency-ext\nVersion: {version}\n")
    assert find_resiliency().state == state


def test_every_optional_package_is_reported_and_none_imported() -> None:
    before = set(sys.modules)
    names = [package.name for package in find_optional_packages()]
    assert names == [
        "Transformer Engine",
        "NVIDIA apex",
        "DeepEP",
        "FlashAttention",
        "NeMo-Run",
        "NVIDIA resiliency extension",
        "Megatron-Bridge",
        "Weights & Biases",
    ]
    assert not {"transformer_engine", "nemo_run", "wandb", "flash_attn"} & (
        set(sys.modules) - before
    )


def test_deep_ep_without_and_with_hybrid_ep(site: Path) -> None:
    assert find_deep_ep().state == "absent"
    _package(site / "deep_ep")
    importlib.invalidate_caches()
    assert missing_dispatcher("deepep") is None
    assert "has no HybridEP" in (missing_dispatcher("hybridep") or "")
    assert find_deep_ep().state == "present"
    (site / "deep_ep" / "hybrid_ep_buffer.py").touch()
    assert missing_dispatcher("hybridep") is None
    assert "hybridep" in find_deep_ep().detail
