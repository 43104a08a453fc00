"""From the words of `mellum2 launch` to jobs that have been checked: what would be submitted, and
in which order."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.job import Job, check_place, plan_job
from launchers.packaging import Package, check_code, package
from launchers.profile import Profile, profile_names, read_profile
from mellum2_megatron.checkpoint import read_run
from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.config import Run, apply_overrides
from mellum2_megatron.planning.resolve import default_nproc, resolve_device
from mellum2_megatron.planning.stage_chain import check_predecessor, stage_chain
from mellum2_megatron.recipes import recipe, recipe_names

COMMANDS = ("run", "status", "logs", "cancel", "pipeline")
"""Commands of `mellum2 launch`; no recipe has such a name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A job, and what is not part of it.

    Attributes:
        job: as it would be submitted.
        package: its code.
        allow_dirty: whether uncommitted changes may go along.
        nodes: as asked for; None leaves them to layout and profile.
        sweep: overrides of each task of an array.
        before: run folder of the job before it in a chain.
        after: names of the jobs that it waits for.
        problems: why it would be refused now, if it is to be shown only.
    """

    job: Job
    package: Package
    allow_dirty: bool
    nodes: int | None = None
    sweep: tuple[tuple[str, ...], ...] = ()
    before: Path | None = None
    after: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def write_code(self) -> None:
        """Put the code into the run's folder, if the packager does so."""
        package(self.job.folder, self.job.profile.packager, allow_dirty=self.allow_dirty)


def resolve(name: str, overrides: Sequence[str], output: str | os.PathLike[str] | None) -> Run:
    """Return the run of a recipe or a YAML file, with overrides; without a folder if none is named.

    Raises:
        InputError: neither a recipe nor a file, or a bad override.
    """
    if name.endswith((".yaml", ".yml")):
        found = read_run(Path(name))
    elif name in recipe_names():
        found = recipe(name)
    else:
        known = [*recipe_names(), *COMMANDS]
        raise InputError(
            f"{name!r}",
            rule="is no recipe, run file or command of launch",
            fix=nearest(name, known),
        )
    found = apply_overrides(found, overrides)
    if output is None:
        return found
    return dataclasses.replace(
        found, checkpoint=dataclasses.replace(found.checkpoint, output=os.fspath(output))
    )


def choose_profile(executor: str | None, name: str | None) -> Profile:
    """Return the site profile that the options name, or one for this machine.

    Raises:
        InputError: neither or no such option, an unknown profile, or one of the other kind.
    """
    if executor not in (None, "local", "slurm"):
        raise InputError(
            f"--executor {executor}", rule="there are local and slurm", fix="use one of them"
        )
    if name is None:
        if executor == "local":
            return Profile(name="local", executor="local")
        known = profile_names()
        given = "launch" if executor is None else f"--executor {executor}"
        raise InputError(
            given,
            rule="a cluster's jobs need its profile",
            fix=(
                f"add --profile ({', '.join(known)})"
                if known
                else "write one (docs/launching.md), add --profile FILE"
            )
            + ("" if executor else ", or --executor local for this machine"),
        )
    profile = read_profile(name)
    if executor is not None and profile.executor != executor:
        raise InputError(
            f"--executor {executor} with --profile {name}",
            rule=f"that profile is for {profile.executor}",
            fix="drop one of the two",
        )
    return profile


def prepare(
    run: Run,
    profile: Profile,
    *,
    nodes: int | None = None,
    time: str | None = None,
    nproc: int | None = None,
    sweep: Sequence[Sequence[str]] = (),
    allow_dirty: bool = False,
    show_only: bool = False,
) -> Submission:
    """Return one run (or an array of it) as it would be submitted, checked. Writes nothing.

    With ``show_only`` what is amiss with this machine's files (no data yet, no image, uncommitted
    changes) does not raise: it becomes the submission's ``problems``.

    Raises:
        InputError: see `launchers.job.make_job`; uncommitted changes; a stage without its
            predecessor's checkpoint.
    """
    if profile.executor == "local":
        profile = _here(profile, run, nproc)
        for option, value in {"--array": sweep, "--nodes": nodes, "--time": time}.items():
            if value:
                raise InputError(
                    option, rule="is for jobs on a cluster", fix="drop it, or use --executor slurm"
                )
        nodes = 1
    elif nproc is not None:
        raise InputError(
            f"--nproc {nproc}", rule="is for this machine", fix="set ranks_per_node in the profile"
        )
    given = Submission(
        job=plan_job(run, profile, nodes=nodes, time=time, sweep=sweep),
        package=_package(run, profile),
        allow_dirty=allow_dirty,
        nodes=nodes,
        sweep=tuple(map(tuple, sweep)),
    )
    return _checked(given, show_only=show_only)


