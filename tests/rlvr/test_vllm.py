"""Training on the answers of vLLM itself, on a CPU: new weights arrive, and its death is told.

Needs .venv-serve (`make test-serve`).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch

from mellum2_megatron.architecture import find_architecture
from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.config import Run
from mellum2_megatron.rollouts.engine import Prompt
from mellum2_megatron.rollouts.trainer import ENGINE_FOLDER
from mellum2_megatron.rollouts.vllm_engine import VllmEngine
from mellum2_megatron.serving.client import Sampling
from mellum2_megatron.serving.server import VllmServer, free_port
from tests import REPOSITORY
from tests.conversion.folders import load_tensors
from tests.distributed import DistributedError
from tests.faults.test_faults import ranks
from tests.rlvr.test_training import numbers, run_on, write_tasks
from tests.serving.test_vllm import (
    PROMPTS,
    PYTHON,
    check,
    folder,  # noqa: F401  # a fixture
)
from tests.training.test_train import train

START_S = 600.0
"""Seconds of a run whose server starts on a busy machine."""
MELLUM2 = str(Path(sys.executable).with_name("mellum2"))

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON} (make setup-serve)"),
]


def test_weights_arrive_and_a_killed_server_is_told(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The answers are those of transformers with the same weights, and then with other ones."""
    architecture, _ = find_architecture(str(folder))
    served = shutil.copytree(folder, tmp_path / "served")
    server = VllmServer(
        *(PYTHON, served, architecture),
        log=tmp_path / "log",
        reloadable=True,
        dtype="float32",
        eager_on_cpu=True,
    )
    engine = VllmEngine(server.client.url, served, architecture, (), writes=True, server=server)
    weights = load_tensors(folder)
    prompts = [Prompt(place=f"p:{ids[0]}", tokens=tuple(ids), seed=ids[0]) for ids in PROMPTS]
    generator = torch.Generator().manual_seed(1)
    try:
        for _ in range(2):
            engine.load(weights)
            written = engine.write(prompts, answers=2, max_tokens=8)
            greedy = Sampling(max_tokens=16, temperature=0, ignore_end=True)
            check(served, server.client.complete(PROMPTS, greedy), greedy=True)
            for answer in range(2):
                check(served, [some[answer] for some in written], greedy=False)
            assert written == engine.write(prompts, answers=2, max_tokens=8)
            assert all(some[0] != some[1] for some in written)
            for tensor in weights.values():
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
        assert server._process is not None
        os.killpg(server._process.pid, signal.SIGKILL)
        with pytest.raises(WorkError, match=r"the engine is gone: .* resumes from its last"):
            engine.write(prompts, answers=2, max_tokens=8)
    finally:
        engine.close()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("words", "steps", "age"),
    [([], 3, 0), (["rl.ahead=1"], 3, 1), (["rl.hand_over=restart"], 2, 0)],
    ids=["synchronous", "age_1", "restarted"],
)
def test_a_run_learns_from_its_answers(
    tmp_path: Path, words: list[str], steps: int, age: int
) -> None:
    # Heads of 32, as vLLM's kernels need them, and steps so long that answers of former weights
    # show in rl/kl.
    served = ["architecture.head_dim=32", "rl.engine=vllm", f"rl.server_python={PYTHON}"]
    rates = ["optimizer.lr=0.02", "optimizer.min_lr=0.02"]
    others = ["rl.eval_answers=0", f"schedule.horizon_samples={16 * steps}", *words]
    run = run_on(
        write_tasks(tmp_path), tmp_path / "run", *served, *rates, *others, *words, steps=steps
    )
    logged = numbers(train(run, 2))
    assert sorted(logged) == list(range(1, steps + 1))
    assert [step["rl/age_max"] for step in logged.values()] == [0, *[age] * (steps - 1)]
    assert all(step["grad_norm"] > 0 for step in logged.values())
    kl = [step["rl/kl"] for step in logged.values()]
    # An update moves it ten thousand times as far.
    assert max(kl[:1] if age else kl) < 1e-5
    assert age == 0 or min(kl[1:]) > 1e-2


@pytest.mark.distributed
def test_runs_killed_in_a_step_resume(tmp_path: Path) -> None:
    """With a server of their own and with one that runs already: the same end as undisturbed."""
    words = ["architecture.head_dim=32", "rl.engine=vllm", "optimizer.lr=0.02", "rl.eval_answers=0"]
    tasks, own = write_tasks(tmp_path), f"rl.server_python={PYTHON}"

    def run(name: str, *more: str) -> Run:
        return run_on(tasks, tmp_path / name, *words, *more, steps=3)

    straight = run("straight", own)
    assert ranks("train", straight, timeout=START_S) == [True, True]
    wanted = numbers(tmp_path / "straight")
    port = free_port()
    served = shutil.copytree(tmp_path / "straight" / ENGINE_FOLDER, tmp_path / "served")
    command = ["serve", served, "--reloadable", "--python", PYTHON, "--port", port]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(
            [MELLUM2, *map(str, command), "--dtype", "float32", "--", "--enforce-eager"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "VLLM_CPU_KVCACHE_SPACE": "1"},
            start_new_session=True,
        ) as server,
    ):
        try:
            wait_for(port, server)
            for name, word in (("own", own), ("url", f"rl.url=http://127.0.0.1:{port}")):
                with pytest.raises(DistributedError, match=r"exit codes \[-9, "):
                    ranks("signalled", run(name, word), 0, 3, signal.SIGKILL, timeout=START_S)
                assert sorted(numbers(tmp_path / name)) == [1, 2]
                assert ranks("train", run(name, word), timeout=START_S) == [True, True]
                assert numbers(tmp_path / name) == wanted, name
            assert server.poll() is None
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        time.sleep(0.5)
    raise AssertionError("the server did not start")
