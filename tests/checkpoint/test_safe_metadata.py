"""``.metadata`` read as records: equal to pickle's reading, and nothing else can happen."""

import io
import pickle
import struct
import time
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from mellum2_megatron.checkpoint.safe_metadata import parse_metadata, read_metadata
from mellum2_megatron.common.errors import InputError


def example() -> Metadata:
    """Metadata with every record, as torch's and Megatron's writers make it."""
    index = MetadataIndex("w", torch.Size([0, 2]), 1)
    metadata = Metadata(
        state_dict_metadata={
            "w": dcp.TensorStorageMetadata(
                properties=dcp.TensorProperties(dtype=torch.bfloat16, strides=(3, 1)),
                size=torch.Size([4, 3]),
                chunks=[
                    dcp.ChunkStorageMetadata(offsets=torch.Size([0, 2]), sizes=torch.Size([4, 1]))
                ],
            ),
            "rng": dcp.BytesStorageMetadata(),
        },
        planner_data={"w": ("w",), "paths": [PurePosixPath("a/b")]},
        storage_data={index: _StorageInfo(relative_path="__0_0.distcp", offset=0, length=9)},
        storage_meta=dcp.StorageMeta(checkpoint_id="/x/y", save_id="1"),
    )
    metadata.all_local_plans = [
        SavePlan(
            items=[WriteItem(index=index, type=WriteItemType.TENSOR)],
            storage_data=_StoragePrefix("__0_"),
            planner_data=None,
        )
    ]
    return metadata


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_equal_to_pickles_reading(protocol: int) -> None:
    data = pickle.dumps(example(), protocol)
    read, trusted = parse_metadata(data, "x"), pickle.loads(data)
    assert read == trusted
    assert vars(read).keys() == vars(trusted).keys()
    assert read.all_local_plans == trusted.all_local_plans
    properties = read.state_dict_metadata["w"].properties
    assert (properties.dtype, properties.strides) == (torch.bfloat16, (3, 1))
    assert type(properties) is dcp.TensorProperties
    assert type(next(iter(read.storage_data))) is MetadataIndex


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def with_planner_data(value: Any) -> bytes:
    metadata = example()
    metadata.planner_data = value
    return pickle.dumps(metadata)


def test_nothing_is_called(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for function, arguments in (
        (open, (str(marker), "w")),
        (eval, (f"open({str(marker)!r}, 'w')",)),
        (getattr, (marker, "touch")),
        (torch.load, (str(marker),)),
    ):
        with pytest.raises(InputError, match="nothing is executed from a checkpoint"):
            parse_metadata(with_planner_data(Calls(function, *arguments)), "x")
    assert not marker.exists()


def program(*operations: bytes) -> bytes:
    return b"\x80\x04" + b"".join(operations) + b"."


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


EMPTY, DICT, NEWOBJ, BUILD, REDUCE, NONE = b")", b"}", b"\x81", b"b", b"R", b"N"
INDEX = named("torch.distributed.checkpoint.metadata", "MetadataIndex")
# {name: value} as the second of a pair, which pickle sets as attributes one by one.
SLOTS = NONE + DICT + text("_str") + text("/etc/passwd") + b"s" + b"\x86"


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        ((named("pathlib", "PurePosixPath"), text("a"), b"\x85", REDUCE, SLOTS, BUILD),
         "sets fields of a PurePosixPath"),
        ((INDEX, SLOTS, BUILD), "sets fields of torch.distributed"),
        ((INDEX, EMPTY, NEWOBJ, SLOTS, BUILD), "fills a MetadataIndex from a tuple"),
        ((INDEX, EMPTY, NEWOBJ, DICT, text("__class__"), NONE, b"s", BUILD),
         "sets __class__ of MetadataIndex"),
        ((named("torch.serialization", "_get_layout"), SLOTS, BUILD), "sets fields of torch."),
        ((named("torch", "bfloat16"), SLOTS, BUILD), "sets fields of a dtype"),
        ((INDEX, EMPTY, REDUCE), "calls torch.distributed.checkpoint.metadata.MetadataIndex"),
        ((named("torch", "Size"), EMPTY, NEWOBJ), "builds torch.Size"),
        ((named("torch", "Size"), text("ab"), b"\x85", REDUCE), "holds a size"),
        ((named("torch.serialization", "_get_layout"), text("torch.load"), b"\x85", REDUCE),
         "holds the layout"),
        ((named("torch.distributed.checkpoint.metadata", "torch.load"),), "names torch.distri"),
        ((named("os", "system"),), "names os.system"),
        ((b"cos\nsystem\n",), "names os.system"),
        ((text("x"), b"Q"), "uses pickle operation"),  # a persistent id
        ((b"\x82\x01",), "uses pickle operation"),  # the extension registry
        ((b"\x96" + struct.pack("<Q", 1 << 60),), "uses pickle operation"),  # a bytearray
        ((b"\x8b" + struct.pack("<I", 1 << 30),), "uses pickle operation"),  # a long integer
        ((b"\x8d" + struct.pack("<Q", 1 << 60),), "uses pickle operation"),  # a long text
    ],
)  # fmt: skip
def test_programs_are_refused(operations: tuple[bytes, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_metadata(program(*operations), "x")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        b"\x80\x04X\xff\xff\xff\x7f",  # 2 GB of text that are not there
        b"\x80\x04N" + b"r\xff\xff\xff\xff" + b".",  # place 4,294,967,295 of the memo
        b"\x80\x04" + b"(" * 200_000 + b".",
        b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",  # lists in lists
        pickle.dumps({"a": 1}),
        pickle.dumps(None),
    ],
)
def test_damage_and_bombs_give_one_message(data: bytes) -> None:
    began = time.monotonic()
    with pytest.raises(InputError):
        parse_metadata(data, "x")
    assert time.monotonic() - began < 30


def test_every_cut_gives_one_message() -> None:
    data = pickle.dumps(example())
    for end in range(0, len(data) - 1, 7):
        with pytest.raises(InputError):
            parse_metadata(data[:end], "x")


@pytest.mark.parametrize("place", ["/etc/passwd", "../other/__0_0.distcp", "a/b", "", None, 3])
def test_tensors_lie_in_the_folder_itself(place: Any) -> None:
    metadata = example()
    metadata.storage_data = {MetadataIndex("w"): _StorageInfo(place, 0, 9)}
    with pytest.raises(InputError, match="own folder"):
        parse_metadata(pickle.dumps(metadata), "x")


def test_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a torch_dist checkpoint has a"):
        read_metadata(tmp_path)
    (tmp_path / ".metadata").mkdir()
    with pytest.raises(InputError, match=r"\.metadata: a torch_dist checkpoint has"):
        read_metadata(tmp_path)
    (tmp_path / ".metadata").rmdir()
    stream = io.BytesIO()
    pickle.dump(example(), stream)
    (tmp_path / ".metadata").write_bytes(stream.getvalue())
    assert read_metadata(tmp_path) == example()
    with (tmp_path / ".metadata").open("wb") as sparse:
        sparse.truncate((1 << 30) + 1)
    with pytest.raises(InputError, match=r"larger than 1,073,741,824 bytes"):
        read_metadata(tmp_path)
