"""Text to training-ready tokens.

``corpus`` chooses the documents, ``tokens`` turns them into ids, ``prepare`` writes the prepared
folder and ``prepared_folder`` reads it. ``feed`` gives its samples to training.

Only ``feed`` loads torch when it is imported: preparing and checking data must start quickly.
"""
