"""Ids against the tokenizers library, and tokens that no text may become."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.data.prepare import prepare
from mellum2_megatron.data.tokens.document_tokenizer import (
    check_roles,
    end_of_document,
    fidelity,
    protected_tokens,
)
from mellum2_megatron.data.tokens.encoder import (
    DocumentEncoder,
    Engine,
    choose_encoder,
    translate,
)
from mellum2_megatron.data.tokens.probe_texts import probe_texts
from mellum2_megatron.data.tokens.tokenizer import RESERVED_TOKENS, train_tokenizer
from tests.data.conftest import HOSTILE, NUL
from tests.data.test_prepare import read_indexed
from tests.small import python_like

PROSE = "It's the 3rd of May, isn't it? They'd say we'll see what 12345 brings.\n\n  - one\n"
TEXTS = [*map(python_like, range(30)), *HOSTILE.values(), PROSE]
OLDER = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

ENGINES: tuple[Engine, ...] = ("tiktoken", "tokenizers")
SHAPES: dict[str, Any] = {
    "mellum": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    ),
    "older": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(OLDER), behavior="isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    ),
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
}


def write(folder: Path, tokenizer: Tokenizer, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def byte_level(pre_tokenizer: Any, **model: Any) -> Tokenizer:
    """Return a byte-level BPE of 420 entries with two special and three other added tokens."""
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<fim_prefix>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer=trainer)
    tokenizer.add_tokens(
        [
            AddedToken("<fim_middle>", special=False, normalized=True),
            AddedToken("<tool>", special=False, lstrip=True, rstrip=True),
            AddedToken("return", special=False, single_word=True),
        ]
    )
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    made = {
        name: write(root / name, byte_level(shape), eos_token="<|endoftext|>")
        for name, shape in SHAPES.items()
    }
    train_tokenizer(map(python_like, range(50)), root / "ours", vocab_size=360)
    return made | {"ours": root / "ours"}


def every_character() -> Iterator[str]:
    for start in range(0, 0x110000, 0x1000):
        codes = range(start, start + 0x1000)
        yield "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


@pytest.mark.parametrize("name", ["ours", *SHAPES])
def test_tiktoken_gives_the_ids_of_tokenizers(folders: dict[str, Path], name: str) -> None:
    """On other texts than those of the start-up probe."""
    folder = folders[name]
    assert choose_encoder(folder, 0, TEXTS[:5]).engine == "tiktoken"
    # The reference: the library itself, on a file whose added tokens were cut out by hand.
    value = json.loads((folder / "tokenizer.json").read_text())
    reference = Tokenizer.from_str(json.dumps(value | {"added_tokens": [], "post_processor": None}))
    rng = random.Random(7)
    pool = "".join(TEXTS) + "".join(probe_texts(RESERVED_TOKENS, count=200))
    cuts = [rng.randrange(len(pool)) for _ in range(500)]
    texts = [
        *TEXTS,
        NUL,
        *(pool[cut : cut + rng.randrange(1, 200)] for cut in cuts),
        *every_character(),
        "x" + " \n" * 60_000 + "y",
        "=" * 100_000,
    ]
    ids = DocumentEncoder(folder, "tiktoken", 0).encode(texts)
    for text, ours in zip(texts, ids, strict=True):
        assert ours.dtype == np.int32
        assert ours.tolist() == reference.encode(text, add_special_tokens=False).ids, text[:50]


def test_a_run_of_blanks_that_overflows_tiktoken_is_encoded(folders: dict[str, Path]) -> None:
    text = "x" + " " * 1_000_000 + "y"
    (ids,) = DocumentEncoder(folders["ours"], "tiktoken", 0).encode([text])
    whole = Tokenizer.from_file(str(folders["ours"] / "tokenizer.json"))
    assert whole.decode(ids.tolist(), skip_special_tokens=False) == text
    translated = translate(json.loads((folders["ours"] / "tokenizer.json").read_text()))
    assert not isinstance(translated, str)
    with pytest.raises(BaseException, match="StackOverflow"):
        translated[0].encode_ordinary(text)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["ours", *SHAPES])
def test_no_text_becomes_an_added_token_and_every_text_comes_back(
    folders: dict[str, Path], name: str, engine: Engine
) -> None:
    whole = Tokenizer.from_file(str(folders[name] / "tokenizer.json"))
    added = {token.content: id for id, token in whole.get_added_tokens_decoder().items()}
    tokens = list(added)
    texts = [f"a{token} b {token}{token}\n" for token in tokens]
    texts += ["".join(tokens), *RESERVED_TOKENS, "return", " return <tool>  x"]
    if name != "ours":  # the library alone does find them in a text
        assert added["<tool>"] in whole.encode(" return <tool>  x").ids
    for text, ids in zip(
        texts, DocumentEncoder(folders[name], engine, 0).encode(texts), strict=True
    ):
        assert not set(ids.tolist()) & set(added.values()), text
        assert whole.decode(ids.tolist(), skip_special_tokens=False) == text


def test_a_prepared_corpus_holds_no_forged_sentinel(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """`special: false` as Qwen-style families ship it, in the file itself."""
    value = json.loads((folders["ours"] / "tokenizer.json").read_text())
    for token in value["added_tokens"]:
        token["special"] = token["special"] and "fim" not in token["content"]
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text(json.dumps(value))
    (tokenizer / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    lines = [{"text": python_like(seed) + "".join(RESERVED_TOKENS)} for seed in range(60)]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    options: dict[str, Any] = {"inputs": [path], "tokenizer": tokenizer, "valid_fraction": 0.2}
    data = prepare(tmp_path / "a", workers=1, progress=False, **options)
    assert data.corpus["encoder"]["engine"] == "tiktoken"
    documents = read_indexed(data.prefix("train")) + read_indexed(data.prefix("valid"))
    assert len(documents) == 60
    for ids in documents:
        assert ids[-1] == data.eod == 0
        assert min(ids[:-1]) >= len(RESERVED_TOKENS)
    other = prepare(tmp_path / "b", workers=1, progress=False, eod="<|im_end|>", **options)
    assert {ids[-1] for ids in read_indexed(other.prefix("train"))} == {other.eod} == {1}


def test_a_text_that_breaks_the_library_is_named(tmp_path: Path) -> None:
    """A regular expression that backtracks without end panics; that is no `Exception`."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"(b+b+)+c"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens(["<|endoftext|>"])
    eod = end_of_document(write(tmp_path, tokenizer))
    encoder = DocumentEncoder(tmp_path, "tokenizers", eod)
    texts, places = ["fine", "b" * 1000, "fine"], ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    with pytest.raises(InputError, match=r"^a\.jsonl:2 \('bbb.*the tokenizer cannot encode it"):
        encoder.encode(texts, places)
    with pytest.raises(InputError, match=r"^a document \('bbb"):
        encoder.encode(texts)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda value: value.update(normalizer={"type": "NFC"}), "has a normaliser"),
        (lambda value: value["pre_tokenizer"].update(add_prefix_space=True), "known shapes"),
        (lambda value: value.update(pre_tokenizer={"type": "Whitespace"}), "known shapes"),
        (lambda value: value["model"]["vocab"].pop("\u0100"), "lacks some of the 256 bytes"),
        (
            lambda value: value["model"].update(
                ignore_merges=True, vocab={**value["model"]["vocab"], "defined": 9000}
            ),
            "whole words",
        ),
    ],
    ids="normaliser prefix whitespace bytes words".split(),
)
def test_another_shape_is_encoded_by_tokenizers_and_the_reason_is_given(
    folders: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Any]], object], why: str
) -> None:
    value = json.loads((folders["gpt2"] / "tokenizer.json").read_text())
    change(value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    choice = choose_encoder(tmp_path, 0)
    assert choice.engine == "tokenizers"
    assert why in choice.reason


def test_the_probe_finds_merges_that_tiktoken_would_do_otherwise(tmp_path: Path) -> None:
    """tiktoken joins any two neighbours whose bytes are a token, tokenizers only listed pairs."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "bc", "ab", "abc"]
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    eod = end_of_document(write(tmp_path, tokenizer))
    choice = choose_encoder(tmp_path, eod)
    assert choice.engine == "tokenizers"
    assert choice.reason == "tiktoken gives other ids for 'abc'"


def test_a_tokenizer_whose_text_becomes_a_role_is_refused(tmp_path: Path) -> None:
    """A Unigram model has its pieces by number, and finds `<|endoftext|>` in a text."""
    pieces = [(chr(code), -5.0) for code in range(32, 127)]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *pieces, ("<|endoftext|>", -1.0)], 0))
    write(tmp_path, tokenizer, eos_token="<|endoftext|>")
    eod = end_of_document(tmp_path)
    with pytest.raises(InputError, match=r"becomes its token '<\|endoftext\|>' \(96\)"):
        check_roles(tmp_path, eod)
    with pytest.raises(WorkError, match=r"a document \(.*\) became the token"):
        DocumentEncoder(tmp_path, "tokenizers", eod).encode(["fine", "a<|endoftext|>"])


def test_an_unknown_token_that_ends_documents_is_refused(tmp_path: Path) -> None:
    model = models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="<|endoftext|>")
    write(tmp_path, Tokenizer(model), eos_token="<|endoftext|>")
    with pytest.raises(InputError, match="must not forge"):
        check_roles(tmp_path, end_of_document(tmp_path))


def test_words_that_are_entries_of_the_vocabulary_are_no_way_in(tmp_path: Path) -> None:
    """With `ignore_merges` a word that is an entry is taken whole, added token or not."""
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), ignore_merges=True)
    tokenizer.add_special_tokens(["endoftext"])
    value = json.loads(tokenizer.to_str())
    value["model"]["vocab"]["endoftext"] = tokenizer.token_to_id("endoftext")
    folder = write(tmp_path, Tokenizer.from_str(json.dumps(value)))
    eod = end_of_document(folder, "endoftext")
    check_roles(folder, eod)
    (ids,) = DocumentEncoder(folder, "tokenizers", eod).encode(["endoftext"])
    assert eod not in ids


def test_dropout_and_truncation_of_the_file_do_not_reach_documents(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    value = json.loads((folders["gpt2"] / "tokenizer.json").read_text())
    value["model"]["dropout"] = 0.5
    tokenizer = Tokenizer.from_str(json.dumps(value))
    tokenizer.enable_truncation(4)
    folder = write(tmp_path, tokenizer)
    (ids,) = DocumentEncoder(folder, "tokenizers", 0).encode([TEXTS[0]])
    (expected,) = DocumentEncoder(folders["gpt2"], "tokenizers", 0).encode([TEXTS[0]])
    assert np.array_equal(ids, expected)


def test_a_lossy_tokenizer_is_measured(folders: dict[str, Path], tmp_path: Path) -> None:
    texts = ["plain", "CAPITALS", "caf\u00e9", "plain too"]
    assert fidelity(folders["ours"], 0, TEXTS).warnings() == []
    lower = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    lower.normalizer = normalizers.Lowercase()
    found = fidelity(write(tmp_path / "lower", lower), 0, texts)
    assert (found.changed, found.with_unknown) == (1, 0)
    vocabulary = {"<unk>": 0, "<|endoftext|>": 1} | {
        chr(code): code - 30 for code in range(32, 127)
    }
    letters = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    letters.add_special_tokens(["<unk>", "<|endoftext|>"])
    letters.decoder = decoders.Fuse()
    folder = write(tmp_path / "letters", letters)
    check_roles(folder, 1)
    found = fidelity(folder, 1, texts)
    assert (found.changed, found.with_unknown) == (1, 1)
    assert found.warnings() == [
        "the tokenizer loses text: 25% of 4 sampled documents do not come back from their ids; "
        "25% have unknown tokens"
    ]


def test_added_tokens_of_ordinary_text_are_said(tmp_path: Path) -> None:
    """GPT-NeoX finds runs of blanks by added tokens; documents are encoded without them."""
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_tokens([AddedToken(" " * 8, special=False, normalized=True)])
    found = fidelity(write(tmp_path, tokenizer), 0, ["a", "b", "c\n        d", "<|endoftext|>"])
    assert (found.changed, found.with_added) == (0, 1)
    assert found.warnings() == [
        "25% of 4 sampled documents spell added tokens that are not special, such as "
        "'        '; they are encoded as plain text here, and as these tokens elsewhere"
    ]


def test_the_end_of_document_is_a_setting_of_its_own(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "5": 1}, merges=[]))
    tokenizer.add_special_tokens(["</s>", "<|im_end|>", "<|end|>"])

    def folder(**config: object) -> Path:
        return write(tmp_path, tokenizer, **config)

    assert end_of_document(folder(eos_token="<|im_end|>")) == 3
    assert end_of_document(folder(eos_token="<|im_end|>"), "</s>") == 2
    assert end_of_document(folder(), "4") == 4
    for wrong in ("a", "5", "0", "1", "5000", "-1", "<s>", ""):
        with pytest.raises(InputError, match=re.escape("</s> (2), <|im_end|> (3), <|end|> (4)")):
            end_of_document(folder(), wrong)
    with pytest.raises(InputError, match=r"more than one possible .* \(</s>, <\|end\|>\)") as error:
        end_of_document(folder())
    assert "--eod" in error.value.fix
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(InputError, match=r"more than one possible .* \(<\|im_end\|>, </s>\)"):
        end_of_document(folder(eos_token="<|im_end|>"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    assert end_of_document(folder(eos_token="<|im_end|>")) == 5
    assert set(protected_tokens(folder(eos_token="a"), 5)) == {0, 2, 3, 4, 5}


def test_ids_far_beyond_the_entries_are_refused(tmp_path: Path) -> None:
    # Written by hand: the library would count from 0 to that id.
    value = json.loads(Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).to_str())
    value["model"]["vocab"]["z"] = 2**31
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=f"its ids run to {2**31}"):
        end_of_document(tmp_path)
