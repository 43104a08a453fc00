"""`mellum2 data inspect | where | verify`."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from mellum2_megatron.checkpoint import read_run
from mellum2_megatron.data.feed.datasets import build_datasets
from mellum2_megatron.data.tokens.pack_files import PackShard, read_pack_folder
from tests.cli.runner import SMALL, TINY, mellum2
from tests.data.packs import write_folder
from tests.data.test_prepare import read_indexed


@pytest.fixture(scope="module")
def packs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("cli") / "packs", corpus / "tokenizer")


def run_file(folder: Path, *words: str | Path) -> Path:
    shown = mellum2("train", TINY, *SMALL, *words, "--device", "cpu", "--dry-run")
    assert shown.code == 0, shown
    (folder / "run.yaml").write_text(shown.out)
    return folder


def test_inspect_counts_pieces_by_source(packs: Path) -> None:
    folder = read_pack_folder(packs, "x")
    shown = mellum2("data", "inspect", packs).out
    shards = [PackShard(prefix) for prefix in folder.prefixes("train")]
    pieces, tokens = Counter[int](), Counter[int]()
    for shard in shards:
        for pack in range(len(shard)):
            of_pack = shard.pieces(pack)
            pieces.update(of_pack.sources.tolist())
            for source, length in zip(of_pack.sources, of_pack.lengths, strict=True):
                tokens[int(source)] += int(length)
    for number, name in enumerate(folder.sources):
        row = rf"{name} +{pieces[number]:,} +{tokens[number]:,}"
        assert re.search(row, shown), shown
    total = folder.packs("train")
    assert f"{total:,} packs of 64 tokens; {total * 64 - sum(tokens.values()):,} places" in shown


def test_verify_names_files_with_other_bytes(packs: Path, corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(packs, copy)
    whole = mellum2("data", "verify", copy)
    assert whole.code == 0, whole
    assert "all as they were written" in whole.out
    changed = next(copy.glob("train-00001*.bin"))
    content = bytearray(changed.read_bytes())
    content[5] ^= 1
    changed.write_bytes(content)
    shown = mellum2("data", "verify", copy)
    assert shown.code == 2
    assert str(changed) in shown.err
    assert "bytes of the same number" in shown.err
    (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    assert "not the tokenizer" in mellum2("data", "verify", copy).err
    assert "no corpus.json" in mellum2("data", "verify", tmp_path).err


def test_inspect_shows_the_pieces_of_a_pack(packs: Path) -> None:
    folder = read_pack_folder(packs, "x")
    first, second = (PackShard(prefix) for prefix in folder.prefixes("train"))
    shown = mellum2("data", "inspect", packs, "--pack", str(len(first) + 2)).out.splitlines()
    pieces = second.pieces(2)
    assert shown[0].startswith(f"pack {len(first) + 2}: train-00001 pack 2, ")
    assert len(shown) == 1 + len(pieces.starts)
    for line, start, length, document in zip(
        shown[1:], pieces.starts, pieces.lengths, pieces.documents, strict=True
    ):
        assert line.split()[:3] == [str(start), "+", str(length)]
        assert f"document {int(document):016x}  1 masked" in line


def test_where_names_the_packs_of_a_step(packs: Path, corpus: Path, tmp_path: Path) -> None:
    folder = run_file(tmp_path, f"data.train=[[1,{packs}]]", "data.path=nowhere")
    dataset, _, _ = build_datasets(read_run(folder / "run.yaml"), [12, 0, 0])
    lines = mellum2("data", "where", folder, "2").out.splitlines()
    assert len(lines) == 4
    for sample, line in zip(range(4, 8), lines, strict=True):
        found = re.fullmatch(
            rf"sample {sample}  packs  (\S+)  pack (\d+), epoch 0, documents( [0-9a-f]{{16}})+",
            line,
        )
        assert found, line
        shard = PackShard(Path(found[1]))
        assert shard.tokens(int(found[2])).tolist() == dataset[sample]["tokens"].tolist()
    (line,) = mellum2("data", "where", folder, "--sample", "5").out.splitlines()
    assert line == lines[1]


def test_where_names_the_documents_of_other_sets(corpus: Path, tmp_path: Path) -> None:
    folder = run_file(tmp_path, f"data.path={corpus}", f"data.cache={tmp_path / 'cache'}")
    run = read_run(folder / "run.yaml")
    dataset, _, _ = build_datasets(run, [12, 0, 0], cache=tmp_path / "cache")
    documents = read_indexed(corpus / "train_document")
    for line in mellum2("data", "where", folder, "3").out.splitlines():
        sample, numbers = line.split()[1], line.partition("documents ")[2].split()
        stream = [token for number in numbers for token in documents[int(number)]]
        tokens = dataset[int(sample)]["tokens"].tolist()
        assert any(stream[at : at + 64] == tokens for at in range(len(stream) - 63))


def test_mistakes_are_refused(packs: Path, corpus: Path, tmp_path: Path) -> None:
    folder = run_file(tmp_path, f"data.train=[[1,{packs}]]", "data.path=nowhere")
    mellum2("data", "inspect", corpus).refused(str(corpus), "no packs.json")
    mellum2("data", "inspect", packs, "--pack", "9999").refused("--pack 9999", "packs 0 to")
    mellum2("data", "where", folder, "4").refused("step 4", "steps 1 to 3")
    mellum2("data", "where", folder, "0").refused("step 0", "steps 1 to 3")
    mellum2("data", "where", folder, "--sample", "12").refused("sample 12", "0 to 11")
    mellum2("data", "where", folder).refused("STEP or --sample")
    mellum2("data", "where", tmp_path / "none", "1").refused("none")
