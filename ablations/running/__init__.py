"""A study's tasks, each one arm with one seed: their folders, and the machines that train them."""
