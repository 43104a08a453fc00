"""Suites of lm-evaluation-harness: data sets, the sandbox, resumption, results.

Those that start the harness need the extra ``eval``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.evaluation import harness
from mellum2_megatron.evaluation.harness import DataSet, HarnessRun, fetch_command, is_cached
from mellum2_megatron.evaluation.harness_suites import HARNESS_SUITES, HarnessSuite, HarnessTask
from mellum2_megatron.evaluation.harness_tasks import sandboxed
from mellum2_megatron.evaluation.multiple_choice import Settings, questions
from tests.cli.runner import mellum2
from tests.conversion.test_generation import make_folder

PROGRAM = "def add(a, b):\n    return a + b\n"
TESTS = "def check(f):\n    assert f(1, 2) == 3\ncheck(add)"


def test_data_sets_are_looked_for_where_the_harness_reads_them(tmp_path: Path) -> None:
    data = DataSet(path="cais/mmlu", subset="anatomy")
    assert not is_cached(data, tmp_path)
    file = tmp_path / "cais___mmlu" / "anatomy" / "0.0.0" / "abc" / "mmlu-test.arrow"
    file.parent.mkdir(parents=True)
    file.touch()
    assert is_cached(data, tmp_path)
    assert is_cached(DataSet(path="cais/mmlu", subset=None), tmp_path)
    assert not is_cached(DataSet(path="cais/mmlu", subset="virology"), tmp_path)


def test_the_command_that_fetches_them() -> None:
    few = [DataSet(path="openai/gsm8k", subset="main"), DataSet(path="a/b", subset=None)]
    assert fetch_command(few) == (
        "python -c \"import datasets as d; d.load_dataset('openai/gsm8k', 'main'); "
        "d.load_dataset('a/b', None)\""
    )
    many = fetch_command([DataSet(path="cais/mmlu", subset=str(n)) for n in range(57)])
    assert "get_dataset_config_names('cais/mmlu')" in many
    assert len(many) < 200


def test_every_task_says_why_it_is_there() -> None:
    assert set(HARNESS_SUITES) == {"base", "instruct", "thinking"}
    for suite in HARNESS_SUITES.values():
        for task in suite.tasks:
            assert task.evidence.startswith(("named in", "ours"))
    assert "LiveCodeBench v6" in HARNESS_SUITES["thinking"].missing


@pytest.mark.usefixtures("sandbox")
def test_programs_run_in_the_sandbox_and_must_reach_their_end(tmp_path: Path) -> None:
    assert sandboxed.passes(f"{PROGRAM}\n{TESTS}")
    wrong = PROGRAM.replace("+", "-")
    early = PROGRAM + "import sys\nsys.exit(0)\n"
    mark = tmp_path / "mark"
    escape = PROGRAM + f"open({str(mark)!r}, 'w').close()\n"
    for program in (wrong, early, escape):
        assert not sandboxed.passes(f"{program}\n{TESTS}")
    assert not mark.exists()
    assert sandboxed.pass_at_1([TESTS, TESTS], [PROGRAM, wrong]) == 0.5
    assert sandboxed.pass_at_1([TESTS], [[PROGRAM]]) == 1.0


@pytest.fixture
def sandbox() -> None:
    try:
        harness.find_sandbox()
    except InputError as error:
        pytest.skip(str(error))


def test_programs_are_a_head_and_an_answer() -> None:
    docs = [{"prompt": "def f():\n"}]
    assert sandboxed.with_prompt([["    return 1\n"]], docs) == [["def f():\n    return 1\n"]]
    fenced = [["    return 1\n```\nThis returns 1."]]
    assert sandboxed.with_prompt_to_fence(fenced, docs) == [["def f():\n    return 1\n"]]


def _write_task(folder: Path, name: str, config: dict[str, Any], rows: list[Any]) -> None:
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    text = yaml.safe_dump({"task": name, **local, "test_split": "test", **config})
    (folder / f"{name}.yaml").write_text(text)


def _write_choice(folder: Path, name: str) -> None:
    rows = [
        {"prompt": item.prompt, "choices": list(item.choices), "answer": item.answer}
        for item in questions(Settings())
    ]
    config = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc"}],
    }
    _write_task(folder, name, config, rows)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
    return make_folder(tmp_path_factory.mktemp("hf") / "model", max_position_embeddings=512)


def test_a_task_of_one_s_own(model: Path, tmp_path: Path) -> None:
    _write_choice(tmp_path / "tasks", "own_choice")
    out = tmp_path / "result.json"
    words = ("--tasks", tmp_path / "tasks", "--out", out)
    result = mellum2("eval", model, "--suite", "own_choice", *words)
    assert result.code == 0, result
    ours = mellum2("eval", model, "--suite", "multiple_choice", "--out", tmp_path / "ours.json")
    assert ours.code == 0, ours
    acc = json.loads((tmp_path / "ours.json").read_text())["measures"][0]["figures"][0]["value"]
    (task,) = json.loads(out.read_text())["tasks"]
    assert (task["metric"], task["value"], task["items"]) == ("acc,none", acc, 16)
    assert task["low"] <= task["value"] <= task["high"]
    assert not out.with_name("result.json.parts").exists()
    mellum2("eval", model, "--suite", "own_choce", *words).refused("did you mean 'own_choice'")


@pytest.mark.usefixtures("sandbox")
def test_code_tasks_on_local_data(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    humaneval = [{"prompt": "def f():\n", "test": "def check(f):\n    pass", "entry_point": "f"}]
    _write_task(
        folder, "own_humaneval", {"include": str(harness.OWN_TASKS / "humaneval.yaml")}, humaneval
    )
    rows = [
        {"task_id": n, "text": "t", "code": "c", "test_list": ["assert True"] * 3} for n in range(5)
    ]
    prompt = folder / "prompt.jsonl"
    prompt.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"test": str(folder / "own_mbpp.jsonl"), "prompt": str(prompt)}
    config = {"include": str(harness.OWN_TASKS / "mbpp.yaml"), "dataset_name": None}
    _write_task(folder, "own_mbpp", {**config, "dataset_kwargs": {"data_files": files}}, rows[:1])
    short = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    for name in ("own_humaneval", "own_mbpp"):
        file = folder / f"{name}.yaml"
        loaded = yaml.safe_load(file.read_text()) | {"generation_kwargs": short}
        file.write_text(yaml.safe_dump(loaded))
        out = tmp_path / f"{name}.json"
        words = ("--tasks", folder, "--limit", "1", "--out", out)
        result = mellum2("eval", model, "--suite", name, *words)
        assert result.code == 0, result
        (task,) = json.loads(out.read_text())["tasks"]
        assert task["metric"].startswith("pass_at_1")
        assert 0 <= task["value"] <= 1


def test_an_interrupted_suite_resumes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        _write_choice(tmp_path / "tasks", name)
    suite = HarnessSuite(
        tasks=tuple(
            HarnessTask(name=name, benchmark=name, area="own", evidence="own", metric="")
            for name in ("first", "second")
        )
    )
    run, out, said = HarnessRun(limit=2, tasks=tmp_path / "tasks"), tmp_path / "r.json", []
    whole = harness._run_task

    def failing(loaded: Any, task: HarnessTask, *rest: Any) -> dict[str, Any]:
        if task.name == "second":
            raise WorkError("the machine went down", fix="none")
        return whole(loaded, task, *rest)

    def go(**changes: Any) -> dict[str, Any]:
        said.clear()
        settings = {"limit": 2, "tasks": tmp_path / "tasks", **changes}
        return harness.run_suite(
            model,
            suite,
            HarnessRun(**settings),
            model=model,
            name="two",
            out=out,
            announce=said.append,
        )

    harness.check_suite("two", suite, run)
    monkeypatch.setattr(harness, "_run_task", failing)
    with pytest.raises(WorkError, match="went down"):
        go()
    assert not out.exists()
    with pytest.raises(WorkError, match="went down"):
        go(limit=3)  # of other settings: begins anew
    assert said[0] == "measuring first (first)"
    monkeypatch.undo()
    report = go(limit=3)
    assert said[0] == "first: kept from an interrupted run"
    assert [task["items"] for task in report["tasks"]] == [3, 3]
    assert json.loads(out.read_text()) == report


def test_refusals(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_cache", lambda: tmp_path)
    folder = tmp_path / "tasks"
    config = {"output_type": "generate_until", "doc_to_text": "a", "doc_to_target": "b"}
    _write_task(folder, "executes", {**config, "unsafe_code": True}, [{"a": 1}])
    _write_task(folder, "remote", config, [{"a": 1}])
    text = (folder / "remote.yaml").read_text()
    loaded = yaml.safe_load(text) | {"dataset_path": "who/what", "dataset_kwargs": None}
    (folder / "remote.yaml").write_text(yaml.safe_dump(loaded))
    words = ("eval", model, "--tasks", folder)
    mellum2(*words, "--suite", "executes").refused("executes programs of a model")
    mellum2(*words, "--suite", "remote").refused(
        "lacks who/what", "d.load_dataset('who/what', None)"
    )
    mellum2(*words, "--suite", "remote", "--suite", "long").refused("runs alone")
