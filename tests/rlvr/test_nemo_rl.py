"""Runs rendered for NeMo-RL: keys, values, scripts, and the parts that run inside it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import uvicorn
import yaml

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.config import Objective
from mellum2_megatron.rlvr import reward_client
from mellum2_megatron.rlvr.gateway import Gateway
from mellum2_megatron.rlvr.nemo_rl import declared, driver, environment, tasks
from mellum2_megatron.rlvr.nemo_rl.declared import require_declared
from mellum2_megatron.rlvr.objective import leave_one_out, policy_loss
from mellum2_megatron.rlvr.reward_client import RewardClient
from tests import REPOSITORY
from tests.cli.runner import Result, mellum2
from tests.rlvr import nemo_rl_golden
from tests.rlvr.golden_nemo_rl import CASES, GOLDEN, TASKS, rendered, work_folder
from tests.rlvr.nemo_rl_keys import declared_keys

MATH = {"verifier": "math", "arguments": {"answer": "42"}, "tools": [], "thinking": False}
FORM = {"verifier": "form", "arguments": {"contains": ["a"]}, "tools": [], "thinking": True}


# -- The configuration -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("work").resolve()
    with work_folder(folder):
        yield folder


@pytest.mark.parametrize("case", CASES)
def test_rendered_files_are_the_golden_ones(case: str, work: Path) -> None:
    golden = {
        file.relative_to(GOLDEN / case).as_posix(): file.read_text()
        for file in sorted((GOLDEN / case).rglob("*"))
        if file.is_file()
    }
    assert rendered(work, case) == golden


def config(case: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((GOLDEN / case / "grpo.yaml").read_text())
    return values


def test_the_reports_settings_are_nemo_rls_keys() -> None:
    """Report §5.2, by the names in NeMo-RL's own guide."""
    sync, other = config("instruct_sync"), config("thinking_async")
    assert (sync["grpo"]["num_prompts_per_step"], sync["grpo"]["num_generations_per_prompt"]) == (
        256,
        16,
    )
    assert sync["policy"]["train_global_batch_size"] == 4096
    assert sync["grpo"]["normalize_rewards"] is False
    assert sync["grpo"]["use_leave_one_out_baseline"] is True
    assert sync["loss_fn"]["reference_policy_kl_penalty"] == 0
    assert (sync["loss_fn"]["ratio_clip_min"], sync["loss_fn"]["ratio_clip_max"]) == (0.2, 0.28)
    assert sync["loss_fn"]["truncated_importance_sampling_type"] == "icepop"
    assert sync["loss_fn"]["truncated_importance_sampling_ratio_min"] == 0.5
    assert sync["loss_fn"]["truncated_importance_sampling_ratio"] == 5.0
    optimizer = sync["policy"]["megatron_cfg"]["optimizer"]
    assert (optimizer["lr"], optimizer["min_lr"]) == (1e-6, 1e-7)
    assert sync["policy"]["megatron_cfg"]["mtp_num_layers"] == 1
    assert (sync["grpo"]["max_num_steps"], other["grpo"]["max_num_steps"]) == (500, 100)
    lengths = [one["policy"]["generation"]["max_new_tokens"] for one in (sync, other)]
    assert lengths == [16_384, 40_960]
    # What one way can do the other cannot.
    for one, asynchronous in ((sync, False), (other, True)):
        assert one["grpo"]["async_grpo"]["enabled"] is asynchronous
        assert one["grpo"]["use_dynamic_sampling"] is not asynchronous
        assert one["grpo"]["reward_shaping"]["enabled"] is not asynchronous
        overlong = one["env"]["mellum2"]["penalties"]["overlong_penalty"]
        assert overlong == (1.0 if asynchronous else 0.0)
    assert other["grpo"]["async_grpo"]["max_trajectory_age_steps"] == 2


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("grpo", "use_dynamic_samplng", "grpo.use_dynamic_sampling"),
        ("loss_fn", "ratio_clip_mn", "loss_fn.ratio_clip_min"),
        ("cluster", "nodes", "cluster.num_nodes"),
    ],
)
def test_a_key_that_nemo_rl_would_ignore_is_refused(section: str, key: str, nearest: str) -> None:
    values = config("instruct_sync")
    require_declared(values, declared.declared())
    values["env"]["mellum2"]["any"] = values["policy"]["generation"]["vllm_kwargs"] = {"x": 1}
    require_declared(values, declared.declared())  # sections that take any keys
    values[section][key] = 1
    with pytest.raises(InputError, match="7ea279abf declares no such key") as refusal:
        require_declared(values, declared.declared())
    assert refusal.value.value == f"{section}.{key}"
    assert nearest in refusal.value.fix


