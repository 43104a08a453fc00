"""A resumed run compared with the run that made its checkpoint: one class for each key.

- ``fixed``: a change is refused. The checkpoint's state, or the count of samples done, would mean
  something else.
- ``recorded``: a change is allowed. It is printed, and kept in ``metrics.jsonl``,
  ``provenance.jsonl`` and ``run_history/``.
- ``free``: no trained number depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

from mellum2_megatron.common.errors import shown
from mellum2_megatron.common.values import to_plain
from mellum2_megatron.config import Run, keys

Class = Literal["fixed", "recorded", "free"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Treatment of a changed key.

    Attributes:
        resume: class where a run resumes its own folder.
        phase: class where a run continues another one (`checkpoint.continue_from`).
        reason: effect of a change if it were taken in silence.
    """

    resume: Class
    phase: Class
    reason: str


def _rule(resume: Class, reason: str, phase: Class | None = None) -> Rule:
    return Rule(resume=resume, phase=phase or resume, reason=reason)


def _all(section: str, names: str, rule: Rule) -> dict[str, Rule]:
    """Return one rule for several keys of a section, given by names with blanks between."""
    return {f"{section}.{name}": rule for name in names.split()}


_MODEL = _rule("fixed", "the checkpoint's tensors belong to another model")
_RATES = _rule("fixed", "Megatron finds its parameter groups by their rates, and finds none")
_STATE = _rule("fixed", "the other optimizer has no state for those weights")
_STORED = _rule("fixed", "Megatron silently uses the checkpoint's value")
_LENGTH = _rule("fixed", "samples of another length are counted differently", "recorded")
_PLACE = _rule("fixed", "the place in the data is counted from it", "recorded")
_OPTIMIZER = _rule("recorded", "the next updates differ")
_LOSS = _rule("recorded", "another loss is minimised")
_RATE_CURVE = _rule("recorded", "the next learning rates differ")
_BATCH = _rule("recorded", "the next steps have other batches")
_PRECISION = _rule("recorded", "the next steps round differently")
_REACTION = _rule("recorded", "another step is skipped or ends the run")
_DATA = _rule("recorded", "the next samples are others; some may be read again or never")
_VALIDATION = _rule("recorded", "validation losses before and after are no longer comparable")
_LAYOUT = _rule("recorded", "the next losses are the same to rounding only")
_OUTPUT = _rule("free", "decides what is shown or kept, not what is trained")
_SPEED = _rule("free", "decides how fast, not what")
_START = _rule("free", "read at the first start of a run only")

