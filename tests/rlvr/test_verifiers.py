"""Verifiers: right and wrong answers, and arguments that cannot work."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

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
