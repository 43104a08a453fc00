"""`mellum2 data run` on bad input and on full disks: one message, and nothing half-written."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mellum2_megatron.data.pipeline.graph import STAGES
from mellum2_megatron.data.tokens.tokenizer import train_tokenizer
from tests.cli.runner import TINY, Result, mellum2, snapshot
from tests.small import python_like

GOOD = json.dumps({"text": python_like(1)})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([python_like(seed) for seed in range(20)], folder, vocab_size=340)
    return folder


def run(folder: Path, tokenizer: Path, *words: str | Path, **changes: Any) -> Result:
    """Run a plan, see `write_plan`."""
    file = write_plan(folder, tokenizer, **changes)
    return mellum2("data", "run", file, "--workers", "1", *words)


def write_plan(folder: Path, tokenizer: Path, **changes: Any) -> Path:
    """Write a plan with one source of code in the folder `in`, joined by repository."""
    plan = {
        "name": "faults",
        "tokenizer": str(tokenizer),
        "valid_share": 0,
        "unique_tokens": 5,
        "shard_bytes": 6000,
        "sources": {
            "code": {"kind": "code", "inputs": ["in"], "filters": {"Parses": None},
                     "near_duplicates": False, "repository_folders": 1},
        },
        "phases": [
            {"tokens": 1500, "mixture": {"code": 100}, "sequence_length": 512, "unique_tokens": 5,
             "repository": {"code": {}}},
        ],
        "output": str(folder / "results"),
        **changes,
    }  # fmt: skip
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    return folder / "plan.yaml"


def parquet(path: Path, **columns: list[Any]) -> None:
    pq.write_table(pa.table(columns), path)


def write(content: bytes | str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def cut_parquet(path: Path) -> None:
    parquet(path, text=[python_like(2)] * 50)
    path.write_bytes(path.read_bytes()[:-20])


BAD_FILES: list[tuple[str, Callable[[Path], None], str]] = [
    ("latin.py", write("# caf\xe9\n".encode("latin-1")), "UTF-8"),
    ("cut.jsonl", write(f'{GOOD}\n{GOOD[:-9]}'), "cut.jsonl"),
    ("list.jsonl", write(f"{GOOD}\n[1, 2]\n"), "list.jsonl"),
    ("none.jsonl", write(f'{GOOD}\n{{"title": "x"}}\n'), "no key"),
    ("number.jsonl", write(f'{GOOD}\n{{"text": 12}}\n'), "not a string but"),
    ("null.jsonl", write(f'{GOOD}\n{{"text": null}}\n'), "null"),
    ("half.jsonl", write('{"text": "a \\ud800 b"}\n'), "lone surrogate"),
    ("bytes.jsonl", write(GOOD.encode() + b'\n{"text": "\xff"}\n'), "bytes.jsonl"),
    ("gone.jsonl.gz", write(gzip.compress(GOOD.encode() * 50)[:-30]), "gone.jsonl.gz"),
    ("other.parquet", lambda path: parquet(path, title=["x"]), "its keys are 'title'"),
    ("numbers.parquet", lambda path: parquet(path, text=[1, 2]), "text"),
    ("cut.parquet", cut_parquet, "cut.parquet"),
    ("empty.parquet", write(b""), "empty.parquet"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "words"), BAD_FILES, ids=[one[0] for one in BAD_FILES])
def test_a_bad_file_is_one_message(
    name: str, make: Callable[[Path], None], words: str, tokenizer: Path, tmp_path: Path
) -> None:
    make(tmp_path / name)
    source = {"kind": "code", "inputs": [name], "filters": {"Parses": None}}
    run(tmp_path, tokenizer, "--stage", "documents", sources={"code": source}).refused(name, words)
    assert not list((tmp_path / "results").glob("documents/*"))
    assert not list((tmp_path / "results").rglob("*.partial"))


def test_a_file_without_texts_is_refused_before_the_first_task(
    tokenizer: Path, tmp_path: Path
) -> None:
    """Also as the last of several shards; `skip_bad_rows` counts its rows."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text(GOOD + "\n")
    parquet(tmp_path / "in/z.parquet", title=["x", "y"], n=[1, 2])
    source: dict[str, Any] = {"kind": "code", "inputs": ["in"], "filters": {"Parses": None}}
    words = ("--stage", "documents")
    changes: dict[str, Any] = {"shard_bytes": 1, "sources": {"code": source}}
    run(tmp_path, tokenizer, *words, **changes).refused(
        "z.parquet row 1", "its keys are 'title', 'n'", "`text_key: KEY`"
    )
    assert not (tmp_path / "results/documents").exists()
    source["skip_bad_rows"] = True
    assert run(tmp_path, tokenizer, *words, **changes).code == 0
    manifests = sorted((tmp_path / "results/documents").glob("*/manifest.json"))
    counts = [json.loads(one.read_text())["documents_read"] for one in manifests]
    assert sorted(counts) == [0, 1]
    mellum2("data", "report", tmp_path / "plan.yaml").refused(
        "stage exact of the plan has not ended", "mellum2 data run"
    )


