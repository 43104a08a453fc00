"""Which optional packages are here and what their absence costs; for `mellum2 doctor`. Imports none
of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from packaging.version import Version

State = Literal["present", "absent", "wrong"]

OLDEST_RESILIENCY = "0.6.0"


@dataclass(frozen=True, kw_only=True, slots=True)
class Extra:
    """An optional package as found.

    Attributes:
        name: what people call it.
        state: ``wrong`` means that something else answers to the import name.
        detail: version and what it is used for, or what is lost and how to get it.
    """

    name: str
    state: State
    detail: str


def find_extras() -> tuple[Extra, ...]:
    """Look for every optional package; milliseconds, because metadata and file names answer."""
    return tuple(find() for find in _FINDERS)


def find_apex() -> Extra:
    """Look for NVIDIA apex.

    Of its import names Megatron uses ``apex.multi_tensor_apply`` with ``amp_C``
    (core/optimizer/clip_grads.py:20-30, 0.19.2), ``apex.optimizers``
    (core/optimizer/__init__.py:20) and ``fused_weight_gradient_mlp_cuda``
    (core/tensor_parallel/layers.py:51). The first two only where Transformer Engine is not
    importable.
    """
    if not _found("apex"):
        detail = "not needed beside Transformer Engine; without either, Adam and gradient norms run unfused"
        return Extra(name="NVIDIA apex", state="absent", detail=detail)
    if not _found("apex.multi_tensor_apply"):
        detail = (
            "the installed 'apex' is not NVIDIA's but an unrelated package of that name: pip uninstall apex, "
            "and build NVIDIA's from source if you need it (docs/install.md)"
        )
        return Extra(name="NVIDIA apex", state="wrong", detail=detail)
    kernels = [name for name in ("amp_C", "fused_weight_gradient_mlp_cuda") if _found(name)]
    built = ", ".join(kernels) if kernels else "none: it was built without --cpp_ext --cuda_ext"
    return Extra(name="NVIDIA apex", state="present", detail=f"compiled extensions: {built}")


def _find_transformer_engine() -> Extra:
    return _find(
        "Transformer Engine",
        module="transformer_engine",
        distribution="transformer-engine",
        used="the te backend: fused attention, grouped GEMM, FP8",
        lost="no te backend, so no FP8 and no grouped GEMM; pip install 'mellum2-megatron[te]'",
    )


def _find_flash_attention() -> Extra:
    return _find(
        "FlashAttention",
        module="flash_attn",
        distribution="flash-attn",
        used="one of Transformer Engine's attention backends",
        lost="Transformer Engine uses cuDNN's fused attention instead",
    )


def _find_nemo_run() -> Extra:
    return _find(
        "NeMo-Run",
        module="nemo_run",
        distribution="nemo-run",
        used="launching on a cluster",
        lost="`mellum2 launch` only writes sbatch scripts; pip install -c constraints.txt 'mellum2-megatron[launch]'",
    )


def find_resiliency() -> Extra:
    """Look for NVIDIA's resiliency extension.

    Beside one older than `OLDEST_RESILIENCY` Megatron-Core does not import at all
    (megatron/core/dist_checkpointing/strategies/nvrx.py:46, 0.19.2).
    """
    found = _find(
        "NVIDIA resiliency extension",
        module="nvidia_resiliency_ext",
        distribution="nvidia-resiliency-ext",
        used="NeMo-Run's fault-tolerance launcher",
        lost="not needed: jobs go on without it; NeMo-Run's fault-tolerance launcher needs it",
    )
    version = too_old_resiliency()
    if version is None:
        return found
    fix = f"pip install 'nvidia-resiliency-ext>={OLDEST_RESILIENCY}', or remove it"
    return Extra(
        name=found.name, state="wrong", detail=f"Megatron does not import beside {version}: {fix}"
    )


def too_old_resiliency() -> str | None:
    """Return the version of NVIDIA's resiliency extension if it is older than
    `OLDEST_RESILIENCY`."""
    try:
        version = importlib.metadata.version("nvidia-resiliency-ext")
    except importlib.metadata.PackageNotFoundError:
        return None
    return version if Version(version) < Version(OLDEST_RESILIENCY) else None


def _find_bridge() -> Extra:
    return _find(
        "Megatron-Bridge",
        module="megatron.bridge",
        distribution="megatron-bridge",
        used="conversion.bridge: AutoBridge and NeMo-RL",
        lost="no conversion.bridge, which nothing else needs; scripts/setup_bridge.sh adds it",
    )


def _find_wandb() -> Extra:
    return _find(
        "Weights & Biases",
        module="wandb",
        distribution="wandb",
        used="logging.wandb",
        lost="logs go to the console, JSON lines and TensorBoard only; pip install 'mellum2-megatron[wandb]'",
    )


_FINDERS: tuple[Callable[[], Extra], ...] = (
    _find_transformer_engine,
    find_apex,
    _find_flash_attention,
    _find_nemo_run,
    find_resiliency,
    _find_bridge,
    _find_wandb,
)


def _find(name: str, *, module: str, distribution: str, used: str, lost: str) -> Extra:
    if not _found(module):
        return Extra(name=name, state="absent", detail=lost)
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown version"
    return Extra(name=name, state="present", detail=f"{version}; {used}")


def _found(module: str) -> bool:
    """Tell whether ``module`` could be imported; a submodule's parents are imported on the way, it
    is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except (
        ImportError,
        ValueError,
    ):  # a parent that fails to import; a module hidden as None in sys.modules
        return False
