"""`mellum2 rl`: reinforcement learning, its tasks checked and measured, its rewards served."""

from __future__ import annotations

import contextlib
import json
import os
import resource
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from mellum2_megatron.cli.options import (
    ChatTemplate,
    DeviceChoice,
    DryRun,
    Nproc,
    Overrides,
    RecipeOrRun,
    RunOutput,
    Verbose,
)
from mellum2_megatron.common.console import print_line
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import check_writable, read_text, write_text

if TYPE_CHECKING:
    from mellum2_megatron.rlvr.rewards.verdict import Answer, Verdict
    from mellum2_megatron.rlvr.tasks import CheckedTasks, Task


class _RecipeOrCommand(TyperGroup):
    """`mellum2 rl RECIPE` is `mellum2 rl train RECIPE`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["train", *args]
        return super().resolve_command(ctx, args)


rl_app = typer.Typer(
    help="Reinforcement learning from rewards that can be checked: `mellum2 rl RECIPE` trains.",
    no_args_is_help=True,
    cls=_RecipeOrCommand,
)

_END_S = 30
"""Seconds for requests at work when the service is ended."""
_LOOPBACK = ("127.0.0.1", "::1", "localhost")

Tasks = Annotated[
    list[Path], typer.Argument(metavar="TASKS...", help=".jsonl (also .gz, .zst) files of tasks")
]
HeldOut = Annotated[
    list[Path] | None,
    typer.Option(
        "--held-out",
        help=".jsonl file of evaluation items; a task that resembles one is refused (repeatable)",
    ),
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="checks at a time; default: one per core")
]


@rl_app.command("train")
def train(
    recipe: RecipeOrRun,
    overrides: Overrides = None,
    nproc: Nproc = None,
    device: DeviceChoice = "auto",
    output: RunOutput = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Learn from answers to tasks, or resume; the word `train` may be left out."""
    from launchers.start import start_local
    from mellum2_megatron.planning.resolve import resolve_run

    run = resolve_run(recipe, overrides or [], output=output)
    if run.data.feed != "rollouts":
        raise InputError(
            f"mellum2 rl {recipe}",
            rule=f"it learns from data (data.feed={run.data.feed}), not from answers",
            fix=f"use `mellum2 train {recipe}`, or a recipe such as mellum2_tiny_rlvr_instruct",
        )
    code = start_local(
        recipe,
        overrides or [],
        nproc=nproc,
        device=device,
        output=output,
        dry_run=dry_run,
        verbose=verbose,
    )
    raise typer.Exit(code)


@rl_app.command("check")
def check(tasks: Tasks, held_out: HeldOut = None, workers: Workers = None) -> None:
    """Check tasks: form, verifiers' arguments, setups, references, likeness to evaluation items."""
    checked = _read(tasks, held_out, workers, answered=False)
    kinds = Counter(task.verifier for task in checked.tasks)
    listed = ", ".join(f"{number:,} {name}" for name, number in sorted(kinds.items()))
    print_line(f"{len(checked.tasks):,} tasks: {listed}")


