"""Every format, written by its own library, and bytes that no reader may stumble over."""

from __future__ import annotations

import gzip
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.corpus import rows
from mellum2_megatron.data.corpus.left_out import LeftOut
from mellum2_megatron.data.corpus.listing import list_files, named_file
from mellum2_megatron.data.corpus.sources import Document, ReadOptions, read_documents
from tests import REPOSITORY
from tests.data.conftest import HOSTILE, NUL

TEXTS = [*HOSTILE.values(), NUL, "plain\n"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def read(
    path: Path, options: ReadOptions | None = None, left_out: LeftOut | None = None
) -> list[Document]:
    file = named_file(path, f"--input {path}")
    return list(read_documents(file, options or ReadOptions(), left_out or LeftOut()))


def parquet(path: Path, columns: dict[str, object], **options: object) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.ndjson": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES),
    "crlf.JSONL": lambda path: path.write_bytes(LINES.replace(b"\n", b"\r\n")),
    "rows.json": lambda path: path.write_bytes(LINES),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "two.json.gz": lambda path: path.write_bytes(
        gzip.compress(LINES[:100]) + gzip.compress(LINES[100:])
    ),
    "a.jsonl.zst": lambda path: path.write_bytes(zstandard.ZstdCompressor().compress(LINES)),
    "two.jsonl.zst": lambda path: path.write_bytes(
        zstandard.compress(LINES[:100]) + zstandard.compress(LINES[100:])
    ),
    "a.parquet": lambda path: parquet(path, {"text": TEXTS}, row_group_size=3),
    "large.parquet": lambda path: parquet(
        path, {"text": pa.array(TEXTS, pa.large_string())}, compression="zstd"
    ),
    "bytes.parquet": lambda path: parquet(path, {"text": [text.encode() for text in TEXTS]}),
    "words.parquet": lambda path: parquet(path, {"text": pa.array(TEXTS).dictionary_encode()}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    documents = read(path)
    assert [document.text for document in documents] == TEXTS
    assert [document.row for document in documents] == list(range(1, len(TEXTS) + 1))
    assert {document.file for document in documents} == {str(path)}
    # The same file in a folder, and a second pass.
    (file,) = list_files(tmp_path, LeftOut())
    assert list(read_documents(file, ReadOptions(), LeftOut())) == documents


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # The Stack
        (
            {
                "content": "x",
                "lang": "C++",
                "ext": "h",
                "max_stars_repo_name": "a/b",
                "max_stars_repo_path": "src/x.h",
            },
            ("cpp", "a/b", "src/x.h"),
        ),
        # StarCoder's data, github-code
        ({"code": "x", "repo_name": "a/b", "path": "m.py"}, ("python", "a/b", "m.py")),
        # FineWeb
        ({"text": "x", "language": "en", "url": "u"}, ("en", None, None)),
        # Dolma
        ({"text": "x", "metadata": {"path": "a.rs", "repo": "r"}}, ("rust", "r", "a.rs")),
        ({"raw_content": "x", "ext": "go", "path": None}, ("go", None, None)),
        ({"text": "x", "path": "caf\udce9.js"}, ("javascript", None, "caf\\udce9.js")),
    ],
    ids="stack starcoder fineweb dolma extension surrogate_path".split(),
)
def test_language_repository_and_path_are_kept(
    tmp_path: Path, row: dict[str, object], expected: tuple[str | None, ...]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    found = read(path)
    if "surrogate" not in os.environ["PYTEST_CURRENT_TEST"]:  # parquet holds no such text
        found += read(parquet(tmp_path / "rows.parquet", {key: [row[key]] for key in row}))
    for document in found:
        assert document.text == "x"
        assert (document.language, document.repository, document.path) == expected


def test_a_text_file_has_its_path_and_language(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "Main.java").write_text("class Main {}\n")
    (file,) = list_files(tmp_path, LeftOut())
    (document,) = read_documents(file, ReadOptions(), LeftOut())
    assert (document.language, document.path, document.row) == ("java", "src/Main.java", 0)


def test_the_key_is_the_users_or_the_first_usual_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "c", "prose": "p"}\n{"prose": "q"}\n')
    assert read(path, ReadOptions(text_key="prose"))[1].text == "q"
    with pytest.raises(InputError, match=r"line 2: .*no key 'content'; its keys are 'prose'"):
        read(path)
    with pytest.raises(InputError, match=r"line 1: .*no key 'body2'; its keys are 'content', 'pr"):
        read(path, ReadOptions(text_key="body2"))
    table = parquet(tmp_path / "a.parquet", {"prose": ["p"], "n": [1]})
    with pytest.raises(InputError, match=r"row 1: .*its keys are 'prose', 'n'"):
        read(table)
    with pytest.raises(InputError, match=r"row 1: .*'n' is not a string but int"):
        read(table, ReadOptions(text_key="n"))


