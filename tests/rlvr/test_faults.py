"""What ends a training on answers, or costs an answer its reward, met by the trainer itself."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.config import Objective, Run, to_yaml
from mellum2_megatron.rlvr.rewards import verifiers
from mellum2_megatron.rlvr.rewards.sandbox import find_sandbox
from mellum2_megatron.rollouts.batch import ADVANTAGES, GENERATION
from mellum2_megatron.rollouts.engine import Engine, Prompt, Sampled
from mellum2_megatron.rollouts.prompts import run_tasks
from mellum2_megatron.rollouts.trainer import Rollouts, make_engine
from mellum2_megatron.rollouts.vllm_engine import VllmEngine
from mellum2_megatron.training import rollouts as rollouts_step
from mellum2_megatron.training.step import LOSS_CHECK
from tests.cli.runner import mellum2
from tests.distributed import DistributedError
from tests.rlvr.test_training import VOWELS, run_on, write_tasks
from tests.sandbox import needs_sandbox
from tests.training.test_train import train

NOTHING_IS_RIGHT = {"verifier": "form", "arguments": {"contains": ["no model says this"]}}


class Script:
    """An engine that gives the same texts to each prompt."""

    def __init__(self, run: Run, texts: Sequence[str]) -> None:
        self._tokenizer, self._texts = run_tasks(run).tokenizer, texts

    def load(self, weights: Any) -> None:
        """Hold no weights."""

    def close(self) -> None:
        """Hold nothing."""

    def write(
        self, prompts: Sequence[Prompt], *, answers: int, max_tokens: int
    ) -> list[list[Sampled]]:
        coded = [self._tokenizer.encode(text, add_special_tokens=False).ids for text in self._texts]
        one = [
            Sampled(tokens=tuple(ids), log_probabilities=(-1.0,) * len(ids), ended=True)
            for ids in coded
        ]
        return [[one[place % len(one)] for place in range(answers)] for _ in prompts]


@pytest.fixture(autouse=True)
def world(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make this process the only rank of a world, but for tests that start their own."""
    # A fixture of the session may have made one already (tests/conftest.py).
    if request.node.get_closest_marker("distributed") or torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def rollouts(
    folder: Path, verifier: dict[str, Any], engine: Engine | Sequence[str], *words: str
) -> Rollouts:
    run = run_on(write_tasks(folder, verifier), folder / "run", "rl.workers=4", *words)
    made = Script(run, engine) if isinstance(engine, Sequence) else engine
    return Rollouts(run, run_tasks(run), made)


def rewards_of(one: Rollouts) -> tuple[float, float]:
    one.prepare(0)
    values = one.finish()
    return values["rl/reward"], values["rl/groups_dropped_share"]


def test_a_script_of_answers_is_judged(tmp_path: Path) -> None:
    assert rewards_of(rollouts(tmp_path, VOWELS, ["a", "x"])) == (0.5, 0.0)


def test_flat_groups_end_the_run_with_their_number(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="step 1: all 12 groups of 2 rounds have equal") as caught:
        rollouts(tmp_path, NOTHING_IS_RIGHT, ["a", "x"], "rl.rounds=2").prepare(0)
    assert "mellum2 rl probe" in str(caught.value)


@pytest.mark.distributed
def test_flat_groups_end_the_ranks(tmp_path: Path) -> None:
    run = run_on(write_tasks(tmp_path, NOTHING_IS_RIGHT), tmp_path / "run", "rl.rounds=1")
    with pytest.raises(DistributedError, match="all 6 groups of 1 rounds have equal rewards"):
        train(run, 1)


def own(folder: Path, body: str) -> dict[str, Any]:
    """Return a verifier of one's own that gives 0 to an empty answer, and otherwise runs a body."""
    code = f"import time\ndef judge(answer):\n    if not answer: return 0.0\n    {body}\n"
    (folder / "own.py").write_text(code)
    return {"verifier": "own.py:judge", "arguments": {}}


def test_a_reward_that_takes_too_long_is_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifiers, "ask", functools.partial(verifiers.ask, seconds=1.0))
    slow = own(tmp_path, "return 1.0 if answer == 'a' else time.sleep(60)")
    assert rewards_of(rollouts(tmp_path, slow, ["a", "x"])) == (0.5, 0.0)


@needs_sandbox
def test_a_program_that_does_not_end_is_worth_0(tmp_path: Path) -> None:
    tests = [{"call": "f()", "equals": "1"}]
    code = {"verifier": "code", "arguments": {"tests": tests, "seconds": 3}}
    texts = ["f = lambda: 1", "while 1: pass"]
    assert rewards_of(rollouts(tmp_path, code, texts)) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("value", "said"),
    [("2.0", "2.0"), ("-1.0", "-1.0"), ("float('nan')", "nan"), ("'good'", "good")],
)
def test_a_reward_out_of_its_range_ends_the_run(tmp_path: Path, value: str, said: str) -> None:
    with pytest.raises(WorkError, match=said):
        rollouts(tmp_path, own(tmp_path, f"return {value}"), ["a", "x"]).prepare(0)


