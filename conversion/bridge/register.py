"""Mellum 2 for Megatron-Bridge 0.6.2, and for NeMo-RL through it: importing this module registers
it.

::

    import conversion.bridge
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained("JetBrains/Mellum2-12B-A2.5B-Base")

Nothing else in the project imports it. See docs/bridge.md.
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
        rule=f"it needs Megatron-Bridge and Transformer Engine, which cannot be imported here ({error})",
        fix="run scripts/setup_te.sh and scripts/setup_bridge.sh, or use `mellum2 convert`, which needs neither",
    ) from error

__all__ = ["BridgeImportError", "Mellum2Bridge", "Mellum2ModelProvider"]

# From a ``run_config.yaml`` Bridge builds classes of packages that it knows, and those that it was
# told of.
target_allowlist.add_exact(PROVIDER)
register_fallback_config()
