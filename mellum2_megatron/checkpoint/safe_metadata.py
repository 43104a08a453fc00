"""Reads a checkpoint's ``.metadata`` pickle without executing anything from it.

A pickle is a program: it may call any function it names, and set any attribute of what it has
built. Here an interpreter of its own runs it (`_Records`), which knows the few operations that
checkpoints need. It builds only the records of `_table`, calls nothing else, and sets only the
fields that a record has. Python's C unpickler with a list of allowed names is not enough: with
``BUILD`` a file can change the objects and classes that it was allowed to name.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint import planner

# Private classes of torch 2.15, which the pickle of every checkpoint names.
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata

from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.common.files import read_bytes
from mellum2_megatron.common.model_folders import check_inside

METADATA_FILE = ".metadata"

LARGEST = 1 << 30
"""Bytes of the largest file that is read; those of a 12B model on 256 ranks have some 10 MB."""


def read_metadata(folder: Path) -> Metadata:
    """Return the content of ``.metadata`` of a checkpoint folder; see `parse_metadata`."""
    path = folder / METADATA_FILE
    try:
        check_inside(folder, path)
        data = read_bytes(path, largest=LARGEST)
    except OSError as error:
        rule = "a torch_dist checkpoint has a .metadata file"
        if not isinstance(error, FileNotFoundError):
            rule += f" ({first_line(error)})"
        raise InputError(str(path), rule=rule, fix="give a complete checkpoint folder") from error
    metadata = parse_metadata(data, str(path))
    check_links(folder, metadata)
    return metadata


def check_links(folder: Path, metadata: Metadata) -> None:
    """Check that the files of a checkpoint's tensors are no links out of its folder.

    Raises:
        InputError: one is.
    """
    for name in sorted({info.relative_path for info in metadata.storage_data.values()}):
        check_inside(folder, folder / name)


def parse_metadata(data: bytes, name: str) -> Metadata:
    """Return checkpoint metadata from its bytes.

    Args:
        data: the pickle.
        name: name of the file, for messages.

    Raises:
        InputError: not such a pickle, or it names something else, sets another field, or uses an
            operation that no checkpoint needs.
    """
    try:
        metadata = _Records(io.BytesIO(data)).load()
    except UnexpectedError as error:
        raise InputError(
            f"{name} {error}",
            rule="checkpoint metadata holds plain records only; nothing is executed from a "
            "checkpoint",
            fix="do not use this checkpoint unless its author can explain it",
        ) from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise InputError(
            name,
            rule=f"it must be readable checkpoint metadata ({first_line(error)})",
            fix="copy it again",
        ) from error
    if (
        not isinstance(metadata, Metadata)
        or not isinstance(getattr(metadata, "storage_data", None), dict)
        or not isinstance(getattr(metadata, "state_dict_metadata", None), dict)
    ):
        raise InputError(
            name, rule="it must hold checkpoint metadata", fix="give a complete checkpoint folder"
        )
    for info in metadata.storage_data.values():
        file = getattr(info, "relative_path", None)
        # Otherwise a checkpoint could name any file of the machine.
        if not isinstance(file, str) or not file or PurePosixPath(file).name != file:
            raise InputError(
                f"{name} places a tensor in {file!r}",
                rule="tensors lie in files of the checkpoint's own folder",
                fix="do not use this checkpoint unless its author can explain it",
            )
    return metadata


class UnexpectedError(Exception):
    """An operation, a name or a field that no checkpoint needs."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Named:
    """A name of the table on the interpreter's stack; never the class or function itself.

    Attributes:
        name: full name, for messages.
        call: function for arguments given at once; None: not callable.
        record: class that is built empty and then filled; None: not so built.
    """

    name: str
    call: Callable[..., Any] | None = None
    record: type | None = None


class _Old:
    """Record of an older Megatron version; its fields are dropped.

    These classes are empty by now (core/dist_checkpointing/strategies/torch.py:86, 0.19.2).
    """


def _size(items: Any) -> torch.Size:
    if not isinstance(items, (tuple, list)) or not all(type(item) is int for item in items):
        raise UnexpectedError("holds a size that is no list of whole numbers")
    return torch.Size(items)


def _path(*parts: Any) -> PurePosixPath:
    # Pure paths: a PosixPath cannot be built on Windows.
    if not all(type(part) is str for part in parts):
        raise UnexpectedError("holds a path that is no text")
    return PurePosixPath(*parts)


def _layout(name: Any) -> torch.layout:
    layout = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(layout, torch.layout):
        raise UnexpectedError(f"holds the layout {name!r}")
    return layout


