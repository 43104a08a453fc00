"""Files of an imported checkpoint: hashed while they are written, without zip checksums, readable
by torch."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import pytest
import torch

from conversion.torch_dist.hashed_files import HashingFileSystem, without_crc32
from mellum2_megatron.checkpoint import find_checkpoint
from mellum2_megatron.checkpoint.file_manifest import MANIFEST_FILE, hash_files, read_manifest


def test_what_is_written_in_pieces_is_hashed_as_the_file_on_the_disk(tmp_path: Path) -> None:
    files = HashingFileSystem()
    with files.create_stream(tmp_path / "a", "wb") as stream:
        stream.write(b"head")
        stream.write(memoryview(torch.arange(1000).numpy()))
        assert stream.tell() == 4 + 8000
        torch.save(torch.ones(3), stream)
    content = (tmp_path / "a").read_bytes()
    assert files.records["a"].size == len(content)
    assert files.records["a"].sha256 == hashlib.sha256(content).hexdigest()
    assert torch.equal(torch.load(io.BytesIO(content[8004:]), weights_only=True), torch.ones(3))
    with files.create_stream(tmp_path / "a", "rb") as stream:
        assert stream.read() == content


def test_a_file_that_was_not_finished_has_no_record(tmp_path: Path) -> None:
    files = HashingFileSystem()

    def fail() -> None:
        with files.create_stream(tmp_path / "a", "wb") as stream:
            stream.write(b"head")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert not files.records


def test_checksums_are_left_out_only_inside(tmp_path: Path) -> None:
    def checksums() -> set[int]:
        stream = io.BytesIO()
        torch.save(torch.arange(100), stream)
        return {
            info.CRC
            for info in zipfile.ZipFile(stream).infolist()
            if info.filename.endswith("data/0")
        }

    def fail() -> None:
        with without_crc32():
            inside.update(checksums())
            raise ValueError("inside")

    before, inside = checksums(), set()
    with pytest.raises(ValueError, match="inside"):
        fail()
    assert inside == {0} != before == checksums()


def test_the_manifest_of_an_import_is_that_of_its_files(checkpoint: Path) -> None:
    folder = find_checkpoint(checkpoint).iteration_dir
    assert read_manifest(folder) == hash_files(
        path for path in folder.iterdir() if path.name != MANIFEST_FILE
    )
