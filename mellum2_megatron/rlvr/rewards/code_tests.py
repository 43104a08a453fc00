"""Code by tests: a program in the answer, run in the sandbox, its results compared outside.

A test is one of:

- ``{"stdin": TEXT, "stdout": TEXT}``: the program reads and prints. Blanks at the ends of lines and
  empty lines at the end do not count.
- ``{"call": EXPRESSION, "equals": LITERAL}``: the value of a Python expression in the program's
  namespace; with ``"tolerance": X`` floats may differ by X, absolutely or relatively.
- ``{"assert": "assert EXPRESSION == LITERAL"}``: the same in the form of MBPP and HumanEval. Also
  ``is``, ``EXPRESSION`` alone, ``not EXPRESSION``, ``abs(EXPRESSION - LITERAL) < X`` and
  ``math.isclose(EXPRESSION, LITERAL)``, with ``rel_tol`` and ``abs_tol``.

Expected results never enter the sandbox. A program can print "passed", leave early, patch built-ins
or read the harness: to be right it has to know the results.
"""

from __future__ import annotations

import ast
import functools
import json
import math
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from mellum2_megatron.common.errors import first_line, shown
from mellum2_megatron.rlvr.rewards.sandbox import Limits, Outcome, find_sandbox
from mellum2_megatron.rlvr.rewards.verdict import (
    RIGHT,
    Answer,
    ArgumentsError,
    Verdict,
    take,
    wrong,
)

_FENCE, _LANGUAGE = "```", re.compile(r"```[ \t]*(\w*)")
_PYTHON = ("python", "python3", "py", "")
_SCRIPT = Path(__file__).with_name("calls_script.py")
_KINDS = {"tests": (list,), "setup": (str,), "seconds": (int, float), "partial": (bool,)}
_ISCLOSE = {"rel_tol", "abs_tol"}
_LEAST_SECONDS = 0.1
"""Less than Python takes to start."""
_MOST_TESTS, _LARGEST_VALUE = 1000, 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Printed:
    """A test of what a program prints."""

    stdin: str
    stdout: str

    def accepts(self, outcome: Outcome) -> bool:
        """Return true for the right text of a program that ended well."""
        said = outcome.output.decode("utf-8", "replace")
        return not outcome.reason and _lines(said) == _lines(self.stdout)


@dataclass(frozen=True, kw_only=True, slots=True)
class Called:
    """A test of a value.

    Attributes:
        expression: Python expression.
        equals: its value, plain data.
        absolute, relative: difference that floats may have, one of the two; default none.
        truth: compare only the truth of the value.
    """

    expression: str
    equals: Any
    absolute: float = 0.0
    relative: float = 0.0
    truth: bool = False

    def accepts(self, value: Any) -> bool:
        """Return true for the right value, plain data."""
        if self.truth:
            return bool(value) is bool(self.equals)
        return _is_close(value, self.equals, self.absolute, self.relative)


Test = Printed | Called


class CodeTests:
    """The verifier ``code``: 1 if all tests pass; with ``partial`` their share.

    Arguments of a task: ``tests``; ``setup``, code in front of the program; ``seconds`` for each
    run, default 10; ``partial``, default false.
    """

    def check(self, arguments: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> list[str]:
        take(arguments, _KINDS, required=["tests"])
        tests = read_tests(arguments["tests"])
        if not _LEAST_SECONDS <= arguments.get("seconds", 10) <= 600:
            raise ArgumentsError(f"seconds is not from {_LEAST_SECONDS} to 600")
        _compile(arguments.get("setup", ""), "exec", "setup")
        expected = {
            repr(test.equals) if isinstance(test, Called) else _lines(test.stdout) for test in tests
        }
        warnings = [
            f"test {number} compares in the sandbox, where a program decides what == means: "
            "give the value as equals"
            for number, test in enumerate(tests, 1)
            if isinstance(test, Called) and _compares(test.expression)
        ]
        if len(expected) == 1 and len(tests) > 1:
            warnings.append("all tests expect one result, which a program can always give")
        return warnings

    def score(
        self,
        answer: Answer,
        arguments: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]],
    ) -> Verdict:
        program = find_program(answer.content)
        if program is None:
            return wrong("no program")
        tests = read_tests(arguments["tests"])
        program = f"{arguments.get('setup', '')}\n{program}" if "setup" in arguments else program
        limits = _limits(arguments)
        all_needed = not arguments.get("partial", False)
        passed, reason = _run_tests(program, tests, limits, all_needed=all_needed)
        if passed == len(tests):
            return RIGHT
        return Verdict(reward=0.0 if all_needed else passed / len(tests), reason=reason)


