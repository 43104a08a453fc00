"""What a rendered run does otherwise than this project's own trainer, setting by setting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mellum2_megatron.config import Run
from mellum2_megatron.rlvr.nemo_rl.config import Mode
from mellum2_megatron.rlvr.nemo_rl.declared import declared


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """A setting that NeMo-RL cannot express, or expresses in another way.

    Attributes:
        setting: the setting, and its value in the run.
        there: what NeMo-RL does.
        done: what was rendered in its place.
    """

    setting: str
    there: str
    done: str


def limits(run: Run, mode: Mode) -> tuple[Limit, ...]:
    """Return the limits of a run in one of NeMo-RL's two ways."""
    objective, found = run.rl.objective, list[Limit]()

    def add(setting: str, there: str, done: str) -> None:
        found.append(Limit(setting=setting, there=there, done=done))

    if mode == "sync":
        if objective.max_age:
            add(
                f"max_age={objective.max_age}: answers while the model learns",
                "its synchronous way waits for each step's answers",
                "age 0; --mode async for older answers",
            )
    else:
        add(
            f"oversampling={objective.oversampling:g}: groups of equal rewards are dropped",
            "run_grpo.py: NotImplementedError for async_grpo with use_dynamic_sampling",
            "nothing is dropped: such groups have no advantage, so fewer answers of a step teach",
        )
        if objective.overlong_penalty:
            add(
                f"overlong_penalty={objective.overlong_penalty:g}",
                "run_grpo.py: NotImplementedError for async_grpo with reward_shaping",
                "our environment takes it off the reward, by the tokens of the decoded answer",
            )
    if objective.concision_penalty:
        judged = "; groups are then judged by it too" if mode == "sync" else ""
        add(
            f"concision_penalty={objective.concision_penalty:g}",
            "there is no such key",
            f"our environment takes it off the reward{judged}",
        )
    add(
        "tokens of an answer in our environment",
        "rollouts hand over text alone, decoded without special tokens",
        "counted by encoding the text again; `</think>` must not be a special token",
    )
    if mode == "sync":
        add(
            f"rounds={run.rl.rounds}",
            "a step that needs more rounds ends the run with an error",
            "dynamic_sampling_max_gen_batches is the same number",
        )
    add(
        f"engine={run.rl.engine}, engine_dtype={run.rl.engine_dtype}",
        "vLLM inside its own workers",
        "vLLM in BF16; rl.engine, rl.url, rl.server_python, rl.hand_over and rl.engine_dtype are "
        "not used",
    )
    add(
        f"precision.compute={run.precision.compute}",
        "policy.precision and fp8_cfg",
        "bfloat16",
    )
    add(
        "the model in vLLM 0.25.1 with transformers below 5.9",
        "this transformers has no class of Mellum 2, which came with 5.10.1",
        "not tried: give NeMo-RL a newer pair, or expect a refusal at the start",
    )
    add(
        "resume with the same numbers",
        "it resumes from its own checkpoints, whose data order is its own",
        "not measured",
    )
    return tuple(found)


def keys_line(checkout: Path) -> str:
    """Return a sentence that says where the keys come from that the configuration was held to."""
    version = declared(checkout)
    if version.read:
        return f"Its keys were checked against the classes in {checkout}."
    return (
        f"Its keys were checked against a list written down by hand near {version.commit[:9]}: "
        f"{checkout} is not on this machine."
    )


def limits_page(run: Run, mode: Mode, checkout: Path) -> str:
    """Return the table in Markdown.

    Args:
        run: a resolved run.
        mode: NeMo-RL's way.
        checkout: its checkout.
    """
    version, known = declared(checkout), declared()
    lines = [
        f"# {run.name} in NeMo-RL {version.commit[:9]}, {mode}",
        "",
        f"What {known.commit[:9]} does otherwise than the run, and what was rendered instead.",
        keys_line(checkout),
        "",
        "| setting | NeMo-RL | rendered |",
        "|---|---|---|",
    ]
    lines += [f"| {one.setting} | {one.there} | {one.done} |" for one in limits(run, mode)]
    return "\n".join(lines) + "\n"
