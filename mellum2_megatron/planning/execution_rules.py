"""Rules about overlap, recomputation, offload and extra arguments (`layout`, `execution`)."""

from __future__ import annotations

import os
from collections.abc import Mapping

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import DETERMINISTIC_VARIABLES, Run
from mellum2_megatron.planning.extra_arguments import extra_argument_problems
from mellum2_megatron.planning.rule import PlannedRun, Problems, rule


@rule(evidence="megatron/core/transformer/transformer_config.py:2697 (0.19.2)")
def overlap_without_moe_recompute(planned: PlannedRun) -> Problems:
    """A layer whose exchanges overlap is not computed again as a whole."""
    if planned.run.layout.overlap_expert_comm and "moe" in planned.run.execution.recompute:
        yield InputError(
            "layout.overlap_expert_comm=true with execution.recompute=moe",
            rule="the exchange of tokens would be repeated in the middle of the plan",
            fix="use execution.recompute=moe_act, or layout.overlap_expert_comm=false",
        )


@rule(
    evidence="megatron/training/arguments.py:1823, 1855 and "
    "core/transformer/transformer_config.py:1784 (0.19.2); the fused norm and padded products are "
    "Transformer Engine's"
)
def execution_has_kernels(planned: PlannedRun) -> Problems:
    """Options of Transformer Engine's modules run on these modules."""
    if planned.backend == "te":
        return
    execution, layout = planned.run.execution, planned.run.layout
    for given, asked in (
        ("layout.delay_wgrad=true", layout.delay_wgrad),
        ("execution.recompute=moe_act", "moe_act" in execution.recompute),
        # Megatron asks Transformer Engine for its FP8 state, whatever the precision
        # (megatron/core/tensor_parallel/random.py:693).
        ("execution.recompute=layernorm", "layernorm" in execution.recompute),
        (f"execution.offload={','.join(execution.offload)}", bool(execution.offload)),
        ("execution.fused_residual_norm=true", execution.fused_residual_norm),
    ):
        if asked:
            yield InputError(
                f"{given} with backend={planned.backend} on {planned.device}",
                rule="is an option of Transformer Engine's modules, on a GPU",
                fix="leave it out, or set backend=te on a GPU",
            )


@rule(evidence="megatron/core/transformer/transformer_config.py:2316-2325 (0.19.2)")
def fp8_options_fit(planned: PlannedRun) -> Problems:
    """Options of FP8 go with the precision and with the dispatcher."""
    run = planned.run
    precision, execution = run.precision, run.execution
    if execution.pad_expert_tokens and precision.compute != "fp8":
        yield InputError(
            f"execution.pad_expert_tokens=true with precision.compute={precision.compute}",
            rule="only FP8 products need multiples of tokens",
            fix="set execution.pad_expert_tokens=false",
        )
    if execution.pad_expert_tokens and run.layout.dispatcher == "allgather":
        yield InputError(
            "execution.pad_expert_tokens=true with layout.dispatcher=allgather",
            rule="only alltoall and flex take padded numbers of tokens",
            fix="set layout.dispatcher=alltoall, or execution.pad_expert_tokens=false",
        )


@rule(evidence="megatron/training/determinism.py:61-102 (0.19.2)", machine=True)
def environment_is_deterministic(planned: PlannedRun) -> Problems:
    """The environment of a deterministic run asks for no kernel that adds in changing order."""
    yield from deterministic_problems(planned.run, os.environ)


def deterministic_problems(run: Run, variables: Mapping[str, str]) -> Problems:
    """Yield a problem for each variable of a deterministic run that Megatron would not accept."""
    if not run.execution.deterministic:
        return
    for name, accepted in DETERMINISTIC_VARIABLES.items():
        value = variables.get(name)
        # An empty list of algorithms is none.
        words = [word.strip() for word in (value or "").split(",") if word.strip()] or [""]
        if value is not None and not set(words) <= set(accepted):
            yield InputError(
                f"{name}={value} with execution.deterministic=true",
                rule=f"must be {' or '.join(accepted)}",
                fix=f"unset {name}",
            )


@rule(evidence="mellum2_megatron/planning/extra_arguments.py")
def extra_arguments_are_free(planned: PlannedRun) -> Problems:
    """No word for Megatron's command line repeats or contradicts a key."""
    yield from extra_argument_problems(planned.run)
