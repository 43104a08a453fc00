"""Rewards that a program can check: code by tests, mathematics, tool calls, form."""
