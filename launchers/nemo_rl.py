"""Launch of a rendered run of NeMo-RL: its ``ray.sub`` on Slurm, and a job of rewards beside it.

NeMo-RL brings up Ray in its container and starts the driver there. The rewards run in this
project's environment, where the sandbox is, and write their address to a file that the environment
inside NeMo-RL reads.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.corpus_arrays import project_folder
from launchers.profile import Profile
from launchers.sbatch import directives
from mellum2_megatron.common.errors import InputError, shown
from mellum2_megatron.rlvr.nemo_rl.config import TOKEN_FILE, URL_FILE
from mellum2_megatron.rlvr.nemo_rl.declared import declared

CONFIG_FILE, LAUNCH_FILE, REWARDS_FILE = "grpo.yaml", "launch.sh", "rewards.sh"
_DRIVER = "mellum2_megatron.rlvr.nemo_rl.driver"
_OF_RAY_SUB = {"CONTAINER", "MOUNTS", "COMMAND", "GPUS_PER_NODE", "BASE_LOG_DIR"}
_IMPORT_FILE = "nemo_rl/models/megatron/community_import.py"


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What the scripts need to know.

    Attributes:
        name: name of the jobs.
        output: folder of the rendered files, absolute.
        checkout: NeMo-RL's checkout, absolute.
        nodes: nodes of NeMo-RL's job.
        profile: site profile of NeMo-RL's job.
        rewards: site profile of the job of rewards; its GPUs are not asked for.
        port: port of the rewards.
        own: functions of one's own that the rewards offer.
        tasks: folder of the tasks, from which such functions are named.
    """

    name: str
    output: Path
    checkout: Path
    nodes: int
    profile: Profile
    rewards: Profile
    port: int
    own: Sequence[str] = ()
    tasks: Path = Path()


def check_launch(launch: Launch, folders: Sequence[Path]) -> None:
    """Refuse profiles that NeMo-RL's scripts cannot work with.

    Args:
        launch: the launch.
        folders: folders that the container must see under their own names.

    Raises:
        InputError: a folder whose name the scripts cannot hold; on Slurm, no container, one of
            another runtime than Pyxis, one with arguments, a folder that is not mounted, or a
            variable that ``ray.sub`` reads.
    """
    for folder in folders:
        if not str(folder).isprintable():
            raise InputError(
                f"the folder {shown(str(folder))}",
                rule="a line break or other control character in it would end a line of the script",
                fix="rename it",
            )
    profile = launch.profile
    if profile.executor == "local":
        return
    container = profile.container
    if container is None or container.runtime != "pyxis":
        raise InputError(
            f"profile {profile.name}: "
            + ("no container" if container is None else f"container.runtime: {container.runtime}"),
            rule="NeMo-RL's ray.sub starts its container with Pyxis",
            fix="name NeMo-RL's image with runtime: pyxis in a profile of its own",
        )
    for name in _OF_RAY_SUB & profile.variables.keys():
        raise InputError(
            f"profile {profile.name}: variables.{name}",
            rule="launch.sh sets it for NeMo-RL's ray.sub",
            fix="leave it out",
        )
    for folder in folders:
        if not container.covers(folder):
            raise InputError(
                f"profile {profile.name}: container.mounts",
                rule=f"{folder} must be in the container under the same name",
                fix=f"add {folder}, or a folder around it",
            )


def launch_script(launch: Launch) -> str:
    """Return the script that starts the run: on Slurm it submits both jobs."""
    slurm = launch.profile.executor == "slurm"
    lines = [*_checks(launch), *(_submission(launch) if slurm else _start(launch))]
    return "\n".join(lines) + "\n"


def rewards_script(launch: Launch) -> str:
    """Return the script of the rewards, a batch script where NeMo-RL runs on Slurm."""
    slurm, profile = launch.profile.executor == "slurm", launch.rewards
    host = "0.0.0.0" if slurm else "127.0.0.1"
    lines = ["#!/bin/bash"]
    if slurm:
        # A % in the folder's own name would be read as a pattern.
        logs = str(launch.output).replace("%", "%%")
        lines += directives(
            {
                "job-name": f"{launch.name}-rewards",
                "account": None if profile.account == "none" else profile.account,
                "partition": profile.partition,
                "qos": profile.qos,
                "time": profile.time,
                "nodes": 1,
                "ntasks": 1,
                "cpus-per-task": profile.cpus_per_task,
                "mem": profile.memory,
                "output": f"{logs}/rewards-%j.log",
                **profile.sbatch,
            }
        )
    lines += [*_site(profile), "set -eu", f"cd {shlex.quote(str(launch.tasks))}"]
    address = "$(hostname -f)" if slurm else host
    words = [shlex.quote(profile.python or sys.executable), "-m mellum2_megatron rl serve"]
    words += [f"--host {host} --port {launch.port}", f'--token-file "$output/{TOKEN_FILE}"']
    words += [f"--own {shlex.quote(name)}" for name in launch.own]
    lines += [
        f"output={shlex.quote(str(launch.output))}",
        "server=",
        "umask 077",
        f'[ -s "$output/{TOKEN_FILE}" ] ||',
        f"    head -c 32 /dev/urandom | base64 | tr -d '\\n' > \"$output/{TOKEN_FILE}\"",
        # Both at once: a reader never sees half an address.
        f'printf "http://%s:%s\\n" "{address}" {launch.port} > "$output/.{URL_FILE}"',
        f'mv "$output/.{URL_FILE}" "$output/{URL_FILE}"',
        f"trap 'kill $server 2>/dev/null; rm -f \"$output/{URL_FILE}\"' EXIT",
        # In the background: bash acts on a signal only when no command is in front.
        "trap 'exit 143' TERM INT",
        f"{' '.join(words)} &",
        "server=$!",
        "wait $server",
    ]
    return "\n".join(lines) + "\n"


