"""Training on real ranks: Megatron's loop over gloo, its checkpoints, and resumed runs."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from conversion.convert import export_hf, import_hf, open_checkpoint
from conversion.huggingface.evaluated_model import TransformersModel
from conversion.huggingface.scoring import score_hf
from conversion.verification.megatron_scoring import load_megatron_model
from conversion.verification.verify import verify
from mellum2_megatron.checkpoint import find_checkpoint, read_run
from mellum2_megatron.checkpoint.file_manifest import MANIFEST_FILE
from mellum2_megatron.checkpoint.folder import write_tracker
from mellum2_megatron.config import Run, apply_overrides, to_yaml
from mellum2_megatron.config.run import EVAL_TASKS
from mellum2_megatron.data.feed.sources import check_data, validation_shares
from mellum2_megatron.data.prepare import prepare
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.evaluation.evaluating import evaluate, plan
from mellum2_megatron.evaluation.registry import SUITES
from mellum2_megatron.metrics.log import METRICS_FILE, read_metrics
from mellum2_megatron.model.scoring import score_tokens
from mellum2_megatron.recipes import recipe
from tests.distributed import DistributedError, run_distributed
from tests.small import SMALL_MODEL, python_like
from tests.training.train_worker import SAMPLE_IDS, SCORES, few_items

pytestmark = pytest.mark.distributed

STEPS = 6
PROMPTS = ["def model_", "import", "x"]
SMALL = [
    *SMALL_MODEL,
    "schedule.batch_schedule=[[0,4],[8,8]]",
    "schedule.decay_samples=16",
    "schedule.train_samples=40",  # 2 steps of 4, then 4 of 8
    "logging.eval_interval=3",
    "logging.eval_iterations=2",
    "checkpoint.save_interval=3",
]


def small_corpus(
    folder: Path, *, tokenizer: Path | None = None, first_seed: int = 0
) -> PreparedData:
    """Prepare a corpus of 30 files in `folder`."""
    texts = folder / "texts"
    texts.mkdir()
    for seed in range(first_seed, first_seed + 30):
        (texts / f"module_{seed}.py").write_text(python_like(seed))
    return prepare(
        folder / ("corpus" if tokenizer is None else "other"),
        inputs=[texts],
        tokenizer=tokenizer,
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
    found = {
        record.step: record.values[name]
        for record in records
        if record.kind == kind and name in record.values
    }
    # Two runs that log nothing would agree.
    assert found, f"{output} logs no {name} of {kind}"
    return found


def weights(output: Path) -> dict[str, torch.Tensor]:
    reader = open_checkpoint(find_checkpoint(output))
    assert reader.tensors
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
    # Two ranks share the experts: the busier one has at least half of the tokens, at most all.
    assert 1.0 <= last["expert_load/hottest_rank_over_mean"] <= 2.0
    assert [record.step for record in records if record.kind == "valid"] == [3, 6]
    # A fresh model guesses uniformly; the first logged loss is before any update, up to
    # initialisation's spread.
    assert abs(losses(trained)[1] - math.log(384)) < 0.1
    assert losses(trained)[STEPS] < losses(trained)[1]


def test_each_validation_set_has_a_loss_of_its_own(small_data: PreparedData, tmp_path: Path):
    other = small_corpus(tmp_path, tokenizer=small_data.tokenizer_dir, first_seed=100)
    run = small_run(
        small_data,
        tmp_path / "run",
        f"data.train=[[3,{small_data.path}],[1,{other.path}]]",
        "data.path=nowhere",
        "schedule.train_samples=8",
        "schedule.decay_samples=4",
        "logging.eval_interval=1",
        "layout.ep=1",
        "layout.tp=2",
        "layout.sp=true",
    )
    output = train(run, 2)
    folders = [Path(data.path) for data in (small_data, other)]
    first, second = (losses(output, f"lm_loss/{folder.name}", "valid") for folder in folders)
    assert sorted(first) == [1, 2]
    shares = validation_shares(check_data(run).valid, 2 * run.eval_batch_size)
    for step, total in losses(output, kind="valid").items():
        weighted = (shares[0] * first[step] + shares[1] * second[step]) / sum(shares)
        assert total == pytest.approx(weighted, rel=1e-5)
        assert first[step] != second[step]


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


def test_deterministic_mode_trains_the_same_model(
    trained: Path, small_data: PreparedData, tmp_path: Path
):
    """Megatron's mode runs every operator; experts' outputs are added in another order (BF16)."""
    run = small_run(small_data, tmp_path / "run", "execution.deterministic=true")
    found = losses(train(run, 2))
    assert found == pytest.approx(losses(trained), rel=2e-4)
    assert found != losses(trained), "the mode has not reached the operators"


def test_a_finished_run_started_again_adds_nothing(
    trained: Path, small_data: PreparedData, tmp_path: Path
):
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    train(small_run(small_data, again), nproc=2)
    assert (again / METRICS_FILE).read_bytes() == (trained / METRICS_FILE).read_bytes()
    assert find_checkpoint(again).iteration == STEPS


class Touch:
    """Pickles as a call that creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.marker, "w")


