"""Register Mellum 2 with Megatron-Bridge 0.6.2, and through it with NeMo-RL, on import::

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
"""Path of the provider in the run_config.yaml of older checkpoints.

`conversion.bridge_model` keeps it importable.
"""

# Bridge builds an object named in a run_config.yaml only if its class is Bridge's own or on this
# list (megatron/training/config/instantiate_utils.py:_resolve_target, 0.19.2).
target_allowlist.add_exact(PROVIDER)
target_allowlist.add_exact(OLD_PROVIDER)
register_fallback_config()