def test_a_phase_with_too_few_packs_names_the_margin_that_suffices(
    tokenizer: Path, tmp_path: Path
) -> None:
    """One of six documents repeats itself: its packs are dropped."""
    (tmp_path / "in").mkdir()
    texts = [python_like(n) for n in range(100)] + ["a = 1 + b - c\n" * (300 + n) for n in range(9)]
    rows = [json.dumps({"text": text, "id": n}) for n, text in enumerate(texts)]
    (tmp_path / "in/a.jsonl").write_text("\n".join(rows) + "\n")
    source: dict[str, Any] = {"kind": "code", "inputs": ["in"], "near_duplicates": False}
    source["filters"] = dict.fromkeys(("Parses", "LetterShare"))
    phase = {"mixture": {"code": 100}, "sequence_length": 512, "unique_tokens": 20}
    changes = {"sources": {"code": source}, "phases": [{**phase, "tokens": 30_000}]}
    result = run(tmp_path, tokenizer, **changes)
    assert result.code == 1, result
    margin = re.search(r"needs 59 sequences .* set `margin: (0\.\d+)` in the plan", result.err)
    assert margin, result
    assert run(tmp_path, tokenizer, margin=float(margin[1]), **changes).code == 0


@pytest.mark.parametrize(
    "text",
    ["\ufeffx = 1\n", "if x:\r\n\tpass\r\n", "before\0after\n", "y = 2",
     "<|endoftext|><fim_middle>\n", "\u0085\u00a0\u3000\n"],
    ids=["bom", "crlf", "nul", "one-line", "sentinels", "blanks"],
)  # fmt: skip
def test_odd_texts_are_kept(text: str, tokenizer: Path, tmp_path: Path) -> None:
    """Rows with such texts, twice with one id, reach stage `tokens` as they are."""
    rows = [{"id": 1, "text": text + python_like(3)}, {"id": 1, "text": python_like(4)}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    source = {"kind": "code", "inputs": ["in.jsonl"], "filters": {"Parses": None}}
    for stage in STAGES[:3]:
        result = run(tmp_path, tokenizer, "--stage", stage, sources={"code": source})
        assert result.code == 0, result
    (manifest,) = (tmp_path / "results").glob("tokens/*/manifest.json")
    assert json.loads(manifest.read_text())["documents"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sources": None}, "sources: null"),
        ({"phases": None}, "phases: null"),
        ({"name": ""}, "name=''"),
        ({"phases": [{"tokens": 0, "mixture": {"code": 100}}]}, "phases.1.tokens=0"),
        ({"eod": "<none>"}, "eod: <none>: it must be an added token"),
        ({"tokenizer": "none"}, "tokenizer "),
        ({"sources": {"code": {"kind": "code", "inputs": ["none"]}}}, "sources.code.inputs: "),
        ({"fim": {"rate": 0.5}}, "fim: no such key in a corpus plan. Fix: fim belongs to a phase"),
    ],
)
def test_a_fault_of_a_plan_names_its_file(
    changes: dict[str, Any], words: str, tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for command in ("run", "plan"):
        others = {key: value for key, value in changes.items() if key != "tokenizer"}
        file = write_plan(tmp_path, changes.get("tokenizer", tokenizer), **others)
        mellum2("data", command, file).refused(f"error: {file}: {words}")
    assert not (tmp_path / "results").exists()


def test_an_option_is_no_fault_of_the_plan(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "f.py").write_text(python_like(1))
    run(tmp_path, tokenizer, "--stage", "none").refused("error: --stage none: ")


def test_a_plan_given_as_data_names_the_folder_that_it_makes(
    tokenizer: Path, tmp_path: Path
) -> None:
    file, other = write_plan(tmp_path, tokenizer), tmp_path / "other.yaml"
    other.write_text("a: 1\n")
    result = mellum2("train", TINY, f"data.path={file}", "--dry-run")
    result.refused("is a file", f"data.path={tmp_path / 'results'} data.phase=1")
    mellum2("train", TINY, f"data.path={other}", "--dry-run").refused("name a folder")


def test_a_folder_of_other_files_is_no_output(tokenizer: Path, tmp_path: Path) -> None:
    """A plan removes `phase-7` of an earlier version, and would remove this one."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "f.py").write_text(python_like(1))
    mine = tmp_path / "results" / "phase-7" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("x")
    before = snapshot(tmp_path / "results")
    run(tmp_path, tokenizer).refused(str(tmp_path / "results"), "no plan's")
    assert snapshot(tmp_path / "results") == before


def test_missing_tokens_are_told_and_the_plan_ends_with_2(tokenizer: Path, tmp_path: Path) -> None:
    """Estimated before the plan has run, counted afterwards."""
    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / "in" / f"f{number}.py").write_text(python_like(number))
    phases = [{"tokens": 10**7, "mixture": {"code": 100}, "sequence_length": 512}]
    for told in ("estimated from a sample", "tokens: counted"):
        result = mellum2("data", "plan", write_plan(tmp_path, tokenizer, phases=phases))
        assert result.code == 2, result
        assert told in result.out
        assert re.search(
            r"plan\.yaml: sources\.code: [\d,]+ tokens: the phases need 10,000,000, ", result.err
        )
        for stage in STAGES[:-1]:
            assert run(tmp_path, tokenizer, "--stage", stage, phases=phases).code == 0
    enough = [{"tokens": 100, "mixture": {"code": 100}, "sequence_length": 512}]
    assert mellum2("data", "plan", write_plan(tmp_path, tokenizer, phases=enough)).code == 0


def test_a_document_of_three_gigabytes_is_left_out(tokenizer: Path, tmp_path: Path) -> None:
    """In a text file and in a row, in less memory than they take; and none of the rest."""
    (tmp_path / "in").mkdir()
    with (tmp_path / "in" / "a.py").open("wb") as file:
        file.truncate(3 << 30)
    with gzip.open(tmp_path / "in" / "b.jsonl.gz", "wb", compresslevel=1) as packed:
        packed.write(b'{"text": "')
        for _ in range(200):
            packed.write(b"x" * (1 << 20))
        packed.write(b'"}\n' + GOOD.encode() + b"\n")
    parquet(tmp_path / "in" / "c.parquet", text=["y" * (40 << 20), python_like(5)])
    source = {"kind": "code", "inputs": ["in"], "filters": {"Parses": None}}
    tracemalloc.start()
    result = run(tmp_path, tokenizer, "--stage", "documents", sources={"code": source})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.code == 0, result
    # The row has 200 MiB; it is passed over in steps of 25 MiB, 6 times the limit of a text.
    assert peak < 100 << 20
    found = [
        json.loads(one.read_text()) for one in (tmp_path / "results").glob("documents/*/manifest*")
    ]
    assert sum(facts["documents"] for facts in found) == 2
    assert sum(facts["left_out"]["too_large"]["count"] for facts in found if facts["left_out"]) == 3


def test_nothing_left_to_train_on(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    run(tmp_path, tokenizer).refused("in", "sources.code")
    (tmp_path / "in" / "empty.py").write_text("")
    (tmp_path / "in" / "short.py").write_text("x\n")
    run(tmp_path, tokenizer).refused("plan.yaml: sources.code: 0 tokens")


def test_full_disk_in_every_stage(
    mounted: Callable[[str], Path], tokenizer: Path, tmp_path: Path
) -> None:
    """Two pages are free at each stage, which then does its work once there is room."""
    for number in range(12):
        file = tmp_path / "in" / f"repository{number % 3}" / f"f{number}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(python_like(number))
    disk = mounted("size=4m")
    output = str(disk / "results")
    filler = disk / "filler"

    def fill() -> dict[str, str]:
        filler.write_bytes(b"\0" * (shutil.disk_usage(disk).free - 8192))
        return {name: digest for name, digest in snapshot(disk).items() if digest != "folder"}

    assert run(tmp_path, tokenizer, "--stage", "documents", output=output).code == 0
    shutil.rmtree(disk / "results" / "documents")
    for words in (*(("--stage", stage) for stage in STAGES), ()):
        before = fill()
        run(tmp_path, tokenizer, *words, output=output).refused(str(disk), code=1)
        after = {name: digest for name, digest in snapshot(disk).items() if digest != "folder"}
        assert before.items() <= after.items(), words
        # A task that had room, with a manifest alone, has ended; no other left anything.
        assert all(name.endswith("/manifest.json") for name in after.keys() - before.keys()), words
        filler.unlink()
        result = run(tmp_path, tokenizer, *words, output=output)
        assert result.code == 0, result
    assert (disk / "results" / "phase-1" / "code" / "packs.json").is_file()
