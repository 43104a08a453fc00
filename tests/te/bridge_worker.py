"""Megatron-Bridge tests' functions for a process with Transformer Engine and without a GPU.

Each function takes the folder that the test has prepared, leaves files there and returns JSON
values.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.te.worker import activate_beside_transformer_engine

activate_beside_transformer_engine()

import torch  # noqa: E402
from megatron.bridge import AutoBridge  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

KNOWN_BEFORE = AutoBridge.list_supported_models()

import conversion.bridge  # noqa: E402, F401  # registers Mellum 2

ARGUMENT = {
    "use_cpu_initialization",
    "tensor_parallel_num_weight_shards",
    "expert_tensor_parallel_num_weight_shards",
    "inference_sampling_seed",
    "pipeline_dtype",
    "moe_z_loss_coeff",
    "cp_comm_type",
}
"""Fields of a run or machine: our arguments set them, the provider leaves them to recipes."""


def round_trips(root: Path) -> None:
    """Let Bridge save each model of ``hf/`` in both formats, and our import as Hugging Face."""
    for folder in sorted((root / "hf").iterdir()):
        bridge = AutoBridge.from_hf_pretrained(folder)
        model = bridge.to_megatron_model(wrap_with_ddp=False, use_cpu_initialization=True)
        bridge.save_megatron_model(model, root / "bridge_megatron" / folder.name)
        bridge.save_hf_pretrained(model, root / "bridge_hf" / folder.name, show_progress=False)
        imported = bridge.load_megatron_model(root / "imported" / folder.name / "release")
        bridge.save_hf_pretrained(imported, root / "read_back" / folder.name, show_progress=False)


def configurations(root: Path) -> dict[str, list[str]]:
    """Return differences of the provider from our training, and among providers read from files."""
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.model_load_save import load_model_config
    from megatron.bridge.utils.instantiate_utils import InstantiationMode
    from megatron.training.arguments import (
        core_transformer_config_from_args,
        parse_args,
        validate_args,
    )

    from conversion.bridge.register import Mellum2ModelProvider
    from mellum2_megatron.config import Layout, Precision
    from mellum2_megatron.model.transformer_config import use_plain_initialization
    from mellum2_megatron.recipes import recipe
    from mellum2_megatron.upstream import megatron_arguments

    run = dataclasses.replace(
        recipe("mellum2_tiny_pretrain"), layout=Layout(), precision=Precision(compute="bf16")
    )
    provider = Mellum2ModelProvider.from_architecture(run.architecture)
    provider.finalize()
    sys.argv = ["pretrain", *megatron_arguments(run, world_size=1, device="cuda", backend="te")]
    args = parse_args()
    validate_args(args)
    ours = core_transformer_config_from_args(args)
    use_plain_initialization(ours)

    small = root / "imported" / "small" / "release"
    from_folder = AutoBridge.from_hf_pretrained(root / "hf" / "small").to_megatron_provider(
        load_weights=False
    )
    from_file, _ = load_model_config(str(small))
    from_container = ConfigContainer.from_yaml(
        str(small / "run_config.yaml"), mode=InstantiationMode.STRICT
    ).model
    for read in (from_folder, from_file, from_container):
        read.finalize()
    return {
        "arguments": differences(ours, provider, besides=ARGUMENT),
        "load_model_config": differences(from_folder, from_file, besides={"hf_model_id"}),
        "ConfigContainer": differences(from_folder, from_container, besides={"hf_model_id"}),
    }


def differences(expected: Any, found: Any, *, besides: set[str]) -> list[str]:
    """Return the dataclass fields that differ; functions are compared by name."""

    def comparable(value: Any) -> Any:
        if callable(value):
            inner = getattr(value, "func", value)
            return (inner.__module__, inner.__qualname__, getattr(value, "keywords", None))
        return value

    names = [field.name for field in dataclasses.fields(expected) if field.name not in besides]
    pairs = [
        (name, comparable(getattr(expected, name)), comparable(getattr(found, name)))
        for name in names
    ]
    return [f"{name}: {want!r}, {have!r}" for name, want, have in pairs if want != have]


def refusals(root: Path) -> dict[str, str]:
    """Return the error of each attempt that must fail."""
    from conversion.bridge import mapping as bridge_mapping
    from conversion.bridge.register import Mellum2ModelProvider
    from conversion.mapping import MTP
    from mellum2_megatron.architecture import PRESETS

    def load(name: str) -> None:
        AutoBridge.from_hf_pretrained(root / name).to_megatron_model(
            wrap_with_ddp=False, use_cpu_initialization=True
        )

    def another_model() -> None:
        provider = Mellum2ModelProvider.from_architecture(PRESETS["mellum2-tiny"])
        provider.moe_router_topk = 3
        provider.finalize()

    def unmapped() -> None:
        places = bridge_mapping.PLACES
        bridge_mapping.PLACES = tuple(place for place in places if place.rows is not MTP)
        try:
            load("hf/small")
        finally:
            bridge_mapping.PLACES = places

    def error(attempt: Callable[[], None]) -> str:
        try:
            attempt()
        except Exception as found:
            return f"{type(found).__name__}: {found}"
        return "none"

    return {
        "missing": error(lambda: load("missing")),
        "extra": error(lambda: load("extra")),
        "fused": error(lambda: load("fused")),
        "unmapped": error(unmapped),
        "another model": error(another_model),
        "no architecture": error(lambda: Mellum2ModelProvider().finalize()),
    }


def old_path(root: Path) -> list[str]:
    """Read our import with the provider's path of older checkpoints in its ``run_config.yaml``.

    Leaves the exported weights in ``old_path_hf/`` and returns the differences of its provider from
    the one read under the present path.
    """
    from megatron.bridge.training.model_load_save import load_model_config

    present = root / "imported" / "small" / "release"
    old = Path(shutil.copytree(present, root / "old_path" / "release"))
    text = (old / "run_config.yaml").read_text()
    path, old_path = "conversion.bridge.model.", "conversion.bridge_model."
    assert text.count(path) == 1
    (old / "run_config.yaml").write_text(text.replace(path, old_path))

    bridge = AutoBridge.from_hf_pretrained(root / "hf" / "small")
    model = bridge.load_megatron_model(old)
    bridge.save_hf_pretrained(model, root / "old_path_hf", show_progress=False)
    expected, read = load_model_config(str(present))[0], load_model_config(str(old))[0]
    for provider in (expected, read):
        provider.finalize()
    return differences(expected, read, besides=set())


def without_head(root: Path) -> dict[str, Any]:
    """Build the model with NeMo-RL's default of no MTP layers, and export it."""
    bridge = AutoBridge.from_hf_pretrained(root / "hf" / "small")
    provider = bridge.to_megatron_provider()
    provider.mtp_num_layers = 0
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    return {
        "parameters": [name for name, _ in model[0].named_parameters() if "mtp" in name],
        "exported": sorted(
            name for name, _ in bridge.export_hf_weights(model, cpu=True, show_progress=False)
        ),
        "config": bridge._model_bridge.megatron_to_hf_config(provider).get(
            "num_nextn_predict_layers"
        ),
    }


