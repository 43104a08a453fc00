"""Runs in a process of its own: reads a job in each line, writes an answer for each.

A job has ``kind`` and what that kind needs; an answer has ``fault``: why it is not right, empty if
it is. A job that cannot be done has ``error`` instead, and one that needs too much ``limit``.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import signal
import sys
import typing

Job = dict[str, typing.Any]
_SECONDS = 2
"""Time for reading a value, and for each comparison. Alarms end them and keep the process."""
_CPU_SECONDS = 60 + 20 * (os.cpu_count() or 1)
"""Processor time of a job, after which the kernel ends the process: more than whoever asks waits
for, so it ends only what nobody waits for any more. A pattern lets no other thread of Python run.
"""


def _mathematics(job: Job) -> Job:
    """Compare two values of mathematics: `given` and `wanted`, LaTeX or plain."""
    given, wanted = _value(job["given"]), _value(job["wanted"])
    if not wanted:
        return {"error": "the answer of the task cannot be read"}
    if not given:
        return {"fault": "the answer cannot be read"}
    from math_verify import verify

    return {"fault": "" if verify(wanted, given, timeout_seconds=_SECONDS) else "another value"}


def _value(text: str) -> typing.Any:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # Without its fallback, which takes what cannot be read as text.
    return parse(
        f"${text}$",
        extraction_config=[LatexExtractionConfig(), ExprExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=_SECONDS,
    )


def _schema(job: Job) -> Job:
    """Check values against schemas: `pairs` of both."""
    import jsonschema

    for value, schema in job["pairs"]:
        validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        # A copy of the error's text can be as long as the value.
        for error in validator(schema).iter_errors(value):
            return {"fault": f"{error.json_path}: {error.message[:160]}"}
    return {"fault": ""}


def _check_schema(job: Job) -> Job:
    """Check schemas themselves: `schemas`. References lead to places inside them only."""
    import jsonschema
    import referencing
    from referencing.jsonschema import specification_with

    for schema in job["schemas"]:
        kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        try:
            kind.check_schema(schema)
        except jsonschema.SchemaError as error:
            return {"fault": f"{error.json_path}: {error.message[:160]}"}
        text = json.dumps(schema)
        references = re.findall(r'"\$(?:dynamicR|r)ef": "([^"]*)"', text)
        own = referencing.Resource.from_contents(
            schema, specification_with(kind.META_SCHEMA["$schema"])
        )
        resolver = referencing.Registry().resolver_with_root(own)
        for reference in references:
            if not reference.startswith("#"):
                return {"fault": f"$ref {reference[:80]!r} leads out of the schema"}
            try:
                # A schema inside with a name of its own may be meant.
                if text.count('"$id"') <= (own.id() is not None):
                    resolver.lookup(reference)
            except referencing.exceptions.Unresolvable:
                return {"fault": f"$ref {reference[:80]!r} leads nowhere"}
        try:
            for sample in ("null", "true", "1", '""', "[]", "{}") if references else ():
                kind(schema).is_valid(json.loads(sample))
        except RecursionError:
            return {"fault": "a $ref leads back to itself"}
    return {"fault": ""}


def _pattern(job: Job) -> Job:
    """Match a whole text with a pattern."""
    matches = re.fullmatch(job["pattern"], job["text"], re.DOTALL)
    return {"fault": "" if matches else "the pattern does not match"}


@functools.cache
def _own_function(path: str, name: str) -> typing.Any:
    namespace: dict[str, typing.Any] = {"__name__": "reward", "__file__": path}
    sys.path.append(os.path.dirname(os.path.abspath(path)))
    with open(path, encoding="utf-8") as file:
        exec(compile(file.read(), path, "exec"), namespace)
    if name not in namespace:
        raise NameError(f"the file has no {name}")
    return namespace[name]


def _own(job: Job) -> Job:
    """Call a function of the user's."""
    try:
        function = _own_function(job["path"], job["name"])
        reward = function(job["answer"], **job["arguments"])
        # Numbers of numpy and torch have this method too, a text has not.
        if hasattr(type(reward), "__float__"):
            reward = float(reward)
    except MemoryError:
        return {"limit": "it takes more than 4 GiB"}
    # `sys.exit` and KeyboardInterrupt would end the process.
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}"[:400]}
    if (
        reward is None
        or isinstance(reward, str)
        or (isinstance(reward, float) and math.isfinite(reward))
    ):
        return {"reward": reward if not isinstance(reward, str) else reward[:400]}
    try:
        text = repr(reward)
    except Exception:
        text = f"an object of {type(reward).__name__}"
    return {"error": f"it returns {text}"[:400]}


def _import(job: Job) -> Job:
    """Import what the kind `for` needs: seconds that its first job must not lose."""
    if job["for"] == "mathematics":
        import math_verify  # noqa: F401
    elif job["for"] in ("schema", "check_schema"):
        import jsonschema  # noqa: F401
    return {"fault": ""}


_KINDS: dict[str, typing.Callable[[Job], Job]] = {
    "import": _import,
    "mathematics": _mathematics,
    "schema": _schema,
    "check_schema": _check_schema,
    "pattern": _pattern,
    "own": _own,
}


def _main() -> None:
    # Functions of the user may print.
    channel = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    channel.write("{}\n")
    channel.flush()
    for line in sys.stdin:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
        try:
            answer = _KINDS[job["kind"]](job)
        # Libraries raise whatever a stranger's text makes them raise.
        except Exception as error:
            answer = {"fault": f"{type(error).__name__}: {error}"[:200]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


if __name__ == "__main__":
    _main()
