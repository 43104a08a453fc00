"""What a rank does in the training tests."""

from __future__ import annotations

from pathlib import Path


def train(run_file: str) -> None:
    """Train a resolved run on this rank."""
    from mellum2_megatron.run_folder import read_run
    from mellum2_megatron.train import train as train_run

    train_run(read_run(Path(run_file)), device="cpu")
