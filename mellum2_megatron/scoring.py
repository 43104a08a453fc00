"""Old path of `mellum2_megatron.model.scoring`, shown by earlier pages."""

from mellum2_megatron.model.scoring import score_tokens

__all__ = ["score_tokens"]
