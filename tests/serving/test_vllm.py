"""vLLM itself on a CPU, against transformers in float32: tokens, log-probabilities, new weights.

Needs .venv-serve (`make test-serve`). One server serves all tests: it takes a minute to start.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

from mellum2_megatron.architecture import find_architecture
from mellum2_megatron.serving.client import Completion, Sampling
from mellum2_megatron.serving.command import curl_line
from mellum2_megatron.serving.server import HOST, VllmServer
from tests import REPOSITORY
from tests.cli.runner import mellum2
from tests.conversion.folders import load_tensors, save_tensors
from tests.conversion.test_generation import make_folder
from tests.small import python_like

PYTHON = Path(os.environ.get("SERVE_VENV", REPOSITORY / ".venv-serve")) / "bin/python"
PROMPTS = [list(range(10 + row, 60 + row)) for row in range(4)]

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON} (make setup-serve)"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Heads of 32 and experts in multiples of 32, as vLLM's kernels for a CPU need them.
    return make_folder(
        tmp_path_factory.mktemp("hf") / "model",
        hidden_size=64,
        head_dim=32,
        moe_intermediate_size=32,
        max_position_embeddings=256,
    )


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    with VllmServer(
        PYTHON,
        folder,
        find_architecture(str(folder))[0],
        log=log,
        reloadable=True,
        dtype="float32",
        more=("--enforce-eager",),
    ) as running:
        yield running


def check(folder: Path, answers: Sequence[Completion], *, greedy: bool) -> None:
    """Compare answers with transformers' forward pass over prompt and answer."""
    from transformers import MellumForCausalLM

    model = MellumForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer.tokens]])).logits[0, len(prompt) - 1 :]
        table = logits[:-1].log_softmax(-1)
        wanted = table.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(answer.log_probabilities), wanted, rtol=0, atol=1e-4
        )
        assert (table.argmax(-1).tolist() == list(answer.tokens)) == greedy


def test_greedy_tokens_are_those_of_transformers(folder: Path, server: VllmServer) -> None:
    sampling = Sampling(max_tokens=32, temperature=0, ignore_end=True)
    answers = server.client.complete(PROMPTS, sampling, timed=True)
    assert {len(answer.tokens) for answer in answers} == {32}
    check(folder, answers, greedy=True)
    assert all(0 < (answer.first_token or 0) < answer.seconds for answer in answers)
    whole = server.client.complete(PROMPTS, sampling)
    assert [answer.tokens for answer in whole] == [answer.tokens for answer in answers]
    assert server.client.draft_counts() is None


def test_sampled_tokens_have_the_model_s_own_log_probabilities(
    folder: Path, server: VllmServer
) -> None:
    sampling = Sampling(max_tokens=16, temperature=1.5, top_k=50, seed=3, ignore_end=True)
    answers = server.client.complete(PROMPTS, sampling)
    check(folder, answers, greedy=False)
    again = server.client.complete(PROMPTS, sampling)
    assert [answer.tokens for answer in again] == [answer.tokens for answer in answers]


def test_the_line_of_curl(folder: Path, server: VllmServer) -> None:
    port = urlsplit(server.client.url).port
    assert port is not None
    line = curl_line(folder, name="mellum2", host=HOST, port=port)
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60, check=True)
    (choice,) = json.loads(done.stdout)["choices"]
    assert choice["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("mode", ["sync", "throughput"])
def test_the_bench(folder: Path, tmp_path: Path, mode: str) -> None:
    (tmp_path / "texts.py").write_text("".join(map(python_like, range(20))))
    words = ("--engine", "vllm", "--python", PYTHON, "--mode", mode, "--batch", "3")
    sizes = ("--prompt", "60", "--output", "8", "--repeats", "2")
    out = tmp_path / "bench.json"
    result = mellum2(
        *("bench-inference", folder, *words, *sizes, "--no-dense"),
        *("--text", tmp_path / "texts.py", "--out", out),
    )
    assert result.code == 0, result
    report = json.loads(out.read_text())
    assert report["engine"].startswith("vllm 0.")
    assert report["peak_memory"]["plain"] > 1e8
    names = [figure["name"] for figure in report["arms"]["plain"]["figures"]]
    assert names == ["first token", "token", "request", "tokens a second"]


# The last test: the server has the other folder from here on.
def test_new_weights(folder: Path, server: VllmServer, tmp_path: Path) -> None:
    newer = make_folder(tmp_path / "newer", **json.loads((folder / "config.json").read_text()))
    tensors = load_tensors(newer)
    generator = torch.Generator().manual_seed(1)
    for tensor in tensors.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    save_tensors(newer, tensors)
    server.hand_over(newer)
    sampling = Sampling(max_tokens=16, temperature=0, ignore_end=True)
    check(newer, server.client.complete(PROMPTS, sampling), greedy=True)
