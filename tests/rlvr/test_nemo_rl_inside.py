"""The parts of a rendered run that work inside NeMo-RL: client, environment, tasks, driver."""

from __future__ import annotations

import json
import socket
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import uvicorn

from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.rlvr import reward_client
from mellum2_megatron.rlvr.gateway import Gateway
from mellum2_megatron.rlvr.nemo_rl import driver, environment, tasks
from mellum2_megatron.rlvr.reward_client import RewardClient
from tests import REPOSITORY
from tests.rlvr.golden_nemo_rl import GOLDEN

MATH = {"verifier": "math", "arguments": {"answer": "42"}, "tools": [], "thinking": False}
FORM = {"verifier": "form", "arguments": {"contains": ["a"]}, "tools": [], "thinking": True}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Service of rewards that is full with 100 items."""
    served = Gateway(workers=4, most=100, own=frozenset(), folder=Path(), token="secret")
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(served.application(), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


def client(address: str, **changes: Any) -> RewardClient:
    return RewardClient(
        address, **{"token": "secret", "timeout_s": 60, "patience_s": 60, **changes}
    )


def test_rewards_come_in_order_although_the_service_is_full(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All requests at once are four times what the service takes."""
    monkeypatch.setattr(reward_client, "ITEMS_OF_A_REQUEST", 40)
    items = [{**FORM, "answer": "<think></think>" + "ab"[number % 2]} for number in range(400)]
    assert client(address).score(items) == [1.0, 0.0] * 200
    assert client(address).score([]) == []


@pytest.mark.parametrize(
    ("changes", "item", "said"),
    [
        ({"token": "wrong"}, MATH, "401"),
        ({}, {**MATH, "verifier": "none"}, "item 0: the verifier 'none' is not offered"),
        ({}, {**MATH, "arguments": {}}, "400"),
    ],
)
def test_refusals_end_at_once(
    changes: dict[str, Any], item: dict[str, Any], said: str, address: str
) -> None:
    with pytest.raises(WorkError, match=said):
        client(address, **changes).score([{**item, "answer": "x"}])


def test_a_service_that_is_gone_ends_the_patience() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(WorkError, match=r"gave no rewards for 0\.1 s .*refused"):
        client(f"http://127.0.0.1:{port}", patience_s=0.1).score([{**MATH, "answer": "x"}])


def test_an_answer_of_another_service_is_no_reward() -> None:
    for body in (b"<html>", b'{"verdicts": []}', b'{"verdicts": [{"reward": "x"}]}', b"[" * 9000):
        with pytest.raises(WorkError, match="without 1 rewards"):
            reward_client._rewards(body, 1)


def stand_ins(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]]) -> None:
    """Put modules of NeMo-RL's names in place, with what is used of them."""
    for name, content in modules.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            package = ".".join(parts[:end])
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        for key, value in content.items():
            monkeypatch.setattr(sys.modules[name], key, value, raising=False)


class Returned(types.SimpleNamespace):
    """Stand-in of EnvironmentReturn."""


def settings(folder: Path, address: str, **penalties: Any) -> dict[str, Any]:
    (folder / "url").write_text(f"{address}\n")
    (folder / "token").write_text("secret")
    return {
        "url_file": str(folder / "url"),
        "token_file": str(folder / "token"),
        "tokenizer_file": str(folder / "tokenizer.json"),
        "timeout_s": 60,
        "patience_s": 60,
        "penalties": {
            "max_tokens": 20,
            "overlong_penalty": 0.0,
            "overlong_tokens": 10,
            "concision_penalty": 0.0,
            "concision_free_tokens": 5,
            **penalties,
        },
    }


