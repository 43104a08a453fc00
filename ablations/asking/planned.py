"""A study at one scale: every arm as a resolved run, checked to be comparable."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablations.asking.finding import NamedStudy
from ablations.asking.scales import BASES, DEVICE, TINY_DATA
from ablations.asking.study import SCALES, Arm, Base, DataSet, Quantity, Scale, Study
from conversion.exportable import require_exportable_run
from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.common.field_checks import require
from mellum2_megatron.common.own_python import errors_of_file
from mellum2_megatron.config import Device, Run, apply_overrides
from mellum2_megatron.planning.rules import enforce
from mellum2_megatron.recipes import recipe

_OURS = ("seed", "data.seed", "checkpoint.output", "checkpoint.load", "checkpoint.continue_from")
"""Keys that the runner sets, so a study does not."""

_DATA = ("data.path", "data.train", "data.valid")
"""Keys of the data's folders, which a `DataSet` names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedArm:
    """An arm at one scale.

    Attributes:
        arm: the arm.
        run: its run, without seed and output folder of its tasks.
        data: its data; None: those of the run, which nothing here makes.
    """

    arm: Arm
    run: Run
    data: DataSet | None

    def amount(self, quantity: Quantity) -> float:
        """Return a quantity of the run; see `ablations.asking.study.Match`."""
        architecture = self.run.architecture
        if quantity == "parameters":
            return architecture.num_parameters()
        if quantity == "active_parameters":
            return architecture.num_active_parameters()
        tokens = (
            self.run.schedule.train_samples - self.run.data.first_sample
        ) * self.run.data.sequence_length
        return tokens if quantity == "tokens" else tokens * self.flops_per_token

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of one token, forward and backward, with the MTP head."""
        return self.run.architecture.flops_per_token(self.run.data.sequence_length)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A study at one scale.

    Attributes:
        name: name of the study.
        study: the study.
        scale: the scale.
        arms: its arms, in the study's order.
        start: run whose weights all arms start from; None: they start from random weights.
        device: device of the runs.
        world_size: ranks of a run.
    """

    name: str
    study: Study
    scale: Scale
    arms: tuple[PlannedArm, ...]
    start: Run | None
    device: Device

    @property
    def world_size(self) -> int:
        """Ranks of a run; the largest number, if arms differ."""
        runs = [arm.run for arm in self.arms] + ([self.start] if self.start else [])
        return max(ranks(run) for run in runs)

    def arm(self, name: str) -> PlannedArm:
        """Return an arm by its name.

        Raises:
            InputError: there is none; the message names the nearest.
        """
        self.study.arm(name)
        return next(arm for arm in self.arms if arm.arm.name == name)


def ranks(run: Run) -> int:
    """Return the number of ranks of a run."""
    return run.layout.world_size or run.layout.smallest_world_size


