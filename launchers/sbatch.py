"""Render a job as one sbatch script. To submit it, a machine needs only Slurm.

The script's text is `job_template.sh` beside this file. This module fills its ``@NAME@`` fields:
header with ``#SBATCH`` lines, site setup, environment, and the two commands ``agent`` and
``outcome``.

Scripts lie in run folders and wait in queues for days, so the tests hold them byte for byte
(tests/launchers/golden).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launchers.job import LOGS_FOLDER, ClusterJob
from launchers.profile import Container, Mount
from mellum2_megatron.checkpoint.folder import RUN_FILE

WAIT_SECONDS = 60
"""Seconds from the end of one node's agent until srun kills the others.

Without a limit, ranks could wait for a lost one for ever.
"""

_TEMPLATE = Path(__file__).with_name("job_template.sh")

_ALWAYS = ("MASTER_ADDR", "MASTER_PORT", "MELLUM2_SERIES")
"""Variables of the script that ranks and `launchers.outcome` read."""
_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
    "SLURM_NODEID",
    "SLURM_RESTART_COUNT",
    "SLURMD_NODENAME",
)
"""Slurm's variables that `launchers.agent` and `launchers.outcome` read."""


def render(job: ClusterJob) -> str:
    """Return the batch script of a job; `launchers.batch_job.write_job` writes it."""
    modules = [f"module load {shlex.join(job.profile.modules)}"] if job.profile.modules else []
    fields = {
        "HEADER": "\n".join(_header(job)),
        "SITE": "\n".join([*modules, *job.profile.setup]),
        "ENVIRONMENT": "\n".join(_environment(job)),
        "COMMANDS": "\n".join(_commands(job)),
        "ARRAY": ' --array="$SLURM_ARRAY_TASK_ID"' if job.tasks else "",
    }
    # One pass over the template, so that a profile's own text is never read as a field.
    paragraphs = [
        re.sub("@([A-Z]+)@", lambda field: fields[field[1]], paragraph)
        for paragraph in _TEMPLATE.read_text(encoding="utf-8").rstrip("\n").split("\n\n")
    ]
    # A site without modules and setup leaves no empty paragraph behind.
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def log_patterns(job: ClusterJob) -> tuple[str, str]:
    """Return the file names of the batch script's log and of the nodes' logs.

    Slurm fills in ``%x`` (job name), ``%j`` (job), ``%A_%a`` (array and task) and ``%n`` (node).
    """
    name = "%x-%A_%a" if job.tasks else "%x-%j"
    # A % in the folder's own name would be read as a pattern.
    folder = str(job.folder / LOGS_FOLDER).replace("%", "%%")
    return f"{folder}/{name}.log", f"{folder}/{name}-node%n.log"


def container_variables(job: ClusterJob) -> tuple[str, ...]:
    """Return the variables whose value in the batch script must win inside a container."""
    code = ("PYTHONPATH",) if job.code else ()
    return (*_ALWAYS, *code, *job.profile.variables, *job.profile.environment)


def _header(job: ClusterJob) -> Iterator[str]:
    """Yield the comments and ``#SBATCH`` lines at the top of the script."""
    world = f"{job.nodes} node(s) x {job.ranks_per_node} {job.device} rank(s)"
    tasks = f", {len(job.tasks)} of them" if job.tasks else ""
    yield f"# mellum2-megatron: {job.run.name} on {world}{tasks}"
    yield "# Submitted again with sbatch it goes on from the last checkpoint."
    profile = job.profile
    gpus = job.gpus_per_node or None
    flags: dict[str, str | int | bool | None] = {
        "job-name": job.name,
        "account": None if profile.account == "none" else profile.account,
        "partition": profile.partition,
        "qos": profile.qos,
        "time": profile.time,
        "nodes": job.nodes,
        # One task a node: the agent, which starts the node's ranks itself.
        "ntasks-per-node": 1,
        "cpus-per-task": profile.cpus_per_task,
        "mem": profile.memory,
        "exclusive": profile.exclusive,
        "gpus-per-node": gpus if profile.gpu_request == "gpus-per-node" else None,
        "gres": f"gpu:{gpus}" if gpus and profile.gpu_request == "gres" else None,
        "array": job.array,
        "dependency": ",".join(job.dependency) or None,
        "output": log_patterns(job)[0],
        # A requeued job writes into the same log.
        "open-mode": "append",
        "requeue": True,
        # B: Slurm signals the batch shell alone; its trap passes the signal on to the ranks.
        "signal": f"B:USR1@{profile.grace_seconds}",
        **profile.sbatch,
    }
    yield from directives(flags)


def directives(flags: Mapping[str, str | int | bool | None]) -> Iterator[str]:
    """Yield ``#SBATCH`` lines; true is a flag alone, false and None are left out."""
    for flag, value in flags.items():
        if value is True:
            yield f"#SBATCH --{flag}"
        elif value is not None and value is not False:
            yield f"#SBATCH --{flag}={_directive_value(str(value))}"