def prepare_chain(
    stages: Sequence[Run],
    profile: Profile,
    *,
    root: Path,
    nodes: int | None = None,
    time: str | None = None,
    allow_dirty: bool = False,
    show_only: bool = False,
) -> tuple[Submission, ...]:
    """Return stages that follow each other as they would be submitted, checked. Writes nothing.

    Raises:
        InputError: see `prepare` and `mellum2_megatron.planning.stage_chain.stage_chain`.
    """
    if profile.executor == "local":
        raise InputError(
            f"profile {profile.name}",
            rule="chains are Slurm's",
            fix="launch one stage after the other",
        )
    found: list[Submission] = []
    for run in stage_chain(stages, root=root.absolute()):
        before = found[-1].job if found else None
        given = Submission(
            job=plan_job(run, profile, nodes=nodes, time=time),
            package=_package(run, profile),
            allow_dirty=allow_dirty,
            nodes=nodes,
            before=None if before is None else before.folder,
            after=() if before is None else (before.name,),
        )
        found.append(_checked(given, show_only=show_only))
    return tuple(found)


def split_stages(words: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Return the stages of a command line with their overrides: those before the first stage are
    everybody's.

    >>> split_stages(["seed=1", "a", "data.path=x", "b"])
    [('a', ('seed=1', 'data.path=x')), ('b', ('seed=1',))]
    """
    common: list[str] = []
    stages: list[tuple[str, list[str]]] = []
    for word in words:
        if "=" not in word:
            stages.append((word, list(common)))
        else:
            (stages[-1][1] if stages else common).append(word)
    return [(name, tuple(overrides)) for name, overrides in stages]


def require_nemo_run() -> None:
    """Check that NeMo-Run is installed, without importing it.

    Raises:
        InputError: it is not; the message says how to get it.
    """
    if importlib.util.find_spec("nemo_run") is None:
        raise InputError(
            "mellum2 launch",
            rule="NeMo-Run submits and it is not installed",
            fix="`make setup-launch`, or pip install -c constraints.txt 'mellum2-megatron[launch]'; without it "
            "`--render sbatch` writes a script that sbatch takes",
        )


def _package(run: Run, profile: Profile) -> Package:
    """Return a job's code; whether it may have changes is for `_checked` to say."""
    folder = Path(run.checkpoint.output or Path(profile.runs) / run.name).expanduser()
    return package(folder, profile.packager, allow_dirty=True, write=False)


def _checked(given: Submission, *, show_only: bool) -> Submission:
    """Return the submission with its code in the job, or with what is wrong with it."""
    code = given.package.folder if _on_path(given.package) else None
    job = dataclasses.replace(given.job, code=None if code is None else Path(os.path.abspath(code)))
    checks: list[Callable[[], object]] = [
        lambda: check_code(job.profile.packager, allow_dirty=given.allow_dirty),
        lambda: _check_predecessors(() if given.before else job.runs),
        lambda: check_place(job, before=given.before),
    ]
    problems = []
    for check in checks:
        try:
            check()
        except InputError as error:
            if not show_only:
                raise
            problems.append(str(error))
    return dataclasses.replace(given, job=job, problems=tuple(problems))


def _check_predecessors(runs: Sequence[Run]) -> None:
    """Check what each run goes on from; see
    `mellum2_megatron.planning.stage_chain.check_predecessor`."""
    for run in runs:
        check_predecessor(run)


def _on_path(code: Package) -> bool:
    """Whether the code must be put on the path: not where it is installed as a package."""
    return code.code.origin != "package"


def _here(profile: Profile, run: Run, nproc: int | None) -> Profile:
    """Return the profile with this machine's device and ranks."""
    device = resolve_device(profile.device)
    ranks = nproc or profile.ranks_per_node or default_nproc(run, device)
    gpus = max(ranks, profile.gpus_per_node) if device == "cuda" else 0
    return dataclasses.replace(profile, device=device, ranks_per_node=ranks, gpus_per_node=gpus)
