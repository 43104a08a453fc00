"""CRC-32 of torch's files: left out inside a block, and in a process that was spawned."""

from __future__ import annotations

import io
import multiprocessing
import zipfile
from pathlib import Path

import pytest
import torch

from mellum2_megatron.common.torch_checksums import call_without_crc32, without_crc32


def checksums(file: io.BytesIO | Path) -> set[int]:
    """Return the CRC-32 of the record that holds the values, 0 where none was computed."""
    return {
        info.CRC for info in zipfile.ZipFile(file).infolist() if info.filename.endswith("data/0")
    }


def saved_checksums() -> set[int]:
    stream = io.BytesIO()
    torch.save(torch.arange(100), stream)
    return checksums(stream)


def test_checksums_are_left_out_only_inside() -> None:
    def fail() -> None:
        with without_crc32():
            inside.update(saved_checksums())
            raise ValueError("inside")

    before, inside = saved_checksums(), set()
    with pytest.raises(ValueError, match="inside"):
        fail()
    assert inside == {0} != before == saved_checksums()


def test_a_spawned_process_leaves_them_out(tmp_path: Path) -> None:
    """torch's own switch would not reach it: the process begins with torch's default."""
    with without_crc32(), multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(torch.save, (torch.arange(100), tmp_path / "switch"))
        pool.apply(call_without_crc32, (torch.save, torch.arange(100), tmp_path / "call"))
    assert checksums(tmp_path / "switch") != {0} == checksums(tmp_path / "call")
    assert torch.equal(torch.load(tmp_path / "call"), torch.arange(100))
