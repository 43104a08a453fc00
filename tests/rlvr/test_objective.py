"""The objective against NeMo-RL's own numbers, plain loops, and finite differences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.config import Objective
from mellum2_megatron.rlvr.objective import (
    PolicyLoss,
    check_ages,
    keep_groups,
    leave_one_out,
    policy_loss,
    select_groups,
    shaped_rewards,
)

GOLDEN = np.load(Path(__file__).with_name("nemo_rl_golden.npz"))
"""Inputs and outputs of NeMo-RL's ClippedPGLossFn and GRPOAdvantageEstimator, float32 on a CPU;
the entry ``source`` has the commit."""

TRL = np.load(Path(__file__).with_name("trl_golden.npz"))
"""Outputs of TRL's GRPOTrainer (`token_mask`) for the same inputs (`trl_golden.py`)."""

CASES = range(4)
BT = ("current", "previous", "generation")


def golden(case: int, name: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[f"case{case}_{name}"])


def random_batch(seed: int = 0, b: int = 6, t: int = 9) -> dict[str, torch.Tensor]:
    """Float64 log-probabilities close to each other, with tokens on both sides of every bound."""
    generator = torch.Generator().manual_seed(seed)
    draw = {
        name: torch.randn(b, t, generator=generator, dtype=torch.float64)
        for name in ("base", *BT[:2])
    }
    generation = -3 - draw["base"].abs()
    previous = (generation + 0.9 * draw["previous"]).clamp(max=0)
    current = (previous + 0.3 * draw["current"]).clamp(max=0)
    mask = torch.rand(b, t, generator=generator) < 0.7
    advantages = torch.randn(b, generator=generator, dtype=torch.float64)
    values = {"current": current, "previous": previous, "generation": generation}
    return {f"{name}_bt": value for name, value in values.items()} | {
        "mask_bt": mask,
        "advantages_b": advantages,
    }


def plain_loss(batch: dict[str, torch.Tensor], settings: Objective) -> dict[str, float]:
    """The formula of the report, token by token."""
    total = outside = counted = 0.0
    for row, gain in enumerate(batch["advantages_b"].tolist()):
        for place, counts in enumerate(batch["mask_bt"][row].tolist()):
            if not counts:
                continue
            counted += 1
            now, before, written = (batch[f"{name}_bt"][row, place].item() for name in BT)
            weight = math.exp(before - written)
            if not settings.band_low <= weight <= settings.band_high:
                outside += 1
                continue
            ratio = math.exp(now - before)
            clipped = min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high)
            total -= weight * min(gain * ratio, gain * clipped)
    return {"loss": total / counted, "outside_band": outside, "tokens": counted}


