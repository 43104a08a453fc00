"""One process without a GPU runs the CPU backend; with one, Megatron runs as it is and nothing of `cpu` is imported."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    from mellum2_megatron import cpu

    cpu.activate()  # before any test module imports megatron


@pytest.fixture(scope="session")
def megatron_world() -> Iterator[None]:
    """Megatron's parallel state for one process."""
    if torch.cuda.is_available():
        pytest.skip("the one-process CPU world is for machines without a GPU")
    from mellum2_megatron import cpu

    with cpu.single_process():
        yield
