"""Hooks in Megatron's loop: each target is as expected, each replacement works."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron.core
import pytest
import torch
from megatron.core import dist_checkpointing, num_microbatches_calculator
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.rerun_state_machine import RerunStateMachine
from megatron.core.transformer import multi_token_prediction
from megatron.training import global_vars, training

from mellum2_megatron.checkpoint.file_manifest import read_manifest
from mellum2_megatron.checkpoint.folder import iteration_folder_name, iteration_folders
from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.config import Checkpoint, Logging, Stability
from mellum2_megatron.faults.failures import is_gradient_check
from mellum2_megatron.faults.step_guard import STATE_FILE, Event, StepGuard
from mellum2_megatron.faults.stop_request import StopRequest
from mellum2_megatron.recipes import recipe
from mellum2_megatron.training import decoding
from mellum2_megatron.training import hooks as training_hooks
from mellum2_megatron.training import metrics as training_metrics
from mellum2_megatron.training.hooks import LoopParts, hooks, install_hooks
from mellum2_megatron.training.metrics import TrainingMetrics
from mellum2_megatron.training.samples import TrainingSamples
from mellum2_megatron.training.step import LOSS_CHECK
from mellum2_megatron.training.tasks import TrainingTasks
from mellum2_megatron.training.validation_documents import ValidationDocuments
from mellum2_megatron.upstream import patching
from mellum2_megatron.upstream.patching import Patch

SHAPES = {
    "scalars": None,
    "end-of-step": ["loss_dict", "total_loss_dict", "learning_rate", "iteration"],
    "validation": ["prefix", "forward_step_func", "data_iterator", "model", "iteration"],
    "acceptance": ["mtp_logits", "mtp_labels", "loss_mask", "output_layer"],
    "samples": ["model", "optimizer", "opt_param_scheduler", "iteration"],
    "step": ["forward_step_func", "data_iterator", "model", "optimizer", "opt_param_scheduler"],
    "bad-value": ["self", "result", "rejection_func", "message"],
    "update-or-skip": ["self"],
    "save-files": ["sharded_state_dict", "checkpoint_dir"],
    "save-checkpoint": ["iteration"],
    "stop-signal": None,
}
"""First parameters of each target; None for a global that Megatron sets to None."""

CALLERS: dict[str, tuple[Any, str]] = {
    "scalars": (global_vars, "_GLOBAL_TENSORBOARD_WRITER"),
    "end-of-step": (training, "training_log"),
    "validation": (training, "evaluate_and_print_results"),
    "acceptance": (multi_token_prediction, "_compute_mtp_acceptance_counts"),
    "samples": (training, "post_training_step_callbacks"),
    "step": (training, "train_step"),
    "bad-value": (RerunStateMachine, "validate_result"),
    "update-or-skip": (ChainedOptimizer, "prepare_grads"),
    "save-files": (dist_checkpointing, "save"),  # checkpointing.py:827 calls it by this name
    "save-checkpoint": (training, "save_checkpoint"),
    "stop-signal": (global_vars, "_GLOBAL_SIGNAL_HANDLER"),
}
"""Hook -> places where Megatron's loop looks its target up."""

CITED = [
    ("training/training.py", 1354, "iterators = build_train_valid_test_data_iterators("),
    ("training/training.py", 1483, "evaluate_and_print_results("),
    ("training/training.py", 2518, "if update_successful:"),
    ("training/training.py", 2588, "writer = get_tensorboard_writer()"),
    ("training/training.py", 3086, "save_checkpoint("),
    ("training/training.py", 3247, "if args.exit_signal_handler:"),
    ("training/training.py", 3772, "save_checkpoint_and_time("),
    ("training/training.py", 3856, ") = train_step("),
    ("training/training.py", 3985, "report_memory_flag = training_log("),
    ("training/training.py", 4009, "timers('interval-time').stop()"),
    ("training/training.py", 4040, "evaluate_and_print_results(prefix, forward_step_func,"),
    ("training/training.py", 4059, "timers('interval-time', log_level=0).start(barrier=True)"),
    ("training/training.py", 4068, "= post_training_step_callbacks("),
    ("training/training.py", 4155, "sys.exit(exit_code)"),
    ("training/checkpointing.py", 827, "async_save_request = dist_checkpointing.save("),
    ("training/datasets/data_samplers.py", 94, "if args.exit_signal_handler:"),
    ("training/dist_signal_handler.py", 68, "signal.signal(self.sig, handler)"),
    ("training/global_vars.py", 149, "if args.exit_signal_handler:"),
    ("training/global_vars.py", 83, "_ensure_var_is_not_initialized(_GLOBAL_SIGNAL_HANDLER"),
    ("core/rerun_state_machine.py", 534, "raise RuntimeError(full_message)"),
    ("core/optimizer/optimizer.py", 1862, "found_inf_flag = self.prepare_grads()"),
]
"""Lines of Megatron that the table and the docstrings of the loop cite, and their text."""


