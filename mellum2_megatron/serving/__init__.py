"""Models behind vLLM's own server: its command and versions, its process, and a client of it.

Nothing of vLLM is imported: it lives in an environment of its own (`make setup-serve`).
"""
