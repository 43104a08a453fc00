"""Memory of a pipeline worker does not grow with its input."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from mellum2_megatron.data.pipeline.documents import Row, batches
from mellum2_megatron.data.pipeline.row_file import RowFile
from mellum2_megatron.data.prepared_folder import PreparedData
from tests.data.memory_worker import peaks
from tests.data.plan_inputs import write_plan
from tests.small import python_like

LIMIT = 110
"""MiB that the stages below may take on top of a process that has imported them."""


def test_worker_holds_a_part_of_a_large_file(prepared: PreparedData, tmp_path: Path) -> None:
    """Of 7 MB in long documents, whose ids and shingles together take 170 MiB."""
    text = "\n".join(map(python_like, range(400)))
    with (tmp_path / "big.jsonl").open("w") as file:
        for number in range(24):
            document = f"number = {number}\n" + text[number * 1000 :] + text[: number * 1000]
            file.write(json.dumps({"text": document[:500_000]}) + "\n")
        file.write(json.dumps({"text": text * 20}) + "\n")
    source = {"kind": "code", "inputs": ["big.jsonl"], "near_duplicates": True}
    phase = {"tokens": 100_000, "mixture": {"code": 100}, "sequence_length": 1024}
    plan_file = write_plan(
        tmp_path,
        prepared.tokenizer_dir,
        sources={"code": source},
        phases=[phase],
        shard_bytes=1 << 30,
    )
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(peaks, (plan_file,))
    assert max(found.values()) < LIMIT, found
    (folder,) = (tmp_path / "results" / "documents").iterdir()
    facts = json.loads((folder / "manifest.json").read_text())
    assert facts["left_out"] == {"too_large": {"count": 1, "first": facts_of_last(tmp_path)}}
    assert facts["documents"] == 24


def facts_of_last(folder: Path) -> str:
    return f"{folder}/big.jsonl line 25"


def test_batches_are_bounded_by_their_text() -> None:
    def rows() -> Iterator[tuple[int, Row]]:
        for number, size in enumerate([10] * 600 + [3_000_000, 3_000_000, 9_000_000, 5]):
            text = "x" * size
            yield (
                number,
                Row(text=text, language=None, repository=None, path=None, origin=""),
            )

    found = [[number for number, _ in batch] for batch in batches(rows())]
    assert [len(batch) for batch in found] == [256, 256, 89, 1, 1, 1]
    assert list(chain.from_iterable(found)) == list(range(604))


@pytest.mark.parametrize("rows", [0, 1, 123_456])
def test_growing_file_has_the_bytes_of_one_array(rows: int, tmp_path: Path) -> None:
    array = np.arange(rows * 14, dtype=np.uint64).reshape(rows, 14)
    np.save(tmp_path / "whole.npy", array)
    with RowFile(tmp_path / "grown.npy", np.uint64, 14) as file:
        for start in range(0, rows, 1000):
            file.add(array[start : start + 1000])
    assert (tmp_path / "grown.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