@rl_app.command("probe")
def probe(
    tasks: Tasks,
    hf_path: Annotated[
        Path | None,
        typer.Option("--hf-path", help="Hugging Face folder whose model answers, on the CPU"),
    ] = None,
    answers_file: Annotated[
        Path | None,
        typer.Option(
            "--answers-file",
            help='.jsonl file of answers made elsewhere: {"task": ID or NUMBER from 1, '
            '"answer": TEXT, "ended": false if it was cut off}',
        ),
    ] = None,
    answers: Annotated[
        int, typer.Option("--answers", min=1, help="answers to each task, with --hf-path")
    ] = 8,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="tokens of the longest answer")
    ] = 1024,
    temperature: Annotated[float, typer.Option("--temperature", help="of the sampling")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="seed of the sampling")] = 0,
    chat_template: ChatTemplate = None,
    output: Annotated[
        Path | None, typer.Option("--output", help=".jsonl file of rewards and reasons to write")
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option("--keep", help=".jsonl file to write the tasks to whose answers differ"),
    ] = None,
    held_out: HeldOut = None,
    workers: Workers = None,
) -> None:
    """Measure how often a model solves each task.

    A task that it always or never solves teaches nothing: its group of answers is dropped.
    """
    from mellum2_megatron.rlvr.tasks import score_answers

    for name, path in (("--output", output), ("--keep", keep)):
        if path is not None:
            check_writable(name, path, folder=False)
    if (hf_path is None) == (answers_file is None):
        raise InputError(
            "probe",
            rule="the answers come from one place",
            fix="give either --hf-path or --answers-file",
        )
    checked = _read(tasks, held_out, workers, answered=True).tasks
    if answers_file is not None:
        given = _read_answers(answers_file, checked)
    else:
        assert hf_path is not None
        given = _sample(
            hf_path,
            checked,
            chat_template,
            answers=answers,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
    verdicts = score_answers(checked, given, workers=workers or os.cpu_count() or 1)
    if output is not None:
        write_text(output, _lines(map(_row, checked, verdicts)))
    if keep is not None:
        differing = [
            task.row
            for task, said in zip(checked, verdicts, strict=True)
            if len({verdict.reward for verdict in said}) > 1
        ]
        write_text(keep, _lines(differing))
    _print_summary(verdicts)


@rl_app.command("serve")
def serve(
    host: Annotated[str, typer.Option("--host", help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="port")] = 8400,
    workers: Workers = None,
    queue: Annotated[
        int,
        typer.Option("--queue", min=1, help="items at work or waiting; further ones get 503"),
    ] = 4096,
    own: Annotated[
        list[str] | None,
        typer.Option("--own", help="FILE.py:FUNCTION that requests may name (repeatable)"),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file", help="file with the secret that requests bring as a bearer token"
        ),
    ] = None,
) -> None:
    """Serve the rewards over HTTP, for trainers of other projects.

    Beyond this machine a token is needed, because requests run programs in the sandbox.
    """
    import uvicorn

    from mellum2_megatron.rlvr.gateway import Gateway
    from mellum2_megatron.rlvr.rewards.sandbox import find_sandbox
    from mellum2_megatron.rlvr.rewards.verdict import ArgumentsError
    from mellum2_megatron.rlvr.rewards.verifiers import find_verifier

    token = None
    if token_file is not None:
        token = read_text(token_file, "--token-file", fix="write a secret to it").strip()
    if host not in _LOOPBACK and not token:
        raise InputError(
            f"--host {host}",
            rule="other machines could run programs here, so requests must bring a token",
            fix="write a secret to a file and give it with --token-file",
        )
    for name in own or ():
        try:
            find_verifier(name, Path())
        except ArgumentsError as error:
            raise InputError(
                f"--own {name}", rule=str(error), fix="name a function of a .py file"
            ) from None
    gateway = Gateway(
        workers=workers or os.cpu_count() or 1,
        most=queue,
        own=frozenset(own or ()),
        folder=Path(),
        token=token,
    )
    try:
        print_line(f"programs run in {find_sandbox().description}")
    except InputError as error:  # the other verifiers need none
        print_line(f"warning: items that run programs will fail: {error}")
    uvicorn.run(
        gateway.application(),
        host=host,
        port=port,
        log_level="warning",
        # The other half is for programs and workers.
        limit_concurrency=_open_files() // 2,
        timeout_graceful_shutdown=_END_S,
    )


