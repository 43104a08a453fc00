"""A model that trains in seconds, as overrides of the tiny recipe, and text to train it on."""

from __future__ import annotations

import random

SMALL_MODEL = [
    "architecture.vocab_size=384",
    "architecture.hidden_size=64",
    "architecture.head_dim=16",
    "architecture.moe_intermediate_size=32",
    "architecture.num_experts=4",
    "architecture.sliding_window=16",
    "data.sequence_length=64",
    "schedule.micro_batch_size=2",
    "schedule.warmup_samples=4",
    "logging.log_interval=1",
]


def python_like(seed: int) -> str:
    """Return a few hundred to a few thousand characters that look like code."""
    rng = random.Random(seed)
    names = [
        first + second
        for first in ("model", "layer", "expert", "router")
        for second in ("", "_index", "_weight")
    ]
    names += ["token", "hidden_state", "scale", "sliding_window"]
    names += ["attention_mask", "position", "gradient", "optimizer"]
    lines = [f"def {rng.choice(names)}_{seed}(self, {rng.choice(names)}):"]
    for _ in range(rng.randrange(5, 60)):
        indent = "    " * rng.randrange(1, 4)
        target, array, index = rng.choice(names), rng.choice(names), rng.randrange(1000)
        lines.append(f"{indent}{target} = {array}[{index}] + {rng.random():.4f}")
    return "\n".join(lines) + "\n"
