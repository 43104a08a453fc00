"""A Slurm of one's own on this machine: munged, slurmctld and two slurmd, all in a temporary
folder."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2")
CPUS = 32
"""Of a node, whatever the machine has."""
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"

# What makes one machine look like a cluster: two names and ports of the same host, processes
# followed without cgroups, more CPUs than there are. `cred_expire` is how long a requeued job waits
# before it may start again (120 s otherwise).
_CONFIGURATION = """
ClusterName=mellum2
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldDebug=debug
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={kill_wait}
SlurmdTimeout=300
MinJobAge=100000
MessageTimeout=60
BatchStartTimeout=60
ReturnToService=1
{nodes}
GresTypes=seat
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=spare Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE
"""


class Cluster:
    """The daemons; commands of Slurm run with `run`. Use it as a context manager, which leaves no
    process behind."""

    def __init__(self, folder: Path, *, kill_wait: int = 120) -> None:
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._kill_wait = kill_wait
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SLURM_", "SBATCH_"))
            },
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": _PATH,
        }

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        (self.folder / "state").mkdir()
        ports, host = _free_ports(1 + len(NODES)), socket.gethostname()
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} Gres=seat:1"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        (self.folder / "slurm.conf").write_text(
            _CONFIGURATION.format(
                host=host,
                port=ports[0],
                user=getpass.getuser(),
                folder=self.folder,
                nodes=nodes,
                kill_wait=self._kill_wait,
            )
        )
        # One seat a node, without a device behind it: jobs that want it preempt each other and
        # nobody else.
        (self.folder / "gres.conf").write_text("Name=seat Count=1\n")
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        files = {
            option: self.folder / f"munge.{option.removesuffix('-file')}"
            for option in ("key-file", "socket", "pid-file", "log-file", "seed-file")
        }
        # --force: the folder's owner may be root, or its group may write.
        self._daemon(
            "munged",
            "munged",
            "--foreground",
            "--force",
            *(f"--{name}={path}" for name, path in files.items()),
        )
        wait_for(lambda: files["socket"].exists(), 30, "munged", self.log)
        self._daemon("slurmctld", "slurmctld", "-D", "-i")
        for name in NODES:
            (self.folder / f"spool.{name}").mkdir()
            self.start_node(name)
        wait_for(
            lambda: self.states() == dict.fromkeys(NODES, "idle"), 60, "all nodes idle", self.log
        )

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node."""
        self._daemon(name, "slurmd", "-D", "-N", name)

    def stop_node(self, name: str) -> None:
        """End the slurmd of a node and all that runs there, as a power failure does."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()
        _kill(self._processes(name))
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=stopped")

    def states(self) -> dict[str, str]:
        """Name and state of every node."""
        output = self.run(
            "sinfo", "--noheader", "--Node", "--partition=normal", "--format=%N %t", check=False
        )
        return dict(line.split() for line in output.splitlines())

    def run(
        self, *command: str, check: bool = True, environment: dict[str, str] | None = None
    ) -> str:
        """Run a command of Slurm and return what it prints."""
        done = subprocess.run(
            command,
            env={**self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=120,
        )
        if check and done.returncode:
            raise AssertionError(
                f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def log(self) -> str:
        """The ends of all daemons' logs."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(
            f"--- {file.name} ---\n{file.read_text(errors='replace')[-3000:]}" for file in files
        )

    def stop(self) -> None:
        """End every job and daemon."""
        for daemon in reversed(self._daemons.values()):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        while left := self._processes():  # slurmd leaves its steps behind
            _kill(left)

    def _daemon(self, name: str, program: str, *arguments: str) -> None:
        with (self.folder / f"{name}.out.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [program, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _processes(self, node: str | None = None) -> list[psutil.Process]:
        """What jobs have started here, on one node or all, and the steps' own daemons above it."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                if environment.get("SLURM_CONF") != self.environment["SLURM_CONF"]:
                    continue
                if process.name() == "slurmstepd" and node is None:
                    found[process.pid] = process
                elif environment.get("SLURMD_NODENAME", "") in (NODES if node is None else (node,)):
                    above = [each for each in process.parents() if each.name() == "slurmstepd"]
                    found |= {each.pid: each for each in (process, *above)}
        return list(found.values())


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def missing_programs() -> list[str]:
    """Slurm's and munge's programs that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


def wait_for(holds: Callable[[], bool], seconds: float, what: str, log: Callable[[], str]) -> None:
    """Poll until something holds; fail with ``what`` and the log after so many seconds."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {seconds:g} s\n{log()}")
        time.sleep(0.2)


def _free_ports(count: int) -> Sequence[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
