"""Reinforcement learning from rewards that can be checked (RLVR, report §5.2)."""
