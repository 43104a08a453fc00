"""The values of a run that decide its numbers: equal ones make the same training."""

from __future__ import annotations

from typing import Any

from mellum2_megatron.common.values import to_plain
from mellum2_megatron.config import Run

_IDLE = (
    "name",
    "description",
    "sources",
    "timeout_minutes",
    "setup_timeout_minutes",
    "checkpoint",
    # Their contents count in place of their paths, see `ablations.running.identity`.
    "data.path",
    "data.tokenizer",
    "data.cache",
    # The samples are the same with any of these.
    "data.workers",
    "data.feed",
    "data.stream",
    "logging.tensorboard",
    "logging.wandb_project",
    "logging.wandb_entity",
    "logging.wandb_name",
    "logging.sample_prompts",
    "logging.sample_interval",
    "logging.sample_tokens",
    "logging.eval_tasks",
    "logging.eval_task_interval",
)
"""Keys and sections that change no number of a training."""


def deciding_values(run: Run) -> dict[str, Any]:
    """Return the deciding values by full key, in the order of a run file."""
    values: dict[str, Any] = {}

    def walk(prefix: str, plain: dict[str, Any]) -> None:
        for name, value in plain.items():
            key = prefix + name
            if key in _IDLE:
                continue
            if isinstance(value, dict):
                walk(f"{key}.", value)
            elif key in ("data.train", "data.valid"):
                values[key] = [weight for weight, _ in value]
            else:
                values[key] = value

    walk("", to_plain(run))
    return values
