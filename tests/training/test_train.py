"""Training on real ranks: Megatron's loop over gloo, its checkpoints, and resumed runs."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch

from conversion.convert import export_hf, import_hf, open_checkpoint
from conversion.verification.verify import verify
from mellum2_megatron.checkpoint import find_checkpoint, read_run
from mellum2_megatron.checkpoint.folder import write_tracker
from mellum2_megatron.config import Run, apply_overrides, to_yaml
from mellum2_megatron.data.prepare import prepare
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.metrics.log import METRICS_FILE, read_metrics
from mellum2_megatron.recipes import recipe
from tests.distributed import run_distributed
from tests.small import SMALL_MODEL, python_like

pytestmark = pytest.mark.distributed

STEPS = 6
SMALL = [
    *SMALL_MODEL,
    "schedule.batch_schedule=[[0,4],[8,8]]",
    "schedule.decay_samples=16",
    "schedule.train_samples=40",  # 2 steps of 4, then 4 of 8
    "logging.eval_interval=3",
    "logging.eval_iterations=2",
    "checkpoint.save_interval=3",
]


def small_corpus(folder: Path) -> PreparedData:
    """Prepare a corpus of 30 files in `folder`."""
    texts = folder / "texts"
    texts.mkdir()
    for seed in range(30):
        (texts / f"module_{seed}.py").write_text(python_like(seed))
    return prepare(
        folder / "corpus",
        inputs=[texts],
        vocab_size=360,
        workers=1,
        valid_fraction=0.2,
        progress=False,
    )


def small_run(data: PreparedData, output: Path, *overrides: str) -> Run:
    words = [*SMALL, f"data.path={data.path}", f"checkpoint.output={output}", *overrides]
    return apply_overrides(recipe("mellum2_tiny_pretrain"), words)


def train(run: Run, nproc: int, *, order: list[int] | None = None) -> Path:
    """Train and return the run's folder; `order` is that of the micro-batches in each step."""
    output = Path(str(run.checkpoint.output))
    output.mkdir(parents=True, exist_ok=True)
    (output / "requested.yaml").write_text(to_yaml(run))
    run_distributed(
        "tests.training.train_worker:train",
        nproc,
        str(output / "requested.yaml"),
        order,
        timeout=300,
    )
    return output


def losses(output: Path, name: str = "lm_loss", kind: str = "train") -> dict[int, float]:
    records = read_metrics(output / METRICS_FILE)
    return {
        record.step: record.values[name]
        for record in records
        if record.kind == kind and name in record.values
    }


def weights(output: Path) -> dict[str, torch.Tensor]:
    reader = open_checkpoint(find_checkpoint(output))
    return {
        key: reader.read(key, (0,) * len(t.shape), t.shape) for key, t in reader.tensors.items()
    }


def test_training_logs_every_quantity(trained: Path):
    records = read_metrics(trained / METRICS_FILE)
    steps = [record for record in records if record.kind == "train"]
    assert [record.step for record in steps] == list(range(1, STEPS + 1))
    last = steps[-1].values
    for name in ("lm_loss", "mtp_loss", "aux_loss", "z_loss", "grad_norm", "tokens_per_second"):
        assert math.isfinite(last[name]), name
    assert [record.values["batch_size"] for record in steps] == [4, 4, 8, 8, 8, 8]
    assert last["samples"] == 40
    assert last["tokens"] == 40 * 64
    layers = [f"expert_load/{layer}/max_over_mean" for layer in ("layer_00", "layer_03", "mtp")]
    assert all(last[name] >= 1.0 for name in layers)
    assert [record.step for record in records if record.kind == "valid"] == [3, 6]
    # A fresh model guesses uniformly; the first logged loss is before any update, up to
    # initialisation's spread.
    assert abs(losses(trained)[1] - math.log(384)) < 0.1
    assert losses(trained)[STEPS] < losses(trained)[1]


def test_learning_rate_is_the_schedules(trained: Path, small_data: PreparedData):
    run = read_run(trained / "run.yaml")
    consumed = [
        4,
        8,
        16,
        24,
        32,
        40,
    ]  # after each step; Megatron logs the rate of the step that follows
    for step, sample in enumerate(consumed, 1):
        logged = losses(trained, "learning_rate")[step]
        assert logged == pytest.approx(run.learning_rate(sample), rel=1e-6), step


def test_run_folder_states_the_run(trained: Path, small_data: PreparedData):
    assert read_run(trained / "run.yaml") == small_run(small_data, trained)
    assert find_checkpoint(trained).architecture == small_run(small_data, trained).architecture
    assert (trained / "tokenizer" / "tokenizer.json").read_bytes() == (
        small_data.tokenizer_dir / "tokenizer.json"
    ).read_bytes()


