"""Optional packages of this machine, and the cost of their absence, for `mellum2 doctor`.

Imports none of them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.version import Version

State = Literal["present", "absent", "wrong"]

OLDEST_RESILIENCY = "0.6.0"
"""Oldest version of NVIDIA's resiliency extension with which Megatron-Core can be imported
(megatron/core/dist_checkpointing/strategies/nvrx.py:46, 0.19.2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptionalPackage:
    """State of an optional package on this machine.

    Attributes:
        name: common name of the package.
        state: ``present``, ``absent``, or ``wrong``: an unrelated package, or too old to work.
        detail: if present, version and use; else the effect and a remedy.
    """

    name: str
    state: State
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    """A package to look for.

    Attributes:
        name: common name.
        module: import name.
        distribution: name in the package index, for the version.
        use: purpose in this project.
        loss: effect of its absence, and the command that installs it.
    """

    name: str
    module: str
    distribution: str
    use: str
    loss: str

    def find(self) -> OptionalPackage:
        """Look for the package without importing it."""
        if not _is_importable(self.module):
            return OptionalPackage(name=self.name, state="absent", detail=self.loss)
        try:
            version = importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            version = "unknown version"
        return OptionalPackage(name=self.name, state="present", detail=f"{version}; {self.use}")


def find_optional_packages() -> tuple[OptionalPackage, ...]:
    """Look for every optional package; takes milliseconds, because nothing is imported."""
    return (
        _Candidate(
            name="Transformer Engine",
            module="transformer_engine",
            distribution="transformer-engine",
            use="the te backend: fused attention, grouped GEMM, FP8",
            loss="no te backend, so no FP8 and no grouped GEMM; pip install 'mellum2-megatron[te]'",
        ).find(),
        find_apex(),
        find_deep_ep(),
        _Candidate(
            name="FlashAttention",
            module="flash_attn",
            distribution="flash-attn",
            use="one of Transformer Engine's attention backends",
            loss="Transformer Engine uses cuDNN's fused attention instead",
        ).find(),
        _Candidate(
            name="NeMo-Run",
            module="nemo_run",
            distribution="nemo-run",
            use="launching on a cluster",
            loss="`mellum2 launch` only writes sbatch scripts; "
            "pip install -c constraints.txt 'mellum2-megatron[launch]'",
        ).find(),
        find_resiliency(),
        _Candidate(
            name="Megatron-Bridge",
            module="megatron.bridge",
            distribution="megatron-bridge",
            use="conversion.bridge: AutoBridge and NeMo-RL",
            loss="no conversion.bridge, which nothing else needs; scripts/setup_bridge.sh adds it",
        ).find(),
        _Candidate(
            name="Weights & Biases",
            module="wandb",
            distribution="wandb",
            use="logging.wandb",
            loss="logs go to the console, JSON lines and TensorBoard only; "
            "pip install 'mellum2-megatron[wandb]'",
        ).find(),
    )


def find_apex() -> OptionalPackage:
    """Look for NVIDIA apex.

    Megatron imports three of its modules (0.19.2): ``apex.multi_tensor_apply`` with ``amp_C``
    (core/optimizer/clip_grads.py:20-30), ``apex.optimizers`` (core/optimizer/__init__.py:20) and
    ``fused_weight_gradient_mlp_cuda`` (core/tensor_parallel/layers.py:51). It imports the first two
    only if Transformer Engine is not importable.
    """
    name = "NVIDIA apex"
    if not _is_importable("apex"):
        detail = (
            "not needed with Transformer Engine; "
            "without either, Adam and gradient norms run unfused"
        )
        return OptionalPackage(name=name, state="absent", detail=detail)
    if not _is_importable("apex.multi_tensor_apply"):
        # PyPI has an unrelated web toolkit called apex.
        detail = (
            "the installed 'apex' is not NVIDIA's but an unrelated package of that name: "
            "pip uninstall apex, and build NVIDIA's from source if you need it (docs/install.md)"
        )
        return OptionalPackage(name=name, state="wrong", detail=detail)
    kernels = filter(_is_importable, ("amp_C", "fused_weight_gradient_mlp_cuda"))
    built = ", ".join(kernels) or "none: it was built without --cpp_ext --cuda_ext"
    return OptionalPackage(name=name, state="present", detail=f"compiled extensions: {built}")


def find_deep_ep() -> OptionalPackage:
    """Look for DeepEP, and for HybridEP, which one branch of it has."""
    if missing_dispatcher("deepep") is not None:
        state: State = "absent"
        detail = (
            "no layout.dispatcher=flex: the exchange of tokens runs on NCCL, which sends a token "
            "once for each of its experts; built from source (docs/install.md)"
        )
    elif missing_dispatcher("hybridep") is not None:
        state = "present"
        detail = "layout.dispatcher_backend=deepep only: HybridEP is in its branch hybrid-ep"
    else:
        state, detail = "present", "layout.dispatcher=flex with deepep or hybridep"
    return OptionalPackage(name="DeepEP", state=state, detail=detail)


def missing_dispatcher(backend: Literal["hybridep", "deepep"]) -> str | None:
    """Return what a backend of the flex dispatcher lacks on this machine; None if nothing.

    Both are in the package ``deep_ep`` (megatron/core/transformer/moe/fused_a2a.py, 0.19.2).
    """
    spec = importlib.util.find_spec("deep_ep")
    if spec is None:
        return "the package deep_ep is not installed here"
    folders = spec.submodule_search_locations or []
    if backend == "hybridep" and not any(
        (Path(folder) / "hybrid_ep_buffer.py").is_file() for folder in folders
    ):
        return "the installed deep_ep has no HybridEP, which is in its branch hybrid-ep"
    return None


def find_resiliency() -> OptionalPackage:
    """Look for NVIDIA's resiliency extension; one older than `OLDEST_RESILIENCY` is ``wrong``."""
    candidate = _Candidate(
        name="NVIDIA resiliency extension",
        module="nvidia_resiliency_ext",
        distribution="nvidia-resiliency-ext",
        use="NeMo-Run's fault-tolerance launcher",
        loss="not needed: our jobs resume without it; NeMo-Run's fault-tolerance launcher needs it",
    )
    version = too_old_resiliency()
    if version is None:
        return candidate.find()
    fix = f"pip install 'nvidia-resiliency-ext>={OLDEST_RESILIENCY}', or remove it"
    return OptionalPackage(
        name=candidate.name,
        state="wrong",
        detail=f"Megatron cannot be imported with {version}: {fix}",
    )


def too_old_resiliency() -> str | None:
    """Return the resiliency extension's version if older than `OLDEST_RESILIENCY`, else None."""
    try:
        version = importlib.metadata.version("nvidia-resiliency-ext")
    except importlib.metadata.PackageNotFoundError:
        return None
    return version if Version(version) < Version(OLDEST_RESILIENCY) else None


def _is_importable(module: str) -> bool:
    """Look for ``module`` without importing it; a submodule's parents are imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        # A parent fails to import, or the module is None in sys.modules. The CPU backend hides
        # apex from Megatron in this way.
        return False
