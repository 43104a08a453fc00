"""The tokenizer as documents see it: no text becomes a special or another added token.

A document may itself spell such a token (the sources of ``transformers`` are full of
``<|endoftext|>``, and pages about models quote sentinels). Only this package places document ends
and fill-in-the-middle sentinels, whatever the flags of the tokenizer file: an added token that is
not marked special would be found in every text by the tokenizers library.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.json_files import load_json
from mellum2_megatron.data.tokens.tokenizer import (
    EOD,
    configured_tokens,
    load_tokenizer,
    special_ids,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Names that tokenizers give to the end of a document or of a text.
_END_NAMES = frozenset(
    {EOD, "</s>", "<eos>", "<|eos|>", "<|end_of_text|>", "<|eot|>", "<|end|>", "[EOS]", "<|eod|>"}
)
# An embedding has a row for each id below the highest.
_MOST_ROWS = 1 << 26


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """How well a tokenizer keeps the texts of a sample.

    Attributes:
        documents: number of documents in the sample.
        changed: documents whose ids do not decode to their text.
        with_unknown: documents with an unknown token.
        with_added: documents in which the tokenizer by itself would find added tokens, such as the
            runs of blanks of GPT-NeoX.
        first_added: one of these tokens, or None.
    """

    documents: int
    changed: int
    with_unknown: int
    with_added: int
    first_added: str | None

    def warnings(self) -> list[str]:
        """Return lines for the user; none if every text comes back as it was."""
        lines = []
        if self.changed or self.with_unknown:
            share = f"{self.changed / self.documents:.0%} of {self.documents} sampled documents"
            unknown = f"{self.with_unknown / self.documents:.0%} have unknown tokens"
            lines.append(
                f"the tokenizer loses text: {share} do not come back from their ids; {unknown}"
            )
        if self.with_added:
            share = f"{self.with_added / self.documents:.0%} of {self.documents} sampled documents"
            lines.append(
                f"{share} spell added tokens that are not special, such as {self.first_added!r}; "
                "they are encoded as plain text here, and as these tokens elsewhere"
            )
        return lines


def end_of_document(folder: Path, eod: str | None = None, *, key: str = "--eod ") -> int:
    """Return the id that ends every document.

    Args:
        folder: Hugging Face tokenizer folder.
        eod: an added token or its id; default None: ``<|endoftext|>`` where the tokenizer has it,
            else its eos.
        key: the user's word for ``eod`` with what stands behind it, for messages; default that of
            the command line.

    Raises:
        InputError: the token is not one of the added tokens, the choice is ambiguous, or ids are
            too large for an embedding.
    """
    _check_highest_id(folder)
    tokenizer = load_tokenizer(folder)
    # A text may hold any other token; as a document's end it would be a forged one.
    candidates: dict[str, int] = {
        token.content: id for id, token in tokenizer.get_added_tokens_decoder().items()
    }
    configured = configured_tokens(folder, "eos_token")
    for token in configured:
        identifier = tokenizer.token_to_id(token)
        if identifier is not None:
            candidates[token] = identifier
    listed = ", ".join(f"{token} ({id})" for token, id in list(candidates.items())[:30]) or "none"
    if eod is not None:
        if eod in candidates:
            return candidates[eod]
        if eod.isascii() and eod.isdigit() and int(eod) in candidates.values():
            return int(eod)
        raise InputError(
            f"{key}{eod}",
            rule="it must be an added token of the tokenizer, or the id of one",
            fix=f"use one of: {listed}",
        )
    if EOD in candidates:
        return candidates[EOD]
    ends = [token for token in configured if token in candidates]
    if len(ends) != 1:
        ends = ends or sorted(_END_NAMES & candidates.keys())
        raise InputError(
            f"tokenizer {folder}",
            rule=f"there is no {EOD} and {'no' if not ends else 'more than one possible'} "
            "token that ends a document" + (f" ({', '.join(ends)})" if ends else ""),
            fix=f"name it with {key.strip()}; the added tokens are: {listed}",
        )
    return candidates[ends[0]]


def _check_highest_id(folder: Path) -> None:
    """Refuse ids far beyond any vocabulary; the tokenizers library would count up to them."""
    try:
        value = load_json(folder / "tokenizer.json")
        vocabulary = value["model"]["vocab"]
        ids = [token["id"] for token in value.get("added_tokens", ())]
        ids += vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        highest = max(ids)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return  # load_tokenizer refuses such a file
    if highest >= _MOST_ROWS:
        raise InputError(
            f"tokenizer {folder}",
            rule=f"its ids run to {highest}; an embedding needs a row for each id, "
            f"and at most {_MOST_ROWS} are taken",
            fix="number the tokens without holes",
        )


def protected_tokens(folder: Path, eod: int) -> dict[int, str]:
    """Return the tokens that no text may become, by id: added tokens, roles and ``eod``.

    The unknown token is one only if it has a role besides.
    """
    tokenizer = load_tokenizer(folder)
    roles = {*special_ids(folder, need_eos=False).values(), eod}
    tokens: dict[int, str] = {id: str(tokenizer.id_to_token(id)) for id in roles}
    for id, token in tokenizer.get_added_tokens_decoder().items():
        tokens[id] = token.content
    unknown = unknown_id(tokenizer)
    if unknown is not None and unknown not in roles:
        tokens.pop(unknown, None)
    return tokens


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """Return the id of a tokenizer's unknown token, None if it has none."""
    model = json.loads(tokenizer.to_str())["model"]
    token = model.get("unk_token")
    if token is None:
        identifier = model.get("unk_id")  # Unigram
        return None if identifier is None else int(identifier)
    identifier = tokenizer.token_to_id(token)
    return None if identifier is None else int(identifier)