@cache
def _table() -> dict[tuple[str, str], Any]:
    """Return all that ``.metadata`` may name, by module and name."""
    filesystem = "torch.distributed.checkpoint.filesystem"
    records = {
        (filesystem, "_StorageInfo"): _StorageInfo,
        (filesystem, "_StoragePrefix"): _StoragePrefix,
        **{
            (dcp.__name__, name): getattr(dcp, name)
            for name in (
                "Metadata",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "MetadataIndex",
                "TensorProperties",
                "StorageMeta",
            )
        },
        **{
            (planner.__name__, name): getattr(planner, name)
            for name in ("SavePlan", "WriteItem", "TensorWriteData", "BytesIOWriteData")
        },
        **{
            ("megatron.core.dist_checkpointing.strategies.torch", name): _Old
            for name in ("MCoreMetadata", "MCoreSavePlan")
        },
    }
    calls: dict[tuple[str, str], Callable[..., Any]] = {
        ("torch", "Size"): _size,
        ("torch.serialization", "_get_layout"): _layout,
        ("collections", "OrderedDict"): dict,
        (dcp.__name__, "_MEM_FORMAT_ENCODING"): dcp._MEM_FORMAT_ENCODING,
        (planner.__name__, "WriteItemType"): planner.WriteItemType,
    }
    # Python 3.13 pickles paths as pathlib._local.
    for module in ("pathlib", "pathlib._local"):
        calls |= {(module, name): _path for name in ("PosixPath", "PurePosixPath", "Path")}
    table: dict[tuple[str, str], Any] = {
        ("torch", name): value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype)
    }
    table |= {key: _Named(".".join(key), record=record) for key, record in records.items()}
    table |= {key: _Named(".".join(key), call=call) for key, call in calls.items()}
    return table


_OPERATIONS = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES EMPTY_LIST EMPTY_TUPLE EMPTY_DICT APPEND APPENDS "
    "SETITEM SETITEMS TUPLE TUPLE1 TUPLE2 TUPLE3 BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE "
    "GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD"
).split()
"""Operations of pickle protocols 2 to 5 that checkpoints use."""


_FURTHER: dict[type, set[str]] = {Metadata: {"all_local_plans", "mcore_data"}}
"""Attributes that Megatron adds to a record (strategies/torch.py:803, 1014, 0.19.2)."""


class _Records(pickle._Unpickler):
    """Interpreter of checkpoint metadata, on the base of Python's own in Python.

    Its memo is a dictionary and it reads from memory, so a file cannot ask for more memory than a
    multiple of its own size. It does not recurse.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
        for name in _OPERATIONS
    }

    def load(self) -> Any:
        """Return the one object of the file."""
        try:
            return super().load()
        except KeyError as error:
            if error.args and type(error.args[0]) is int:  # an operation without an entry
                raise UnexpectedError(f"uses pickle operation {error.args[0]}") from None
            raise

    def find_class(self, module: str, name: str) -> Any:
        """Return the table's entry of a name."""
        try:
            return _table()[module, name]
        except (KeyError, TypeError):
            raise UnexpectedError(f"names {module}.{name}") from None

    def load_reduce(self) -> None:
        """Call an entry of the table with arguments."""
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, _Named) or function.call is None:
            raise UnexpectedError(f"calls {_shown(function)}")
        if type(arguments) is not tuple:
            raise UnexpectedError(f"calls {function.name} without a list of arguments")
        if not all(_is_plain(argument) for argument in arguments):
            raise UnexpectedError(f"calls {function.name} with nested values")
        self.stack[-1] = function.call(*arguments)

    def load_newobj(self) -> None:
        """Put an empty record on the stack."""
        arguments = self.stack.pop()
        entry = self.stack[-1]
        if not isinstance(entry, _Named) or entry.record is None or arguments != ():
            raise UnexpectedError(f"builds {_shown(entry)}")
        self.stack[-1] = object.__new__(entry.record)

    def load_build(self) -> None:
        """Fill a record with its fields."""
        state = self.stack.pop()
        record = self.stack[-1]
        kind = type(record)
        if not any(kind is getattr(entry, "record", None) for entry in _table().values()):
            raise UnexpectedError(f"sets fields of {_shown(record)}")
        if kind is _Old:
            return
        if kind is dcp.TensorProperties:
            # The only record that gives its state as a list, of plain values.
            if type(state) is not tuple or not 5 <= len(state) <= 6:
                raise UnexpectedError("sets the properties of a tensor to something else")
            record.__setstate__(state)
            return
        known = {field.name for field in dataclasses.fields(kind)} | _FURTHER.get(kind, set())
        if type(state) is not dict:
            raise UnexpectedError(f"fills a {kind.__name__} from {_shown(state)}")
        if not state.keys() <= known:
            names = ", ".join(sorted(str(name)[:40] for name in state.keys() - known))
            raise UnexpectedError(f"sets {names} of {kind.__name__}")
        # A key of dictionaries, so its fields are hashed.
        if kind is dcp.MetadataIndex and not all(map(_is_plain, state.values())):
            raise UnexpectedError("fills a MetadataIndex with nested values")
        for name, value in state.items():
            object.__setattr__(record, name, value)

    def load_setitem(self) -> None:
        """Put one pair into a dictionary."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        """Put the pairs since the last mark into a dictionary."""
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise UnexpectedError(f"puts items into {_shown(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not dcp.MetadataIndex and not _is_plain(key):
                raise UnexpectedError(f"has {_shown(key)} as a key")
            target[key] = value

    dispatch |= {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
    }


def _is_plain(value: Any) -> bool:
    """Return True for a value that hashing and comparing walk through in one step.

    Python's hash of a tuple recurses without a limit: a million nested ones end the process.
    """
    simple = (str, int, bool, type(None))
    if isinstance(value, tuple | list):
        return all(type(part) in simple for part in value)
    return type(value) in simple


def _shown(value: Any) -> str:
    """Return a short text for a message; a value from a file may be of any size."""
    return value.name if isinstance(value, _Named) else f"a {type(value).__name__}"
