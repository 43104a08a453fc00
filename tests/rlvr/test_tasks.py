"""Files of tasks: what is read, what is refused and why, and how a model fares on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.rlvr.rewards.sandbox import find_sandbox
from mellum2_megatron.rlvr.rewards.verdict import Answer
from mellum2_megatron.rlvr.tasks import read_tasks, score_answers
from tests.cli.runner import mellum2
from tests.conversion.folders import write_folder
from tests.data.chats import write_rows, write_tokenizer
from tests.sandbox import needs_sandbox

ASK = "Name the capital of the German state of Hesse in one word, please"
FORM = {"verifier": "form", "arguments": {"contains": ["Wiesbaden"]}}


def task(question: str = ASK, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], **FORM, **more}


TOOL = {"type": "function", "function": {"name": "ping", "parameters": {"type": "object"}}}


def test_tasks_are_read_as_they_are(tmp_path: Path) -> None:
    rows = [
        task(id="hesse", thinking=True),
        task("Ping it", tools=[TOOL], verifier="tool_calls", arguments={}),
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "What is 6 * 7?"},
            ],
            "verifier": "math",
            "arguments": {"answer": "42"},
        },
    ]
    file = write_rows(tmp_path / "tasks.jsonl", rows)
    checked = read_tasks([file])
    first, second, third = checked.tasks
    assert checked.warnings == ()
    assert (first.name, first.thinking, first.text) == ("hesse", True, ASK)
    assert (second.name, second.thinking) == (f"{file} line 2", False)
    assert second.prompt.tools == (TOOL,)
    assert [message.role for message in third.prompt.messages] == ["system", "user"]
    assert [one.row for one in checked.tasks] == rows
    answers = [
        [Answer(text="<think>Mainz?</think>Wiesbaden", thinking=True), Answer(text="Mainz")],
        [Answer(text='<tool_call>{"name": "ping", "arguments": {}}</tool_call>')],
        [Answer(text=r"\boxed{42}"), Answer(text=r"\boxed{41}"), Answer(text="42")],
    ]
    verdicts = score_answers(checked.tasks, answers, workers=3)
    assert [[one.reward for one in said] for said in verdicts] == [[1, 0], [1], [1, 0, 0]]


def test_equal_answers_to_a_task_are_judged_once(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from pathlib import Path\n"
        "def count(answer, *, file, least):\n"
        "    with Path(file).open('a') as log: log.write(f'{answer} {least}\\n')\n"
        "    return float(len(answer) >= least)\n"
    )
    log = tmp_path / "log.txt"
    rows = [
        task(f"Task {n}", verifier="own.py:count", arguments={"file": str(log), "least": n})
        for n in (1, 2)
    ]
    checked = read_tasks([write_rows(tmp_path / "tasks.jsonl", rows)])
    log.write_text("")
    one, two = Answer(text="a"), Answer(text="bb")
    verdicts = score_answers(checked.tasks, [[one, two, one, one], [one, two, one]], workers=2)
    assert [[said.reward for said in some] for some in verdicts] == [[1, 1, 1, 1], [0, 1, 0]]
    assert sorted(log.read_text().splitlines()) == ["a 1", "a 2", "bb 1", "bb 2"]


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "json": ("{", "JSON"),
    "array": ("[1]", "object"),
    "key": (task(verifer="form"), "unknown key 'verifer'; did you mean 'verifier'"),
    "verifier": ({"messages": task()["messages"]}, "verifier is missing"),
    "unknown-verifier": (task(verifier="forms"), "did you mean 'form'"),
    "arguments": (task(arguments=[1]), "arguments is [1], of another type"),
    "argument": (task(arguments={"contain": ["x"]}), "unknown argument 'contain'"),
    "thinking": (task(thinking="yes"), "thinking is 'yes'"),
    "no-messages": (FORM, "no key 'messages'"),
    "answered": (
        task(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
        "the last turn is the assistant's",
    ),
    "role": (task(messages=[{"role": "boss", "content": "a"}]), "has the role 'boss'"),
    "result": (
        task(messages=[{"role": "tool", "content": "a"}]),
        "is a result without a call before it",
    ),
    "no-tools": (task(verifier="tool_calls", arguments={}), "the task has no tools"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_refused_with_line_and_reason(name: str, tmp_path: Path) -> None:
    row, reason = BAD_ROWS[name]
    file = tmp_path / "tasks.jsonl"
    bad = row if isinstance(row, str) else json.dumps(row)
    file.write_text(f"{json.dumps(task())}\n\n{bad}\n")
    with pytest.raises(InputError) as caught:
        read_tasks([file])
    assert f"1 of 2 tasks cannot be used: {file} line 3: " in str(caught.value)
    assert reason in str(caught.value)
    mellum2("rl", "check", file).refused("line 3", reason)


def test_two_tasks_of_one_id_are_refused(tmp_path: Path) -> None:
    """Answers made elsewhere name their task by it."""
    rows = [task("Name a river.", id="x"), task("Name a hill.", id="x"), task("Name a sea.")]
    file = write_rows(tmp_path / "tasks.jsonl", rows)
    mellum2("rl", "check", file).refused("line 2: id 'x' is that of", "line 1")


def test_ten_faults_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "tasks.jsonl", [task(verifier="x") for _ in range(25)])
    with pytest.raises(InputError) as caught:
        read_tasks([file])
    assert "25 of 25 tasks" in str(caught.value)
    assert str(caught.value).count("there is no verifier") == 10
    assert "and 15 more" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tasks.jsonl", "", "there must be a task"),
        ("tasks.json", "[{}]", "one JSON object in each line"),
        ("tasks.parquet", "PAR1", "read from .jsonl"),
        (None, "", "there is no such file"),
    ],
)
def test_a_file_without_tasks_is_refused(
    name: str | None, content: str, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / (name or "missing.jsonl")
    if name:
        file.write_text(content)
    mellum2("rl", "check", file).refused(reason)


# -- Trials ----------------------------------------------------------------------------------------

CODE = {"tests": [{"call": "twice(2)", "equals": "4"}]}
PRINTED = {"tests": [{"stdin": "2", "stdout": "4"}]}
TWICE = "```python\ndef twice(x):\n    return 2 * x\n```"


def code(arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    return task(verifier="code", arguments=arguments, **more)


def every(*parts: dict[str, Any]) -> dict[str, Any]:
    of = [{name: part[name] for name in ("verifier", "arguments")} for part in parts]
    return {"verifier": "all", "arguments": {"of": of}}


UNSOLVABLE: dict[str, tuple[dict[str, Any], str]] = {
    "setup": (
        code({**CODE, "setup": "import notthere"}),
        "setup fails by itself: exit code 1 (Mod",
    ),
    "setup-leaves": (code({**CODE, "setup": "exit()"}), "setup fails by itself: no result"),
    "setup-prints": (code({**PRINTED, "setup": "1 / 0"}), "setup fails by itself: exit code 1 (Z"),
    "setup-hangs": (code({**CODE, "setup": "while 1: 0", "seconds": 1}), "setup fails by itself"),
    "setup-inside": (
        task(**every(FORM, code({**CODE, "setup": "import notthere"}))),
        "No module named 'notthere'",
    ),
    "reference": (
        code(CODE, reference=TWICE.replace("2", "3")),
        "its reference is worth 0 (twice(",
    ),
    "reference-form": (task(reference="Mainz"), "its reference is worth 0 (it lacks 'Wiesbaden')"),
    "reference-type": (task(reference=7), "reference is 7, of another type"),
    "thoughts": (task(arguments={"thoughts": True}), "without thinking=true an answer never has"),
    "thoughts-inside": (
        task(**every(FORM, task(arguments={"thoughts": True}))),
        "without thinking=true",
    ),
}


@needs_sandbox
@pytest.mark.parametrize("name", UNSOLVABLE)
def test_a_task_that_nobody_can_solve_is_refused(name: str, tmp_path: Path) -> None:
    row, reason = UNSOLVABLE[name]
    file = write_rows(tmp_path / "tasks.jsonl", [task(), row])
    mellum2("rl", "check", file).refused("1 of 2 tasks", "line 2", reason)


@needs_sandbox
def test_tasks_with_setups_and_references_are_solved(tmp_path: Path) -> None:
    rows = [
        code({**CODE, "setup": "import math\nbase = 2"}, reference=TWICE),
        code({**PRINTED, "setup": "n = int(input())"}, reference="print(2 * n)"),
        task("Think", thinking=True, arguments={"thoughts": True}, reference="well</think>7"),
    ]
    result = mellum2("rl", "check", write_rows(tmp_path / "tasks.jsonl", rows))
    assert (result.code, result.out.splitlines()[-1]) == (0, "3 tasks: 2 code, 1 form")


def test_without_a_sandbox_programs_are_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = code({**CODE, "setup": "import notthere"}, reference="no program at all")
    file = write_rows(tmp_path / "tasks.jsonl", [row, task("b", reference="Wiesbaden")])
    find_sandbox.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        result = mellum2("rl", "check", file)
    finally:
        find_sandbox.cache_clear()
    assert result.code == 0
    assert "warning: programs of 1 tasks were not tried: bwrap is not installed" in result.out


@pytest.mark.parametrize(
    ("item", "refused"),
    [
        ({"prompt": ASK}, True),
        ({"question": ASK.upper() + "!"}, True),
        ({"messages": [{"role": "user", "content": ASK + " now"}]}, True),
        ({"text": "Name the capital of France"}, False),
        ({"prompt": ASK.replace("German", "old").replace("one", "a")}, False),
    ],
)
def test_a_task_like_a_held_out_item_is_refused(
    item: dict[str, Any], refused: bool, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "tasks.jsonl", [task("What is the sum of 3 and 4?"), task()])
    held_out = write_rows(tmp_path / "held_out.jsonl", [{"prompt": "other"}, item])
    result = mellum2("rl", "check", file, "--held-out", held_out)
    if refused:
        result.refused(f"{file} line 2: its prompt is that of the held-out {held_out} line 2")
    else:
        assert (result.code, result.out) == (0, "2 tasks: 2 form\n")


def test_tasks_of_a_template_may_resemble_those_of_their_validation(tmp_path: Path) -> None:
    """But none may be one of them: the validation would measure what was learnt by heart."""

    def sums(name: str, *numbers: int) -> Path:
        ask = "Add the two numbers, and say nothing but their sum in one word, please:"
        return write_rows(tmp_path / name, [task(f"{ask} {n}, {n + 3}") for n in numbers])

    train, valid = sums("train.jsonl", 1, 2, 3), sums("valid.jsonl", 7, 8)
    assert len(read_tasks([train], validation=[valid]).tasks) == 3
    with pytest.raises(InputError, match="3 of 3 tasks cannot be used"):
        read_tasks([train], held_out=[valid])
    with pytest.raises(InputError, match=r"1 of 3 tasks .*train\.jsonl line 2: its prompt is that"):
        read_tasks([train], validation=[sums("valid.jsonl", 7, 2)])


def test_a_held_out_item_without_text_is_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "tasks.jsonl", [task()])
    held_out = write_rows(tmp_path / "held_out.jsonl", [{"answer": "7"}])
    mellum2("rl", "check", file, "--held-out", held_out).refused("held_out.jsonl line 1")


def test_warnings_are_printed(tmp_path: Path) -> None:
    tests = [{"call": f"f({number})", "equals": "True"} for number in range(2)]
    rows = [task(), task(), task("Sort", verifier="code", arguments={"tests": tests})]
    result = mellum2("rl", "check", write_rows(tmp_path / "tasks.jsonl", rows))
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].endswith("line 3: all tests expect one result, which a program can always give")
    assert "line 2: its prompt is that of" in lines[1]
    assert lines[2] == "3 tasks: 1 code, 2 form"


# -- Probe -----------------------------------------------------------------------------------------


def test_answers_made_elsewhere_are_measured(tmp_path: Path) -> None:
    rows = [task(id="hesse"), task("b", id="b"), task("c")]
    file = write_rows(tmp_path / "tasks.jsonl", rows)
    given = [("hesse", "Wiesbaden"), ("hesse", "Mainz"), ("b", "?"), ("b", ""), (3, "Wiesbaden")]
    answers = write_rows(
        tmp_path / "answers.jsonl", [{"task": name, "answer": text} for name, text in given]
    )
    out, keep = tmp_path / "out.jsonl", tmp_path / "keep.jsonl"
    result = mellum2(
        *("rl", "probe", file, "--answers-file", answers, "--output", out, "--keep", keep)
    )
    assert result.code == 0
    assert result.out.splitlines() == [
        "3 tasks, 5 answers: mean reward 0.400",
        "never solved: 1 tasks (33.3%)",
        "always solved: 1 tasks (33.3%)",
        "answers differ: 1 tasks (33.3%)",
        "  3 x it lacks 'Wiesbaden'",
    ]
    assert [json.loads(line) for line in keep.read_text().splitlines()] == [rows[0]]
    said = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["mean_reward"] for one in said] == [0.5, 0, 1]
    assert said[0] == {
        "task": "hesse",
        "place": f"{file} line 1",
        "mean_reward": 0.5,
        "rewards": [1.0, 0.0],
        "reasons": ["", "it lacks 'Wiesbaden'"],
    }


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"task": "x", "answer": "a"}], "it must be the id of a task"),
        ([{"task": 2, "answer": "a"}], "it must be the id of a task"),
        ([{"task": 1}], "answer is missing"),
        ([{"task": 1, "answer": 7}], "answer is 7"),
        ([{"task": 1, "answer": "a", "end": True}], "unknown argument 'end'"),
        ([], "1 tasks without an answer"),
    ],
)
def test_bad_answers_are_refused(rows: list[Any], reason: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "tasks.jsonl", [task()])
    answers = write_rows(tmp_path / "answers.jsonl", rows)
    mellum2("rl", "probe", file, "--answers-file", answers).refused(reason)


def test_a_probe_needs_one_model_and_writable_places(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "tasks.jsonl", [task()])
    mellum2("rl", "probe", file).refused("either --hf-path or --answers-file")
    missing = file / "out.jsonl"
    mellum2("rl", "probe", file, "--answers-file", file, "--output", missing).refused("--output")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer, whose text is noise: every letter may come."""
    folder = write_folder(tmp_path_factory.mktemp("rl") / "model", {"vocab_size": 384})
    write_tokenizer(folder)
    return folder