@pytest.mark.parametrize("case", CASES)
def test_advantage_is_nemo_rls(case: int) -> None:
    rewards_gn = golden(case, "rewards").view(-1, int(golden(case, "group_size")))
    torch.testing.assert_close(
        leave_one_out(rewards_gn).flatten(), golden(case, "advantages"), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_nemo_rls(case: int) -> None:
    band, clip = golden(case, "band").tolist(), golden(case, "clip").tolist()
    settings = Objective(clip_low=clip[0], clip_high=clip[1], band_low=band[0], band_high=band[1])
    current = golden(case, "current_logprobs").requires_grad_()
    mask = golden(case, "token_mask") * golden(case, "sample_mask")[:, None]
    result = policy_loss(
        current,
        golden(case, "previous_logprobs"),
        golden(case, "generation_logprobs"),
        mask,
        golden(case, "advantages"),
        settings,
    )
    result.loss.backward()
    assert current.grad is not None
    torch.testing.assert_close(result.loss.detach(), golden(case, "loss"), rtol=0, atol=1e-6)
    torch.testing.assert_close(current.grad, golden(case, "gradient"), rtol=0, atol=1e-6)
    share = float(result.outside_band) / float(result.tokens)
    assert share == pytest.approx(float(golden(case, "outside_band")), abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_advantage_is_trls_times_the_factor_of_leaving_one_out(case: int) -> None:
    size = int(golden(case, "group_size"))
    advantages = leave_one_out(golden(case, "rewards").view(-1, size)).flatten()
    trls = torch.from_numpy(TRL[f"case{case}_advantages"])
    assert float(trls.abs().max()) > 0.1
    torch.testing.assert_close(advantages, trls * size / (size - 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_trls(case: int) -> None:
    band, clip = golden(case, "band").tolist(), golden(case, "clip").tolist()
    settings = Objective(clip_low=clip[0], clip_high=clip[1], band_low=band[0], band_high=band[1])
    current = golden(case, "current_logprobs").requires_grad_()
    result = policy_loss(
        current,
        golden(case, "previous_logprobs"),
        golden(case, "generation_logprobs"),
        golden(case, "token_mask") * golden(case, "sample_mask")[:, None],
        torch.from_numpy(TRL[f"case{case}_advantages"]),
        settings,
    )
    result.loss.backward()
    assert current.grad is not None
    found = {
        "loss": result.loss.detach(),
        "gradient": current.grad,
        "outside_band": (result.outside_band / result.tokens).float(),
    }
    for name, value in found.items():
        wanted = torch.from_numpy(np.array(TRL[f"case{case}_{name}"])).float()
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)


def test_the_golden_cases_use_band_and_clip() -> None:
    assert "TRL 1.16" in str(TRL["source"])
    assert "NVIDIA-NeMo/RL" in str(GOLDEN["source"])
    shares = [float(golden(case, "outside_band")) for case in CASES]
    assert sum(share > 0.2 for share in shares) >= 2
    assert len({tuple(golden(case, "clip").tolist()) for case in CASES}) > 1


@pytest.mark.parametrize("seed", range(3))
def test_loss_is_the_plain_formula(seed: int) -> None:
    batch, settings = random_batch(seed), Objective()
    result, expected = policy_loss(**batch, settings=settings), plain_loss(batch, settings)
    for name, value in expected.items():
        assert float(getattr(result, name)) == pytest.approx(value, rel=1e-12), name
    assert 0 < expected["outside_band"] < expected["tokens"]
    assert min(float(result.clipped_low), float(result.clipped_high)) > 0


def test_gradient_is_the_finite_difference() -> None:
    batch, settings = random_batch(), Objective()
    current = batch.pop("current_bt").requires_grad_()

    def loss_of(value: torch.Tensor) -> torch.Tensor:
        return policy_loss(value, **batch, settings=settings).loss

    assert torch.autograd.gradcheck(loss_of, (current,), eps=1e-7, atol=1e-7)
    loss_of(current).backward()
    gradient = current.grad
    assert gradient is not None
    weight = (batch["previous_bt"] - batch["generation_bt"]).exp()
    outside = (weight < 0.5) | (weight > 5) | ~batch["mask_bt"]
    assert outside.any()
    assert not gradient[outside].any()
    assert gradient[~outside].any()


def test_loss_of_parts_adds_up_to_the_loss_of_the_batch() -> None:
    batch, settings = random_batch(), Objective()
    tokens = batch["mask_bt"].sum()
    parts = [
        policy_loss(
            **{name: value[rows] for name, value in batch.items()},
            settings=settings,
            tokens=tokens,
        ).loss
        for rows in (slice(0, 1), slice(1, 6))
    ]
    torch.testing.assert_close(sum(parts), policy_loss(**batch, settings=settings).loss)


def test_what_is_masked_does_not_matter() -> None:
    batch, settings = random_batch(), Objective()
    expected = policy_loss(**batch, settings=settings)
    for name in BT:
        batch[f"{name}_bt"] = batch[f"{name}_bt"].masked_fill(~batch["mask_bt"], math.nan)
    current = batch["current_bt"].requires_grad_()
    result = policy_loss(**batch, settings=settings)
    assert torch.equal(result.loss, expected.loss)
    result.loss.backward()
    assert current.grad is not None
    assert current.grad.isfinite().all()


def test_a_collapsed_probability_has_no_infinite_gradient() -> None:
    far = torch.tensor([[-1.0, -1.0, -200.0]], dtype=torch.float32)
    current = torch.tensor([[-1.0, -100.0, -0.5]]).requires_grad_()
    previous = torch.tensor([[-1.0, -1.0, -190.0]])
    for gain in (1.0, -1.0):
        result = policy_loss(
            current, previous, far, torch.ones(1, 3), torch.tensor([gain]), Objective()
        )
        current.grad = None
        result.loss.backward()
        assert current.grad is not None
        assert current.grad.isfinite().all()


def test_kl_is_k3() -> None:
    batch = random_batch()
    result: PolicyLoss = policy_loss(**batch, settings=Objective())
    moved = (batch["current_bt"] - batch["generation_bt"])[batch["mask_bt"]].tolist()
    assert float(result.kl) == pytest.approx(sum(math.expm1(x) - x for x in moved), rel=1e-12)


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    rewards = torch.rand(5, 4, dtype=torch.float64)
    for group, answer in np.ndindex(5, 4):
        others = [float(rewards[group, other]) for other in range(4) if other != answer]
        expected = float(rewards[group, answer]) - sum(others) / 3
        assert float(leave_one_out(rewards)[group, answer]) == pytest.approx(expected)
    # The baseline of TRL and others holds the answer itself; theirs is (n - 1) / n of ours.
    torch.testing.assert_close(
        leave_one_out(rewards) * 3 / 4, rewards - rewards.mean(1, keepdim=True)
    )


def test_groups_are_judged_before_shaping() -> None:
    rewards = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.3, 0.3], [0.0, 0.2]])
    assert keep_groups(rewards).tolist() == [False, False, True, False, True]
    assert select_groups(rewards, 5).tolist() == [2, 4]
    assert select_groups(rewards, 1).tolist() == [2]
    lengths = torch.tensor([[10, 15_000]] * 5)
    shaped = shaped_rewards(rewards, lengths, torch.ones_like(lengths).bool(), Objective())
    assert keep_groups(shaped).all(), "or the order would not matter"


