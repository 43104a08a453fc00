"""Comparison of a Megatron checkpoint with a Hugging Face folder: logits and hidden states."""
