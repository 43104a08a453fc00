"""Compute the outputs in `nemo_rl_golden.npz` anew with NeMo-RL's own classes, in its environment::

    PYTHONPATH=.:CHECKOUT python -m tests.rlvr.nemo_rl_golden COMMIT

The inputs stay those of the file. Prints the largest difference from the former outputs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).with_name("nemo_rl_golden.npz")
CASES = 4


def outputs(case: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what NeMo-RL computes of one case's inputs."""
    from nemo_rl.algorithms.advantage_estimator import AdvEstimatorConfig, GRPOAdvantageEstimator
    from nemo_rl.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn

    low, high = case["band"].tolist()
    clip_low, clip_high = case["clip"].tolist()
    settings = ClippedPGLossConfig(
        reference_policy_kl_penalty=0.0,
        ratio_clip_min=clip_low,
        ratio_clip_max=clip_high,
        token_level_loss=True,
        use_importance_sampling_correction=True,
        truncated_importance_sampling_type="icepop",
        truncated_importance_sampling_ratio=high,
        truncated_importance_sampling_ratio_min=low,
    )
    estimator = GRPOAdvantageEstimator(
        AdvEstimatorConfig(normalize_rewards=False, use_leave_one_out_baseline=True), settings
    )
    mask = case["token_mask"]
    groups = torch.arange(len(mask)) // int(case["group_size"])
    advantages = estimator.compute_advantage(
        prompt_ids=groups[:, None], rewards=case["rewards"], mask=mask
    )
    current = case["current_logprobs"].clone().requires_grad_()
    counted = mask * case["sample_mask"][:, None]
    # Its first position has no prediction; the stored arrays begin with the second.
    data: dict[str, Any] = {
        name: torch.nn.functional.pad(value, (1, 0))
        for name, value in (
            ("token_mask", mask),
            ("advantages", advantages),
            ("prev_logprobs", case["previous_logprobs"]),
            ("generation_logprobs", case["generation_logprobs"]),
        )
    }
    data["sample_mask"] = case["sample_mask"]
    loss, _ = ClippedPGLossFn(settings)(
        current, data, global_valid_seqs=case["sample_mask"].sum(), global_valid_toks=counted.sum()
    )
    loss.backward()
    weight = (case["previous_logprobs"] - case["generation_logprobs"]).exp()
    outside = ((weight < low) | (weight > high)).double() * counted
    assert current.grad is not None
    return {
        "advantages": advantages[:, 0],
        "loss": loss.detach(),
        "gradient": current.grad,
        "outside_band": outside.sum() / counted.sum(),
    }


def remade(commit: str) -> tuple[dict[str, np.ndarray], float]:
    """Return the content of the file, and the largest difference from the former one."""
    stored = np.load(GOLDEN)
    content, largest = {name: stored[name] for name in stored.files}, 0.0
    for number in range(CASES):
        prefix = f"case{number}_"
        case = {
            name.removeprefix(prefix): torch.from_numpy(np.array(stored[name]))
            for name in stored.files
            if name.startswith(prefix)
        }
        for name, value in outputs(case).items():
            former = stored[f"{prefix}{name}"]
            content[f"{prefix}{name}"] = np.asarray(value.numpy(), dtype=former.dtype)
            largest = max(largest, float(np.abs(content[f"{prefix}{name}"] - former).max()))
    content["source"] = np.array(
        f"NVIDIA-NeMo/RL {commit}: ClippedPGLossFn, GRPOAdvantageEstimator; float32 CPU"
    )
    return content, largest


if __name__ == "__main__":
    arrays, difference = remade(sys.argv[1])
    np.savez_compressed(GOLDEN, **arrays)  # type: ignore[arg-type]  # names are keywords
    sys.stdout.write(f"largest difference from the former file: {difference:.3g}\n")