def test_bad_rows_are_skipped_on_request_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "\\ud83d"}',
        b'{"text": "' + b"\xe9" + b'"}',
        b'{"meta": ' + b"[" * 100_000,
        b'{"text": "kept", "n": ' + b"9" * 5000 + b"}",
        b'{"text": " "}',
        b'{"text": "last"}',
    ]
    path.write_bytes(b"\n".join(lines))
    left_out = LeftOut()
    documents = read(path, ReadOptions(skip_bad_rows=True), left_out)
    assert [document.text for document in documents] == ["kept", "last"]
    assert left_out.counts == {"bad_row": 3, "empty": 1}
    assert left_out.first["bad_row"].startswith(f"{path} line 1, ")
    values = pa.array([b"good", b"\xe9", b"fine"], pa.binary())
    table = parquet(
        tmp_path / "a.parquet", {"text": pa.StringArray.from_buffers(3, *values.buffers()[1:])}
    )
    with pytest.raises(InputError, match=r"a\.parquet row 2: .*not UTF-8"):
        read(table)
    again = LeftOut()
    documents = read(table, ReadOptions(skip_bad_rows=True), again)
    assert [(document.row, document.text) for document in documents] == [(1, "good"), (3, "fine")]
    assert again.counts == {"bad_row": 1}


def test_long_documents_are_left_out_only_where_a_limit_is_asked(tmp_path: Path) -> None:
    long = "\u20ac" * 1000  # 3,000 bytes, 6,000 as JSON spells them
    lines = [json.dumps({"text": text}) for text in ("a", long, "b")]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"x": "' + "y" * (2 << 20) + '"}']))
    (tmp_path / "b.txt").write_text(long)
    limited, left_out = ReadOptions(max_document_bytes=2999), LeftOut()
    found = read(tmp_path / "a.jsonl", limited, left_out)
    assert [document.text for document in found] == ["a", "b"]
    assert read(tmp_path / "b.txt", limited, left_out) == []
    assert left_out.counts == {"too_large": 3}
    exact = ReadOptions(max_document_bytes=3000)
    assert [document.text for document in read(tmp_path / "a.jsonl", exact)] == ["a", long, "b"]
    assert len(read(tmp_path / "b.txt")) == 1


def test_what_a_folder_leaves_out_is_counted_with_its_first_example(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "object.o").write_bytes(b"\x7fELF\0\xff\0")
    (tmp_path / "zeros").write_bytes(b"a" * 70_000 + b"\0")
    (tmp_path / "empty.py").write_text(" \n")
    (tmp_path / "notes.txt.bz2").write_bytes(b"BZh")
    (tmp_path / "notes.txt.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "table.arrow").write_bytes(b"ARROW1")
    (tmp_path / "large.txt").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "broken").symlink_to(tmp_path / "absent")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")
    left_out = LeftOut()
    files = list_files(tmp_path, left_out)
    texts = [
        document.text
        for file in files
        for document in read_documents(file, ReadOptions(), left_out)
    ]
    assert texts == ["x = 1\n"]
    assert left_out.counts == {
        "not_utf8": 1,
        "binary": 2,
        "empty": 1,
        "compressed": 2,
        "table": 1,
        "lfs_pointer": 1,
        "hidden": 1,
        "linked_folder": 1,
        "unreadable": 2,
        "not_regular": 1,
    }
    lines = left_out.lines()
    assert f"left out: 1 not UTF-8 (first: {tmp_path}/latin.py)" in lines
    assert f"left out: 1 linked folders (first: {tmp_path}/loop)" in lines


def test_pipes_sockets_and_devices_are_refused_before_they_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    reader, writer = os.pipe()  # what the shell hands over for <(zcat x.jsonl.gz)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path in (
            tmp_path / "pipe.jsonl",
            tmp_path / "socket",
            Path("/dev/null"),
            Path(f"/dev/fd/{reader}"),
        ):
            with pytest.raises(InputError, match="not a regular file") as error:
                read(path)
            assert ".jsonl file first" in error.value.fix
    os.close(reader)
    os.close(writer)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(InputError, match="Too many levels of symbolic links"):
        read(tmp_path / "circle")
    with pytest.raises(InputError, match="null byte"):
        read(Path("a\0b"))


def write_compressed_with(tail: int) -> bytes:
    noise = random.Random(0).randbytes(300_000).hex()  # several blocks
    data = gzip.compress(LINES + json.dumps({"text": noise}).encode())
    return data[: len(data) - tail]


