#!/usr/bin/python3
"""A stand-in for `apptainer exec`: it knows Apptainer's flags and confines by bubblewrap.

It takes the flags of cmd/internal/cli/action_flags.go that are listed here and refuses all others,
as cobra does. What a flag does not ask for is not confined: without ``--net`` a program has the
machine's network. It filters no system calls and limits no process, because `exec` does neither.
Like Apptainer it makes /dev/shm without a size, adds the user to /etc/passwd, and keeps the first
process's memory closed, which real Apptainer does by not being dumpable.
"""

import argparse
import os
import sys

SESSION_BYTES = str(64 << 20)  # "sessiondir max size" of apptainer.conf


def parse(words):
    parser = argparse.ArgumentParser(prog="apptainer", allow_abbrev=False)
    parser.add_argument("--quiet", "-q", action="store_true")
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("exec", allow_abbrev=False)
    for name in ("containall", "no-home", "net", "uts", "no-privs"):
        command.add_argument("--" + name, action="store_true")
    command.add_argument("--no-mount", default="")
    command.add_argument("--network", default="")
    command.add_argument("--hostname", default="")
    command.add_argument("--drop-caps", default="")
    command.add_argument("--bind", action="append", default=[])
    command.add_argument("image")
    command.add_argument("inner", nargs=argparse.REMAINDER)
    return parser.parse_args(words)


def fatal(text):
    sys.stderr.write("FATAL:   " + text + "\n")
    sys.exit(255)


def bubblewrap(given):
    if not os.path.exists(given.image):
        fatal(f"could not open image {given.image}: no such file or directory")
    if given.net and given.network != "none":
        fatal("network requires root, non-root users can only use --network=none")
    words = ["bwrap", "--unshare-user", "--uid", "65534", "--gid", "65534", "--die-with-parent"]
    if given.net:
        words.append("--unshare-net")
    if given.uts:
        words += ["--unshare-uts", "--hostname", given.hostname]
    words += ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "lib", "lib64"):
        if os.path.islink("/" + name):
            words += ["--symlink", os.readlink("/" + name), "/" + name]
    words += ["--perms", "0755", "--dir", "/etc", "--ro-bind", "/etc/passwd", "/etc/passwd"]
    if given.containall:
        words += ["--unshare-pid", "--unshare-ipc", "--clearenv", "--proc", "/proc"]
        for place in ("/proc/1/mem", "/proc/1/task/1/mem"):
            words += ["--ro-bind", "/dev/null", place]
        words += ["--dev", "/dev", "--perms", "1777", "--tmpfs", "/dev/shm"]
        words += ["--size", SESSION_BYTES, "--perms", "1777", "--tmpfs", "/tmp"]
        words += ["--setenv", "APPTAINER_CONTAINER", given.image]
        words += ["--setenv", "PATH", "/usr/local/bin:/usr/bin:/bin"]
    else:
        words += [
            "--bind",
            "/proc",
            "/proc",
            "--dev-bind",
            "/dev",
            "/dev",
            "--bind",
            "/tmp",
            "/tmp",
        ]
    if "home" not in given.no_mount and not given.no_home:
        words += ["--bind", os.path.expanduser("~"), os.path.expanduser("~")]
    for bind in given.bind:
        source, target, *options = bind.split(":")
        words += ["--ro-bind" if options == ["ro"] else "--bind", source, target]
    if given.drop_caps == "all" and given.no_privs:
        words += ["--cap-drop", "ALL"]
    # bubblewrap leaves /dev and / writable; Apptainer's are on the disk that the watch looks at.
    return [*words, "--remount-ro", "/dev", "--remount-ro", "/", "--", *given.inner]


if __name__ == "__main__":
    command = bubblewrap(parse(sys.argv[1:]))
    os.execvp(command[0], command)
