"""Answers of the model in training: engines that write them, their queue, a step's batch."""
