"""Files of validation sums: what is written is read, and nothing else is."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.metrics.validation_sums import (
    ValidationSums,
    drop_sums_after,
    position_starts,
    read_sums,
    sums_files,
)

SUMS = ValidationSums(
    corpora=("code", "web"),
    document=np.array([7, 2**64 - 1, 7], dtype=np.uint64),
    corpus=np.array([0, 0, 1]),
    tokens=np.array([10, 20, 10]),
    bytes=np.array([40, 60, 20]),
    nats=np.array([20.0, 50.0, 10.0]),
    position_start=np.array([0, 1]),
    position_tokens=np.array([[1, 29], [1, 9]]),
    position_nats=np.array([[5.0, 65.0], [4.0, 6.0]]),
)


def test_round_trip(tmp_path: Path) -> None:
    path = SUMS.write(tmp_path, 300)
    assert path == tmp_path / "validation" / "step_0000300.npz"
    got = read_sums(path)
    assert got.corpora == SUMS.corpora
    for field in dataclasses.fields(SUMS):
        np.testing.assert_array_equal(getattr(got, field.name), getattr(SUMS, field.name))
    assert got.loss == 80 / 40
    assert got.bits_per_byte == pytest.approx(80 / math.log(2) / 120)


def test_loss_by_position() -> None:
    starts = position_starts(256)
    assert {0, 64, 128, 192} <= set(starts.tolist())
    assert (np.diff(starts) > 0).all()
    assert SUMS.loss_between(0, 1) == 9 / 2
    assert SUMS.loss_between(1, 40) == 71 / 38
    assert SUMS.loss_between(0, 40) == SUMS.loss
    assert SUMS.loss_between(2, 40) is None
    empty = dataclasses.replace(SUMS, position_tokens=np.zeros((2, 2), dtype=np.int64))
    assert empty.loss_between(0, 1) is None


def test_later_files_are_dropped(tmp_path: Path) -> None:
    assert sums_files(tmp_path) == {}
    drop_sums_after(tmp_path, 0)
    for step in (20, 100, 3):
        SUMS.write(tmp_path, step)
    (tmp_path / "validation" / "step_x.npz").write_bytes(b"")
    drop_sums_after(tmp_path, 20)
    assert list(sums_files(tmp_path)) == [3, 20]
    drop_sums_after(tmp_path, 0)
    assert sums_files(tmp_path) == {}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"nats": np.array([1.0, 2.0])}, "different lengths"),
        ({"tokens": np.array([1.0, 2.0, 3.0])}, "tokens has type float64"),
        ({"corpus": np.array([0, 1, 2])}, "names a corpus"),
        ({"corpora": ("code",)}, "1 corpora"),
        ({"position_tokens": np.zeros((2, 3), dtype=np.int64)}, "different shapes"),
    ],
    ids=["length", "type", "corpus", "corpora", "positions"],
)
def test_file_that_contradicts_itself(
    changes: dict[str, object], word: str, tmp_path: Path
) -> None:
    path = dataclasses.replace(SUMS, **changes).write(tmp_path, 1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=word):
        read_sums(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip"], ids=["empty", "cut", "text"])
def test_damaged_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "step_0000001.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a readable file of validation sums"):
        read_sums(path)
    path.unlink()
    with pytest.raises(InputError, match="not a readable file"):
        read_sums(path)


def test_objects_are_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "step_0000001.npz"
    np.savez(path, format=np.array({"a": 1}, dtype=object))
    with pytest.raises(InputError, match="not a readable file"):
        read_sums(path)
