"""The tokenizer of a corpus: a byte-level BPE trained here, or a fast Hugging Face tokenizer.

A document's text may itself spell a special token (the sources of ``transformers`` are full of
``<|endoftext|>``). Such text is encoded as ordinary characters: only this package places document
ends and fill-in-the-middle sentinels.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS, EOS, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
# Spelt as in JetBrains' first Mellum.
FIM_SENTINELS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
# Ids follow this order: bos 0 and eos 1 are bos_token_id and eos_token_id of mellum2-tiny.
RESERVED_TOKENS = (
    BOS,
    EOS,
    PAD,
    *FIM_SENTINELS,
    "<fim_pad>",
    "<reponame>",
    "<filename>",
    "<|im_start|>",
    "<|im_end|>",
)
SMALLEST_VOCAB = len(RESERVED_TOKENS) + 256

# Words with their leading space or punctuation, single digits, runs of punctuation, line ends, runs
# of blanks but the last (so that `    return` is a run of three and ` return`). Every character
# falls into one of the branches.
_PRE_TOKENISE = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# A sentinel may be spelt in either of the two ways in use (StarCoder and Mellum; Qwen).
_FIM_SPELLINGS = {name.strip("<>"): (name, f"<|{name.strip('<>')}|>") for name in FIM_SENTINELS}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def train_tokenizer(texts: Iterable[str], folder: Path, *, vocab_size: int) -> None:
    """Train a byte-level BPE and write it to ``folder`` in Hugging Face format.

    It is lossless on any text (no normaliser, all 256 bytes in the alphabet) and a function of the
    texts and their order. Digits are single tokens.

    Args:
        texts: the training texts.
        folder: folder to write, made if missing.
        vocab_size: number of entries, reserved tokens and bytes included.

    Raises:
        InputError: ``vocab_size`` is below 256 bytes + the reserved tokens, or the texts have too
            few repeated pairs to reach it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRE_TOKENISE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(RESERVED_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    # The trainer ends without an error when it runs out of pairs.
    reached = tokenizer.get_vocab_size()
    if reached != vocab_size:
        raise InputError(
            f"vocab_size={vocab_size}",
            rule=f"this corpus has repeated pairs for {reached} entries only",
            fix=f"give more text, or a vocab_size of at most {reached}",
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    additional = [token for token in RESERVED_TOKENS if token not in roles.values()]
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **roles,
            "additional_special_tokens": additional,
            # True would delete blanks before punctuation when transformers decodes.
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )
    write_json(
        folder / "special_tokens_map.json", {**roles, "additional_special_tokens": additional}
    )


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a vocabulary that cannot hold the 256 bytes and the reserved tokens."""
    if vocab_size < SMALLEST_VOCAB:
        raise InputError(
            f"vocab_size={vocab_size}",
            rule=f"256 bytes and {len(RESERVED_TOKENS)} reserved tokens "
            f"need {SMALLEST_VOCAB} entries",
            fix=f"use {SMALLEST_VOCAB} or more (mellum2-tiny: 4096)",
        )


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a Hugging Face folder, set to encode plain text.

    It neither truncates nor pads, and encodes a special token's spelling as ordinary characters.

    Raises:
        InputError: the folder has no readable ``tokenizer.json``.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"tokenizer {folder}",
            rule="a fast tokenizer (tokenizer.json) is needed",
            fix="name a Hugging Face tokenizer folder, "
            "or convert a slow one with AutoTokenizer.save_pretrained",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for malformed files
        raise InputError(
            str(path),
            rule=f"it is not a valid tokenizer file ({error})",
            fix="fetch or write the file again",
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocab_size(folder: Path) -> int:
    """Return the number of rows that an embedding needs: the tokenizer's highest id plus 1."""
    # Not the number of entries: ids may have holes.
    return 1 + max(load_tokenizer(folder).get_vocab(with_added_tokens=True).values())


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a folder's tokenizer files, and nothing else, into another folder."""
    target.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def special_ids(folder: Path) -> dict[str, int]:
    """Return the ids of a tokenizer folder's special tokens.

    Returns:
        Ids by role: ``bos``, ``eos``, ``pad``, ``fim_prefix``, ``fim_middle``, ``fim_suffix``; all
        but ``eos`` only where the folder defines them.

    Raises:
        InputError: a configured token is not in the vocabulary, or there is no end-of-document
            (eos) token.
    """
    tokenizer = load_tokenizer(folder)
    ids: dict[str, int] = {}
    for role in ("bos", "eos", "pad"):
        token = _configured_token(folder, f"{role}_token")
        if token is None:
            continue
        identifier = tokenizer.token_to_id(token)
        if identifier is None:
            raise InputError(
                f"{role}_token {token!r} of {folder}",
                rule="it must be in the vocabulary",
                fix="repair tokenizer_config.json",
            )
        ids[role] = identifier
    if "eos" not in ids:
        raise InputError(
            f"tokenizer {folder}",
            rule="it defines no eos_token, which ends every document",
            fix='add "eos_token" to tokenizer_config.json',
        )
    for role, spellings in _FIM_SPELLINGS.items():
        for token in spellings:
            identifier = tokenizer.token_to_id(token)
            if identifier is not None:
                ids[role] = identifier
                break
    return ids


def check_fim(folder: Path) -> dict[str, int]:
    """Return the ids of the three fill-in-the-middle sentinels.

    Raises:
        InputError: a sentinel is missing; the message names it.
    """
    ids = special_ids(folder)
    for role, spellings in _FIM_SPELLINGS.items():
        if role not in ids:
            raise InputError(
                f"tokenizer {folder}",
                rule=f"fill-in-the-middle needs the sentinel {' or '.join(spellings)}, "
                "and it is missing",
                fix="add it to the tokenizer as a special token, or set the FIM rate to 0",
            )
    return {role: ids[role] for role in _FIM_SPELLINGS}


def tokenizer_hash(folder: Path) -> str:
    """Return the SHA-256 of ``tokenizer.json``, hexadecimal."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def _configured_token(folder: Path, key: str) -> str | None:
    """Return the token that one of the folder's configuration files gives for ``key``."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8")).get(key)
        except (ValueError, AttributeError) as error:
            raise InputError(
                str(path), rule="it must be a JSON object", fix="fetch or write the file again"
            ) from error
        if isinstance(value, dict):  # an AddedToken written out
            value = value.get("content")
        if isinstance(value, str):
            return value
    return None