RULES: dict[str, Rule] = {
    "architecture": _MODEL,
    "seed": _DATA,
    "seed_weights": _START,
    "backend": _PRECISION,
    **dict.fromkeys(("name", "description", "timeout_minutes", "setup_timeout_minutes"), _OUTPUT),
    **_all(
        "layout",
        "tp sp pp vpp ep etp cp dp dispatcher dispatcher_backend overlap_expert_comm",
        _LAYOUT,
    ),
    **_all("layout", "dispatcher_sms delay_wgrad", _SPEED),
    "optimizer.name": _rule("fixed", "one optimizer cannot read the other's state"),
    **_all("optimizer", "lr min_lr", _RATES),
    **_all("optimizer", "muon_router muon_mtp_projection", _STATE),
    **_all("optimizer", "muon_momentum adam_beta1 adam_beta2 adam_eps", _STORED),
    **_all(
        "optimizer",
        "weight_decay clip_grad muon_nesterov muon_ns_steps muon_scale_mode muon_extra_scale "
        "muon_tp_mode muon_split_qkv muon_split_gate_up",
        _OPTIMIZER,
    ),
    "optimizer.muon_dense_shards": _LAYOUT,
    **_all("optimizer", "overlap_grad_reduce overlap_param_gather", _SPEED),
    "loss.bias_update_rate": _rule("fixed", "the checkpoint has the routers' bias or lacks it"),
    **_all(
        "loss",
        "aux_loss_coef aux_loss_type aux_loss_gradient capacity_factor z_loss_coef mtp_factor "
        "per_token",
        _LOSS,
    ),
    "loss.head_chunk": _LAYOUT,
    **_all(
        "schedule",
        "style train_samples horizon_samples warmup_samples decay_samples rewarm_at",
        _RATE_CURVE,
    ),
    **_all("schedule", "batch_schedule micro_batch_size", _BATCH),
    **_all(
        "precision",
        "compute fp8_format fp8_recipe fp8_param_gather bf16_first_layers bf16_last_layers "
        "bf16_mtp_projection grad_reduce_in_fp32",
        _PRECISION,
    ),
    **_all("execution", "recompute offload gc_interval", _SPEED),
    **_all("execution", "fused_residual_norm pad_expert_tokens deterministic", _PRECISION),
    "execution.extra_arguments": _rule("recorded", "Megatron is told something else"),
    **_all("stability", "not_finite spike spike_factor spike_window max_skips", _REACTION),
    "data.sequence_length": _LENGTH,
    "data.first_sample": _PLACE,
    **_all("data", "path phase train seed", _DATA),
    "data.document_attention": _rule("recorded", "the next tokens see other tokens"),
    "data.valid": _VALIDATION,
    "data.tokenizer": _rule("free", "the tokenizer's content is compared, wherever it lies"),
    **_all("data", "workers cache feed", _SPEED),
    **_all(
        "data.stream",
        "url user password_file streamer_user streamer_password_file ca_file certificate key "
        "window timeout_s",
        _SPEED,
    ),
    **_all(
        "rl.objective",
        "group_size prompts oversampling clip_low clip_high band_low band_high max_age max_tokens "
        "overlong_tokens overlong_penalty concision_penalty concision_free_tokens",
        _LOSS,
    ),
    **_all("rl", "engine engine_dtype ahead rounds chat_template", _DATA),
    "rl.freeze_router": _rule("fixed", "frozen weights have no optimizer state"),
    "rl.mtp_detach": _LOSS,
    "rl.eval_answers": _VALIDATION,
    **_all("rl", "url server_python hand_over workers", _SPEED),
    **_all("logging", "eval_iterations eval_batch_size", _VALIDATION),
    **_all(
        "logging",
        "log_interval eval_interval validation_documents tensorboard "
        "sample_prompts sample_interval sample_tokens eval_tasks eval_task_interval "
        "wandb_project wandb_entity wandb_name",
        _OUTPUT,
    ),
    **_all(
        "checkpoint",
        "output save_interval retain_interval keep_last verify async_save any_layout "
        "gather_on_one_rank parallel_load reuse_plans",
        _OUTPUT,
    ),
    **_all("checkpoint", "load continue_from", _START),
}
"""Class of every key of a `Run`; ``architecture`` stands for all keys in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A key whose value differs from that of the run that made the checkpoint.

    Attributes:
        key: full key, such as ``loss.z_loss_coef``; ``data`` for the content of the data.
        before, after: value in the checkpoint's run, and in this one, as plain values.
        kind: class of the key for this start.
        reason: effect of the change.
    """

    key: str
    before: Any
    after: Any
    kind: Class
    reason: str

    def line(self) -> str:
        """Return the change as one phrase, ``loss.z_loss_coef: 0.001 -> 0.01``."""
        return f"{self.key}: {shown(self.before)} -> {shown(self.after)}"


def rule_of(key: str) -> Rule:
    """Return the treatment of a full key of a `Run`."""
    return RULES.get(key) or RULES[key.partition(".")[0]]


def changes(before: Run, after: Run, *, phase: bool) -> tuple[Change, ...]:
    """Return the changed keys that are not free, in the order of the run file.

    Args:
        before: run that made the checkpoint.
        after: run that takes over its state.
        phase: true if it continues another run, false if it resumes its own folder.
    """
    return tuple(_changes(before, after, phase))


def _changes(before: Run, after: Run, phase: bool) -> Iterator[Change]:
    old, new = to_plain(before), to_plain(after)
    for key in keys():
        rule = rule_of(key)
        kind = rule.phase if phase else rule.resume
        # Under Adam the fields of Muon have no effect; two optimizers have nothing to compare.
        if key.startswith("optimizer.") and before.optimizer.name != after.optimizer.name:
            if key != "optimizer.name":
                continue
        elif key.startswith("optimizer.muon_") and after.optimizer.name != "muon":
            continue
        saved, wanted = _value(old, key), _value(new, key)
        if saved != wanted and kind != "free":
            yield Change(key=key, before=saved, after=wanted, kind=kind, reason=rule.reason)


def _value(plain: Any, key: str) -> Any:
    # A part of the architecture may be absent as a whole, such as the rotation of full attention.
    return reduce(
        lambda part, name: None if part is None else part.get(name), key.split("."), plain
    )
