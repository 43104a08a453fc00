"""Mellum 2 on NVIDIA Megatron-Core: the model, its training, and what both need.

The packages and their order: docs/architecture.md.
"""