SOURCE = {
    "algorithms/grpo.py": "from nemo_rl.policy import Policy as P\n"
    "from elsewhere import Other\n"
    "if TYPE_CHECKING:\n    from ..late import Late\n"
    "class Base(BaseModel):\n    a: int = 1\n    again: 'Inner | None' = None\n"
    "class Inner(Base, extra='allow'):\n    b: float | None = None\n"
    "Either = Union[Inner, P]\n"
    "class MasterConfig(BaseModel):\n    one: Inner\n    two: Optional[P] = None\n"
    "    three: dict[str, Any]\n    four: Other\n    five: Annotated['Late', 'a remark']\n"
    "    six: Literal['Base']\n    seven: NotRequired[list[Either]]\n",
    "late.py": "class Late(TypedDict):\n    l: int\n",
    "policy/__init__.py": "from .inner import Policy\n",
    "policy/inner.py": "class Policy(TypedDict):\n    c: NotRequired[int]\n",
    "models/generation/vllm/config.py": "class VllmConfig(TypedDict):\n    v: int\n",
}
"""The forms in which NeMo-RL writes its settings, in small."""


def write_source(checkout: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (checkout / "nemo_rl" / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / "nemo_rl" / name).write_text(text)
    return checkout


def test_declared_keys_are_read_from_the_classes(tmp_path: Path) -> None:
    """Bases, imports, other names, free mappings; a class elsewhere has no keys here."""
    found = declared_keys(write_source(tmp_path, SOURCE), "commit")
    assert found["keys"] == sorted(
        "one one.a one.b one.again two two.c three three.* four five five.l six seven seven.a "
        "seven.again seven.b seven.c policy.generation.v".split()
    )
    assert found["files"] == sorted(f"nemo_rl/{name}" for name in SOURCE)


def test_the_keys_of_the_checkout_decide(tmp_path: Path) -> None:
    version = declared.declared(write_source(tmp_path / "own", SOURCE))
    assert (version.read, version.commit) == (True, "unknown")
    require_declared({"one": {"a": 1}, "three": {"any": {"x": 1}}}, version)
    with pytest.raises(InputError, match=r"one\.grpo: NeMo-RL unknown declares no such key"):
        require_declared({"one": {"grpo": 1}}, version)
    assert not declared.declared(tmp_path / "elsewhere").read


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("class Other: pass\n", "has no class MasterConfig"),
        ("class (\n", "Python that can be read"),
    ],
)
def test_a_checkout_without_the_classes_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        declared.declared(write_source(tmp_path / "own", {"algorithms/grpo.py": text}))


@pytest.mark.skipif("NEMO_RL_CHECKOUT" not in os.environ, reason="no NEMO_RL_CHECKOUT")
def test_the_list_is_that_of_a_checkout() -> None:
    """A list with a note is not one of a checkout: it lacks sections, and must have no more."""
    checkout, facts = Path(os.environ["NEMO_RL_CHECKOUT"]), json.loads(declared.FILE.read_text())
    found = declared_keys(checkout, facts["commit"])
    if "note" not in facts:
        assert found == facts
    assert set(facts["keys"]) <= set(found["keys"])  # type: ignore[call-overload]


