"""Read Hugging Face model folders: check everything first, then read tensor by tensor.

`HfFolder.open` compares config, index and every safetensors header with the architecture. It reads
no weights, and raises an InputError for the first problem. Only safetensors files are opened:
pickled weights (``*.bin``, ``*.pt``) can execute code.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch

from conversion.huggingface.format import CONFIG_FILE, dtype_name, read_json, tensor_bytes
from conversion.huggingface.headers import (
    StoredTensor,
    check_names,
    check_shapes,
    one_dtype,
    present_fused,
    read_headers,
)
from conversion.mapping import derive, huggingface_shapes
from mellum2_megatron.architecture import Mellum2Architecture, from_hf_config
from mellum2_megatron.common.errors import InputError

logger = logging.getLogger(__name__)


class HfFolder:
    """A checked Hugging Face folder of a Mellum 2 model; use as a context manager to read tensors.

    Attributes:
        path: folder.
        architecture: architecture in its config.json.
        entries: entries of the mapping table for that architecture.
        dtype: dtype of all its tensors.
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
        self.dtype = one_dtype(path, tensors)
        self.nbytes = (
            sum(math.prod(tensor.shape) for tensor in tensors.values()) * self.dtype.itemsize
        )
        self._slices = {
            released: part
            for fused in self._fused.values()
            for released, part in fused.slices.items()
        }
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
            InputError: no such folder; a missing or malformed config.json or index; a config of
                another architecture; only pickled weights; a truncated or malformed safetensors
                file; tensors missing, extra, duplicated, misshapen, or of mixed or unsupported
                dtype.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise InputError(
                str(folder), rule="it must be a folder", fix="give the Hugging Face model's folder"
            )
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
        if announced is not None and announced != dtype_name(opened.dtype):
            logger.warning(
                "%s announces dtype %s; its tensors are %s",
                folder,
                announced,
                dtype_name(opened.dtype),
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
        shape, position = stored.shape, stored.position
        # The fused tensor is [E, rows, columns], so fused[expert, rows] is one run of bytes.
        if part is not None:
            _, rows, columns = stored.shape
            shape = (part.rows.stop - part.rows.start, columns)
            position += (part.expert * rows + part.rows.start) * columns * self.dtype.itemsize
        with self._lock:
            if stored.file not in self._open:
                self._open[stored.file] = self._stack.enter_context(
                    stored.file.open("rb", buffering=0)
                )
            stream = self._open[stored.file]
        # Not memory-mapped: the pages of a whole file would count as this process's memory. Read by
        # position: threads share the open file, so none may seek. One call may read only a part
        # (man 2 preadv).
        tensor = torch.empty(shape, dtype=self.dtype)
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
        InputError: the file is missing or damaged, or describes no Mellum 2.
    """
    config = read_json(folder / CONFIG_FILE, "a Hugging Face model folder has it")
    try:
        return from_hf_config(config)
    except InputError as error:
        raise InputError(
            f"{folder / CONFIG_FILE}: {error.value}", rule=error.rule, fix=error.fix
        ) from error
