"""Our arguments for Megatron 0.19.2, and our changes to it. No torch until `activate`."""

from mellum2_megatron.upstream.arguments import (
    environment,
    gpu_environment,
    kept_variables,
    megatron_arguments,
)
from mellum2_megatron.upstream.patches import PATCHES, activate
from mellum2_megatron.upstream.quiet import quiet_upstream

__all__ = [
    "PATCHES",
    "activate",
    "environment",
    "gpu_environment",
    "kept_variables",
    "megatron_arguments",
    "quiet_upstream",
]
