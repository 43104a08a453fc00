"""File names and dtypes of a Hugging Face model folder; safe reading of its JSON and links."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mellum2_megatron.common.errors import InputError

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Weights in Python's pickle format, which can execute code: named in an error, never opened.
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Dtypes that weights may have: name in config.json -> (name in safetensors, torch's dtype).
DTYPES: dict[str, tuple[str, torch.dtype]] = {
    "bfloat16": ("BF16", torch.bfloat16),
    "float16": ("F16", torch.float16),
    "float32": ("F32", torch.float32),
}


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name: ``torch.bfloat16`` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name: ``"bfloat16"`` -> ``torch.bfloat16``.

    Raises:
        InputError: the name is not in `DTYPES`.
    """
    if name not in DTYPES:
        raise InputError(
            f"dtype={name!r}",
            rule="weights are stored as one of " + ", ".join(DTYPES),
            fix="use bfloat16",
        )
    return DTYPES[name][1]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the tensor's values in row-major order as bytes; no copy of a contiguous tensor."""
    # Through uint8: numpy has no bfloat16.
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def read_json(path: Path, why: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: file.
        why: rule in the error about a missing file.

    Raises:
        InputError: it is absent, malformed, not an object, or names a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing", rule=why, fix="give a complete folder") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            str(path), rule=f"it must be readable ({error})", fix="check the file"
        ) from error
    return parse_json(text, str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """Return the JSON object in a text.

    Args:
        text: JSON text.
        where: name of the text in errors.

    Raises:
        InputError: it is malformed, not an object, or names a key twice.
    """

    # json.loads keeps the last of two equal keys in silence.
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                raise InputError(
                    f"{where}: key {name!r} twice",
                    rule="a key may appear once",
                    fix="remove one of them",
                )
            result[name] = value
        return result

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except ValueError as error:
        raise InputError(
            where, rule=f"it must be valid JSON ({error})", fix="copy the file again"
        ) from error
    if not isinstance(value, dict):
        raise InputError(where, rule="it must hold a JSON object", fix="copy the file again")
    return value


def check_inside(folder: Path, file: Path) -> None:
    """Check that a file is no link out of the folder.

    The links of the Hugging Face cache are allowed (``snapshots/X/f -> blobs/Y``).

    Raises:
        InputError: a link out of the folder.
    """
    # Otherwise a downloaded folder could copy any file of this machine into a released one.
    real, home = file.resolve(), folder.resolve()
    if not real.is_relative_to(home) and not real.is_relative_to(home.parent.parent / "blobs"):
        raise InputError(
            f"{file} -> {real}",
            rule="a link may not leave the model's folder",
            fix="copy the file itself into it",
        )


def listed(names: Sequence[str], first: int = 3) -> str:
    """Return the first names and the number of the others: ``a, b, c and 7 more``."""
    text = ", ".join(names[:first])
    return text if len(names) <= first else f"{text} and {len(names) - first} more"
