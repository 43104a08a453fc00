"""Tasks as prompts: rendered with the chat template, encoded, in a keyed order without end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.chat.samples import chat_tokenizer
from mellum2_megatron.data.chat.template import check_template, choose_template
from mellum2_megatron.data.feed.entries import tokenizer_folder
from mellum2_megatron.data.feed.order import Permutation, key_of
from mellum2_megatron.data.feed.task_files import task_file
from mellum2_megatron.data.tokens.tokenizer import special_ids
from mellum2_megatron.rlvr.tasks import Task, read_tasks

if TYPE_CHECKING:
    from mellum2_megatron.config import Run

END_OF_TURN = "<|im_end|>"
"""Token that ends a turn where the tokenizer has it, beside the model's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunTasks:
    """The tasks of a run, ready to be asked.

    Attributes:
        train, valid: tasks of each kind.
        train_tokens, valid_tokens: token ids of each one's prompt.
        ends: tokens that end an answer.
        tokenizer: the `tokenizers` object.
        warnings: what may be meant otherwise.
    """

    train: tuple[Task, ...]
    valid: tuple[Task, ...]
    train_tokens: tuple[tuple[int, ...], ...]
    valid_tokens: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]
    tokenizer: Any
    warnings: tuple[str, ...]

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer, without the token that ends it."""
        kept = tokens[:-1] if tokens and tokens[-1] in self.ends else tokens
        return str(self.tokenizer.decode(list(kept), skip_special_tokens=False))

    def task_of(self, draw: int, seed: int) -> int:
        """Return the number of the task that a draw takes; each is drawn once an epoch."""
        epoch, place = divmod(draw, len(self.train))
        return Permutation(len(self.train), key_of(seed, "tasks", epoch))(place)


def run_tasks(run: Run) -> RunTasks:
    """Read, check and encode the tasks of a run.

    Raises:
        InputError: a task cannot be used or is one of the validation, no token ends an
            answer, the template does not fit, or prompts leave no room for an answer.
    """
    folder = tokenizer_folder(run.data)
    tokenizer = chat_tokenizer(folder)
    added = tokenizer.get_added_tokens_decoder().values()
    template = choose_template(folder, run.rl.chat_template)
    check_template(template, "instruct", frozenset(token.content for token in added))
    train_file, valid_file = (task_file(run.data, split) for split in ("train", "valid"))
    assert train_file is not None  # `check_data` has found it
    workers = run.rl.workers or 8
    asked = valid_file if run.rl.eval_answers else None
    if run.rl.eval_answers and valid_file is None:
        raise InputError(
            f"rl.eval_answers={run.rl.eval_answers}",
            rule=f"there is no valid.jsonl in {run.data.path}",
            fix="write one, or set rl.eval_answers=0",
        )
    validation = [valid_file] if valid_file is not None else []
    train = read_tasks([train_file], validation=validation, workers=workers)
    valid = () if asked is None else read_tasks([asked], workers=workers).tasks

    def encode(tasks: Sequence[Task]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(_encode(task, template, tokenizer)) for task in tasks)

    tasks = RunTasks(
        train=train.tasks,
        valid=valid,
        train_tokens=encode(train.tasks),
        valid_tokens=encode(valid),
        ends=_ends(run, folder, tokenizer),
        tokenizer=tokenizer,
        warnings=train.warnings,
    )
    room = run.data.sequence_length - run.rl.objective.max_tokens
    for task, ids in zip(
        (*tasks.train, *tasks.valid), (*tasks.train_tokens, *tasks.valid_tokens), strict=True
    ):
        if len(ids) > room:
            raise InputError(
                f"{task.place}: a prompt of {len(ids)} tokens",
                rule=f"data.sequence_length={run.data.sequence_length} less rl.objective.max_tokens"
                f"={run.rl.objective.max_tokens} leaves {room} to a prompt",
                fix="shorten or remove it, raise data.sequence_length, or allow shorter answers",
            )
    return tasks


def _encode(task: Task, template: Any, tokenizer: Any) -> list[int]:
    turns = [message.plain() for message in task.prompt.messages]
    try:
        text, _ = template.render(turns, task.prompt.tools, add_generation_prompt=True)
    except ValueError as error:
        raise InputError(
            task.place,
            rule=f"the chat template must render it ({error})",
            fix="repair the task, or give another rl.chat_template",
        ) from error
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _ends(run: Run, folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that end an answer: the model's, the tokenizer's, and that of a turn."""
    own = run.architecture.eos_token_id
    ends = {*(own if isinstance(own, tuple) else (own,)), tokenizer.token_to_id(END_OF_TURN)}
    ends.add(special_ids(folder, need_eos=False).get("eos"))
    found = tuple(sorted(token for token in ends if token is not None))
    if not found:
        raise InputError(
            f"tokenizer {folder}",
            rule=f"no token ends an answer: it has neither eos nor {END_OF_TURN}",
            fix="give a tokenizer with one",
        )
    return found
