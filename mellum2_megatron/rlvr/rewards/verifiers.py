"""The verifiers by name: code, math, tool_calls, form, all, and functions of a user's file."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mellum2_megatron.common.errors import WorkError, nearest, shown
from mellum2_megatron.common.json_files import JsonError, parse_json, parse_object
from mellum2_megatron.common.limited_process import LimitError
from mellum2_megatron.rlvr.rewards.code_tests import CodeTests
from mellum2_megatron.rlvr.rewards.verdict import (
    END_THINK,
    RIGHT,
    THINK,
    Answer,
    ArgumentsError,
    Verdict,
    Verifier,
    take,
    wrong,
)
from mellum2_megatron.rlvr.rewards.worker import LeftError, ask

Arguments = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]

_CALL, _END_CALL = "<tool_call>", "</tool_call>"
_BRACE = re.compile(r"(\\boxed\s*\{)|[{}]")


def find_verifier(name: str, folder: Path) -> Verifier:
    """Return the verifier of a name.

    Args:
        name: a name of `VERIFIERS`, or ``FILE.py:FUNCTION``.
        folder: folder that such a file's name starts from.

    Raises:
        ArgumentsError: there is none.
    """
    file, colon, function = name.rpartition(":")
    if colon and file.endswith(".py"):
        path = folder / file
        # os.path, because pathlib raises for a name that is too long.
        if not os.path.isfile(path) or not function.isidentifier():
            raise ArgumentsError(f"the verifier {shown(name)} is no FILE.py:FUNCTION in {folder}")
        return OwnFunction(path, function)
    if name == "all":
        return All(folder)
    if name not in VERIFIERS:
        raise ArgumentsError(
            f"there is no verifier {shown(name)}; {nearest(name, [*VERIFIERS, 'all'])}"
        )
    return VERIFIERS[name]


class Mathematics:
    r"""The verifier ``math``: the value in the last ``\boxed{...}`` equals ``answer``.

    Equal by math-verify: 1/2 is 0.5, and a set has no order.

    Arguments of a task: ``answer``, LaTeX or plain.
    """

    def check(self, arguments: Arguments, tools: Tools) -> list[str]:
        _require_package("math_verify")
        take(arguments, {"answer": (str,)}, required=["answer"])
        # An answer that is wrong is read as well; one that cannot be read is an error.
        job = {"kind": "mathematics", "given": "1", "wanted": arguments["answer"]}
        try:
            error = ask(job).get("error")
        except LimitError as limit:
            error = str(limit)
        if error:
            raise ArgumentsError(f"answer {shown(arguments['answer'])}: {error}")
        return []

    def score(self, answer: Answer, arguments: Arguments, tools: Tools) -> Verdict:
        given = last_boxed(answer.content)
        if given is None:
            return wrong(r"no \boxed{...}")
        return _verdict({"kind": "mathematics", "given": given, "wanted": arguments["answer"]})


class ToolCalls:
    """The verifier ``tool_calls``: each call fits its tool's schema, and the calls are the wanted.

    Arguments of a task: ``calls``, the wanted calls in any order, each ``{"name", "arguments"}``;
    an empty list wants none. Without it any call that fits its tool's schema is right. A wanted
    call without ``arguments`` leaves them open.
    """

    def check(self, arguments: Arguments, tools: Tools) -> list[str]:
        _require_package("jsonschema")
        take(arguments, {"calls": (list,)}, required=[])
        if not tools:
            raise ArgumentsError("the task has no tools")
        schemas = _schemas(tools)
        _require_schemas(list(schemas.values()))
        for call in arguments.get("calls", []):
            if not isinstance(call, Mapping):
                raise ArgumentsError(f"a call is no object but {shown(call)}")
            take(call, {"name": (str,), "arguments": (dict,)}, required=["name"])
            if call["name"] not in schemas:
                raise ArgumentsError(f"calls {shown(call['name'])}, which is not among the tools")
            if "arguments" in call:
                pairs = [[call["arguments"], schemas[call["name"]]]]
                fault = _fault({"kind": "schema", "pairs": pairs})
                if fault:
                    raise ArgumentsError(f"the wanted call does not fit its tool: {fault}")
        return []

    def score(self, answer: Answer, arguments: Arguments, tools: Tools) -> Verdict:
        calls = []
        texts, rest = _calls(answer.content)
        for text in texts:
            try:
                call = parse_object(text)
            except JsonError as error:
                return wrong(f"a call is no JSON object ({error})")
            if not isinstance(call.get("name"), str) or set(call) - {"name", "arguments"}:
                return wrong("a call is not {name, arguments}")
            calls.append((call["name"], call.get("arguments", {})))
        if "tool_call>" in rest:
            return wrong("a call without beginning or end")
        schemas = _schemas(tools)
        for name, _ in calls:
            if name not in schemas:
                return wrong(f"there is no tool {shown(name)}")
        wanted = arguments.get("calls")
        if wanted is None and not calls:
            return wrong("no call")
        if wanted is not None and (fault := _other_calls(calls, wanted)):
            return wrong(fault)
        pairs = [[given, schemas[name]] for name, given in calls]
        return _verdict({"kind": "schema", "pairs": pairs})


class Form:
    """The verifier ``form``: the answer has the form that the task asks for.

    Arguments of a task, all of which must hold: ``contains`` and ``lacks``, lists of texts;
    ``pattern``, a regular expression of the whole answer; ``json_schema``, a schema of an answer in
    JSON; ``max_characters``; ``thoughts``: true for thoughts in one closed block in front.
    """

    _KINDS = {  # noqa: RUF012  # never changed
        "contains": (list,),
        "lacks": (list,),
        "pattern": (str,),
        "json_schema": (dict, bool),
        "max_characters": (int,),
        "thoughts": (bool,),
    }

    def check(self, arguments: Arguments, tools: Tools) -> list[str]:
        take(arguments, self._KINDS, required=[])
        if all(value == [] for value in arguments.values()):
            raise ArgumentsError(f"nothing is asked for; known: {', '.join(self._KINDS)}")
        for name in ("contains", "lacks"):
            if not all(isinstance(text, str) and text for text in arguments.get(name, [])):
                raise ArgumentsError(f"{name} is no list of texts")
        for text in arguments.get("lacks", []):
            if any(text in part for part in arguments.get("contains", [])):
                raise ArgumentsError(f"an answer has to contain and to lack {shown(text)}")
        most = arguments.get("max_characters", 0)
        if most < 0:
            raise ArgumentsError(f"max_characters is {most}, below 0")
        longest = max(arguments.get("contains", []), key=len, default="")
        if "max_characters" in arguments and len(longest) > most:
            raise ArgumentsError(
                f"an answer of max_characters={most} cannot contain {shown(longest)}"
            )
        try:
            re.compile(arguments.get("pattern", ""))
        except (re.error, OverflowError, RecursionError) as error:
            raise ArgumentsError(f"pattern is no regular expression ({error})") from None
        if arguments.get("json_schema") is False:
            raise ArgumentsError("json_schema is false, which no answer fits")
        if "json_schema" in arguments:
            _require_package("jsonschema")
            _require_schemas([arguments["json_schema"]])
        return []

    def score(self, answer: Answer, arguments: Arguments, tools: Tools) -> Verdict:
        text = answer.content
        if "thoughts" in arguments and _has_thoughts(answer) != arguments["thoughts"]:
            return wrong("no closed thoughts" if arguments["thoughts"] else "thoughts")
        if len(text) > arguments.get("max_characters", len(text)):
            return wrong(f"{len(text):,} characters")
        for part in arguments.get("contains", []):
            if part not in text:
                return wrong(f"it lacks {shown(part)}")
        for part in arguments.get("lacks", []):
            if part in text:
                return wrong(f"it has {shown(part)}")
        verdict = RIGHT
        if "pattern" in arguments:
            job = {"kind": "pattern", "pattern": arguments["pattern"], "text": text}
            verdict = _verdict(job)
        if verdict == RIGHT and "json_schema" in arguments:
            try:
                value = parse_json(text)
            except JsonError as error:
                return wrong(str(error))
            verdict = _verdict({"kind": "schema", "pairs": [[value, arguments["json_schema"]]]})
        return verdict


class All:
    """The verifier ``all``: the least reward of several.

    Arguments of a task: ``of``, a list of ``{"verifier", "arguments"}``.

    Args:
        folder: see `find_verifier`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def check(self, arguments: Arguments, tools: Tools) -> list[str]:
        take(arguments, {"of": (list,)}, required=["of"])
        if len(arguments["of"]) < 2:
            raise ArgumentsError("of has fewer than 2 verifiers")
        warnings = []
        for part in arguments["of"]:
            if not isinstance(part, Mapping):
                raise ArgumentsError(f"an entry of 'of' is no object but {shown(part)}")
            take(part, {"verifier": (str,), "arguments": (dict,)}, required=["verifier"])
            if part["verifier"] == "all":
                raise ArgumentsError("all stands inside all")
            verifier = find_verifier(part["verifier"], self._folder)
            warnings += verifier.check(part.get("arguments", {}), tools)
        return warnings

    def score(self, answer: Answer, arguments: Arguments, tools: Tools) -> Verdict:
        least = RIGHT
        for part in arguments["of"]:
            verifier = find_verifier(part["verifier"], self._folder)
            verdict = verifier.score(answer, part.get("arguments", {}), tools)
            if verdict.reward < least.reward:
                least = verdict
            if not least.reward:
                break
        return least