def test_the_golden_numbers_of_the_objective_can_be_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The script with classes of NeMo-RL's form that compute by our formulas: the same file."""

    class Settings(types.SimpleNamespace):
        pass

    class Estimator:
        def __init__(self, settings: Any, loss: Any) -> None:
            assert (settings.normalize_rewards, settings.use_leave_one_out_baseline) == (
                False,
                True,
            )

        def compute_advantage(self, *, prompt_ids: Any, rewards: Any, mask: Any) -> Any:
            size = int((prompt_ids[:, 0] == 0).sum())
            return leave_one_out(rewards.view(-1, size)).view(-1, 1).expand(mask.shape)

    class Loss:
        def __init__(self, settings: Any) -> None:
            self.settings = settings

        def __call__(self, current: Any, data: Any, **totals: Any) -> Any:
            one = self.settings
            result = policy_loss(
                current,
                data["prev_logprobs"][:, 1:],
                data["generation_logprobs"][:, 1:],
                data["token_mask"][:, 1:] * data["sample_mask"][:, None],
                data["advantages"][:, 1],
                Objective(
                    clip_low=one.ratio_clip_min,
                    clip_high=one.ratio_clip_max,
                    band_low=one.truncated_importance_sampling_ratio_min,
                    band_high=one.truncated_importance_sampling_ratio,
                ),
                tokens=totals["global_valid_toks"],
            )
            return result.loss, {}

    stand_ins(
        monkeypatch,
        {
            "nemo_rl.algorithms.advantage_estimator": {
                "AdvEstimatorConfig": Settings,
                "GRPOAdvantageEstimator": Estimator,
            },
            "nemo_rl.algorithms.loss": {"ClippedPGLossConfig": Settings, "ClippedPGLossFn": Loss},
        },
    )
    content, difference = nemo_rl_golden.remade("of a test")
    stored = np.load(nemo_rl_golden.GOLDEN)
    assert content.keys() == set(stored.files)
    arrays = [name for name in stored.files if name != "source"]
    assert all(content[name].dtype == stored[name].dtype for name in arrays)
    assert difference < 1e-6
    assert "of a test" in str(content["source"])


# -- The command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["mellum2_tiny_pretrain"], "data.feed="),
        (["mellum2_12b_rlvr_instruct", "layout.dp=3"], "16 node(s) of 8 GPUs"),
        (["mellum2_12b_rlvr_instruct", "optimizer.name=muon"], "optimizer.name=muon"),
        (["mellum2_12b_rlvr_instruct", "--tasks", "none.jsonl"], "none.jsonl"),
        (["mellum2_12b_rlvr_instruct", "--profile", "bare.yaml"], "no container"),
        (["mellum2_12b_rlvr_instruct", "--profile", "apptainer.yaml"], "runtime: apptainer"),
        (["mellum2_12b_rlvr_instruct", "--profile", "far.yaml"], "container.mounts"),
        (["mellum2_12b_rlvr_instruct", "--profile", "cpu.yaml"], "gpus_per_node"),
        (["mellum2_12b_rlvr_thinking", "--hf-path", "special"], "</think> is a special token"),
        (["mellum2_12b_rlvr_thinking", "--hf-path", "broken"], "it must be a tokenizer"),
        (["mellum2_12b_rlvr_instruct", "checkpoint.load=null"], "without checkpoint.load"),
        (["mellum2_12b_rlvr_instruct", "schedule.style=whd"], "schedule.style=whd"),
        (["mellum2_12b_rlvr_instruct", "--profile", "taken.yaml"], "variables.MOUNTS"),
        (["mellum2_12b_rlvr_instruct", "--checkout", "${x}"], "defaults: "),
        (["mellum2_12b_rlvr_instruct", "logging.wandb_project=${x}"], "logger.wandb.project"),
        (["mellum2_12b_rlvr_instruct", "--checkout", "a\nb"], "control character"),
        (["mellum2_12b_rlvr_instruct", "--checkout", "good.yaml"], "--checkout good.yaml"),
        (["mellum2_12b_rlvr_instruct", "--hf-path", "good.yaml"], "--hf-path "),
        (["mellum2_12b_rlvr_instruct", "--generation-nodes", "2"], "with --mode sync"),
        (
            [
                *("mellum2_12b_rlvr_instruct", "--mode", "async"),
                *("rl.objective.max_age=0", "rl.ahead=0"),
            ],
            "rl.objective.max_age=0",
        ),
        (
            [
                *("mellum2_12b_rlvr_instruct", "rl.eval_answers=0"),
                *("--valid-tasks", "data/rlvr_thinking/valid.jsonl"),
            ],
            "--valid-tasks with rl.eval_answers=0",
        ),
        (
            [
                *("mellum2_12b_rlvr_instruct", "--tasks", "one/tasks.jsonl"),
                *("--tasks", "two/tasks.jsonl"),
            ],
            "one/tasks.jsonl line 1 and two/tasks.jsonl line 1 name functions",
        ),
    ],
)
def test_what_cannot_run_is_refused_and_nothing_is_written(
    words: list[str], named: str, work: Path
) -> None:
    site = {"account": "none", "gpus_per_node": 8, "nodes": 16}
    container = {"image": "/x.sqsh", "runtime": "pyxis", "mounts": ["/"]}
    for name, changes in (
        ("bare", {}),
        ("apptainer", {"container": container | {"runtime": "apptainer"}}),
        ("far", {"container": container | {"mounts": ["/far"]}}),
        ("cpu", {"gpus_per_node": 0, "nodes": 1, "container": container}),
        ("taken", {"container": container, "variables": {"MOUNTS": "/x"}}),
        ("good", {"container": container}),
    ):
        (work / f"{name}.yaml").write_text(yaml.safe_dump(site | changes))
    (work / "special").mkdir(exist_ok=True)
    token = {"content": "</think>", "special": True}
    (work / "special" / "chat_template.jinja").write_text("{{ messages }}")
    (work / "special" / "tokenizer.json").write_text(json.dumps({"added_tokens": [token]}))
    (work / "broken").mkdir(exist_ok=True)
    (work / "broken" / "chat_template.jinja").write_text("{{ messages }}")
    (work / "broken" / "tokenizer.json").write_text("{")
    for name in ("one", "two"):
        (work / name).mkdir(exist_ok=True)
        (work / name / "own.py").write_text("def judge(answer):\n    return 0.0\n")
        asked = [{"role": "user", "content": f"Say {name}."}]
        row = {"messages": asked, "verifier": "own.py:judge"}
        (work / name / "tasks.jsonl").write_text(json.dumps(row) + "\n")
    profile = [] if "--profile" in words else ["--profile", "good.yaml"]
    data = [] if "pretrain" not in words[0] else ["--tasks", "data/rlvr_instruct/train.jsonl"]
    result = mellum2("rl", "render-nemo", *words, *profile, *data, "--output", "refused")
    assert result.code == 2, result
    assert named in result.err
    assert "Traceback" not in result.err
    assert not (work / "refused").exists()