@pytest.mark.parametrize("ahead", [0, 1])
def test_an_engine_that_is_gone_ends_the_run(tmp_path: Path, ahead: int) -> None:
    words = [f"rl.ahead={ahead}"]
    run = run_on(write_tasks(tmp_path), tmp_path / "run", *words)
    server = VllmEngine("http://127.0.0.1:9", tmp_path, run.architecture, (0,), writes=True)
    with pytest.raises(WorkError, match=r"the engine is gone: the server at .*127\.0\.0\.1:9"):
        rollouts(tmp_path, VOWELS, server, *words).prepare(0)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_only_the_engine_can_send_bad_numbers(
    monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """One of the training model goes to Megatron's check of losses, which decides about it."""
    found: list[tuple[bool, str]] = []

    class Machine:
        def validate_result(self, *, result: Any, rejection_func: Any, message: str) -> None:
            found.append((bool(rejection_func(result)), message))

    monkeypatch.setattr(rollouts_step, "get_rerun_state_machine", Machine)
    good = torch.full((1, 4), -2.0)
    bad = good.index_fill(1, torch.tensor([1]), value)
    for mask, rejected in (([1, 1, 0, 0], True), ([0, 0, 1, 1], False)):
        batch = {
            "loss_mask": torch.tensor([mask], dtype=torch.float32),
            GENERATION: good,
            ADVANTAGES: torch.ones(1, 4),
        }
        loss, _, log = rollouts_step.sum_policy_loss(batch, Objective(), -bad)
        assert found.pop() == (rejected, LOSS_CHECK)
        assert loss.isnan() == log["lm loss"][0].isnan() == rejected
        if rejected:
            with pytest.raises(InputError, match="generation log-probability"):
                rollouts_step.sum_policy_loss(batch | {GENERATION: bad}, Objective(), -good)


def test_a_rank_on_another_machine_than_the_server_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["rl.engine=vllm", f"rl.server_python={tmp_path / 'python'}"]
    run = run_on(write_tasks(tmp_path), tmp_path / "run", *words)

    def from_rank_0(place: list[Any], src: int) -> None:
        place[0] = ("http://127.0.0.1:8000", "first-node")

    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", from_rank_0)
    with pytest.raises(InputError, match=r"ranks on first-node and .*--reloadable"):
        make_engine(run, run_tasks(run), tmp_path / "run")


def test_an_engine_that_goes_while_the_model_learns_ends_the_run(tmp_path: Path) -> None:
    class Leaving(Script):
        def write(self, *args: Any, **options: Any) -> list[list[Sampled]]:
            self.rounds = getattr(self, "rounds", 0) + 1
            if self.rounds > 1:
                raise WorkError("http://engine: the engine is gone", fix="start it again")
            return super().write(*args, **options)

    words = ["rl.ahead=1"]
    engine = Leaving(run_on(write_tasks(tmp_path), tmp_path / "run"), ["a", "x"])
    one = rollouts(tmp_path, VOWELS, engine, *words)
    one.prepare(0)
    with pytest.raises(WorkError, match="the engine is gone"):
        one.finish()


def refused(tasks: Path, *named: str, words: Sequence[str] = ()) -> None:
    """Assert that `mellum2 rl` refuses a run with these words, and makes nothing."""
    output, file = tasks / "refused", tasks / "run.yaml"
    file.write_text(to_yaml(run_on(tasks, output, *words)))
    mellum2("rl", "train", file, "--device", "cpu", "--nproc", "1").refused(*named)
    assert not output.exists()


def test_a_prompt_longer_than_the_window_is_refused_before_the_start(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path)
    row = {"messages": [{"role": "user", "content": "long " * 40}], **VOWELS}
    with (tasks / "train.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    room = "data.sequence_length=64 less rl.objective.max_tokens=6 leaves 58"
    refused(tasks, "line 41: a prompt of", room)


def test_a_server_that_is_not_there_is_refused_before_the_start(tmp_path: Path) -> None:
    words = ["rl.engine=vllm", "rl.url=http://127.0.0.1:9"]
    refused(write_tasks(tmp_path), "rl.url=http://127.0.0.1:9: no server answers", words=words)


@pytest.mark.parametrize("nested", [False, True])
def test_programs_without_a_sandbox_are_refused_before_the_start(
    tmp_path: Path, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = {"verifier": "code", "arguments": {"tests": [{"call": "f()", "equals": "1"}]}}
    both = {"verifier": "all", "arguments": {"of": [code, VOWELS]}}
    tasks = write_tasks(tmp_path, both if nested else code)
    find_sandbox.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        refused(tasks, "bwrap is not installed", "scripts/setup_sandbox.sh")
        # Before a model that is not there answers.
        words = ("--hf-path", tmp_path / "model")
        probe = mellum2("rl", "probe", tasks / "train.jsonl", *words)
        probe.refused("bwrap is not installed")
    finally:
        find_sandbox.cache_clear()


def test_scoring_without_a_sandbox_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a node without it, which the place where the run was started cannot know."""
    code = {"verifier": "code", "arguments": {"tests": [{"call": "f()", "equals": "1"}]}}
    one = rollouts(tmp_path, code, ["f = lambda: 1", "x"])
    find_sandbox.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        with pytest.raises(InputError, match="bwrap is not installed"):
            one.prepare(0)
    finally:
        find_sandbox.cache_clear()