def _directive_value(value: str) -> str:
    """Quote a value for an ``#SBATCH`` line."""
    # sbatch reads these lines by its own rules, not by bash's: a # outside quotes begins a comment,
    # and a backslash escapes the next character, in both kinds of quotes too.
    if not any(character.isspace() or character in "\"'#\\" for character in value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _environment(job: ClusterJob) -> Iterator[str]:
    """Yield the lines that set the run folder and the ranks' variables."""
    # After the site's own lines: many module systems read variables that are not set.
    yield "set -u"
    # Each task of an array is a run of its own, in a folder below the array's.
    folder = shlex.quote(str(job.folder))
    if not job.tasks:
        yield f"folder={folder}"
    elif job.task_folders in ((), tuple(map(str, range(len(job.tasks))))):
        yield f'folder={folder}/"$SLURM_ARRAY_TASK_ID"'
    else:
        yield f"tasks=({_words(job.task_folders)})"
        yield f'folder={folder}/"${{tasks[$SLURM_ARRAY_TASK_ID]}}"'
    for name, value in job.profile.variables.items():
        yield f"export {name}={shlex.quote(value)}"
    if job.code is not None:
        # In a container the host's own PYTHONPATH names folders that may not exist there.
        inherited = "" if job.profile.container else "${PYTHONPATH:+:$PYTHONPATH}"
        yield f"export PYTHONPATH={shlex.quote(str(job.code))}{inherited}"
    yield (
        "export MELLUM2_SERIES=${MELLUM2_SERIES:-$SLURM_JOB_ID}"
        "  # what continues a job goes under its number"
    )


def _commands(job: ClusterJob) -> Iterator[str]:
    """Define ``agent``, which runs the ranks, and ``outcome``, which decides about a restart."""
    profile, container = job.profile, job.profile.container
    python = shlex.quote(job.python)
    if container is not None:
        define = {"pyxis": _pyxis, "apptainer": _apptainer, "enroot": _enroot}[container.runtime]
        yield from define(container, job)
        python = f'"${{container[@]}}" {python}'
    step = [
        "srun",
        "--ntasks-per-node=1",
        f"--wait={WAIT_SECONDS}",
        # The other nodes' agents end their ranks themselves and write their reports.
        "--kill-on-bad-exit=0",
        "--open-mode=append",
    ]
    if profile.cpus_per_task is not None:  # since Slurm 22.05 srun does not inherit it from the job
        step.append(f"--cpus-per-task={profile.cpus_per_task}")
    agent = ["--ranks", str(job.ranks_per_node), "--device", job.device]
    agent += ["--tries", str(profile.tries)]
    yield "agent=("
    yield f"  {_words(step)}"
    yield f"  {_words([f'--output={log_patterns(job)[1]}', *profile.srun])}"
    yield f'  {python} -m launchers.agent "$folder"/{RUN_FILE} {_words(agent)}'
    yield ")"
    if container is not None and container.runtime == "pyxis":
        # Only srun starts a Pyxis container. --overlap: the agents' step may still be ending.
        python = f"srun --nodes=1 --ntasks=1 --cpus-per-task=1 --overlap {python}"
    yield f'outcome=({python} -m launchers.outcome "$folder" --tries {profile.tries})'


def _pyxis(container: Container, job: ClusterJob) -> Iterator[str]:
    """Define ``container`` as arguments of srun."""
    yield "container=("
    yield f"  {_words([f'--container-image={_image(container)}'])}"
    if container.mounts:
        yield f"  {_words(['--container-mounts=' + ','.join(map(_mount, container.mounts))])}"
    yield f"  {_words([f'--container-workdir={container.workdir or job.folder}'])}"
    # Pyxis passes all variables on, but only named ones override the image's own.
    yield f"  {_words(['--container-env=' + ','.join(container_variables(job))])}"
    if container.arguments:
        yield f"  {_words(container.arguments)}"
    yield ")"


def _apptainer(container: Container, job: ClusterJob) -> Iterator[str]:
    """Define ``container`` as a command in front of another."""
    yield (
        "# Apptainer hands on all variables; "
        "under this name one wins over the image's own of the same name."
    )
    yield f"for name in {' '.join(container_variables(job))}; do"
    yield '  if [[ -v $name ]]; then export "APPTAINERENV_$name=${!name}"; fi'
    yield "done"
    yield "container=("
    yield "  apptainer exec" + (" --nv" if job.device == "cuda" else "")
    # Apptainer's default working folder is the caller's, which the image may lack.
    yield f"  {_words(['--pwd', container.workdir or str(job.folder)])}"
    yield from (f"  {_words(['--bind', _mount(mount)])}" for mount in container.mounts)
    yield f"  {_words([*container.arguments, _image(container)])}"
    yield ")"


def _enroot(container: Container, job: ClusterJob) -> Iterator[str]:
    """Define ``container`` as a command in front of another."""
    yield "container=("
    yield "  enroot start"
    for mount in container.mounts:
        # Enroot takes fstab lines; x-create makes the folder where the image lacks it.
        options = "x-create=auto,rbind" + (",ro" if mount.read_only else "")
        yield f"  {_words(['--mount', f'{mount.source}:{mount.target}:none:{options}'])}"
    yield ")"
    yield "# Enroot hands on no variable that is not named."
    yield f"for name in {' '.join((*_SLURM, *container_variables(job)))}; do"
    yield '  if [[ -v $name ]]; then container+=(--env "$name"); fi'
    yield "done"
    yield f"container+=({_words([*container.arguments, _image(container)])})"


def _image(container: Container) -> str:
    return str(container.image_file or container.image)


def _mount(mount: Mount) -> str:
    return f"{mount.source}:{mount.target}" + (":ro" if mount.read_only else "")


def _words(words: Sequence[str]) -> str:
    """Quote words for bash.

    A word with a comma is quoted too: in an array it looks like a mistake (shellcheck SC2054).
    """
    return " ".join(
        f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word)
        for word in words
    )
