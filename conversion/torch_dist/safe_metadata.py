"""Reads a checkpoint's ``.metadata`` pickle without executing anything from it."""

from __future__ import annotations

import pathlib
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint import planner

# Private classes of torch 2.15, which the pickle of every checkpoint names.
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata

from mellum2_megatron.common.errors import InputError, first_line

METADATA_FILE = ".metadata"


def read_metadata(folder: Path) -> Metadata:
    """Return the content of ``.metadata``; only the record classes of `_safe_classes` are built.

    Raises:
        InputError: the file is absent, not such a pickle, or names any other class or function.
    """
    path = folder / METADATA_FILE
    try:
        with path.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except FileNotFoundError as error:
        raise InputError(
            str(path),
            rule="a torch_dist checkpoint has a .metadata file",
            fix="give a complete checkpoint folder",
        ) from error
    except InputError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise InputError(
            str(path),
            rule=f"it must be readable checkpoint metadata ({first_line(error)})",
            fix="copy it again",
        ) from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise InputError(
            str(path),
            rule="it must hold checkpoint metadata",
            fix="give a complete checkpoint folder",
        )
    return metadata


class _Inert:
    """Stand-in for records of older Megatron versions.

    Their classes are empty by now (``core/dist_checkpointing/strategies/torch.py:86-95``, 0.19.2).
    """


_PLANNER_CLASSES = ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
_METADATA_CLASSES = (
    "Metadata",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "MetadataIndex",
    "TensorProperties",
    "_MEM_FORMAT_ENCODING",
    "StorageMeta",
)


def _safe_classes() -> dict[tuple[str, str], Any]:
    """Return every global that ``.metadata`` may name, by module and name.

    They are records, paths, sizes and dtypes: building one has no side effect.
    """
    safe: dict[tuple[str, str], Any] = {
        ("torch", "Size"): torch.Size,
        ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
        ("collections", "OrderedDict"): OrderedDict,
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): _StoragePrefix,
        **{
            ("torch.distributed.checkpoint.metadata", name): getattr(dcp, name)
            for name in _METADATA_CLASSES
        },
        **{
            ("torch.distributed.checkpoint.planner", name): getattr(planner, name)
            for name in _PLANNER_CLASSES
        },
    }
    # Python 3.13 pickles paths as pathlib._local. Pure paths: a PosixPath cannot be built on
    # Windows.
    for module in ("pathlib", "pathlib._local"):
        safe |= {
            (module, name): pathlib.PurePosixPath for name in ("PosixPath", "PurePosixPath", "Path")
        }
    for name in ("MCoreMetadata", "MCoreSavePlan"):
        safe["megatron.core.dist_checkpointing.strategies.torch", name] = _Inert
    safe |= {
        ("torch", name): value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype)
    }
    return safe


_SAFE_CLASSES = _safe_classes()


class _MetadataUnpickler(pickle.Unpickler):
    # pickle looks up every global here, before it builds or calls anything.
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _SAFE_CLASSES[module, name]
        except KeyError:
            raise InputError(
                f".metadata names {module}.{name}",
                rule=(
                    "checkpoint metadata holds plain records only; "
                    "nothing is executed from a checkpoint"
                ),
                fix="do not use this checkpoint unless its author can explain it",
            ) from None
