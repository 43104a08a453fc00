"""A question as a typed value: the study, its arms, and the checks that make them comparable."""

from ablations.asking.study import Arm, Claim, DataSet, Match, Metric, Scale, StopRule, Study

__all__ = ["Arm", "Claim", "DataSet", "Match", "Metric", "Scale", "StopRule", "Study"]
