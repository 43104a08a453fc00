"""NeMo-RL: its configuration of a run, and the rewards and tasks of this project inside it."""
