"""Old path, promised by docs/bridge.md: the module is now
`conversion.huggingface.fallback_config`."""

from conversion.huggingface.fallback_config import register_fallback_config

__all__ = ["register_fallback_config"]
