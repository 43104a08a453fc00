"""How we speak to Megatron 0.19.2, and what we mend in it. No torch until `activate`."""

from mellum2_megatron.upstream.arguments import environment, megatron_arguments
from mellum2_megatron.upstream.patches import PATCHES, activate, quiet_upstream

__all__ = ["PATCHES", "activate", "environment", "megatron_arguments", "quiet_upstream"]
