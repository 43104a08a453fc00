"""Runs in Apptainer's container: take away what a program may not do, say so, and become it.

Apptainer's own ``--security seccomp:FILE`` is not used. It gives every denied call the number EPERM
(internal/pkg/security/security.go, LoadSeccompConfig), but `clone3` has to fail with ENOSYS, or the
C library starts no thread; and it leaves out calls whose names its libseccomp does not know. The
filter of `seccomp` is loaded here instead, the same bytes that bubblewrap gets.

The Python is the image's, so the script keeps to what 3.8 has.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import struct
import sys
import termios
import time

_SET_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER_MODE = 38, 22, 2  # linux/prctl.h, linux/seccomp.h


class _Program(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _main() -> None:
    job = json.loads(sys.argv[1])
    for name, wanted in job["limits"].items():
        kind = getattr(resource, "RLIMIT_" + name)
        most = resource.getrlimit(kind)[1]
        value = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(kind, (value, value))
    os.umask(0o022)
    os.chdir("/tmp")
    for number in map(int, os.listdir("/proc/self/fd")):
        # That of the list itself is closed already.
        if number > 2:
            with contextlib.suppress(OSError):
                os.close(number)
    code = bytes.fromhex(job["filter"])
    program = _Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = (ctypes.c_int,) + (ctypes.c_ulong,) * 4
    for option, value, address in (
        (_SET_NO_NEW_PRIVS, 1, 0),
        (_SET_SECCOMP, _FILTER_MODE, ctypes.addressof(program)),
    ):
        if libc.prctl(option, value, address, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option})")
    # Only now is it a sandbox. Nothing else writes this mark: the program has not begun.
    os.write(1, bytes.fromhex(job["mark"]))
    # Until the watch has read it: the program may open the pipe and take out what waits in it.
    while struct.unpack("i", fcntl.ioctl(1, termios.FIONREAD, bytes(4)))[0]:
        time.sleep(0.001)
    os.execve(sys.executable, [sys.executable, "-s", "-B", job["program"]], job["environment"])


if __name__ == "__main__":
    _main()
