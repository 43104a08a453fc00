"""Text to training-ready tokens.

``corpus`` reads and filters documents, ``tokens`` turns them into ids and packs, ``pipeline`` runs
both as a plan. ``prepare_packs`` is a plan in one command; ``prepare`` writes Megatron's indexed
datasets, which ``prepared_folder`` reads. ``feed`` gives samples to training.

Only ``feed`` loads torch when it is imported: preparing and checking data must start quickly.
"""