@pytest.mark.parametrize(
    ("length", "thinking", "reward", "penalty"),
    [
        (50, False, 1.0, 0.0),
        (100, False, 1.0, 0.0),
        (550, False, 1.0, 0.25),
        (550, True, 1.0, 0.0),
        (550, False, 0.0, 0.0),
        (800, True, 1.0, 0.0),
        (900, True, 1.0, 1.0),
        (1000, True, 0.0, 2.0),
        (1000, False, 1.0, 2.5),
        (5000, False, 1.0, 2.5),
    ],
)
def test_penalties_of_length(length: int, thinking: bool, reward: float, penalty: float) -> None:
    settings = Objective(
        max_tokens=1000,
        overlong_tokens=200,
        overlong_penalty=2.0,
        concision_penalty=0.5,
        concision_free_tokens=100,
    )
    shaped = shaped_rewards(
        torch.tensor([reward]), torch.tensor([length]), torch.tensor([thinking]), settings
    )
    assert float(shaped) == pytest.approx(reward - penalty)


def test_ages() -> None:
    settings = Objective(max_age=2)
    check_ages(torch.tensor([[5, 3], [4, 5]]), 5, settings)
    for versions in ([5, 2], [5, 6]):
        with pytest.raises(InputError, match="answer 1 was written at update"):
            check_ages(torch.tensor(versions), 5, settings)


def spoiled(name: str, value: float) -> dict[str, torch.Tensor]:
    batch = random_batch()
    row, place = batch["mask_bt"].nonzero()[3].tolist()
    batch[name] = batch[name].clone()
    batch[name][row, place] = value
    return batch


BAD_BATCHES: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "missing": (spoiled("generation_bt", math.nan), "generation log-probability nan of answer"),
    "infinite": (spoiled("previous_bt", -math.inf), "training log-probability -inf of answer"),
    "no-token": (random_batch() | {"mask_bt": torch.zeros(6, 9)}, "no token counts"),
    "shape": (random_batch() | {"mask_bt": torch.ones(6, 8)}, "mask of shape"),
    "advantages": (random_batch() | {"advantages_b": torch.ones(5)}, "one for each answer"),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_a_bad_batch_is_refused(name: str) -> None:
    batch, message = BAD_BATCHES[name]
    with pytest.raises(InputError, match=message):
        policy_loss(**batch, settings=Objective())


def test_bad_rewards_are_refused() -> None:
    with pytest.raises(InputError, match="2 answers or more"):
        leave_one_out(torch.ones(3, 1))
    with pytest.raises(InputError, match="reward nan of group 0, answer 1"):
        leave_one_out(torch.tensor([[0.0, math.nan]]))
    with pytest.raises(InputError, match="reward inf of group 1, answer 0"):
        select_groups(torch.tensor([[0.0, 1.0], [math.inf, 0.0]]), 2)
    with pytest.raises(WorkError, match="all 4 groups have equal rewards"):
        select_groups(torch.ones(4, 2), 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, "a group has 2 or more"),
        ({"band_low": 2.0}, "objective.band_low"),
        ({"band_high": 0.4}, "band_low <= 1 <= band_high"),
        ({"clip_low": 1.0}, "between 0 and 1"),
        ({"clip_high": math.nan}, "objective.clip_high"),
        ({"oversampling": 0.5}, "at least the prompts of a step"),
        ({"max_age": -1}, "objective.max_age"),
        ({"overlong_tokens": 16_384}, "objective.max_tokens"),
        ({"max_tokens": 1024}, "objective.overlong_tokens"),
        ({"concision_penalty": -1.0}, "objective.concision_penalty"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Objective(**settings)


@pytest.mark.parametrize(
    ("prompts", "oversampling", "sampled"), [(10, 1.1, 11), (100, 1.1, 110), (10, 1.11, 12)]
)
def test_prompts_are_counted_without_rounding_errors(
    prompts: int, oversampling: float, sampled: int
) -> None:
    assert Objective(prompts=prompts, oversampling=oversampling).sampled_prompts == sampled


def test_the_reports_settings_are_the_defaults() -> None:
    settings = Objective()
    assert (settings.prompts, settings.group_size, settings.sampled_prompts) == (256, 16, 384)
    assert (settings.clip_low, settings.clip_high) == (0.2, 0.28)
    assert (settings.band_low, settings.band_high, settings.max_age) == (0.5, 5.0, 2)
