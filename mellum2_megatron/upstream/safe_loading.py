"""Checkpoints loaded without executing anything from them; see `checkpoint.safe_metadata`.

torch's own loader unpickles ``.metadata`` and every stored object without limits. Whoever can write
a checkpoint could then run a program in the process that loads it.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.common.files import read_bytes


def read_records(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``FileSystemReader.read_metadata``."""

    @functools.wraps(original)
    def read_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        from torch.distributed.checkpoint.metadata import StorageMeta

        from mellum2_megatron.checkpoint.safe_metadata import LARGEST, check_links, parse_metadata

        path = self._get_metadata_path(kwargs.get("rank"))
        metadata = parse_metadata(read_bytes(Path(path), largest=LARGEST), str(path))
        check_links(Path(path).parent, metadata)
        # As the original does.
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]  # set above
        return metadata

    return read_metadata


def load_plain_objects(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``DefaultLoadPlanner.load_bytes``: only objects of Megatron's `SAFE_GLOBALS`."""

    @functools.wraps(original)
    def load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
        import torch
        from megatron.core.safe_globals import SAFE_GLOBALS
        from torch.distributed.checkpoint._traverse import set_element

        name = read_item.dest_index.fqn
        try:
            with torch.serialization.safe_globals(SAFE_GLOBALS):
                loaded = torch.load(value, weights_only=True)
        except Exception as error:  # a damaged pickle raises nearly anything
            raise InputError(
                f"checkpoint object {name}",
                rule=f"it must hold plain values ({_reason(error)}); nothing is executed from a "
                "checkpoint",
                fix="do not use this checkpoint unless its author can explain it",
            ) from error
        # Not through the original, which unpickles without limits.
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded

    return load_bytes


def _reason(error: Exception) -> str:
    """Return the class that was refused; torch's own message has thirty lines of advice."""
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"it names {refused[1]}" if refused else first_line(error)[:200]
