"""The objective of RLVR: advantage, loss, filter of groups and shaping of rewards (report §5.2).

GRPO without the standard deviation (Ahmadian et al. 2024 for the leave-one-out baseline; DAPO, Yu
et al. 2025, for the clip, the token level and the overlong penalty; IcePop, Ling team 2025, for the
band). There is no KL term. Held against NeMo-RL's own classes by ``tests/rlvr/nemo_rl_golden.npz``.

Shapes: ``g`` groups (prompts) of ``n`` answers, ``b = g * n`` answers in the order of their groups,
``t`` positions of a sequence, prompt and padding included. Log-probabilities are in nats, and entry
``[i, j]`` belongs to the token at position ``j`` of answer ``i``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.config import Objective

_MOST_LOG_RATIO = 20.0
"""Largest log ratio that is exponentiated. exp(89) is infinite in float32, and the gradient of a
clipped infinity is 0 * inf."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLoss:
    """Loss of some answers and what it was made of.

    Attributes:
        loss: scalar with a gradient.
        tokens: tokens that count, scalar.
        outside_band: those whose ratio to generation lies outside the band, scalar.
        clipped_low, clipped_high: those inside the band at which clipping removes the gradient,
            scalars.
        kl: sum over the tokens of the k3 estimate of KL(generation || current) in nats, scalar:
            how far the policy is from the one that wrote the answers. It is no part of the loss.
    """

    loss: torch.Tensor
    tokens: torch.Tensor
    outside_band: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor
    kl: torch.Tensor


def leave_one_out(rewards_gn: torch.Tensor) -> torch.Tensor:
    """Return each answer's reward less the mean of the others to its prompt, ``[g, n]``.

    A_i = r_i - sum_{j != i} r_j / (n - 1). It is n / (n - 1) times the distance from the mean of
    the whole group, which TRL and others use. It is not divided by the standard deviation.

    Raises:
        InputError: groups of one answer, or a reward that is not finite.
    """
    group = rewards_gn.shape[-1]
    if rewards_gn.dim() != 2 or group < 2:
        raise InputError(
            f"rewards of shape {tuple(rewards_gn.shape)}",
            rule="they must be [groups, answers] with 2 answers or more to compare",
            fix="raise rl.objective.group_size",
        )
    _require_finite(rewards_gn, "reward", ("group", "answer"))
    others_gn = (rewards_gn.sum(1, keepdim=True) - rewards_gn) / (group - 1)
    return rewards_gn - others_gn


def policy_loss(
    current_bt: torch.Tensor,
    previous_bt: torch.Tensor,
    generation_bt: torch.Tensor,
    mask_bt: torch.Tensor,
    advantages_b: torch.Tensor,
    settings: Objective,
    *,
    tokens: torch.Tensor | float | None = None,
) -> PolicyLoss:
    """Return the clipped policy loss, normalised by the number of tokens.

    With the policy ratio p = exp(current - previous) and the weight w = exp(previous - generation)
    inside the band, else 0:

        loss = sum_it mask_it * w_it * max(-A_i p_it, -A_i clip(p_it, 1 - low, 1 + high)) / tokens

    Tokens outside the band have no gradient and still count in the denominator. Inside the band the
    weight stays what it is: it is not set to 1.

    Args:
        current_bt: log-probabilities of the policy that learns, with a gradient.
        previous_bt: those of the same weights before the first update of this step, by the training
            code.
        generation_bt: those of the policy that wrote the answers, by the engine that wrote them.
        mask_bt: 1 or true where the token is part of an answer that is learnt from.
        advantages_b: see `leave_one_out`, flattened.
        settings: clip and band.
        tokens: number to divide by: the tokens of the whole batch, where this is a part of it.
            Default None: those of `mask_bt`.

    Raises:
        InputError: shapes that do not agree, no token, or a counted log-probability that is missing
            (NaN) or infinite.
    """
    counted_bt = mask_bt.bool()
    _check_shapes(current_bt, previous_bt, generation_bt, mask_bt, advantages_b)
    for name, value_bt in (("training", previous_bt), ("generation", generation_bt)):
        values_bt = torch.where(counted_bt, value_bt, 0.0)
        _require_finite(values_bt, f"{name} log-probability", ("answer", "position"))
    divisor = counted_bt.sum() if tokens is None else torch.as_tensor(tokens)
    if not bool(divisor > 0):
        raise InputError(
            "no token counts",
            rule="the mask must have a token of an answer",
            fix="drop empty answers before the loss",
        )
    zero = current_bt.new_zeros(())
    previous_bt, generation_bt = previous_bt.detach(), generation_bt.detach()
    # Outside the mask anything may stand, NaN too, and NaN times 0 is NaN.
    weight_bt = torch.where(counted_bt, previous_bt - generation_bt, zero).exp()
    inside_bt = (weight_bt >= settings.band_low) & (weight_bt <= settings.band_high)
    used_bt = counted_bt & inside_bt
    log_ratio_bt = torch.where(used_bt, current_bt - previous_bt, zero)
    ratio_bt = log_ratio_bt.clamp(max=_MOST_LOG_RATIO).exp()
    clipped_bt = ratio_bt.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    gain_b1 = advantages_b[:, None].to(current_bt.dtype)
    loss_bt = torch.maximum(-gain_b1 * ratio_bt, -gain_b1 * clipped_bt)
    loss = torch.where(used_bt, weight_bt * loss_bt, zero).sum() / divisor
    with torch.no_grad():
        low_bt = used_bt & (gain_b1 < 0) & (ratio_bt < 1 - settings.clip_low)
        high_bt = used_bt & (gain_b1 > 0) & (ratio_bt > 1 + settings.clip_high)
        moved_bt = torch.where(counted_bt, current_bt - generation_bt, zero)
        kl_bt = moved_bt.clamp(max=_MOST_LOG_RATIO).exp() - 1 - moved_bt
    return PolicyLoss(
        loss=loss,
        tokens=counted_bt.sum(),
        outside_band=(counted_bt & ~inside_bt).sum(),
        clipped_low=low_bt.sum(),
        clipped_high=high_bt.sum(),
        kl=kl_bt.sum(),
    )


