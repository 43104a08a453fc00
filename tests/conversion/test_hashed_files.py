"""Files of an imported checkpoint: hashed as they are written, without zip checksums."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from conversion.torch_dist.hashed_files import HashingStream, hashed_file
from conversion.torch_dist.reader import TorchDistReader
from conversion.torch_dist.writer import TorchDistWriter
from mellum2_megatron.checkpoint import find_checkpoint
from mellum2_megatron.checkpoint.file_manifest import MANIFEST_FILE, hash_files, read_manifest
from tests.conversion.folders import whole_chunk, write_torch_dist


def test_hash_of_pieces_equals_the_hash_of_the_file(tmp_path: Path) -> None:
    with hashed_file(tmp_path / "a") as stream:
        stream.write(b"head")
        stream.write(memoryview(torch.arange(1000).numpy()))
        assert stream.tell() == 4 + 8000
        torch.save(torch.ones(3), stream)
    content = (tmp_path / "a").read_bytes()
    assert stream.record.size == len(content)
    assert stream.record.sha256 == hashlib.sha256(content).hexdigest()
    assert torch.equal(torch.load(io.BytesIO(content[8004:]), weights_only=True), torch.ones(3))


def test_a_write_that_the_system_cuts_short_is_completed(tmp_path: Path) -> None:
    class Short(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(memoryview(data)[:7])

    with Short(tmp_path / "a", "w") as raw:
        stream = HashingStream(raw)
        assert stream.write(bytes(range(100))) == 100
    assert (tmp_path / "a").read_bytes() == bytes(range(100))
    assert stream.record.sha256 == hashlib.sha256(bytes(range(100))).hexdigest()


def test_a_group_that_was_not_finished_is_not_written(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    writer = TorchDistWriter(tmp_path, [[whole_chunk("w", tensor)]], common={})

    def fail() -> None:
        with writer.open_group(0) as group:
            group.write("w", (0,), tensor)
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["__0_0.distcp"]  # no .metadata


def test_forgotten_chunk_is_not_in_the_metadata(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    chunks = [whole_chunk("v", tensor), whole_chunk("w", tensor)]
    writer = TorchDistWriter(tmp_path, [chunks], common={})
    with writer.open_group(0) as group:
        group.write("v", (0,), tensor)
    with pytest.raises(ValueError, match=r"1 chunks were not written, one is \('w', \(0,\)\)"):
        writer.finish([group.written])
    assert not (tmp_path / ".metadata").exists()


def test_a_chunk_of_another_dtype_is_refused(tmp_path: Path) -> None:
    writer = TorchDistWriter(tmp_path, [[whole_chunk("w", torch.ones(3))]], common={})
    with writer.open_group(0) as group, pytest.raises(TypeError, match=r"w: a torch\.bfloat16"):
        group.write("w", (0,), torch.ones(3).bfloat16())


def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    large = torch.arange(100_000)
    write_torch_dist(tmp_path, [[(whole_chunk("w", large[:3]), large[:3])]])
    assert (tmp_path / "__0_0.distcp").stat().st_size < 10_000
    assert torch.equal(TorchDistReader(tmp_path).read("w", (0,), (3,)), large[:3])


def test_the_manifest_of_an_import_is_that_of_its_files(checkpoint: Path) -> None:
    folder = find_checkpoint(checkpoint).iteration_dir
    assert read_manifest(folder) == hash_files(
        path for path in folder.iterdir() if path.name != MANIFEST_FILE
    )
