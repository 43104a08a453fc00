"""An ablation study as a typed value: a question, its arms, and the conditions of an answer.

A study is written in a Python file, in this package or anywhere else::

    STUDY = Study(
        question="Does a second prediction head help the first one?",
        arms=(
            Arm("with", note="as the report has it"),
            Arm("without", "architecture.num_mtp_layers=0"),
        ),
        control="without",
        matched=(Match("tokens"),),
        metrics=(Metric("valid_loss", delta=0.02),),
    )

The file's name is the study's. `ablations.asking.finding` reads it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from launchers.early_end import LossLimit
from mellum2_megatron.common.errors import InputError, nearest, shown
from mellum2_megatron.common.field_checks import is_int, is_number, require
from mellum2_megatron.config import Run

Scale = Literal["tiny", "proxy", "full"]
"""Size of a study's runs: minutes on a CPU, hours on one GPU, the report's own ablations."""

SCALES: tuple[Scale, ...] = get_args(Scale)

Quantity = Literal["tokens", "flops", "parameters", "active_parameters"]
"""Quantity of a run that arms may have in common, see `Match`."""

QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)

Expectation = Literal["better", "worse", "no difference"]
"""Outcome of an arm against the control."""

MOST_OVERRIDES = 3
"""Overrides of an arm; one that changes more changes too much to learn from."""

MOST_SEEDS = 64
"""Seeds of the last look; the levels of a plan are simulated for each of them."""

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
"""Form of the name of a study, an arm or a data set, which names a folder too."""

METRICS: Mapping[str, str] = {
    "valid_loss": "validation loss on documents that all arms and seeds share, nats a token",
    "valid_bits_per_byte": "the same in bits a byte of text, for arms with other tokenizers",
    "train_loss": "training loss, mean of the last tenth of the steps, nats a token",
    "mtp_loss": "training loss of the MTP head, mean of the last tenth of the steps, nats a token",
    "mtp_acceptance": "share of the MTP head's drafts that the main head would accept in training, "
    "mean of the last tenth of the steps",
    "tokens_per_second": "tokens a second, all ranks together; median over the steps",
    "step_seconds": "duration of a step; median over the steps",
    "expert_load": "load of the busiest expert over the mean, mean over the layers, last tenth",
    "grad_norm": "norm of the gradient, median over the steps",
    "spikes": "number of steps recorded as spikes",
    "loss_late": "validation loss of the last quarter of each sequence, nats a token",
    "loss_early": "validation loss of the first quarter of each sequence, nats a token",
    "fim_exact_match": "share of held-out parts of lines that greedy infilling gives exactly",
    "needle": "share of needles in long texts that are preferred to seven wrong ones; mean over "
    "the lengths",
}
"""Metrics that a report can compare, with their meaning and unit."""

HIGHER_IS_BETTER = frozenset(("mtp_acceptance", "tokens_per_second", "fim_exact_match", "needle"))
"""Metrics of which a larger value is better; of the others a smaller one is."""


def _check_name(kind: str, name: str) -> None:
    require(
        isinstance(name, str) and NAME.fullmatch(name) is not None,
        f"{kind} {shown(name)}",
        rule="its name is a folder's: small letters, digits and _ . -, 63 at most",
        fix="use for example top_8",
    )


def _check_choice(key: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise InputError(
            f"{key}: {shown(value)}",
            rule="there is no such choice",
            fix=nearest(str(value), choices),
        )


def _check_scales(key: str, table: Mapping[Scale, object]) -> None:
    for scale in table:
        _check_choice(f"{key}: scale", scale, SCALES)


def _check_kind(key: str, value: object, kind: type | tuple[type, ...], noun: str) -> None:
    require(
        isinstance(value, kind),
        f"{key}={shown(value)}",
        rule=f"is {noun}",
        fix="see the example in docs/ablations.md, and the fields in ablations/asking/study.py",
    )


def _check_words(key: str, words: object) -> None:
    """Refuse overrides that are no tuple of texts; one text would be read letter by letter."""
    require(
        isinstance(words, tuple | list) and all(isinstance(word, str) for word in words),
        f"{key}={shown(words)}",
        rule="is a tuple of overrides",
        fix='write it like ("optimizer.lr=1e-3",), with a comma after each',
    )


def _check_unlike(kind: str, names: list[str]) -> None:
    for name in names:
        require(
            names.count(name) == 1,
            f"{kind} {name}",
            rule="is there twice",
            fix="leave one out",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """Training data of a study or of one arm, and the command that makes them.

    Attributes:
        name: name, by which ``--data NAME=DIR`` gives another folder.
        path: folder of the data.
        command: command that makes the folder, as `mellum2 ablate data` runs it. ``{path}`` stands
            for the folder. Empty: a person makes it, as ``note`` describes.
        overrides: overrides of a run that reads the folder, such as ``data.phase=1``; default none.
            ``data.path`` is set without being named.
        plan: corpus plan, written to ``PATH.yaml`` before the command runs; default none.
            ``{stdlib}`` stands for the folder of Python's own library.
        after: data set that must be there first, such as that of the tokenizer; default none.
        note: way to make the folder, in words; default none.
    """

    name: str
    path: str
    command: str = ""
    overrides: tuple[str, ...] = ()
    plan: str = ""
    after: DataSet | None = None
    note: str = ""

    def __post_init__(self) -> None:
        _check_name("data set", self.name)


@dataclass(frozen=True, slots=True)
class Arm:
    """One answer to the question: a name, and one to three overrides of the base.

    Attributes:
        name: name of the arm and of its folder.
        overrides: overrides of the study's base, as one text with blanks between them or as a
            tuple; none for an arm that is the base itself. A mapping gives each scale its own.
        note: a few words about the arm; default none.
        data: data of this arm alone; None (default): the study's. A mapping gives scales theirs.
    """

    name: str
    overrides: str | tuple[str, ...] | Mapping[Scale, str | tuple[str, ...]] = ()
    note: str = ""
    data: DataSet | Mapping[Scale, DataSet] | None = None

    def __post_init__(self) -> None:
        _check_name("arm", self.name)
        given = self.overrides
        if isinstance(given, Mapping):
            _check_scales(f"arm {self.name}", given)
        for one in given.values() if isinstance(given, Mapping) else (given,):
            if not isinstance(one, str):
                _check_words(f"arm {self.name}: overrides", one)
        _check_kind(f"arm {self.name}: note", self.note, str, "a text")
        for data in self.data.values() if isinstance(self.data, Mapping) else (self.data,):
            _check_kind(f"arm {self.name}: data", data, (DataSet, type(None)), "a DataSet")
        for scale in SCALES:
            words = self.words(scale)
            for key in (keys := [word.partition("=")[0] for word in words]):
                require(
                    keys.count(key) == 1,
                    f"arm {self.name}: {key}",
                    rule="is overridden twice, and the second one would hold",
                    fix="leave one out",
                )
            require(
                len(words) <= MOST_OVERRIDES,
                f"arm {self.name} with {len(words)} overrides",
                rule=f"an arm changes {MOST_OVERRIDES} values at most",
                fix="put what all arms share into the study's `common`",
            )

    def words(self, scale: Scale) -> tuple[str, ...]:
        """Return the overrides at a scale; none at a scale that the arm does not name."""
        overrides = self.overrides
        if isinstance(overrides, Mapping):
            overrides = overrides.get(scale, ())
        # Blanks inside brackets or quotes belong to a value: such overrides are given as a tuple.
        return tuple(overrides.split()) if isinstance(overrides, str) else tuple(overrides)


@dataclass(frozen=True, slots=True)
class Match:
    """A quantity that all arms claim to have in common with the control.

    Attributes:
        quantity: ``tokens`` trained, ``flops`` of the whole training, ``parameters`` in all, or
            ``active_parameters`` of one token; each with the MTP head, where an arm has one.
        tolerance: largest difference from the control, as a share of the control's; default 0.
    """

    quantity: Quantity
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        _check_choice("matched", self.quantity, QUANTITIES)
        require(
            is_number(self.tolerance) and 0 <= self.tolerance < 1,
            f"tolerance={self.tolerance} of {self.quantity}",
            rule="is a share, at least 0 and below 1",
            fix="use for example 0.02",
        )


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure that the arms are compared by.

    Attributes:
        name: one of `METRICS`. The first metric of a study decides.
        delta: smallest difference of interest, in the metric's unit, stated before the run. Arms
            that differ by less count as equal.
    """

    name: str
    delta: float

    def __post_init__(self) -> None:
        _check_kind("metric", self.name, str, "the name of a metric")
        if self.name not in METRICS:
            raise InputError(
                f"metric {self.name!r}",
                rule="there is no such metric",
                fix=nearest(self.name, METRICS),
            )
        require(
            is_number(self.delta) and self.delta > 0,
            f"delta={shown(self.delta)} of {self.name}",
            rule="the smallest difference of interest is a number above 0",
            fix="state one before the run, for example 0.02 nats a token",
        )

    @property
    def better(self) -> Literal["lower", "higher"]:
        """Direction in which the metric improves."""
        return "higher" if self.name in HIGHER_IS_BETTER else "lower"


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A published statement that the study tests.

    Attributes:
        text: the statement, with its figures.
        source: its place, such as ``report §6``.
        expected: outcome that it predicts for arms against the control; default none.
    """

    text: str
    source: str
    expected: Mapping[str, Expectation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for arm, outcome in self.expected.items():
            _check_choice(f"expected outcome of {arm}", outcome, get_args(Expectation))


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRule:
    """A rule that ends a task early; it is in the file before the run, or there is none.

    A task is stopped if its training loss is above a bound once a share of its steps is done.

    Attributes:
        after: share of the steps, above 0 and below 1.
        train_loss_above: bound, nats a token.
    """

    after: float
    train_loss_above: float

    def __post_init__(self) -> None:
        require(
            is_number(self.after) and 0 < self.after < 1,
            f"stop.after={shown(self.after)}",
            rule="is a share of the steps, above 0 and below 1",
            fix="use for example 0.25",
        )
        require(
            is_number(self.train_loss_above) and self.train_loss_above > 0,
            f"stop.train_loss_above={shown(self.train_loss_above)}",
            rule="is a loss above 0",
            fix="use for example the unigram entropy of the corpus",
        )

    def limit(self, steps: int) -> LossLimit:
        """Return the rule for a training of so many steps."""
        return LossLimit(step=math.ceil(self.after * steps), train_loss_above=self.train_loss_above)


Base = str | Callable[[], Run]
"""Base of a scale: name of a recipe (also ``FILE.py:FUNCTION``), or a function that returns it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A question about the recipes, and all that decides how it is answered.

    Attributes:
        question: the question, one sentence.
        arms: the answers to compare, two or more.
        control: name of the arm that the others are compared with.
        matched: quantities that the arms have in common; checked before any run.
        metrics: figures to compare by, the deciding one first.
        claim: published statement under test; None (default): none.
        bases: base recipe of each scale that the study has; None (default): those of
            `ablations.asking.scales`.
        common: overrides that all arms share, by scale; default none.
        data: data of each scale; a scale without an entry reads those of its base. None (default):
            the data of `ablations.asking.scales` at the tiny scale.
        starts_from: recipe whose trained weights all arms start from, by scale; it is trained once
            for each seed. None (default): arms start from random weights.
        seeds: numbers of seeds of the looks at the results, rising; default 3, 5, 8. A look is
            taken only if the one before left the question undecided.
        stop: rule that ends a task early; None (default): none.
        for_release: a released model is to be one of the arms, so each must fit the released
            format; default false. ``--for-release`` asks the same of any study.
        gpu: reason why the study needs a GPU; empty (default): it does not.
        note: what a reader of the answer must bear in mind; default nothing.

    Raises:
        InputError: fewer than two arms, two of one name, an unknown control, or looks that do not
            rise.
    """

    question: str
    arms: tuple[Arm, ...]
    control: str
    metrics: tuple[Metric, ...]
    matched: tuple[Match, ...] = (Match("tokens"),)
    claim: Claim | None = None
    bases: Mapping[Scale, Base] | None = None
    common: Mapping[Scale, tuple[str, ...]] = field(default_factory=dict)
    data: Mapping[Scale, DataSet] | None = None
    starts_from: Mapping[Scale, Base] | None = None
    seeds: tuple[int, ...] = (3, 5, 8)
    stop: StopRule | None = None
    for_release: bool = False
    gpu: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        self._check_kinds()
        require(
            bool(self.question.strip()),
            "question",
            rule="a study asks something",
            fix="write one sentence",
        )
        names = [arm.name for arm in self.arms]
        require(
            len(names) > 1,
            f"{len(names)} arm(s)",
            rule="a study compares two arms or more",
            fix="add the arm to compare with",
        )
        for name in names:
            require(
                names.count(name) == 1,
                f"arm {name}",
                rule="two arms have that name",
                fix="give each a name of its own",
            )
        known = [("control", self.control)]
        known += [("claim.expected", arm) for arm in (self.claim.expected if self.claim else ())]
        for key, name in known:
            if name not in names:
                raise InputError(
                    f"{key}: arm {name!r}", rule="there is no such arm", fix=nearest(name, names)
                )
        require(
            bool(self.metrics),
            "metrics=()",
            rule="a study compares by one metric or more",
            fix='give (Metric("valid_loss", delta=0.02),)',
        )
        _check_unlike("metric", [metric.name for metric in self.metrics])
        _check_unlike("matched", [match.quantity for match in self.matched])
        require(
            isinstance(self.seeds, tuple | list)
            and bool(self.seeds)
            and all(is_int(count) for count in self.seeds)
            and list(self.seeds) == sorted(set(self.seeds)),
            f"seeds={shown(self.seeds)}",
            rule="numbers of seeds rise from look to look",
            fix="use (3, 5, 8)",
        )
        require(
            self.seeds[0] >= 2,
            f"seeds={shown(self.seeds)}",
            rule="an interval needs two seeds at least, and says little below three",
            fix="use (3, 5, 8)",
        )
        require(
            self.seeds[-1] <= MOST_SEEDS,
            f"seeds={shown(self.seeds)}",
            rule=f"the last look has {MOST_SEEDS} seeds at most",
            fix="use (3, 5, 8)",
        )

    def _check_kinds(self) -> None:
        """Refuse a value of another type, and one `Arm` in brackets without a tuple's comma."""
        kinds: tuple[tuple[str, type | tuple[type, ...], str], ...] = (
            ("question", str, "a sentence"),
            ("control", str, "the name of an arm"),
            ("claim", (Claim, type(None)), "a Claim"),
            ("stop", (StopRule, type(None)), "a StopRule"),
            ("for_release", bool, "True or False"),
            ("gpu", str, "a text"),
            ("note", str, "a text"),
        )
        for key, kind, noun in kinds:
            _check_kind(key, getattr(self, key), kind, noun)
        bases: tuple[type, ...] = (str, Callable)  # type: ignore[assignment]
        tables: tuple[tuple[str, type | tuple[type, ...], str], ...] = (
            ("bases", bases, "a recipe's name, or a function that returns a Run"),
            ("common", (tuple, list), "a tuple of overrides"),
            ("data", DataSet, "a DataSet"),
            ("starts_from", bases, "a recipe's name, or a function that returns a Run"),
        )
        for key, kind, noun in tables:
            table = {} if getattr(self, key) is None else getattr(self, key)
            _check_kind(key, table, Mapping, f'a mapping of scales: {{"tiny": {noun}}}')
            _check_scales(key, table)
            for scale, value in table.items():
                _check_kind(f"{key}[{scale}]", value, kind, noun)
                if key == "common":
                    _check_words(f"common[{scale}]", value)
        for key, kind in (("arms", Arm), ("metrics", Metric), ("matched", Match)):
            values = getattr(self, key)
            require(
                isinstance(values, tuple | list) and all(isinstance(one, kind) for one in values),
                f"{key}={shown(values)}",
                rule=f"is a tuple of {kind.__name__}",
                fix=f"write {key}=({kind.__name__}(...),), with a comma after each",
            )

    def arm(self, name: str) -> Arm:
        """Return an arm by its name.

        Raises:
            InputError: there is none; the message names the nearest.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise InputError(
            f"arm {name!r}",
            rule="the study has no such arm",
            fix=nearest(name, [arm.name for arm in self.arms]),
        )

    def metric(self, name: str) -> Metric:
        """Return a metric by its name.

        Raises:
            InputError: there is none; the message names the nearest.
        """
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise InputError(
            f"metric {name!r}",
            rule="the study does not compare by it",
            fix=nearest(name, [metric.name for metric in self.metrics]),
        )