def keep_groups(rewards_gn: torch.Tensor) -> torch.Tensor:
    """Return true for the groups whose rewards differ, ``[g]``: the others have no advantage.

    Give it rewards as the verifier said them. Penalties for length would make groups differ that
    nobody or everybody solved.
    """
    return rewards_gn.amax(1) != rewards_gn.amin(1)


def select_groups(rewards_gn: torch.Tensor, wanted: int) -> torch.Tensor:
    """Return the numbers of the first groups whose rewards differ, at most `wanted`, ascending.

    Raises:
        InputError: see `leave_one_out`.
        WorkError: all groups are flat.
    """
    _require_finite(rewards_gn, "reward", ("group", "answer"))
    kept = keep_groups(rewards_gn).nonzero().flatten()
    if not len(kept):
        raise WorkError(
            f"all {len(rewards_gn)} groups have equal rewards, the first "
            f"{float(rewards_gn[0, 0]):.6g}: there is nothing to learn",
            fix="measure the tasks with `mellum2 rl probe` and leave out those that nobody or "
            "everybody solves",
        )
    return kept[:wanted]


def shaped_rewards(
    rewards: torch.Tensor, lengths: torch.Tensor, thinking: torch.Tensor, settings: Objective
) -> torch.Tensor:
    """Return rewards less both penalties for length, same shape; filter the groups before.

    Args:
        rewards: rewards of the verifier, any shape.
        lengths: tokens of each answer, same shape.
        thinking: true where the task lets the model think: its answer is not asked to be concise.
        settings: the penalties.
    """
    concise = concision_penalty(lengths, settings)
    # A wrong answer is no better for being short.
    concise = torch.where(thinking | (rewards <= 0), torch.zeros_like(concise), concise)
    return rewards - overlong_penalty(lengths, settings) - concise


def overlong_penalty(lengths: torch.Tensor, settings: Objective) -> torch.Tensor:
    """Return DAPO's soft penalty of answers near the limit (eq. 13), in float32.

    With the buffer B before the limit L: c * clip((length - (L - B)) / B, 0, 1).
    """
    start = settings.max_tokens - settings.overlong_tokens
    over = (lengths.float() - start) / settings.overlong_tokens
    return settings.overlong_penalty * over.clamp(0, 1)


def concision_penalty(lengths: torch.Tensor, settings: Objective) -> torch.Tensor:
    """Return the penalty of the length of an answer without thoughts, in float32.

    With F free tokens of the limit L: c * clip((length - F) / (L - F), 0, 1). The formula is ours:
    the report only names the penalty. It looks at one answer alone, so that an environment of
    another trainer can apply it too.
    """
    free = settings.concision_free_tokens
    if not settings.concision_penalty:
        return torch.zeros_like(lengths, dtype=torch.float32)
    return settings.concision_penalty * (
        (lengths.float() - free) / (settings.max_tokens - free)
    ).clamp(0, 1)


def check_ages(versions: torch.Tensor, current: int, settings: Objective) -> None:
    """Refuse answers that are older than the policy may be ahead, or from the future.

    Args:
        versions: number of updates of the policy that wrote each answer, any shape.
        current: number of updates of the policy that learns.
        settings: the limit.

    Raises:
        InputError: the first such answer.
    """
    ages = current - versions.flatten()
    for number in ((ages < 0) | (ages > settings.max_age)).nonzero().flatten().tolist()[:1]:
        raise InputError(
            f"answer {number} was written at update {int(versions.flatten()[number])}, "
            f"the policy is at {current}",
            rule=f"its age is from 0 to rl.objective.max_age ({settings.max_age})",
            fix="write it anew, or raise rl.objective.max_age",
        )


def _require_finite(values: torch.Tensor, name: str, axes: tuple[str, str]) -> None:
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        place = bad[0].tolist()
        named = ", ".join(f"{axis} {index}" for axis, index in zip(axes, place, strict=True))
        raise InputError(
            f"{name} {float(values[tuple(place)])} of {named}",
            rule="it must be a finite number",
            fix=f"look at what gave this {name}",
        )


def _check_shapes(
    current_bt: torch.Tensor,
    previous_bt: torch.Tensor,
    generation_bt: torch.Tensor,
    mask_bt: torch.Tensor,
    advantages_b: torch.Tensor,
) -> None:
    others = {"previous": previous_bt, "generation": generation_bt, "mask": mask_bt}
    for name, value in others.items():
        if value.shape != current_bt.shape:
            raise InputError(
                f"{name} of shape {tuple(value.shape)}",
                rule=f"it must have the shape of the current ones, {tuple(current_bt.shape)}",
                fix="pad all to the same positions",
            )
    if advantages_b.shape != current_bt.shape[:1]:
        raise InputError(
            f"advantages of shape {tuple(advantages_b.shape)}",
            rule=f"there is one for each answer, [{current_bt.shape[0]}]",
            fix="flatten groups and answers",
        )
