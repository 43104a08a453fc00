"""Chat files to packs: what is in them, what is left out, and what is refused."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import apply_overrides
from mellum2_megatron.data.chat.packs import ChatPacks, prepare_chat
from mellum2_megatron.data.chat.records import parse_record
from mellum2_megatron.data.chat.samples import Sample, SampleMaker, chat_tokenizer
from mellum2_megatron.data.chat.template import Mode, choose_template, read_template
from mellum2_megatron.data.feed.sources import check_data
from mellum2_megatron.data.tokens.pack_files import PackShard
from mellum2_megatron.recipes import recipe
from tests.cli.runner import mellum2
from tests.data.chats import WEATHER, call, random_rows, turn, write_rows, write_tokenizer

LENGTH = 256
ROWS = random_rows(1, 60, longest=14)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make(folder: Path, tokenizer: Path, *inputs: Path, **options: Any) -> ChatPacks:
    options = {"mode": "instruct", "length": LENGTH, "workers": 1, "progress": False} | options
    return prepare_chat(folder / "packs", inputs, tokenizer=tokenizer, **options)


def expected_samples(tokenizer: Path, mode: Mode) -> list[Sample]:
    maker = SampleMaker(tokenizer, choose_template(tokenizer, None), mode)
    return [sample for row in ROWS for sample in maker.samples(parse_record(row))]


def packed_samples(packs: ChatPacks) -> tuple[Counter[bytes], dict[str, set[int]]]:
    """Return every piece with its learnt tokens, and the conversations of each split."""
    found, conversations = Counter[bytes](), {}
    for split in ("train", "valid"):
        conversations[split] = set[int]()
        for prefix in packs.folder.prefixes(split):
            shard = PackShard(prefix)
            for pack in range(len(shard)):
                tokens, pieces = shard.tokens(pack), shard.pieces(pack)
                labels = shard.counted_labels(pack)
                conversations[split] |= set(pieces.documents.tolist())
                inside = np.zeros(LENGTH, dtype=bool)
                for start, length in zip(pieces.starts, pieces.lengths, strict=True):
                    assert start % 16 == 0
                    learnt = [False, *labels[start : start + length - 1]]
                    ids = tokens[start : start + length].astype(np.int32)
                    found[ids.tobytes() + np.array(learnt).tobytes()] += 1
                    inside[start : start + length - 1] = True
                assert not labels[~inside].any()
    return found, conversations


@pytest.mark.parametrize("mode", ["instruct", "thinking"])
def test_every_sample_that_fits_is_in_a_pack_once(
    mode: Mode, tokenizer: Path, tmp_path: Path
) -> None:
    packs = make(tmp_path, tokenizer, write_rows(tmp_path / "a.jsonl", ROWS), mode=mode)
    samples = expected_samples(tokenizer, mode)
    fitting = [sample for sample in samples if sample.tokens.size <= LENGTH]
    assert 0 < len(fitting) < len(samples)
    expected = Counter(sample.tokens.tobytes() + sample.learnt.tobytes() for sample in fitting)
    found, conversations = packed_samples(packs)
    assert found == expected
    assert packs.counts.too_long == len(samples) - len(fitting)
    assert packs.counts.samples == len(fitting)
    assert packs.counts.learnt == sum(int(sample.learnt.sum()) for sample in fitting)
    without = sum(all("reasoning" not in one for one in row["messages"]) for row in ROWS)
    assert packs.counts.without_reasoning == (without if mode == "thinking" else 0)
    assert conversations["train"]
    assert conversations["valid"]
    # Samples of one conversation never meet over the two splits.
    assert not conversations["train"] & conversations["valid"]


def test_workers_files_and_formats_do_not_change_the_packs(tokenizer: Path, tmp_path: Path) -> None:
    import pyarrow
    import zstandard
    from pyarrow import parquet

    lines = "".join(json.dumps(row) + "\n" for row in ROWS[:20]).encode()
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    rest = "".join(json.dumps(row) + "\n" for row in ROWS[20:40]).encode()
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(rest))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[40:]), folder / "c.parquet")
    one = make(tmp_path / "one", tokenizer, write_rows(tmp_path / "in.jsonl", ROWS))
    two = make(tmp_path / "two", tokenizer, folder, workers=2)
    for name in ("train-00000.bin", "train-00000.mask", "valid-00000.bin"):
        assert (one.folder.path / name).read_bytes() == (two.folder.path / name).read_bytes(), name


def test_shards_hold_all_samples(tokenizer: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", ROWS)
    packs = make(tmp_path, tokenizer, file, shard_tokens=1000)
    assert len(packs.folder.prefixes("train")) > 2
    samples = [one for one in expected_samples(tokenizer, "instruct") if one.tokens.size <= LENGTH]
    assert sum(packed_samples(packs)[0].values()) == len(samples)


def test_a_pad_token_that_ends_turns_is_learnt_all_the_same(
    tokenizer: Path, tmp_path: Path
) -> None:
    """Padding is recorded by its place. By value every end of a turn would be padding too."""
    other = tmp_path / "tokenizer"
    shutil.copytree(tokenizer, other)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        value = json.loads((other / name).read_text())
        (other / name).write_text(json.dumps({**value, "pad_token": "<|im_end|>"}))
    packs = make(tmp_path, other, write_rows(tmp_path / "a.jsonl", ROWS[:8]))
    end = chat_tokenizer(other).token_to_id("<|im_end|>")
    shard = PackShard(packs.folder.prefixes("train")[0])
    tokens, counted = shard.tokens(0).astype(int), shard.counted_labels(0)
    pieces = shard.pieces(0)
    covered = np.zeros(LENGTH, dtype=bool)
    for start, length in zip(pieces.starts, pieces.lengths, strict=True):
        covered[start : start + length] = True
        assert tokens[start + length - 1] == end
        assert counted[start + length - 2]
    assert (tokens[~covered] == end).all()
    assert not counted[~covered].any()


def test_the_folder_has_the_template_it_was_made_with(tokenizer: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    shutil.copytree(tokenizer, other)
    config = json.loads((other / "tokenizer_config.json").read_text())
    own = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    own += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    config["chat_template"] = own
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    rows = write_rows(tmp_path / "a.jsonl", ROWS[:8])
    theirs = make(tmp_path, other, rows)
    ours = make(tmp_path / "ours", other, rows, chat_template="mellum")
    assert read_template(theirs.folder.path / "tokenizer") == own
    assert read_template(ours.folder.path / "tokenizer") == choose_template(other, "mellum").text
    copied = json.loads((ours.folder.path / "tokenizer" / "tokenizer_config.json").read_text())
    assert "chat_template" not in copied
    assert theirs.folder.facts["chat"]["mode"] == "instruct"


BAD = [
    {"messages": [turn("user", "?")]},
    {"messages": [turn("user", "?"), turn("assistant", "x", tool_calls=[call("Ulm")])]},
]


def test_bad_rows_are_refused_or_counted(tokenizer: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [*ROWS[:5], *BAD, *ROWS[5:9]])
    with pytest.raises(InputError, match=r"a.jsonl line 6: .*no turn is the assistant's.*skip-bad"):
        make(tmp_path, tokenizer, file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]
    packs = make(tmp_path, tokenizer, file, skip_bad_rows=True)
    (line,) = packs.counts.left_out()[:1]
    assert line.startswith("left out: 2 bad rows (first: ")
    assert "a.jsonl line 6: no turn is the assistant's)" in line


def test_other_files_of_a_folder_are_counted(tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_rows(folder / "a.jsonl", ROWS[:5])
    (folder / "README.md").write_text("About this data")
    (folder / "b.jsonl.bz2").write_bytes(b"BZh")
    packs = make(tmp_path, tokenizer, folder)
    assert packs.counts.conversations == 5
    lines = "\n".join(packs.files_left_out)
    assert "1 files without rows" in lines
    assert "README.md" in lines
    assert "b.jsonl.bz2" in lines


REFUSED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "all-too-long": (ROWS[:5], {"length": 16}, r"left out: 5 samples longer.*raise --length 16"),
    "no-reasoning": (
        [{"messages": [turn("user", "?"), turn("assistant", "x")]}],
        {"mode": "thinking"},
        "left out: 1 conversations without reasoning.*--mode instruct",
    ),
    "no-rows": ([], {}, "the inputs have no rows"),
    "length": (ROWS[:5], {"length": 100}, "multiple of the alignment. Fix: use --length 96"),
    "seed": (ROWS[:5], {"seed": -1}, "--seed -1: it must be 0"),
    "not-finite": (
        [
            {
                "messages": [turn("user", "?"), turn("assistant", "x")],
                "tools": [{"name": "t", "most": float("nan")}],
            }
        ],
        {},
        "line 1: .*a number that is not finite",
    ),
    "valid-fraction": (ROWS[:5], {"valid_fraction": 1.0}, "must be 0 to 0.5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_packed_is_one_message(name: str, tokenizer: Path, tmp_path: Path) -> None:
    rows, options, expected = REFUSED[name]
    file = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError) as caught:
        make(tmp_path, tokenizer, file, **options)
    caught.match(f"(?s){expected}")
    assert not (tmp_path / "packs").exists()


def test_the_command_and_its_mistakes(tokenizer: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", ROWS[:9])
    (tmp_path / "b.txt").write_text("text")
    words = ["data", "chat", file, "--output", tmp_path / "out", "--tokenizer", tokenizer]
    words += ["--mode", "instruct", "--workers", "1"]
    done = mellum2(*words, "--length", "256")
    assert done.code == 0, done
    assert "chat template: ours (mellum)" in done.out
    assert "schedule.train_samples=64" in done.out
    mellum2(*words).refused("it exists and is not empty")
    words.append("--overwrite")
    mellum2("data", "chat", tmp_path / "b.txt", *words[3:]).refused("b.txt", "it holds no rows")
    mellum2("data", "chat", tmp_path / "none", *words[3:]).refused("none", "no such file")
    (tmp_path / "c.json").write_text(json.dumps(ROWS[:2]))
    mellum2("data", "chat", tmp_path / "c.json", *words[3:]).refused("c.json", "jq -c '.[]'")
    other = [tmp_path if word == tokenizer else word for word in words]
    mellum2(*other).refused("tokenizer.json")


@pytest.mark.parametrize("mode", ["instruct", "thinking"])
def test_a_recipe_takes_packs_of_its_own_mode(mode: Mode, tokenizer: Path, tmp_path: Path) -> None:
    packs = make(tmp_path, tokenizer, write_rows(tmp_path / "a.jsonl", ROWS), mode=mode)
    other = "thinking" if mode == "instruct" else "instruct"
    settings = [
        "architecture.vocab_size=320",
        f"data.sequence_length={LENGTH}",
        f"data.path={packs.folder.path}",
    ]
    for name in (f"mellum2_tiny_sft_{mode}", "mellum2_tiny_long_context"):
        assert check_data(apply_overrides(recipe(name), settings)).train[0].chat_mode == mode
    with pytest.raises(InputError) as caught:
        check_data(apply_overrides(recipe(f"mellum2_tiny_sft_{other}"), settings))
    assert caught.value.fix.endswith(f"--mode {other}`, or train mellum2_tiny_sft_{mode}")
    with pytest.raises(InputError, match="each conversation is seen by itself"):
        check_data(
            apply_overrides(
                recipe(f"mellum2_tiny_sft_{mode}"), [*settings, "data.document_attention=false"]
            )
        )


def test_inspect_shows_what_is_learnt(tokenizer: Path, tmp_path: Path) -> None:
    row = {
        "messages": [
            turn("user", "Ulm?"),
            turn("assistant", "", tool_calls=[call("Ulm")]),
            turn("tool", "sunny"),
            turn("assistant", "Sunny."),
        ],
        "tools": [WEATHER],
    }
    packs = make(
        tmp_path, tokenizer, write_rows(tmp_path / "a.jsonl", [row]), length=512, valid_fraction=0
    )
    folder = packs.folder.path
    shown = mellum2("data", "inspect", folder, "--pack", "0", "--piece", "0").out
    assert "<|im_start|>assistant\n⟦Sunny.<|im_end|>⟧" in shown
    assert '⟦<tool_call>{"name": "weather", "arguments": {"city": "Ulm", "days": 2}}' in shown
    assert "<|im_start|>tool\nsunny<|im_end|>\n" in shown
    mellum2("data", "inspect", folder, "--pack", "0", "--piece", "1").refused("pieces 0 to 0")
    mellum2("data", "inspect", folder, "--piece", "1").refused("--piece 1", "add --pack")
