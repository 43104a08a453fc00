"""Python files of the user's own, executed: recipes, and studies of ablations."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from mellum2_megatron.common.errors import InputError, first_line


def execute_file(path: Path, kind: str) -> tuple[ModuleType, bytes]:
    """Execute a file; return it as a module, and its content.

    Args:
        path: the file; modules beside it can be imported by it.
        kind: its kind with an article, for messages, such as ``a file of recipes``.

    Raises:
        InputError: there is no such file, or it fails; the message has the failing line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            str(path),
            rule=f"{kind} must be readable ({error.strerror})",
            fix="name a .py file",
        ) from None
    # Not through importlib: it would write __pycache__ beside the file, and hash another read.
    module = ModuleType(f"own_file_{path.stem}")
    module.__file__ = str(path.absolute())
    sys.modules[module.__name__] = module  # dataclasses look their module up
    with errors_of_file(path, kind):
        exec(compile(content, str(path), "exec", dont_inherit=True), vars(module))
    return module, content


@contextmanager
def errors_of_file(path: Path, kind: str) -> Iterator[None]:
    """Run code of a user's file: import what lies beside it, turn any exception into one message.

    The message has the last line of the file that the exception passed through.
    """
    folder = str(path.absolute().parent)
    # Last, so that a file called like a package (`torch.py`) does not hide that package.
    sys.path.append(folder)
    try:
        yield
    except InputError as error:
        # A value that a Run or a Study refuses: the message is complete but for the line.
        raise InputError(
            f"{_line(error, path)}: {error.value}", rule=error.rule, fix=error.fix
        ) from None
    except SyntaxError as error:
        raise InputError(
            f"{error.filename}:{error.lineno}",
            rule=f"it must be Python ({error.msg})",
            fix="correct that line",
        ) from None
    except (Exception, SystemExit) as error:
        raise InputError(
            _line(error, path),
            rule=f"{kind} must run ({type(error).__name__}: {first_line(error)})",
            fix="correct that line",
        ) from None
    finally:
        sys.path.remove(folder)


def _line(error: BaseException, path: Path) -> str:
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    return f"{path}:{lines[-1]}" if lines else str(path)
