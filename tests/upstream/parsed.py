"""A run's command line, read by Megatron's parser and validation."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mellum2_megatron.config import Device, Run, apply_overrides
from mellum2_megatron.recipes import recipe
from mellum2_megatron.upstream import (
    environment,
    megatron_arguments,
)

TINY, BIG = "mellum2_tiny_pretrain", "mellum2_12b_pretrain_phase1"


def parsed(run: Run, monkeypatch: pytest.MonkeyPatch, *, world_size: int, device: Device) -> Any:
    """Return the run's command line as Megatron's argparse reads it."""
    from megatron.training.arguments import parse_args

    words = megatron_arguments(run, world_size=world_size, device=device)
    monkeypatch.setattr(sys, "argv", ["train", *words])
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setenv("RANK", "0")
    for name, value in environment(run).items():
        monkeypatch.setenv(name, value)
    return parse_args()


def validated(run: Run, monkeypatch: pytest.MonkeyPatch, *, world_size: int, device: Device) -> Any:
    """The same after Megatron's validation, which also derives values."""
    from megatron.training.arguments import validate_args

    args = parsed(run, monkeypatch, world_size=world_size, device=device)
    validate_args(args)
    return args


def on_cpu(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, *, world_size: int = 2
) -> tuple[Run, Any]:
    run = apply_overrides(recipe(TINY), overrides)
    return run, validated(run, monkeypatch, world_size=world_size, device="cpu")


@contextlib.contextmanager
def megatron_scheduler(
    args: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Any, dict[str, Any], Any]]:
    """Yield Megatron's scheduler, parameter group and batch calculator, set up as by `pretrain`."""
    from megatron.core import num_microbatches_calculator as calculator
    from megatron.training import training

    monkeypatch.setattr(training, "get_args", lambda: args)
    # As set_global_variables does (megatron/training/global_vars.py:127).
    calculator.init_num_microbatches_calculator(
        rank=1,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size,
        step_batch_size_schedule=args.step_batch_size_schedule,
        seq_length=args.seq_length,
    )
    try:
        group: dict[str, Any] = {}
        yield (
            training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=[group])),
            group,
            calculator,
        )
    finally:
        calculator.destroy_num_microbatches_calculator()


def stub_te(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Megatron's validation find Transformer Engine 2.20.2, which tests hide."""
    import megatron.core.transformer.transformer_config as config
    from megatron.core.extensions import transformer_engine
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import moe_utils
    from packaging.version import Version

    version = Version("2.20.2")
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and hasattr(module, "is_te_min_version"):
            monkeypatch.setattr(
                module, "is_te_min_version", lambda least, **_: version >= Version(least)
            )
    monkeypatch.setattr(config, "get_te_version", lambda: version)
    for module in (rope_utils, transformer_engine, moe_utils):
        for name, value in list(vars(module).items()):
            if name.startswith("fused_") and value is None:
                monkeypatch.setattr(module, name, object())
