"""Studies: files, arms and claims that cannot work are refused before anything runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ablations.asking import Arm, Claim, Match, Metric, StopRule, Study
from ablations.asking.finding import NamedStudy, find_study, shipped
from ablations.asking.planned import differences, plan_study, require_scale, scales_of
from ablations.asking.table import study_rows
from mellum2_megatron.cli.app import app
from mellum2_megatron.common.errors import InputError

METRICS = (Metric("valid_loss", delta=0.02),)
BASE = Arm("base")
ADAM = Arm("adam", "optimizer.name=adam")


def study(*arms: Arm, **changes: object) -> Study:
    values: dict[str, object] = {"question": "?", "control": "base", "metrics": METRICS}
    return Study(arms=arms or (BASE, ADAM), **(values | changes))  # type: ignore[arg-type]


def plan(*arms: Arm, scale: str = "tiny", **changes: object):
    named = NamedStudy(name="mine", file=Path("mine.py"), study=study(*arms, **changes))
    return plan_study(named, scale)  # type: ignore[arg-type]


# -- Bad input -------------------------------------------------------------------------------------

BAD_STUDIES = {
    "one_arm": (lambda: study(BASE), "two arms or more"),
    "duplicate": (lambda: study(BASE, BASE), "two arms have that name"),
    "control": (lambda: study(control="bse"), "did you mean 'base'"),
    "expected": (
        lambda: study(claim=Claim(text="x", source="y", expected={"adm": "better"})),
        "did you mean 'adam'",
    ),
    "outcome": (
        lambda: Claim(text="x", source="y", expected={"adam": "beter"}),  # type: ignore[dict-item]
        "did you mean 'better'",
    ),
    "metric": (lambda: Metric("valid_los", delta=0.1), "did you mean 'valid_loss'"),
    "no_metric": (lambda: study(metrics=()), "one metric or more"),
    "no_comma": (lambda: study(matched=Match("tokens")), r"matched=\(Match\(...\),\)"),
    "no_metrics": (lambda: study(metrics=("valid_loss",)), "is a tuple of Metric"),
    "metric_twice": (lambda: study(metrics=METRICS * 2), "is there twice"),
    "delta": (lambda: Metric("valid_loss", delta=0), "above 0"),
    "match": (lambda: Match("token"), "did you mean 'tokens'"),  # type: ignore[arg-type]
    "tolerance": (lambda: Match("tokens", tolerance=1.5), "at least 0 and below 1"),
    "one_seed": (lambda: study(seeds=(1,)), "two seeds at least"),
    "seeds": (lambda: study(seeds=(5, 3)), "rise from look to look"),
    "scale": (lambda: Arm("a", {"tyny": "seed=1"}), "did you mean 'tiny'"),  # type: ignore[dict-item]
    "four_overrides": (lambda: Arm("a", "a=1 b=2 c=3 d=4"), "3 values at most"),
    "name": (lambda: Arm("../a"), "is a folder's"),
    "question": (lambda: study(question=" "), "asks something"),
    "stop_kind": (lambda: study(stop="soon"), "stop='soon': is a StopRule"),
    "claim_kind": (lambda: study(claim="x"), "claim='x': is a Claim"),
    "release_kind": (lambda: study(for_release="no"), "for_release='no': is True or False"),
    "question_kind": (lambda: study(question=3), "is a sentence"),
    "base_kind": (lambda: study(bases={"tiny": 3}), r"bases\[tiny\]=3: is a recipe's name"),
    "data_kind": (lambda: study(data={"tiny": "data/x"}), r"data\[tiny\]=.*is a DataSet"),
    "common_text": (lambda: study(common={"tiny": "a=b"}), r"common\[tiny\]='a=b': is a tuple"),
    "common_tuple": (lambda: study(common=("a=b",)), "is a mapping of scales"),
    "arm_data": (lambda: Arm("a", data="data/x"), "data='data/x': is a DataSet"),  # type: ignore[arg-type]
    "arm_words": (lambda: Arm("a", (3,)), r"overrides=\(3,\): is a tuple"),  # type: ignore[arg-type]
    "arm_note": (lambda: Arm("a", "b=1", 3), "note=3: is a text"),  # type: ignore[arg-type]
    "arm_key_twice": (lambda: Arm("a", "b=1 b=2"), "arm a: b: is overridden twice"),
    "seeds_kind": (lambda: study(seeds=3), "seeds=3: numbers of seeds rise"),
    "many_seeds": (lambda: study(seeds=(3, 1_000_000)), "64 seeds at most"),
    "stop": (lambda: StopRule(after=1.0, train_loss_above=3), "share of the steps"),
}


@pytest.mark.parametrize("case", BAD_STUDIES)
def test_studies_that_cannot_work_are_refused(case: str) -> None:
    make, words = BAD_STUDIES[case]
    with pytest.raises(InputError, match=words):
        make()


BAD_PLANS = {
    "unknown_key": ((BASE, Arm("x", "optimizer.nam=adam")), "arm x: .*optimizer.name"),
    "value": ((BASE, Arm("x", "optimizer.name=sgd")), "arm x: optimizer.name=sgd"),
    "rule": ((BASE, Arm("x", "schedule.train_samples=961")), "arm x: schedule.train_samples"),
    "seed": ((BASE, Arm("x", "seed=3")), "the runner sets this key"),
    "data": ((BASE, Arm("x", "data.path=data/other")), "arm x: .*names its data.*data=DataSet"),
    "same": ((BASE, Arm("x", "optimizer.lr=0.004")), "base and x .*the same training"),
    "logged": ((BASE, Arm("x", "logging.log_interval=7")), "base and x .*the same training"),
    "tokens": (
        (BASE, Arm("x", "schedule.train_samples=480 schedule.decay_samples=240")),
        "arm x: 1.229e.05 tokens: base has 2.458e.05.*set schedule.train_samples=960",
    ),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_arms_that_cannot_be_compared_are_refused(case: str) -> None:
    arms, words = BAD_PLANS[case]
    with pytest.raises(InputError, match=words):
        plan(*arms)


def test_what_all_arms_share_is_checked_as_an_arm_is() -> None:
    with pytest.raises(InputError, match=r"common: seed=3: the runner sets this key"):
        plan(common={"tiny": ("seed=3",)})
    with pytest.raises(InputError, match=r"common: optimizer\.lrr.*did you mean 'optimizer\.lr'"):
        plan(common={"tiny": ("optimizer.lrr=1",)})
    with pytest.raises(InputError, match=r"the base of scale tiny: its function returns a Run"):
        plan(bases={"tiny": lambda: 5})
    with pytest.raises(InputError, match=r"the base of a study must run \(ZeroDivisionError"):
        plan(bases={"tiny": lambda: 1 / 0})


def test_a_claim_of_equal_flops_is_checked_and_its_fix_fits() -> None:
    shallow = "architecture.num_mtp_layers=0"
    with pytest.raises(InputError, match=r"flops.*set schedule.train_samples=\d+") as refused:
        plan(BASE, Arm("x", shallow), matched=(Match("flops", tolerance=0.01),))
    samples = refused.value.fix.partition("=")[2].partition(" ")[0]
    fitting = Arm("x", f"{shallow} schedule.train_samples={samples}")
    made = plan(BASE, fitting, matched=(Match("flops", tolerance=0.01),))
    base, other = (arm.amount("flops") for arm in made.arms)
    assert other == pytest.approx(base, rel=0.01)
    assert made.arms[0].amount("tokens") != made.arms[1].amount("tokens")


def test_arms_that_no_release_can_hold_are_refused_where_one_is_asked_for() -> None:
    shared = Arm("shared", "architecture.shared_expert_intermediate_size=128")
    biased = Arm("biased", "loss.aux_loss_type=none loss.bias_update_rate=0.001")
    plan(BASE, shared, biased)
    named = NamedStudy(name="mine", file=Path("mine.py"), study=study(BASE, biased))
    deeper = Arm("deeper", "architecture.num_mtp_layers=2")
    plan(BASE, deeper)
    for refused in (
        lambda: plan(BASE, ADAM, shared, for_release=True),
        lambda: plan(BASE, ADAM, deeper, for_release=True),
        lambda: plan_study(named, "tiny", for_release=True),
    ):
        with pytest.raises(InputError, match=r"^arm \w+: .*=.*(MellumForCausalLM|MellumConfig)"):
            refused()
    plan(BASE, ADAM, for_release=True)


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'proxy'"):
        require_scale(study(), "proxi")
    with pytest.raises(InputError, match="the study does not have it"):
        require_scale(find_study("fp8").study, "tiny")


# -- Files -----------------------------------------------------------------------------------------


def test_an_unknown_ablation_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'window'"):
        find_study("windw")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "holds 0"),
        ("import nothing_like_it", "own.py:1: .*ModuleNotFoundError"),
        ("x = (", "own.py:1"),
        ('from ablations.asking import Arm\n\nArm("A B")', "own.py:3: arm 'A B'"),
    ],
    ids=["none", "import", "syntax", "arm"],
)
def test_a_file_that_is_no_study_is_refused(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(text)
    with pytest.raises(InputError, match=words):
        find_study(str(file))


def test_a_file_that_hides_a_module_of_python_is_refused(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_bytes(shipped()["mtp"].read_bytes())
    with pytest.raises(InputError, match=r"random.*rename the file.*random_study\.py"):
        find_study(str(tmp_path / "random.py"))


def test_a_file_of_ones_own_works_as_a_shipped_one(tmp_path: Path) -> None:
    file = tmp_path / "my_mtp.py"
    file.write_bytes(shipped()["mtp"].read_bytes())
    named = find_study(str(file))
    assert named.name == "my_mtp"
    assert named.study == find_study("mtp").study
    assert not (tmp_path / "__pycache__").exists()


def test_a_wrong_arm_is_told_before_missing_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no data are
    words = ["ablate", "run", "window", "--only"]
    wrong = CliRunner().invoke(app, [*words, "ful"])
    assert isinstance(wrong.exception, InputError)
    assert "did you mean 'full'" in str(wrong.exception)
    right = CliRunner().invoke(app, [*words, "full"])
    assert "no such folder" in str(right.exception)
    assert not list(tmp_path.iterdir())


# -- Shipped studies -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_study_resolves_at_all_its_scales(name: str) -> None:
    named = find_study(name)
    for scale in scales_of(named.study):
        made = plan_study(named, scale)
        assert [arm.arm.name for arm in made.arms] == [arm.name for arm in named.study.arms]
        changed = differences(made)
        assert changed or len({arm.data for arm in made.arms}) == len(made.arms)


def test_packing_validates_on_documents_that_no_arm_trains_on() -> None:
    arms = find_study("packing").study.arms
    data = [arm.data["tiny"] for arm in arms if isinstance(arm.data, Mapping)]
    assert len(data) == len(arms)
    (valid,) = {word for own in data for word in own.overrides if word.startswith("data.valid=")}
    for own in data:
        assert own.after is not None
        assert f"[1,{own.after.path}/" in valid
        trained, held = ({*found(text)} for text in (own.command + own.plan, own.after.plan))
        assert trained
        assert held
        assert not trained & held


def found(text: str) -> list[str]:
    """Return the packages of Python's library that a command or a plan names."""
    return re.findall(r"\{stdlib\}/(\w+)", text)