def test_resume_is_bitwise(trained: Path, small_data: PreparedData, tmp_path: Path):
    """Three steps, then new processes for the rest: the same losses and weights, to the bit."""
    resumed = tmp_path / "resumed"
    shutil.copytree(trained, resumed)
    shutil.rmtree(resumed / "iter_0000006")
    write_tracker(resumed, 3)
    train(small_run(small_data, resumed), nproc=2)
    for name in ("lm_loss", "mtp_loss", "aux_loss", "z_loss", "grad_norm"):
        assert losses(resumed, name) == losses(trained, name), name
    assert losses(resumed, kind="valid") == losses(trained, kind="valid")
    expected, found = weights(trained), weights(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_finished_run_started_again_adds_nothing(
    trained: Path, small_data: PreparedData, tmp_path: Path
):
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    train(small_run(small_data, again), nproc=2)
    assert (again / METRICS_FILE).read_bytes() == (trained / METRICS_FILE).read_bytes()
    assert find_checkpoint(again).iteration == STEPS


FIRST_STEP = [
    "schedule.train_samples=8",
    "schedule.batch_schedule=[[0,4]]",
    "schedule.decay_samples=0",
    "logging.eval_iterations=0",
]


@pytest.fixture(scope="module")
def start(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained weights as an import of the Hugging Face folder that they were exported to."""
    folder = tmp_path_factory.mktemp("import")
    export_hf(trained, folder / "hf")
    import_hf(folder / "hf", folder / "start")
    return folder / "start"


@pytest.fixture(scope="module")
def first_step(
    start: Path, small_data: PreparedData, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of two steps from there, on two ranks with the experts divided between them."""
    return train(
        small_run(
            small_data,
            tmp_path_factory.mktemp("first") / "ep2",
            *FIRST_STEP,
            f"checkpoint.load={start}",
        ),
        2,
    )


@pytest.mark.parametrize(
    ("layout", "nproc"),
    [
        (["layout.ep=1"], 1),
        (["layout.ep=1"], 2),
        (["layout.ep=1", "layout.pp=2"], 2),
        (["layout.ep=1", "layout.pp=2", "layout.vpp=2"], 2),
        (["layout.ep=1", "layout.tp=2", "layout.sp=true"], 2),
        (["layout.ep=1", "layout.etp=2"], 2),
        (["layout.ep=1", "layout.cp=2"], 2),
    ],
    ids=["one_process", "dp2", "pp2", "vpp2", "tp2", "etp2", "cp2"],
)
def test_layouts_see_the_same_model(
    start: Path,
    first_step: Path,
    small_data: PreparedData,
    tmp_path: Path,
    layout: list[str],
    nproc: int,
):
    """Losses from the same weights agree on every layout, up to BF16 rounding."""
    run = small_run(
        small_data, tmp_path / "other", *FIRST_STEP, f"checkpoint.load={start}", *layout
    )
    other = train(run, nproc=nproc)
    for name in ("lm_loss", "mtp_loss", "grad_norm"):
        assert losses(other, name)[1] == pytest.approx(losses(first_step, name)[1], rel=3e-3), name
    # The loaded weights are trained ones: better than a fresh model's uniform guess.
    assert losses(first_step)[1] < math.log(384) - 0.05


def test_trained_checkpoint_is_what_transformers_loads(trained: Path, tmp_path: Path):
    export_hf(trained, tmp_path / "hf")
    report = verify(trained, tmp_path / "hf")
    assert report.ok, report
    assert report.mtp is not None


def test_checkpoint_of_another_architecture_is_refused(
    trained: Path, small_data: PreparedData, tmp_path: Path
):
    from mellum2_megatron.checkpoint import StartingPoint, check_run_folder
    from mellum2_megatron.common.errors import InputError

    before = sorted(path.name for path in trained.iterdir())
    run = small_run(small_data, trained, "architecture.num_experts=8")
    with pytest.raises(InputError, match="num_experts: 4 there, 8 here"):
        check_run_folder(run, StartingPoint.of(run))
    elsewhere = dataclasses.replace(run.checkpoint, output=str(tmp_path / "new"), load=str(trained))
    new = dataclasses.replace(run, checkpoint=elsewhere)
    with pytest.raises(InputError, match=r"checkpoint.load.*num_experts: 4 there, 8 here"):
        check_run_folder(new, StartingPoint.of(new))
    assert sorted(path.name for path in trained.iterdir()) == before
