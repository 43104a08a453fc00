"""Tasks: prompts with a verifier and its arguments, one JSON object a line.

    {"messages": [{"role": "user", "content": "What is 6 * 7?"}],
     "verifier": "math", "arguments": {"answer": "42"}}

Further keys: ``tools`` as in conversations (`data.chat.records`), ``thinking`` (true: the model
thinks before it answers; default false), ``reference``, an answer that is right, which the model
never sees, and ``id``, a name for reports that no other task has.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mellum2_megatron.common.errors import InputError, WorkError, nearest, shown
from mellum2_megatron.data.chat.records import Conversation, RecordError, parse_prompt
from mellum2_megatron.data.corpus.left_out import printable
from mellum2_megatron.data.corpus.listing import named_file
from mellum2_megatron.data.corpus.near_duplicates import shingles
from mellum2_megatron.data.corpus.rows import BadRow, place, read_rows
from mellum2_megatron.rlvr.rewards.code_tests import try_setup
from mellum2_megatron.rlvr.rewards.sandbox import find_sandbox
from mellum2_megatron.rlvr.rewards.verdict import Answer, ArgumentsError, Verdict, take
from mellum2_megatron.rlvr.rewards.verifiers import find_verifier, parts_of, require_thinking

KEYS = ("messages", "tools", "verifier", "arguments", "thinking", "reference", "id")
WORDS, SIMILAR = 5, 0.7
"""Words of a shingle, and the Jaccard similarity of a near-duplicate, as in `near_duplicates`."""

_SHOWN = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A prompt whose answers can be checked.

    Attributes:
        place: file and line, for messages.
        name: its ``id``; default its place.
        prompt: the conversation up to the answer.
        verifier: name of its verifier.
        arguments: arguments of the verifier.
        thinking: true if the model thinks before it answers.
        folder: folder of its file, from which a verifier's own file is named.
        row: the line's object.
    """

    place: str
    name: str
    prompt: Conversation
    verifier: str
    arguments: Mapping[str, Any]
    thinking: bool
    folder: Path
    row: Mapping[str, Any]

    @property
    def text(self) -> str:
        """Text of all turns."""
        return "\n".join(message.content for message in self.prompt.messages)

    @property
    def runs_programs(self) -> bool:
        """True if judging an answer runs it in the sandbox."""
        return any(name == "code" for name, _ in parts_of(self.verifier, self.arguments))

    def score(self, answer: Answer) -> Verdict:
        """Return the verdict on an answer."""
        verifier = find_verifier(self.verifier, self.folder)
        return verifier.score(answer, self.arguments, self.prompt.tools)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedTasks:
    """Tasks that can work.

    Attributes:
        tasks: the tasks.
        warnings: what may be meant otherwise, each with its place.
    """

    tasks: tuple[Task, ...]
    warnings: tuple[str, ...]


def read_tasks(
    files: Sequence[Path],
    *,
    held_out: Sequence[Path] = (),
    validation: Sequence[Path] = (),
    workers: int = 8,
    trial: bool = False,
) -> CheckedTasks:
    """Read tasks and check each one with its verifier.

    Args:
        files: .jsonl (also .gz, .zst) files of tasks.
        held_out: files of items that must not be trained on, each with ``messages``, or a text in
            ``prompt``, ``question`` or ``text``; default none. What resembles one is refused.
        validation: files of one's own tasks that are asked in a validation; default none. Tasks of
            one template resemble each other, so only equal prompts are refused.
        workers: threads that check; default 8.
        trial: run each setup of programs once, and judge each ``reference``; default false.
            Programs are left out with a warning where there is no sandbox.

    Raises:
        InputError: no task, or tasks that cannot work, resemble a held-out item, are asked in a
            validation or fail their trial: all of them are counted, the first ten are shown with
            file, line and reason.
    """
    rows = [(file, *row) for file in files for row in _rows(file)]
    no_sandbox = _why_no_sandbox() if trial else ""
    with ThreadPoolExecutor(workers) as pool:
        checked = list(
            pool.map(lambda row: _checked(*row, trial=trial, sandbox=not no_sandbox), rows)
        )
    faults = [item for item in checked if isinstance(item, str)]
    tasks = tuple(item[0] for item in checked if not isinstance(item, str))
    warnings = [line for item in checked if not isinstance(item, str) for line in item[1]]
    faults += _named_twice(tasks) + _held_out_faults(tasks, held_out)
    faults += _held_out_faults(tasks, validation, least=1.0)
    if faults:
        listed = "; ".join(faults[:_SHOWN])
        more = f"; and {len(faults) - _SHOWN:,} more" if len(faults) > _SHOWN else ""
        raise InputError(
            f"{len(faults):,} of {len(rows):,} tasks cannot be used: {listed}{more}",
            rule="every task has a prompt, a verifier and arguments that the verifier takes",
            fix="correct or remove these lines (docs/rlvr.md)",
        )
    if not tasks:
        raise InputError(
            ", ".join(map(printable, files)) or "no file",
            rule="there must be a task",
            fix="write one JSON object a line (docs/rlvr.md)",
        )
    untried = sum(task.runs_programs for task in tasks) if no_sandbox else 0
    if untried:
        warnings.append(f"programs of {untried:,} tasks were not tried: {no_sandbox}")
    first: dict[str, str] = {}
    for task in tasks:
        before = first.setdefault(task.text, task.place)
        if before != task.place:
            warnings.append(f"{task.place}: its prompt is that of {before}")
    return CheckedTasks(tasks=tasks, warnings=tuple(warnings))