def plan_study(
    named: NamedStudy,
    scale: Scale,
    *,
    folders: Mapping[str, str] | None = None,
    device: Device | None = None,
    for_release: bool = False,
) -> Plan:
    """Return a study at one scale, with all checks that need no file.

    Args:
        named: the study.
        scale: one of its scales.
        folders: folders of data sets by name, in place of the study's; default none.
        device: device of the runs; None (default): the scale's.
        for_release: refuse arms that the released format cannot hold, default false: as the study
            says.

    Raises:
        InputError: the study lacks the scale; an arm has an override that no run takes, breaks a
            rule, equals another one, or does not match what the study claims; one cannot be
            released, and that is asked for.
    """
    study = named.study
    base = _base(named, study.bases, scale)
    own = device or DEVICE[scale]
    folders = dict(folders or {})
    used: set[str] = set()

    def with_data(run: Run, data: DataSet | None) -> tuple[Run, DataSet | None]:
        if data is None:
            return run, None
        used.add(data.name)
        path = folders.get(data.name, data.path)
        data = dataclasses.replace(data, path=path)
        return apply_overrides(run, [f"data.path={path}", *data.overrides]), data

    shared = (study.data or {"tiny": TINY_DATA}).get(scale)
    arms = []
    for arm in study.arms:
        data = arm.data.get(scale) if isinstance(arm.data, Mapping) else arm.data
        run, made = with_data(base, data or shared)
        run = _named(arm, run, scale)
        arms.append(PlannedArm(arm=arm, run=run, data=made))
    start = None
    if study.starts_from is not None:
        start, _ = with_data(_base(named, study.starts_from, scale, common=False), shared)
    for name in folders:
        if name not in used:
            raise InputError(
                f"--data {name}={folders[name]}",
                rule="the study has no data set of that name",
                fix=nearest(name, used) if used else "leave it out",
            )
    plan = Plan(
        name=named.name, study=study, scale=scale, arms=tuple(arms), start=start, device=own
    )
    for planned in plan.arms:
        with _errors_of(f"arm {planned.arm.name}"):
            _check(planned.run, own)
            if for_release or study.for_release:
                require_exportable_run(planned.run)
    if start is not None:
        with _errors_of("the start"):
            _check(start, own)
    _check_unlike(plan)
    _check_matches(plan)
    return plan


def scales_of(study: Study) -> tuple[Scale, ...]:
    """Return the scales that a study has, the smallest first."""
    return tuple(scale for scale in SCALES if scale in (study.bases or BASES))


def differences(plan: Plan) -> dict[str, list[str]]:
    """Return the keys in which arms differ, each with its value in every arm, as text."""
    plain = [_flat(arm.run) for arm in plan.arms]
    # An arm may have a part of the model that the control lacks, and its keys with it.
    keys = [
        key
        for key in dict.fromkeys(key for values in plain for key in values)
        if len({repr(values.get(key)) for values in plain}) > 1
    ]
    return {key: [_text(values.get(key)) for values in plain] for key in keys}


def require_scale(study: Study, scale: str) -> Scale:
    """Return a scale that the study has.

    Raises:
        InputError: there is no such scale, or the study lacks it.
    """
    known = scales_of(study)
    for one in known:
        if one == scale:
            return one
    rule = "the study does not have it" if scale in SCALES else "there is no such scale"
    raise InputError(f"--scale {scale}", rule=rule, fix=nearest(scale, known))


def _base(
    named: NamedStudy, bases: Mapping[Scale, Base] | None, scale: Scale, *, common: bool = True
) -> Run:
    base = {**(bases or BASES)}[require_scale(named.study, scale)]
    if isinstance(base, str):
        run = recipe(base)
    else:
        with errors_of_file(named.file, "the base of a study"):
            run = base()
        require(
            isinstance(run, Run),
            f"{named.file}: the base of scale {scale}",
            rule="its function returns a Run",
            fix="end it with `return Run(...)`, or name a recipe",
        )
    words = named.study.common.get(scale, ()) if common else ()
    _check_keys("common", words)
    with _errors_of("common"):
        return apply_overrides(run, words)


def _named(arm: Arm, run: Run, scale: Scale) -> Run:
    """Return the run of an arm; errors name the arm."""
    words = arm.words(scale)
    _check_keys(f"arm {arm.name}", words)
    with _errors_of(f"arm {arm.name}"):
        return apply_overrides(run, words)


def _check_keys(place: str, words: Sequence[str]) -> None:
    """Refuse overrides of keys that the runner sets."""
    for word in words:
        key = word.partition("=")[0].strip()
        if key in _OURS:
            raise InputError(
                f"{place}: {word}",
                rule="the runner sets this key for each task",
                fix="leave it out",
            )
        if key in _DATA:
            raise InputError(
                f"{place}: {word}",
                rule="a study names its data, so that a report knows which arms share them",
                fix='give data=DataSet(name="..", path="..") to the arm or, by scale, the study',
            )


