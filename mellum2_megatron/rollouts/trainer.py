"""Rollouts of a run: prompts are drawn, answered, judged and queued, and a step takes its batch.

There is no second training loop. Megatron's own loop (`training.loop.run_loop`) trains: its
`train_step`, forward step, loss function, data iterator and saves take part in layouts, guard,
checkpoints and logs, and only the samples and the loss differ. `training.rollouts` calls this
module before and after each of its steps; nothing here knows of Megatron's parallel layout, but
that all ranks call it together. Each rank answers its share of the prompts.

Order of a step whose weights have had ``version`` updates:

1. the engine takes the weights (`prepare`);
2. rounds of prompts are answered until the queue holds what the step learns from, at most
   ``rl.rounds`` of them; asynchronous runs find it there already;
3. groups beyond the age limit are dropped, the oldest others are taken;
4. asynchronous runs start the round of a later step, which is written while Megatron trains;
5. after the update that round is judged and queued (`finish`), so that a checkpoint, which is saved
   then, holds all there is: a resume goes on as if nothing had happened.

Which weights write which round depends on the step alone and never on how fast anything is. So an
asynchronous run gives the same numbers each time, too.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conversion.live_weights import gather_weights
from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.data.feed.entries import tokenizer_folder
from mellum2_megatron.data.feed.order import key_of
from mellum2_megatron.data.tokens.tokenizer import copy_tokenizer
from mellum2_megatron.rlvr.rewards.verdict import Answer
from mellum2_megatron.rlvr.tasks import score_answers
from mellum2_megatron.rollouts.batch import Batch
from mellum2_megatron.rollouts.engine import Engine, Prompt
from mellum2_megatron.rollouts.groups import Counts, Group, Queue

if TYPE_CHECKING:
    from mellum2_megatron.config import Run
    from mellum2_megatron.rollouts.prompts import RunTasks


class Rollouts:
    """The answers of a run, on one of its ranks.

    Args:
        run: a resolved run.
        tasks: its tasks.
        engine: writer of the answers.
    """

    def __init__(self, run: Run, tasks: RunTasks, engine: Engine) -> None:
        self._run, self._tasks, self._engine = run, tasks, engine
        self._queue, self._loaded = Queue(), -1
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._ahead: tuple[Future[list[Group]], int] | None = None
        self._counts = Counts()
        self.batch: Batch | None = None

    def restore(self, folder: Path) -> None:
        """Take over the queue of a checkpoint.

        Raises:
            InputError: see `Queue.read`.
        """
        self._queue = Queue.read(
            folder,
            prompts=self._tasks.train_tokens,
            group_size=self._run.rl.objective.group_size,
        )

    def save(self, folder: Path) -> None:
        """Write the queue into a checkpoint's folder; one rank calls it."""
        self._queue.save(folder, self._tasks.train_tokens)

    def needs_weights(self, version: int) -> bool:
        """Return true if the engine does not hold these weights yet."""
        return self._loaded != version

    def load(self, model: Sequence[torch.nn.Module], version: int) -> None:
        """Give the engine the weights of the model in training. A collective.

        Args:
            model: parts of the model on this rank.
            version: updates that they have had.

        Raises:
            WorkError: the engine is gone.
        """
        self._engine.load(gather_weights(model, self._run.architecture))
        # A server is told by one rank, and no other may ask it before.
        torch.distributed.barrier()
        self._loaded = version

    def prepare(self, version: int) -> Batch:
        """Return the batch of the step whose weights have had ``version`` updates. A collective.

        Raises:
            WorkError: the engine or a verifier failed, or all groups of ``rl.rounds`` rounds are
                flat.
        """
        rl, counts = self._run.rl, self._counts
        limit = rl.objective.max_age if rl.ahead else 0
        self._queue.drop_stale(version, limit, counts)
        # At the start there is nothing to take: the rounds of the next steps are written as well.
        wanted = rl.objective.prompts * max(1, rl.ahead if not self._queue.draws else 1)
        judged = 0
        for _ in range(rl.rounds):
            if len(self._queue.groups) >= wanted:
                break
            groups = self._gather(self._write(self._draw(), version))
            self._queue.add(groups, counts)
            judged += len(groups)
        taken = self._queue.take(rl.objective.prompts)
        if not taken:
            raise WorkError(
                f"step {version + 1}: all {judged} groups of {rl.rounds} rounds have equal "
                "rewards: there is nothing to learn",
                fix="measure the tasks with `mellum2 rl probe` and leave out those that nobody or "
                "everybody solves, or raise rl.rounds",
            )
        counts.missing = rl.objective.prompts - len(taken)
        if not rl.ahead:
            counts.surplus = len(self._queue.groups)
            self._queue.groups = []
        self._start_ahead(version)
        self.batch = Batch.of(taken, self._run, self._tasks, version=version)
        return self.batch

    def _start_ahead(self, version: int) -> None:
        """Start the round of a later step, if there is one and the queue has room."""
        rl = self._run.rl
        later = version + rl.ahead < self._run.schedule.train_steps
        if rl.ahead and later and len(self._queue.groups) < rl.ahead * rl.objective.prompts:
            share = self._draw()
            self._ahead = self._thread.submit(self._write, share, version), version

    def finish(self) -> dict[str, float]:
        """Queue the round that was written during the update; return the step's numbers.

        A collective.

        Raises:
            WorkError: the engine or a verifier failed.
        """
        if self._ahead is not None:
            future, _ = self._ahead
            self._ahead = None
            self._queue.add(self._gather(future.result()), self._counts)
        values = self._counts.values()
        if self.batch is not None:
            values |= {"rl/age": self.batch.age, "rl/age_max": float(self.batch.oldest)}
        self._counts = Counts()
        return values

    def validate(self) -> dict[str, float]:
        """Answer the tasks of the validation with the engine's weights. A collective.

        The random numbers are the same each time, so that two validations differ by the weights.
        """
        answers, tasks = self._run.rl.eval_answers, self._tasks
        share = [
            (number, Prompt(place=task.place, tokens=ids, seed=key_of("validation", number)))
            for number, (task, ids) in enumerate(zip(tasks.valid, tasks.valid_tokens, strict=True))
        ]
        own = self._write(_own(share), version=self._loaded, valid=True, answers=answers)
        counts = Counts()
        for group in self._gather(own):
            counts.add(group)
        values = counts.values()
        names = ("rl/reward", "rl/answer_tokens", "rl/cut_off_share", "rl/entropy")
        return {name: values[name] for name in names}

    def close(self) -> None:
        """End the engine, and with it what it writes."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._engine.close()

    def _draw(self) -> list[tuple[int, Prompt]]:
        """Draw the prompts of a round; return number of the task and prompt of this rank's."""
        run, first = self._run, self._queue.draws
        self._queue.draws += run.rl.objective.sampled_prompts
        drawn = []
        for draw in range(first, self._queue.draws):
            number = self._tasks.task_of(draw, run.seed)
            seed = key_of(run.seed, "answers", draw)
            place, tokens = self._tasks.train[number].place, self._tasks.train_tokens[number]
            drawn.append((number, Prompt(place=place, tokens=tokens, seed=seed)))
        return _own(drawn)

    def _write(
        self,
        share: Sequence[tuple[int, Prompt]],
        version: int,
        *,
        valid: bool = False,
        answers: int | None = None,
    ) -> list[Group]:
        """Have prompts answered, and the answers judged."""
        objective, tasks = self._run.rl.objective, self._tasks
        written = self._engine.write(
            [prompt for _, prompt in share],
            answers=answers or objective.group_size,
            max_tokens=objective.max_tokens,
        )
        asked = [(tasks.valid if valid else tasks.train)[number] for number, _ in share]
        given = [
            [
                Answer(text=tasks.text(one.tokens), thinking=task.thinking, ended=one.ended)
                for one in some
            ]
            for task, some in zip(asked, written, strict=True)
        ]
        workers = self._run.rl.workers or os.cpu_count() or 1
        verdicts = score_answers(asked, given, workers=workers) if asked else []
        return [
            Group(
                task=number,
                version=version,
                answers=tuple(some),
                rewards=tuple(float(verdict.reward) for verdict in said),
            )
            for (number, _), some, said in zip(share, written, verdicts, strict=True)
        ]

    @staticmethod
    def _gather(own: list[Group]) -> list[Group]:
        """Return the groups of all ranks in the order in which they were drawn."""
        shares: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, own)
        longest = max(map(len, shares))
        return [share[row] for row in range(longest) for share in shares if row < len(share)]