def test_a_second_rendering_leaves_checkpoints_alone(work: Path) -> None:
    words = ["rl", "render-nemo", *CASES["local"], "--output", "twice", "--checkout", "NeMo-RL"]
    assert mellum2(*words).code == 0
    (work / "twice" / "checkpoints").mkdir()
    before = (work / "twice" / "grpo.yaml").read_text()
    mellum2(*words, "seed=7").refused("--output", "--overwrite")
    assert (work / "twice" / "grpo.yaml").read_text() == before
    assert mellum2(*words, "seed=7", "--overwrite").code == 0
    assert "seed: 7" in (work / "twice" / "grpo.yaml").read_text()
    assert (work / "twice" / "checkpoints").is_dir()


def test_a_validation_is_rendered_where_the_run_has_one(work: Path) -> None:
    """Its tasks may be compressed, as the trainer's."""
    data = work / "data" / "rlvr_packed"
    data.mkdir()
    (data / "train.jsonl.gz").write_bytes(gzip.compress(TASKS.encode()))
    valid = TASKS.replace("6 * 7", "40 + 2").replace("Say a.", "Spell a word with an a.")
    (data / "valid.jsonl.gz").write_bytes(gzip.compress(valid.encode()))
    words = [*CASES["instruct_sync"], "--checkout", "NeMo-RL", f"data.path={data}"]
    for answers, period in ((2, 25), (0, 0)):
        name = f"validates{answers}"
        result = mellum2(
            "rl", "render-nemo", *words, f"rl.eval_answers={answers}", "--output", name
        )
        assert result.code == 0, result
        config = yaml.safe_load((work / name / "grpo.yaml").read_text())
        assert config["grpo"]["val_period"] == period
        assert (work / name / "tasks" / "valid.jsonl").is_file() == bool(answers)