def test_arms_are_the_same_at_every_scale_of_the_family() -> None:
    """One of eight experts, eight query heads for a key head, a window of an eighth."""
    for scale in scales_of(find_study("mtp").study):
        run = plan_study(find_study("mtp"), scale).arms[1].run
        model = run.architecture
        assert model.num_experts == 8 * model.num_experts_per_tok
        assert model.num_attention_heads == 8 * model.num_key_value_heads
        assert model.sliding_window is not None
        assert run.data.sequence_length == 8 * model.sliding_window
        assert model.layer_types[:4] == ("sliding_attention",) * 3 + ("full_attention",)
        assert len(model.layer_types) % 4 == 0
        assert 0.36 < model.moe_intermediate_size / model.hidden_size < 0.4
    assert run.train_tokens == pytest.approx(105e9, rel=1e-3)  # report §6


def test_the_table_has_the_counts_of_the_architecture() -> None:
    rows = {row["arm"]: row for row in study_rows(plan_study(find_study("mtp"), "full"))}
    # docs/architecture.md: the released model with and without its MTP head, at 8,192 tokens.
    assert rows["without"]["parameters"] == 12_149_923_072
    assert rows["with"]["parameters"] == 12_578_294_528
    assert rows["with"]["active_parameters"] == 2_520_615_680
    assert rows["with"]["flops_per_token"] == pytest.approx(17.570e9, rel=1e-4)
    assert rows["without"]["differs"]["architecture.num_mtp_layers"] == "0"
