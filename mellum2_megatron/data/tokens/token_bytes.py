"""Bytes of text that each token stands for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.tokens.tokenizer import load_tokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def token_bytes(folder: Path) -> npt.NDArray[np.int64]:
    """Return the bytes of text of each id, `[ids]`; 0 for special tokens and holes.

    Added tokens that are not special are text.

    Args:
        folder: Hugging Face tokenizer folder.

    Raises:
        InputError: the tokenizer is neither byte-level nor has a byte fallback, so a token does not
            determine its text.
    """
    tokenizer = load_tokenizer(folder)
    decoder = json.dumps(json.loads(tokenizer.to_str())["decoder"])
    byte_level = '"type": "ByteLevel"' in decoder
    if not byte_level and '"type": "ByteFallback"' not in decoder:
        raise InputError(
            f"tokenizer {folder}",
            rule="its decoder is neither ByteLevel nor ByteFallback, so the bytes of a token are "
            "not known",
            fix="set logging.validation_documents=false",
        )
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    sizes = np.zeros(1 + max(vocabulary.values()), dtype=np.int64)
    for token, identifier in vocabulary.items():
        if identifier in added:
            entry = added[identifier]
            sizes[identifier] = 0 if entry.special else len(entry.content.encode())
        elif byte_level:
            sizes[identifier] = len(token)  # each byte is written as one character
        elif _BYTE.fullmatch(token):
            sizes[identifier] = 1
        else:
            sizes[identifier] = len(token.replace("\u2581", " ").encode())
    return sizes
