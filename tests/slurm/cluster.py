"""A private Slurm on this machine: munged, slurmctld and two slurmd in a temporary folder."""

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
"""CPUs that each node claims, more than this machine may have."""
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"

# One machine looks like a cluster: two node names and ports on one host, processes tracked without
# cgroups, more CPUs than exist. A requeued job waits `cred_expire` seconds before it starts again
# (default 120).
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
    """Slurm's daemons, as a context manager that leaves no process behind.

    `run` runs commands of Slurm.
    """

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
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={CPUS} Gres=seat:1"
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
        # One seat per node, a resource without a device: only jobs that request it preempt each
        # other.
        (self.folder / "gres.conf").write_text("Name=seat Count=1\n")
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        files = {
            option: self.folder / f"munge.{option.removesuffix('-file')}"
            for option in ("key-file", "socket", "pid-file", "log-file", "seed-file")
        }
        # --force: munged refuses a folder of root, or one that its group may write to.
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
        """Kill the slurmd of a node and all processes of its jobs, as a power failure does."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()
        _kill(self._processes(name))
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=stopped")

    def states(self) -> dict[str, str]:
        """Return the state of every node by its name."""
        output = self.run(
            "sinfo", "--noheader", "--Node", "--partition=normal", "--format=%N %t", check=False
        )
        return dict(line.split() for line in output.splitlines())

    def run(
        self,
        *command: str,
        check: bool = True,
        environment: dict[str, str] | None = None,
        timeout: float = 120,
    ) -> str:
        """Run a command of Slurm, for up to ``timeout`` seconds, and return its output."""
        done = subprocess.run(
            command,
            env={**self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise AssertionError(
                f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def log(self) -> str:
        """Return the last part of each daemon's log."""
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
        while left := self._processes():  # slurmd does not end its steps
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
        """Return the processes of jobs on one node or all, with their slurmstepd."""
        processes: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                if environment.get("SLURM_CONF") != self.environment["SLURM_CONF"]:
                    continue
                if process.name() == "slurmstepd" and node is None:
                    processes[process.pid] = process
                elif environment.get("SLURMD_NODENAME", "") in (NODES if node is None else (node,)):
                    daemons = [
                        parent for parent in process.parents() if parent.name() == "slurmstepd"
                    ]
                    processes |= {member.pid: member for member in (process, *daemons)}
        return list(processes.values())


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def missing_programs() -> list[str]:
    """Return the programs of Slurm and munge that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


def wait_for(holds: Callable[[], bool], seconds: float, what: str, log: Callable[[], str]) -> None:
    """Poll until ``holds()`` is true; after ``seconds`` fail with ``what`` and the log."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {seconds:g} s\n{log()}")
        time.sleep(0.2)


def _free_ports(count: int) -> Sequence[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for entry in sockets:
            entry.bind(("127.0.0.1", 0))
        return [entry.getsockname()[1] for entry in sockets]
    finally:
        for entry in sockets:
            entry.close()
