"""Verifiers: right and wrong answers, and arguments that cannot work."""

from __future__ import annotations

import functools
import json
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.common.limited_process import LimitError
from mellum2_megatron.rlvr.rewards import verifiers, worker
from mellum2_megatron.rlvr.rewards.code_tests import find_program
from mellum2_megatron.rlvr.rewards.verdict import Answer, ArgumentsError, Verdict
from mellum2_megatron.rlvr.rewards.verifiers import VERIFIERS, _calls, find_verifier, last_boxed
from tests.sandbox import needs_sandbox

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
PING = {"type": "function", "function": {"name": "ping"}}
TOOLS = [WEATHER, PING]


def score(name: str, text: str, arguments: dict[str, Any], *, thinking: bool = False) -> Verdict:
    verifier = find_verifier(name, Path())
    verifier.check(arguments, TOOLS)
    return verifier.score(Answer(text=text, thinking=thinking), arguments, TOOLS)


# -- Code ------------------------------------------------------------------------------------------

ADD = [{"assert": "assert add(2, 3) == 5"}, {"call": "add('a', 'b')", "equals": "'ab'"}]


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "tests", "reward"),
    [
        ("def add(a, b): return a + b", ADD, 1),
        ("def add(a, b): return 5", ADD, 0),
        ("def half(a): return a / 2", [{"assert": "assert abs(half(3) - 1.5) < 1e-6"}], 1),
        ("def half(a): return 1.4", [{"assert": "assert abs(half(3) - 1.5) < 1e-6"}], 0),
        ("def f(): return 1000.4", [{"assert": "assert abs(f() - 1000) < 0.5"}], 1),
        ("def f(): return 1400", [{"assert": "assert abs(f() - 1000) < 0.5"}], 0),
        ("def f(): return 103", [{"assert": "assert abs(f() - 100) < 5"}], 1),
        ("def f(): return 3.15", [{"assert": "assert math.isclose(f(), 3.14, rel_tol=0.01)"}], 1),
        ("def f(): return 3.15", [{"assert": "assert math.isclose(f(), 3.14)"}], 0),
        ("def f(): return 1e-12", [{"assert": "assert math.isclose(f(), 0.0)"}], 0),
        ("def f(): return 1e-12", [{"assert": "assert math.isclose(f(), 0, abs_tol=1e-9)"}], 1),
        ("def f(x): return x > 1", [{"assert": "assert f(2)"}, {"assert": "assert not f(1)"}], 1),
        ("def f(x): return 7", [{"assert": "assert f(2)"}, {"assert": "assert not f(1)"}], 0),
        ("def f(): return {1: (2, None)}", [{"call": "f()", "equals": "{1: (2, None)}"}], 1),
        ("def f(): return [2]", [{"call": "f()", "equals": "(2,)"}], 0),
        ("def f(): return [0.1 + 0.2]", [{"call": "f()", "equals": "[0.3]", "tolerance": 1e-9}], 1),
        (
            "from collections import Counter as f",
            [{"call": "f('aab')", "equals": "{'a': 2, 'b': 1}"}],
            1,
        ),
        ("a, b = map(int, input().split())\nprint(a + b)", [{"stdin": "2 3\n", "stdout": "5"}], 1),
        ("print('5  ')\nprint()", [{"stdout": "5\n"}], 1),
        ("print(5)\nprint(6)", [{"stdout": "5\n"}], 0),
        ("print(5)\nraise SystemExit(1)", [{"stdout": "5\n"}], 0),
    ],
)
def test_code(program: str, tests: list[Any], reward: float) -> None:
    verdict = score("code", f"So:\n```python\n{program}\n```\nDone.", {"tests": tests})
    assert verdict.reward == reward
    assert bool(verdict.reason) == (reward < 1)


