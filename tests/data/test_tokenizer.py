"""The tokenizer: lossless, the same in transformers, and missing tokens named."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.data.tokens.tokenizer import (
    RESERVED_TOKENS,
    SMALLEST_VOCAB,
    check_fim,
    load_tokenizer,
    special_ids,
    train_tokenizer,
    vocab_size,
)
from tests.data.conftest import HOSTILE, NUL
from tests.small import python_like


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(map(python_like, range(50)), path, vocab_size=350)
    return path


@pytest.mark.parametrize("name", [*HOSTILE, "nul", "every_character", "random"])
def test_any_text_survives_the_round_trip_and_makes_no_special_token(
    folder: Path, name: str
) -> None:
    rng = random.Random(0)
    text = {
        **HOSTILE,
        "nul": NUL,
        "every_character": "".join(
            chr(code) for code in range(0x3000) if not 0xD800 <= code < 0xE000
        ),
        "random": "".join(
            chr(rng.choice([rng.randrange(128), rng.randrange(0xE000, 0x110000)]))
            for _ in range(5000)
        ),
    }[name]
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert min(ids) >= len(RESERVED_TOKENS)


def test_digits_are_single_tokens_and_indentation_is_not_split_from_its_length(
    folder: Path,
) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("12345").tokens == list("12345")
    assert tokenizer.encode("\n        model").tokens == ["\u010a" + "\u0120" * 7, "\u0120model"]


def test_the_vocabulary_has_exactly_the_requested_size_and_training_is_repeatable(
    folder: Path, tmp_path: Path
) -> None:
    assert vocab_size(folder) == load_tokenizer(folder).get_vocab_size() == 350
    train_tokenizer(map(python_like, range(50)), tmp_path, vocab_size=350)
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_transformers_reads_the_same_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    for text in (
        *map(python_like, range(100, 110)),
        NUL,
        *(HOSTILE[name] for name in HOSTILE if name != "special"),
    ):
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text).ids
        assert theirs.decode(ids) == text
    assert [theirs.convert_tokens_to_ids(token) for token in RESERVED_TOKENS] == list(
        range(len(RESERVED_TOKENS))
    )
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert len(theirs) == 350
    assert theirs.decode([0, 1, 3, 4], skip_special_tokens=True) == ""


def test_special_ids_and_sentinels(folder: Path) -> None:
    expected = {"bos": 0, "eos": 1, "pad": 2, "fim_prefix": 3, "fim_middle": 4, "fim_suffix": 5}
    assert special_ids(folder) == expected
    assert check_fim(folder) == {
        name: expected[name] for name in ("fim_prefix", "fim_middle", "fim_suffix")
    }


def renamed(folder: Path, target: Path, old: str, new: str) -> Path:
    shutil.copytree(folder, target)
    for file in target.iterdir():
        file.write_text(file.read_text().replace(json.dumps(old), json.dumps(new)))
    return target


def test_a_missing_sentinel_is_named_and_the_other_spelling_is_known(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        InputError, match=re.escape("<fim_middle> or <|fim_middle|>, and it is missing")
    ):
        check_fim(renamed(folder, tmp_path / "without", "<fim_middle>", "<hole>"))
    assert (
        check_fim(renamed(folder, tmp_path / "qwen", "<fim_middle>", "<|fim_middle|>"))[
            "fim_middle"
        ]
        == 4
    )


def test_a_folder_that_is_no_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fast tokenizer"):
        special_ids(tmp_path)
    half = shutil.copytree(folder, tmp_path / "half")
    data = (half / "tokenizer.json").read_bytes()
    (half / "tokenizer.json").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="not a valid tokenizer file"):
        special_ids(half)
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "tokenizer_config.json").write_text("{}")
    (bare / "special_tokens_map.json").unlink()
    with pytest.raises(InputError, match="no eos_token"):
        special_ids(bare)
    (bare / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    with pytest.raises(InputError, match=r"'</s>'.*must be in the vocabulary"):
        special_ids(bare)


def test_a_vocabulary_out_of_reach_is_refused_with_what_can_be_had(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"need {SMALLEST_VOCAB} entries"):
        train_tokenizer(["x"], tmp_path, vocab_size=SMALLEST_VOCAB - 1)
    with pytest.raises(InputError, match=r"--vocab-size 4096: .*--vocab-size of at most") as error:
        train_tokenizer(map(python_like, range(3)), tmp_path / "out", vocab_size=4096)
    assert not (tmp_path / "out").exists()
    reachable = int(error.value.fix.rsplit(" ", 1)[1])
    train_tokenizer(map(python_like, range(3)), tmp_path / "out", vocab_size=reachable)


def test_truncation_and_padding_of_a_given_tokenizer_are_switched_off(
    prepared: PreparedData, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    folder = shutil.copytree(prepared.tokenizer_dir, tmp_path / "truncating")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = python_like(7)
    assert (
        load_tokenizer(folder).encode(text).ids
        == load_tokenizer(prepared.tokenizer_dir).encode(text).ids
    )