def test_a_model_answers_and_is_measured(model: Path, tmp_path: Path) -> None:
    rows = [
        task("x", verifier="form", arguments={"max_characters": 0}),
        task("y", verifier="form", arguments={"max_characters": 1000}),
        task("z", verifier="form", arguments={"pattern": ".*[a-m].*"}),
    ]
    file = write_rows(tmp_path / "tasks.jsonl", rows)
    words = ["rl", "probe", file, "--hf-path", model, "--answers", "6", "--max-new-tokens", "4"]
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    result = mellum2(*words, "--output", first)
    assert result.code == 0, result.err
    assert result.out.startswith("3 tasks, 18 answers: mean reward 0.")
    assert mellum2(*words, "--output", second).code == 0
    assert first.read_text() == second.read_text(), "the seed decides"
    said = [json.loads(line)["rewards"] for line in first.read_text().splitlines()]
    assert said[1] == [1] * 6
    assert 0 < sum(said[2]) < 6


def test_a_prompt_longer_than_the_context_is_refused(model: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "tasks.jsonl", [task("x"), task("word " * 200)])
    words = ["rl", "probe", file, "--hf-path", model, "--max-new-tokens", "4"]
    mellum2(*words).refused("tasks.jsonl line 2", "max_position_embeddings=128")
    mellum2(*words, "--temperature", "0").refused("temperature=0")
