"""The system calls that programs in the sandbox may not make, as a BPF program for seccomp.

bubblewrap's namespaces keep a program from the machine's files, network and processes. The filter
takes away kernel interfaces that an answer has no use for; those that hold memory which no limit
counts (System V shared memory, message queues, memfd, rules of landlock, sockets with larger
buffers, open files sent through a socket, a huge page whose beginning waits in a pipe by vmsplice);
those that a program could use up for the whole machine or all that its user runs (contexts of
asynchronous input, watches of files, pages of hugetlbfs, memory of TCP); new namespaces; hiding
from the watch outside (PR_SET_DUMPABLE); and sockets of all families but AF_UNIX. Some of those end
at no network namespace, as the host's beside a virtual machine (AF_VSOCK).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence

# name -> numbers on x86_64 and aarch64 (Linux: arch/x86/entry/syscalls/syscall_64.tbl and
# include/uapi/asm-generic/unistd.h).
_DENIED: dict[str, tuple[int, int]] = {
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "ptrace": (101, 117),
    "syslog": (103, 116),
    "personality": (135, 92),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "init_module": (175, 105),
    "delete_module": (176, 106),
    "quotactl": (179, 60),
    "mq_open": (240, 180),
    "kexec_load": (246, 104),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "perf_event_open": (298, 241),
    "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "setns": (308, 268),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "finit_module": (313, 273),
    "memfd_create": (319, 279),
    "kexec_file_load": (320, 294),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_setup": (206, 0),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "pidfd_getfd": (438, 438),
    "mount_setattr": (442, 442),
    "memfd_secret": (447, 447),
    "vmsplice": (278, 75),
    "inotify_init": (253, 26),
    "inotify_init1": (294, 26),
    "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    "landlock_create_ruleset": (444, 444),
}

# AUDIT_ARCH_* of include/uapi/linux/audit.h.
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
MACHINES = tuple(_ARCHITECTURES)
"""Machines, as `platform.machine` names them, that there is a filter for."""

_CLONE, _CLONE3 = (56, 220), 435
# CLONE_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID and _NEWNET of linux/sched.h.
_NAMESPACES = 0x7E020000
_PRCTL, _SET_DUMPABLE = (157, 167), 4
_SOCKET, _SOCKETPAIR, _SETSOCKOPT = (41, 198), (53, 199), (54, 208)
_AF_UNIX = 1
_MMAP, _MAP_HUGETLB = (9, 222), 0x40000
_SOL_SOCKET = 1
_BUFFERS = (7, 8, 32, 33)  # SO_SNDBUF, SO_RCVBUF and both with FORCE
_X32_BIT = 0x40000000
# linux/bpf_common.h
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000  # linux/seccomp.h
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, (16, 24, 32, 40)
"""Offsets in struct seccomp_data; of an argument, those of its lower half on these machines."""


def syscall_filter(machine: str) -> bytes:
    """Return the filter for a machine of `MACHINES`, an array of struct sock_filter.

    A denied call fails with EPERM, a socket of another family with EAFNOSUPPORT. `clone3` fails
    with ENOSYS, and the C library then uses `clone`: its flags lie in memory, where no filter can
    see them.
    """
    architecture, column = _ARCHITECTURES[machine]
    lines: list[_Line] = [
        (_LOAD, "", "", _ARCHITECTURE),
        (_JUMP_EQUAL, "", "kill", architecture),
        (_LOAD, "", "", _NUMBER),
        # The second table of x86_64, with other numbers; aarch64 has none so high.
        (_JUMP_AT_LEAST, "kill", "", _X32_BIT),
        (_JUMP_EQUAL, "no call", "", _CLONE3),
        (_JUMP_EQUAL, "clone", "", _CLONE[column]),
        (_JUMP_EQUAL, "process", "", _PRCTL[column]),
        (_JUMP_EQUAL, "socket", "", _SOCKET[column]),
        (_JUMP_EQUAL, "socket", "", _SOCKETPAIR[column]),
        (_JUMP_EQUAL, "option", "", _SETSOCKOPT[column]),
        (_JUMP_EQUAL, "memory", "", _MMAP[column]),
        *((_JUMP_EQUAL, "deny", "", pair[column]) for pair in _DENIED.values()),
        (_RETURN, "", "", _ALLOW),
        "clone",
        (_LOAD, "", "", _ARGUMENTS[0]),
        (_JUMP_BITS, "deny", "grant", _NAMESPACES),
        "process",
        (_LOAD, "", "", _ARGUMENTS[0]),
        (_JUMP_EQUAL, "deny", "grant", _SET_DUMPABLE),
        "socket",
        (_LOAD, "", "", _ARGUMENTS[0]),
        (_JUMP_EQUAL, "grant", "", _AF_UNIX),
        (_RETURN, "", "", _ERRNO | errno.EAFNOSUPPORT),
        "memory",
        (_LOAD, "", "", _ARGUMENTS[3]),
        (_JUMP_BITS, "deny", "grant", _MAP_HUGETLB),
        "option",
        (_LOAD, "", "", _ARGUMENTS[1]),
        (_JUMP_EQUAL, "", "grant", _SOL_SOCKET),
        (_LOAD, "", "", _ARGUMENTS[2]),
        *((_JUMP_EQUAL, "deny", "", option) for option in _BUFFERS),
        "grant",  # jumps lead forward only
        (_RETURN, "", "", _ALLOW),
        "deny",
        (_RETURN, "", "", _ERRNO | errno.EPERM),
        "no call",
        (_RETURN, "", "", _ERRNO | errno.ENOSYS),
        "kill",
        (_RETURN, "", "", _KILL),
    ]
    return _assembled(lines)


_Line = str | tuple[int, str, str, int]
"""A label, or an instruction: code, label where its test holds and where not, value. An empty label
is the next instruction."""


def _assembled(lines: Sequence[_Line]) -> bytes:
    labels: dict[str, int] = {}
    program: list[tuple[int, str, str, int]] = []
    for line in lines:
        if isinstance(line, str):
            labels[line] = len(program)
        else:
            program.append(line)

    def far(label: str, place: int) -> int:
        return labels[label] - place - 1 if label else 0

    return b"".join(
        struct.pack("=HBBI", code, far(holds, place), far(fails, place), value)
        for place, (code, holds, fails, value) in enumerate(program)
    )