def test_the_limits_are_printed(work: Path) -> None:
    words = [*CASES["thinking_async"], "--output", "printed", "--checkout", "NeMo-RL"]
    shown = " ".join(mellum2("rl", "render-nemo", *words).out.split())
    for setting in ("oversampling=1.5", "overlong_penalty=1", "concision_penalty=0.5"):
        assert setting in shown


# -- The scripts -----------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Checkout with the line beside which Mellum 2 is registered, and stand-ins on the path."""
    file = tmp_path / "NeMo-RL" / "nemo_rl" / "models" / "megatron" / "community_import.py"
    file.parent.mkdir(parents=True)
    file.write_text("import os\nfrom megatron.bridge import AutoBridge\n")
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "git", f"echo {declared.declared().commit}")
    script(tmp_path / "bin" / "sbatch", 'printf "%s|" "$@" >> "$CALLS"; echo >> "$CALLS"; echo 17')
    return tmp_path / "NeMo-RL"


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def launch(folder: Path, checkout: Path) -> Result:
    done = subprocess.run(
        ["bash", folder / "launch.sh"],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "PATH": f"{checkout.parent / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(checkout.parent / "calls"),
        },
    )
    return Result(done.returncode, done.stdout, done.stderr)


def test_the_launch_names_the_missing_registration_and_then_submits(
    work: Path, checkout: Path, tmp_path: Path
) -> None:
    output = tmp_path / "an output (1)"
    words = ["rl", "render-nemo", *CASES["instruct_sync"], "--checkout", checkout]
    assert mellum2(*words, "--output", output).code == 0
    refused = launch(output, checkout)
    assert refused.code == 2
    fix = refused.err.partition(" run ")[2]
    assert not (tmp_path / "calls").exists()
    subprocess.run(["bash", "-c", fix], cwd=checkout, check=True)
    lines = (checkout / "nemo_rl/models/megatron/community_import.py").read_text().splitlines()
    assert lines[1:] == ["from megatron.bridge import AutoBridge", "import conversion.bridge"]
    started = launch(output, checkout)
    assert (started.code, started.err) == (0, "")
    rewards, train, end = (tmp_path / "calls").read_text().splitlines()
    assert rewards == f"--parsable|{output}/rewards.sh|"
    assert "--nodes=16|--exclusive|--gres=gpu:8|--constraint=a b|" in train
    assert train.endswith("--dependency=after:17|ray.sub|")
    assert "--dependency=afterany:17|--wrap=scancel 17|" in end
    for file in ("launch.sh", "rewards.sh"):
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", "-S", "warning", output / file], check=True)


def test_a_local_launch_starts_the_rewards_and_ends_them(
    work: Path, checkout: Path, tmp_path: Path
) -> None:
    """With a driver that asks for two rewards, as the environment inside NeMo-RL does."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    output = tmp_path / "it's an output"
    words = ["rl", "render-nemo", *CASES["local"], "--checkout", checkout, "--port", str(port)]
    assert mellum2(*words, "--output", output).code == 0
    module = checkout / "nemo_rl/models/megatron/community_import.py"
    module.write_text("import conversion.bridge\n")
    program = (
        "import sys, yaml\n"
        "from mellum2_megatron.rlvr.nemo_rl.environment import Scorer\n"
        "settings = yaml.safe_load(open(sys.argv[-1]))['env']['mellum2']\n"
        f"items = [{ {**FORM, 'thinking': False}!r}] * 2\n"
        "print(Scorer(settings).score(['a', 'b'], items))\n"
    )
    (tmp_path / "ask.py").write_text(program)
    script(tmp_path / "bin" / "uv", f'exec {sys.executable} {tmp_path / "ask.py"} "$@"')
    started = launch(output, checkout)
    assert started.code == 0, started
    assert "[1.0, 0.0]" in started.out
    assert (output / "rewards.token").stat().st_mode & 0o077 == 0
    with pytest.raises(ConnectionError):
        socket.create_connection(("127.0.0.1", port)).close()


# -- Inside NeMo-RL --------------------------------------------------------------------------------


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
