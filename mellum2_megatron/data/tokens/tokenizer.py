"""The tokenizer of a corpus: a byte-level BPE trained here, or a fast Hugging Face tokenizer.

``document_tokenizer`` encodes the texts of documents.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.common.files import LARGEST_TEXT, read_bytes, write_json, write_text
from mellum2_megatron.common.json_files import load_json
from mellum2_megatron.common.limited_process import LimitError, run_limited
from mellum2_megatron.common.model_folders import check_inside

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The roles of the released tokenizer: its bos separates documents, its eos ends a turn of a chat.
EOD, EOS, PAD = "<|endoftext|>", "<|im_end|>", "<|pad|>"
# Spelt as in JetBrains' first Mellum.
FIM_SENTINELS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
# Ids follow this order: bos 0 and eos 1 are bos_token_id and eos_token_id of mellum2-tiny.
RESERVED_TOKENS = (
    EOD,
    EOS,
    PAD,
    *FIM_SENTINELS,
    "<fim_pad>",
    "<reponame>",
    "<filename>",
    "<|im_start|>",
    "<think>",
    "</think>",
)
SMALLEST_VOCAB = len(RESERVED_TOKENS) + 256

# A sentinel may be spelt in either of the two ways in use (StarCoder and Mellum; Qwen).
_FIM_SPELLINGS = {name.strip("<>"): (name, f"<|{name.strip('<>')}|>") for name in FIM_SENTINELS}
# Of Mellum; of StarCoder 2; of Qwen.
_REPOSITORY_SPELLINGS = {
    "reponame": ("<reponame>", "<repo_name>", "<|repo_name|>"),
    "filename": ("<filename>", "<file_sep>", "<|file_sep|>"),
}
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


_SCRIPT = Path(__file__).with_name("tokenizer_script.py")
_TRIAL_TEXTS = [
    "def f(x: int) -> str:\n    return f'{x:>8}'  # fünf 数 \U0001f600\n",
    *(character * 300 + ending for character in "a1 _\t\n." for ending in ("", "!", "\n")),
]
"""Texts that every tokenizer encodes before it is used: runs of one character are the hard ones."""


def train_tokenizer(texts: Iterable[str], folder: Path, *, vocab_size: int) -> None:
    """Train a byte-level BPE and write it to ``folder`` in Hugging Face format.

    Its shape is that of the released tokenizer: single digits, then GPT-2's words, no normaliser.
    It is lossless on any text, for all 256 bytes are in the alphabet, and a function of the texts
    and their order.

    Args:
        texts: the training texts.
        folder: folder to write, made if missing.
        vocab_size: number of entries, reserved tokens and bytes included.

    Raises:
        InputError: ``vocab_size`` is below 256 bytes + the reserved tokens, or the texts have too
            few repeated pairs to reach it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
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
            f"--vocab-size {vocab_size}",
            rule=f"this corpus has repeated pairs for {reached} entries only",
            fix=f"give more text, or a --vocab-size of at most {reached}",
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    roles = {"bos_token": EOD, "eos_token": EOS, "pad_token": PAD}
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
            f"--vocab-size {vocab_size}",
            rule=f"256 bytes and {len(RESERVED_TOKENS)} reserved tokens "
            f"need {SMALLEST_VOCAB} entries",
            fix=f"use {SMALLEST_VOCAB} or more (mellum2-tiny: 4096)",
        )


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a Hugging Face folder, with all of its tokens.

    It neither truncates nor pads, and encodes a special token's spelling as ordinary characters.
    Added tokens that are not marked special are found in texts all the same.

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
    check_inside(folder, path)
    # A rank and a worker process load what the command that started them has tried.
    if "RANK" not in os.environ and multiprocessing.parent_process() is None:
        status = path.stat()
        _try_tokenizer(path.absolute(), status.st_size, status.st_mtime_ns)
    try:
        # Not from_file, which takes no path with bytes that are not UTF-8.
        tokenizer = Tokenizer.from_buffer(read_bytes(path))
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


