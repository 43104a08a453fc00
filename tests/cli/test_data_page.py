"""The commands of docs/data.md, executed in order on small inputs."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from tests import REPOSITORY
from tests.cli.runner import PACK, mellum2
from tests.data.plan_inputs import rich, write_inputs

LENGTH = 64
SHORT = [
    f"data.sequence_length={LENGTH}",
    "data.phase=1",
    "schedule.train_samples=64",
    "schedule.batch_schedule=[[0,8]]",
    "schedule.warmup_samples=8",
    "schedule.decay_samples=16",
    "logging.eval_iterations=1",
]


def test_the_page_leads_from_files_to_a_training(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inputs(tmp_path, rich)
    (tmp_path / "tree").rename(tmp_path / "repositories")
    for name, folder in (("code.parquet", "exports/the-stack.parquet"), ("web.jsonl.gz", "crawl")):
        target = tmp_path / folder
        (target.parent if target.suffix else target).mkdir()
        (tmp_path / name).rename(target if target.suffix else target / name)
    shutil.copytree(corpus / "tokenizer", tmp_path / "tokenizers" / "mellum2")
    monkeypatch.chdir(tmp_path)
    page = (REPOSITORY / "docs" / "data.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    plan = yaml.safe_load(text)
    for phase in plan["phases"]:
        phase |= {"tokens": phase["tokens"] // 1_000_000, "sequence_length": LENGTH}
    plan |= {"valid_share": 0.1, "unique_tokens": 20}
    (tmp_path / "corpus.yaml").write_text(yaml.safe_dump(plan))
    blocks = re.findall(r"```\n(mellum2 .*?)```", page, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    commands = set()
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        assert program == "mellum2"
        commands.add(tuple(words[:2]))
        if "--profile" in words:
            # The Slurm daemons' tests submit such jobs; here the words are read and understood.
            mellum2(*words).refused("mycluster")
            continue
        if words[:2] == ["data", "prepare"]:
            words += PACK
        if words[0] == "train":
            words = ["train", "mellum2_tiny_pretrain", *words[2:], "--device", "cpu"]
            words += SHORT if "data.path=corpus" in words else ["--dry-run"]
        result = mellum2(*words)
        assert result.code == 0, (line, result)
        if words[0] == "train":
            assert "# training data: " in result.out, line
    assert {("data", "prepare"), ("data", "plan"), ("data", "run"), ("data", "report")} <= commands
    assert (tmp_path / "corpus" / "report" / "report.md").is_file()
    assert (tmp_path / "data" / "mine" / "report" / "report.md").is_file()


def test_megatrons_format_refuses_wishes_for_packs(tmp_path: Path, texts: Path) -> None:
    words = ["data", "prepare", "--output", tmp_path / "x", "--input", texts, *PACK]
    refused = mellum2(*words, "--format", "megatron", "--sequence-length", "64")
    refused.refused("--format megatron with --sequence-length", "--format packs")


def test_what_is_dropped_is_printed(tmp_path: Path) -> None:
    write_inputs(tmp_path / "in", rich)
    words = ["--input", tmp_path / "in" / "tree", "--sequence-length", "128"]
    result = mellum2("data", "prepare", "--output", tmp_path / "x", *words, *PACK)
    assert result.code == 0, result
    assert "dropped: 1 Parses (first: broken.py: line 1: " in result.out
    assert f"left out: 1 not UTF-8 (first: {tmp_path}/in/tree/latin.py)" in result.out
    assert "packed as code, FIM in 50% of the documents\n" in result.out
    assert f"corpus report: {tmp_path}/x/report/report.md\n" in result.out
    assert re.search(r"wrote .*: [\d,]+ training tokens in [\d,]+ packs of 128\n", result.out)
