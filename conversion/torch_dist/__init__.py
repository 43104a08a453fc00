"""Megatron ``torch_dist`` checkpoints, read and written tensor by tensor."""
