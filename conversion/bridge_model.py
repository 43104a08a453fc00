"""Old path of `conversion.bridge.model`, named by the run_config.yaml of older checkpoints."""

from conversion.bridge.model import Mellum2Bridge, Mellum2ModelProvider

__all__ = ["Mellum2Bridge", "Mellum2ModelProvider"]
