"""Read Hugging Face model folders: check everything first, then read tensor by tensor.

`HfFolder.open` compares config, index and every safetensors header with the architecture. It reads
no weights, and raises an InputError for the first problem. Only safetensors files are opened:
pickled weights (``*.bin``, ``*.pt``) can execute code.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch

from conversion.huggingface.dtypes import Dtypes
from conversion.huggingface.format import CONFIG_FILE, dtype_name, read_json, tensor_bytes
from conversion.huggingface.headers import (
    StoredTensor,
    check_names,
    check_shapes,
    present_fused,
    read_headers,
    stored_dtypes,
)
from conversion.mapping import derive, huggingface_shapes
from mellum2_megatron.architecture import Mellum2Architecture, from_hf_config
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.model_folders import not_huggingface, refuse_lfs_pointers

logger = logging.getLogger(__name__)


class HfFolder:
    """A checked Hugging Face folder of a Mellum 2 model; use as a context manager to read tensors.

    Attributes:
        path: folder.
        architecture: architecture in its config.json.
        entries: entries of the mapping table for that architecture.
        dtypes: dtype of each of its tensors.
        nbytes: size of all its tensors, bytes.
    """

    def __init__(
        self, path: Path, architecture: Mellum2Architecture, tensors: dict[str, StoredTensor]
    ) -> None:
        self.path = path
        self.architecture = architecture
        self.entries = derive(architecture)
        self._tensors = tensors
        self._fused = present_fused(architecture, tensors)
        check_names(path, self.entries, tensors, self._fused, architecture)
        check_shapes(path, huggingface_shapes(self.entries), tensors, self._fused)
        stored = stored_dtypes(path, tensors)
        self._slices = {
            released: part
            for fused in self._fused.values()
            for released, part in fused.slices.items()
        }
        # A part of a fused tensor has its dtype.
        released_dtypes = {released: stored[part.name] for released, part in self._slices.items()}
        self.dtypes = Dtypes(self.entries, stored | released_dtypes)
        self.nbytes = self.dtypes.nbytes(self.entries)
        self._stack = ExitStack()
        self._open: dict[Path, BinaryIO] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, lost_mtp: bool = False) -> HfFolder:
        """Check the folder at ``path`` and return it.

        Args:
            path: a Hugging Face model folder.
            lost_mtp: read it as a model without MTP head even if its config.json announces one, and
                refuse a folder that has one; default False.

        Raises:
            InputError: no Hugging Face folder (the message names what it is, and the command that
                converts a Megatron checkpoint); a malformed config.json or index; a config of
                another architecture; only pickled weights; a truncated or malformed safetensors
                file; tensors missing, extra, duplicated, misshapen, or of an unsupported dtype.
        """
        folder = Path(path)
        # All at once, because a clone without Git LFS has pointers for weights and tokenizer alike.
        refuse_lfs_pointers(sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]))
        architecture, tensors = read_config(folder), read_headers(folder)
        if lost_mtp:
            architecture = architecture.replace(num_mtp_layers=0)
            if any(name.startswith("mtp.") for name in tensors):
                raise InputError(
                    f"{folder} has an MTP head",
                    rule="only a lost one is put back",
                    fix="use it as it is",
                )
        opened = cls(folder, architecture, tensors)
        # The tensors' dtype counts: a config is edited by hand more often than weights are.
        config = read_json(folder / CONFIG_FILE, "it was just there")
        announced = config.get("dtype", config.get("torch_dtype"))
        if announced is not None and announced != dtype_name(opened.dtypes.main):
            logger.warning(
                "%s announces dtype %s; its tensors are %s", folder, announced, opened.dtypes
            )
        return opened

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor of released name ``name``, in memory of its own.

        An expert's tensor may be a part of a fused one. Any thread may call this.

        Raises:
            InputError: the file has shrunk since it was opened.
        """
        part = self._slices.get(name)
        stored = self._tensors[part.name if part is not None else name]
        shape, position, dtype = stored.shape, stored.position, self.dtypes.by_name[name]
        # The fused tensor is [E, rows, columns], so fused[expert, rows] is one run of bytes.
        if part is not None:
            _, rows, columns = stored.shape
            shape = (part.rows.stop - part.rows.start, columns)
            position += (part.expert * rows + part.rows.start) * columns * dtype.itemsize
        with self._lock:
            if stored.file not in self._open:
                self._open[stored.file] = self._stack.enter_context(
                    stored.file.open("rb", buffering=0)
                )
            stream = self._open[stored.file]
        # Not memory-mapped: the pages of a whole file would count as this process's memory. Read by
        # position: threads share the open file, so none may seek. One call may read only a part
        # (man 2 preadv).
        tensor = torch.empty(shape, dtype=dtype)
        view, done = tensor_bytes(tensor), 0
        while done < len(view):
            count = os.preadv(stream.fileno(), [view[done:]], position + done)
            if not count:
                raise InputError(
                    stream.name,
                    rule="it must not shrink while it is read",
                    fix="convert a copy of it",
                )
            done += count
        return tensor

    @property
    def files(self) -> list[Path]:
        """config.json and the files of the weights, sorted."""
        return sorted(
            {self.path / CONFIG_FILE, *(tensor.file for tensor in self._tensors.values())}
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.clear()
        self._stack.close()


def read_config(folder: Path) -> Mellum2Architecture:
    """Return the architecture in ``folder/config.json``.

    Raises:
        InputError: the folder is no Hugging Face model, or its config.json is damaged or describes
            no Mellum 2.
    """
    if (refusal := not_huggingface(folder)) is not None:
        raise refusal
    config = read_json(folder / CONFIG_FILE, "a Hugging Face model folder has it")
    try:
        return from_hf_config(config)
    except InputError as error:
        raise InputError(
            f"{folder / CONFIG_FILE}: {error.value}", rule=error.rule, fix=error.fix
        ) from error
