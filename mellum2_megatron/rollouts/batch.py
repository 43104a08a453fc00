"""The batch of a step: a sequence for each answer, with what its loss needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mellum2_megatron.rlvr.objective import check_ages, leave_one_out, shaped_rewards
from mellum2_megatron.rollouts.groups import Group

if TYPE_CHECKING:
    from mellum2_megatron.config import Run
    from mellum2_megatron.rollouts.engine import Sampled
    from mellum2_megatron.rollouts.prompts import RunTasks

GENERATION, ADVANTAGES = "generation", "advantages"
"""Fields of a sample beside those of every feed: log-probability of each label under the weights
that wrote it, in nats, and the answer's advantage at each position; float32 `[s]`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """An answer with its prompt and advantage."""

    prompt: tuple[int, ...]
    answer: Sampled
    advantage: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The answers that a step learns from.

    Attributes:
        rows: the answers; fewer than the batch has places if groups are missing.
        size: places of the batch.
        length: tokens of a sequence.
        pad: token behind the end of an answer.
        age, oldest: mean and greatest age of the answers, in updates.
    """

    rows: tuple[Row, ...]
    size: int
    length: int
    pad: int
    age: float
    oldest: int

    @classmethod
    def of(cls, groups: Sequence[Group], run: Run, tasks: RunTasks, *, version: int) -> Batch:
        """Return the batch of some groups: rewards are shaped, then compared inside each group.

        Args:
            groups: groups with differing rewards, at least one.
            run: a resolved run.
            tasks: its tasks.
            version: updates of the weights that learn.
        """
        objective = run.rl.objective
        check_ages(torch.tensor([group.version for group in groups]), version, objective)
        rewards_gn = torch.tensor([group.rewards for group in groups], dtype=torch.float32)
        lengths_gn = torch.tensor([[len(one.tokens) for one in group.answers] for group in groups])
        thinking_g1 = torch.tensor([[tasks.train[group.task].thinking] for group in groups])
        shaped_gn = shaped_rewards(
            rewards_gn, lengths_gn, thinking_g1.expand_as(lengths_gn), objective
        )
        advantages = leave_one_out(shaped_gn).tolist()
        ages = [version - group.version for group in groups]
        return cls(
            rows=tuple(
                Row(prompt=tasks.train_tokens[group.task], answer=answer, advantage=advantage)
                for group, own in zip(groups, advantages, strict=True)
                for answer, advantage in zip(group.answers, own, strict=True)
            ),
            size=objective.prompts * objective.group_size,
            length=run.data.sequence_length,
            pad=tasks.ends[0],
            age=sum(ages) / len(ages),
            oldest=max(ages),
        )

    def sample(self, place: int) -> dict[str, torch.Tensor]:
        """Return the sample at a place of the batch, ``[s]`` each; one that counts nowhere if none.

        Position t holds the token, its label is the next one, and mask, log-probability and
        advantage are the label's.
        """
        length = self.length
        ids = torch.full((length + 1,), self.pad, dtype=torch.long)
        mask, generation, advantages = torch.zeros(3, length)
        if place < len(self.rows):
            row = self.rows[place]
            start, answer = len(row.prompt), row.answer.tokens
            whole = (*row.prompt, *answer)
            ids[: len(whole)] = torch.tensor(whole)
            labels = slice(start - 1, start - 1 + len(answer))
            mask[labels] = 1.0
            generation[labels] = torch.tensor(row.answer.log_probabilities)
            advantages[:] = row.advantage
        return {
            "tokens": ids[:-1].clone(),
            "labels": ids[1:].clone(),
            "loss_mask": mask,
            "position_ids": torch.arange(length),
            GENERATION: generation,
            ADVANTAGES: advantages,
        }
