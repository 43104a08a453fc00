"""Tasks that `mellum2 rl render-nemo` has checked and written, as a data set of NeMo-RL.

NeMo-RL finds the class by this module's name. It and `datasets` are imported only then.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mellum2_megatron.rlvr.nemo_rl.environment import NAME

CLASS = f"{__name__}.TaskDataset"
"""Name by which NeMo-RL finds the class."""

_KEPT_OF_A_LONG_PROMPT = 4


def __getattr__(name: str) -> Any:
    if name == "TaskDataset":
        return task_dataset()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def process_task(
    datum_dict: Mapping[str, Any],
    task_data_spec: Any,
    tokenizer: Any,
    max_seq_length: int,
    idx: int,
) -> dict[str, Any]:
    """Return a task in the form that NeMo-RL's rollouts take.

    Args:
        datum_dict: row of `TaskDataset`.
        task_data_spec: NeMo-RL's prompt files; there are none.
        tokenizer: Hugging Face tokenizer with a chat template.
        max_seq_length: tokens of the longest prompt; a longer one is cut and not learnt from.
        idx: number of the row.
    """
    import torch

    task = json.loads(datum_dict["task"])
    text = tokenizer.apply_chat_template(
        task["messages"], tools=task["tools"] or None, tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)
    fits = len(ids) <= max_seq_length
    kept = ids if fits else ids[:_KEPT_OF_A_LONG_PROMPT]
    return {
        "message_log": [{"role": "user", "content": text, "token_ids": kept}],
        "length": len(ids),
        "extra_env_info": {
            key: task[key] for key in ("verifier", "arguments", "tools", "thinking")
        },
        "loss_multiplier": float(fits),
        "idx": idx,
        "task_name": datum_dict["task_name"],
    }


@functools.cache
def task_dataset() -> Any:
    """Return the class."""
    from datasets import Dataset
    from nemo_rl.data.datasets.raw_dataset import RawDataset
    from nemo_rl.data.interfaces import TaskDataSpec

    class TaskDataset(RawDataset):  # type: ignore[misc,valid-type]  # not installed
        """The tasks of one file."""

        def __init__(self, data_path: str, **_: Any) -> None:
            # Not `splitlines`: a text may hold U+2028 and others, which JSON does not escape.
            lines = Path(data_path).read_text("utf-8").rstrip("\n").split("\n")
            self.task_name = NAME
            # As text: arguments differ from task to task, and Arrow's columns have one type.
            self.dataset = Dataset.from_list([{"task": one, "task_name": NAME} for one in lines])
            self.val_dataset = None
            self.preprocessor = None
            self.set_task_spec({})
            self.set_processor()

        def set_task_spec(self, data_config: Mapping[str, Any]) -> None:
            self.task_spec = TaskDataSpec(task_name=self.task_name)

        def set_processor(self) -> None:
            self.processor = process_task

    return TaskDataset
