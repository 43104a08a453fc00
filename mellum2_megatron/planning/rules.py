"""Known-bad combinations, found before a process is started: `mellum2 doctor` prints them, `train`
refuses on them.

A rule is a small function from a `Situation` to the errors it finds (none is good). To add one::

    @rule(evidence="megatron/core/some_file.py:123 (0.19.2)")
    def new_rule(at: Situation) -> Found:
        \"\"\"One line that says what must hold.\"\"\"
        if at.run.layout.ep == 7:
            yield InputError("layout.ep=7", rule="seven is unlucky", fix="set layout.ep=8")
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from mellum2_megatron.checkpoint.folder import RUN_FILE, TRACKER_FILE, resume_folder
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import check_writable
from mellum2_megatron.config import Backend, Device, Run
from mellum2_megatron.planning.rank_weights import experts_apart

Found = Iterator[InputError]


@dataclass(frozen=True, kw_only=True, slots=True)
class Situation:
    """A run about to be started: on how many ranks, and on what."""

    run: Run
    world_size: int
    device: Device

    @property
    def backend(self) -> Backend:
        """The run's backend on this device."""
        return self.run.resolved_backend(self.device)

    @property
    def data_parallel(self) -> int:
        """Ranks that see different sequences."""
        return self.run.layout.data_parallel(self.world_size)

    @property
    def layout_fits(self) -> bool:
        """Whether the layout divides model, sequence and ranks; what follows from it has no meaning
        otherwise."""
        return not list(layout_fits.find(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A named check.

    Attributes:
        name: the function's name with dashes.
        statement: what must hold, one line.
        evidence: where that is known from.
        find: yields one error, not raised, for each way in which the rule is broken.
        machine: the rule looks at this machine's files and packages, not only at the run.
    """

    name: str
    statement: str
    evidence: str
    find: Callable[[Situation], Found]
    machine: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Violation:
    """A broken rule: its name and evidence, the offending values, the rule's words and the fix."""

    name: str
    value: str
    rule: str
    fix: str
    evidence: str

    def __str__(self) -> str:
        return f"{self.value}: {self.rule}. Fix: {self.fix}. [{self.name}: {self.evidence}]"


RULES: list[Rule] = []
"""All rules, in the order in which they are checked."""


def rule(*, evidence: str, machine: bool = False) -> Callable[[Callable[[Situation], Found]], Rule]:
    """Register a function as a rule; the first paragraph of its docstring is the statement."""

    def register(find: Callable[[Situation], Found]) -> Rule:
        name = find.__name__.replace("_", "-")
        statement = " ".join((find.__doc__ or "").partition("\n\n")[0].split())
        RULES.append(
            Rule(name=name, statement=statement, evidence=evidence, find=find, machine=machine)
        )
        return RULES[-1]

    return register


def check(run: Run, world_size: int, device: Device, *, machine: bool = True) -> list[Violation]:
    """Return every violation of every rule.

    Args:
        run: a resolved run.
        world_size: ranks to be started.
        device: what they compute on.
        machine: also check the files and packages of this machine; False where the run is for
            another one.
    """
    situation = Situation(run=run, world_size=world_size, device=device)
    return [
        Violation(
            name=each.name,
            value=found.value,
            rule=found.rule,
            fix=found.fix,
            evidence=each.evidence,
        )
        for each in RULES
        if machine or not each.machine
        for found in each.find(situation)
    ]


def enforce(
    run: Run,
    world_size: int,
    device: Device,
    *,
    machine: bool = True,
    without: Collection[str] = (),
) -> None:
    """Refuse a run that breaks a rule; arguments as for `check`, and names of rules that do not
    matter here.

    Raises:
        InputError: with all violations.
    """
    violations = [
        each for each in check(run, world_size, device, machine=machine) if each.name not in without
    ]
    if len(violations) == 1:
        raise InputError(violations[0].value, rule=violations[0].rule, fix=violations[0].fix)
    if violations:
        listed = "".join(
            f"\n  {number}. {violation}" for number, violation in enumerate(violations, 1)
        )
        raise InputError(
            f"run {run.name} on {world_size} {device} rank{'s' * (world_size != 1)}",
            rule=f"breaks {len(violations)} rules",
            fix=f"each of{listed}",
        )


@rule(evidence="megatron/training/arguments.py:429, 963, 1295, 1602 (0.19.2)")
def layout_fits(at: Situation) -> Found:
    """The layout divides the model, the sequence and the ranks."""
    yield from at.run.layout.problems(
        at.run.architecture, world_size=at.world_size, sequence_length=at.run.data.sequence_length
    )


@rule(evidence="megatron/training/arguments.py:1314 (0.19.2)")
def sequence_in_context(at: Situation) -> Found:
    """The sequence is no longer than the model's context."""
    length, context = at.run.data.sequence_length, at.run.architecture.max_position_embeddings
    if length > context:
        yield InputError(
            f"data.sequence_length={length}",
            rule=f"must not exceed architecture.max_position_embeddings ({context})",
            fix=f"set data.sequence_length={context}, or take an architecture with a longer context",
        )


@rule(
    evidence="megatron/core/num_microbatches_calculator.py:580 and training/arguments.py:694 (0.19.2)"
)
def batches_divide(at: Situation) -> Found:
    """Every batch is whole micro-batches on every data-parallel rank."""
    if not at.layout_fits:
        return
    micro, ranks = at.run.schedule.micro_batch_size, at.data_parallel
    sizes = {
        f"schedule.batch_schedule: {size} sequences": size
        for _, size in at.run.schedule.batch_schedule
    }
    if at.run.logging.eval_batch_size is not None:
        sizes[f"logging.eval_batch_size={at.run.logging.eval_batch_size}"] = (
            at.run.logging.eval_batch_size
        )
    for given, size in sizes.items():
        unit = micro * ranks
        if size % unit:
            below, above = size // unit * unit, (size // unit + 1) * unit
            yield InputError(
                given,
                rule=f"must be a multiple of schedule.micro_batch_size * data-parallel ranks = {micro} * {ranks}",
                fix=f"use {f'{below} or ' if below else ''}{above} sequences, or another schedule.micro_batch_size",
            )


@rule(evidence="megatron/core/pipeline_parallel/schedules.py:1145 (0.19.2)")
def interleaving_divides(at: Situation) -> Found:
    """With virtual stages, a step's micro-batches fill the pipeline evenly."""
    if not at.layout_fits:
        return
    layout, micro = at.run.layout, at.run.schedule.micro_batch_size * at.data_parallel
    for _, size in at.run.schedule.batch_schedule:
        if layout.vpp > 1 and size // micro % layout.pp:
            yield InputError(
                f"schedule.batch_schedule: {size} sequences, {size // micro} micro-batches a step",
                rule=f"with layout.vpp > 1 the micro-batches must be a multiple of layout.pp ({layout.pp})",
                fix=f"make the batch a multiple of {micro * layout.pp}, or set layout.vpp=1",
            )


@rule(evidence="megatron/core/transformer/transformer_config.py:1405-1430 (0.19.2)")
def bf16_layers_exist(at: Situation) -> Found:
    """The layers kept in BF16 lie in the first and the last pipeline stage."""
    if not at.layout_fits:
        return
    layers = at.run.architecture.num_hidden_layers // at.run.layout.pp
    for name in ("bf16_first_layers", "bf16_last_layers"):
        value = getattr(at.run.precision, name)
        if value > layers:
            yield InputError(
                f"precision.{name}={value}",
                rule=f"a pipeline stage has num_hidden_layers / layout.pp = {layers} layers",
                fix=f"use at most {layers}"
                + (", or precision.compute=bf16" if at.run.layout.pp == 1 else ""),
            )


@rule(
    evidence="mellum2_megatron/upstream/arguments.py: --pretrained-checkpoint beside --load takes weights without state"
)
def one_origin(at: Situation) -> Found:
    """A run starts from another one's weights or goes on from its whole state."""
    checkpoint = at.run.checkpoint
    if checkpoint.load is not None and checkpoint.continue_from is not None:
        yield InputError(
            f"checkpoint.load={checkpoint.load} with checkpoint.continue_from={checkpoint.continue_from}",
            rule="`load` takes weights only and starts at step 0, `continue_from` takes everything and goes on",
            fix="set one of them to null",
        )


@rule(
    evidence="megatron/core/optimizer/optimizer.py:1112, distributed/param_and_grad_buffer.py:500-520 (0.19.2): "
    "the layer-wise optimizer gathers FP8 data without its scale, which only the distributed optimizer reduces"
)
def muon_gathers_bf16(at: Situation) -> Found:
    """Muon's weights are gathered in BF16."""
    if at.run.optimizer.name == "muon" and at.run.precision.fp8_param_gather:
        yield InputError(
            "precision.fp8_param_gather=true with optimizer.name=muon",
            rule="Megatron accepts this and computes with wrong weights on every rank that does not own them",
            fix="set precision.fp8_param_gather=false (FP8 matrix multiplications stay on)",
        )


@rule(
    evidence="megatron/core/models/gpt/gpt_model.py:237 and 295 (0.19.2): modules are made, in FP8 if weights will be "
    "gathered so, before they hear of an exception for themselves"
)
def bf16_projection_gathers_bf16(at: Situation) -> Found:
    """An MTP projection that stays in BF16 is gathered in BF16."""
    if at.run.precision.bf16_mtp_projection and at.run.precision.fp8_param_gather:
        yield InputError(
            "precision.bf16_mtp_projection=true with precision.fp8_param_gather=true",
            rule="the projection's weight would be kept in FP8 all the same",
            fix="set precision.fp8_param_gather=false or precision.bf16_mtp_projection=false",
        )


@rule(
    evidence="megatron/core/transformer/transformer_config.py: FP8 needs Transformer Engine modules (0.19.2)"
)
def fp8_has_kernels(at: Situation) -> Found:
    """FP8 runs on Transformer Engine."""
    if at.run.precision.compute == "fp8" and at.backend != "te":
        yield InputError(
            f"precision.compute=fp8 with backend={at.backend} on {at.device}",
            rule="FP8 matrix multiplications exist in Transformer Engine on a GPU only",
            fix="set precision.compute=bf16" + (", or backend=te" if at.device == "cuda" else ""),
        )


@rule(evidence="transformer_engine/pytorch/utils.py, assert_dim_for_fp8_exec (2.20.2)")
def fp8_dimensions(at: Situation) -> Found:
    """FP8 matrices have dimensions that its kernels take."""
    if at.run.precision.compute != "fp8":
        return
    model, layout = at.run.architecture, at.run.layout
    queries = model.num_attention_heads * model.head_dim
    sizes = {
        "architecture.hidden_size": model.hidden_size,
        "architecture.num_attention_heads * head_dim / layout.tp": queries // layout.tp,
        "architecture.moe_intermediate_size / layout.etp": model.moe_intermediate_size
        // layout.etp,
    }
    for what, size in sizes.items():
        if size % 16:
            yield InputError(
                f"{what} = {size}",
                rule="FP8 kernels need multiples of 16",
                fix=f"use {max(16, round(size / 16) * 16)}, or precision.compute=bf16",
            )


@rule(
    evidence="Transformer Engine has no CPU kernels; the flex dispatcher needs DeepEP or HybridEP on GPUs"
)
def cpu_has_it(at: Situation) -> Found:
    """A CPU run asks only for what exists on a CPU."""
    if at.device != "cpu":
        return
    if at.run.backend == "te":
        yield InputError(
            "backend=te on cpu", rule="Transformer Engine runs on GPUs only", fix="set backend=auto"
        )
    if at.run.layout.dispatcher == "flex":
        fix = "set layout.dispatcher=alltoall"
        yield InputError("layout.dispatcher=flex on cpu", rule="its kernels are for GPUs", fix=fix)


@rule(
    evidence="megatron/core/dist_checkpointing/strategies/filesystem_async.py (0.19.2): CUDA streams"
)
def async_save_on_gpu(at: Situation) -> Found:
    """Checkpoints are written in the background on GPUs only."""
    if at.device == "cpu" and at.run.checkpoint.async_save:
        yield InputError(
            "checkpoint.async_save=true on cpu",
            rule="it copies a GPU's memory while training goes on; a CPU has nothing to copy from",
            fix="set checkpoint.async_save=false",
        )


@rule(evidence="this machine", machine=True)
def packages_present(at: Situation) -> Found:
    """The packages that the run asks for are installed."""
    if (
        at.backend == "te"
        and at.device == "cuda"
        and importlib.util.find_spec("transformer_engine") is None
    ):
        yield InputError(
            f"backend={at.run.backend}, te on a GPU",
            rule="Transformer Engine is not installed here",
            fix="install the extra `te`, or set backend=torch (much slower, for checks)",
        )
    if at.run.logging.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        yield InputError(
            f"logging.wandb_project={at.run.logging.wandb_project}",
            rule="the package wandb is not installed here",
            fix="install the extra `wandb`, or set logging.wandb_project=null",
        )


@rule(evidence="this machine", machine=True)
def data_present(at: Situation) -> Found:
    """The corpus, its tokenizer and a place for its index exist; the tokens are the model's."""
    from mellum2_megatron.data.feed.datasets import (
        check_data,
    )  # numpy: not needed to plan a run elsewhere

    cache = Path(at.run.data.cache or Path(at.run.data.path) / "cache")
    try:
        check_data(at.run)
        if not cache.is_dir():  # one that is there may be complete, and then read-only
            check_writable("data.cache", cache, folder=True)
    except InputError as error:
        yield error


def _resumed_folder(at: Situation) -> Path | None:
    """Return the folder whose state the run goes on from; None if it starts anew, or nothing tells
    what made it."""
    checkpoint = at.run.checkpoint
    if checkpoint.output is None:
        return None
    root = Path(resume_folder(checkpoint.output, checkpoint.continue_from))
    return root if (root / TRACKER_FILE).is_file() and (root / RUN_FILE).is_file() else None


def _run_of(root: Path) -> Run:
    from mellum2_megatron.checkpoint import (
        read_run,
    )  # reads tokenizers: not needed to plan a run elsewhere

    return read_run(root / RUN_FILE)


@rule(
    evidence="megatron/core/tensor_parallel/layers.py:961 and optimizer/__init__.py (0.19.2): with ep > 1 or etp != tp "
    "experts have an Adam of their own; Muon: see resharding.py of this project",
    machine=True,
)
def resume_fits(at: Situation) -> Found:
    """A resumed or continued run can read the optimizer state that it goes on from."""
    root = _resumed_folder(at)
    if root is None:
        return
    try:
        before = _run_of(root)
    except InputError as error:
        yield error
        return
    there, here = before.layout, at.run.layout
    if at.run.optimizer.name == "adam" and experts_apart(there) != experts_apart(here):
        shared = f"layout.ep=1 and layout.etp={here.tp} (= layout.tp)"
        apart = f"layout.ep=2 or more, or a layout.etp other than {here.tp} (layout.tp)"
        yield InputError(
            f"layout.tp={here.tp}, layout.ep={here.ep}, layout.etp={here.etp} with a checkpoint of "
            f"layout.tp={there.tp}, layout.ep={there.ep}, layout.etp={there.etp} in {root}",
            rule="Adam's state does not move between experts with data-parallel ranks of their own (layout.ep > 1, or "
            "layout.etp other than layout.tp) and experts that share the other weights'",
            fix=f"set {apart if experts_apart(there) else shared}, or start another run with checkpoint.load={root} "
            "and another --output",
        )
    if before.optimizer.name != at.run.optimizer.name:
        yield InputError(
            f"optimizer.name={at.run.optimizer.name} with a checkpoint of {before.optimizer.name} in {root}",
            rule="one optimizer cannot read the other's state",
            fix=f"set optimizer.name={before.optimizer.name}, or start another run with checkpoint.load={root} and "
            "another --output",
        )


FROM_CHECKPOINT = {
    **dict.fromkeys(
        ("lr", "min_lr"), "Megatron finds its parameter groups by their rates, and finds none"
    ),
    **dict.fromkeys(
        ("muon_router", "muon_mtp_projection"), "the other optimizer has no state for those weights"
    ),
    **dict.fromkeys(
        ("muon_momentum", "adam_beta1", "adam_beta2", "adam_eps"),
        "Megatron goes on with the checkpoint's value without a word",
    ),
}
"""Fields of the optimizer that cannot change when its state is loaded, and what happens if they
do."""


@rule(
    evidence="megatron/core/optimizer/optimizer.py:139-151 and 600-651 (0.19.2): parameter groups come from the "
    "checkpoint; tests/checkpoint/test_continuation.py",
    machine=True,
)
def resume_keeps_optimizer(at: Situation) -> Found:
    """A resumed or continued run keeps the settings that its checkpoint's optimizer has."""
    root = _resumed_folder(at)
    if root is None:
        return
    try:
        before = _run_of(root).optimizer
    except InputError:
        return  # told by resume_fits
    if before.name != at.run.optimizer.name:
        return  # likewise
    for name, reason in FROM_CHECKPOINT.items():
        there, here = getattr(before, name), getattr(at.run.optimizer, name)
        if there != here and (before.name == "muon" or not name.startswith("muon_")):
            yield InputError(
                f"optimizer.{name}={here} with a checkpoint of optimizer.{name}={there} in {root}",
                rule=f"its optimizer state goes with its settings: {reason}",
                fix=f"set optimizer.{name}={there}, or start another run with checkpoint.load={root} and "
                "another --output",
            )
