"""Keeps a run's Redis server and streamer alive, and ends them with the launcher.

    python -m launchers.stream_keeper runs/x/run.yaml --server

The launcher starts it and holds its standard input open; at the end of that input, also when the
launcher is killed, the keeper ends its processes and itself. Stop signals are for the ranks, which
still need samples for their last step, so the keeper ignores them.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mellum2_megatron.common.console import print_line
from mellum2_megatron.common.files import write_text
from mellum2_megatron.data.feed.redis_run import FAILURE_FILE, STREAM_FOLDER

SERVER = "redis-server"

_POLL = 0.1
_RESTARTS = 5
_LONG_LIFE = 60.0
"""Seconds after which an end no longer counts as one more of a row."""
_SHOWN = 400


@dataclass(kw_only=True)
class Kept:
    """A process that is started again when it ends.

    Attributes:
        name: name in messages; its output goes to ``NAME.log``.
        command: its command line.
        refusal: exit code for bad input, after which a restart is no use; None: there is none.
        environment: variables to set besides the keeper's own.
    """

    name: str
    command: Sequence[str]
    folder: Path
    refusal: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    ends: int = 0

    @property
    def log(self) -> Path:
        """File of its output."""
        return self.folder / f"{self.name}.log"

    def start(self) -> None:
        """Start it, with output appended to its log."""
        self.started = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                preexec_fn=_end_with_parent,
            )
        print_line(f"started {self.name}, process {self.process.pid}")

    def look(self) -> str | None:
        """Start it again if it has ended; return why it will not be, or None."""
        assert self.process is not None
        code = self.process.poll()
        if code is None:
            return None
        lived = time.monotonic() - self.started
        self.ends = 1 if lived > _LONG_LIFE else self.ends + 1
        print_line(f"{self.name} ended with {code} after {lived:.1f} s")
        if code == self.refusal or self.ends > _RESTARTS:
            last = self.log.read_text(errors="replace").strip().rpartition("\n")[2][-_SHOWN:]
            return f"{self.name} ended with {code}: {last} (all of it: {self.log})"
        # The second end in a row and later ones wait, so that a short lack of memory can pass.
        time.sleep(min(5.0, 0.2 * (2 ** (self.ends - 1) - 1)))
        self.start()
        return None

    def end(self) -> None:
        """End it. It has nothing to save."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def _end_with_parent() -> None:
    """Let the kernel end this process when the keeper is killed (Linux: PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main(argv: Sequence[str] | None = None) -> int:
    """Keep server and streamer alive until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="python -m launchers.stream_keeper")
    parser.add_argument("run", type=Path, help="resolved run")
    parser.add_argument("--server", action="store_true", help="keep a Redis server too")
    options = parser.parse_args(argv)
    folder = options.run.parent / STREAM_FOLDER
    kept = []
    if options.server:
        kept.append(Kept(name="redis", command=(SERVER, str(folder / "redis.conf")), folder=folder))
    kept.append(
        Kept(
            name="streamer",
            command=(sys.executable, "-m", "mellum2_megatron", "data", "stream", str(options.run)),
            folder=folder,
            refusal=2,
            # It reads files, beside ranks that need the GPUs and the cores.
            environment={"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
    )
    for process in kept:
        process.start()
    try:
        while not select.select([sys.stdin], [], [], _POLL)[0]:
            for process in list(kept):
                reason = process.look()
                if reason is not None:
                    print_line(f"given up: {reason}")
                    write_text(folder / FAILURE_FILE, reason + "\n")
                    kept.remove(process)
    finally:
        for process in kept:
            process.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
