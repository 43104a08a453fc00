"""Known-bad combinations, refused before a process is started.

`mellum2 doctor` prints all rules that a run breaks, `mellum2 train` raises them.

A rule is a small function from a `PlannedRun` to its problems. A problem is an `InputError` that is
yielded, not raised; `enforce` raises it in the end. To add a rule::

    @rule(evidence="megatron/core/some_file.py:123 (0.19.2)")
    def new_rule(planned: PlannedRun) -> Problems:
        \"\"\"One line that states what must hold.\"\"\"
        if planned.run.layout.ep == 7:
            yield InputError("layout.ep=7", rule="seven is unlucky", fix="set layout.ep=8")
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from mellum2_megatron.checkpoint import StartingPoint
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import check_writable
from mellum2_megatron.config import Backend, Device, Layout, Run
from mellum2_megatron.planning.rank_weights import experts_have_own_data_parallel_group

Problems = Iterator[InputError]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """A run that is about to start.

    Attributes:
        run: the resolved run.
        world_size: number of ranks.
        device: device that the ranks compute on.
        start: starting point of the run; always a new start in checks for another machine.
    """

    run: Run
    world_size: int
    device: Device
    start: StartingPoint

    @property
    def backend(self) -> Backend:
        """The run's backend on this device."""
        return self.run.resolved_backend(self.device)

    @property
    def data_parallel(self) -> int:
        """Number of ranks that see different sequences."""
        return self.run.layout.data_parallel(self.world_size)

    @property
    def checkpoint_run(self) -> Run | None:
        """The run whose optimizer state this one loads; None if it loads none."""
        return self.start.before if self.start.has_state else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A named check.

    Attributes:
        name: name of the function, with dashes.
        statement: condition that must hold, as one sentence.
        evidence: source of the statement, such as a file of Megatron with version, or a test.
        find: function that yields one problem for each violation.
        machine: true if the rule reads this machine's files and packages too; default false.
        after: rule without which this one has no meaning, default none.
    """

    name: str
    statement: str
    evidence: str
    find: Callable[[PlannedRun], Problems]
    machine: bool = False
    after: Rule | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Violation:
    """A broken rule and one of its problems: refused value, rule and fix."""

    rule: Rule
    problem: InputError

    def __str__(self) -> str:
        return f"{self.problem} [{self.rule.name}: {self.rule.evidence}]"


RULES: list[Rule] = []
"""All rules, in the order in which they are checked."""


def rule(
    *, evidence: str, machine: bool = False, after: Rule | None = None
) -> Callable[[Callable[[PlannedRun], Problems]], Rule]:
    """Register a function as a rule; the first paragraph of its docstring is the statement.

    Args:
        evidence, machine, after: fields of `Rule`.
    """

    def register(find: Callable[[PlannedRun], Problems]) -> Rule:
        new = Rule(
            name=find.__name__.replace("_", "-"),
            statement=" ".join((find.__doc__ or "").partition("\n\n")[0].split()),
            evidence=evidence,
            find=find,
            machine=machine,
            after=after,
        )
        RULES.append(new)
        return new

    return register


def check(
    run: Run,
    world_size: int,
    device: Device,
    *,
    start: StartingPoint | None = None,
    machine: bool = True,
) -> list[Violation]:
    """Return every violation of every rule.

    Args:
        run: a resolved run.
        world_size: number of ranks to be started.
        device: device that they compute on.
        start: starting point of the run, default `StartingPoint.of(run)`.
        machine: check files and packages of this machine too, default true; false if the run is
            for another machine.
    """
    if start is None:
        # A run for another machine starts from that machine's disks, which are out of reach.
        start = StartingPoint.of(run) if machine else StartingPoint(kind="new")
    planned = PlannedRun(run=run, world_size=world_size, device=device, start=start)
    violations: list[Violation] = []
    for entry in RULES:
        if entry.machine and not machine:
            continue
        if any(violation.rule is entry.after for violation in violations):
            continue  # its divisions would have a remainder, and its messages wrong numbers
        violations += [Violation(rule=entry, problem=problem) for problem in entry.find(planned)]
    return violations


def enforce(
    run: Run,
    world_size: int,
    device: Device,
    *,
    start: StartingPoint | None = None,
    machine: bool = True,
    without: Collection[str] = (),
) -> None:
    """Refuse a run that breaks a rule.

    Args:
        run, world_size, device, start, machine: as for `check`.
        without: names of rules to leave out, default none.

    Raises:
        InputError: the only problem, or a list of all.
    """
    violations = [
        violation
        for violation in check(run, world_size, device, start=start, machine=machine)
        if violation.rule.name not in without
    ]
    if len(violations) == 1:
        raise violations[0].problem
    if violations:
        listed = "".join(
            f"\n  {number}. {violation}" for number, violation in enumerate(violations, 1)
        )
        ranks = "rank" if world_size == 1 else "ranks"
        raise InputError(
            f"run {run.name} on {world_size} {device} {ranks}",
            rule=f"breaks {len(violations)} rules",
            fix=f"each of{listed}",
        )


@rule(evidence="megatron/training/arguments.py:429, 963, 1295, 1602 (0.19.2)")
def layout_fits(planned: PlannedRun) -> Problems:
    """The layout divides the model, the sequence and the ranks."""
    run = planned.run
    yield from run.layout.problems(
        run.architecture,
        world_size=planned.world_size,
        sequence_length=run.data.sequence_length,
    )


@rule(evidence="megatron/training/arguments.py:1314 (0.19.2)")
def sequence_in_context(planned: PlannedRun) -> Problems:
    """The sequence is no longer than the model's context."""
    length = planned.run.data.sequence_length
    context = planned.run.architecture.max_position_embeddings
    if length > context:
        yield InputError(
            f"data.sequence_length={length}",
            rule=f"must not exceed architecture.max_position_embeddings ({context})",
            fix=f"set data.sequence_length={context}, "
            "or take an architecture with a longer context",
        )