class Run:
    """One run's objects, and what they were called with."""

    def __init__(self, folder: Path, stability: Stability, checkpoint: Checkpoint) -> None:
        self.folder = folder
        self.events: list[Event] = []
        self.pauses: list[str] = []
        guard = StepGuard(stability, self.events.append)
        self.parts = LoopParts(
            checkpoint=checkpoint,
            metrics=TrainingMetrics(recipe("mellum2_tiny_pretrain")),
            sums=ValidationDocuments(
                recipe("mellum2_tiny_pretrain"), corpora=("valid",), folder=folder
            ),
            samples=TrainingSamples(
                recipe("mellum2_tiny_pretrain"),
                on_texts=lambda step, texts: None,
                pause_watch=self.pause,
            ),
            tasks=TrainingTasks(
                recipe("mellum2_tiny_pretrain"),
                on_scores=lambda step, outcomes: None,
                pause_watch=self.pause,
            ),
            guard=guard,
            add_files=guard.save,
            stop=StopRequest(),
            pause_watch=self.pause,
        )
        self.table = {patch.name: patch for patch in hooks(self.parts)}

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        self.pauses.append("begin")
        yield
        self.pauses.append("end")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that skips bad steps and keeps one checkpoint; Megatron is as before afterwards."""
    stability = Stability(not_finite="skip", spike="skip", spike_window=3, max_skips=2)
    run = Run(tmp_path, stability, Checkpoint(output=str(tmp_path), keep_last=1))
    for patch in run.table.values():
        owner, name = target(patch)
        original = owner.__dict__[name]
        monkeypatch.setattr(owner, name, original)  # `monkeypatch` puts this value back
        bindings = [module for key, module in sys.modules.items() if key.startswith("megatron.")]
        for module in bindings if callable(original) else []:
            if getattr(module, "__dict__", {}).get(name) is original:
                monkeypatch.setattr(module, name, original)
    monkeypatch.setattr(patching, "_applied", set())
    args = SimpleNamespace(
        curr_iteration=6, consumed_train_samples=48, exit_signal_handler=False, iteration=0
    )
    monkeypatch.setattr("megatron.training.get_args", lambda: args)
    for module in (training_hooks, training_metrics):
        monkeypatch.setattr(module, "get_args", lambda: args)
    monkeypatch.setattr(
        num_microbatches_calculator, "get_current_running_global_batch_size", lambda: 8
    )
    return run


def target(patch: Patch) -> tuple[Any, str]:
    owner: Any = importlib.import_module(patch.module)
    *path, name = patch.attribute.split(".")
    for step in path:
        owner = getattr(owner, step)
    return owner, name


def test_every_hook_has_its_tests(run: Run) -> None:
    assert set(run.table) == set(SHAPES) == set(CALLERS)


@pytest.mark.parametrize("name", SHAPES)
def test_target_has_the_shape_that_is_relied_on(run: Run, name: str) -> None:
    owner, attribute = target(run.table[name])
    original = owner.__dict__[attribute]
    if SHAPES[name] is None:
        assert original is None
    else:
        assert list(inspect.signature(original).parameters)[: len(SHAPES[name])] == SHAPES[name]


@pytest.mark.parametrize(("file", "line", "text"), CITED)
def test_cited_line_is_there(file: str, line: int, text: str) -> None:
    root = Path(megatron.core.__file__).parents[1]
    assert text in (root / file).read_text(encoding="utf-8").splitlines()[line - 1]


@pytest.mark.usefixtures("megatron_world")
def test_installing_replaces_each_where_megatron_looks_it_up(run: Run) -> None:
    before = {name: owner.__dict__[attribute] for name, (owner, attribute) in CALLERS.items()}
    install_hooks(run.parts)
    after = {name: owner.__dict__[attribute] for name, (owner, attribute) in CALLERS.items()}
    assert [name for name in CALLERS if after[name] is before[name]] == []
    install_hooks(run.parts)  # once more changes nothing
    assert {name: getattr(owner, attr) for name, (owner, attr) in CALLERS.items()} == after
    assert sys.modules["megatron.training"].get_args().exit_signal_handler is True


def test_another_version_is_refused_before_anything_is_replaced(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {(patch.distribution, patch.versions) for patch in run.table.values()} == {
        ("megatron-core", "==0.19.2")
    }
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.20.0")
    train_step = training.train_step
    with pytest.raises(InputError, match=r"0\.20\.0.*'scalars' was written for megatron-core ==0"):
        install_hooks(run.parts)
    assert training.train_step is train_step


@pytest.mark.usefixtures("megatron_world")
def test_accepted_tokens_are_counted_in_logged_steps_only(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = run.parts.metrics
    metrics.run = dataclasses.replace(metrics.run, logging=Logging(log_interval=7))
    last = metrics.run.schedule.train_steps
    assert last % 7
    count = metrics.wrap_acceptance(lambda *_: (torch.tensor(3.0), torch.tensor(4.0)))
    for done, counted in ((6, 4), (7, 0), (last - 1, 4), (last - 2, 0)):
        args = SimpleNamespace(curr_iteration=done)
        monkeypatch.setattr("mellum2_megatron.training.metrics.get_args", lambda args=args: args)
        assert count(torch.zeros(1))[1] == counted


def test_scalars_of_a_step_arrive_once_it_is_complete(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[str, int, dict[str, float]]] = []
    run.parts.metrics._log = SimpleNamespace(  # type: ignore[assignment]  # of a log, what is used
        log_step=lambda step, values: logged.append(("train", step, values)),
        log_eval=lambda step, values: logged.append(("valid", step, values)),
    )

    def report(loss_dict: Any, total: Any, rate: float, iteration: int, *rest: Any) -> str:
        writer: Any = global_vars.get_tensorboard_writer()
        writer.add_scalar("learning-rate", rate, iteration)
        writer.add_scalar("lm loss", loss_dict["lm loss"], iteration)
        if rest[-1] is not None:
            writer.add_scalar("grad-norm", rest[-1], iteration)
        writer.add_scalar("a scalar that nobody keeps", 1.0, iteration)
        return "memory reported"

    monkeypatch.setattr(training, "training_log", report)
    install_hooks(run.parts)
    interval = run.parts.metrics.run.logging.log_interval
    for step, norm in ((interval - 1, 3.0), (interval, None)):
        done = training.training_log({"lm loss": 2.5}, {}, 0.1, step, 1.0, norm)
        assert done == "memory reported"
    length = run.parts.metrics.run.data.sequence_length
    # Steps between two intervals are not logged, and a skipped step has no gradient norm.
    values = {"learning_rate": 0.1, "lm_loss": 2.5, "samples": 48.0, "tokens": 48.0 * length}
    assert logged == [("train", interval, values)]
    writer: Any = global_vars.get_tensorboard_writer()
    for _ in range(2):  # Megatron validates twice at the end
        writer.add_scalar("lm loss validation", 2.0, 20)
    assert logged[1:] == [("valid", 20, {"lm_loss": 2.0})]


def test_texts_are_generated_where_they_are_due_with_the_watch_off(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    logging = Logging(sample_prompts=("def f(",), sample_interval=4)
    settings = dataclasses.replace(recipe("mellum2_tiny_pretrain"), logging=logging)
    last = settings.schedule.train_steps
    order: list[Any] = []

    @contextlib.contextmanager
    def outside(model: Any, optimizer: Any) -> Iterator[None]:
        order.append(("outside", model, optimizer, list(run.pauses)))
        yield

    def generate(model: list[str]) -> list[tuple[str, str]]:
        return [("def f(", f"x of {model[0]}")]

    samples = TrainingSamples(
        settings, on_texts=lambda *texts: order.append(texts), pause_watch=run.pause
    )
    monkeypatch.setattr(decoding, "outside_of_training", outside)
    monkeypatch.setattr(samples, "_generate", generate)
    end_step = samples.wrap_end_of_step(lambda *args: ("upstream's result", args))
    for step in (3, 4, 5, last):
        done = end_step(["part"], "optimizer", "scheduler", step, "profiler", 0.5)
        assert done[0] == "upstream's result"
        assert done[1][3:] == (step, "profiler", 0.5)
    texts = [("def f(", "x of part")]
    assert order == [
        ("outside", ["part"], "optimizer", ["begin"]),
        (4, texts),
        ("outside", ["part"], "optimizer", ["begin", "end", "begin"]),
        (last, texts),
    ]


def chained(*inner: Any) -> Any:
    """A ChainedOptimizer as `prepare_grads` needs it."""
    optimizer = ChainedOptimizer.__new__(ChainedOptimizer)
    optimizer.chained_optimizers = list(inner)
    return optimizer


class TestStep:
    """One step through `train_step`, `validate_result` and `prepare_grads` in Megatron's order."""

    @pytest.fixture(autouse=True)
    def world(self, megatron_world: None, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run = run
        self.prepared: list[str] = []
        self.increments: list[int] = []
        inner = SimpleNamespace(prepare_grads=lambda: bool(self.prepared.append("gradients")))
        self.optimizer = chained(chained(inner))  # as with Muon, whose Adam stands beside it
        self.gathers = 0
        all_gather = torch.distributed.all_gather

        def count(*args: Any, **kwargs: Any) -> Any:
            self.gathers += 1
            return all_gather(*args, **kwargs)

        monkeypatch.setattr(torch.distributed, "all_gather", count)

        def train_step(
            forward_step: Any, iterator: Any, model: Any, optimizer: Any, *_: Any, **__: Any
        ) -> bool:
            _, loss_function = forward_step(iterator, model)
            loss_function(torch.zeros(()))
            if model == "bad gradient":
                RerunStateMachine.validate_result(
                    SimpleNamespace(),
                    result=torch.tensor(float("nan")),
                    rejection_func=torch.isnan,
                    message="found NaN in local grad norm for bucket #0",
                    tolerance=0.001,
                    fatal=True,
                )
            return not optimizer.prepare_grads()

        monkeypatch.setattr(training, "train_step", train_step)
        install_hooks(run.parts)

    def step(self, loss: float, model: str = "model") -> bool:
        """Train a step of four tokens; return True if it was updated."""
        sums = torch.tensor([4 * loss, 4.0])
        scheduler = SimpleNamespace(step=lambda increment: self.increments.append(increment))
        forward = self.run.parts.guard.wrap_forward_step(
            lambda *_: (torch.zeros(()), lambda _: (None, None, {"lm loss": sums}))
        )
        updated: bool = training.train_step(
            forward, None, model, self.optimizer, scheduler, None, None, iteration=6
        )
        return updated

    def test_good_step_is_updated_with_one_gather(self) -> None:
        assert self.step(2.0)
        assert (self.gathers, self.prepared, self.increments) == (1, ["gradients"], [])
        assert self.run.events == []

    def test_bad_gradient_skips_the_update_and_advances_the_schedule(self) -> None:
        assert not self.step(2.0, "bad gradient")
        assert (self.gathers, self.prepared, self.increments) == (1, [], [8])
        (event,) = self.run.events
        assert event.note == "the gradient is nan on rank 0: the update is skipped"
        assert (event.step, event.samples, event.batch_size, event.skipped) == (7, 56, 8, True)

    def test_spike_is_judged_by_the_steps_before(self) -> None:
        for loss in (2.0, 2.1, 1.9):
            assert self.step(loss)
        assert not self.step(4.0)
        (event,) = self.run.events
        assert event.note == (
            "the loss is 4.0000, 2.00 times the median of 3 steps: the update is skipped"
        )
        assert event.values == {"value": 4.0, "samples": 56, "batch_size": 8, "skipped": 1}

    def test_too_many_skips_stop_the_run(self) -> None:
        for _ in range(2):
            assert not self.step(2.0, "bad gradient")
        with pytest.raises(WorkError, match="after 2 skipped updates in a row; nothing was saved"):
            self.step(2.0, "bad gradient")
        assert [event.skipped for event in self.run.events] == [True, True, False]

    def test_guard_changes_nothing_outside_a_step(self) -> None:
        machine = RerunStateMachine(mode=megatron.core.rerun_state_machine.RerunMode.DISABLED)
        with pytest.raises(RuntimeError, match="Unexpected result nan"):
            machine.validate_result(
                result=torch.tensor(float("nan")), rejection_func=torch.isnan, message=LOSS_CHECK
            )
        assert self.optimizer.prepare_grads() is False
        assert (self.gathers, self.prepared) == (0, ["gradients"])

    def test_state_comes_back_with_a_checkpoint(self, tmp_path: Path) -> None:
        for loss in (2.0, 2.1):
            self.step(loss)
        self.step(2.0, "bad gradient")
        folder = tmp_path / iteration_folder_name(7)
        folder.mkdir()
        self.run.parts.guard.save(folder)
        again = StepGuard(self.run.parts.guard.settings, self.run.events.append)
        again.load(tmp_path, iteration=7)
        assert (again._history.losses, again._skips_in_a_row) == ([2.0, pytest.approx(2.1)], 1)
        again.load(tmp_path, iteration=8)  # no such checkpoint: nothing to restore


def test_guard_that_watches_nothing_leaves_megatron_alone(run: Run) -> None:
    guard = StepGuard(Stability(not_finite="stop", spike="ignore"), run.events.append)
    for wrap in (guard.wrap_train_step, guard.wrap_validate_result, guard.wrap_prepare_grads):
        assert wrap(len) is len
    assert guard.wrap_forward_step(len) is len


def test_gradient_messages_are_distinguished_from_ours() -> None:
    """Upstream's wording decides the kind of a failure."""
    source = inspect.getsource(_ParamAndGradBucketGroup.check_grads)
    messages = [line for line in source.splitlines() if "message=f" in line]
    assert len(messages) == 3
    assert all(is_gradient_check(message) for message in messages)
    assert not is_gradient_check(LOSS_CHECK)


@pytest.mark.usefixtures("megatron_world")
def test_save_begins_in_an_empty_folder_and_ends_with_a_manifest(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run.folder / "iter_0000005"
    (folder / "old").mkdir(parents=True)

    def save(state: dict[str, int], path: str, *, strategy: str) -> None:
        Path(path, "__0_0.distcp").write_text(f"{state} {strategy}")

    monkeypatch.setattr("megatron.core.dist_checkpointing.serialization.save", save)
    monkeypatch.setattr(dist_checkpointing, "save", save)
    install_hooks(run.parts)
    assert dist_checkpointing.save({"a": 1}, str(folder), strategy="mcore") is None
    assert sorted(read_manifest(folder) or {}) == ["__0_0.distcp", STATE_FILE]
    assert not (folder / "old").exists()


@pytest.mark.usefixtures("megatron_world")
def test_step_is_saved_once_and_older_ones_are_removed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_checkpoint(iteration: int, *_: Any, **__: Any) -> None:
        assert run.pauses[-1] == "begin"
        folder = run.folder / iteration_folder_name(iteration)
        folder.mkdir()  # fails when it is there
        (folder / "metadata.json").write_text("{}")
        (run.folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))

    monkeypatch.setattr("megatron.training.checkpointing.save_checkpoint", save_checkpoint)
    monkeypatch.setattr(training, "save_checkpoint", save_checkpoint)
    install_hooks(run.parts)
    for iteration in (4, 4, 8):
        training.save_checkpoint(iteration, "model", train_data_iterator=None)
    assert [folder.name for folder in iteration_folders(run.folder)] == ["iter_0000008"]
    assert run.pauses == ["begin", "end"] * 2


@pytest.mark.usefixtures("megatron_world")
def test_loop_calls_our_stop_request(run: Run) -> None:
    install_hooks(run.parts)
    handler = global_vars.get_signal_handler()
    assert handler.signals_received() == [0]
    assert not run.parts.stop.agreed
    run.parts.stop._on_signal(15, None)
    assert handler.signals_received() == [1]
    assert run.parts.stop.agreed
