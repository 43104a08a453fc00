"""Functions killed at any of the calls that change a disk, as by ``kill -9``."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

_CHANGES = frozenset(
    ("os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
)
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_KILLED = 9


def survives_kills(
    work: Callable[[Path], object],
    tmp_path: Path,
    *,
    start: Callable[[Path], object] = lambda folder: None,
    check: Callable[[Path], object] = lambda folder: None,
    again: Callable[[Path], object] | None = None,
    kills: int = 40,
    compare: Callable[[Path], dict[str, Any]] | None = None,
) -> int:
    """Kill ``work`` at each of its calls, and require what an undisturbed run leaves after a rerun.

    Args:
        work: called with a folder, which it changes; in a forked process.
        tmp_path: empty folder for the scenes.
        start: makes what is in the folder before ``work``.
        check: asserts what holds after a kill: the old result, or the complete new one.
        again: the rerun, in this process; default ``work``.
        kills: largest number of kills; of more calls it is an even sample, first and last included.
        compare: what must be as after an undisturbed run; default every path and its bytes.

    Returns:
        The number of kills.
    """
    compare = compare or contents
    whole = _scene(tmp_path / "whole", start)
    calls = _forked(lambda: work(whole), kill_at=None)
    expected = compare(whole)
    kills = min(kills, calls)
    numbers = [index * (calls - 1) // (kills - 1) for index in range(kills)]
    for number in numbers:
        folder = _scene(tmp_path / f"killed-{number}", start)
        _forked(lambda folder=folder: work(folder), kill_at=number)
        try:
            check(folder)
            (again or work)(folder)
            found = compare(folder)
            assert found.keys() == expected.keys()
            assert [name for name in found if found[name] != expected[name]] == []
        except BaseException as error:
            error.add_note(f"killed at call {number} of {calls}")
            raise
    return len(numbers)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return the bytes of every file below a folder; None for a folder."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def forked(function: Callable[[], object]) -> int:
    """Run a function in a forked process; return its exit code: 1 after an exception."""
    child = os.fork()
    if child == 0:
        _run(function, lambda: 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _scene(folder: Path, start: Callable[[Path], object]) -> Path:
    folder.mkdir(parents=True)
    start(folder)
    return folder


def _forked(function: Callable[[], object], *, kill_at: int | None) -> int:
    """Run a function in a forked process, killed at a call; return the number of calls until then.

    Args:
        function: what to run.
        kill_at: number of the call, from 0, that does not happen any more; None: it ends by itself.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event in _CHANGES or (event == "open" and _writes(*arguments)):
                changing()

        def changing() -> None:
            nonlocal count
            if count == kill_at:
                os._exit(_KILLED)
            count += 1

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def inner(*arguments: Any) -> Any:
                changing()
                return call(*arguments)

            return inner

        _before_hook()
        # Seen by every module, and by calls of C code; these two it does not report.
        sys.addaudithook(hook)
        os.fsync = counted(os.fsync)
        from mellum2_megatron.common import files

        files.exchange = counted(files.exchange)
        _run(function, lambda: os.write(write, json.dumps(count).encode()))
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        text = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (0 if kill_at is None else _KILLED), f"exit code {code}, kill at {kill_at}"
    return kill_at if kill_at is not None else int(json.loads(text))


def _before_hook() -> None:
    sys.dont_write_bytecode = True
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)  # a forked process has none of its parent's threads


def _run(function: Callable[[], object], end: Callable[[], object]) -> NoReturn:
    code = 1
    try:
        function()
        end()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _writes(path: object, mode: object, flags: object) -> bool:
    # The pseudo file systems hold no results.
    if isinstance(path, str) and path.startswith(("/dev/", "/proc/")):
        return False
    return isinstance(path, (str, bytes)) and isinstance(flags, int) and bool(flags & _WRITE_FLAGS)