def try_setup(arguments: Mapping[str, Any]) -> None:
    """Run a task's ``setup`` in the sandbox, as it stands in front of each program.

    Args:
        arguments: checked arguments of ``code``.

    Raises:
        ArgumentsError: it fails, so every program would.
        InputError: there is no sandbox.
    """
    setup = arguments.get("setup", "")
    if not setup.strip():
        return
    tests = read_tests(arguments["tests"])
    printed = [test for test in tests if isinstance(test, Printed)]
    stdin = printed[0].stdin if len(printed) == len(tests) else None
    reason = _setup_fault(setup, stdin, _limits(arguments))
    if reason:
        raise ArgumentsError(f"setup fails by itself: {reason}")


@functools.lru_cache(4096)
def _setup_fault(setup: str, stdin: str | None, limits: Limits) -> str:
    """Return why a setup fails, with an input or, None, in front of calls; empty if it does not."""
    if stdin is None:
        return _run_calls(setup, [Called(expression="0", equals=0)], limits)[1].removeprefix("0: ")
    return find_sandbox().run(setup, stdin=stdin.encode(), limits=limits).reason


def _limits(arguments: Mapping[str, Any]) -> Limits:
    seconds = float(arguments.get("seconds", 10))
    return Limits(seconds=seconds, cpu_seconds=math.ceil(seconds))


