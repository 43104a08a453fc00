"""Programs of a model, run where they can do no harm: the choice of the sandbox, and its trial.

What keeps a program in is bubblewrap, or where user namespaces are forbidden Apptainer; never
nothing. What a program says is only its output; verdicts are made outside.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mellum2_megatron.common.errors import InputError, WorkError, shown
from mellum2_megatron.common.json_files import JsonError, parse_object
from mellum2_megatron.rlvr.rewards.apptainer import IMAGE_VARIABLE, Apptainer
from mellum2_megatron.rlvr.rewards.bubblewrap import LIBRARY_VARIABLE, Bubblewrap
from mellum2_megatron.rlvr.rewards.seccomp import MACHINES
from mellum2_megatron.rlvr.rewards.watch import (
    CORE_BYTES,
    ENVIRONMENT,
    OPEN_FILES,
    PENDING_SIGNALS,
    Limits,
    Outcome,
    Sandbox,
)

__all__ = ["Limits", "Outcome", "Sandbox", "find_sandbox"]

CHOICE_VARIABLE = "MELLUM2_SANDBOX"
"""Environment variable that names the sandbox; without it, bubblewrap and then Apptainer."""

logger = logging.getLogger(__name__)

_CHOICES = ("bubblewrap", "apptainer")
_SCRIPT = Path(__file__).with_name("probe_script.py")
_DISKS = ("/tmp", "/dev/shm")
_TRIAL = Limits(seconds=60.0, disk_bytes=1 << 20)
_SLEEP_S = 10.0
"""Seconds in which the watch must see a disk that is too full, on a busy machine too."""
_SHELL = ("LC_CTYPE", "PWD")
_DEVICES = frozenset(
    "console core fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom "
    "zero".split()
)


@functools.cache
def find_sandbox() -> Sandbox:
    """Return this machine's sandbox, tried once: what it holds is measured inside.

    Raises:
        InputError: there is none (a program is missing, user namespaces are forbidden and Apptainer
            cannot be used, what was started is no sandbox), the machine has no filter of system
            calls, or ``MELLUM2_SANDBOX`` names none.
    """
    choice = os.environ.get(CHOICE_VARIABLE, "")
    if choice not in ("", *_CHOICES):
        raise InputError(
            f"{CHOICE_VARIABLE}={shown(choice)}",
            rule=f"a sandbox is {' or '.join(_CHOICES)}",
            fix="name one, or unset the variable for the first that works",
        )
    if platform.machine() not in MACHINES:
        raise InputError(
            f"a machine of kind {platform.machine()}",
            rule=f"the sandbox knows the system calls of {' and '.join(MACHINES)}",
            fix="run the programs on one of those",
        )
    if choice == "apptainer":
        return _tried_apptainer()
    try:
        return _tried_bubblewrap()
    except InputError as error:
        if choice or not Apptainer.is_installed():
            raise
        refused = error
    try:
        sandbox = _tried_apptainer()
    except InputError as error:
        raise InputError(
            f"{refused.value}; {error.value}",
            rule=f"bubblewrap: {refused.rule}; apptainer: {error.rule}",
            fix=f"either {refused.fix}; or {error.fix}",
        ) from error
    logger.warning(
        "bubblewrap cannot be used (%s): programs run in %s", refused.value, sandbox.description
    )
    return sandbox


def _tried_bubblewrap() -> Sandbox:
    return _tried(
        Bubblewrap.find,
        fill=0,
        rule="the sandbox needs user namespaces without privileges, which a machine or container "
        "may forbid; programs are never run without it",
        fix="allow them (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, "
        "kernel.apparmor_restrict_unprivileged_userns), have a setuid Apptainer installed and name "
        f"its image in {IMAGE_VARIABLE}, or score on another machine",
    )


def _tried_apptainer() -> Sandbox:
    # Its disk in memory has the size of apptainer.conf, so the watch has to see it.
    return _tried(
        Apptainer.find,
        fill=2 * _TRIAL.disk_bytes,
        rule="Apptainer must be installed setuid and let users have namespaces, binds and the "
        "network `none`; programs are never run without a sandbox",
        fix="see docs/rlvr.md for what apptainer.conf must allow, or score on another machine",
    )


def _tried(find: Callable[[], Sandbox], *, fill: int, rule: str, fix: str) -> Sandbox:
    """Return a sandbox whose first program found itself confined.

    Args:
        find: returns the sandbox.
        fill: bytes that the program writes after its report; then the watch must end it.
        rule: rule where it does not start.
        fix: fix where it does not.
    """
    sandbox = find()
    places = [tempfile.gettempdir(), os.path.expanduser("~"), os.getcwd()]
    known = [os.stat(place) for place in places if os.path.isdir(place)]
    job = {
        "places": [
            [place, here.st_dev, here.st_ino]
            for place, here in zip(filter(os.path.isdir, places), known, strict=True)
            # The sandbox shows these, or its own.
            if not place.startswith("/usr") and place != "/"
        ],
        "disks": _DISKS,
        "fill": fill,
        "seconds": _SLEEP_S,
    }
    try:
        outcome = sandbox.run(
            _SCRIPT.read_text(encoding="utf-8"), stdin=json.dumps(job).encode(), limits=_TRIAL
        )
    except WorkError as error:
        raise InputError(error.what, rule=rule, fix=fix) from error
    said = outcome.output.decode("utf-8", "replace").strip()
    try:
        facts = parse_object(said)
    except JsonError:
        raise InputError(
            f"the sandbox does not run Python: {outcome.reason or outcome.message[:200]}",
            rule="a first program must print what it finds",
            fix="install python3, which the sandbox runs",
        ) from None
    faults = _faults(facts)
    if fill and outcome.stopped != "disk":
        faults.append(f"the watch cannot see its files ({outcome.reason or 'it ended'})")
    if faults:
        raise InputError(
            f"{sandbox.description} is no sandbox: {'; '.join(faults)}", rule=rule, fix=fix
        )
    return sandbox


def _faults(facts: Mapping[str, Any]) -> list[str]:
    """Return what the first program found that a sandbox must not have."""
    disks = set(facts["disks"])
    written = {
        place: f"{place} ({kind}) can be written to"
        for place, kind, disk, blocks in facts["writable"]
        if kind != "tmpfs" or disk not in disks or not blocks
    }
    limits = {  # as /proc/self/limits names them
        "Max address space": _TRIAL.memory_bytes,
        "Max core file size": CORE_BYTES,
        "Max cpu time": _TRIAL.cpu_seconds,
        "Max file size": _TRIAL.file_bytes,
        "Max open files": OPEN_FILES,
        "Max pending signals": PENDING_SIGNALS,
    }
    found = {
        "its user is root": facts["user"] == 0,
        "it has capabilities": facts["powers"] != 0,
        "it can gain privileges": facts["new_powers"],
        "system calls are not filtered": not facts["denied"],
        "it sees other processes": facts["processes"] > 2,
        "it can write to another process": not facts["first_is_closed"],
        "it has a network": set(facts["interfaces"]) - {"lo"},
        "it has the caller's variables": set(facts["variables"])
        - {*ENVIRONMENT, *_SHELL, LIBRARY_VARIABLE},
        "it has devices": set(facts["devices"]) - _DEVICES,
        "it sees the caller's files": facts["seen"],
        "its program can be changed": facts["program_is_open"],
        "it does not begin in /tmp": facts["folder"] != "/tmp",
        "its limits are others": {
            f"{name} {there}"
            for name, value in limits.items()
            if not (there := facts["limits"][name]).isdecimal() or int(there) > value
        },
    }
    return [
        f"{name} ({', '.join(sorted(why))})" if isinstance(why, set | list) else name
        for name, why in found.items()
        if why
    ] + [*written.values()]
