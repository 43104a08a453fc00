"""Main memory that a process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Return the main memory in bytes that this process and its children may still take.

    A container or a Slurm job may have a limit below the machine's memory (cgroup v2).
    """
    free = int(psutil.virtual_memory().available)
    try:
        own = Path("/proc/self/cgroup").read_text(encoding="ascii").rpartition("0::/")[2].strip()
    except OSError:
        return free
    group = _CGROUPS / own
    # A limit may stand at any level above this process's own group.
    for folder in [group, *group.parents]:
        if folder == _CGROUPS.parent:
            break
        try:
            limit = int((folder / "memory.max").read_text(encoding="ascii"))
            used = int((folder / "memory.current").read_text(encoding="ascii"))
            stat = dict(
                line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines()
            )
        except (OSError, ValueError):  # no such controller, or "max" for no limit
            continue
        # Cached files count as used, and the system gives them up first.
        free = min(free, limit - used + int(stat.get("inactive_file", 0)))
    return free