@functools.lru_cache(maxsize=64)
def _try_tokenizer(path: Path, size: int, changed: int) -> None:
    """Load a tokenizer and encode texts with it, with limits of time and memory.

    Args:
        path: its ``tokenizer.json``.
        size, changed: bytes, and time of the last change; another file is tried again.

    Raises:
        InputError: it fails, or passes a limit.
    """
    try:
        if size > LARGEST_TEXT:
            raise LimitError(f"larger than {LARGEST_TEXT:,} bytes")
        answer = run_limited(_SCRIPT, {"path": os.fspath(path), "texts": _TRIAL_TEXTS})
    except LimitError as error:
        answer = {"error": str(error)}
    if "error" in answer:
        raise InputError(
            str(path),
            rule=f"it is not a valid tokenizer file ({answer['error']})",
            fix="fetch or write the file again",
        )


def vocab_size(folder: Path) -> int:
    """Return the number of rows that an embedding needs: the tokenizer's highest id plus 1."""
    # Not the number of entries: ids may have holes.
    return 1 + max(load_tokenizer(folder).get_vocab(with_added_tokens=True).values())


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a folder's tokenizer files, and nothing else, into another folder."""
    target.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            check_inside(source, source / name)
            shutil.copyfile(source / name, target / name)


def special_ids(folder: Path, *, need_eos: bool = True) -> dict[str, int]:
    """Return the ids of a tokenizer folder's special tokens.

    Args:
        folder: Hugging Face tokenizer folder.
        need_eos: refuse a folder without an eos token.

    Returns:
        Ids by role: ``bos``, ``eos``, ``pad``, ``fim_prefix``, ``fim_middle``, ``fim_suffix``; all
        but ``eos`` only where the folder defines them.

    Raises:
        InputError: a configured token is not in the vocabulary, or there is no eos token.
    """
    tokenizer = load_tokenizer(folder)
    ids: dict[str, int] = {}
    for role in ("bos", "eos", "pad"):
        tokens = configured_tokens(folder, f"{role}_token")
        if not tokens:
            continue
        token = tokens[0]
        identifier = tokenizer.token_to_id(token)
        if identifier is None:
            raise InputError(
                f"{role}_token {token!r} of {folder}",
                rule="it must be in the vocabulary",
                fix="repair tokenizer_config.json",
            )
        ids[role] = identifier
    if need_eos and "eos" not in ids:
        raise InputError(
            f"tokenizer {folder}",
            rule="it defines no eos_token",
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


def repository_ids(folder: Path) -> dict[str, int]:
    """Return the ids of the tokens before a repository's name and a file's path, by role.

    The roles are ``reponame`` and ``filename``; a folder without such an added token lacks one.
    """
    added = {
        token.content: id for id, token in load_tokenizer(folder).get_added_tokens_decoder().items()
    }
    return {
        role: next(added[token] for token in spellings if token in added)
        for role, spellings in _REPOSITORY_SPELLINGS.items()
        if added.keys() & set(spellings)
    }


def tokenizer_hash(folder: Path) -> str:
    """Return the SHA-256 of ``tokenizer.json``, hexadecimal."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def configured_tokens(folder: Path, key: str) -> list[str]:
    """Return the different tokens that a folder's configuration files give for a key.

    ``tokenizer_config.json`` comes first. More than one means that the files disagree.
    """
    tokens: list[str] = []
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        check_inside(folder, path)
        try:
            value = load_json(path).get(key)
        except (OSError, ValueError) as error:
            raise InputError(
                str(path),
                rule=f"it must be a JSON object ({first_line(error)})",
                fix="fetch or write the file again",
            ) from error
        if isinstance(value, dict):  # an AddedToken written out
            value = value.get("content")
        if isinstance(value, str) and value not in tokens:
            tokens.append(value)
    return tokens
