"""The dtype of each tensor of a model; some models keep routers or norms in float32 on purpose."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from conversion.huggingface.format import dtype_name, listed
from conversion.mapping import Entry
from mellum2_megatron.common.errors import InputError

_SETTLE = (
    "pass --torch-dtype float32 (exact), --keep-dtypes (each tensor as it is), "
    "or --torch-dtype bfloat16 (rounds the others)"
)


class Dtypes:
    """Dtypes of a model's tensors.

    Attributes:
        by_name: dtype of each tensor by released name.
        main: dtype of most values.
        is_uniform: True if there is one dtype.
    """

    def __init__(self, entries: Iterable[Entry], by_name: Mapping[str, torch.dtype]) -> None:
        self.by_name = by_name
        values: dict[torch.dtype, int] = {}
        for entry in entries:
            for source in entry.sources:
                dtype = by_name[source.name]
                values[dtype] = values.get(dtype, 0) + math.prod(source.shape)
        self._ordered = sorted(values, key=lambda dtype: -values[dtype])
        self.main = self._ordered[0]
        self.is_uniform = len(values) == 1

    @classmethod
    def uniform(cls, entries: Iterable[Entry], dtype: torch.dtype) -> Dtypes:
        """Return one dtype for all tensors of ``entries``."""
        entries = list(entries)
        names = (source.name for entry in entries for source in entry.sources)
        return cls(entries, dict.fromkeys(names, dtype))

    def of(self, entry: Entry) -> torch.dtype:
        """Return the dtype of an entry, whose tensors have one (`require_storable`)."""
        return self.by_name[entry.sources[0].name]

    def nbytes(self, entries: Iterable[Entry]) -> int:
        """Return the size of the entries' tensors in bytes."""
        return sum(
            math.prod(source.shape) * self.by_name[source.name].itemsize
            for entry in entries
            for source in entry.sources
        )

    @property
    def others(self) -> dict[str, str]:
        """Name of the dtype of each tensor that has not the main one, by name."""
        return {
            name: dtype_name(dtype) for name, dtype in self.by_name.items() if dtype != self.main
        }

    def __str__(self) -> str:
        return " and ".join(map(dtype_name, self._ordered))

    def rounded_by(self, dtype: torch.dtype) -> list[str]:
        """Return the names of the tensors that a conversion to ``dtype`` rounds."""
        # float32 holds every value of bfloat16 and float16.
        return [
            f"{name} ({dtype_name(stored)})"
            for name, stored in self.by_name.items()
            if dtype not in (stored, torch.float32)
        ]

    def require_uniform(self, where: object) -> None:
        """Refuse a mixture that the user has not settled.

        Raises:
            InputError: there are several dtypes; the message names tensors of the rarer ones.
        """
        if self.is_uniform:
            return
        odd = [f"{name} ({dtype})" for name, dtype in self.others.items()]
        raise InputError(
            f"{where}: {listed(odd)} beside {dtype_name(self.main)}",
            rule="one dtype for all tensors is the default",
            fix=_SETTLE,
        )

    def require_storable(self, where: object, entries: Iterable[Entry]) -> None:
        """Refuse a mixture within one of Megatron's tensors.

        Raises:
            InputError: tensors that are parts of one have different dtypes.
        """
        first: dict[str, str] = {}
        for entry in entries:
            for source in entry.sources:
                other = first.setdefault(entry.key, source.name)
                if self.by_name[source.name] != self.by_name[other]:
                    raise InputError(
                        f"{where}: {source.name} is {dtype_name(self.by_name[source.name])}, "
                        f"{other} is {dtype_name(self.by_name[other])}",
                        rule=f"both are parts of Megatron's tensor {entry.key}, "
                        "which has one dtype",
                        fix="pass --torch-dtype float32 (exact) in place of --keep-dtypes",
                    )