class OwnFunction:
    """A function of a user's file: the answer's text and the task's arguments -> a reward.

    It runs in a process of its own, 20 seconds for an answer, and then the answer is worth 0.

    Args:
        path: the file.
        name: the function.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def check(self, arguments: Arguments, tools: Tools) -> list[str]:
        try:
            self._ask(Answer(text=""), arguments)
        except LimitError as limit:  # of the function itself: it would make every answer wrong
            raise ArgumentsError(f"for an empty answer: {limit}") from None
        except WorkError as error:
            raise ArgumentsError(f"for an empty answer: {error.what}") from None
        return []

    def score(self, answer: Answer, arguments: Arguments, tools: Tools) -> Verdict:
        try:
            return self._ask(answer, arguments)
        except LimitError as limit:
            return wrong(str(limit))

    def _ask(self, answer: Answer, arguments: Arguments) -> Verdict:
        job = {
            "kind": "own",
            # A worker may have been started in another folder.
            "path": os.path.abspath(self._path),
            "name": self._name,
            "answer": answer.content,
            "arguments": dict(arguments),
        }
        try:
            said = ask(job)
        except LeftError as error:  # no answer does that to a function that is right
            said = {"error": str(error)}
        if "error" in said:
            raise WorkError(
                f"{self._path}:{self._name} fails ({said['error']})",
                fix="correct the function; it takes the answer's text and the task's arguments",
            )
        return Verdict(reward=said["reward"])


VERIFIERS: Mapping[str, Verifier] = {
    "code": CodeTests(),
    "math": Mathematics(),
    "tool_calls": ToolCalls(),
    "form": Form(),
}


def parts_of(verifier: str, arguments: Arguments) -> list[tuple[str, Arguments]]:
    """Return name and arguments of a verifier that is checked; of ``all``, those inside it."""
    if verifier != "all":
        return [(verifier, arguments)]
    return [(part["verifier"], part.get("arguments", {})) for part in arguments["of"]]


def require_thinking(verifier: str, arguments: Arguments, *, thinking: bool) -> None:
    """Refuse a verifier that wants thoughts, where none can be.

    Raises:
        ArgumentsError: see above.
    """
    for name, given in parts_of(verifier, arguments):
        if name == "form" and given.get("thoughts") and not thinking:
            raise ArgumentsError(
                "thoughts is true, and without thinking=true an answer never has thoughts"
            )


def last_boxed(text: str) -> str | None:
    r"""Return what stands in the last complete ``\boxed{...}``; None without one.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    opened: list[int | None] = []  # where each box begins; None for another brace
    last = (-1, -1)
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            opened.append(brace.end() if brace[1] else None)
        elif opened and (start := opened.pop()) is not None:
            last = max(last, (start, brace.start()))
    start, end = last
    return text[start:end].strip() or None if end >= 0 else None


