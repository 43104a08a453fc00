"""Float32 arrays `[b, s, n]` on the disk, which several processes fill: logits and hidden states.

A rank writes the part that it holds, so that no process ever holds all logits. One sequence of
8,192 tokens has 3.2 GB of them.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from conversion.verification.layer_errors import layer_places
from mellum2_megatron.architecture import Mellum2Architecture, Shape
from mellum2_megatron.common.files import atomic_path, write_text

LOGITS, MTP_LOGITS = "logits", "mtp_logits"

_SHAPES_FILE = "shapes.json"
_COUNTS_FILE = "written.{writer}.json"
_CHUNK = 64 * 2**20
"""Bytes that `ScoreFolder.pack` copies at a time."""


class ScoreFolder:
    """A folder of arrays, one file each.

    Attributes:
        path: folder, which exists.
        shapes: shape `[b, s, n]` of each array by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        stored = json.loads((path / _SHAPES_FILE).read_text(encoding="utf-8"))
        self.shapes: dict[str, Shape] = {name: tuple(shape) for name, shape in stored.items()}
        self._written = dict.fromkeys(self.shapes, 0)

    @classmethod
    def create(cls, path: Path, shapes: Mapping[str, Shape]) -> ScoreFolder:
        """Create the arrays, without values, in a new folder."""
        path.mkdir(parents=True, exist_ok=True)
        for name, shape in shapes.items():
            with _array_file(path, name).open("wb") as stream:
                stream.truncate(_bytes(shape))
        write_text(path / _SHAPES_FILE, json.dumps(dict(shapes)))
        return cls(path)

    def write(
        self,
        name: str,
        row: int,
        positions: Sequence[int],
        values: torch.Tensor,
        *,
        first_column: int = 0,
    ) -> None:
        """Write a part of one sequence; processes may write other parts at the same time.

        Args:
            name: array.
            row: number of the sequence.
            positions: position in the sequence of each line of ``values``.
            values: `[len(positions), columns]`.
            first_column: column of the first value of a line, default 0.
        """
        _, length, columns = self.shapes[name]
        lines = values.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy()
        if lines.shape[0] != len(positions) or first_column + lines.shape[1] > columns:
            raise ValueError(f"{name}: {lines.shape} for {len(positions)} lines of {columns}")
        # By position in the file and not through a shared mapping: on a network disk two nodes
        # would write back each other's old bytes of a page that they share.
        descriptor = os.open(_array_file(self.path, name), os.O_WRONLY)
        try:
            for position, line in zip(positions, lines, strict=True):
                place = 4 * ((row * length + position) * columns + first_column)
                view, done = memoryview(line).cast("B"), 0
                while done < len(view):  # one call may write only a part (man 2 pwrite)
                    done += os.pwrite(descriptor, view[done:], place + done)
        finally:
            os.close(descriptor)
        self._written[name] += lines.size

    def finish(self, writer: int) -> None:
        """Store the number of values that this process has written, as number ``writer``."""
        path = self.path / _COUNTS_FILE.format(writer=writer)
        write_text(path, json.dumps(self._written))

    def arrays(self) -> dict[str, torch.Tensor]:
        """Return the complete arrays by name; they are read from the disk when they are used.

        Raises:
            RuntimeError: values are missing or were written twice, which is a programming error.
        """
        counts = [
            json.loads(path.read_text(encoding="utf-8"))
            for path in self.path.glob(_COUNTS_FILE.format(writer="*"))
        ]
        for name, shape in self.shapes.items():
            written, expected = sum(count[name] for count in counts), _bytes(shape) // 4
            if written != expected:
                raise RuntimeError(f"{name}: {written} of {expected} values were written")
        return {
            # "c": torch wants writable memory; what is written to it never reaches the file.
            name: torch.from_numpy(
                np.memmap(_array_file(self.path, name), dtype=np.float32, mode="c", shape=shape)
            )
            for name, shape in self.shapes.items()
        }

    def pack(self, out: Path) -> None:
        """Write the arrays to an `.npz` file, as `numpy.savez` would, piece by piece."""
        arrays = self.arrays()
        with atomic_path(out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for name, shape in self.shapes.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, header)
                    values = memoryview(arrays[name].numpy()).cast("B")
                    for begin in range(0, len(values), _CHUNK):
                        member.write(values[begin : begin + _CHUNK])


def score_shapes(
    architecture: Mellum2Architecture, tokens: torch.Tensor, *, hidden: bool
) -> dict[str, Shape]:
    """Return the shapes of the arrays of a model for token ids `[b, s]`.

    Args:
        architecture: the model.
        tokens: token ids.
        hidden: with the hidden states of every layer, not only the logits.
    """
    batch, length = tokens.shape
    names = [LOGITS, MTP_LOGITS] if architecture.num_mtp_layers else [LOGITS]
    shapes: dict[str, Shape] = dict.fromkeys(names, (batch, length, architecture.vocab_size))
    if hidden:
        shape = (batch, length, architecture.hidden_size)
        shapes |= dict.fromkeys(layer_places(architecture), shape)
    return shapes


def score_bytes(shapes: Mapping[str, Shape]) -> int:
    """Return the size of the arrays in bytes."""
    return sum(_bytes(shape) for shape in shapes.values())


def _array_file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '_')}.float32"


def _bytes(shape: Shape) -> int:
    return 4 * shape[0] * shape[1] * shape[2]
