"""Engines of rollouts: sampled tokens and their log-probabilities against a plain forward pass."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from conversion.live_weights import new_hf_model
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.config import Objective
from mellum2_megatron.rlvr.objective import policy_loss
from mellum2_megatron.rollouts.engine import Prompt, Sampled, check_sampled
from mellum2_megatron.rollouts.groups import Counts, Group, Prompts, Queue
from mellum2_megatron.rollouts.transformers_engine import TransformersEngine
from mellum2_megatron.rollouts.vllm_engine import VllmEngine

ARCHITECTURE = Mellum2Architecture.preset("mellum2-tiny").replace(
    vocab_size=64, hidden_size=32, head_dim=8, moe_intermediate_size=16, num_experts=4
)
PROMPTS = [
    Prompt(place="a:1", tokens=(1, 2, 3), seed=5),
    Prompt(place="a:2", tokens=(4, 5, 6, 7), seed=6),
    Prompt(place="a:3", tokens=(7, 8, 9), seed=7),
]


def engine(dtype: torch.dtype = torch.float32) -> TransformersEngine:
    torch.manual_seed(1)
    model = new_hf_model(ARCHITECTURE, torch.float32)
    made = TransformersEngine(ARCHITECTURE, (0,), dtype)
    made.model.load_state_dict(
        {
            name: value.to(dtype) * (20 if "lm_head" in name else 1)
            for name, value in model.state_dict().items()
        }
    )
    return made


def test_log_probabilities_are_those_of_a_plain_forward_pass() -> None:
    one = engine()
    written = one.write(PROMPTS, answers=3, max_tokens=5)
    for prompt, answers in zip(PROMPTS, written, strict=True):
        for answer in answers:
            assert answer.ended == (answer.tokens[-1] == 0)
            tokens = torch.tensor([[*prompt.tokens, *answer.tokens]])
            logp = one.model(input_ids=tokens).logits.detach().float().log_softmax(-1)[0]
            start = len(prompt.tokens)
            for place, token in enumerate(answer.tokens):
                expected = float(logp[start - 1 + place, token])
                assert answer.log_probabilities[place] == pytest.approx(expected, abs=1e-4)


def test_an_answer_depends_on_its_prompt_alone() -> None:
    together = engine().write(PROMPTS, answers=3, max_tokens=5)
    alone = [engine().write([prompt], answers=3, max_tokens=5)[0] for prompt in PROMPTS]
    assert [[one.tokens for one in some] for some in together] == [
        [one.tokens for one in some] for some in alone
    ]


def test_sampling_follows_the_distribution() -> None:
    one = engine()
    prompt = Prompt(place="a:1", tokens=(1, 2, 3), seed=11)
    (answers,) = one.write([prompt], answers=4000, max_tokens=1)
    logits = one.model(input_ids=torch.tensor([prompt.tokens])).logits[0, -1].detach()
    expected = logits.double().softmax(0)
    counts = torch.bincount(torch.tensor([one.tokens[0] for one in answers]), minlength=64)
    off = (counts / 4000 - expected).abs() / (expected * (1 - expected) / 4000).sqrt()
    assert float(off.max()) < 5


def test_rollouts_in_bf16_make_the_band_act() -> None:
    """Training in float32 sees other probabilities; those far off have no gradient."""
    exact, rounded = engine(), engine(torch.bfloat16)
    gaps, outside, tokens = [], 0.0, 0
    narrow = Objective(band_low=0.999, band_high=1.001, max_tokens=100, overlong_tokens=10)
    for prompt, answers in zip(
        PROMPTS, rounded.write(PROMPTS, answers=8, max_tokens=5), strict=True
    ):
        for answer in answers:
            ids = torch.tensor([[*prompt.tokens, *answer.tokens]])
            logp = exact.model(input_ids=ids).logits.float().log_softmax(-1)[0]
            places = torch.arange(len(answer.tokens)) + len(prompt.tokens) - 1
            current = logp[places, list(answer.tokens)][None]
            generation = torch.tensor([answer.log_probabilities])
            result = policy_loss(
                current,
                current.detach(),
                generation,
                torch.ones_like(generation),
                torch.ones(1),
                narrow,
            )
            gaps.append(float((current - generation).abs().max()))
            outside += float(result.outside_band)
            tokens += len(answer.tokens)
    assert 1e-3 < max(gaps) < 0.5
    assert 0 < outside < tokens


@pytest.mark.parametrize("value", [math.nan, -math.inf, 0.5])
def test_a_log_probability_that_cannot_be_is_refused(value: float) -> None:
    with pytest.raises(WorkError, match="a:1: log-probability"):
        check_sampled("a:1", Sampled(tokens=(1,), log_probabilities=(value,), ended=True))


def test_a_missing_log_probability_is_refused() -> None:
    with pytest.raises(WorkError, match="2 tokens and 1 log-probabilities"):
        check_sampled("a:1", Sampled(tokens=(1, 2), log_probabilities=(-1.0,), ended=True))


# -- vLLM's server, played by a fake one -----------------------------------------------------------


class FakeVllm(BaseHTTPRequestHandler):
    """Answers as vLLM 0.32 does; `asked` keeps the requests."""

    asked: list[tuple[str, Any]] = []  # noqa: RUF012
    values: list[float | None] = [-0.5, -0.25]  # noqa: RUF012

    def do_GET(self) -> None:
        config = {"device_config": {"device": "cuda"}, "parallel_config": {}}
        config["parallel_config"]["worker_extension_cls"] = ""
        about = {"vllm_config": config}
        self._reply(about if "server_info" in self.path else {"data": [{"id": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        if self.path == "/reset_prefix_cache":
            self._reply(None)
        elif self.path == "/collective_rpc":
            self._reply({"results": [None]})
        else:
            choice = {
                "token_ids": [9, 0],
                "logprobs": {"token_logprobs": self.values},
                "finish_reason": "stop",
            }
            self._reply({"choices": [choice] * body["n"]})

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _reply(self, value: Any) -> None:
        content = b"" if value is None else json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def vllm(tmp_path: Path) -> Iterator[VllmEngine]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeVllm)
    FakeVllm.asked.clear()
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    yield VllmEngine(url, tmp_path / "model", ARCHITECTURE, (0,), writes=True, timeout=10)
    server.shutdown()
    server.server_close()


def test_vllm_is_asked_for_the_models_own_distribution(vllm: VllmEngine) -> None:
    written = vllm.write(PROMPTS[:1], answers=2, max_tokens=7)
    assert written == [[Sampled(tokens=(9, 0), log_probabilities=(-0.5, -0.25), ended=True)] * 2]
    ((path, body),) = FakeVllm.asked
    assert path == "/v1/completions"
    wanted = {"prompt": [1, 2, 3], "n": 2, "max_tokens": 7, "temperature": 1.0, "top_p": 1.0}
    assert wanted.items() <= body.items()
    assert (body["top_k"], body["stop_token_ids"], body["model"]) == (0, [0], "model")


def test_vllm_reads_new_weights_and_forgets_the_old(vllm: VllmEngine, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = {"lm_head.weight": torch.randn(4, 2)}
    vllm.load(weights)
    assert [path for path, _ in FakeVllm.asked] == ["/collective_rpc", "/reset_prefix_cache"]
    path = {"weights_path": str(tmp_path / "model")}
    assert FakeVllm.asked[0][1] == {"method": "reload_weights", "kwargs": path}
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], weights["lm_head.weight"])
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "mellum"


def test_a_server_without_log_probabilities_or_gone_ends_the_run(
    vllm: VllmEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeVllm, "values", [None, -0.5])
    with pytest.raises(WorkError, match="log-probability nan of token 0"):
        vllm.write(PROMPTS[:1], answers=1, max_tokens=2)
    gone = VllmEngine("http://127.0.0.1:9", tmp_path, ARCHITECTURE, (0,), writes=True)
    with pytest.raises(WorkError, match="the engine is gone"):
        gone.write(PROMPTS[:1], answers=1, max_tokens=2)


# -- The queue -------------------------------------------------------------------------------------

ASKED = ((1, 2), (1,), (2,), (1, 3, 4))
"""Prompts of four tasks."""


def group(version: int, rewards: tuple[float, ...], task: int = 0) -> Group:
    answers = tuple(
        Sampled(tokens=(1, 2 + i), log_probabilities=(-0.1, -1 / 3), ended=bool(i))
        for i in range(len(rewards))
    )
    return Group(task=task, version=version, answers=answers, rewards=rewards)


def test_flat_and_stale_groups_are_dropped_and_counted() -> None:
    queue, counts = Queue(), Counts()
    queue.add([group(0, (0, 1)), group(0, (1, 1)), group(2, (1, 0)), group(3, (0, 0))], counts)
    assert (counts.groups, counts.flat, len(queue.groups)) == (4, 2, 2)
    queue.drop_stale(3, 2, counts)
    assert (counts.stale, [one.version for one in queue.groups]) == (1, [2])
    values = counts.values()
    assert values["rl/groups_dropped_share"] == 0.5
    assert values["rl/reward"] == 0.5
    assert values["rl/reward_spread"] == 0.25
    assert values["rl/entropy"] == pytest.approx((0.1 + 1 / 3) / 2)


def test_a_saved_queue_is_the_same(tmp_path: Path) -> None:
    queue = Queue(groups=[group(1, (0.25, 1.0), task=3), group(2, (0, 1))], draws=17)
    queue.save(tmp_path, ASKED)
    assert Queue.read(tmp_path, prompts=ASKED, group_size=2) == queue
    Queue(draws=5).save(tmp_path, ASKED)
    assert Queue.read(tmp_path, prompts=ASKED, group_size=2) == Queue(draws=5)


@pytest.mark.parametrize(
    ("prompts", "size", "reason"),
    [
        (ASKED[:3], 2, "task 3 of 3"),
        (ASKED, 4, "a group of 2 answers"),
        (((9,), *ASKED[1:]), 2, ""),
        ((*ASKED[:3], (1, 3, 5)), 2, "the prompt of task 3 has changed"),
        ((*ASKED[:3], (1, 3, 4, 0)), 2, "the prompt of task 3 has changed"),
    ],
)
def test_a_queue_of_other_tasks_or_groups_is_refused(
    tmp_path: Path, prompts: Prompts, size: int, reason: str
) -> None:
    """An answer to another prompt would be learnt from as if it were one to this."""
    Queue(groups=[group(1, (0, 1), task=3)], draws=1).save(tmp_path, ASKED)
    if not reason:  # a prompt that nothing waits for
        Queue.read(tmp_path, prompts=prompts, group_size=size)
        return
    with pytest.raises(InputError, match=f"answers that wait for a step .*{reason}"):
        Queue.read(tmp_path, prompts=prompts, group_size=size)


def test_a_damaged_queue_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rollouts.npz").write_bytes(b"PK\x03\x04 not one")
    with pytest.raises(InputError, match=r"rollouts\.npz"):
        Queue.read(tmp_path, prompts=ASKED, group_size=2)