@needs_sandbox
def test_code_with_setup_and_partial() -> None:
    tests = [{"call": "twice(2)", "equals": "4"}, {"call": "twice(base)", "equals": "20"}]
    arguments = {"tests": tests, "setup": "base = 10", "partial": True}
    assert score("code", "def twice(x): return 2 * x", arguments).reward == 1
    assert score("code", "def twice(x): return 4", arguments).reward == 0.5
    assert score("code", "def twice(x): return 4", {**arguments, "partial": False}).reward == 0


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```\nor\n```py\nb\n```", "b\n"),
        ("```\na\n```", "a\n"),
        ("```python\na\n```\nrun it:\n```bash\nls\n```", "a\n"),
        ("a = 1", "a = 1"),
        ("```python\nwas cut", None),
        ("```bash\nls\n```", None),
        ("  \n", None),
    ],
)
def test_the_program_of_an_answer(text: str, program: str | None) -> None:
    assert find_program(text) == program


# -- Mathematics -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        (r"so \boxed{0.5}", r"\frac{1}{2}", 1),
        (r"\boxed{1} no, \boxed{\frac{2}{4}}", "0.5", 1),
        (r"\boxed{x + 1}", "1+x", 1),
        (r"\boxed{\{3, 1, 2\}}", r"\{1,2,3\}", 1),
        (r"\boxed{2^{1/2}}", r"\sqrt{2}", 1),
        (r"\boxed{8}", "7", 0),
        (r"\boxed{7} or \boxed{8}", "7", 0),
        (r"\boxed{7, 8}", "7", 0),
        (r"\boxed{7 \text{ or } 8}", "7", 0),
        ("it is 7", "7", 0),
        (r"\boxed{}", "7", 0),
        (r"\boxed{7", "7", 0),
        (r"\boxed{x}", "7", 0),
        (r"\boxed{\frac{\frac{", "7", 0),
        (r"\boxed{__import__('os').system('id')}", "7", 0),
        (r"\boxed{7;8}", "7", 0),
        (r"\boxed{8 7}", "7", 0),
        (r"\boxed{7=8}", "7", 0),
        (r"\boxed{8\\7}", "7", 0),
        (r"\boxed{8$ or $7}", "7", 0),
        (r"\boxed{7 \lor 8}", "7", 0),
        (r"\boxed{6 \pm 1}", "7", 0),
        (r"\boxed{[7, 8]}", "7", 0),
        ("\\boxed{\N{FULLWIDTH DIGIT SEVEN}}", "7", 0),
        ("\\boxed{\N{RIGHT-TO-LEFT OVERRIDE}7}", "7", 0),
        ("\\boxed{8\N{ZERO WIDTH SPACE}7}", "7", 0),
    ],
)
def test_mathematics(text: str, answer: str, reward: float) -> None:
    assert score("math", text, {"answer": answer}).reward == reward


