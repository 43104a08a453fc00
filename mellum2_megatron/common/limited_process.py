"""Work on a stranger's file in a process of its own, with limits of time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mellum2_megatron.common.json_files import JsonError, parse_object

SECONDS = 30
"""Processor time of the process, imports included."""

_WALL_SECONDS = 180  # a login node may be busy
_MEMORY = 4 << 30  # bytes of address space


_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}


class LimitError(Exception):
    """A process that failed or passed a limit; the message is the reason, in one line."""


def run_limited(
    script: Path, job: Mapping[str, Any], *, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run a Python script on a job, and return its answer.

    The process gets `SECONDS` of processor time, 4 GiB of memory and three minutes.

    Args:
        script: it reads the job as JSON from its standard input and writes its answer, a JSON
            object, to its standard output.
        job: plain values.
        environment: variables to add; default none.

    Raises:
        LimitError: it passed a limit, ended with an error, or gave no JSON object.
    """
    # -P: the script's folder is no place for imports.
    with subprocess.Popen(
        [sys.executable, "-P", str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Each thread of a pool reserves memory, and a large machine has hundreds.
        env={**os.environ, **_ONE_THREAD, **(environment or {})},
    ) as process:
        # It waits for its job, so the limits come first. Only Linux can limit another process.
        if sys.platform == "linux":
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_AS, (_MEMORY, _MEMORY))
                resource.prlimit(process.pid, resource.RLIMIT_CPU, (SECONDS, SECONDS))
                resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
        try:
            answer, _ = process.communicate(json.dumps(job).encode(), timeout=_WALL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise LimitError(f"it takes longer than {_WALL_SECONDS} s") from None
    if process.returncode:
        raise LimitError(
            f"it takes more than {SECONDS} s or {_MEMORY >> 30} GiB (exit code "
            f"{process.returncode})"
        )
    try:
        return parse_object(answer)
    except JsonError as error:
        raise LimitError(f"it gives no answer ({error})") from None
