"""Old path, promised by the run_config.yaml of older checkpoints: the module is now
`conversion.bridge.model`."""

from conversion.bridge.model import Mellum2Bridge, Mellum2ModelProvider

__all__ = ["Mellum2Bridge", "Mellum2ModelProvider"]
