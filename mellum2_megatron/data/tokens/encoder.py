"""Encodes the texts of documents: with tiktoken where it is proved to give the same ids.

tiktoken is several times as fast as the tokenizers library (``benchmarks/data.py``). It takes one
regular expression and the ranks of byte strings, so only tokenizers of known shapes can be
translated. A start-up probe compares all ids on fixed texts and a sample of the corpus.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from mellum2_megatron.common.errors import InputError, WorkError, first_line
from mellum2_megatron.data.tokens.document_tokenizer import (
    document_tokenizer_json,
    load_document_tokenizer,
    protected_tokens,
    spellings,
)
from mellum2_megatron.data.tokens.probe_texts import probe_texts

if TYPE_CHECKING:
    import tiktoken

Engine = Literal["tiktoken", "tokenizers"]
Ids = npt.NDArray[np.int32]

# GPT-2's words (tokenizers' ByteLevel), without and with single digits before it. A digit ends a
# run of blanks, whose last one then stays with the run: the look-ahead counts digits as blanks.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS_GPT2 = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# Of the tokenizers that earlier versions of this project trained, and of Qwen2.
_SPLITS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# tiktoken's look-ahead overflows its stack on some hundred thousand blanks in a row, and panics.
_TOO_MANY_BLANKS = 50_000
_MANY_BLANKS = re.compile(rf"\s{{{_TOO_MANY_BLANKS}}}")


@dataclass(frozen=True, slots=True)
class EncoderChoice:
    """The library that encodes a tokenizer's documents.

    Attributes:
        engine: the library.
        reason: why, for the user.
    """

    engine: Engine
    reason: str


class DocumentEncoder:
    """Encodes texts; no text becomes a protected token.

    Args:
        folder: Hugging Face tokenizer folder.
        engine: the library, from `choose_encoder`.
        eod: id that ends documents, which is protected with the added tokens.
    """

    def __init__(self, folder: Path, engine: Engine, eod: int) -> None:
        self._protected = protected_tokens(folder, eod)
        self._tokenizer = load_document_tokenizer(folder, self._protected)
        self._fast: tuple[tiktoken.Encoding, Ids] | None = None
        if engine == "tiktoken":
            translated = translate(document_tokenizer_json(folder, self._protected))
            assert not isinstance(translated, str), translated
            self._fast = translated
        highest = max([*self._tokenizer.get_vocab().values(), *self._protected])
        self._is_protected = np.zeros(highest + 1, dtype=np.bool_)
        self._is_protected[list(self._protected)] = True

    def encode(self, texts: Sequence[str], places: Sequence[str] = ()) -> list[Ids]:
        """Return the ids of each text.

        Args:
            texts: the texts.
            places: file, and line or row, of each text, for messages; default none.

        Raises:
            InputError: the tokenizer's library fails on a text.
            WorkError: a text became a protected token.
        """
        if self._fast is None:
            encoded = self._encode_plain(texts, places)
        else:
            encoded = [self._encode_fast(text, *self._fast) for text in texts]
        for number, ids in enumerate(encoded):
            forged = self._is_protected[ids]
            if forged.any():
                identifier = int(ids[forged][0])
                raise WorkError(
                    f"{_document(texts, places, number)} became the token "
                    f"{self._protected[identifier]!r} ({identifier})",
                    fix="use a byte-level BPE, whose merges do not make that token",
                )
        return encoded

    def _encode_plain(self, texts: Sequence[str], places: Sequence[str]) -> list[Ids]:
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except BaseException as error:
            if not _is_panic(error):
                raise
            if len(texts) > 1:
                # One after the other, to find the text.
                each = zip(texts, places or [""] * len(texts), strict=True)
                return [self._encode_plain([one], [place])[0] for one, place in each]
            raise InputError(
                _document(texts, places, 0),
                rule=f"the tokenizer cannot encode it ({first_line(error)})",
                fix="leave the document out, or use a tokenizer with a simpler pre-tokeniser",
            ) from None
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _encode_fast(self, text: str, encoding: tiktoken.Encoding, ids: Ids) -> Ids:
        if len(text) >= _TOO_MANY_BLANKS and _MANY_BLANKS.search(text):
            # The other library, not another result: their ids are the same.
            plain = self._tokenizer.encode(text, add_special_tokens=False).ids
            return np.array(plain, dtype=np.int32)
        return ids[np.array(encoding.encode_ordinary(text), dtype=np.int32)]


def _document(texts: Sequence[str], places: Sequence[str], number: int) -> str:
    place = places[number] if places and places[number] else "a document"
    return f"{place} ({texts[number][:60]!r})"


def _is_panic(error: BaseException) -> bool:
    """Return true for an error of a Rust library; its class cannot be imported."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def choose_encoder(folder: Path, eod: int, sample: Sequence[str] = ()) -> EncoderChoice:
    """Return the fastest library that gives the ids of the tokenizers library.

    Args:
        folder: Hugging Face tokenizer folder.
        eod: id that ends documents.
        sample: texts of the corpus, compared besides the fixed ones.
    """
    protected = protected_tokens(folder, eod)
    translated = translate(document_tokenizer_json(folder, protected))
    if isinstance(translated, str):
        return EncoderChoice("tokenizers", translated)
    encoding, _ = translated
    fixed = probe_texts(spellings(protected.values()))
    # tiktoken joins any neighbours whose bytes are a token, tokenizers only listed pairs: a token
    # that its own merges do not reach shows when it is encoded alone.
    entries = [token.decode("utf-8", "ignore") for token in encoding.token_byte_values()]
    texts = [*fixed, *entries, *sample]
    plain, fast = (DocumentEncoder(folder, name, eod) for name in ("tokenizers", "tiktoken"))
    for text, expected, actual in zip(texts, plain.encode(texts), fast.encode(texts), strict=True):
        if not np.array_equal(expected, actual):
            return EncoderChoice("tokenizers", f"tiktoken gives other ids for {text[:40]!r}")
    return EncoderChoice(
        "tiktoken",
        f"the same ids as tokenizers on {len(fixed):,} fixed texts, all {len(entries):,} entries"
        + (f" and {len(sample)} documents" if sample else ""),
    )


