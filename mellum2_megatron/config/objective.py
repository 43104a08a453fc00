"""Settings of the objective of reinforcement learning (report §5.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mellum2_megatron.common.field_checks import (
    check_fields,
    require,
    require_not_negative,
    require_positive,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Loss, advantage and shaping of rewards; the defaults are the report's (§5.2) where it speaks.

    Attributes:
        group_size: answers to each prompt, 2 or more, default 16.
        prompts: prompts of a step, default 256.
        oversampling: prompts that are answered for each one of a step, default 1.5. Groups of equal
            rewards are dropped from them.
        clip_low, clip_high: the policy ratio is clipped to 1 - ``clip_low`` .. 1 + ``clip_high``,
            default 0.2 and 0.28.
        band_low, band_high: least and greatest ratio of training to generation probability with
            which a token counts (IcePop), default 0.5 and 5.0.
        max_age: updates that an answer may be older than the policy that learns from it, default 2.
        max_tokens: tokens of the longest answer, default 16,384 (Instruct; Thinking: 40,960).
        overlong_tokens: tokens before ``max_tokens`` over which the overlong penalty rises from 0,
            default 2,048. The report names a soft penalty without numbers; these are ours.
        overlong_penalty: penalty of an answer of ``max_tokens`` tokens, default 1; 0: none.
        concision_penalty: penalty of the longest answer without thoughts, default 0: none. The
            report penalises length in Instruct without numbers.
        concision_free_tokens: tokens of an answer that cost nothing, default 1,024.

    Raises:
        InputError: a value outside its range, a group of one, or a band upside down.
    """

    group_size: int = 16
    prompts: int = 256
    oversampling: float = 1.5
    clip_low: float = 0.2
    clip_high: float = 0.28
    band_low: float = 0.5
    band_high: float = 5.0
    max_age: int = 2
    max_tokens: int = 16_384
    overlong_tokens: int = 2048
    overlong_penalty: float = 1.0
    concision_penalty: float = 0.0
    concision_free_tokens: int = 1024

    def __post_init__(self) -> None:
        check_fields("rl.objective", self)
        require(
            2 <= self.group_size <= 65_536,
            f"rl.objective.group_size={self.group_size}",
            rule="an answer is compared with the others to its prompt, so a group has 2 or more",
            fix="use 16",
        )
        require_positive("rl.objective.prompts", self.prompts, fix="use 256")
        require(
            1 <= self.oversampling <= 100,
            f"rl.objective.oversampling={self.oversampling}",
            rule="at least the prompts of a step are answered, at most 100 times as many",
            fix="use 1.5",
        )
        require(
            0 < self.clip_low < 1,
            f"rl.objective.clip_low={self.clip_low}",
            rule="the lower bound 1 - clip_low lies between 0 and 1",
            fix="use 0.2",
        )
        require_positive("rl.objective.clip_high", self.clip_high, fix="use 0.28", most=1e3)
        require_positive("rl.objective.band_low", self.band_low, fix="use 0.5", most=1.0)
        require(
            1 <= self.band_high <= 1e6,
            f"rl.objective.band_high={self.band_high}",
            rule="the band holds a ratio of 1, and so band_low <= 1 <= band_high",
            fix="use 5.0",
        )
        require_not_negative("rl.objective.max_age", self.max_age, fix="use 2")
        require_positive("rl.objective.max_tokens", self.max_tokens, fix="use 16384")
        for name, fix in (("overlong_penalty", "use 1"), ("concision_penalty", "use 0")):
            require_not_negative(f"rl.objective.{name}", getattr(self, name), fix=fix, most=1e6)
        for name, penalty in (
            ("overlong_tokens", self.overlong_penalty),
            ("concision_free_tokens", self.concision_penalty),
        ):
            value = getattr(self, name)
            require_positive(f"rl.objective.{name}", value, fix="use the default")
            require(
                value < self.max_tokens or not penalty,
                f"rl.objective.{name}={value}",
                rule=f"must be below rl.objective.max_tokens ({self.max_tokens})",
                fix=f"use {max(1, self.max_tokens // 8)}",
            )

    @property
    def sampled_prompts(self) -> int:
        """Prompts that are answered for one step."""
        # 10 * 1.1 is 11.000000000000002.
        return math.ceil(round(self.prompts * self.oversampling, 6))
