"""Old path of `conversion.huggingface.fallback_config`, named by earlier versions of
docs/bridge.md."""

from conversion.huggingface.fallback_config import register_fallback_config

__all__ = ["register_fallback_config"]
