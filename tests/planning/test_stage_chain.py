"""Stages of one training: chains that fit, chains that do not, and the tiny stages in a row."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from mellum2_megatron.checkpoint.folder import LAST_FILE, iteration_folder_name
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.provenance import read_records
from mellum2_megatron.config import Run, apply_overrides, to_yaml
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.planning.stage_chain import check_predecessor, stage_chain
from mellum2_megatron.recipes import recipe, recipe_names
from tests import parameter_id
from tests.checkpoint.test_checkpoints import equal, state
from tests.checkpoint.test_continuation import check_folder, folder_of
from tests.distributed import run_distributed
from tests.small import SMALL_MODEL
from tests.training.test_train import losses

STAGES = ("pretrain_phase1", "pretrain_phase2", "pretrain_phase3", "long_context")
TINY = tuple(f"mellum2_tiny_{stage}" for stage in STAGES)


def changed(name: str, *overrides: str) -> Run:
    return apply_overrides(recipe(name), overrides)


def check_stage(run: Run) -> None:
    check_predecessor(run)


@pytest.mark.parametrize(
    "names",
    [
        TINY,
        *(
            tuple(f"mellum2_12b_{stage}{ending}" for stage in STAGES)
            for ending in ("", "_256gpu_h200_fp8", "_128gpu_h200_fp8", "_8gpu_h200_fp8")
        ),
        tuple(f"mellum2_4layer_{stage}_1gpu_h200_fp8" for stage in STAGES),
    ],
    ids=lambda names: names[0],
)
def test_every_recipes_stages_follow(names: tuple[str, ...], tmp_path: Path) -> None:
    assert set(names) <= set(recipe_names())
    chain = stage_chain(names, root=tmp_path)
    assert [run.name for run in chain] == list(names)
    assert [run.checkpoint.output for run in chain] == [str(tmp_path / name) for name in names]
    origins = [(run.checkpoint.continue_from, run.checkpoint.load) for run in chain]
    folders = [str(tmp_path / name) for name in names]
    assert origins == [(None, None), (folders[0], None), (folders[1], None), (None, folders[2])]
    for run, name in zip(chain, names, strict=True):
        given = recipe(name)
        for field in ("architecture", "layout", "optimizer", "schedule", "data", "logging"):
            assert getattr(run, field) == getattr(given, field), field
    # Started one by one: a recipe names the default folder of the one before.
    for before, after in itertools.pairwise(map(recipe, names)):
        assert f"runs/{before.name}" in (after.checkpoint.continue_from, after.checkpoint.load)


def test_a_chain_begins_where_its_first_stage_does(tmp_path: Path) -> None:
    (run,) = stage_chain([changed(TINY[1], "checkpoint.continue_from=/elsewhere")], root=tmp_path)
    assert (run.checkpoint.continue_from, run.checkpoint.output) == (
        "/elsewhere",
        str(tmp_path / TINY[1]),
    )


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "no stages"),
        (["mellum2_tiny_pretrain_phase9"], "there is no such recipe"),
        ([TINY[0], TINY[0]], f"stage {TINY[0]}: is in the chain twice"),
        (
            [TINY[0], "mellum2_tiny_pretrain"],
            "starts anew.*checkpoint.continue_from=mellum2_tiny_pretrain_phase1",
        ),
        (
            [TINY[0], TINY[2]],
            f"stage {TINY[2]} after {TINY[0]}: has data that begin at sample 640; .* at 440",
        ),
        ([TINY[1], TINY[0]], "starts anew"),
        (
            [TINY[0], changed(TINY[1], "schedule.warmup_samples=8")],
            r"has schedule.warmup_samples=8; the former has 32",
        ),
        (
            [
                changed(TINY[0], "schedule.horizon_samples=null", "schedule.decay_samples=0"),
                TINY[1],
            ],
            "has schedule.horizon_samples=768; the former has 440.*"
            "before schedule.horizon_samples=768",
        ),
        (
            [TINY[0], changed(TINY[1], "schedule.batch_schedule=[[0,4],[16,8]]")],
            r"has schedule.batch_schedule=\[\[0, 4\], \[16, 8\]\]; "
            r"the former has \[\[0, 4\], \[32, 8\]\]",
        ),
        (
            [TINY[0], changed(TINY[1], "optimizer.lr=1e-3")],
            r"has optimizer.lr=0.001; the former has 0.002",
        ),
        (
            [TINY[0], changed(TINY[1], "optimizer.name=adam")],
            "has optimizer.name=adam; the former has muon",
        ),
        (
            [TINY[0], changed(TINY[1], "architecture.num_experts=4")],
            r"has another architecture \(num_experts\)",
        ),
        (
            [TINY[0], changed(TINY[1], "data.first_sample=0", "schedule.train_samples=440")],
            "ends at sample 440; the former ends at 440",
        ),
        (
            [TINY[2], changed(TINY[3], "architecture.num_experts=4")],
            r"has another architecture \(num_experts\).*"
            "differ in max_position_embeddings, rope_full_attention",
        ),
        (
            [TINY[2], changed(TINY[3], "data.first_sample=4")],
            "takes weights only, and has data.first_sample=4",
        ),
        ([TINY[0], changed(TINY[1], "checkpoint.load=/a")], "names both"),
        (
            ["mellum2_12b_pretrain_phase1", TINY[1]],
            r"stage mellum2_tiny_pretrain_phase2 after mellum2_12b.*vocab_size",
        ),
    ],
    ids=parameter_id,
)
def test_stages_that_do_not_follow(stages: list[str | Run], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        stage_chain(stages, root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stage_needs_the_one_before(tmp_path: Path) -> None:
    phase1, phase2, _, long_context = stage_chain(TINY, root=tmp_path)
    check_stage(phase1)
    with pytest.raises(
        InputError, match=f"there is no checkpoint of it. Fix: train {TINY[0]} first"
    ):
        check_stage(phase2)
    root = folder_of(phase1, tmp_path / TINY[0], step=40)
    with pytest.raises(
        InputError,
        match=rf"{TINY[0]} is at step 40 of 59.*it is not finished. "
        "Fix: continue it to the end, with the command",
    ):
        check_stage(phase2)
    (root / "latest_checkpointed_iteration.txt").write_text("59")
    (root / iteration_folder_name(59)).mkdir()
    (root / iteration_folder_name(59) / LAST_FILE).write_text("{}")
    check_stage(phase2)

    root = folder_of(changed(TINY[2]), tmp_path / TINY[2], step=80)
    with pytest.raises(
        InputError, match=rf"is at step 80 of 100.*checkpoint.load={root}/iter_0000080"
    ):
        check_stage(long_context)
    check_stage(apply_overrides(long_context, [f"checkpoint.load={root}/iter_0000080"]))
    # With a checkpoint of its own a stage does not need the one before any more.
    folder_of(long_context, tmp_path / TINY[3], step=10)
    check_stage(long_context)
    with pytest.raises(InputError, match=r"name the folder where it is: checkpoint.load=DIR"):
        check_stage(
            changed(
                TINY[3], f"checkpoint.load={tmp_path}/none", f"checkpoint.output={tmp_path}/out"
            )
        )


def test_weights_may_get_another_rotation(tmp_path: Path) -> None:
    """`checkpoint.load` takes weights into a model with YaRN; state needs the same model."""
    root = folder_of(changed(TINY[2]), tmp_path / "phase3", step=100)
    output = f"checkpoint.output={tmp_path}/out"
    check_folder(changed(TINY[3], f"checkpoint.load={root}", output, "checkpoint.verify=off"))
    state_too = ["checkpoint.load=null", f"checkpoint.continue_from={root}", output]
    with pytest.raises(
        InputError,
        match=r"holds another architecture .*max_position_embeddings: 512 there, 4096 here",
    ):
        check_folder(changed(TINY[3], *state_too))


SMALL = [*SMALL_MODEL, "logging.eval_iterations=0"]
PHASE = [
    "schedule.batch_schedule=[[0,4],[8,8]]",
    "schedule.decay_samples=12",
    "schedule.horizon_samples=40",
]
LONG = [
    "checkpoint.save_interval=1",
    "data.sequence_length=1024",
    "schedule.micro_batch_size=1",
    "schedule.train_samples=4",
    "schedule.warmup_samples=2",
    "schedule.decay_samples=2",
]


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_tiny_stages_run_one_after_another(small_data: PreparedData, tmp_path: Path) -> None:
    """Phases follow one schedule of steps, samples and rates; long context takes their weights."""
    own = [*SMALL, f"data.path={small_data.path}"]
    runs = stage_chain(
        [
            changed(TINY[0], *own, *PHASE, "schedule.train_samples=16"),
            changed(TINY[1], *own, *PHASE, "data.first_sample=16", "schedule.train_samples=24"),
            changed(TINY[2], *own, *PHASE, "data.first_sample=24", "schedule.train_samples=40"),
            changed(TINY[3], *own, *LONG),
        ],
        root=tmp_path,
    )
    for run in runs:
        output, copy = Path(str(run.checkpoint.output)), tmp_path / "copy" / run.name
        output.mkdir()
        (output / "run.yaml").write_text(to_yaml(run))
        check_stage(run)
        worker = ("reload", str(copy)) if run.checkpoint.continue_from else ("train",)
        run_distributed(
            f"tests.faults.fault_worker:{worker[0]}",
            2,
            str(output / "run.yaml"),
            *worker[1:],
            timeout=300,
        )

    folders = [Path(str(run.checkpoint.output)) for run in runs]
    assert [list(losses(folder)) for folder in folders] == [[1, 2, 3], [4], [5, 6], [1, 2]]
    samples = {
        step: sample for folder in folders[:3] for step, sample in losses(folder, "samples").items()
    }
    assert samples == {1: 4, 2: 8, 3: 16, 4: 24, 5: 32, 6: 40}
    rates = {
        step: rate
        for folder in folders[:3]
        for step, rate in losses(folder, "learning_rate").items()
    }
    # The schedule of all three phases. A step logs the rate of the step that follows.
    whole = runs[2].schedule
    for step, sample in samples.items():
        assert rates[step] == pytest.approx(
            whole.learning_rate(sample, peak=2e-3, minimum=0.0), rel=1e-6
        ), step
    assert (rates[3], rates[6]) == (pytest.approx(2e-3), 0.0)
    assert losses(folders[3], "learning_rate") == {1: pytest.approx(2e-4), 2: 0.0}
    assert [read_records(folder)[0]["from_step"] for folder in folders] == [None, 3, 4, None]

    # The state before a stage's first step equals the former's state after its last.
    for before, after, step in ((0, 1, 3), (1, 2, 4)):
        last = iteration_folder_name(step)
        expected, _ = state(folders[before] / last)
        found, _ = state(tmp_path / "copy" / runs[after].name / last)
        assert any("exp_avg" in key for key in expected)
        assert equal(expected, found)
    # Long context has its weights after one step too, since a warmup begins at rate 0.
    expected, _ = state(folders[2] / iteration_folder_name(6))
    found, _ = state(folders[3] / iteration_folder_name(1))
    kept = {key for key in expected if not key.startswith("optimizer")}
    assert len(kept) > 20
    assert all(torch.equal(expected[key], found[key]) for key in kept)
    there = json.loads((folders[3] / "architecture.json").read_text())
    assert there["rope_full_attention"]["rope_type"] == "yarn"
