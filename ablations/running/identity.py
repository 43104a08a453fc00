"""The hash of a task: all that decides its numbers, so that nothing is trained twice.

It covers the deciding values of the resolved run (`ablations.asking.deciding`), the contents of its
data, the task whose weights it starts from, and the versions of the packages that compute. The
commit of the code is in ``provenance.jsonl`` and not in the hash: most commits change no number.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path

from ablations.asking.deciding import deciding_values
from mellum2_megatron.checkpoint import read_run
from mellum2_megatron.checkpoint.data_record import DataRecord
from mellum2_megatron.checkpoint.folder import RUN_FILE
from mellum2_megatron.common.provenance import PROJECT
from mellum2_megatron.config import Run

PACKAGES = (PROJECT, "torch", "megatron-core", "emerging-optimizers", "transformer-engine")
"""Distributions whose versions are part of the hash, where installed."""


def versions() -> dict[str, str]:
    """Return the installed versions of `PACKAGES`."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def identity_of(run: Run, *, start: str = "") -> dict[str, str]:
    """Return the parts of a hash that are not in the run: data, start and versions.

    Args:
        run: a resolved run; its data are read.
        start: hash of the task whose weights it starts from; empty (default): none.

    Raises:
        InputError: the data are missing, damaged, or do not fit the run.
    """
    from mellum2_megatron.data.feed.sources import check_amounts, check_data

    data = check_data(run)
    check_amounts(run, data)
    record = DataRecord.of(data)
    return {
        "data.train": " ".join(record.train),
        "data.valid": " ".join(record.valid),
        "tokenizer": record.tokenizer,
        **({"start": start} if start else {}),
        **versions(),
    }


def task_hash(run: Run, identity: Mapping[str, str]) -> str:
    """Return the hash of a task, 16 hexadecimal digits."""
    content = json.dumps([deciding_values(run), dict(sorted(identity.items()))], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def hash_on_disk(folder: Path, identity: Mapping[str, str]) -> str:
    """Return the hash of the run in a task's folder.

    It is made anew from the run file: a key that is younger than the file takes its default there,
    and so does not change the hash.

    Raises:
        InputError: there is no readable run file.
    """
    return task_hash(read_run(folder / RUN_FILE, warn=False), identity)


def changes(old: Run, new: Run, before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return what has changed between two tasks, ``key: old, now new`` each."""
    values = [deciding_values(run) for run in (old, new)]
    tables = [{**values[0], **before}, {**values[1], **now}]
    return [
        f"{key}: {_short(tables[0].get(key))}, now {_short(tables[1].get(key))}"
        for key in dict.fromkeys([*tables[0], *tables[1]])
        if tables[0].get(key) != tables[1].get(key)
    ]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:12]}.."