@rule(
    evidence="megatron/core/num_microbatches_calculator.py:580 and "
    "training/arguments.py:694 (0.19.2)",
    after=layout_fits,
)
def batches_divide(planned: PlannedRun) -> Problems:
    """Every batch is a whole number of micro-batches on every data-parallel rank."""
    micro, ranks = planned.run.schedule.micro_batch_size, planned.data_parallel
    batches = [
        (f"schedule.batch_schedule: {size} sequences", size)
        for size in dict.fromkeys(size for _, size in planned.run.schedule.batch_schedule)
    ]
    # Without this setting validation takes a batch size of the schedule, listed above.
    eval_batch = planned.run.logging.eval_batch_size
    if eval_batch is not None:
        batches.append((f"logging.eval_batch_size={eval_batch}", eval_batch))
    for given, size in batches:
        unit = micro * ranks
        if size % unit == 0:
            continue
        below = size // unit * unit
        above = below + unit
        working = f"{below} or {above}" if below else f"{above}"
        yield InputError(
            given,
            rule="must be a multiple of schedule.micro_batch_size * data-parallel ranks "
            f"= {micro} * {ranks}",
            fix=f"use {working} sequences, or another schedule.micro_batch_size",
        )


@rule(
    evidence="megatron/core/pipeline_parallel/schedules.py:1145 (0.19.2)",
    after=layout_fits,
)
def interleaving_divides(planned: PlannedRun) -> Problems:
    """With virtual stages, a step's micro-batches fill the pipeline evenly."""
    layout = planned.run.layout
    # Sequences of one micro-batch on all data-parallel ranks together.
    micro = planned.run.schedule.micro_batch_size * planned.data_parallel
    for _, size in planned.run.schedule.batch_schedule:
        if layout.vpp > 1 and size // micro % layout.pp:
            yield InputError(
                f"schedule.batch_schedule: {size} sequences, {size // micro} micro-batches a step",
                rule="with layout.vpp > 1 the micro-batches must be a multiple of layout.pp "
                f"({layout.pp})",
                fix=f"make the batch a multiple of {micro * layout.pp}, or set layout.vpp=1",
            )


@rule(
    evidence="megatron/core/transformer/transformer_config.py:1405-1430 (0.19.2)",
    after=layout_fits,
)
def bf16_layers_exist(planned: PlannedRun) -> Problems:
    """The layers kept in BF16 lie in the first and the last pipeline stage."""
    precision, pp = planned.run.precision, planned.run.layout.pp
    layers = planned.run.architecture.num_hidden_layers // pp
    fix = f"use at most {layers}"
    if pp == 1:
        # With one stage, all layers in BF16 means no FP8 at all; with more it does not.
        fix += ", or precision.compute=bf16"
    for name, value in (
        ("bf16_first_layers", precision.bf16_first_layers),
        ("bf16_last_layers", precision.bf16_last_layers),
    ):
        if value > layers:
            yield InputError(
                f"precision.{name}={value}",
                rule=f"a pipeline stage has num_hidden_layers / layout.pp = {layers} layers",
                fix=fix,
            )


