"""Rules about the settings of a run: values that do not go together, or that Megatron refuses."""

from __future__ import annotations

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.planning.rule import PlannedRun, Problems, rule


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
    evidence="megatron/core/distributed/param_and_grad_buffer.py:842 (0.19.2): a gradient that is "
    "accumulated elsewhere is copied back before owners have collected it"
)
def even_shares_hold_the_gradients(planned: PlannedRun) -> Problems:
    """Gradients of matrices in even shares are accumulated in their buffer."""
    run = planned.run
    if run.optimizer.muon_dense_shards != "even" or run.optimizer.name != "muon":
        return
    flag = "--ddp-param-name-patterns-for-fp32-local-accumulation"
    for word in run.execution.extra_arguments:
        # Megatron's parser takes the beginning of a flag for the flag.
        if word.startswith("--ddp-par") and flag.startswith(word.partition("=")[0]):
            yield InputError(
                f"execution.extra_arguments: {word} with optimizer.muon_dense_shards=even",
                rule="owners collect gradients in the buffer, not beside it",
                fix="leave the word out, or set optimizer.muon_dense_shards=whole",
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


@rule(
    evidence="transformer_engine/pytorch/utils.py:704, assert_dim_for_fp8_exec (2.20.2), sees a "
    "rank's own tokens; those of experts are padded (megatron/core/transformer/moe/experts.py:642, "
    "1307, 0.19.2)"
)
def fp8_dimensions(planned: PlannedRun) -> Problems:
    """FP8 matrices and numbers of tokens are those that its kernels take."""
    if planned.run.precision.compute != "fp8":
        return
    model, layout = planned.run.architecture, planned.run.layout
    # Dimensions of the matrices on one rank.
    heads = model.num_attention_heads * model.head_dim // layout.tp
    attention = {"num_attention_heads * head_dim / layout.tp": heads}
    if model.latent_attention is not None:
        attention = model.attention_dimensions
    sizes = {
        "architecture.hidden_size": model.hidden_size,
        **{f"architecture.{name}": size for name, size in attention.items()},
        "architecture.moe_intermediate_size / layout.etp": model.moe_intermediate_size
        // layout.etp,
        **{
            f"architecture.{field} / layout.tp": width // layout.tp
            for field, width in model.variant_widths.items()
        },
    }
    for dimension, size in sizes.items():
        if size % 16:
            multiple = max(16, round(size / 16) * 16)
            yield InputError(
                f"{dimension} = {size}",
                rule="FP8 kernels need multiples of 16",
                fix=f"use {multiple}, or precision.compute=bf16",
            )
    length, micro = planned.run.data.sequence_length, planned.run.schedule.micro_batch_size
    tokens = length * micro // (layout.cp * layout.tp)
    if tokens % 8:
        unit = 8 * layout.cp * layout.tp
        yield InputError(
            f"data.sequence_length={length} with schedule.micro_batch_size={micro}",
            rule=f"a rank has {tokens} tokens of a micro-batch, and FP8 products take multiples "
            "of 8",
            fix=f"use data.sequence_length={max(unit, round(length / unit) * unit)}, "
            "or precision.compute=bf16",
        )


@rule(
    evidence="transformer_engine/pytorch/_extra_state.py, should_load_extra_state_pickle (2.20.2): "
    "scales of the delayed recipe are saved as a pickle, which loading refuses"
)
def fp8_scales_can_be_resumed(planned: PlannedRun) -> Problems:
    """A run in FP8 can resume from its own checkpoints."""
    precision = planned.run.precision
    if precision.compute == "fp8" and precision.fp8_recipe == "delayed":
        yield InputError(
            "precision.fp8_recipe=delayed",
            rule="it trains and saves, but Transformer Engine refuses to load its scales, so no "
            "checkpoint could be resumed",
            fix="set precision.fp8_recipe=tensorwise",
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


@rule(
    evidence="megatron/training/checkpointing.py:499 (0.19.2): Megatron reads the flag with "
    "--dist-ckpt-optim-fully-reshardable only"
)
def gathering_has_an_effect(planned: PlannedRun) -> Problems:
    """One rank collects optimizer state only where any rank does."""
    checkpoint = planned.run.checkpoint
    if checkpoint.gather_on_one_rank and not checkpoint.any_layout:
        yield InputError(
            "checkpoint.gather_on_one_rank=true with checkpoint.any_layout=false",
            rule="every rank then stores its own part of the optimizer state, and none collects it",
            fix="set checkpoint.gather_on_one_rank=false, or checkpoint.any_layout=true",
        )