def document_tokenizer_json(folder: Path, protected: Mapping[int, str]) -> dict[str, Any]:
    """Return the content of ``tokenizer.json`` without its added tokens.

    Their entries also leave the vocabulary of the model, unless merges need them: with
    ``ignore_merges`` a word that is an entry becomes that token at once.
    """
    value: dict[str, Any] = json.loads(load_tokenizer(folder).to_str())
    value |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    model = value["model"]
    model |= {"dropout": None} if "dropout" in model else {}
    if isinstance(model["vocab"], dict):
        # `merges` is a list of pairs, or of texts with a blank in older files.
        merges = [
            merge.split(" ") if isinstance(merge, str) else merge
            for merge in model.get("merges", ())
        ]
        needed = {part for merge in merges for part in (*merge, "".join(merge))}
        needed.add(model.get("unk_token"))
        for token in protected.values():
            if token not in needed:
                model["vocab"].pop(token, None)
    return value


def load_document_tokenizer(folder: Path, protected: Mapping[int, str]) -> Tokenizer:
    """Return the tokenizer for the texts of documents; its ids are those of the folder's.

    Args:
        folder: Hugging Face tokenizer folder.
        protected: tokens that no text may become, from `protected_tokens`.
    """
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(document_tokenizer_json(folder, protected)))


def check_roles(folder: Path, eod: int) -> None:
    """Prove on texts that spell every protected token that none comes out of a text.

    Raises:
        InputError: one does; the message names token and text.
    """
    protected = protected_tokens(folder, eod)
    tokenizer = load_document_tokenizer(folder, protected)
    texts = spellings(protected.values())
    for text, encoding in zip(
        texts, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True
    ):
        forged = next((id for id in encoding.ids if id in protected), None)
        if forged is not None:
            raise InputError(
                f"tokenizer {folder}",
                rule=f"the text {text!r} becomes its token {protected[forged]!r} ({forged}), "
                "which documents must not forge",
                fix="use a byte-level BPE, whose merges do not make that token",
            )


def spellings(tokens: Iterable[str]) -> list[str]:
    """Return texts that spell each token alone, between letters and blanks, and twice."""
    forms = ("{0}", " {0} ", "x{0}y", "\n{0}\n", "{0}{0}", "({0})", "\t{0}  ")
    listed = sorted(tokens)
    texts = [form.format(token) for token in listed for form in forms]
    # Characters that few alphabets have, which become the unknown token where there is one.
    return [*texts, "".join(listed), " ".join(listed), "\u0378\U0001f9d1\x00\x1f\ufffd\u4e00"]


def fidelity(folder: Path, eod: int, texts: Sequence[str]) -> Fidelity:
    """Measure on texts of a corpus how well a tokenizer keeps them."""
    protected = protected_tokens(folder, eod)
    plain, whole = load_document_tokenizer(folder, protected), load_tokenizer(folder)
    unknown = unknown_id(whole)
    changed = with_unknown = with_added = 0
    first_added: str | None = None
    for text in texts:
        ids = plain.encode(text, add_special_tokens=False).ids
        changed += whole.decode(ids, skip_special_tokens=False) != text
        with_unknown += unknown is not None and unknown in ids
        by_itself = whole.encode(text, add_special_tokens=False).ids
        added = next((protected[id] for id in by_itself if id in protected), None)
        with_added += added is not None
        first_added = first_added or added
    return Fidelity(
        documents=len(texts),
        changed=changed,
        with_unknown=with_unknown,
        with_added=with_added,
        first_added=first_added,
    )