@contextmanager
def _errors_of(place: str) -> Iterator[None]:
    """Add the place in a study, such as ``arm base``, to the errors of a block."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error.value}", rule=error.rule, fix=error.fix) from None


def _check(run: Run, device: Device) -> None:
    # machine=False: a study may be planned for another machine.
    enforce(run, world_size=ranks(run), device=device, machine=False)


def _check_unlike(plan: Plan) -> None:
    """Refuse two arms that are the same training, however they are logged."""
    seen: dict[str, str] = {}
    for arm in plan.arms:
        values = _flat(arm.run)
        text = repr({key: values[key] for key in values if not key.startswith("logging.")})
        if text in seen:
            raise InputError(
                f"arms {seen[text]} and {arm.arm.name} at scale {plan.scale}",
                rule="they are the same training: no number of it differs",
                fix="leave one out, or give it an override that changes the training",
            )
        seen[text] = arm.arm.name


def _check_matches(plan: Plan) -> None:
    """Refuse arms that do not have in common what the study claims."""
    control = plan.arm(plan.study.control)
    for match in plan.study.matched:
        wanted = control.amount(match.quantity)
        for arm in plan.arms:
            has = arm.amount(match.quantity)
            share = abs(has - wanted) / wanted
            if share <= match.tolerance:
                continue
            quantity = match.quantity.replace("_", " ")
            raise InputError(
                f"arm {arm.arm.name}: {has:.4g} {quantity}",
                rule=f"{plan.study.control} has {wanted:.4g}; the study claims that arms differ by "
                f"{match.tolerance:.1%} at most, and this is {share:.1%}",
                fix=_fix(arm, match.quantity, wanted),
            )


def _fix(arm: PlannedArm, quantity: Quantity, wanted: float) -> str:
    """Return the way to match: a number of samples, or another size."""
    if quantity in ("tokens", "flops"):
        run = arm.run
        samples = run.data.first_sample + (
            run.schedule.train_samples - run.data.first_sample
        ) * wanted / arm.amount(quantity)
        batch = run.schedule.final_batch_size
        return (
            f"set schedule.train_samples={max(1, round(samples / batch)) * batch} in that arm, "
            "or drop the claim from `matched`"
        )
    return "change the arm's sizes, raise the tolerance, or drop the claim from `matched`"


def _flat(run: Run) -> dict[str, Any]:
    """Return the values that make two runs different trainings, by key."""
    from ablations.asking.deciding import deciding_values

    return deciding_values(run) | {"data.path": run.data.path}


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return _pattern(value)
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "null"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _pattern(values: Sequence[Any]) -> str:
    """Return a list in short: layer types as letters, ``s s s f``."""
    if values and all(isinstance(value, str) for value in values):
        return "".join(str(value)[0] for value in values)
    return str(list(values))


def missing_data(plan: Plan) -> list[DataSet]:
    """Return the data sets of a plan that are absent, each after those that it needs."""
    missing: dict[str, DataSet] = {}

    def add(data: DataSet) -> None:
        if Path(data.path).is_dir():
            return
        if data.after is not None:
            add(data.after)
        missing.setdefault(data.path, data)

    for arm in plan.arms:
        if arm.data is not None:
            add(arm.data)
    return list(missing.values())


def require_data(plan: Plan, word: str) -> None:
    """Refuse a plan whose data are not there yet.

    Args:
        plan: the plan.
        word: the study as the user names it, for the message.

    Raises:
        InputError: a folder is absent; the fix is the command that makes it.
    """
    missing = missing_data(plan)
    if missing:
        own = "; ".join(data.note for data in missing if not data.command)
        raise InputError(
            f"data of the study: {', '.join(data.path for data in missing)}",
            rule="there is no such folder",
            fix=f"{own}; or give --data {missing[-1].name}=DIR"
            if own
            else f"run `mellum2 ablate data {word} --scale {plan.scale}`, which makes them, or "
            "give --data NAME=DIR",
        )