def _checks(launch: Launch) -> Iterator[str]:
    """Yield the beginning of the launch script: is this the NeMo-RL that was rendered for?"""
    commit = declared(launch.checkout).commit
    checkout = shlex.quote(str(launch.checkout))
    yield "#!/bin/bash"
    yield "set -euo pipefail"
    yield f"cd {checkout}"
    yield f'[ "$(git rev-parse HEAD)" = {commit} ] ||'
    yield f'    echo "warning: rendered for NeMo-RL {commit[:9]}, this is another version" >&2'
    yield f"if ! grep -q '^import conversion.bridge' {_IMPORT_FILE}; then"
    yield '    echo "error: Mellum 2 is not registered in this NeMo-RL. Fix: in $PWD run' + " \\"
    yield "sed -i 's/^from megatron.bridge import AutoBridge\\$/&\\\\nimport conversion.bridge/' \\"
    yield f'{_IMPORT_FILE}" >&2'
    yield "    exit 2"
    yield "fi"


def _driver(launch: Launch) -> str:
    config = shlex.quote(str(launch.output / CONFIG_FILE))
    return f"uv run python -m {_DRIVER} --config {config}"


def _site(profile: Profile) -> Iterator[str]:
    if profile.modules:
        yield f"module load {shlex.join(profile.modules)}"
    yield from profile.setup
    for name, value in profile.variables.items():
        yield f"export {name}={shlex.quote(value)}"
    code = shlex.quote(str(project_folder()))
    yield f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}"


def _submission(launch: Launch) -> Iterator[str]:
    """Yield the submission of both jobs."""
    profile, container = launch.profile, launch.profile.container
    assert container is not None, "check_launch has refused this"
    yield from _site(profile)
    mounts = ",".join(
        f"{mount.source}:{mount.target}{':ro' if mount.read_only else ''}"
        for mount in container.mounts
    )
    yield f"export CONTAINER={shlex.quote(container.image)}"
    yield f"export MOUNTS={shlex.quote(mounts)}"
    yield f"export COMMAND={shlex.quote(_driver(launch))}"
    yield f"export GPUS_PER_NODE={profile.gpus_per_node}"
    yield f"export BASE_LOG_DIR={shlex.quote(str(launch.output))}"
    # The address of an earlier job would be taken for this one's.
    yield f'rm -f "$BASE_LOG_DIR/{URL_FILE}"'
    yield f'rewards=$(sbatch --parsable "$BASE_LOG_DIR/{REWARDS_FILE}")'
    yield 'echo "rewards: job ${rewards%%;*}"'
    words = ["train=$(sbatch --parsable", *_flags(_flags_of_training(launch))]
    words += ['--dependency="after:${rewards%%;*}"', "ray.sub)"]
    yield " \\\n    ".join(words)
    yield 'echo "NeMo-RL: job ${train%%;*}"'
    # The rewards would else wait for requests until their own time limit.
    words = ["sbatch --parsable", *_flags(_flags_of_end(launch))]
    words += ['--dependency="afterany:${train%%;*}"', '--wrap="scancel ${rewards%%;*}" > /dev/null']
    yield " \\\n    ".join(words)


def _flags_of_end(launch: Launch) -> dict[str, str | int | bool | None]:
    profile = launch.rewards
    return {
        "job-name": f"{launch.name}-end",
        "account": None if profile.account == "none" else profile.account,
        "partition": profile.partition,
        "qos": profile.qos,
        "time": 5,
        "output": "/dev/null",
    }


def _flags_of_training(launch: Launch) -> dict[str, str | int | bool | None]:
    profile = launch.profile
    gpus: dict[str, str | int | bool | None] = {}
    if profile.gpu_request == "gpus-per-node":
        gpus["gpus-per-node"] = profile.gpus_per_node
    elif profile.gpu_request == "gres":
        gpus["gres"] = f"gpu:{profile.gpus_per_node}"
    return {
        "job-name": launch.name,
        "account": None if profile.account == "none" else profile.account,
        "partition": profile.partition,
        "qos": profile.qos,
        "time": profile.time,
        "nodes": launch.nodes,
        "mem": profile.memory,
        "exclusive": profile.exclusive,
        **gpus,
        **profile.sbatch,
    }


def _flags(values: Mapping[str, str | int | bool | None]) -> Iterator[str]:
    """Yield flags of sbatch as words; true is a flag alone, false and None are left out."""
    for name, value in values.items():
        if value is True:
            yield f"--{name}"
        elif value is not None and value is not False:
            yield f"--{name}={shlex.quote(str(value))}"


def _start(launch: Launch) -> Iterator[str]:
    """Yield the start of both on this machine."""
    yield from _site(launch.profile)
    yield f"output={shlex.quote(str(launch.output))}"
    yield f'rm -f "$output/{URL_FILE}"'
    yield f'bash "$output/{REWARDS_FILE}" &'
    yield "rewards=$!"
    yield "trap 'kill $rewards 2>/dev/null; wait $rewards || true' EXIT"
    yield _driver(launch)
