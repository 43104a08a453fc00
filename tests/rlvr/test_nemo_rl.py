"""Runs rendered for NeMo-RL: keys, values and scripts."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Objective
from mellum2_megatron.rlvr.nemo_rl import declared
from mellum2_megatron.rlvr.nemo_rl.declared import require_declared
from mellum2_megatron.rlvr.objective import leave_one_out, policy_loss
from tests.cli.runner import Result, mellum2
from tests.rlvr import nemo_rl_golden
from tests.rlvr.golden_nemo_rl import CASES, GOLDEN, TASKS, rendered, work_folder
from tests.rlvr.nemo_rl_keys import declared_keys
from tests.rlvr.test_nemo_rl_inside import FORM, stand_ins

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
