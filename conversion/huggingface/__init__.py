"""Hugging Face folders: read, written, scored, generated from."""
