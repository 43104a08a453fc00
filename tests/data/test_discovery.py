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
    given_sources,
    installed_sources,
    open_licence,
)
from mellum2_megatron.data.corpus.left_out import LeftOut
from mellum2_megatron.data.corpus.selection import Selection, read_selected, select
from tests.data.conftest import HOSTILE, NUL
from tests.small import python_like


def take(
    *paths: Path, seed: int = 1, valid_fraction: float = 0.25, max_bytes: int | None = None
) -> Selection:
    left_out = LeftOut()
    return select(
        given_sources(paths, left_out),
        seed=seed,
        valid_fraction=valid_fraction,
        max_bytes=max_bytes,
        left_out=left_out,
    )


def texts(selection: Selection) -> list[str]:
    return [text for _, text in read_selected(selection, selection.documents)]


def contents(selection: Selection) -> dict[str, str]:
    return {
        text: document.split for document, text in read_selected(selection, selection.documents)
    }


def test_every_text_of_a_folder_is_taken_exactly(text_folder: Path) -> None:
    expected = (
        {python_like(seed) for seed in (*range(40), *range(100, 104))}
        | set(HOSTILE.values())
        | {NUL}
    )
    selection = take(text_folder)
    assert contents(selection).keys() == expected
    assert selection.left_out.lines() == []
    assert all(
        document.size == len(text.encode())
        for document, text in read_selected(selection, selection.documents)
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
    assert selection.left_out.counts == {"duplicate": 3}
    assert selection.left_out.first == {"duplicate": str(tmp_path / "b.txt")}


def test_a_byte_limit_takes_the_same_even_sample_wherever_the_files_lie(
    text_folder: Path, tmp_path: Path
) -> None:
    limit = 20_000
    sample = take(text_folder, max_bytes=limit)
    sizes = [document.size for document in sample.documents]
    assert limit - max(sizes) - 6000 < sum(sizes) <= limit
    packages = {
        sample.sources[0].files[document.file].path.parent.name for document in sample.documents
    }
    assert {"package_0", "package_1", "package_2"} <= packages
    moved = shutil.copytree(text_folder, tmp_path / "moved")
    assert contents(take(moved, max_bytes=limit)) == contents(sample)
    assert contents(take(text_folder, max_bytes=limit, seed=2)).keys() != contents(sample).keys()
    # A smaller sample begins like the larger one; its last documents fill what is left.
    smaller = contents(take(text_folder, max_bytes=limit // 2))
    assert len(smaller.keys() & contents(sample).keys()) > len(smaller) / 2


def test_a_document_that_does_not_fit_is_passed_over_and_not_the_rest_after_it(
    tmp_path: Path,
) -> None:
    for number in range(50):
        (tmp_path / f"{number}.txt").write_text(f"{number:04}" * 25)
    (tmp_path / "huge.txt").write_text("x" * 20_000)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "y" * 20_000}) + "\n")
    for seed in range(5):  # the large documents come at another place in each order
        selection = take(tmp_path, seed=seed, max_bytes=6_000)
        assert len(selection.documents) == 50
        assert selection.left_out.counts == {"too_large": 2}
        full = take(tmp_path, seed=seed, max_bytes=2_000)
        assert len(full.documents) == 20
        assert full.left_out.counts == {"too_large": 2, "not_sampled": 30}
    everything = take(tmp_path)
    assert len(everything.documents) == 52
    assert everything.left_out.lines() == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{not json", "Expecting property name"),
        ('["text"]', "no JSON object"),
        ('{"id": 1, "name": "x"}', "its keys are 'id', 'name'"),
        ('{"text": 3}', "'text' is not a string but number"),
        ('{"text": null}', "'text' is not a string but null"),
        ('{"text": "\\ud800"}', "lone surrogate \\ud800 at 0"),
        ('{"text": "a", "meta": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"text": "caf\udce9"}', "not UTF-8 (byte 0xe9 at 13)"),
        ('{"text": "cut', "Unterminated string"),
        ("\0" * 512, "no JSON object"),
    ],
    ids="broken list keys number null surrogate deep latin cut nul".split(),
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(f'{{"text": "fine"}}\n\n{line}\n'.encode("utf-8", "surrogateescape"))
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
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="named once"):
        take(tmp_path, tmp_path / "link")


def test_a_file_that_changes_between_the_passes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first")
    selection = take(path)
    path.write_text("other")
    with pytest.raises(WorkError, match=r"a\.txt changed while"):
        texts(selection)
    path.unlink()
    with pytest.raises(WorkError, match=r"a\.txt can no longer be read"):
        texts(selection)


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
    sources, refused = installed_sources(LeftOut())
    by_name = {source.name: source for source in sources}
    stdlib = by_name["python-standard-library"]
    assert {"dataclasses.py", "argparse.py"} <= {file.path.name for file in stdlib.files}
    assert not any("site-packages" in file.path.parts for file in stdlib.files)
    assert by_name["pytest"].version == pytest.__version__
    assert by_name["pytest"].licence == "MIT"
    assert all(source.licence and source.files for source in sources)
    assert "mellum2-megatron" not in by_name
    assert not set(refused) & set(by_name)
    sample = select(sources, seed=3, valid_fraction=0.1, max_bytes=300_000)
    assert sum(document.size for document in sample.documents) > 200_000
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts(sample)]
    assert len(set(hashes)) == len(hashes)
