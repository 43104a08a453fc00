"""Runs in a sandbox as its first program: what it finds there, as one line of JSON.

Nothing here decides: `sandbox` compares outside.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import time
import typing

_KERNEL = ("proc", "sysfs", "devpts", "mqueue", "cgroup2")


def _lines(path: str) -> list[str]:
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read().splitlines()


def _writable() -> list[typing.Any]:
    """Return place, kind, number of the disk and size of each mount that can be written to."""
    found = []
    for line in _lines("/proc/self/mountinfo"):
        words = line.split()
        place, kind = words[4], words[words.index("-") + 1]
        try:
            mode = os.stat(place).st_mode
            usable = stat.S_ISDIR(mode) or stat.S_ISREG(mode)
            if usable and kind not in _KERNEL and os.access(place, os.W_OK):
                found.append([place, kind, os.stat(place).st_dev, os.statvfs(place).f_blocks])
        except OSError:
            pass
    return found


def _same(places: typing.Any) -> list[str]:
    """Return those of the machine's folders that are in here too."""
    seen = []
    for path, device, number in places:
        try:
            here = os.stat(path)
        except OSError:
            continue
        if [here.st_dev, here.st_ino] == [device, number]:
            seen.append(path)
    return seen


def _opens(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True


def _denied() -> bool:
    """Return true if a file in memory is refused, as only the filter of system calls does."""
    try:
        os.close(os.memfd_create("x"))
    except OSError:
        return True
    return False


def _main() -> None:
    job = json.load(sys.stdin)
    status = dict(line.split(":", 1) for line in _lines("/proc/self/status"))
    facts: dict[str, typing.Any] = {
        "user": os.getuid(),
        "powers": int(status["CapEff"], 16) | int(status["CapPrm"], 16),
        "new_powers": status["NoNewPrivs"].strip() != "1",
        "denied": _denied(),
        "processes": sum(name.isdecimal() for name in os.listdir("/proc")),
        "first_is_closed": not _opens("/proc/1/mem") and not _opens("/proc/1/task/1/mem"),
        "interfaces": [line.split(":")[0].strip() for line in _lines("/proc/net/dev")[2:]],
        "variables": sorted(os.environ),
        "devices": os.listdir("/dev"),
        "seen": _same(job["places"]),
        "writable": _writable(),
        "disks": [os.stat(place).st_dev for place in job["disks"] if os.path.isdir(place)],
        "program_is_open": not os.statvfs(sys.argv[0]).f_flag & os.ST_RDONLY,
        "folder": os.getcwd(),
        # Name, soft and hard limit, unit.
        "limits": {line[:26].strip(): line[26:].split()[1] for line in _lines("/proc/self/limits")},
    }
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()
    # Never on the machine's own disk.
    own = not facts["seen"] and any(place == "/tmp" for place, *_ in facts["writable"])
    if job["fill"] and own:
        with open("/tmp/fill", "wb") as full:
            full.write(b"x" * job["fill"])
        time.sleep(job["seconds"])


if __name__ == "__main__":
    _main()