def zstd_cut(tail: int) -> bytes:
    noise = random.Random(0).randbytes(300_000).hex()
    data = zstandard.compress(LINES + json.dumps({"text": noise}).encode())
    return data[: len(data) - tail]


def parquet_bytes() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": TEXTS}), sink)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", gzip.compress(LINES), "by its first bytes gzip data"),
        ("a.jsonl", "{}".encode("utf-16"), "UTF-16"),
        ("a.jsonl.gz", LINES, "by its first bytes something else"),
        ("a.jsonl.gz", b"", "by its first bytes empty"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.jsonl.gz", write_compressed_with(9), "damaged or cut off"),
        ("a.jsonl.gz", write_compressed_with(200_000), "damaged or cut off"),
        ("a.jsonl.zst", zstd_cut(3), "damaged or cut off"),
        ("a.jsonl.zst", zstd_cut(200_000), "damaged or cut off"),
        ("a.jsonl.zst", zstd_cut(0)[:200_000] + b"\xff" * 1000, "damaged or cut off"),
        ("a.parquet", parquet_bytes()[:-5], "damaged or cut off"),
        ("a.parquet", b"PAR1", "damaged or cut off"),
        ("a.csv.xz", b"\xfd7zXZ", "is not read"),
        ("a.arrow", b"ARROW1", "is not read"),
        ("a.json", b'{\n "text": "x"\n}', "one JSON object in each line"),
        ("a.json", b'[{"text": "x"}]', "one JSON object in each line"),
    ],
    ids=lambda value: str(len(value)) if isinstance(value, bytes) else None,
)
def test_a_named_file_that_is_not_what_its_name_says_is_refused(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        read(path)
    assert str(path) in error.value.value


def test_names_that_are_not_utf8_are_read_and_can_be_printed(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    for name, data in ((b"\xff.py", b"x = 1\n"), (b"\xfe.py", b"\xff"), (b"\xfd.bz2", b"")):
        with open(folder + b"/" + name, "wb") as file:
            file.write(data)
    left_out = LeftOut()
    files = list_files(Path(os.fsdecode(folder)), left_out)
    (document,) = [
        document for file in files for document in read_documents(file, ReadOptions(), left_out)
    ]
    assert (document.path, document.language) == ("\\xff.py", "python")
    assert document.file.endswith("caf\\xe9/\\xff.py")
    for line in (*left_out.lines(), document.file):
        line.encode("utf-8")


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in (("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")):
        path = tmp_path / name
        WRITERS[name](path)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match="is not installed") as error:
            read(path)
        assert "mellum2-megatron[data]" in error.value.fix


def test_rows_are_read_in_constant_memory(tmp_path: Path) -> None:
    """A parquet file with one row group of 300 MB, and 300 MB of lines, in a process of its own."""
    piece = "some words of a document, repeated many times over\n" * 400  # 20 kB
    writer = None
    for number in range(15):
        table = pa.table({"text": [f"{number} {row}" + piece for row in range(1000)]})
        if writer is None:
            writer = pq.ParquetWriter(tmp_path / "a.parquet", table.schema, compression="zstd")
            batches = []
        batches.append(table)
    assert writer is not None
    with writer:
        writer.write_table(pa.concat_tables(batches), row_group_size=15_000)
    line = json.dumps({"text": piece}).encode() + b"\n"
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as stream:
        for _ in range(15_000):
            stream.write(line)
    program = f"""
import re
from pathlib import Path
from mellum2_megatron.data.corpus.left_out import LeftOut
from mellum2_megatron.data.corpus.listing import list_files
from mellum2_megatron.data.corpus.sources import ReadOptions, read_documents
count = 0
for file in list_files(Path({str(tmp_path)!r}), LeftOut()):
    for document in read_documents(file, ReadOptions(), LeftOut()):
        count += 1
# Not getrusage: its maximum counts the parent's memory before the exec.
print(count, re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    count, kilobytes = map(int, done.stdout.split())
    assert count == 30_000
    assert kilobytes < 250_000, kilobytes


def test_rows_of_any_keys_can_be_read_by_others(tmp_path: Path) -> None:
    """Chat data have no text: `read_rows` hands over the rows as they are."""
    path = tmp_path / "chat.jsonl"
    row = {"messages": [{"role": "user", "content": "hi"}]}
    path.write_text(json.dumps(row) + "\n[]\n")
    found = list(rows.read_rows(named_file(path, "chat")))
    assert found[0] == (1, row)
    assert found[1] == (2, rows.BadRow("no JSON object"))