def synthesized(root: Path) -> dict[str, Any]:
    """Return the config that Bridge makes of our import's run_config.yaml alone."""
    bridge = AutoBridge.from_auto_config(
        str(root / "imported" / "small" / "release"), str(root / "hf" / "small")
    )
    return bridge.hf_pretrained.to_diff_dict()


def known_before(root: Path) -> bool:
    """Return True if Bridge has a bridge of its own for Mellum 2."""
    return "MellumForCausalLM" in KNOWN_BEFORE


def split(root: Path) -> None:
    """On two ranks: load and export the model with each kind of parallelism."""
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo")
    for way in (
        "pipeline_model_parallel_size",
        "expert_model_parallel_size",
        "tensor_model_parallel_size",
    ):
        bridge = AutoBridge.from_hf_pretrained(root / "hf" / "even")
        provider = bridge.to_megatron_provider()
        setattr(provider, way, 2)
        provider.sequence_parallel = way.startswith("tensor")
        provider.finalize()
        provider.initialize_model_parallel(seed=0)
        model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        weights = {
            n: w.contiguous()
            for n, w in bridge.export_hf_weights(model, cpu=True, show_progress=False)
        }
        if torch.distributed.get_rank() == 0:
            save_file(weights, root / f"{way}.safetensors")
        torch.distributed.barrier()
        parallel_state.destroy_model_parallel()


def main() -> None:
    root, functions = Path(sys.argv[1]), sys.argv[2:]
    if "WORLD_SIZE" not in os.environ:
        from mellum2_megatron.cpu import init_single_process

        init_single_process()
    results = {name: globals()[name](root) for name in functions}
    sys.stdout.write("RESULT " + json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