@pytest.mark.parametrize("part", ["metadata", "object"])
def test_a_forged_checkpoint_does_not_run_its_program(
    part: str, trained: Path, small_data: PreparedData, tmp_path: Path
):
    forged, marker = tmp_path / "forged", tmp_path / "marker"
    shutil.copytree(trained, forged)
    shutil.rmtree(forged / "iter_0000006")
    write_tracker(forged, 3)
    folder = forged / "iter_0000003"
    # Who can write the weights can write the manifest.
    (folder / MANIFEST_FILE).unlink()
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    if part == "metadata":
        metadata.planner_data = Touch(marker)
    else:
        torch.save(Touch(marker), folder / "forged.distcp")
        size = (folder / "forged.distcp").stat().st_size
        for index in metadata.storage_data:
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
                metadata.storage_data[index] = _StorageInfo("forged.distcp", 0, size)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(DistributedError, match="nothing is executed from a checkpoint"):
        train(small_run(small_data, forged), nproc=2)
    assert not marker.exists()


FIRST_STEP = [
    "schedule.train_samples=8",
    "schedule.batch_schedule=[[0,4]]",
    "schedule.decay_samples=0",
    "logging.eval_iterations=0",
    f"logging.sample_prompts={json.dumps(PROMPTS)}",
    "logging.sample_tokens=6",
    "logging.eval_tasks=[multiple_choice]",
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
    """Losses from the same weights agree on every layout, up to BF16 rounding.

    Each text that a layout generates is the greedy one of its saved weights in one process.
    """
    run = small_run(
        small_data, tmp_path / "other", *FIRST_STEP, f"checkpoint.load={start}", *layout
    )
    other = train(run, nproc=nproc)
    # Seen on the seven layouts: 2.5e-5 of the losses, 1e-4 of the norm.
    for name, within in (("lm_loss", 2e-4), ("mtp_loss", 2e-4), ("grad_norm", 1e-3)):
        expected = pytest.approx(losses(first_step, name)[1], rel=within)
        assert losses(other, name)[1] == expected, name
    # The loaded weights are trained ones: better than a fresh model's uniform guess.
    assert losses(first_step)[1] < math.log(384) - 0.05
    assert_greedy(other)
    assert_scores(other)


def assert_greedy(output: Path) -> None:
    """Assert that each generated token is the most probable one, up to BF16 rounding."""
    prompts, continued = json.loads((output / SAMPLE_IDS).read_text())
    assert len(prompts) == len(PROMPTS)
    tokens = np.zeros((len(prompts), 16), dtype=np.int64)
    for row, (prompt, ids) in enumerate(zip(prompts, continued, strict=True)):
        assert len(ids) == 6
        tokens[row, : len(prompt) + 6] = [*prompt, *ids]
    model = load_megatron_model(output)
    logits, _ = score_tokens(model, torch.from_numpy(tokens))
    for row, (prompt, ids) in enumerate(zip(prompts, continued, strict=True)):
        for place, chosen in enumerate(ids, len(prompt) - 1):
            assert logits[row, place, chosen] > logits[row, place].max() - 0.02, (row, place)


def assert_scores(output: Path) -> None:
    """Assert that the scores of texts are those of one process, up to BF16 rounding."""
    texts, scores = json.loads((output / SCORES).read_text())
    assert len(texts) == 4  # the answers to one question
    tokens = np.zeros((len(texts), max(map(len, texts))), dtype=np.int64)
    for row, ids in enumerate(texts):
        tokens[row, : len(ids)] = ids
    logits, _ = score_tokens(load_megatron_model(output), torch.from_numpy(tokens))
    logs = logits.log_softmax(-1)
    for row, (ids, (found, most)) in enumerate(zip(texts, scores, strict=True)):
        assert len(found) == len(most) == len(ids) - 1
        for place, token in enumerate(ids[1:]):
            assert abs(logs[row, place, token] - found[place]) < 0.02, (row, place)
            gap = float(logs[row, place].max() - logs[row, place, token])
            assert most[place] == (gap == 0) or gap < 0.02, (row, place)


def test_texts_and_tasks_during_training_change_no_number(
    trained: Path, small_data: PreparedData, tmp_path: Path
):
    texts = [f"logging.sample_prompts={json.dumps(PROMPTS)}", "logging.sample_interval=2"]
    assert SUITES["miniature"] == EVAL_TASKS
    tasks = [f"logging.eval_tasks={json.dumps(EVAL_TASKS)}", "logging.eval_task_interval=4"]
    run = small_run(small_data, tmp_path / "texts", *texts, *tasks, "logging.sample_tokens=5")
    with_texts = train(run, nproc=2)
    for name in ("lm_loss", "mtp_loss", "aux_loss", "z_loss", "grad_norm"):
        assert losses(with_texts, name) == losses(trained, name), name
    assert losses(with_texts, kind="valid") == losses(trained, kind="valid")
    loads = "expert_load/layer_01/max_over_mean"
    assert losses(with_texts, loads) == losses(trained, loads)
    expected, found = weights(trained), weights(with_texts)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    records = [r for r in read_metrics(with_texts / METRICS_FILE) if r.kind == "sample"]
    assert [(r.step, r.prompt) for r in records] == [
        (step, prompt) for step in (2, 4, 6) for prompt in PROMPTS
    ]
    assert all(r.note for r in records)
    assert_tasks(with_texts, tmp_path / "hf")


def assert_tasks(run: Path, exported: Path) -> None:
    """Assert that the last scores of tasks are those of `mellum2 eval` on the exported model.

    Small models have close answers, and BF16 rounding decides some of them.
    """
    records = [record for record in read_metrics(run / METRICS_FILE) if record.kind == "tasks"]
    assert [record.step for record in records] == [4, 6]
    export_hf(run, exported)
    model = TransformersModel(exported)
    planned = plan(model.architecture, EVAL_TASKS, few_items(EVAL_TASKS))
    report = evaluate(model, planned, name="hf", suites=EVAL_TASKS)
    figures = {
        "/".join((planned.measure.name, *map(str, figure.where.values()), figure.name)): figure
        for planned, outcome in report.results
        for figure in outcome.figures
    }
    assert records[-1].values.keys() == figures.keys()
    for name, figure in figures.items():
        if figure.items > 2:
            assert records[-1].values[name] == pytest.approx(figure.value, abs=0.2), name


def test_trained_checkpoint_is_what_transformers_loads(trained: Path, tmp_path: Path):
    export_hf(trained, tmp_path / "hf")
    report = verify(trained, tmp_path / "hf")
    assert report.ok, report
    assert report.mtp is not None


def test_logged_losses_are_transformers_cross_entropy(trained: Path, tmp_path: Path):
    """Inputs, labels and mask of both heads are those of the samples, read as running text.

    The validation after step 3, and the losses of step 4, are of the checkpoint of step 3. Labels
    shifted by one move these losses by 0.02 or more.
    """
    from mellum2_megatron.data.feed.datasets import build_datasets

    run = read_run(trained / "run.yaml")
    count = run.logging.eval_iterations * run.eval_batch_size
    train_set, valid_set, _ = build_datasets(
        run, (run.schedule.train_samples, count, 0), is_built_on_rank=lambda: True
    )
    export_hf(trained / "iter_0000003", tmp_path / "hf")

    def cross_entropies(samples: Iterable[dict[str, torch.Tensor]]) -> tuple[float, float]:
        text = torch.stack([torch.cat([s["tokens"], s["labels"][-1:]]) for s in samples])
        logits, mtp_logits = score_hf(tmp_path / "hf", text[:, :-1])
        assert mtp_logits is not None
        # The last MTP position has no target.
        heads = ((logits, text[:, 1:]), (mtp_logits[:, :-1], text[:, 2:]))
        means = [
            torch.nn.functional.cross_entropy(values.flatten(0, 1), targets.flatten())
            for values, targets in heads
        ]
        return float(means[0]), float(means[1])

    valid, _ = cross_entropies(valid_set[number] for number in range(count))
    assert losses(trained, kind="valid")[3] == pytest.approx(valid, abs=2e-4)
    # Steps 1 to 3 took 16 samples, 4 + 4 + 8.
    main, mtp = cross_entropies(train_set[number] for number in range(16, 24))
    assert losses(trained)[4] == pytest.approx(main, abs=2e-4)
    assert losses(trained, "mtp_loss")[4] == pytest.approx(mtp, abs=2e-4)


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
