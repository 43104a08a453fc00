"""Site profile: what a cluster wants to know of every job, written once in a small YAML file.

::

    account: nlp            # `none` where Slurm has no accounts
    partition: h100
    time: "1-00:00:00"
    gpus_per_node: 8
    container:
      image: /lustre/images/mellum2.sqsh
      runtime: pyxis
      mounts: [/lustre]
    environment: [WANDB_API_KEY]
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.common.field_checks import require
from mellum2_megatron.common.values import Reader, from_mapping, from_plain, read_yaml

PROFILES_VARIABLE = "MELLUM2_PROFILES"
"""Environment variable that names a folder of profiles, for a whole site."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Slurm's: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes,
# days-hours:minutes:seconds
_TIME = re.compile(
    r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d{1,2}))?(?::(?P<third>\d{1,2}))?"
)
_MEMORY = re.compile(r"\d+[KMGT]?")
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL")
_OWN_FLAGS = {
    "account": "account",
    "partition": "partition",
    "qos": "qos",
    "time": "time",
    "nodes": "nodes",
    "gpus-per-node": "gpus_per_node",
    "cpus-per-task": "cpus_per_task",
    "mem": "memory",
    "exclusive": "exclusive",
    "signal": "grace_seconds",
    "requeue": "tries",
    "no-requeue": "tries",
}
"""Flags of sbatch that have a key of their own."""
_GIVEN_FLAGS = (
    "job-name output error open-mode ntasks ntasks-per-node array dependency chdir export input wrap parsable hold "
    "test-only"
).split()
"""Flags of sbatch that a job of ours sets, or that would change what it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """A folder of the host that a container sees; in YAML also ``SOURCE[:TARGET[:ro]]``."""

    source: str
    target: str
    read_only: bool = False

    def __post_init__(self) -> None:
        for name in ("source", "target"):
            path = getattr(self, name)
            require(
                path.startswith("/"),
                f"mount {name} {path}",
                rule="must be an absolute path",
                fix="write it from / on",
            )
            require(
                not re.search(r"[:,\n]", path),
                f"mount {name} {path!r}",
                rule="container runtimes separate mounts with ':' and ','",
                fix="use a path without them, a link for instance",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """The image that ranks run in.

    Attributes:
        image: a file (``.sqsh``, ``.sif``), or a registry's reference as the runtime writes it
            (``registry.site#nvidia/pytorch:25.10-py3``, ``docker://..``).
        runtime: ``pyxis`` is a plugin of srun; ``apptainer`` and ``enroot`` are commands in front
            of ours.
        mounts: folders that it sees. Run, data and code must lie in them.
        workdir: where commands start inside; None means the run's folder (with enroot: the
            image's).
        arguments: more arguments for srun (pyxis) or for the runtime's command.
    """

    image: str
    runtime: Literal["pyxis", "apptainer", "enroot"]
    mounts: tuple[Mount, ...] = ()
    workdir: str | None = None
    arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(
            bool(self.image.strip()),
            "container.image",
            rule="must not be empty",
            fix="name a file or a reference",
        )
        require(
            self.workdir is None or self.runtime != "enroot",
            f"container.workdir={self.workdir}",
            rule="enroot has no such option",
            fix="drop it; the image's own is taken",
        )

    @property
    def image_file(self) -> Path | None:
        """The image as a file of this machine or the shared disk; None for a registry's
        reference."""
        if re.match(r"[a-z]+://", self.image) or "#" in self.image:
            return None
        looks_like_file = self.image.startswith(("/", "./", "../", "~")) or self.image.endswith(
            (".sqsh", ".sif")
        )
        if not looks_like_file and self.runtime == "pyxis":
            return None  # `ubuntu:24.04` is Docker Hub's
        return Path(self.image).expanduser()

    def covers(self, path: str | os.PathLike[str]) -> bool:
        """Whether the container sees ``path`` of the host, under the same name."""
        inside = Path(path)
        best = max(
            (mount for mount in self.mounts if inside.is_relative_to(mount.target)),
            key=lambda mount: len(mount.target),
            default=None,
        )
        return best is not None and Path(best.source) == Path(best.target)


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What a site's jobs have in common.

    Attributes:
        name: the file's name without ending, unless it says otherwise.
        executor: ``slurm``, or ``local`` for this machine.
        device: what ranks compute on; ``auto`` is cuda where the profile has GPUs.
        account: whom Slurm charges; ``none`` where it has no accounts. Slurm profiles must say.
        partition, qos, time, memory: as sbatch takes them. Memory is a node's.
        nodes: of a job, unless its layout or the command says otherwise.
        gpus_per_node: 0 for CPU nodes.
        gpu_request: how a node's GPUs are asked for: ``--gpus-per-node``, ``--gres=gpu:N``, or not
            at all (whole nodes).
        ranks_per_node: None means one a GPU, or 1 without GPUs.
        cpus_per_task: cores of a node's task, which holds all its ranks. None leaves it to the
            partition.
        exclusive: take nodes whole.
        sbatch: more flags of sbatch, by name without dashes; true for a flag without value.
        srun: more arguments for the srun that starts the ranks (``--mpi=none``).
        container: None runs on the nodes as they are.
        modules: loaded with ``module load``.
        setup: lines of bash for the batch script, before anything is started.
        environment: names of variables that jobs take from the shell that submits them; secrets go
            here.
        variables: variables that are no secrets, with their values.
        python: interpreter; None means the one that submits, or ``python`` in a container.
        runs: folder of runs, on a disk that all nodes share.
        packager: ``shared`` runs the code where it is; ``git`` copies the commit into the run's
            folder.
        grace_seconds: how long before the time limit the run is told to save.
        tries: how often a job that fails is started again without a new step.
    """

    name: str
    executor: Literal["slurm", "local"] = "slurm"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    time: str | None = None
    nodes: int | None = None
    gpus_per_node: int = 0
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    ranks_per_node: int | None = None
    cpus_per_task: int | None = None
    memory: str | None = None
    exclusive: bool = False
    sbatch: Mapping[str, str | int | bool] = field(default_factory=dict)
    srun: tuple[str, ...] = ()
    container: Container | None = None
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    python: str | None = None
    runs: str = "runs"
    packager: Literal["shared", "git"] = "shared"
    grace_seconds: int = 180
    tries: int = 3

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.time is not None:
            limit = minutes(self.time)
            require(
                limit * 60 > self.grace_seconds,
                f"time: {self.time}",
                rule=f"must be longer than grace_seconds ({self.grace_seconds})",
                fix="raise time, or lower grace_seconds",
            )
        require(
            self.memory is None or _MEMORY.fullmatch(self.memory) is not None,
            f"memory: {self.memory}",
            rule="is a node's memory, a number with K, M, G or T",
            fix='write it like "512G", or "0" for all of it',
        )
        for flag in self.sbatch:
            key = _OWN_FLAGS.get(flag)
            require(
                key is None, f"sbatch.{flag}", rule=f"has a key of its own, {key}", fix=f"set {key}"
            )
            require(
                flag not in _GIVEN_FLAGS,
                f"sbatch.{flag}",
                rule="is set by the job itself",
                fix="drop it",
            )
            require(
                re.fullmatch(r"[a-z][a-z0-9-]+", flag) is not None,
                f"sbatch.{flag}",
                rule="is no long flag of sbatch",
                fix="write its long name without dashes, such as constraint",
            )
        self._check_variables()

    def _check_numbers(self) -> None:
        lowest = {
            "nodes": 1,
            "gpus_per_node": 0,
            "ranks_per_node": 1,
            "cpus_per_task": 1,
            "grace_seconds": 30,
            "tries": 0,
        }
        for name, least in lowest.items():
            value = getattr(self, name)
            require(
                value is None or value >= least,
                f"{name}: {value}",
                rule=f"must be {least} or more",
                fix=f"use {least}",
            )
        if self.device == "cuda" or (self.device == "auto" and self.gpus_per_node):
            ranks, gpus = self.ranks_per_node, self.gpus_per_node
            require(
                gpus > 0,
                "device: cuda without gpus_per_node",
                rule="ranks need GPUs",
                fix="set gpus_per_node, or device: cpu",
            )
            require(
                ranks is None or ranks <= gpus,
                f"ranks_per_node: {ranks} with gpus_per_node: {gpus}",
                rule="each rank has a GPU of its own",
                fix=f"use {gpus}, or leave ranks_per_node out",
            )

    def _check_variables(self) -> None:
        for name in (*self.environment, *self.variables):
            require(
                _VARIABLE.fullmatch(name) is not None,
                f"variable {name!r}",
                rule="is no name of a variable",
                fix="list names alone under environment, and NAME: value under variables",
            )
        for name in self.variables:
            require(
                _SECRET.search(name.upper()) is None,
                f"variables.{name}",
                rule="looks like a secret, which no file or script should hold",
                fix=f"set it in your shell and list its name: environment: [{name}]",
            )
            require(
                name not in self.environment,
                f"{name} under environment and variables",
                rule="it comes from the shell or from the profile",
                fix="drop one of the two",
            )

    @property
    def resolved_device(self) -> Literal["cpu", "cuda"]:
        """What ranks compute on, ``auto`` decided."""
        if self.device == "auto":
            return "cuda" if self.gpus_per_node else "cpu"
        return self.device

    @property
    def resolved_ranks_per_node(self) -> int:
        """Ranks of a node."""
        return self.ranks_per_node or max(
            1, self.gpus_per_node if self.resolved_device == "cuda" else 1
        )


def minutes(time: str) -> float:
    """Return a time as sbatch writes it, in minutes.

    >>> minutes("90"), minutes("1-12"), minutes("04:30:00")
    (90.0, 2160.0, 270.0)

    Raises:
        InputError: it is none.
    """
    found = _TIME.fullmatch(time)
    if found is None:
        raise InputError(
            f"time: {time}",
            rule="is no time of Slurm",
            fix='write it like "1-12:00:00", days-hours:minutes:seconds',
        )
    days, parts = (
        found["days"],
        [int(part or 0) for part in (found["first"], found["second"], found["third"])],
    )
    if days is not None or found["third"] is not None:
        hours, mins, seconds = parts
    else:
        hours, mins, seconds = 0, parts[0], parts[1]
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60


def read_profile(name_or_path: str | os.PathLike[str]) -> Profile:
    """Read a site profile.

    Args:
        name_or_path: a file (it has a ``/`` or ends in ``.yaml``), or the name of one in
            ``./profiles``, ``$MELLUM2_PROFILES`` or ``~/.config/mellum2/profiles``.

    Raises:
        InputError: no such profile, an unknown key (the nearest is named), a key given twice, a
            wrong value, or one that looks like a secret.
    """
    path = find_profile(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"profile {path}", rule=f"cannot be read ({error})", fix="name a profile's YAML file"
        ) from None
    try:
        return profile_from_yaml(text, name=path.stem)
    except InputError as error:
        raise InputError(f"{path}: {error.value}", rule=error.rule, fix=error.fix) from None


def profile_folders() -> Iterator[Path]:
    """Yield the folders in which a profile is looked up by its name, in this order."""
    yield Path("profiles")
    if os.environ.get(PROFILES_VARIABLE):
        yield Path(os.environ[PROFILES_VARIABLE])
    yield Path("~/.config/mellum2/profiles").expanduser()


def profile_names() -> tuple[str, ...]:
    """Return the names that `read_profile` finds, sorted."""
    return tuple(
        sorted({path.stem for folder in profile_folders() for path in folder.glob("*.yaml")})
    )


def find_profile(name_or_path: str | os.PathLike[str]) -> Path:
    """Return a profile's file; see `read_profile`."""
    given = os.fspath(name_or_path)
    if "/" in given or given.endswith((".yaml", ".yml")):
        return Path(given).expanduser()
    for folder in profile_folders():
        if (folder / f"{given}.yaml").is_file():
            return folder / f"{given}.yaml"
    known = profile_names()
    looked = ", ".join(str(folder) for folder in profile_folders())
    raise InputError(
        f"profile {given!r}",
        rule=f"there is no such profile in {looked}",
        fix=nearest(given, known) if known else "write one; docs/examples/profiles has samples",
    )


def profile_from_yaml(text: str, *, name: str) -> Profile:
    """Read a profile's YAML; ``name`` is its name unless it gives one.

    Raises:
        InputError: see `read_profile`.
    """
    values = read_yaml(text, document="profile", fix="see docs/examples/profiles")
    if isinstance(values, Mapping):
        values = {"name": name, **values}
    return from_mapping(Profile, values, document="profile", readers=_READERS)


def _text(value: Any, key: str) -> str | None:
    """Read text that YAML 1.1 likes to turn into numbers: 24:00:00 is 86400 to it."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise InputError(
            f"{key}={value}",
            rule="YAML has read it as a number",
            fix=f'put it in quotes, like {key}: "{_QUOTED[key]}"',
        )
    text: str | None = from_plain(value, str | None, key)
    return text


_QUOTED = {"time": "24:00:00", "memory": "512G", "account": "00123", "qos": "1", "partition": "1"}


def _mounts(value: Any, key: str) -> tuple[Mount, ...]:
    if not isinstance(value, list):
        raise InputError(
            f"{key}: {value!r}", rule="must be a list", fix="write [/lustre, /data:/data:ro]"
        )
    return tuple(_mount(each, f"{key}[{number}]") for number, each in enumerate(value))


def _mount(value: Any, key: str) -> Mount:
    if not isinstance(value, str):
        return from_mapping(Mount, value, document="profile", key=key)
    source, target, flag = (
        (*value.split(":"), "", "")[:3] if value.count(":") < 3 else ("", "", value)
    )
    if flag not in ("", "ro", "rw") or not source:
        raise InputError(
            f"{key}={value!r}",
            rule="is no mount",
            fix="write SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro",
        )
    return Mount(source=source, target=target or source, read_only=flag == "ro")


def _flags(value: Any, key: str) -> dict[str, str | int | bool]:
    return {
        name: from_plain(flag, str | int | bool, f"{key}.{name}")
        for name, flag in _mapping(value, key)
    }


def _variables(value: Any, key: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, text in _mapping(value, key):
        if isinstance(text, int) and not isinstance(text, bool):
            text = str(text)
        if not isinstance(text, str) or "\n" in text:
            # Not the value: what is written here by mistake may be a secret.
            raise InputError(
                f"{key}.{name}", rule="must be one line of text", fix='put it in quotes, like "1"'
            )
        found[name] = text
    return found


def _mapping(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise InputError(
            f"{key}: {type(value).__name__}",
            rule="must be a mapping of names to values",
            fix="use {}",
        )
    yield from value.items()


_READERS: dict[str, Reader] = {
    **dict.fromkeys(_QUOTED, _text),
    "container.mounts": _mounts,
    "sbatch": _flags,
    "variables": _variables,
}
