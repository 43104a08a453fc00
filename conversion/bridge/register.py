"""Registers Mellum 2 with Megatron-Bridge 0.6.2, and through it with NeMo-RL, when it is imported.

::

    import conversion.bridge
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained("JetBrains/Mellum2-12B-A2.5B-Base")

No other package of the project imports it. See docs/bridge.md.
"""

from __future__ import annotations

from conversion.huggingface.fallback_config import register_fallback_config
from mellum2_megatron.checkpoint.bridge_config import PROVIDER
from mellum2_megatron.common.errors import InputError


class BridgeImportError(InputError, ImportError):
    """Megatron-Bridge cannot be imported here."""


try:
    from megatron.training.config.instantiate_utils import target_allowlist

    from conversion.bridge.model import Mellum2Bridge, Mellum2ModelProvider
except ImportError as error:
    raise BridgeImportError(
        "import conversion.bridge",
        rule=(
            "it needs Megatron-Bridge and Transformer Engine, "
            f"which cannot be imported here ({error})"
        ),
        fix=(
            "run scripts/setup_te.sh and scripts/setup_bridge.sh, "
            "or use `mellum2 convert`, which needs neither"
        ),
    ) from error

__all__ = ["BridgeImportError", "Mellum2Bridge", "Mellum2ModelProvider"]

OLD_PROVIDER = "conversion.bridge_model.Mellum2ModelProvider"
"""The provider's path in the run_config.yaml of older checkpoints, where `conversion.bridge_model`
keeps it."""

# From a run_config.yaml Bridge builds classes of its own packages and those on this list only
# (megatron/training/config/instantiate_utils.py:_resolve_target, 0.19.2).
target_allowlist.add_exact(PROVIDER)
target_allowlist.add_exact(OLD_PROVIDER)
register_fallback_config()
