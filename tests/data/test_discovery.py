"""Choice of documents and splits, and refused inputs."""

from __future__ import annotations

import hashlib
import json
import shutil
from email.message import Message
from pathlib import Path

import pytest

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.data.corpus.discovery import (
    Selection,
    given_sources,
    installed_sources,
    open_licence,
    read_document,
    select,
)
from tests.data.conftest import HOSTILE, NUL
from tests.small import python_like


def take(
    *paths: Path, seed: int = 1, valid_fraction: float = 0.25, max_bytes: int | None = None
) -> Selection:
    return select(
        given_sources(paths), seed=seed, valid_fraction=valid_fraction, max_bytes=max_bytes
    )


def contents(selection: Selection) -> dict[str, str]:
    return {read_document(document): document.split for document in selection.documents}


def test_every_text_of_a_folder_is_taken_exactly(text_folder: Path) -> None:
    expected = (
        {python_like(seed) for seed in (*range(40), *range(100, 104))}
        | set(HOSTILE.values())
        | {NUL}
    )
    selection = take(text_folder)
    assert contents(selection).keys() == expected
    assert selection.left_out == {}
    assert all(
        document.size == len(read_document(document).encode()) for document in selection.documents
    )


def test_the_split_follows_the_content_and_not_the_name(text_folder: Path, tmp_path: Path) -> None:
    original = contents(take(text_folder))
    for index, text in enumerate(reversed(list(original))):
        (tmp_path / f"{index:03}.txt").write_bytes(text.encode())
    (tmp_path / "000.txt").unlink()
    elsewhere = contents(take(tmp_path))
    assert elsewhere.items() <= original.items()
    assert set(original.values()) == {"train", "valid"}
    assert contents(take(text_folder, seed=2)) != original


def test_valid_fraction_is_the_share_of_documents(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": str(number)}) + "\n" for number in range(4000)))
    share = len(take(path, valid_fraction=0.1).of("valid")) / 4000
    assert abs(share - 0.1) < 0.02  # four standard deviations; the draw is fixed by the seed


def test_duplicates_are_dropped_across_files_and_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.txt").write_text("same")
    (tmp_path / "c.jsonl").write_text('{"text": "same"}\n{"text": "other"}\n{"text": "other"}\n')
    selection = take(tmp_path)
    assert list(contents(selection)) == ["same", "other"]
    assert selection.left_out == {"duplicate": 3}


def test_a_byte_limit_takes_the_same_even_sample_wherever_the_files_lie(
    text_folder: Path, tmp_path: Path
) -> None:
    limit = 20_000
    sample = take(text_folder, max_bytes=limit)
    sizes = [document.size for document in sample.documents]
    assert limit - max(sizes) - 6000 < sum(sizes) <= limit
    packages = {Path(document.path).parent.name for document in sample.documents}
    assert {"package_0", "package_1", "package_2"} <= packages
    moved = shutil.copytree(text_folder, tmp_path / "moved")
    assert contents(take(moved, max_bytes=limit)) == contents(sample)
    assert contents(take(text_folder, max_bytes=limit, seed=2)).keys() != contents(sample).keys()
    smaller = contents(take(text_folder, max_bytes=limit // 2))
    assert smaller.keys() < contents(sample).keys()


def test_files_met_while_walking_that_are_not_text_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes("\u00e9".encode("latin-1"))
    (tmp_path / "object.o").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "empty.py").write_text(" \n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main")
    selection = take(tmp_path)
    assert list(contents(selection)) == ["x = 1\n"]
    assert selection.left_out == {"binary": 1, "empty": 1, "not_utf8": 1}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{not json", "Expecting property name"),
        ('["text"]', 'no string under the key "text"'),
        ('{"content": "x"}', 'no string under the key "text"'),
        ('{"text": 3}', 'no string under the key "text"'),
        ('{"text": "\\ud800"}', "surrogates not allowed"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(InputError, match=r"data.jsonl line 3") as error:
        take(path)
    assert why in str(error.value)


def test_named_inputs_must_exist_be_text_and_be_named_once(tmp_path: Path) -> None:
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no such file"):
        take(tmp_path / "absent.txt")
    with pytest.raises(InputError, match="must be text in UTF-8"):
        take(binary)
    with pytest.raises(InputError, match="holds no files"):
        take(tmp_path / "empty")
    with pytest.raises(InputError, match="named once"):
        take(binary, binary)


def test_a_file_that_changes_between_the_passes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first")
    (document,) = take(path).documents
    path.write_text("other")
    with pytest.raises(WorkError, match="changed while"):
        read_document(document)
    path.unlink()
    with pytest.raises(WorkError, match="can no longer be read"):
        read_document(document)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"License-Expression": "MIT OR Apache-2.0"}, "MIT OR Apache-2.0"),
        ({"License-Expression": "LicenseRef-NVIDIA-Proprietary"}, None),
        (
            {"Classifier": "License :: OSI Approved :: BSD License", "License": "see file"},
            "BSD License",
        ),
        ({"License": "3-Clause BSD License"}, "3-Clause BSD License"),
        ({"License": "NVIDIA Proprietary Software"}, None),
        ({"License": "All rights reserved, submit a request"}, None),
        ({}, None),
    ],
)
def test_open_licence(fields: dict[str, str], expected: str | None) -> None:
    metadata = Message()
    for name, value in fields.items():
        metadata[name] = value
    assert open_licence(metadata) == expected  # type: ignore[arg-type]


def test_installed_sources_hold_the_standard_library_and_licensed_packages() -> None:
    sources, refused = installed_sources()
    by_name = {source.name: source for source in sources}
    stdlib = by_name["python-standard-library"]
    assert {"dataclasses.py", "argparse.py"} <= {path.name for path in stdlib.files}
    assert not any("site-packages" in path.parts for path in stdlib.files)
    assert by_name["pytest"].version == pytest.__version__
    assert by_name["pytest"].licence == "MIT"
    assert all(source.licence and source.files for source in sources)
    assert "mellum2-megatron" not in by_name
    assert not set(refused) & set(by_name)
    sample = select(sources, seed=3, valid_fraction=0.1, max_bytes=300_000)
    assert sum(document.size for document in sample.documents) > 200_000
    hashes = [
        hashlib.sha256(read_document(document).encode()).hexdigest()
        for document in sample.documents
    ]
    assert len(set(hashes)) == len(hashes)