@rule(
    evidence="mellum2_megatron/upstream/arguments.py: --pretrained-checkpoint with --load takes "
    "weights without state"
)
def load_excludes_continue_from(planned: PlannedRun) -> Problems:
    """A run takes another one's weights or continues with all of its state."""
    load, continue_from = planned.run.checkpoint.load, planned.run.checkpoint.continue_from
    if load is not None and continue_from is not None:
        yield InputError(
            f"checkpoint.load={load} with checkpoint.continue_from={continue_from}",
            rule="`load` takes weights only and starts at step 0, "
            "`continue_from` takes all state and keeps counting",
            fix="set one of them to null",
        )


@rule(
    evidence="megatron/core/optimizer/optimizer.py:1112, "
    "distributed/param_and_grad_buffer.py:500-520 (0.19.2): the layer-wise optimizer gathers FP8 "
    "data without its scale, which only the distributed optimizer reduces"
)
def muon_gathers_bf16(planned: PlannedRun) -> Problems:
    """Muon's weights are gathered in BF16."""
    if planned.run.optimizer.name == "muon" and planned.run.precision.fp8_param_gather:
        yield InputError(
            "precision.fp8_param_gather=true with optimizer.name=muon",
            rule="Megatron accepts this and computes with wrong weights on every rank that does "
            "not own them",
            fix="set precision.fp8_param_gather=false (FP8 matrix multiplications stay on)",
        )


@rule(
    evidence="megatron/core/models/gpt/gpt_model.py:237 and 295 (0.19.2): modules are made, in FP8 "
    "if weights will be gathered so, before their own precision exception applies"
)
def bf16_projection_gathers_bf16(planned: PlannedRun) -> Problems:
    """An MTP projection that stays in BF16 is gathered in BF16."""
    if planned.run.precision.bf16_mtp_projection and planned.run.precision.fp8_param_gather:
        yield InputError(
            "precision.bf16_mtp_projection=true with precision.fp8_param_gather=true",
            rule="the projection's weight would still be kept in FP8",
            fix="set precision.fp8_param_gather=false or precision.bf16_mtp_projection=false",
        )


@rule(
    evidence="megatron/core/transformer/transformer_config.py: FP8 needs Transformer Engine "
    "modules (0.19.2)"
)
def fp8_has_kernels(planned: PlannedRun) -> Problems:
    """FP8 runs on Transformer Engine."""
    if planned.run.precision.compute == "fp8" and planned.backend != "te":
        fix = "set precision.compute=bf16"
        if planned.device == "cuda":
            fix += ", or backend=te"
        yield InputError(
            f"precision.compute=fp8 with backend={planned.backend} on {planned.device}",
            rule="FP8 matrix multiplications exist in Transformer Engine on a GPU only",
            fix=fix,
        )


@rule(evidence="transformer_engine/pytorch/utils.py, assert_dim_for_fp8_exec (2.20.2)")
def fp8_dimensions(planned: PlannedRun) -> Problems:
    """FP8 matrices have dimensions that its kernels take."""
    if planned.run.precision.compute != "fp8":
        return
    model, layout = planned.run.architecture, planned.run.layout
    # Dimensions of the matrices on one rank.
    heads = model.num_attention_heads * model.head_dim // layout.tp
    sizes = {
        "architecture.hidden_size": model.hidden_size,
        "architecture.num_attention_heads * head_dim / layout.tp": heads,
        "architecture.moe_intermediate_size / layout.etp": model.moe_intermediate_size
        // layout.etp,
    }
    for dimension, size in sizes.items():
        if size % 16:
            multiple = max(16, round(size / 16) * 16)
            yield InputError(
                f"{dimension} = {size}",
                rule="FP8 kernels need multiples of 16",
                fix=f"use {multiple}, or precision.compute=bf16",
            )


