"""Tokenizer and encoding: documents to token ids."""
