"""Compute `trl_golden.npz` anew with TRL's own trainer, in an environment of its own::

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.16.0 transformers==5.23.0
    PYTHONPATH=. /tmp/trl/bin/python -m tests.rlvr.trl_golden

The inputs are those of `nemo_rl_golden.npz`. Advantages and ratios come from
`GRPOTrainer._generate_and_score_completions`, loss and gradient from `GRPOTrainer._compute_loss`;
replaced are only what generates, judges and runs a model: `_generate`, `_calculate_rewards` and
`_get_per_token_logps_and_entropies` return the inputs. Prints the largest difference from the
former outputs.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

INPUTS = Path(__file__).with_name("nemo_rl_golden.npz")
GOLDEN = Path(__file__).with_name("trl_golden.npz")
CASES = 4


def trainer(folder: str, case: Mapping[str, np.ndarray]) -> Any:
    """Return TRL's trainer of a model with one layer, with a case's settings."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    tokens = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "[EOS]": 2, "a": 3}, "[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]"
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1, pad_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    rows, length = case["current_logprobs"].shape
    low, high = case["band"].tolist()
    settings = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=rows,
        steps_per_generation=1,
        gradient_accumulation_steps=1,
        num_generations=int(case["group_size"]),
        max_completion_length=length,
        beta=0.0,
        loss_type="dapo",
        scale_rewards="none",
        epsilon=case["clip"][0],
        epsilon_high=case["clip"][1],
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode="token_mask",
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    made = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * rows}),
        processing_class=tokenizer,
    )
    made.use_vllm = True  # after its start, which would look for a server
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


def outputs(case: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what TRL computes of one case's inputs."""
    given = {name: torch.from_numpy(np.array(value)) for name, value in case.items()}
    current = given["current_logprobs"].clone().requires_grad_()
    rows, length = current.shape
    mask = (given["token_mask"] * given["sample_mask"][:, None]).long()
    with tempfile.TemporaryDirectory() as folder:
        one = trainer(folder, case)
        one._generate = lambda prompts: (
            [[3]] * rows,
            [[3] * length] * rows,
            mask.tolist(),
            ["a"] * rows,
            given["generation_logprobs"].tolist(),
            {},
            None,
            [],
        )
        one._calculate_rewards = lambda *_: given["rewards"][:, None]
        one._get_per_token_logps_and_entropies = lambda *_, **__: (
            given["previous_logprobs"],
            torch.zeros(rows, length),
            None,
        )
        batch = one._generate_and_score_completions([{"prompt": "a"}] * rows)
        one._get_per_token_logps_and_entropies = lambda *_, **__: (
            current,
            torch.zeros(rows, length),
            None,
        )
        loss = one._compute_loss(one.model, batch)
    loss.backward()
    assert current.grad is not None
    ratio = batch["importance_sampling_ratio"]
    return {
        "advantages": batch["advantages"].numpy(),
        "loss": loss.detach().numpy(),
        "gradient": current.grad.numpy(),
        "outside_band": (((ratio == 0) * mask).sum() / mask.sum()).numpy(),
    }


if __name__ == "__main__":
    inputs, content, largest = np.load(INPUTS), {}, 0.0
    former = np.load(GOLDEN) if GOLDEN.exists() else {}
    for number in range(CASES):
        prefix = f"case{number}_"
        own = {
            name.removeprefix(prefix): inputs[name]
            for name in inputs.files
            if name.startswith(prefix)
        }
        for name, value in outputs(own).items():
            key = f"{prefix}{name}"
            content[key] = value
            if key in former:
                largest = max(largest, float(np.abs(value - former[key]).max()))
    version = importlib.metadata.version("trl")
    content["source"] = np.array(f"TRL {version}: GRPOTrainer, token_mask; float32 CPU")
    np.savez_compressed(GOLDEN, **content)
    sys.stdout.write(f"largest difference from the former file: {largest:.3g}\n")
