"""Mellum 2 between Megatron and Hugging Face: convert, verify, release.

`convert` has the public functions, `mapping` the table that both directions derive from.
"""
