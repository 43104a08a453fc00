"""Files of the tasks of a run that learns from its own answers (``data.feed=rollouts``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mellum2_megatron.config import Data
    from mellum2_megatron.data.corpus.selection import Split

_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def task_file(data: Data, split: Split) -> Path | None:
    """Return the file of a split's tasks in ``data.path``, such as ``train.jsonl``; None if none.

    The first of .jsonl, .jsonl.gz and .jsonl.zst.
    """
    files = [Path(data.path) / f"{split}{ending}" for ending in _ENDINGS]
    return next((file for file in files if file.is_file()), None)