def test_a_value_without_end_is_wrong() -> None:
    assert score("math", r"\boxed{9^{9^{9^{9}}}}", {"answer": "7"}).reward == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [(r"\boxed{a{b}c} \boxed{d", "a{b}c"), (r"\boxed {a}", "a"), ("", None), (r"\boxed{ }", None)],
)
def test_the_last_box(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


def plain_last_box(text: str) -> str | None:
    """By counting braces from each box on, the last first."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return text[start:place].strip() or None
    return None


def plain_program(text: str) -> str | None:
    fence = r"^```[ \t]*(\w*)[^\n]*\n(.*?)^```"
    found = re.findall(fence, text, re.MULTILINE | re.DOTALL)
    python = [body for language, body in found if language.lower() in ("python", "")]
    return python[-1] if python else text if text.strip() and "```" not in text else None


def plain_calls(text: str) -> tuple[list[str], str]:
    call = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
    return call.findall(text), call.sub("", text)


@pytest.mark.parametrize(
    ("found", "plain", "parts"),
    [
        (last_boxed, plain_last_box, ["\\boxed{", "\\boxed {", "{", "}", "7", " "]),
        (find_program, plain_program, ["```", "python", "\n", "\n```\n", " ", "x"]),
        (_calls, plain_calls, ["<tool_call>", "</tool_call>", "a"]),
    ],
)
def test_answers_are_read_once_with_the_same_result(found: Any, plain: Any, parts: Any) -> None:
    """Of random texts as by the plain definition, which looks at some answers for hours."""
    draw = random.Random(7)
    for _ in range(4000):
        text = "".join(draw.choices(parts, k=draw.randrange(12)))
        assert found(text) == plain(text), repr(text)
    for part in (*parts, "```" + "a" * 100):
        found(part * 100_000)


# -- Tool calls ------------------------------------------------------------------------------------


def call(name: str, arguments: str) -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


ULM = call("weather", '{"city": "Ulm", "days": 1}')
WANTED = [{"name": "weather", "arguments": {"city": "Ulm", "days": 1}}]


@pytest.mark.parametrize(
    ("text", "calls", "reward"),
    [
        ("I look.\n" + ULM, WANTED, 1),
        (call("weather", '{"days": 1, "city": "Ulm"}'), WANTED, 1),
        (ULM + "\n" + call("ping", "{}"), [{"name": "ping"}, *WANTED], 1),
        (ULM, [{"name": "weather"}], 1),
        (ULM, None, 1),
        ("no call", [], 1),
        (ULM, [], 0),
        ("no call", None, 0),
        ("no call", WANTED, 0),
        (ULM + ULM, WANTED, 0),
        (call("weather", '{"city": "Ulm", "days": true}'), None, 0),
        (call("weather", '{"city": "Ulm", "days": 2}'), WANTED, 0),
        (call("weather", '{"days": 1}'), None, 0),
        (call("weather", '{"city": "Ulm", "unit": "C"}'), None, 0),
        (call("climate", '{"city": "Ulm"}'), None, 0),
        (call("weather", '{"city": "Ulm"'), None, 0),
        (ULM.removesuffix("</tool_call>"), None, 0),
        (ULM + "<tool_call>", WANTED, 0),
        ("<tool_call>[1]</tool_call>", None, 0),
        ('<tool_call>{"name": "ping", "more": 1}</tool_call>', None, 0),
        ('<tool_call>{"name": "ping", "name": "ping"}</tool_call>', None, 0),
    ],
)
def test_tool_calls(text: str, calls: list[Any] | None, reward: float) -> None:
    arguments = {} if calls is None else {"calls": calls}
    verdict = score("tool_calls", text, arguments)
    assert verdict.reward == reward, verdict.reason
    assert bool(verdict.reason) == (reward < 1)


# -- Form, all, own --------------------------------------------------------------------------------

SCHEMA = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
TREE = {"type": "array", "items": {"$ref": "#"}}
WHOLE = {"$defs": {"n": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("text", "arguments", "reward"),
    [
        ("yes, it is", {"contains": ["yes"], "lacks": ["no"]}, 1),
        ("yes and no", {"contains": ["yes"], "lacks": ["no"]}, 0),
        ("maybe", {"contains": ["yes"]}, 0),
        ("a-1", {"pattern": r"[a-z]-\d"}, 1),
        ("a-12", {"pattern": r"[a-z]-\d"}, 0),
        ('{"a": 1}', {"json_schema": SCHEMA}, 1),
        ('{"a": 1.5}', {"json_schema": SCHEMA}, 0),
        ("[[[]]]", {"json_schema": TREE}, 1),
        ("[[7]]", {"json_schema": TREE}, 0),
        ("[7]", {"json_schema": {"$id": "http://x/y", "items": {"$ref": "#/$defs/n"}, **WHOLE}}, 1),
        (
            "[[]]",
            {"json_schema": {"$id": "http://x/y", "items": {"$ref": "#/$defs/n"}, **WHOLE}},
            0,
        ),
        ("{'a': 1}", {"json_schema": SCHEMA}, 0),
        ("four", {"max_characters": 4}, 1),
        ("fifth", {"max_characters": 4}, 0),
    ],
)
def test_form(text: str, arguments: dict[str, Any], reward: float) -> None:
    assert score("form", text, arguments).reward == reward


@pytest.mark.parametrize(
    ("text", "closed", "content"),
    [
        ("<think>\nwell\n</think>\n\nyes", True, "yes"),
        ("well</think>yes", True, "yes"),
        ("<think>well yes", False, ""),
        ("<think></think>yes", False, "yes"),
        ("<think>a</think>yes<think>b</think>", False, "yes<think>b</think>"),
        ("yes", False, ""),
    ],
)
def test_thoughts(text: str, closed: bool, content: str) -> None:
    assert score("form", text, {"thoughts": True}, thinking=True).reward == closed
    assert Answer(text=text, thinking=True).content == content


def test_an_answer_in_the_thoughts_is_none() -> None:
    text = r"<think>\boxed{7}</think>I do not know"
    assert score("math", text, {"answer": "7"}, thinking=True).reward == 0
    assert score("math", text + r"\boxed{7}", {"answer": "7"}, thinking=True).reward == 1


def test_all_is_the_least() -> None:
    parts = [
        {"verifier": "math", "arguments": {"answer": "7"}},
        {"verifier": "form", "arguments": {"max_characters": 20}},
    ]
    assert score("all", r"\boxed{7}", {"of": parts}).reward == 1
    assert score("all", r"\boxed{7}" + "!" * 20, {"of": parts}).reward == 0
    assert score("all", r"\boxed{8}", {"of": parts}).reward == 0


def own(folder: Path, body: str) -> Any:
    (folder / "rewards.py").write_text(
        f"import time\ndef reward(answer, **arguments):\n    {body}\n"
    )
    return find_verifier("rewards.py:reward", folder)


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    verifier = own(tmp_path, "print('x')\n    return answer.count('a') / arguments['most']")
    assert verifier.check({"most": 4}, []) == []
    assert verifier.score(Answer(text="banana"), {"most": 4}, []).reward == 0.75


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1.5", "the reward 1.5"),
        ("return -1", "the reward -1"),
        ("return 'good'", "the reward 'good'"),
        ("return None", "the reward null"),
        ("return float('nan')", "it returns nan"),
        ("return 10 ** 10 ** 4", "OverflowError"),
        ("return [1] * 10 ** 6", r"it returns \[1, 1"),
        ("import os; os._exit(0)", "its process ends with exit code 0"),
        ("import os; os._exit(3)", "its process ends with exit code 3"),
        ("import os; os.closerange(0, 99)", "its process ends with exit code 1"),
        ("return 1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
    ],
)
def test_a_reward_that_lies_about_its_range(body: str, message: str, tmp_path: Path) -> None:
    verifier = own(tmp_path, body)
    with pytest.raises(WorkError, match=message):
        verifier.score(Answer(text="x"), {}, [])
    with pytest.raises(ArgumentsError, match=message):
        verifier.check({}, [])


@pytest.mark.parametrize(
    ("body", "reward"),
    [
        ("import numpy; return numpy.float32(0.5)", 0.5),
        ("return True", 1),
        ("import fractions; return fractions.Fraction(1, 4)", 0.25),
    ],
)
def test_all_kinds_of_numbers_are_rewards(body: str, reward: float, tmp_path: Path) -> None:
    assert own(tmp_path, body).score(Answer(text="x"), {}, []).reward == reward


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return len(bytearray(1 << 40))", "more than 4 GiB"),
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("import os; os.kill(os.getpid(), 40)", "ended by signal 40"),
    ],
)
def test_an_answer_that_is_too_much_for_a_function_is_worth_0(
    body: str, reason: str, tmp_path: Path
) -> None:
    verdict = own(tmp_path, body).score(Answer(text="x"), {}, [])
    assert verdict.reward == 0
    assert reason in verdict.reason


def test_a_function_that_is_not_in_its_file_is_named(tmp_path: Path) -> None:
    own(tmp_path, "return 1")
    with pytest.raises(ArgumentsError, match="the file has no rewards"):
        find_verifier("rewards.py:rewards", tmp_path).check({}, [])


@pytest.mark.parametrize("body", ["time.sleep(60)", "import os; os.abort()"])
def test_a_function_that_never_answers_is_refused(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer would be worth 0, and all groups flat."""
    monkeypatch.setattr(verifiers, "ask", functools.partial(verifiers.ask, seconds=1.0))
    with pytest.raises(ArgumentsError, match="for an empty answer: it"):
        own(tmp_path, body).check({}, [])


def test_a_schema_that_takes_forever_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task's own call is matched with its tool's pattern, before any answer is."""
    monkeypatch.setattr(verifiers, "ask", functools.partial(verifiers.ask, seconds=1.0))
    text = {"type": "string", "pattern": "^(a+)+$"}
    schema = {"type": "object", "properties": {"text": text}}
    tool = {"type": "function", "function": {"name": "say", "parameters": schema}}
    call = {"name": "say", "arguments": {"text": "a" * 40 + "b"}}
    with pytest.raises(ArgumentsError, match="does not fit its tool: it takes longer than 1 s"):
        find_verifier("tool_calls", Path()).check({"calls": [call]}, [tool])


# -- The workers -----------------------------------------------------------------------------------


def test_a_worker_that_hangs_or_dies_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(
        "import os, time\ndef reward(answer):\n"
        "    if answer == 'hang':\n        time.sleep(600)\n"
        "    if answer == 'die':\n        os._exit(1)\n"
        "    if answer == 'eat':\n        return len(bytearray(1 << 40))\n"
        "    return 1\n"
    )
    job = {"kind": "own", "path": str(tmp_path / "r.py"), "name": "reward", "arguments": {}}
    limits = (("hang", "longer than 0.3 s"), ("die", "exit code 1"), ("eat", "more than 4 GiB"))
    for answer, message in limits:
        with pytest.raises(LimitError, match=message):
            worker.ask({**job, "answer": answer}, seconds=0.3 if answer == "hang" else 20)
        assert worker.ask({**job, "answer": "x"}) == {"reward": 1}


def test_a_function_that_closes_the_channel_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_GONE_S", 0.1)
    with pytest.raises(WorkError, match="its process closes the files"):
        own(tmp_path, "import os; os.closerange(0, 99); time.sleep(60)").score(
            Answer(text="x"), {}, []
        )


def test_a_job_whose_worker_is_killed_is_given_to_another(tmp_path: Path) -> None:
    """As by the kernel, for the memory that other processes took."""
    (tmp_path / "r.py").write_text(
        "import os, pathlib\ndef reward(answer, times):\n"
        "    log = pathlib.Path(__file__).with_name('log')\n"
        "    log.write_text(log.read_text() + 'x' if log.exists() else 'x')\n"
        "    if len(log.read_text()) <= times: os.kill(os.getpid(), 9)\n"
        "    return 1\n"
    )
    verifier = find_verifier("r.py:reward", tmp_path)
    assert verifier.score(Answer(text=""), {"times": 1}, []).reward == 1
    (tmp_path / "log").unlink()
    verdict = verifier.score(Answer(text=""), {"times": 9}, [])
    assert (verdict.reward, "was killed" in verdict.reason) == (0, True)
    assert (tmp_path / "log").read_text() == "xx"


def test_a_worker_that_does_not_start_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_idle", [])
    monkeypatch.setattr(worker, "_SCRIPT", Path("/nonexistent.py"))
    with pytest.raises(WorkError, match="did not start: its process ends with exit code 2"):
        VERIFIERS["math"].score(Answer(text=r"\boxed{7}"), {"answer": "7"}, [])


def test_a_worker_ends_with_all_that_it_has_started(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(
        "import subprocess, time\ndef reward(answer):\n"
        "    subprocess.Popen(['sleep', '77777'])\n    time.sleep(600)\n"
    )
    job = {"kind": "own", "path": str(tmp_path / "r.py"), "name": "reward", "arguments": {}}
    with pytest.raises(LimitError, match="longer than 1 s"):
        worker.ask({**job, "answer": ""}, seconds=1)
    sleeping = [
        one for one in psutil.process_iter(["cmdline"]) if "77777" in (one.info["cmdline"] or ())
    ]
    assert not psutil.wait_procs(sleeping, timeout=20)[1]


def test_a_job_that_nobody_waits_for_ends() -> None:
    """As of a run that was killed: no other process looks at the time."""
    program = (
        f"import sys; sys.path.append({str(Path(worker.__file__).parent)!r})\n"
        "import worker_script\nworker_script._CPU_SECONDS = 0.3\nworker_script._main()"
    )
    job = {"kind": "pattern", "pattern": "(a+)+b", "text": "a" * 60}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, input=json.dumps(job) + "\n", text=True, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (-signal.SIGPROF, "{}\n")


def test_a_worker_killed_while_it_waits_fails_no_job() -> None:
    job = {"kind": "pattern", "pattern": "a", "text": "a"}
    assert worker.ask(job) == {"fault": ""}
    for child in psutil.Process().children():
        if "worker_script" in " ".join(child.cmdline()):
            child.kill()
    time.sleep(0.1)  # until the kernel has ended them; only the worker may wait for them
    assert worker.ask(job) == {"fault": ""}


def test_many_threads_ask_at_once() -> None:
    jobs = [
        {"kind": "pattern", "pattern": str(number), "text": str(number // 2 * 2)}
        for number in range(40)
    ]
    with ThreadPoolExecutor(4) as pool:
        faults = [answer["fault"] for answer in pool.map(worker.ask, jobs)]
    assert [not fault for fault in faults] == [number % 2 == 0 for number in range(40)]


# -- Arguments that cannot work --------------------------------------------------------------------

BAD_ARGUMENTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "name": ("cod", {}, "did you mean 'code'"),
    "file": ("rewards.py:reward", {}, "no FILE.py:FUNCTION"),
    "missing": ("code", {}, "tests is missing"),
    "unknown": ("code", {"tests": ADD, "test": 1}, "unknown argument 'test'"),
    "type": ("code", {"tests": "x"}, "of another type"),
    "half-stdin": ("code", {"tests": [{"stdin": "\ud800", "stdout": "1"}]}, "stdin has half"),
    "half-stdout": ("code", {"tests": [{"stdout": "\udc00"}]}, "test 1: stdout has half"),
    "has-and-lacks": ("form", {"contains": ["a cat"], "lacks": ["cat"]}, "and to lack 'cat'"),
    "no-test": ("code", {"tests": []}, "there are 0 tests"),
    "seconds": ("code", {"tests": ADD, "seconds": 0}, "seconds is not from 0.1 to 600"),
    "setup": ("code", {"tests": ADD, "setup": "def"}, "setup is no Python"),
    "no-object": ("code", {"tests": [1]}, "test 1: it is no object"),
    "empty-output": ("code", {"tests": [{"stdout": " \n"}]}, "test 1: stdout is empty"),
    "no-literal": ("code", {"tests": [{"call": "f()", "equals": "g()"}]}, "is no literal"),
    "no-python": ("code", {"tests": [{"call": "f(", "equals": "1"}]}, "call is no Python"),
    "not-equal": ("code", {"tests": [{"assert": "assert f() != 1"}]}, "another operator"),
    "both-open": ("code", {"tests": [{"assert": "assert f() == g()"}]}, "neither side"),
    "infinite": ("code", {"tests": [{"call": "f()", "equals": "1e999"}]}, "no program reaches"),
    "ellipsis": ("code", {"tests": [{"assert": "assert f() == ..."}]}, "no program reaches"),
    "too-many-digits": (
        "code",
        {"tests": [{"call": "f()", "equals": "0x" + "f" * 5000}]},
        "no program reaches",
    ),
    "large-value": (
        "code",
        {"tests": [{"call": "f()", "equals": repr("x" * (1 << 16))}]},
        "no program reaches",
    ),
    "large-output": ("code", {"tests": [{"stdout": "x" * ((1 << 20) + 1)}]}, "limit of output"),
    "pattern-count": ("form", {"pattern": "a{99999999999}"}, "pattern is no regular expression"),
    "pattern-depth": (
        "form",
        {"pattern": "(" * 5000 + ")" * 5000},
        "pattern is no regular expression",
    ),
    "characters": ("form", {"max_characters": -1}, "max_characters is -1, below 0"),
    "long-name": ("a" * 5000 + ".py:f", {}, "no FILE.py:FUNCTION"),
    "no-assert": ("code", {"tests": [{"assert": "f() == 1"}]}, "not one assert"),
    "close": ("code", {"tests": [{"assert": "assert abs(f() - g()) < 1e-3"}]}, "neither side"),
    "answer": ("math", {"answer": r"\frac{"}, "cannot be read"),
    "call": ("tool_calls", {"calls": [{"name": "x"}]}, "not among the tools"),
    "call-fits": ("tool_calls", {"calls": [{"name": "weather", "arguments": {}}]}, "'city'"),
    "nothing": ("form", {}, "nothing is asked for"),
    "empty-lists": ("form", {"lacks": [], "contains": []}, "nothing is asked for"),
    "short-and-long": ("form", {"contains": ["four"], "max_characters": 3}, "cannot contain 'fou"),
    "no-schema": ("form", {"json_schema": False}, "which no answer fits"),
    "pattern": ("form", {"pattern": "("}, "no regular expression"),
    "schema": ("form", {"json_schema": {"type": "objec"}}, "a schema is wrong"),
    "reference": ("form", {"json_schema": {"$ref": "http://x/y"}}, "leads out of the schema"),
    "nowhere": (
        "form",
        {"json_schema": {"items": {"$ref": "#/$defs/x"}, "$defs": {"y": {}}}},
        "'#/$defs/x' leads nowhere",
    ),
    "no-anchor": ("form", {"json_schema": {"$dynamicRef": "#x"}}, "'#x' leads nowhere"),
    "circle": (
        "form",
        {"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#"}}}},
        "leads back to itself",
    ),
    "numpy-close": ("code", {"tests": [{"assert": "assert np.isclose(f(), 1)"}]}, "math.isclose"),
    "tolerance": (
        "code",
        {"tests": [{"assert": "assert abs(f() - 1) < -2"}]},
        "the tolerance '-2' is not from 0",
    ),
    "texts": ("form", {"contains": [""]}, "no list of texts"),
    "one": ("all", {"of": [{"verifier": "form"}]}, "fewer than 2"),
    "inside": ("all", {"of": [{"verifier": "all"}] * 2}, "all stands inside all"),
    "part": ("all", {"of": [{"verifier": "form"}] * 2}, "nothing is asked for"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_arguments_that_cannot_work(name: str) -> None:
    verifier, arguments, message = BAD_ARGUMENTS[name]
    with pytest.raises(ArgumentsError) as caught:
        find_verifier(verifier, Path()).check(arguments, TOOLS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_task_that_a_constant_solves_is_named() -> None:
    tests = [{"call": "f(1)", "equals": "2"}, {"call": "f(2)", "equals": "2"}]
    assert "one result" in VERIFIERS["code"].check({"tests": tests}, [])[0]
    assert VERIFIERS["code"].check({"tests": ADD}, []) == []
    inside = [{"call": "f(1)", "equals": "2"}, {"call": "f(2) == 4", "equals": "True"}]
    warnings = VERIFIERS["code"].check({"tests": inside}, [])
    assert [line.partition(",")[0] for line in warnings] == ["test 2 compares in the sandbox"]


def test_tool_calls_need_tools() -> None:
    with pytest.raises(ArgumentsError, match="has no tools"):
        VERIFIERS["tool_calls"].check({}, [])
