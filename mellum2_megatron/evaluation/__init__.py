"""Is a model good? Measures, suites of them, and their results as a table and a JSON file.

A measure asks an `EvaluatedModel` for log-probabilities and greedy text, and returns figures. It
knows neither Megatron nor transformers: the command `mellum2 eval` brings the model.
"""

from mellum2_megatron.evaluation.evaluating import Report, evaluate, plan
from mellum2_megatron.evaluation.measure import Figure, Measure, Outcome
from mellum2_megatron.evaluation.model import Continuation, EvaluatedModel
from mellum2_megatron.evaluation.registry import MEASURES, SUITES

__all__ = [
    "MEASURES",
    "SUITES",
    "Continuation",
    "EvaluatedModel",
    "Figure",
    "Measure",
    "Outcome",
    "Report",
    "evaluate",
    "plan",
]
