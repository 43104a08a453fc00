"""Code that runs in vLLM's own processes and environment, where this project is not installed.

The folder itself goes into vLLM's ``PYTHONPATH``, so its modules import nothing of this project.
"""