def score_answers(
    tasks: Sequence[Task], answers: Sequence[Sequence[Answer]], *, workers: int
) -> list[list[Verdict]]:
    """Return the verdicts on the answers to each task; equal answers to a task are judged once.

    Args:
        tasks: the tasks.
        answers: the answers to each.
        workers: threads. A verifier's work is done in processes of its own.

    Raises:
        WorkError: a verifier failed.
    """
    pairs = [
        (number, answer)
        for number, given in enumerate(answers)
        for answer in dict.fromkeys(given)  # once each, in order
    ]
    with ThreadPoolExecutor(workers) as pool:
        scores = pool.map(lambda pair: tasks[pair[0]].score(pair[1]), pairs)
        verdicts = dict(zip(pairs, scores, strict=True))
    return [
        [verdicts[number, answer] for answer in given]
        for number, (_, given) in enumerate(zip(tasks, answers, strict=True))
    ]


def answer_rows(file: Path) -> Iterator[tuple[str, str | int, str, bool]]:
    """Yield place, task (id, or number from 1), text and ``ended`` (default true) of each answer.

    Raises:
        InputError: a line of another form.
    """
    for where, row in _rows(file):
        fault = row.why if isinstance(row, BadRow) else ""
        if not fault and isinstance(row, Mapping):
            kinds = {"task": (str, int), "answer": (str,), "ended": (bool,)}
            try:
                take(row, kinds, required=["task", "answer"])
            except ArgumentsError as error:
                fault = str(error)
        if fault or isinstance(row, BadRow):
            raise InputError(
                f"{where}: {fault}",
                rule="an answer is an object of task, answer and ended",
                fix="correct the line",
            )
        yield where, row["task"], row["answer"], row.get("ended", True)


def _rows(file: Path) -> list[tuple[str, Mapping[str, Any] | BadRow]]:
    """Return the rows of a file with their places."""
    source = named_file(file, printable(file))
    if source.format not in ("jsonl", "jsonl.gz", "jsonl.zst"):
        raise InputError(
            printable(file),
            rule="tasks are read from .jsonl files (also .gz, .zst)",
            fix="write one JSON object a line and call the file .jsonl",
        )
    rows = read_rows(source, whole_numbers=True)
    return [(place(source, number), row) for number, row in rows]


def _checked(
    file: Path, where: str, row: Mapping[str, Any] | BadRow, *, trial: bool, sandbox: bool
) -> tuple[Task, list[str]] | str:
    """Return a row's task with warnings about it, or its fault."""
    if isinstance(row, BadRow):
        return f"{where}: {row.why}"
    try:
        task = _task(file, where, row)
        verifier = find_verifier(task.verifier, task.folder)
        warnings = verifier.check(task.arguments, task.prompt.tools)
        require_thinking(task.verifier, task.arguments, thinking=task.thinking)
        if trial and (sandbox or not task.runs_programs):
            _try(task)
    except (RecordError, ArgumentsError) as error:
        return f"{where}: {error}"
    return task, [f"{where}: {warning}" for warning in warnings]


