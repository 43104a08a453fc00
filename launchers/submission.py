"""Make checked jobs from the words of `mellum2 launch`, in the order of their submission."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from launchers.job import ClusterJob, check_files, plan_job, with_absolute_paths
from launchers.packaging import Package, check_code, package
from launchers.profile import Profile, profile_names, read_profile
from launchers.weights import imports_folder, plan_weights, without_load
from mellum2_megatron.checkpoint import StartingPoint, output_folder
from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.config import Run, apply_overrides
from mellum2_megatron.planning.resolve import default_nproc, named_run, resolve_device
from mellum2_megatron.planning.stage_chain import check_predecessor, stage_chain
from mellum2_megatron.recipes import recipe_names

COMMANDS = ("run", "status", "logs", "cancel", "pipeline")
"""Commands of `mellum2 launch`; no recipe has such a name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A job with its code and its place among other jobs.

    Attributes:
        job: job as it would be submitted.
        package: code of the job.
        allow_dirty: accept uncommitted changes.
        nodes: number of nodes on the command line; None, the default, leaves it to layout and
            profile.
        sweep: overrides of each task of an array; default empty, for an ordinary job.
        before: run folder of the preceding job in a chain, default none.
        after: names of the jobs that this one waits for, default none.
        problems: reasons for a refusal, which a dry run collects instead of raising; default none.
    """

    job: ClusterJob
    package: Package
    allow_dirty: bool
    nodes: int | None = None
    sweep: tuple[tuple[str, ...], ...] = ()
    before: Path | None = None
    after: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def write_code(self) -> None:
        """Write the packaged code into the run folder; do nothing with ``packager: shared``."""
        package(self.job.folder, self.job.profile.packager, allow_dirty=self.allow_dirty)


def run_to_launch(
    name: str, overrides: Sequence[str], output: str | os.PathLike[str] | None
) -> Run:
    """Return the run of a recipe or a YAML file with its overrides.

    Unlike that of `planning.resolve.resolve_run`, the run may have no output folder: the profile
    then gives one.

    Raises:
        InputError: neither a recipe nor a file, or a bad override.
    """
    # A mistyped command, such as `statsu`, arrives here as a recipe.
    mistyped = get_close_matches(name, COMMANDS, n=1)
    if mistyped and name not in recipe_names():
        raise InputError(
            f"{name!r}",
            rule="is no recipe, run file or command of launch",
            fix=nearest(name, [*recipe_names(), *COMMANDS]),
        )
    run = apply_overrides(named_run(name), overrides)
    if output is None:
        return run
    return dataclasses.replace(
        run, checkpoint=dataclasses.replace(run.checkpoint, output=os.fspath(output))
    )


def choose_profile(executor: str | None, name: str | None) -> Profile:
    """Return the site profile that the options name, or a profile for this machine.

    Args:
        executor: ``local``, ``slurm`` or None for the profile's.
        name: name or file of a profile; None is allowed with ``local`` only.

    Raises:
        InputError: neither option, an unknown executor or profile, or a profile for another
            executor.
    """
    if executor not in (None, "local", "slurm"):
        raise InputError(
            f"--executor {executor}", rule="there are local and slurm", fix="use one of them"
        )
    if name is None:
        if executor == "local":
            return Profile(name="local", executor="local")
        known = profile_names()
        if known:
            fix = f"add --profile ({', '.join(known)})"
        else:
            fix = "write one (docs/launching.md), add --profile FILE"
        if executor is None:
            fix += ", or --executor local for this machine"
        raise InputError(
            "launch" if executor is None else f"--executor {executor}",
            rule="a cluster's jobs need its profile",
            fix=fix,
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
    """Return one run, or an array of it, as a checked submission. Writes nothing.

    Args:
        run: resolved run.
        profile: site profile, or one for this machine.
        nodes, time, sweep: see `launchers.job.plan_job`.
        nproc: ranks on this machine, with an ``executor: local`` profile only.
        allow_dirty: accept uncommitted changes.
        show_only: collect errors in this machine's files (data, image, uncommitted changes) in
            ``problems`` instead of raising them; default False.

    Raises:
        InputError: see `launchers.job.plan_job` and `launchers.job.check_files`; uncommitted
            changes; a stage without its predecessor's checkpoint.
    """
    if profile.executor == "local":
        for option, value in {"--array": sweep, "--nodes": nodes, "--time": time}.items():
            if value:
                raise InputError(
                    option, rule="is for jobs on a cluster", fix="drop it, or use --executor slurm"
                )
        device = resolve_device(profile.device)
        ranks = nproc or profile.ranks_per_node or default_nproc(run, device)
        profile = dataclasses.replace(
            profile,
            device=device,
            ranks_per_node=ranks,
            # A profile may leave the number of GPUs out, but must not have more ranks than GPUs.
            gpus_per_node=max(ranks, profile.gpus_per_node) if device == "cuda" else 0,
        )
        nodes = 1
    elif nproc is not None:
        raise InputError(
            f"--nproc {nproc}", rule="is for this machine", fix="set ranks_per_node in the profile"
        )
    planned = Submission(
        job=plan_job(run, profile, nodes=nodes, time=time, sweep=sweep),
        package=_package(run, profile),
        allow_dirty=allow_dirty,
        nodes=nodes,
        sweep=tuple(map(tuple, sweep)),
    )
    return _checked(planned, show_only=show_only)


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
    """Return the stages of a pipeline as checked submissions. Writes nothing.

    Args:
        stages: runs in order; each starts from the one before it.
        root: folder of the stages' run folders.
        profile, nodes, time, allow_dirty, show_only: see `prepare`.

    Raises:
        InputError: see `prepare` and `mellum2_megatron.planning.stage_chain.stage_chain`.
    """
    if profile.executor == "local":
        raise InputError(
            f"profile {profile.name}",
            rule="chains are Slurm's",
            fix="launch one stage after the other",
        )
    submissions: list[Submission] = []
    for run in stage_chain(stages, root=root.absolute()):
        previous = submissions[-1].job if submissions else None
        planned = Submission(
            job=plan_job(run, profile, nodes=nodes, time=time),
            package=_package(run, profile),
            allow_dirty=allow_dirty,
            nodes=nodes,
            before=None if previous is None else previous.folder,
            after=() if previous is None else (previous.name,),
        )
        submissions.append(_checked(planned, show_only=show_only))
    return tuple(submissions)


def with_weights(
    run: Run,
    profile: Profile,
    prepare_from: Callable[[Run], Sequence[Submission]],
    *,
    root: Path | None = None,
    show_only: bool,
) -> tuple[Submission, ...]:
    """Prepare jobs whose first run may load a Hugging Face folder; import that folder before.

    The import is made here, where the command runs: once, before any job waits in the queue.

    Args:
        run: the first run.
        profile: site profile, which gives a run without an output folder its place.
        prepare_from: function from the first run to the prepared jobs.
        root: folder of the run folders; None (default): that of the run's own.
        show_only: show the import, but do not make it.

    Raises:
        InputError: see `launchers.weights.plan_weights` and `prepare`.
        WorkError: the import failed.
    """
    output = root / run.name if root else output_folder(with_absolute_paths(run, profile))
    run, weights = plan_weights(run, imports_folder(output))
    if weights is None or weights.done:
        if weights is not None and not show_only:
            weights.run()
        return tuple(prepare_from(run))
    # All else is checked before an import, which takes minutes.
    first, *others = prepare_from(without_load(run))
    if not show_only:
        weights.run()
        return tuple(prepare_from(run))
    shown = dataclasses.replace(
        first.job,
        run=dataclasses.replace(
            first.job.run,
            checkpoint=dataclasses.replace(first.job.run.checkpoint, load=run.checkpoint.load),
        ),
    )
    notes = (*first.package.notes, weights.line())
    first = dataclasses.replace(
        first, job=shown, package=dataclasses.replace(first.package, notes=notes)
    )
    return (first, *others)


def split_stages(words: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Return the stages of a command line with their overrides.

    Overrides before the first stage apply to all stages.

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
    """Check that NeMo-Run is installed.

    Raises:
        InputError: it is not.
    """
    # find_spec, because an import takes seconds.
    if importlib.util.find_spec("nemo_run") is None:
        raise InputError(
            "mellum2 launch",
            rule="NeMo-Run submits and it is not installed",
            fix="`make setup-launch`, or pip install -c constraints.txt "
            "'mellum2-megatron[launch]'; "
            "without it `--render sbatch` writes a script that sbatch takes",
        )


def _package(run: Run, profile: Profile) -> Package:
    """Return the code of a job as it would be packaged; write nothing."""
    folder = Path(run.checkpoint.output or Path(profile.runs) / run.name).expanduser()
    # Uncommitted changes are refused later, by `_checked`, or shown as a problem.
    return package(folder, profile.packager, allow_dirty=True, write=False)


def _checked(planned: Submission, *, show_only: bool) -> Submission:
    """Return the submission with its code in the job; raise or collect its problems."""
    packaged = planned.package
    # The nodes import an installed package without PYTHONPATH too.
    path = None if packaged.code.origin == "package" else Path(os.path.abspath(packaged.folder))
    job = dataclasses.replace(planned.job, code=path)
    starts = [StartingPoint.of(run) for run in job.runs]

    def check_predecessors() -> None:
        # In a chain the predecessor's checkpoint does not exist yet.
        if planned.before is None:
            for run, start in zip(job.runs, starts, strict=True):
                check_predecessor(run, start)

    checks: list[Callable[[], object]] = [
        lambda: check_code(job.profile.packager, allow_dirty=planned.allow_dirty),
        check_predecessors,
        lambda: check_files(job, starts, before=planned.before),
    ]
    # The checks are independent: a dry run shows the problems of all, a launch the first.
    problems = []
    for check in checks:
        try:
            check()
        except InputError as error:
            if not show_only:
                raise
            problems.append(str(error))
    return dataclasses.replace(planned, job=job, problems=tuple(problems))
