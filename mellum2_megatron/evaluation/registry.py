"""The measures, and the suites that `mellum2 eval --suite` knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mellum2_megatron.evaluation import (
    aggregation,
    arithmetic,
    chat_answers,
    line_tasks,
    multiple_choice,
    needle,
    position_loss,
    tracing,
)
from mellum2_megatron.evaluation.measure import Measure

MEASURES: Mapping[str, Measure[Any]] = {
    measure.name: measure
    for measure in (
        position_loss.MEASURE,
        needle.MEASURE,
        tracing.MEASURE,
        aggregation.MEASURE,
        chat_answers.MEASURE,
        line_tasks.COMPLETION_MEASURE,
        line_tasks.FIM_MEASURE,
        arithmetic.MEASURE,
        multiple_choice.MEASURE,
    )
}
"""Every measure by its name."""

SUITES: Mapping[str, tuple[str, ...]] = {
    "long": (position_loss.MEASURE.name, needle.MEASURE.name),
    "ruler_like": (needle.MEASURE.name, tracing.MEASURE.name, aggregation.MEASURE.name),
    "miniature": (
        line_tasks.COMPLETION_MEASURE.name,
        line_tasks.FIM_MEASURE.name,
        arithmetic.MEASURE.name,
        multiple_choice.MEASURE.name,
    ),
}
"""Suite -> its measures, in order. A measure's own name is a suite of one."""