def _why_no_sandbox() -> str:
    """Return why programs cannot be tried on this machine; empty if they can."""
    try:
        find_sandbox()
    except InputError as error:
        return str(error)
    return ""


def _try(task: Task) -> None:
    """Run a task's setups and judge its reference.

    Raises:
        ArgumentsError: no answer can be right, or the reference is not.
    """
    for name, arguments in parts_of(task.verifier, task.arguments):
        if name == "code":
            try_setup(arguments)
    if "reference" not in task.row:
        return
    try:
        verdict = task.score(Answer(text=task.row["reference"], thinking=task.thinking))
    except WorkError as error:
        raise ArgumentsError(f"its reference cannot be judged: {error.what}") from None
    if verdict.reward < 1:
        raise ArgumentsError(
            f"its reference is worth {verdict.reward:g}"
            + (f" ({verdict.reason})" if verdict.reason else "")
        )


def _task(file: Path, where: str, row: Mapping[str, Any]) -> Task:
    for key in row:
        if key not in KEYS:
            raise ArgumentsError(f"unknown key {shown(key)}; {nearest(key, KEYS)}")
    kinds = {"verifier": str, "arguments": dict, "thinking": bool, "reference": str, "id": str}
    for key, kind in kinds.items():
        if key in row and not isinstance(row[key], kind):
            raise ArgumentsError(f"{key} is {shown(row[key])}, of another type")
    if "verifier" not in row:
        raise ArgumentsError("verifier is missing")
    return Task(
        place=where,
        name=row.get("id", where),
        prompt=parse_prompt(row),
        verifier=row["verifier"],
        arguments=row.get("arguments", {}),
        thinking=row.get("thinking", False),
        folder=file.parent,
        row=row,
    )


def _named_twice(tasks: Sequence[Task]) -> list[str]:
    """Return a fault for each task whose ``id`` an earlier one has; answers name tasks by it."""
    first: dict[str, Task] = {}
    return [
        f"{task.place}: id {shown(task.name)} is that of {before.place}"
        for task in tasks
        if "id" in task.row and (before := first.setdefault(task.name, task)) is not task
    ]


def _held_out_faults(
    tasks: Sequence[Task], held_out: Sequence[Path], *, least: float = SIMILAR
) -> list[str]:
    """Return a fault for each task whose similarity to a held-out item is ``least`` or more."""
    items = [
        (where, _word_shingles(_item_text(where, row)))
        for file in held_out
        for where, row in _rows(file)
    ]
    holders: dict[int, list[int]] = {}
    for number, (_, words) in enumerate(items):
        for shingle in words.tolist():
            holders.setdefault(shingle, []).append(number)
    faults = []
    for task in tasks if items else ():
        own = _word_shingles(task.text)
        shared: dict[int, int] = {}
        for shingle in own.tolist():
            for number in holders.get(shingle, ()):
                shared[number] = shared.get(number, 0) + 1
        for number, count in shared.items():
            where, words = items[number]
            similarity = count / (len(own) + len(words) - count)
            if similarity >= least:
                faults.append(
                    f"{task.place}: its prompt is that of the held-out {where} "
                    f"(similarity {similarity:.2f})"
                )
                break
    return faults


def _item_text(where: str, row: Mapping[str, Any] | BadRow) -> str:
    if isinstance(row, Mapping):
        for key in ("prompt", "question", "text"):
            if isinstance(row.get(key), str) and row[key].strip():
                return str(row[key])
        messages = row.get("messages")
        if isinstance(messages, list):
            asked = [
                message["content"]
                for message in messages
                if isinstance(message, Mapping)
                and message.get("role") != "assistant"
                and isinstance(message.get("content"), str)
            ]
            if asked:
                return "\n".join(asked)
    raise InputError(
        where,
        rule="a held-out item has messages, or a text in prompt, question or text",
        fix="correct or remove the line",
    )


def _word_shingles(text: str) -> Any:
    """Return hashes of the 5-grams of words, sorted and unique; case and signs do not count."""
    words = [zlib.crc32(word.encode("utf-8")) for word in re.findall(r"\w+", text.lower())]
    return shingles(np.array(words, dtype=np.int64), WORDS)
