"""A checkpoint's pickles build records and nothing else, in little time and memory."""

from __future__ import annotations

import contextlib
import os
import pathlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from mellum2_megatron.checkpoint.safe_metadata import parse_metadata
from mellum2_megatron.common.errors import InputError


def small_metadata(**changes: Any) -> dcp.Metadata:
    """Return the metadata of one tensor and one object, as torch and Megatron fill it."""
    size = torch.Size([4, 2])
    tensor = dcp.TensorStorageMetadata(
        dcp.TensorProperties(dtype=torch.bfloat16, strides=(2, 1)),
        size,
        [dcp.ChunkStorageMetadata(torch.Size([0, 0]), size)],
    )
    metadata = dcp.Metadata(
        state_dict_metadata={"w": tensor, "o": dcp.BytesStorageMetadata()},
        planner_data={"w": ("a", 0)},
        storage_data={
            dcp.MetadataIndex("w", torch.Size([0, 0]), 0): _StorageInfo("__0_0.distcp", 0, 9),
            dcp.MetadataIndex("o"): _StorageInfo("__0_0.distcp", 9, 5),
        },
        storage_meta=dcp.StorageMeta(checkpoint_id=pathlib.Path("x/y")),
    )
    metadata.mcore_data = {"w": {"nd_reformulated_orig_global_shape": (4, 2)}}  # type: ignore[attr-defined]
    for name, value in changes.items():
        setattr(metadata, name, value)
    return metadata


def load(data: bytes) -> dcp.Metadata:
    return parse_metadata(data, "x/.metadata")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_metadata_is_that_of_pickle(protocol: int) -> None:
    metadata = small_metadata()
    read = load(pickle.dumps(metadata, protocol=protocol))
    assert str(read.storage_meta.checkpoint_id) == "x/y"  # type: ignore[union-attr]
    read.storage_meta.checkpoint_id = pathlib.Path("x/y")  # type: ignore[union-attr]
    assert vars(read) == vars(metadata)


def test_metadata_of_older_versions_has_defaults() -> None:
    metadata = small_metadata()
    del metadata.__dict__["version"], metadata.__dict__["storage_meta"]
    read = load(pickle.dumps(metadata))
    assert (read.version, read.storage_meta) == (None, None)


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.parts = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


class Changed:
    """Pickles as a record of an allowed class with a state of the attacker's."""

    def __init__(self, make: Callable[..., Any], arguments: tuple[Any, ...], state: Any) -> None:
        self.parts = make, arguments, state

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


HEAD = b"\x80\x04"


def metadata_with(code: bytes) -> bytes:
    """Return the pickle of metadata whose `planner_data` is made by the given instructions."""
    name = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    needed = b"\x8c\x13state_dict_metadata}s\x8c\x0cstorage_data}s"
    return HEAD + name + b")\x81}" + needed + b"\x8c\x0cplanner_data" + code + b"sb."


def test_the_attacks_are_refused_for_their_own_part() -> None:
    assert load(metadata_with(b"K\x07")).planner_data == 7


ATTACKS: dict[str, Callable[[Path], bytes]] = {
    "call": lambda marker: pickle.dumps(small_metadata(planner_data=Call(os.mkdir, str(marker)))),
    "eval": lambda marker: pickle.dumps(
        small_metadata(planner_data=Call(eval, f"__import__('os').mkdir({str(marker)!r})"))
    ),
    "getattr": lambda _: pickle.dumps(small_metadata(planner_data=Call(getattr, dict, "keys"))),
    "path-state": lambda _: pickle.dumps(
        small_metadata(
            planner_data=Changed(pathlib.PurePosixPath, ("a",), (None, {"_str": "/etc"}))
        )
    ),
    "class-state": lambda _: metadata_with(
        b"cpathlib\nPurePosixPath\nN}\x8c\x04_strX\x01\x00\x00\x00xs\x86b"
    ),
    "dotted": lambda _: metadata_with(b"\x8c\x05torch\x8c\x14serialization.os.sys\x93"),
    "module-of-class": lambda _: metadata_with(b"ctorch.distributed.checkpoint.metadata\nos\n"),
    "unknown-field": lambda _: pickle.dumps(small_metadata(__reduce__=1)),
    "layout-by-name": lambda _: metadata_with(
        b"ctorch.serialization\n_get_layout\n\x8c\x0etorch.distrib.\x85R"
    ),
    "no-fields": lambda _: HEAD + b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81.",
    "late-content": lambda _: metadata_with(b"]\x940h\x00K\x01a"),
    "persistent-id": lambda _: metadata_with(b"Px\n"),
    "extension": lambda _: metadata_with(b"\x82\x01"),
    "huge-bytes": lambda _: metadata_with(b"\x96" + struct.pack("<Q", 2**60)),
    "huge-text": lambda _: metadata_with(b"\x8d" + struct.pack("<Q", 2**60)),
    "huge-number": lambda _: metadata_with(b"\x8b" + struct.pack("<i", 2**30) + b"1" * 99),
    "digits": lambda _: metadata_with(b"I" + b"9" * 100_000 + b"\n"),
    "deep-key": lambda _: metadata_with(b"})" + b"\x85" * 1_000_000 + b"Ns"),
    "deep-index": lambda _: metadata_with(
        b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n)\x81}\x8c\x03fqn)"
        + b"\x85" * 1_000_000
        + b"sb"
    ),
    "deep-argument": lambda _: metadata_with(
        b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n)"
        + b"\x85" * 1_000_000
        + b"R"
    ),
    "list-key": lambda _: metadata_with(b"}]Ns"),
    "empty": lambda _: b"",
    "short": lambda _: pickle.dumps(small_metadata())[:-9],
    "text": lambda _: b"not a pickle",
    "other": lambda _: pickle.dumps({"a": 1}),
    "two-values": lambda _: HEAD + b"NN.",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_pickle_is_refused(attack: str, tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    data = ATTACKS[attack](marker)
    with pytest.raises(InputError) as caught:
        load(data)
    assert "x/.metadata" in str(caught.value)
    assert " Fix: " in str(caught.value)
    assert not marker.exists()


def test_every_prefix_and_changed_byte_is_read_or_refused() -> None:
    data = pickle.dumps(small_metadata())
    for place in range(0, len(data), 3):
        flipped = data[:place] + bytes([data[place] ^ 0x15]) + data[place + 1 :]
        for changed in (data[:place], flipped):
            with contextlib.suppress(InputError):
                load(changed)
