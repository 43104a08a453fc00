"""Groups of answers, and the bounded queue in which they wait for the step that takes them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.common.files import atomic_path
from mellum2_megatron.rollouts.engine import Sampled

Prompts = Sequence[tuple[int, ...]]

STATE_FILE = "rollouts.npz"
"""In a checkpoint's folder: the queue and the counts of `Rollouts`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The answers to one prompt.

    Attributes:
        task: number of the task.
        version: updates of the weights that wrote it.
        answers: the answers.
        rewards: reward of each, as its verifier gave it.
    """

    task: int
    version: int
    answers: tuple[Sampled, ...]
    rewards: tuple[float, ...]

    @property
    def is_flat(self) -> bool:
        """True if all rewards are equal: nothing can be learnt from it."""
        return min(self.rewards) == max(self.rewards)


@dataclass(kw_only=True, slots=True)
class Counts:
    """Sums over a step, or since the last one.

    Attributes:
        groups: groups that were judged.
        flat: those with equal rewards, which were dropped.
        stale: groups that grew older than allowed and were dropped.
        surplus: groups that a synchronous step had no need of.
        missing: groups that a step lacked.
        reward, answers, tokens, cut: sum of rewards, number of answers, of their tokens, and of
            those that were cut off.
        longest: tokens of the longest answer.
        spread: sum of the groups' standard deviations of the reward.
        surprise: sum of minus the log-probabilities, in nats.
    """

    groups: int = 0
    flat: int = 0
    stale: int = 0
    surplus: int = 0
    missing: int = 0
    reward: float = 0.0
    answers: int = 0
    tokens: int = 0
    cut: int = 0
    longest: int = 0
    spread: float = 0.0
    surprise: float = 0.0

    def add(self, group: Group) -> None:
        """Count a judged group."""
        lengths = [len(one.tokens) for one in group.answers]
        self.groups += 1
        self.flat += group.is_flat
        self.reward += sum(group.rewards)
        self.answers += len(group.rewards)
        self.tokens += sum(lengths)
        self.longest = max(self.longest, *lengths)
        self.cut += sum(not one.ended for one in group.answers)
        self.spread += float(np.std(group.rewards))
        self.surprise -= sum(sum(one.log_probabilities) for one in group.answers)

    def values(self) -> dict[str, float]:
        """Return the numbers for the log."""
        values = {
            "rl/groups_stale": float(self.stale),
            "rl/groups_surplus": float(self.surplus),
            "rl/groups_missing": float(self.missing),
        }
        if self.groups:
            values |= {
                "rl/reward": self.reward / self.answers,
                "rl/reward_spread": self.spread / self.groups,
                "rl/groups_dropped_share": self.flat / self.groups,
                "rl/answer_tokens": self.tokens / self.answers,
                "rl/answer_tokens_max": float(self.longest),
                "rl/cut_off_share": self.cut / self.answers,
                "rl/entropy": self.surprise / self.tokens,
            }
        return values


@dataclass(kw_only=True, slots=True)
class Queue:
    """Groups in the order in which they were written, and the number of draws from the tasks.

    Attributes:
        groups: groups with differing rewards that no step has learnt from.
        draws: prompts that were drawn from the tasks.
    """

    groups: list[Group] = field(default_factory=list)
    draws: int = 0

    def add(self, groups: Sequence[Group], counts: Counts) -> None:
        """Take judged groups; those with equal rewards are dropped."""
        for group in groups:
            counts.add(group)
            if not group.is_flat:
                self.groups.append(group)

    def drop_stale(self, version: int, limit: int, counts: Counts) -> None:
        """Drop and count groups that are more than ``limit`` updates older than ``version``."""
        fresh = [group for group in self.groups if version - group.version <= limit]
        counts.stale += len(self.groups) - len(fresh)
        self.groups = fresh

    def take(self, number: int) -> list[Group]:
        """Remove and return the oldest groups, at most ``number``."""
        taken, self.groups = self.groups[:number], self.groups[number:]
        return taken

    def save(self, folder: Path, prompts: Prompts) -> None:
        """Write the queue into a checkpoint's folder.

        Args:
            folder: the checkpoint's folder.
            prompts: token ids of each task's prompt.
        """
        answers = [one for group in self.groups for one in group.answers]
        arrays: dict[str, Any] = {
            "draws": self.draws,
            "tasks": np.array([group.task for group in self.groups], np.int64),
            "prompts": np.array([_hash(prompts[one.task]) for one in self.groups], np.int64),
            "versions": np.array([group.version for group in self.groups], np.int64),
            "sizes": np.array([len(group.answers) for group in self.groups], np.int64),
            "rewards": np.array([r for group in self.groups for r in group.rewards], np.float64),
            "lengths": np.array([len(one.tokens) for one in answers], np.int64),
            "ended": np.array([one.ended for one in answers], bool),
            "tokens": np.array([t for one in answers for t in one.tokens], np.int32),
            "log_probabilities": np.array(
                [p for one in answers for p in one.log_probabilities], np.float64
            ),
        }
        with atomic_path(folder / STATE_FILE) as path, path.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def read(cls, folder: Path, *, prompts: Prompts, group_size: int) -> Queue:
        """Return the queue of a checkpoint.

        Args:
            folder: the checkpoint's folder.
            prompts: token ids of each task's prompt now.
            group_size: answers of a group now.

        Raises:
            InputError: it is missing, damaged, or its answers are to other prompts.
        """
        file = folder / STATE_FILE
        try:
            with np.load(file, allow_pickle=False) as loaded:
                return cls._of({name: loaded[name] for name in loaded.files}, prompts, group_size)
        except (
            *(OSError, ValueError, KeyError, IndexError, StopIteration, RuntimeError),
            *(zipfile.BadZipFile, zlib.error),
        ) as error:
            raise InputError(
                str(file),
                rule=f"it must hold the answers that wait for a step ({first_line(error)})",
                fix="resume with the same tasks, tokenizer, template and group size, or from an "
                "earlier checkpoint",
            ) from error

    @classmethod
    def _of(cls, arrays: dict[str, Any], prompts: Prompts, group_size: int) -> Queue:
        tokens, values = (iter(arrays[name].tolist()) for name in ("tokens", "log_probabilities"))
        answers = iter(
            [
                Sampled(
                    tokens=tuple(next(tokens) for _ in range(length)),
                    log_probabilities=tuple(next(values) for _ in range(length)),
                    ended=ended,
                )
                for length, ended in zip(
                    arrays["lengths"].tolist(), arrays["ended"].tolist(), strict=True
                )
            ]
        )
        rewards = iter(arrays["rewards"].tolist())
        groups = []
        names = ("tasks", "prompts", "versions", "sizes")
        for task, prompt, version, size in zip(
            *(arrays[name].tolist() for name in names), strict=True
        ):
            if not (0 <= task < len(prompts) and size == group_size):
                raise ValueError(f"a group of {size} answers to task {task} of {len(prompts)}")
            if prompt != _hash(prompts[task]):
                raise ValueError(f"the prompt of task {task} has changed since it was answered")
            groups.append(
                Group(
                    task=task,
                    version=version,
                    answers=tuple(next(answers) for _ in range(size)),
                    rewards=tuple(next(rewards) for _ in range(size)),
                )
            )
        return cls(groups=groups, draws=int(arrays["draws"]))


def _hash(prompt: Sequence[int]) -> int:
    return zlib.crc32(np.array(prompt, np.int64).tobytes())
