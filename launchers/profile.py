"""Site profile: the settings that all jobs of a cluster share, in a small YAML file.

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

from launchers.profile_text import check_script, check_text, check_variables
from mellum2_megatron.common.errors import InputError, nearest, shown
from mellum2_megatron.common.field_checks import require
from mellum2_megatron.common.files import read_text
from mellum2_megatron.common.text import read_yaml
from mellum2_megatron.common.values import Reader, from_mapping, from_plain
from mellum2_megatron.planning.gpus import Machine, find_gpu

PROFILES_VARIABLE = "MELLUM2_PROFILES"
"""Environment variable with a folder of profiles, for a whole site."""

# sbatch --time: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes,
# days-hours:minutes:seconds.
_TIME = re.compile(
    r"(?:(?P<days>\d{1,6})-)?(?P<first>\d{1,9})(?::(?P<second>\d{1,2}))?(?::(?P<third>\d{1,2}))?"
)
_MEMORY = re.compile(r"\d{1,15}[KMGT]?")
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
"""Flag of sbatch -> key of the profile that sets it."""
_GIVEN_FLAGS = (
    "job-name output error open-mode ntasks ntasks-per-node array dependency "
    "chdir export input wrap parsable hold test-only"
).split()
"""Flags of sbatch that a job sets itself, or that the batch script cannot work with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """Folder of the host inside a container; in YAML also ``SOURCE[:TARGET[:ro]]``.

    Attributes:
        source: folder of the host, absolute.
        target: its path in the container, absolute.
        read_only: mount without write access, default False.
    """

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
                fix="write the path from / on",
            )
            require(
                not re.search(r"[:,]", path) and path.isprintable(),
                f"mount {name} {path!r}",
                rule="container runtimes separate mounts with ':' and ','",
                fix="use a path without them and without control characters, a link for instance",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """Container image of the ranks.

    Attributes:
        image: image file (``.sqsh``, ``.sif``), or a registry's reference as the runtime writes it
            (``registry.site#nvidia/pytorch:25.10-py3``, ``docker://..``).
        runtime: ``pyxis``, a plugin of srun; ``apptainer`` or ``enroot``, commands in front of
            ours.
        mounts: folders of the host inside the container, default none. They must hold run, data and
            code.
        workdir: working folder in the container, default the run folder (with enroot: the image's).
        arguments: further arguments for srun (pyxis) or for the runtime's command, default none.
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
        """Image file on this machine or the shared disk; None for a registry's reference."""
        # docker://.. and the like, and the REGISTRY#IMAGE of Pyxis.
        if re.match(r"[a-z]+://", self.image) or "#" in self.image:
            return None
        looks_like_file = self.image.startswith(("/", "./", "../", "~")) or self.image.endswith(
            (".sqsh", ".sif")
        )
        if not looks_like_file and self.runtime == "pyxis":
            # Pyxis reads `ubuntu:24.04` as an image of Docker Hub.
            return None
        return Path(self.image).expanduser()

    def covers(self, path: str | os.PathLike[str]) -> bool:
        """Return True if ``path`` of the host has the same name in the container."""
        inside = Path(path)
        # Mounts may nest: the innermost one counts.
        innermost = max(
            (mount for mount in self.mounts if inside.is_relative_to(mount.target)),
            key=lambda mount: len(mount.target),
            default=None,
        )
        return innermost is not None and Path(innermost.source) == Path(innermost.target)


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Settings that all jobs of a site share.

    Attributes:
        name: name of the profile, default the file's name without its ending.
        executor: ``slurm``, the default, or ``local`` for this machine.
        device: device of the ranks; ``auto``, the default, is cuda if the profile has GPUs.
        account: account that Slurm charges, required for Slurm; ``none`` on a site without
            accounts.
        partition, qos: partition and quality of service in Slurm, default the site's.
        time: time limit in a form of ``sbatch --time``, default the partition's.
        nodes: number of nodes, unless layout or command line give it.
        gpus_per_node: GPUs of a node; default 0, for CPU nodes.
        gpu_request: form of the request for GPUs: ``gpus-per-node``, the default, ``gres``
            (``--gres=gpu:N``), or ``none`` for a site that gives whole nodes.
        gpu: card of each rank, such as ``h100`` or ``a100-80``: a run that needs more memory is
            refused. Default none: memory is not checked.
        ranks_per_node: ranks of a node, default one per GPU, or 1 without GPUs.
        cpus_per_task: cores of a node's one task, shared by its ranks; default the partition's.
        memory: memory of a node, a number with K, M, G or T; default the partition's.
        exclusive: take whole nodes, default False.
        sbatch: further flags of sbatch, by name without dashes; true for a flag without value.
        srun: further arguments for the srun that starts the ranks (``--mpi=none``).
        container: container of the ranks; None, the default, runs on the nodes as they are.
        modules: environment modules for ``module load``, default none.
        setup: lines of bash at the start of the batch script, default none.
        environment: names of variables that jobs take from the submitting shell, such as secrets;
            default none.
        variables: other variables with their values, default none.
        python: interpreter, default the submitting one, or ``python`` in a container.
        runs: folder of the run folders, on a disk that all nodes share; default ``runs``.
        packager: ``shared``, the default, runs the code in place; ``git`` copies the commit into
            the run folder.
        grace_seconds: seconds between the stop signal and the time limit, default 180.
        tries: restarts of a failing job allowed without progress, default 3.
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
    gpu: str | None = None
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
        self._check_text()
        self._check_numbers()
        if self.time is not None:
            # Otherwise Slurm would signal the job to stop as soon as it starts.
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
        # These flags come last in the script's header: they must not replace one of the job's own.
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
        check_variables(self.environment, self.variables)
        if self.gpu is not None:
            find_gpu(self.gpu, key="gpu:")

    def _check_text(self) -> None:
        """Refuse text that would be more than one value of the batch script."""
        container = self.container
        texts: dict[str, str | None] = {"name": self.name, "runs": self.runs}
        for name in ("account", "partition", "qos", "time", "memory", "python"):
            texts[name] = getattr(self, name)
        if container is not None:
            texts |= {"container.image": container.image, "container.workdir": container.workdir}
        check_text({key: text for key, text in texts.items() if text is not None})
        flags = {f"sbatch.{name}": str(value) for name, value in self.sbatch.items()}
        check_text(flags)
        arguments = () if container is None else container.arguments
        for name, words in (
            ("srun", self.srun),
            ("modules", self.modules),
            ("container.arguments", arguments),
        ):
            check_text({f"{name}[{number}]": word for number, word in enumerate(words)})
        check_script(self.setup)

    def _check_numbers(self) -> None:
        # Slurm holds these numbers in 16 or 32 bits; a signal's seconds in 16.
        ranges = {
            "nodes": (1, 65_533),
            "gpus_per_node": (0, 1024),
            "ranks_per_node": (1, 4096),
            "cpus_per_task": (1, 65_533),
            "grace_seconds": (30, 65_535),
            "tries": (0, 1_000_000),
        }
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            require(
                value is None or value >= least,
                f"{name}: {value}",
                rule=f"must be {least} or more",
                fix=f"use {least}",
            )
            require(
                value is None or value <= most,
                f"{name}: {shown(value)}",
                rule=f"must not exceed {most}",
                fix=f"use {most} or less",
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

    @property
    def card(self) -> Machine | None:
        """Figures of ``gpu``; None if it is not named."""
        return None if self.gpu is None else find_gpu(self.gpu)

    @property
    def resolved_device(self) -> Literal["cpu", "cuda"]:
        """Device of the ranks, with ``auto`` resolved."""
        if self.device == "auto":
            return "cuda" if self.gpus_per_node else "cpu"
        return self.device

    @property
    def resolved_ranks_per_node(self) -> int:
        """Ranks of a node, with the default resolved."""
        if self.ranks_per_node is not None:
            return self.ranks_per_node
        return self.gpus_per_node if self.resolved_device == "cuda" else 1


def minutes(time: str) -> float:
    """Return a time limit of sbatch in minutes.

    >>> minutes("90"), minutes("1-12"), minutes("04:30:00")
    (90.0, 2160.0, 270.0)

    Raises:
        InputError: not a time of sbatch.
    """
    match = _TIME.fullmatch(time)
    if match is None:
        raise InputError(
            f"time: {time}",
            rule="is no time of Slurm",
            fix='write it like "1-12:00:00", days-hours:minutes:seconds',
        )
    first, second, third = (int(match[name] or 0) for name in ("first", "second", "third"))
    # After days, and with three parts, the first part is hours; otherwise it is minutes.
    if match["days"] is not None or match["third"] is not None:
        return int(match["days"] or 0) * 1440 + first * 60 + second + third / 60
    return first + second / 60


def read_profile(name_or_path: str | os.PathLike[str]) -> Profile:
    """Read a site profile.

    Args:
        name_or_path: file (with a ``/``, or ending in ``.yaml``), or the name of one in
            ``./profiles``, ``$MELLUM2_PROFILES`` or ``~/.config/mellum2/profiles``.

    Raises:
        InputError: no such profile, an unknown key, a key given twice, an invalid value, or a
            value that looks like a secret.
    """
    path = find_profile(name_or_path)
    text = read_text(path, f"profile {path}", fix="name a profile's YAML file")
    try:
        return profile_from_yaml(text, name=path.stem)
    except InputError as error:
        # The message names only the key; add the file, since several profiles may be in use.
        raise InputError(f"{path}: {error.value}", rule=error.rule, fix=error.fix) from None


def profile_folders() -> Iterator[Path]:
    """Yield the folders of named profiles in the order in which they are searched."""
    yield Path("profiles")
    if os.environ.get(PROFILES_VARIABLE):
        yield Path(os.environ[PROFILES_VARIABLE])
    yield Path("~/.config/mellum2/profiles").expanduser()


def profile_names() -> tuple[str, ...]:
    """Return the names of all profiles in `profile_folders`, sorted."""
    return tuple(
        sorted({path.stem for folder in profile_folders() for path in folder.glob("*.yaml")})
    )


def find_profile(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the file of a profile.

    Raises:
        InputError: no profile of that name.
    """
    given = os.fspath(name_or_path)
    if "/" in given or given.endswith((".yaml", ".yml")):
        return Path(given).expanduser()
    # A project's own profile comes before the site's, and that before the user's.
    for folder in profile_folders():
        if (folder / f"{given}.yaml").is_file():
            return folder / f"{given}.yaml"
    known = profile_names()
    searched = ", ".join(str(folder) for folder in profile_folders())
    raise InputError(
        f"profile {given!r}",
        rule=f"there is no such profile in {searched}",
        fix=nearest(given, known) if known else "write one; docs/examples/profiles has samples",
    )


def profile_from_yaml(text: str, *, name: str) -> Profile:
    """Read a profile from YAML.

    Args:
        text: the YAML.
        name: name of the profile, unless the YAML has one.

    Raises:
        InputError: see `read_profile`.
    """
    values = read_yaml(text, document="profile", fix="see docs/examples/profiles")
    if isinstance(values, Mapping):
        values = {"name": name, **values}
    return from_mapping(Profile, values, document="profile", readers=_READERS)


def _account(value: Any, key: str) -> str | None:
    """Read the account; ``none`` is the word for a site without accounts, not an absent value."""
    text: str | None = from_plain(str(value) if value == "none" else value, str | None, key)
    return text


def _mounts(value: Any, key: str) -> tuple[Mount, ...]:
    if not isinstance(value, list):
        raise InputError(
            f"{key}: {shown(value)}", rule="must be a list", fix="write [/lustre, /data:/data:ro]"
        )
    return tuple(_mount(item, f"{key}[{number}]") for number, item in enumerate(value))


def _mount(value: Any, key: str) -> Mount:
    if not isinstance(value, str):
        return from_mapping(Mount, value, document="profile", key=key)
    parts = value.split(":")
    source, target, flag = (*parts, "", "")[:3]
    if len(parts) > 3 or flag not in ("", "ro", "rw") or not source:
        raise InputError(
            f"{key}={value!r}",
            rule="is no mount",
            fix="write SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro",
        )
    return Mount(source=source, target=target or source, read_only=flag == "ro")


def _flags(value: Any, key: str) -> dict[str, str | int | bool]:
    return {
        # bool first, so that true is a flag without value; all else stays as it is written.
        name: from_plain(flag, bool | str, f"{key}.{name}")
        for name, flag in _mapping(value, key).items()
    }


def _variables(value: Any, key: str) -> dict[str, str]:
    for name, text in _mapping(value, key).items():
        if not isinstance(text, str):
            # The message leaves the value out: a secret may stand there by mistake.
            raise InputError(
                f"{key}.{name}", rule="must be one line of text", fix='put it in quotes, like "1"'
            )
    return {name: str(text) for name, text in value.items()}


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise InputError(
            f"{key}: {type(value).__name__}",
            rule="must be a mapping of names to values",
            fix="use {}",
        )
    return value


_READERS: dict[str, Reader] = {
    "account": _account,
    "container.mounts": _mounts,
    "sbatch": _flags,
    "variables": _variables,
}
