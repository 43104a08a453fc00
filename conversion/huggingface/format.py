"""File names and dtypes of a Hugging Face model folder; safe reading of its JSON and links."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.common.json_files import JsonError, load_json
from mellum2_megatron.common.model_folders import CONFIG_FILE as CONFIG_FILE
from mellum2_megatron.common.model_folders import check_inside, refuse_lfs_pointers

GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Files of a release: model card, licence, and the hashes and figures that it was released with.
CARD_FILE = "README.md"
LICENSE_FILE = "LICENSE"
VERIFICATION_FILE = "verification.json"
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
        InputError: it is absent, malformed, not an object, names a key twice, or is a link out of
            its folder.
    """
    check_inside(path.parent, path)
    refuse_lfs_pointers([path])
    try:
        return load_json(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing", rule=why, fix="give a complete folder") from error
    except OSError as error:
        raise InputError(
            str(path), rule=f"it must be readable ({first_line(error)})", fix="check the file"
        ) from error
    except JsonError as error:
        raise InputError(
            str(path), rule=f"it must be valid JSON ({error})", fix="copy the file again"
        ) from error


def listed(names: Sequence[str], first: int = 3) -> str:
    """Return the first names and the number of the others: ``a, b, c and 7 more``."""
    text = ", ".join(names[:first])
    return text if len(names) <= first else f"{text} and {len(names) - first} more"
