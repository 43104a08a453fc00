"""Run -> Megatron-LM command line: the one place where our terms become Megatron's arguments.

Settings without an argument are set on the model in ``model/provider.py``, or belong to our own
hooks (``training/hooks.py``).

All flags are those of ``megatron/training/arguments.py`` 0.19.2. The model's own come from
``architecture/megatron_fields.py``. YaRN has no flag: it is applied layer by layer in
``model/attention.py``, because Megatron refuses ``yarn`` beside MTP (arguments.py:1863-1868).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from mellum2_megatron.architecture import architecture_arguments
from mellum2_megatron.checkpoint import StartingPoint
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import DETERMINISTIC_VARIABLES, Backend, Device, Run
from mellum2_megatron.data.feed.entries import prefixes

_TORCH_BACKEND = (
    *("--transformer-impl", "local"),
    # Kernels of Transformer Engine and apex, on by default (arguments.py and
    # transformer_config.py:2165-2187).
    "--no-rope-fusion",
    "--no-masked-softmax-fusion",
    "--no-gradient-accumulation-fusion",
    "--no-persist-layer-norm",
)
"""Flags of the backend of plain torch modules."""

_CPU = (
    *("--distributed-backend", "gloo"),
    "--use-cpu-initialization",
    # Both fusions are torch.compile'd functions written for a GPU.
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
)
"""Flags of every run on a CPU."""


def megatron_arguments(
    run: Run,
    *,
    world_size: int,
    device: Device,
    backend: Backend | None = None,
    start: StartingPoint | None = None,
) -> list[str]:
    """Return the arguments with which ``megatron.training.pretrain`` trains ``run``.

    Args:
        run: a resolved run, checked by ``planning.rules.enforce``.
        world_size: number of ranks that will be started.
        device: "cpu" or "cuda".
        backend: library of the model's modules; default the run's own for the device.
        start: starting point of the run, default `StartingPoint.of(run)`.

    Raises:
        InputError: the layout does not fit, or the backend does not exist on the device.
    """
    backend = backend or run.resolved_backend(device)
    if device == "cpu" and backend == "te":
        raise InputError(
            "backend=te on a CPU",
            rule="Transformer Engine runs on GPUs only",
            fix="set backend=torch",
        )
    run.layout.validate(
        run.architecture, world_size=world_size, sequence_length=run.data.sequence_length
    )
    return [
        *architecture_arguments(run.architecture),
        *("--max-position-embeddings", str(run.architecture.max_position_embeddings)),
        *_layout(run),
        *_losses(run),
        *(_experts(run, backend) if run.architecture.has_experts else ()),
        *_optimizer(run),
        *_schedule(run),
        *_precision(run),
        *_execution(run),
        *_data(run),
        *_logging(run),
        *_checkpoint(run, start or StartingPoint.of(run), world_size),
        *_timeouts(run),
        # A non-finite value ends the run at once. The other modes repeat the step to distinguish
        # a broken GPU from a diverging run, save, and wait to be started on another node
        # (core/rerun_state_machine.py).
        *("--rerun-mode", "disabled"),
        *(("--transformer-impl", "transformer_engine") if backend == "te" else _TORCH_BACKEND),
        *(_CPU if device == "cpu" else ()),
        *run.execution.extra_arguments,
    ]


def environment(run: Run) -> dict[str, str]:
    """Return the environment variables that Megatron asserts for this run."""
    variables = {}
    if (run.layout.tp > 1 or run.layout.cp > 1) and not run.layout.overlap_expert_comm:
        # One hardware queue up to Hopper, so that communication is issued in program order
        # (arguments.py:1408-1438).
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if run.execution.offload:
        # Else Transformer Engine would offload weights too (arguments.py:1857).
        variables["NVTE_CPU_OFFLOAD_V1"] = "1"
    return variables


def gpu_environment(run: Run) -> dict[str, str]:
    """Return the environment variables of a fast run on GPUs; those that are set already win.

    They are those of the fastest published runs of such models on H100: Megatron-Bridge's
    Moonlight-16B-A3B and Qwen3-30B-A3B.
    """
    variables = {
        # Segments that grow: steps whose experts get other numbers of tokens leave no holes.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        # Registered buffers of CUDA graphs do not go with such segments.
        "NCCL_GRAPH_REGISTER": "0",
    }
    if "CUDA_DEVICE_MAX_CONNECTIONS" not in environment(run):
        # As many hardware queues as there are: with one, an exchange of tokens would wait for the
        # computation that it should overlap.
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
    if run.layout.overlap_expert_comm:
        # Norms leave multiprocessors to the exchange beside them: as many as in all of
        # Megatron-Bridge's recipes for H100 (0.6.2).
        variables |= {"NVTE_FWD_LAYERNORM_SM_MARGIN": "20", "NVTE_BWD_LAYERNORM_SM_MARGIN": "20"}
    if run.execution.deterministic:
        variables |= {name: values[0] for name, values in DETERMINISTIC_VARIABLES.items()}
    return variables


def kept_variables(run: Run, variables: Mapping[str, str]) -> list[str]:
    """Return a line for each variable whose value here wins over that of `gpu_environment`."""
    return [
        f"environment: {name}={variables[name]} is set and stays; these settings want {ours}"
        for name, ours in gpu_environment(run).items()
        if variables.get(name, ours) != ours
    ]


def _timeouts(run: Run) -> list[str]:
    """Return the limits of collectives: later than our own hang watch, which names the slow rank.

    The first one holds from the start to the end of the first step, the second one from there
    (training/training.py:3745).
    """
    setup = math.ceil(max(run.setup_timeout_minutes, run.timeout_minutes)) + 1
    steps = math.ceil(run.timeout_minutes * 60) + 60
    return [
        *("--distributed-timeout-minutes", str(setup)),
        *("--distributed-timeout-seconds-after-init", str(steps)),
    ]


def _layout(run: Run) -> list[str]:
    layout = run.layout
    words = [
        *("--tensor-model-parallel-size", str(layout.tp)),
        *("--pipeline-model-parallel-size", str(layout.pp)),
        *("--context-parallel-size", str(layout.cp)),
        *("--expert-model-parallel-size", str(layout.ep)),
        *("--expert-tensor-parallel-size", str(layout.etp)),
        *("--moe-token-dispatcher-type", layout.dispatcher),
    ]
    if layout.sp:
        words.append("--sequence-parallel")
    if layout.dispatcher == "flex":
        words += ["--moe-flex-dispatcher-backend", layout.dispatcher_backend]
        if layout.dispatcher_sms is not None:
            words += ["--moe-flex-dispatcher-num-sms", str(layout.dispatcher_sms)]
    if layout.overlap_expert_comm:
        words.append("--overlap-moe-expert-parallel-comm")
    if layout.delay_wgrad:
        words.append("--delay-wgrad-compute")
    if layout.vpp > 1:
        words += ["--num-virtual-stages-per-pipeline-rank", str(layout.vpp)]
    if layout.cp > 1:
        words += ["--cp-comm-type", *layout.cp_comm_types(run.architecture)]
    return words


def _losses(run: Run) -> list[str]:
    words = []
    if run.architecture.num_mtp_layers:
        words += ["--mtp-loss-scaling-factor", str(run.loss.mtp_factor)]
    if run.loss.per_token:
        words.append("--calculate-per-token-loss")
    if run.data.feed == "rollouts" and run.rl.mtp_detach and run.architecture.num_mtp_layers:
        words.append("--mtp-detach-heads")
    return words


def _experts(run: Run, backend: Backend) -> list[str]:
    words = [
        *("--moe-router-load-balancing-type", run.loss.aux_loss_type),
        *("--moe-aux-loss-coeff", str(run.loss.aux_loss_coef)),
        *("--moe-router-dtype", "fp32"),
    ]
    if run.loss.capacity_factor is not None:
        words += ["--moe-expert-capacity-factor", str(run.loss.capacity_factor)]
    if run.loss.z_loss_coef:
        words += ["--moe-z-loss-coeff", str(run.loss.z_loss_coef)]
    if backend == "te":
        # All three are Transformer Engine kernels; without it router fusion passes validation and
        # fails at run time (megatron/core/transformer/moe/moe_utils.py:127-129).
        words += ["--moe-grouped-gemm", "--moe-permute-fusion"]
        # The fused choice of experts knows no bias on softmax scores.
        if not run.loss.bias_update_rate:
            words.append("--moe-router-fusion")
        if run.layout.dispatcher == "flex" and run.layout.dispatcher_backend == "hybridep":
            # HybridEP's kernel writes tokens in the order of their experts by itself.
            words.append("--moe-permute-fusion-into-hybridep")
    return words


def _optimizer(run: Run) -> list[str]:
    optimizer = run.optimizer
    words = [
        # With Muon this turns into the layer-wise optimizer, which hands whole matrices to
        # data-parallel ranks (arguments.py:1670-1686); with Adam it is the usual sharded one.
        *("--optimizer", optimizer.name, "--use-distributed-optimizer"),
        *("--lr", str(optimizer.lr), "--min-lr", str(optimizer.min_lr)),
        *("--weight-decay", str(optimizer.weight_decay), "--clip-grad", str(optimizer.clip_grad)),
        *("--adam-beta1", str(optimizer.adam_beta1), "--adam-beta2", str(optimizer.adam_beta2)),
        *("--adam-eps", str(optimizer.adam_eps)),
    ]
    if optimizer.name == "muon":
        words += [
            *("--muon-momentum", str(optimizer.muon_momentum)),
            *("--muon-num-ns-steps", str(optimizer.muon_ns_steps)),
            *("--muon-scale-mode", optimizer.muon_scale_mode),
            *("--muon-extra-scale-factor", str(optimizer.muon_extra_scale)),
            *("--muon-tp-mode", optimizer.muon_tp_mode),
            *("--muon-coefficient-type", "quintic"),
            *("--muon-scalar-optimizer", "adam"),
        ]
        if optimizer.muon_nesterov:
            words.append("--muon-nesterov")
        if not optimizer.muon_split_qkv:
            words.append("--muon-no-split-qkv")
    if optimizer.overlap_grad_reduce:
        words.append("--overlap-grad-reduce")
    if optimizer.overlap_param_gather:
        words.append("--overlap-param-gather")
    return words


def _schedule(run: Run) -> list[str]:
    schedule = run.schedule
    words = [
        *("--micro-batch-size", str(schedule.micro_batch_size)),
        *("--train-samples", str(schedule.train_samples)),
        *("--lr-warmup-samples", str(schedule.warmup_samples)),
        *("--lr-decay-samples", str(schedule.lr_horizon)),
        # The run, not the checkpoint, states the schedule; peak and minimum rate come with the
        # checkpoint's parameter groups (`checkpoint/resume_keys.py`). Phases extend
        # `train_samples`, which Megatron stores as the length of the weight-decay schedule and
        # otherwise asserts to be unchanged (megatron/core/optimizer_param_scheduler.py:333-341).
        "--override-opt-param-scheduler",
    ]
    if schedule.style == "whd":
        words += ["--lr-decay-style", "WSD", "--lr-wsd-decay-style", "linear"]
        words += ["--lr-wsd-decay-samples", str(schedule.decay_samples)]
    else:
        words += ["--lr-decay-style", "cosine"]
    if len(schedule.batch_schedule) == 1:
        words += ["--global-batch-size", str(schedule.final_batch_size)]
    else:
        # --rampup-batch-size is accepted and ignored
        # (megatron/core/num_microbatches_calculator.py:79-110). Thresholds here are tokens, since
        # Megatron hands the calculator its sequence length (global_vars.py:127-136).
        tokens = run.data.sequence_length
        steps = " ".join(f"{start * tokens}:{size}" for start, size in schedule.batch_schedule)
        words += ["--step-batch-size-schedule", steps]
    return words


def _precision(run: Run) -> list[str]:
    precision = run.precision
    words = ["--bf16"]
    if precision.grad_reduce_in_fp32:
        words.append("--accumulate-allreduce-grads-in-fp32")
    else:
        words.append("--grad-reduce-in-bf16")
    if precision.compute == "fp8":
        words += ["--fp8-format", precision.fp8_format, "--fp8-recipe", precision.fp8_recipe]
        if precision.fp8_param_gather:
            words.append("--fp8-param-gather")
        if precision.bf16_first_layers or precision.bf16_last_layers:
            words.append("--first-last-layers-bf16")
            words += ["--num-layers-at-start-in-bf16", str(precision.bf16_first_layers)]
            words += ["--num-layers-at-end-in-bf16", str(precision.bf16_last_layers)]
    return words


def _execution(run: Run) -> list[str]:
    execution = run.execution
    words = []
    if execution.recompute:
        words += ["--recompute-granularity", "selective"]
        words += ["--recompute-modules", *execution.recompute]
    if execution.offload:
        words += ["--fine-grained-activation-offloading"]
        words += ["--offload-modules", *execution.offload]
    if execution.gc_interval is not None:
        words += ["--manual-gc", "--manual-gc-interval", str(execution.gc_interval)]
    if execution.fused_residual_norm:
        words.append("--fused-residual-rmsnorm")
    if execution.pad_expert_tokens:
        words.append("--moe-router-padding-for-quantization")
    if execution.deterministic:
        words.append("--deterministic-mode")
    return words


def _data(run: Run) -> list[str]:
    """Return the data flags. Tokens are ids already, so Megatron gets a tokenizer's size only."""
    vocabulary = str(run.architecture.vocab_size)
    eos = run.architecture.eos_token_id
    eod = eos[0] if isinstance(eos, tuple) else eos
    words = [
        *("--seq-length", str(run.data.sequence_length)),
        *("--tokenizer-type", "NullTokenizer"),
        # Both, which leaves Megatron nothing to pad (core/tokenizers/utils/build_tokenizer.py:140).
        *("--vocab-size", vocabulary, "--padded-vocab-size", vocabulary),
        *("--train-data-path", *_blend(prefixes(run.data, "train"))),
        *("--valid-data-path", *_blend(prefixes(run.data, "valid"))),
        *("--num-workers", str(run.data.workers)),
        # Both backends mask by themselves; a [b, 1, s, s] mask would only cost memory.
        "--no-create-attention-mask-in-dataloader",
        *("--seed", str(run.seed)),
    ]
    if eod is not None:
        words += ["--null-tokenizer-eod-id", str(eod)]
    if run.data.cache is not None:
        words += ["--data-cache-path", run.data.cache]
    return words


def _blend(blend: tuple[tuple[float, str], ...]) -> list[str]:
    if len(blend) == 1:
        return [blend[0][1]]
    return [word for weight, prefix in blend for word in (str(weight), prefix)]


def _logging(run: Run) -> list[str]:
    """Return the logging flags. Megatron's own TensorBoard and W&B writers stay off: ours log."""
    return [
        *("--log-interval", str(run.logging.log_interval)),
        *("--eval-interval", str(run.logging.eval_interval)),
        *("--eval-iters", str(run.logging.eval_iterations)),
        # Without it, a batch ramp leaves micro_batch_size * dp here (arguments.py:684-690).
        *("--eval-global-batch-size", str(run.eval_batch_size)),
        "--no-one-logger",
        # Without it the time of a step is printed only, and our log takes it from the writer.
        "--log-timers-to-tensorboard",
    ]


def _checkpoint(run: Run, start: StartingPoint, world_size: int) -> list[str]:
    checkpoint = run.checkpoint
    words = ["--ckpt-format", "torch_dist"]
    if checkpoint.output is not None:
        # Without a checkpoint in --load Megatron starts anew, or with --pretrained-checkpoint.
        source = start.folder if start.kind == "continue" else checkpoint.output
        words += ["--save", checkpoint.output, "--load", str(source)]
        words += ["--save-interval", str(checkpoint.save_interval)]
    if checkpoint.any_layout:
        words.append("--dist-ckpt-optim-fully-reshardable")
    if checkpoint.gather_on_one_rank:
        words.append("--distrib-optim-fully-reshardable-mem-efficient")
    if checkpoint.parallel_load:
        # All ranks of the group receive what two of them ask for. Over the data-parallel group,
        # Megatron's default, that is every expert; but not if each expert is on one rank only.
        layout = run.layout
        alone = layout.ep == 1 or layout.expert_data_parallel(world_size) == 1
        group = "dp" if alone else "ep_dp"
        words += ["--ckpt-fully-parallel-load", "--ckpt-fully-parallel-load-process-group", group]
    if checkpoint.reuse_plans:
        words.append("--ckpt-assume-constant-structure")
    if checkpoint.async_save:
        # Without its own process Megatron switches it off after a warning (arguments.py:1741-1746);
        # the other strategy is a package of its own, nvidia-resiliency-ext.
        words += ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"]
    if checkpoint.load is not None and start.kind != "resume":
        # Read as weights without optimizer state or step count, because --load has no checkpoint
        # yet (megatron/training/checkpointing.py:2095-2106).
        words += ["--pretrained-checkpoint", checkpoint.load]
    return words
