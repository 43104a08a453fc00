"""Rules about the checkpoint that a run starts from."""

from __future__ import annotations

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Layout
from mellum2_megatron.planning.gradient_buffers import experts_have_own_data_parallel_group
from mellum2_megatron.planning.machine_rules import data_present
from mellum2_megatron.planning.resume import data_changes, rate_jump
from mellum2_megatron.planning.rule import PlannedRun, Problems, rule


@rule(
    evidence="megatron/core/tensor_parallel/layers.py:961 and optimizer/__init__.py (0.19.2): with "
    "ep > 1 or etp != tp experts have an Adam of their own; Muon: "
    "mellum2_megatron/upstream/muon_groups.py",
    machine=True,
)
def resume_fits(planned: PlannedRun) -> Problems:
    """A resumed or continued run can read the optimizer state of its checkpoint."""
    start, run, before = planned.start, planned.run, planned.checkpoint_run
    # Weights alone need no readable run.yaml: only their architecture matters.
    if start.has_state and start.before_error is not None:
        yield start.before_error
    if before is None:
        return
    restart = f"start another run with checkpoint.load={start.folder} and another --output"
    checkpoint_layout, run_layout = before.layout, run.layout
    apart_in_checkpoint, apart_in_run = map(
        experts_have_own_data_parallel_group, (checkpoint_layout, run_layout)
    )
    # Only Muon's state can be loaded across the two groupings (upstream/muon_groups.py).
    if run.optimizer.name == "adam" and apart_in_checkpoint != apart_in_run:
        tp = run_layout.tp
        if apart_in_checkpoint:
            same_grouping = f"layout.ep=2 or more, or a layout.etp other than {tp} (layout.tp)"
        else:
            same_grouping = f"layout.ep=1 and layout.etp={tp} (= layout.tp)"
        yield InputError(
            f"{_expert_layout(run_layout)} with a checkpoint of {_expert_layout(checkpoint_layout)}"
            f" in {start.folder}",
            rule="Adam's state does not move between experts with data-parallel ranks of their own "
            "(layout.ep > 1, or layout.etp other than layout.tp) and experts that share the other "
            "weights'",
            fix=f"set {same_grouping}, or {restart}",
        )
    if before.optimizer.name != run.optimizer.name:
        yield InputError(
            f"optimizer.name={run.optimizer.name} with a checkpoint of {before.optimizer.name} "
            f"in {start.folder}",
            rule="one optimizer cannot read the other's state",
            fix=f"set optimizer.name={before.optimizer.name}, or {restart}",
        )


def _expert_layout(layout: Layout) -> str:
    return f"layout.tp={layout.tp}, layout.ep={layout.ep}, layout.etp={layout.etp}"


@rule(
    evidence="megatron/core/optimizer/optimizer.py:139-151 and 600-651 (0.19.2): parameter groups "
    "come from the checkpoint; tests/checkpoint/test_continuation.py",
    machine=True,
)
def resume_keeps_settings(planned: PlannedRun) -> Problems:
    """A resumed or continued run keeps the settings that its state depends on."""
    folder = planned.start.folder
    for change in planned.start.changes(planned.run):
        # `resume_fits` refuses another optimizer, `check_run_folder` another architecture.
        if change.kind != "fixed" or change.key.startswith(("optimizer.name", "architecture.")):
            continue
        saved, wanted = str(change.before), str(change.after)
        yield InputError(
            f"{change.key}={wanted} with a checkpoint of {change.key}={saved} in {folder}",
            rule=f"it cannot change on resume: {change.reason}",
            fix=f"set {change.key}={saved}, or start another run with "
            f"checkpoint.load={folder} and another --output",
        )


@rule(evidence="mellum2_megatron/config/schedule.py, Schedule.after", machine=True)
def resume_ends_on_a_step(planned: PlannedRun) -> Problems:
    """A resumed run ends at the end of a step, at its checkpoint or later."""
    try:
        planned.start.joined(planned.run)
    except InputError as error:
        yield error


@rule(
    evidence="megatron/core/optimizer_param_scheduler.py (0.19.2)",
    machine=True,
)
def resume_keeps_rate_down(planned: PlannedRun) -> Problems:
    """A resumed or continued run raises the learning rate above the last one only if told to."""
    jump = rate_jump(planned.run, planned.start)
    if jump is None or planned.run.schedule.rewarm_at == jump.sample:
        return
    yield InputError(
        f"learning rate at sample {jump.sample}",
        rule=f"it would rise from {jump.last:.3g} (last step; the former schedule goes on with "
        f"{jump.planned:.3g}) to {jump.highest:.3g}, because of "
        f"{', '.join(change.line() for change in jump.changes)}",
        fix=f"add schedule.rewarm_at={jump.sample} if it is meant to rise, or keep the former "
        "schedule",
    )


@rule(evidence="data.json in the checkpoint", machine=True, after=data_present)
def resume_keeps_tokenizer(planned: PlannedRun) -> Problems:
    """A resumed or continued run reads tokens of the same tokenizer."""
    for change in data_changes(planned.run, planned.start):
        if change.kind == "fixed":
            yield InputError(
                f"{change.key}: sha256 {change.after}",
                rule=f"the checkpoint in {planned.start.folder} was trained with sha256 "
                f"{change.before}: {change.reason}",
                fix=f"prepare the data with --tokenizer {planned.start.folder}/tokenizer",
            )
