"""Inputs of the tests of corpus plans: small sources with planted faults, and a plan of them."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

LENGTH = 512
WORDS = [
    f"{first}{second}"
    for first in ("open", "read", "load", "parse", "merge", "split")
    for second in ("er", "ing", "_all", "_one", "s", "_now", "_file", "_row")
]


def module(seed: int) -> str:
    """Return a valid Python module of some functions."""
    generator = np.random.default_rng(seed)
    functions = []
    for _ in range(3 + seed % 4):
        name, one, two, three = generator.choice(WORDS, 4, replace=False)
        number = generator.integers(10_000)
        functions.append(
            f"def {name}({one}, {two}):\n    {three} = {one} + {number}\n    return {three}\n"
        )
    return "\n\n".join(functions)


def rich(seed: int) -> str:
    """Return a module with more than 82 unique tokens, however small the vocabulary."""
    letters = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    generator = np.random.default_rng([seed, 1])
    return module(seed) + f'TABLE = "{"".join(generator.permutation(letters * 2))} ?!:;,.<>@#$%&"\n'


def write_inputs(folder: Path, module: Callable[[int], str] = module) -> None:
    """Write three sources of code and one of prose, with planted faults and duplicates."""
    (folder / "tree").mkdir(parents=True)
    for seed in range(30):
        (folder / "tree" / f"m{seed}.py").write_text(module(seed))
    (folder / "tree" / "broken.py").write_text("def f(:\n" * 20 + module(900))
    (folder / "tree" / "minified.py").write_text("x = '" + "ab " * 1000 + "'\n")
    (folder / "tree" / "latin.py").write_bytes("# caf\xe9\n".encode("latin-1") * 50)
    # Equal to m0, and m1 with one changed name.
    (folder / "tree" / "z_copy.py").write_text(module(0))
    (folder / "tree" / "z_near.py").write_text(module(1) + "\n# the end\n")
    rows = [
        {
            "content": module(seed),
            "lang": "Python",
            "repository_name": "r",
            "path": f"{seed}.py",
        }
        for seed in range(100, 120)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "code.parquet")
    sentence = "The {} that they had built stood with its {} open to the sea, and so did the {}.\n"
    words = [f"word{n}" for n in range(60)]
    generator = np.random.default_rng(5)
    with gzip.open(folder / "web.jsonl.gz", "wt") as file:
        for _ in range(25):
            lines = [sentence.format(*generator.choice(words, 3)) for _ in range(25)]
            file.write(json.dumps({"text": "".join(lines)}) + "\n")


def write_plan(folder: Path, tokenizer: Path, **changes: Any) -> Path:
    values = {
        "name": "test",
        "tokenizer": str(tokenizer),
        "valid_share": 0.1,
        "unique_tokens": 20,
        "shard_bytes": 8000,
        "pack_shards": 2,
        "sources": {
            "code": {"kind": "code", "inputs": ["tree", "code.parquet"]},
            "web": {"kind": "text", "inputs": ["web.jsonl.gz"]},
        },
        "phases": [
            {
                "tokens": 12_000,
                "mixture": {"web": 30, "code": 70},
                "sequence_length": LENGTH,
                "fim": {"rate": 0.5},
            },
            {
                "tokens": 8_000,
                "mixture": {"web": 20, "code": 80},
                "sequence_length": LENGTH,
                "fim": {"rate": 1.0, "code_only": True, "level": "token"},
            },
        ],
        **changes,
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "inputs.json"
    }
