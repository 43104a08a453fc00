"""Mellum 2 for NVIDIA's Megatron-Bridge: `import conversion.bridge` registers the model with it."""

from conversion.bridge.register import BridgeImportError, Mellum2Bridge, Mellum2ModelProvider

__all__ = ["BridgeImportError", "Mellum2Bridge", "Mellum2ModelProvider"]