def _open_files() -> int:
    """Raise the number of files that this process may open as far as it may, and return it."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):  # without a limit, as on macOS
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 20)


def _read(
    tasks: Sequence[Path], held_out: Sequence[Path] | None, workers: int | None, *, answered: bool
) -> CheckedTasks:
    """Read, check and try tasks; with ``answered``, programs need a sandbox."""
    from mellum2_megatron.rlvr.rewards.sandbox import find_sandbox
    from mellum2_megatron.rlvr.tasks import read_tasks

    checked = read_tasks(
        tasks, held_out=held_out or (), workers=workers or os.cpu_count() or 1, trial=True
    )
    if answered and any(task.runs_programs for task in checked.tasks):
        find_sandbox()  # before the model answers for hours
    for line in checked.warnings:
        print_line(f"warning: {line}")
    return checked


def _sample(
    hf_path: Path, tasks: Sequence[Task], chat_template: str | None, **settings: Any
) -> list[list[Answer]]:
    """Return the answers that a model gives."""
    from conversion.huggingface.sampling import sample_answers
    from mellum2_megatron.data.chat.samples import chat_tokenizer
    from mellum2_megatron.data.chat.template import check_template, choose_template
    from mellum2_megatron.rlvr.rewards.verdict import Answer
    from mellum2_megatron.upstream import quiet_upstream

    quiet_upstream()
    template = choose_template(hf_path, chat_template)
    added = chat_tokenizer(hf_path).get_added_tokens_decoder().values()
    check_template(template, "instruct", frozenset(token.content for token in added))
    prompts = []
    for task in tasks:
        turns = [message.plain() for message in task.prompt.messages]
        try:
            text, _ = template.render(turns, task.prompt.tools, add_generation_prompt=True)
        except ValueError as error:
            raise InputError(
                task.place,
                rule=f"the chat template must render it ({error})",
                fix="repair the task, or give another --chat-template",
            ) from error
        prompts.append((task.place, text))
    return [
        [Answer(text=one.text, thinking=task.thinking, ended=one.ended) for one in sampled]
        for task, sampled in zip(tasks, sample_answers(hf_path, prompts, **settings), strict=True)
    ]


def _read_answers(file: Path, tasks: Sequence[Task]) -> list[list[Answer]]:
    """Return the answers of a file, by task."""
    from mellum2_megatron.rlvr.rewards.verdict import Answer
    from mellum2_megatron.rlvr.tasks import answer_rows

    numbers: dict[str | int, int] = {task.name: number for number, task in enumerate(tasks)}
    numbers |= {number: number - 1 for number in range(1, len(tasks) + 1)}
    given: list[list[Answer]] = [[] for _ in tasks]
    for place, name, text, ended in answer_rows(file):
        if name not in numbers:
            raise InputError(
                f"{place}: task {name!r}",
                rule="it must be the id of a task, or its number from 1",
                fix="give the file of tasks that was answered",
            )
        number = numbers[name]
        given[number].append(Answer(text=text, thinking=tasks[number].thinking, ended=ended))
    unanswered = [task.place for task, one in zip(tasks, given, strict=True) if not one]
    if unanswered:
        raise InputError(
            f"{len(unanswered):,} tasks without an answer, the first {unanswered[0]}",
            rule=f"{file} must answer every task",
            fix="add the answers, or remove the tasks",
        )
    return given


def _row(task: Task, said: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "task": task.name,
        "place": task.place,
        "mean_reward": sum(verdict.reward for verdict in said) / len(said),
        "rewards": [verdict.reward for verdict in said],
        "reasons": [verdict.reason for verdict in said],
    }


def _lines(rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _print_summary(verdicts: Sequence[Sequence[Verdict]]) -> None:
    rewards = [[verdict.reward for verdict in said] for said in verdicts]
    number, total = len(rewards), sum(map(len, rewards))
    mean = sum(map(sum, rewards)) / total
    print_line(f"{number:,} tasks, {total:,} answers: mean reward {mean:.3f}")
    groups = {
        "never solved": [max(one) == 0 for one in rewards],
        "always solved": [min(one) == 1 for one in rewards],
        "answers differ": [len(set(one)) > 1 for one in rewards],
    }
    for name, holds in groups.items():
        print_line(f"{name}: {sum(holds):,} tasks ({sum(holds) / number:.1%})")
    reasons = Counter(verdict.reason for said in verdicts for verdict in said if verdict.reason)
    for reason, count in reasons.most_common(5):
        print_line(f"  {count:,} x {reason}")
