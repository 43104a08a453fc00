"""Suites of lm-evaluation-harness: the report's benchmarks, as far as the report says.

What is at hand of the report names HumanEval, MMLU (its ablations) and, in its abstract, the areas
code generation, mathematics and reasoning, tool use, knowledge and safety. A summary by others
names LiveCodeBench v6 and AIME 2025 and 2026. Numbers of examples ("shots"), prompts and sampling
of its evaluation are unknown: a task runs with the harness' own, and the result says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

REPORT = "named in the report"
SUMMARY = "named in a summary of the report by others"
AREA = "ours, for an area that the report's abstract names"


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessTask:
    """One task of the harness.

    Attributes:
        name: task or group of the harness, or of `harness_tasks`.
        benchmark: name for people.
        area: ``code``, ``mathematics``, ``knowledge``, ``reasoning``, ``instructions``.
        evidence: why it is in the suite.
        metric: the metric that is shown first, with its filter, as the harness writes it.
    """

    name: str
    benchmark: str
    area: str
    evidence: str
    metric: str


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessSuite:
    """Tasks of one kind of model.

    Attributes:
        tasks: in order.
        missing: benchmarks of the report that the harness does not have -> why.
        chat: ask by the folder's chat template; default false.
        sampling: of generated answers; default the task's own, greedy.
        think_end: text that ends the reasoning, which is cut off; None (default): there is none.
    """

    tasks: tuple[HarnessTask, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    chat: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    think_end: str | None = None


_LIVECODEBENCH = {"LiveCodeBench v6": "the harness has no such task (lm-eval 0.4.13)"}
_TOOLS = {"tool use": "the report's benchmark is unknown, and the harness has none"}
_SAFETY = {"safety": "the report's benchmark is unknown"}

HARNESS_SUITES: Mapping[str, HarnessSuite] = {
    "base": HarnessSuite(
        tasks=(
            HarnessTask(
                name="mellum2_humaneval",
                benchmark="HumanEval",
                area="code",
                evidence=REPORT,
                metric="pass_at_1,create_test",
            ),
            HarnessTask(
                name="mellum2_mbpp",
                benchmark="MBPP",
                area="code",
                evidence=AREA,
                metric="pass_at_1,none",
            ),
            HarnessTask(
                name="mmlu",
                benchmark="MMLU",
                area="knowledge",
                evidence=REPORT,
                metric="acc,none",
            ),
            HarnessTask(
                name="gsm8k",
                benchmark="GSM8K",
                area="mathematics",
                evidence=AREA,
                metric="exact_match,strict-match",
            ),
            HarnessTask(
                name="arc_challenge",
                benchmark="ARC-Challenge",
                area="reasoning",
                evidence=AREA,
                metric="acc_norm,none",
            ),
        ),
    ),
    "instruct": HarnessSuite(
        chat=True,
        tasks=(
            HarnessTask(
                name="mellum2_humaneval_instruct",
                benchmark="HumanEval",
                area="code",
                evidence=REPORT,
                metric="pass_at_1,create_test",
            ),
            HarnessTask(
                name="gsm8k_cot_zeroshot",
                benchmark="GSM8K",
                area="mathematics",
                evidence=AREA,
                metric="exact_match,flexible-extract",
            ),
            HarnessTask(
                name="mmlu_pro",
                benchmark="MMLU-Pro",
                area="knowledge",
                evidence=AREA,
                metric="exact_match,custom-extract",
            ),
            HarnessTask(
                name="ifeval",
                benchmark="IFEval",
                area="instructions",
                evidence=AREA,
                metric="prompt_level_strict_acc,none",
            ),
        ),
        missing={**_LIVECODEBENCH, **_TOOLS, **_SAFETY},
    ),
    "thinking": HarnessSuite(
        chat=True,
        # Sampling of the released models' users (mellum2_megatron/data/chat); the report's own is
        # unknown.
        sampling={
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 20,
            "max_gen_toks": 32768,
        },
        think_end="</think>",
        tasks=(
            HarnessTask(
                name="aime25",
                benchmark="AIME 2025",
                area="mathematics",
                evidence=SUMMARY,
                metric="exact_match,none",
            ),
            HarnessTask(
                name="gpqa_diamond_cot_zeroshot",
                benchmark="GPQA Diamond",
                area="reasoning",
                evidence=AREA,
                metric="exact_match,flexible-extract",
            ),
            HarnessTask(
                name="mellum2_humaneval_instruct",
                benchmark="HumanEval",
                area="code",
                evidence=REPORT,
                metric="pass_at_1,create_test",
            ),
        ),
        missing={
            **_LIVECODEBENCH,
            "AIME 2026": "the harness has no such task (lm-eval 0.4.13)",
            **_TOOLS,
            **_SAFETY,
        },
    ),
}
"""Suites that `mellum2 eval --suite` gives to the harness."""
