"""Old path, promised by docs/plugin.md: the module is now `mellum2_megatron.model.scoring`."""

from mellum2_megatron.model.scoring import score_tokens

__all__ = ["score_tokens"]