def _own(drawn: Sequence[tuple[int, Prompt]]) -> list[tuple[int, Prompt]]:
    """Return the part of a list that this rank answers: every n-th of n ranks."""
    return list(drawn[torch.distributed.get_rank() :: torch.distributed.get_world_size()])


def make_engine(run: Run, tasks: RunTasks, folder: Path) -> Engine:
    """Return the run's engine. A collective.

    Args:
        run: a resolved run.
        tasks: its tasks.
        folder: the run's folder.

    Raises:
        InputError: vLLM's environment cannot serve the model, or a rank is on another machine than
            the server that the run starts.
    """
    if run.rl.engine == "vllm":
        return _vllm_engine(run, tasks, folder)
    from mellum2_megatron.rollouts.transformers_engine import TransformersEngine

    dtype = torch.float32 if run.rl.engine_dtype == "float32" else torch.bfloat16
    return TransformersEngine(run.architecture, tasks.ends, dtype)


def _vllm_engine(run: Run, tasks: RunTasks, folder: Path) -> Engine:
    """Return the engine that asks a vLLM server; rank 0 starts it where the run says so."""
    from mellum2_megatron.rollouts.vllm_engine import VllmEngine
    from mellum2_megatron.serving.server import VllmServer

    first, server = torch.distributed.get_rank() == 0, None
    if first and run.rl.server_python is not None:
        # The server reads the tokenizer, though it is asked for token ids alone.
        copy_tokenizer(tokenizer_folder(run.data), folder / ENGINE_FOLDER)
        server = VllmServer(
            Path(run.rl.server_python),
            folder / ENGINE_FOLDER,
            run.architecture,
            log=folder / SERVER_LOG,
            reloadable=run.rl.hand_over == "reload",
            max_length=run.data.sequence_length,
            dtype=run.rl.engine_dtype,
            eager_on_cpu=True,
        )
    place: list[Any] = [(None if server is None else server.client.url, socket.gethostname())]
    torch.distributed.broadcast_object_list(place, src=0)
    url, host = place[0]
    if run.rl.server_python is not None and host != socket.gethostname():
        raise InputError(
            f"rl.server_python={run.rl.server_python} with ranks on {host} and "
            f"{socket.gethostname()}",
            rule="the server that the run starts answers ranks on its own machine alone",
            fix="start one with `mellum2 serve FOLDER --reloadable`, and name it in rl.url",
        )
    return VllmEngine(
        run.rl.url or url,
        folder / ENGINE_FOLDER,
        run.architecture,
        tasks.ends,
        writes=first,
        server=server,
    )


ENGINE_FOLDER = "rollout_model"
"""Model folder of a vLLM server, inside the run's."""

SERVER_LOG = "rollout_server.log"
"""What the run's own server prints, inside the run's folder."""