def find_program(text: str) -> str | None:
    """Return the last Python block of an answer; all of an answer without any block.

    A block without an end is the end of an answer that was cut off, and no program.
    """
    blocks = [body for language, body in _blocks(text) if language.lower() in _PYTHON]
    if blocks:
        return blocks[-1]
    return text if text.strip() and _FENCE not in text else None


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield language and content of each closed block.

    Line by line, as every reading of an answer here goes through it once: a regular expression
    would try each of a thousand openings up to the end.
    """
    language: str | None = None
    body: list[str] = []
    for line in text.split("\n"):
        if not line.startswith(_FENCE):
            body.append(line + "\n")
        elif language is None:
            opening = _LANGUAGE.match(line)
            assert opening is not None
            language, body = opening[1], []
        else:
            yield language, "".join(body)
            language = None


def read_tests(values: Sequence[Any]) -> list[Test]:
    """Return the tests of a task.

    Raises:
        ArgumentsError: none, too many, or the first that has another form.
    """
    if not 0 < len(values) <= _MOST_TESTS:
        raise ArgumentsError(f"there are {len(values)} tests; a task has 1 to {_MOST_TESTS}")
    tests = []
    for number, value in enumerate(values, 1):
        try:
            tests.append(_read_test(value))
        except ArgumentsError as error:
            raise ArgumentsError(f"test {number}: {error}") from None
    return tests


def _read_test(value: Any) -> Test:
    if not isinstance(value, Mapping):
        raise ArgumentsError(f"it is no object but {shown(value)}")
    if "stdout" in value:
        take(value, {"stdin": (str,), "stdout": (str,)}, required=["stdout"])
        if not value["stdout"].strip():
            raise ArgumentsError("stdout is empty, which a program that ends at once prints too")
        if len(value["stdout"].encode("utf-8", "replace")) > Limits().output_bytes:
            raise ArgumentsError("stdout is longer than the sandbox's limit of output")
        for name in ("stdin", "stdout"):
            _require_text(value.get(name, ""), name)
        return Printed(stdin=value.get("stdin", ""), stdout=value["stdout"])
    if "assert" in value:
        take(value, {"assert": (str,)}, required=["assert"])
        return _read_assert(value["assert"])
    take(
        value,
        {"call": (str,), "equals": (str,), "tolerance": (int, float)},
        required=["call", "equals"],
    )
    _compile(value["call"], "eval", "call")
    tolerance = float(value.get("tolerance", 0.0))
    if not 0 <= tolerance < 1:
        raise ArgumentsError("tolerance is not from 0 to below 1")
    expected = _literal(_compile(value["equals"], "eval", "equals").body)
    return Called(
        expression=value["call"],
        equals=_reachable(expected),
        absolute=tolerance,
        relative=tolerance,
    )


def _compares(expression: str) -> bool:
    """Return true if the value of an expression is that of a comparison."""
    return isinstance(ast.parse(expression, mode="eval").body, ast.Compare)


def _require_text(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ArgumentsError(f"{name} has half a character, which no UTF-8 can hold") from None


def _read_assert(text: str) -> Called:
    """Return an assertion as a test whose expected value is known here."""
    statements = _compile(text.strip(), "exec", "assert").body
    if len(statements) != 1 or not isinstance(statements[0], ast.Assert):
        raise ArgumentsError("it is not one assert statement")
    test = statements[0].test
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return Called(expression=ast.unparse(test.operand), equals=False, truth=True)
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        left, operator, right = test.left, test.ops[0], test.comparators[0]
        if isinstance(operator, ast.Lt | ast.LtE) and _is_call(left, "abs"):
            difference = left.args[0] if left.args else None
            if isinstance(difference, ast.BinOp) and isinstance(difference.op, ast.Sub):
                return _about(difference.left, difference.right, absolute=_tolerance(right))
        if isinstance(operator, ast.Eq | ast.Is):
            return _about(left, right)
        # `f(x) != 4` is true of nearly everything.
        raise ArgumentsError(
            "the value is compared with another operator than == and is, and so is not known here"
        )
    if _is_call(test, "isclose") and len(test.args) == 2:
        given = {word.arg: _tolerance(word.value) for word in test.keywords}
        if ast.unparse(test.func) not in ("isclose", "math.isclose") or given.keys() - _ISCLOSE:
            raise ArgumentsError("isclose is known as math.isclose(a, b, rel_tol=X, abs_tol=Y)")
        absolute, relative = given.get("abs_tol", 0.0), given.get("rel_tol", 1e-9)
        return _about(*test.args, absolute=absolute, relative=relative)
    if isinstance(test, ast.Call | ast.Name | ast.Subscript | ast.Attribute):
        return Called(expression=ast.unparse(test), equals=True, truth=True)
    raise ArgumentsError("it is neither EXPRESSION == LITERAL nor a call")


def _is_call(node: ast.expr, name: str) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == name


def _tolerance(node: ast.expr) -> float:
    value = _literal(node)
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ArgumentsError(f"the tolerance {shown(ast.unparse(node))} is not from 0 on")
    return float(value)


def _about(
    left: ast.expr, right: ast.expr, *, absolute: float = 0.0, relative: float = 0.0
) -> Called:
    """Return the test of two sides, one of which is a literal."""
    for side, other in ((right, left), (left, right)):
        try:
            expected = _literal(side)
        except ArgumentsError:
            continue
        return Called(
            expression=ast.unparse(other),
            equals=_reachable(expected),
            absolute=absolute,
            relative=relative,
        )
    raise ArgumentsError("neither side is a literal, so the value is not known outside the sandbox")


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise ArgumentsError(f"{shown(ast.unparse(node))} is no literal") from None


def _reachable(expected: Any) -> Any:
    """Return an expected value if a program's could be that: values come out as text."""
    try:
        text = repr(expected)
        same = len(text) <= _LARGEST_VALUE and ast.literal_eval(text) == expected
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        same = False
    if not same:
        raise ArgumentsError(
            "no program reaches the expected value: it is no plain value of at most 64 KiB "
            "(infinity, `...` and numbers of more than 4,300 digits are none)"
        )
    return expected