def translate(value: Mapping[str, Any]) -> tuple[tiktoken.Encoding, Ids] | str:
    """Translate the content of a ``tokenizer.json`` without added tokens to tiktoken.

    Returns:
        The encoding and the tokenizer's id for each of its ranks; or why there is none.
    """
    model = value["model"]
    if model.get("type") != "BPE":
        return f"its model is {model.get('type')}, not BPE"
    if value.get("normalizer") is not None:
        return "it has a normaliser"
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"its model has a {key}"
    pattern = _pattern(value.get("pre_tokenizer"))
    if pattern is None:
        return "its pre-tokeniser has none of the known shapes"
    characters = _byte_characters()
    vocabulary: Mapping[str, int] = model["vocab"]
    if not characters.keys() <= vocabulary.keys():
        return "its vocabulary lacks some of the 256 bytes"
    # Rank -> token: bytes first, then merges by their priority.
    tokens = sorted(characters, key=characters.__getitem__)
    for merge in model["merges"]:
        tokens.append("".join(merge.split(" ") if isinstance(merge, str) else merge))
    ranks = {bytes(map(characters.__getitem__, token)): rank for rank, token in enumerate(tokens)}
    if len(ranks) != len(tokens):
        return "two of its merges make the same token"
    if model.get("ignore_merges") and len(vocabulary) != len(tokens):
        return "it takes whole words from the vocabulary that no merges make"
    import tiktoken

    encoding = tiktoken.Encoding(
        "documents", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
    )
    return encoding, np.array([vocabulary[token] for token in tokens], dtype=np.int32)


def _pattern(pre_tokenizer: Any) -> str | None:
    """Return the one regular expression of a pre-tokeniser of a known shape, else None."""
    if not isinstance(pre_tokenizer, dict):
        return None
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(before) > 1:
        return None
    if not before:
        return _GPT2 if last.get("use_regex", True) else None
    (first,) = before
    if first.get("type") == "Digits" and first.get("individual_digits"):
        return _DIGITS_GPT2 if last.get("use_regex", True) else None
    isolated = first.get("behavior") == "Isolated" and not first.get("invert")
    if first.get("type") != "Split" or not isolated or last.get("use_regex", True):
        return None
    expression = first.get("pattern", {}).get("Regex")
    return expression if expression in _SPLITS else None


def _byte_characters() -> dict[str, int]:
    """Return the character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }
