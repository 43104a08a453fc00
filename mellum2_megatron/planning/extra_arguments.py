"""Words for Megatron's command line that no key covers (`execution.extra_arguments`)."""

from __future__ import annotations

from collections.abc import Iterator

from mellum2_megatron.architecture.megatron_fields import LATENT_FIELDS, MEGATRON_FIELDS
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Run

COVERED = frozenset(
    """
    accumulate-allreduce-grads-in-fp32 adam-beta1 adam-beta2 adam-eps async-save
    async-strategy bf16 calculate-per-token-loss ckpt-assume-constant-structure ckpt-format
    ckpt-fully-parallel-load ckpt-fully-parallel-load-process-group clip-grad
    context-parallel-size
    cp-comm-type data-cache-path delay-wgrad-compute deterministic-mode
    dist-ckpt-optim-fully-reshardable distrib-optim-fully-reshardable-mem-efficient
    distributed-backend distributed-timeout-minutes
    distributed-timeout-seconds-after-init eval-global-batch-size eval-interval
    eval-iters expert-model-parallel-size expert-tensor-parallel-size
    fine-grained-activation-offloading first-last-layers-bf16 fp8-format fp8-param-gather
    fp8-recipe fused-residual-rmsnorm global-batch-size grad-reduce-in-bf16 load
    log-interval log-timers-to-tensorboard lr lr-decay-samples lr-decay-style
    lr-warmup-samples lr-wsd-decay-samples lr-wsd-decay-style manual-gc manual-gc-interval
    max-position-embeddings micro-batch-size min-lr moe-aux-loss-coeff
    moe-expert-capacity-factor moe-flex-dispatcher-backend moe-flex-dispatcher-num-sms
    moe-grouped-gemm
    moe-permute-fusion moe-permute-fusion-into-hybridep moe-router-dtype moe-router-fusion
    moe-router-load-balancing-type
    moe-router-padding-for-quantization moe-token-dispatcher-type moe-z-loss-coeff
    mtp-detach-heads
    mtp-loss-scaling-factor muon-coefficient-type muon-extra-scale-factor muon-momentum
    muon-nesterov muon-no-split-qkv muon-num-ns-steps muon-scalar-optimizer muon-scale-mode
    muon-tp-mode no-bias-dropout-fusion no-bias-swiglu-fusion
    no-create-attention-mask-in-dataloader no-gradient-accumulation-fusion
    no-masked-softmax-fusion no-one-logger no-persist-layer-norm no-rope-fusion
    null-tokenizer-eod-id num-layers-at-end-in-bf16 num-layers-at-start-in-bf16
    num-virtual-stages-per-pipeline-rank num-workers offload-modules optimizer
    overlap-grad-reduce overlap-moe-expert-parallel-comm overlap-param-gather
    override-opt-param-scheduler padded-vocab-size pipeline-model-parallel-size
    pretrained-checkpoint recompute-granularity recompute-modules rerun-mode save
    save-interval seed seq-length sequence-parallel step-batch-size-schedule
    tensor-model-parallel-size tokenizer-type train-data-path train-samples transformer-impl
    use-cpu-initialization use-distributed-optimizer use-persistent-ckpt-worker
    valid-data-path vocab-size weight-decay
    """.split()
)
"""Flags that ``upstream/arguments.py`` makes of a run, without dashes; a test compares them."""

CONTRADICTING = frozenset(
    """
    auto-detect-ckpt-format batch-size checkpoint-activations ckpt-fully-parallel-load-exchange-algo
    ckpt-step data-args-path data-path dataloader-type decoder-seq-length
    decrease-batch-size-if-needed dist-ckpt-format encoder-seq-length end-weight-decay eod-mask-loss
    exit-duration-in-mins exit-interval exit-signal exit-signal-handler fake-process-group fim-data
    finetune fp16 fp4-format fp4-param-gather freeze-all-layers full-validation help
    iterations-to-skip load-main-params-from-ckpt lr-decay-iters lr-warmup-fraction lr-warmup-iters
    lr-wsd-decay-iters mock-data model-parallel-size moe-deepep-num-sms moe-enable-deepep
    moe-hybridep-num-sms moe-layer-recompute moe-router-force-load-balancing
    moe-router-padding-for-fp8 multiple-validation-sets no-load-optim no-load-rng no-save-optim
    no-save-rng no-use-layer-wise-param-layout non-persistent-save-interval
    num-layers-per-virtual-pipeline-stage overlap-param-gather-with-optimizer-step
    override-opt_param-scheduler per-split-data-args-path perform-rl-step persistent-save-interval
    pipeline-model-parallel-layout rampup-batch-size recompute-activations recompute-method
    recompute-num-layers reset-attention-mask reset-position-ids save-retain-interval sft skip-train
    spec split start-weight-decay tensorboard-dir test-data-path test-mode tokenizer-model
    train-iters use-checkpoint-args use-checkpoint-opt-param-scheduler
    use-checkpoint-opt_param-scheduler use-dist-ckpt use-megatron-fsdp use-mup use-torch-fsdp2
    wandb-entity wandb-exp-name wandb-project warmup weight-decay-incr-style yaml-cfg
    """.split()
)
"""Flags that would set by another name what keys decide, or that this project cannot work with."""

OTHER_MODELS = frozenset(
    """
    account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split
    activation-func-clamp-value add-qkv-bias apply-layernorm-1p apply-query-key-layer-scaling
    apply-residual-connection-post-layernorm attention-output-gate
    decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers
    experimental-attention-variant glu-linear-offset heterogeneous-layers-config-encoded-json
    heterogeneous-layers-config-path hybrid-layer-pattern hybrid-override-pattern is-hybrid-model
    moe-latent-size moe-router-enable-expert-bias moe-router-group-topk moe-router-num-groups
    moe-router-score-function moe-router-topk-scaling-factor moe-shared-expert-gate
    moe-use-upcycling mtp-use-repeated-layer no-position-embedding no-rope-freq openai-gelu
    qk-l2-norm quick-geglu rope-scaling-factor rotary-interleaved rotary-percent
    rotary-scaling-factor rotary-seq-len-interpolation-factor softmax-type squared-relu
    use-rope-scaling use-rotary-position-embeddings
    """.split()
)
"""Flags that make another model, or divide it in another way, than the architecture's fields say:
no checkpoint of it could be exported."""

_MODEL = frozenset(
    """
    attention-dropout group-query-attention hidden-dropout position-embedding-type rotary-base
    untie-embeddings-and-output-weights window-attn-skip-freq window-size
    """.split()
) | {field.flag.removeprefix("--") for field in MEGATRON_FIELDS + LATENT_FIELDS}
"""Flags of the architecture."""


def extra_argument_problems(run: Run) -> Iterator[InputError]:
    """Find words of `execution.extra_arguments` that a key covers."""
    taken = COVERED | CONTRADICTING | OTHER_MODELS | _MODEL
    if run.checkpoint.gather_on_one_rank:
        # The state is collected over these groups. Megatron's own assertion looks at Adam runs only
        # (megatron/training/arguments.py:1690, 0.19.2).
        taken |= {"disable-gloo-process-groups"}
    if run.checkpoint.reuse_plans:
        # Only the parallel save is compared with the one before (upstream/save_plans.py).
        taken |= {"no-ckpt-fully-parallel-save"}
    for word in run.execution.extra_arguments:
        if word.startswith("-h"):
            name = "help"  # Megatron's only flag with one dash
        elif word.startswith("--"):
            name = word.removeprefix("--").partition("=")[0]
        else:
            continue  # a value of the flag before it
        positive = name.removeprefix("no-")
        # Megatron's parser takes the beginning of a flag for the flag.
        found = sorted(flag for flag in taken if flag.startswith(name) or flag == positive)
        if found:
            yield InputError(
                f"execution.extra_arguments: {word}",
                rule=f"--{found[0]} is decided by keys of the run, or cannot be used with them",
                fix="set the key (`mellum2 keys` lists all), and leave the word out",
            )