def test_the_environment_scores_the_last_turn(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins(
        monkeypatch,
        {
            "ray": {"remote": lambda cls: cls},
            "nemo_rl.environments.interfaces": {
                "EnvironmentInterface": object,
                "EnvironmentReturn": Returned,
            },
        },
    )
    environment.reward_environment.cache_clear()
    module, _, name = environment.CLASS.rpartition(".")
    made = getattr(sys.modules[module], name)(settings(tmp_path, address))
    logs = [
        [{"role": "user", "content": r"\boxed{42}"}, {"role": "assistant", "content": answer}]
        for answer in (r"\boxed{42}", r"\boxed{41}")
    ]
    done = made.step(logs, [MATH, MATH])
    assert done.rewards.tolist() == [1.0, 0.0]
    assert done.terminateds.tolist() == [True, True]
    assert len(done.observations) == len(done.next_stop_strings) == len(done.metadata) == 2
    environment.reward_environment.cache_clear()


def test_penalties_of_length_are_the_objectives(address: str, tmp_path: Path) -> None:
    """By a tokenizer with a token for each word; the formulas of docs/rlvr.md by hand."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    scorer = environment.Scorer(
        settings(tmp_path, address, overlong_penalty=1.0, concision_penalty=0.6)
    )
    short, long = "a", " ".join(["a"] * 15)
    concise = {**FORM, "thinking": False}
    thought = f"<think></think> {long}"  # 16 words
    rewards = scorer.score([short, long, thought, "b"], [concise, concise, FORM, concise])
    overlong, concision = 5 / 10, 0.6 * 10 / 15
    assert rewards == pytest.approx([1.0, 1 - overlong - concision, 1 - 6 / 10, 0.0])


def test_an_address_that_never_comes_is_told(tmp_path: Path) -> None:
    late = {**settings(tmp_path, ""), "url_file": str(tmp_path / "none"), "patience_s": -1}
    with pytest.raises(WorkError, match=r"has not written its address .*none"):
        environment.Scorer(late).score(["x"], [MATH])


class Words:
    """Tokenizer with a token for each word, and a template that shows roles."""

    def apply_chat_template(self, messages: Any, *, tools: Any, **options: bool) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True}
        turns = [f"{one['role']}: {one['content']}" for one in messages]
        return " ".join([f"tools {len(tools or [])}", *turns, "assistant:"])

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return list(range(len(text.split())))


def test_written_tasks_are_a_data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Spec(types.SimpleNamespace):
        pass

    class Rows:
        from_list: ClassVar[Any] = staticmethod(list)

    stand_ins(
        monkeypatch,
        {
            "nemo_rl.data.datasets.raw_dataset": {"RawDataset": object},
            "nemo_rl.data.interfaces": {"TaskDataSpec": Spec},
        },
    )
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(Dataset=Rows))
    tasks.task_dataset.cache_clear()
    module, _, name = tasks.CLASS.rpartition(".")
    file = GOLDEN / "instruct_sync" / "tasks" / "train.jsonl"
    made = getattr(sys.modules[module], name)(data_path=str(file), env_name="mellum2")
    assert made.task_name == made.task_spec.task_name == "mellum2"
    first = made.processor(made.dataset[0], made.task_spec, Words(), 100, 0)
    assert first["message_log"][0]["content"] == "tools 0 user: 6 * 7? assistant:"
    assert torch.equal(first["message_log"][0]["token_ids"], torch.arange(7))
    assert (first["length"], first["loss_multiplier"], first["task_name"]) == (7, 1.0, "mellum2")
    asked = {"verifier": "form", "arguments": {"contains": ["42"]}, "tools": []}
    assert first["extra_env_info"] == {**asked, "thinking": False}
    # Python's `splitlines` would cut a task at these, which JSON leaves as they are.
    row = {"messages": [{"role": "user", "content": "a\u2028b\x85c"}]}
    odd = tmp_path / "odd.jsonl"
    odd.write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    read = getattr(sys.modules[module], name)(data_path=str(odd)).dataset
    assert [json.loads(one["task"]) for one in read] == [row]
    long = made.processor(made.dataset[1], made.task_spec, Words(), 3, 1)
    assert (long["loss_multiplier"], len(long["message_log"][0]["token_ids"])) == (0.0, 4)
    assert long["extra_env_info"]["thinking"] is True
    tasks.task_dataset.cache_clear()


def test_the_driver_registers_and_runs_nemo_rls_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actors: dict[str, str] = {}
    registered: dict[str, str] = {}
    stand_ins(
        monkeypatch,
        {
            "nemo_rl.distributed.ray_actor_environment_registry": {
                "ACTOR_ENVIRONMENT_REGISTRY": actors
            },
            "nemo_rl.distributed.virtual_cluster": {
                "PY_EXECUTABLES": types.SimpleNamespace(SYSTEM="python")
            },
            "nemo_rl.environments.utils": {"register_env": registered.__setitem__},
        },
    )
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "run_grpo.py").write_text(
        "import sys\nif __name__ == '__main__':\n    open('words', 'w').write(' '.join(sys.argv))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["driver", "--config", "grpo.yaml"])
    driver.main()
    assert (tmp_path / "words").read_text() == "examples/run_grpo.py --config grpo.yaml"
    assert registered == {"mellum2": environment.CLASS}
    assert actors == {environment.CLASS: "python"}
    assert (REPOSITORY / "mellum2_megatron/rlvr/nemo_rl/declared_keys.json").is_file()
