"""Bytes of tokens add up to the bytes of their text."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.data.tokens.token_bytes import token_bytes
from mellum2_megatron.data.tokens.tokenizer import load_tokenizer

TEXT = "def f(x):\n\treturn 'fünf 数 \U0001f600'  # 12345\n"


def test_byte_level(small_data: PreparedData) -> None:
    folder = small_data.tokenizer_dir
    tokenizer, sizes = load_tokenizer(folder), token_bytes(folder)
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert sizes[ids].sum() == len(TEXT.encode())
    assert sizes[tokenizer.token_to_id("<|endoftext|>")] == 0


def test_byte_fallback(tmp_path: Path) -> None:
    words = {"<unk>": 0, "\u2581a": 1, "b": 2, "\u2581": 3, "ü": 4}
    vocabulary = words | {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "bb ü 数"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert token_bytes(tmp_path)[ids].sum() == len(text.encode())


def test_tokens_without_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="neither ByteLevel nor ByteFallback"):
        token_bytes(tmp_path)