@rule(
    evidence="Transformer Engine has no CPU kernels; the flex dispatcher needs DeepEP or HybridEP "
    "on GPUs"
)
def cpu_supports_run(planned: PlannedRun) -> Problems:
    """A CPU run uses only a backend and a dispatcher that exist on a CPU."""
    if planned.device != "cpu":
        return
    if planned.run.backend == "te":
        yield InputError(
            "backend=te on cpu", rule="Transformer Engine runs on GPUs only", fix="set backend=auto"
        )
    if planned.run.layout.dispatcher == "flex":
        yield InputError(
            "layout.dispatcher=flex on cpu",
            rule="its kernels are for GPUs",
            fix="set layout.dispatcher=alltoall",
        )


@rule(
    evidence="megatron/core/dist_checkpointing/strategies/filesystem_async.py (0.19.2): "
    "CUDA streams"
)
def async_save_on_gpu(planned: PlannedRun) -> Problems:
    """Checkpoints are written in the background on GPUs only."""
    if planned.device == "cpu" and planned.run.checkpoint.async_save:
        yield InputError(
            "checkpoint.async_save=true on cpu",
            rule="it copies a GPU's memory while training continues; "
            "a CPU has nothing to copy from",
            fix="set checkpoint.async_save=false",
        )


@rule(evidence="this machine", machine=True)
def packages_present(planned: PlannedRun) -> Problems:
    """The packages that the run needs are installed."""
    if (
        planned.backend == "te"
        and planned.device == "cuda"
        and importlib.util.find_spec("transformer_engine") is None
    ):
        yield InputError(
            f"backend={planned.run.backend}, te on a GPU",
            rule="Transformer Engine is not installed here",
            fix="install the extra `te`, or set backend=torch (much slower, for checks)",
        )
    project = planned.run.logging.wandb_project
    if project is not None and importlib.util.find_spec("wandb") is None:
        yield InputError(
            f"logging.wandb_project={project}",
            rule="the package wandb is not installed here",
            fix="install the extra `wandb`, or set logging.wandb_project=null",
        )


@rule(evidence="this machine", machine=True)
def data_present(planned: PlannedRun) -> Problems:
    """The corpus, its tokenizer and a place for its index exist; the tokens are the model's."""
    # Imports numpy and torch, which planning for another machine does not need.
    from mellum2_megatron.data.feed.datasets import check_data

    data = planned.run.data
    cache = Path(data.cache or Path(data.path) / "cache")
    try:
        check_data(planned.run)
        # An existing cache may be read-only, since a complete one is only read.
        if not cache.is_dir():
            check_writable("data.cache", cache, folder=True)
    except InputError as error:
        yield error


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


FROM_CHECKPOINT = {
    **dict.fromkeys(
        ("lr", "min_lr"), "Megatron finds its parameter groups by their rates, and finds none"
    ),
    **dict.fromkeys(
        ("muon_router", "muon_mtp_projection"), "the other optimizer has no state for those weights"
    ),
    **dict.fromkeys(
        ("muon_momentum", "adam_beta1", "adam_beta2", "adam_eps"),
        "Megatron silently uses the checkpoint's value",
    ),
}
"""Fields of `Optimizer` that cannot change when its state is loaded -> effect of a change."""


@rule(
    evidence="megatron/core/optimizer/optimizer.py:139-151 and 600-651 (0.19.2): parameter groups "
    "come from the checkpoint; tests/checkpoint/test_continuation.py",
    machine=True,
)
def resume_keeps_optimizer(planned: PlannedRun) -> Problems:
    """A resumed or continued run keeps the optimizer settings of its checkpoint."""
    before = planned.checkpoint_run
    if before is None or before.optimizer.name != planned.run.optimizer.name:
        return  # two optimizers have no settings to compare; `resume_fits` refuses the change
    for name, reason in FROM_CHECKPOINT.items():
        # Under Adam the fields of Muon have no effect.
        if name.startswith("muon_") and before.optimizer.name != "muon":
            continue
        saved, wanted = getattr(before.optimizer, name), getattr(planned.run.optimizer, name)
        if saved != wanted:
            folder = planned.start.folder
            yield InputError(
                f"optimizer.{name}={wanted} with a checkpoint of optimizer.{name}={saved} "
                f"in {folder}",
                rule="these settings are stored with the optimizer state and cannot change on "
                f"resume: {reason}",
                fix=f"set optimizer.{name}={saved}, or start another run with "
                f"checkpoint.load={folder} and another --output",
            )
