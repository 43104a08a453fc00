"""Engines that write answers: one interface, transformers in process and a vLLM server."""