def _calls(text: str) -> tuple[list[str], str]:
    """Return what stands in each closed tool call, and the text without these calls."""
    calls, rest, place = [], [], 0
    while (begin := text.find(_CALL, place)) >= 0:
        end = text.find(_END_CALL, begin)
        if end < 0:
            break
        calls.append(text[begin + len(_CALL) : end])
        rest.append(text[place:begin])
        place = end + len(_END_CALL)
    return calls, "".join([*rest, text[place:]])


def _has_thoughts(answer: Answer) -> bool:
    if not answer.thinking:
        return False
    thoughts, end, rest = answer.text.partition(END_THINK)
    once = END_THINK not in rest and THINK not in rest and thoughts.count(THINK) <= 1
    return bool(end) and once and bool(thoughts.replace(THINK, "").strip())


def _schemas(tools: Tools) -> dict[str, Any]:
    """Return name -> schema of the arguments; `tools` as `data.chat.records` makes them."""
    functions = [tool["function"] for tool in tools]
    return {tool["name"]: tool.get("parameters", {"type": "object"}) for tool in functions}


def _other_calls(calls: Sequence[tuple[str, Any]], wanted: Sequence[Arguments]) -> str:
    """Return how calls differ from the wanted, empty if they do not."""
    if len(calls) != len(wanted):
        return f"{len(calls)} calls instead of {len(wanted)}"
    left = list(calls)
    # Those with open arguments last, so that they take what the others leave.
    for want in sorted(wanted, key=lambda call: "arguments" not in call):
        for place, (name, given) in enumerate(left):
            if name == want["name"] and _same(given, want.get("arguments", given)):
                del left[place]
                break
        else:
            return f"no call of {shown(want['name'])} as wanted"
    return ""


def _same(one: Any, other: Any) -> bool:
    """Compare as JSON does: true is not 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _require_schemas(schemas: Sequence[Any]) -> None:
    fault = _fault({"kind": "check_schema", "schemas": list(schemas)})
    if fault:
        raise ArgumentsError(f"a schema is wrong: {fault}")


def _require_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise ArgumentsError(
            f"the package {name.replace('_', '-')} is not installed: "
            "pip install 'mellum2-megatron[rlvr]'"
        )


def _verdict(job: Mapping[str, Any]) -> Verdict:
    """Return the verdict of a worker; an answer that takes too long is wrong."""
    fault = _fault(job)
    return wrong(fault) if fault else RIGHT


def _fault(job: Mapping[str, Any]) -> str:
    """Return what a worker finds wrong, or the limit that it has passed; empty if nothing."""
    try:
        return str(ask(job)["fault"])
    except LimitError as limit:
        return str(limit)