def _compile(text: str, mode: str, name: str) -> Any:
    try:
        return ast.parse(text, mode=mode)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ArgumentsError(f"{name} is no Python ({first_line(error)})") from None


def _run_tests(
    program: str, tests: Sequence[Test], limits: Limits, *, all_needed: bool
) -> tuple[int, str]:
    """Return the number of tests that pass, and the first reason why one did not."""
    calls = [test for test in tests if isinstance(test, Called)]
    passed, reason = _run_calls(program, calls, limits) if calls else (0, "")
    for number, test in enumerate(tests, 1):
        if reason and all_needed:
            break
        if isinstance(test, Called):
            continue
        outcome = find_sandbox().run(program, stdin=test.stdin.encode(), limits=limits)
        if test.accepts(outcome):
            passed += 1
        else:
            reason = reason or f"test {number}: {outcome.reason or 'other output'}"
    return passed, reason


def _run_calls(program: str, tests: Sequence[Called], limits: Limits) -> tuple[int, str]:
    nonce = secrets.token_hex(16)
    job = {
        "program": program,
        "nonce": nonce,
        "expressions": [test.expression for test in tests],
    }
    outcome = find_sandbox().run(
        _SCRIPT.read_text(encoding="utf-8"), stdin=json.dumps(job).encode(), limits=limits
    )
    said: dict[int, list[str]] = {}
    for line in outcome.output.decode("utf-8", "replace").splitlines():
        mark, _, rest = line.partition(" ")
        number, _, text = rest.partition(" ")
        if secrets.compare_digest(mark.encode(), nonce.encode()) and number.isdecimal():
            said.setdefault(int(number[:9]), []).append(text)
    passed, reason = 0, ""
    for place, test in enumerate(tests):
        values = said.get(place, [])
        fault = "no result" if not values else "results twice" if len(values) > 1 else ""
        if not fault:
            fault = _fault_of(test, values[0])
        if not fault:
            passed += 1
        elif not reason:
            why = outcome.reason if not values and outcome.reason else fault
            reason = f"{shown(test.expression, quote=False)}: {why}"
    return passed, reason


def _fault_of(test: Called, text: str) -> str:
    """Return why a value that the sandbox wrote is not the right one; empty if it is."""
    if text.startswith("error "):
        return text.removeprefix("error ")[:80]
    if len(text) > _LARGEST_VALUE:
        return "a value of more than 64 KiB"
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return "no plain value"
    try:
        return "" if test.accepts(value) else f"it is {shown(text, quote=False)}"
    except (RecursionError, OverflowError):  # a whole number that no float can be compared with
        return "no plain value"


def _is_close(value: Any, expected: Any, absolute: float, relative: float) -> bool:
    """Compare as ``==`` does, floats within a tolerance, in lists and tuples too."""
    if not absolute and not relative:
        return bool(value == expected)
    if isinstance(expected, int | float) and isinstance(value, int | float):
        return math.isclose(value, expected, rel_tol=relative, abs_tol=absolute)
    if isinstance(expected, list | tuple) and type(value) is type(expected):
        return len(value) == len(expected) and all(
            _is_close(a, b, absolute, relative) for a, b in zip(value, expected, strict=True)
        )
    if isinstance(expected, dict) and isinstance(value, dict):
        return value.keys() == expected.keys() and all(
            _is_close(value[key], expected[key], absolute, relative) for key in expected
        )
    return bool(value == expected)


def _lines(text: str) -> tuple[str, ...]:
    lines = [line.rstrip() for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    return tuple(lines)
