"""A job as one plain sbatch script, which needs nothing on the submitting machine but Slurm."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from launchers.job import LOGS_FOLDER, Job
from launchers.profile import Container, Mount
from mellum2_megatron.checkpoint.folder import RUN_FILE

WAIT_SECONDS = 60
"""Once a node's agent has ended, the others get so long: a rank that waits for one that is gone may
wait for ever."""

_ALWAYS = ("MASTER_ADDR", "MASTER_PORT", "MELLUM2_SERIES")
_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
    "SLURM_NODEID",
    "SLURM_RESTART_COUNT",
    "SLURMD_NODENAME",
)


def render(job: Job) -> str:
    """Return the script; `job.write_job` puts it, and the folders that it needs, in place."""
    sections = [
        "\n".join(["#!/bin/bash", *_header(job), *_directives(job)]),
        "\n".join(_site(job)),
        "\n".join(_environment(job)),
        _RENDEZVOUS.strip(),
        "\n".join(_commands(job)),
        _RUN.strip(),
        _CONTINUE.replace(
            "@ARRAY@", ' --array="$SLURM_ARRAY_TASK_ID"' if job.tasks else ""
        ).strip(),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def agent_arguments(job: Job) -> list[str]:
    """Return the arguments of ``python -m launchers.agent`` but the first, the run file."""
    return [
        "--ranks",
        str(job.ranks_per_node),
        "--device",
        job.device,
        "--tries",
        str(job.profile.tries),
    ]


def container_variables(job: Job) -> tuple[str, ...]:
    """Return the names of the variables that ranks in a container must see as the batch script has
    them."""
    code = ("PYTHONPATH",) if job.code else ()
    return (*_ALWAYS, *code, *job.profile.variables, *job.profile.environment)


def log_files(job: Job) -> tuple[str, str]:
    """Return the patterns of the batch script's log and of the nodes' logs, as Slurm fills them
    in."""
    name = "%x-%A_%a" if job.tasks else "%x-%j"
    folder = str(job.folder / LOGS_FOLDER).replace("%", "%%")
    return f"{folder}/{name}.log", f"{folder}/{name}-node%n.log"


def _header(job: Job) -> Iterator[str]:
    world = f"{job.nodes} node(s) x {job.ranks_per_node} {job.device} rank(s)"
    yield f"# mellum2-megatron: {job.run.name} on {world}" + (
        f", {len(job.tasks)} of them" if job.tasks else ""
    )
    yield "# Submitted again with sbatch it goes on from the last checkpoint."


def _directives(job: Job) -> Iterator[str]:
    profile = job.profile
    flags: dict[str, str | int | bool | None] = {
        "job-name": job.name,
        "account": None if profile.account == "none" else profile.account,
        "partition": profile.partition,
        "qos": profile.qos,
        "time": profile.time,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": profile.cpus_per_task,
        "mem": profile.memory,
        "exclusive": profile.exclusive,
        "gpus-per-node": job.gpus_per_node
        if profile.gpu_request == "gpus-per-node" and job.gpus_per_node
        else None,
        "gres": f"gpu:{job.gpus_per_node}"
        if profile.gpu_request == "gres" and job.gpus_per_node
        else None,
        "array": job.array,
        "dependency": ",".join(job.dependency) or None,
        "output": log_files(job)[0],
        "open-mode": "append",
        "requeue": True,
        "signal": f"B:USR1@{profile.grace_seconds}",
        **profile.sbatch,
    }
    for flag, value in flags.items():
        if value is True:
            yield f"#SBATCH --{flag}"
        elif value is not None and value is not False:
            yield f"#SBATCH --{flag}={_directive_value(str(value))}"


def _directive_value(value: str) -> str:
    """Quote a value as sbatch reads its own lines, which is not as a shell does."""
    if not any(character.isspace() or character in "\"'#" for character in value):
        return value
    return '"' + value.replace('"', r"\"") + '"'


def _site(job: Job) -> Iterator[str]:
    if job.profile.modules:
        yield "module load " + " ".join(map(shlex.quote, job.profile.modules))
    yield from job.profile.setup


def _environment(job: Job) -> Iterator[str]:
    yield "set -u"
    folder = shlex.quote(str(job.folder))
    yield f'folder={folder}/"$SLURM_ARRAY_TASK_ID"' if job.tasks else f"folder={folder}"
    for name, value in job.profile.variables.items():
        yield f"export {name}={shlex.quote(value)}"
    if job.code is not None:
        yield f"export PYTHONPATH={shlex.quote(str(job.code))}" + (
            "" if job.profile.container else "${PYTHONPATH:+:$PYTHONPATH}"
        )
    yield "export MELLUM2_SERIES=${MELLUM2_SERIES:-$SLURM_JOB_ID}  # what continues a job goes under its number"


_RENDEZVOUS = r"""
# All nodes meet at the first one, under the address by which Slurm itself reaches it, at a port of
# this start's own.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol --oneliner show node "$head_node" | grep -o ' NodeAddr=[^ ]*' | cut -d = -f 2)
export MASTER_ADDR=${MASTER_ADDR:-$head_node}
export MASTER_PORT=$((10000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 20000))
"""


def _commands(job: Job) -> Iterator[str]:
    """Define ``agent``, which runs the ranks of all nodes, and ``outcome``, which judges how they
    ended."""
    profile, container = job.profile, job.profile.container
    inside = ""
    if container is not None:
        yield from {"pyxis": _pyxis, "apptainer": _apptainer, "enroot": _enroot}[container.runtime](
            container, job
        )
        inside = '"${container[@]}" '
    step = [
        "srun",
        "--ntasks-per-node=1",
        f"--wait={WAIT_SECONDS}",
        "--kill-on-bad-exit=0",
        "--open-mode=append",
    ]
    if profile.cpus_per_task is not None:  # since Slurm 22.05 srun does not take it from the job
        step.append(f"--cpus-per-task={profile.cpus_per_task}")
    python = inside + shlex.quote(job.python)
    yield "agent=("
    yield f"  {_words(step)}"
    yield f"  {_words([f'--output={log_files(job)[1]}', *profile.srun])}"
    yield f'  {python} -m launchers.agent "$folder"/{RUN_FILE} {_words(agent_arguments(job))}'
    yield ")"
    if container is not None and container.runtime == "pyxis":
        python = f"srun --nodes=1 --ntasks=1 --cpus-per-task=1 --overlap {python}"
    yield f'outcome=({python} -m launchers.outcome "$folder" --tries {profile.tries})'


def _pyxis(container: Container, job: Job) -> Iterator[str]:
    """Define ``container`` as arguments of srun."""
    # Pyxis hands on all variables, but where the image sets one too, the image's wins unless it is
    # named.
    yield "container=("
    yield f"  {_words([f'--container-image={container.image_file or container.image}'])}"
    if container.mounts:
        yield f"  {_words(['--container-mounts=' + ','.join(map(_mount, container.mounts))])}"
    yield f"  {_words([f'--container-workdir={container.workdir or job.folder}'])}"
    yield f"  {_words(['--container-env=' + ','.join(container_variables(job))])}"
    if container.arguments:
        yield f"  {_words(container.arguments)}"
    yield ")"


def _apptainer(container: Container, job: Job) -> Iterator[str]:
    """Define ``container`` as a command in front of another."""
    yield "# Apptainer hands on all variables; under this name one wins over the image's own of the same name."
    yield f"for name in {' '.join(container_variables(job))}; do"
    yield '  if [[ -v $name ]]; then export "APPTAINERENV_$name=${!name}"; fi'
    yield "done"
    yield "container=("
    yield "  apptainer exec" + (" --nv" if job.device == "cuda" else "")
    yield f"  {_words(['--pwd', container.workdir or str(job.folder)])}"
    yield from (f"  {_words(['--bind', _mount(each)])}" for each in container.mounts)
    yield f"  {_words([*container.arguments, str(container.image_file or container.image)])}"
    yield ")"


def _enroot(container: Container, job: Job) -> Iterator[str]:
    """Define ``container`` as a command in front of another."""
    yield "container=("
    yield "  enroot start"
    yield from (f"  {_words(['--mount', _fstab(each)])}" for each in container.mounts)
    yield ")"
    yield "# Enroot hands on no variable that is not named."
    yield f"for name in {' '.join((*_SLURM, *container_variables(job)))}; do"
    yield '  if [[ -v $name ]]; then container+=(--env "$name"); fi'
    yield "done"
    yield f"container+=({_words([*container.arguments, str(container.image_file or container.image)])})"


def _mount(mount: Mount) -> str:
    return f"{mount.source}:{mount.target}" + (":ro" if mount.read_only else "")


def _fstab(mount: Mount) -> str:
    options = "x-create=auto,rbind" + (",ro" if mount.read_only else "")
    return f"{mount.source}:{mount.target}:none:{options}"


def _words(words: Sequence[str]) -> str:
    """Quote words for bash; also those with commas, which look like a mistake in an array
    (shellcheck SC2054)."""
    return " ".join(
        f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word)
        for word in words
    )


_RUN = r"""
# Slurm tells this shell, not the ranks, that time runs out (--signal=B:): it tells them. They save
# and leave with 75.
told=
signals=0
step=
# shellcheck disable=SC2317  # a trap calls it
pass_on() {
  told=$1
  signals=$((signals + 1))
  if [[ -n $step ]]; then kill -s USR1 "$step" 2> /dev/null; fi
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

"${agent[@]}" &
step=$!
if [[ -n $told ]]; then pass_on "$told"; fi
heard=-1
while [[ $signals -ne $heard ]]; do  # a signal ends `wait`, not the step
  heard=$signals
  wait "$step"
  code=$?
done
step=
if [[ $code -eq 0 ]]; then exit 0; fi
"""

_CONTINUE = r"""
"${outcome[@]}" --code "$code" --told "$told"
code=$?
if [[ $code -ne 0 ]]; then exit "$code"; fi
if [[ $told == TERM ]]; then exit 75; fi

# Start again: the same job, or where that is not allowed another one, for which those that wait for
# this one then wait.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}
if scontrol requeue "$job"; then exit 75; fi
next=$(env -u SLURM_RESTART_COUNT sbatch --parsable --dependency=afterany:"$SLURM_JOB_ID"@ARRAY@ "$0") || exit 1
next=${next%%;*}
echo "mellum2: job $next continues job $SLURM_JOB_ID"
squeue --noheader --me --states=PENDING --format='%i %E' | grep "afterok:$SLURM_JOB_ID(" | while read -r waiting on; do
  on=$(sed "s/([a-z_]*)//g; s/afterok:$SLURM_JOB_ID\\b/afterok:$next/" <<< "$on")
  scontrol update jobid="$waiting" dependency="$on"
done
exit 75
"""
