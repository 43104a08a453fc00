"""A run as one typed value, with YAML and overrides; no torch at import."""

from mellum2_megatron.config.execution import DETERMINISTIC_VARIABLES, Execution
from mellum2_megatron.config.layout import Layout
from mellum2_megatron.config.objective import Objective
from mellum2_megatron.config.optimizer import Loss, Optimizer
from mellum2_megatron.config.overrides import apply_overrides, overridden
from mellum2_megatron.config.precision import Precision
from mellum2_megatron.config.rl import Rl
from mellum2_megatron.config.run import (
    Backend,
    Checkpoint,
    Data,
    Device,
    Logging,
    Run,
    keys,
)
from mellum2_megatron.config.run_yaml import from_yaml, to_yaml
from mellum2_megatron.config.schedule import Schedule
from mellum2_megatron.config.stability import Stability
from mellum2_megatron.config.stream import Stream

__all__ = [
    "DETERMINISTIC_VARIABLES",
    "Backend",
    "Checkpoint",
    "Data",
    "Device",
    "Execution",
    "Layout",
    "Logging",
    "Loss",
    "Objective",
    "Optimizer",
    "Precision",
    "Rl",
    "Run",
    "Schedule",
    "Stability",
    "Stream",
    "apply_overrides",
    "from_yaml",
    "keys",
    "overridden",
    "to_yaml",
]
