"""Activation of the CPU backend: explicit, before megatron, and refused beside a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from tests import REPOSITORY


def run(code: str, **environment: str) -> str:
    """Run ``code`` in a fresh interpreter from the repository root and return what it printed."""
    path = os.pathsep.join([str(REPOSITORY), environment.pop("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_importing_the_package_changes_nothing() -> None:
    run("""
        import torch
        def state():
            methods = torch.Tensor.__dict__
            return dict(vars(torch.cuda)), torch.empty, methods.get("to"), torch.compile
        before = state()
        from mellum2_megatron import cpu
        assert not cpu.is_active()
        assert state() == before
    """)


def test_activation_after_megatron_is_refused_and_changes_nothing() -> None:
    printed = run("""
        import sys, types
        sys.modules["megatron.core"] = types.ModuleType("megatron.core")
        import torch
        empty = torch.empty
        from mellum2_megatron import cpu
        from mellum2_megatron.common import errors
        try:
            cpu.activate()
        except errors.InputError as refusal:
            print(refusal)
        assert torch.empty is empty and not cpu.is_active() and "apex" not in sys.modules
    """)
    assert "cpu.activate() after megatron.core was imported" in printed
    assert "before anything imports megatron" in printed


def test_a_usable_gpu_is_refused() -> None:
    printed = run("""
        import torch
        torch.cuda.is_available = lambda: True
        torch.cuda.get_device_name = lambda: "Some GPU"
        from mellum2_megatron import cpu
        from mellum2_megatron.common import errors
        try:
            cpu.activate()
        except errors.InputError as refusal:
            print(refusal)
        assert not cpu.is_active()
    """)
    assert "Some GPU" in printed
    assert "CUDA_VISIBLE_DEVICES=''" in printed


def test_another_megatron_is_refused_and_changes_nothing() -> None:
    printed = run("""
        import importlib.metadata
        real = importlib.metadata.version
        other = {"megatron-core": "0.20.0"}
        importlib.metadata.version = lambda name: other.get(name) or real(name)
        import torch
        empty = torch.empty
        from mellum2_megatron import cpu
        from mellum2_megatron.common import errors
        try:
            cpu.activate()
        except errors.InputError as refusal:
            print(refusal)
        assert torch.empty is empty and not cpu.is_active()
    """)
    assert "megatron-core 0.20.0" in printed
    assert "install megatron-core==0.19.2" in printed


def test_packages_that_megatron_would_pick_up_are_hidden(tmp_path: Path) -> None:
    for name in ("transformer_engine", "apex", "modelopt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("__version__ = '9.9'\n")
    run(
        """
        import importlib.util
        assert importlib.util.find_spec("transformer_engine") is not None
        from mellum2_megatron import cpu
        cpu.activate()
        cpu.activate()
        assert cpu.is_active()
        for name in ("transformer_engine", "apex", "modelopt"):
            assert importlib.util.find_spec(name) is None
            try:
                __import__(name)
            except ModuleNotFoundError:
                continue
            raise SystemExit(name)
        from megatron.core.extensions.transformer_engine import HAVE_TE
        assert not HAVE_TE
        """,
        PYTHONPATH=str(tmp_path),
    )


def test_patches_reach_names_that_megatron_re_exports() -> None:
    """Patches apply at import: `from x import y` elsewhere in Megatron binds the patched object."""
    run("""
        from mellum2_megatron import cpu
        cpu.activate()
        import importlib, sys
        import megatron.training
        from mellum2_megatron.cpu.patches import PATCHES
        from mellum2_megatron.upstream import PATCHES as UPSTREAM
        for patch in (*PATCHES, *UPSTREAM):
            # Some modules are imported by a schedule when it is chosen.
            module, name = importlib.import_module(patch.module), patch.attribute
            if "." in name:
                continue
            original = getattr(getattr(module, name), "__wrapped__", None)
            for other in list(sys.modules.values()):
                if original is not None and getattr(other, "__name__", "").startswith("megatron."):
                    assert vars(other).get(name) is not original, (patch.name, other.__name__)
        from megatron.training.training import initialize_megatron
        assert initialize_megatron.__wrapped__
        from megatron.core.fusions.fused_bias_swiglu import swiglu
        assert not hasattr(swiglu, "_torchdynamo_orig_callable"), "compiled"
    """)


def test_torch_compile_is_unchanged_for_other_libraries() -> None:
    run("""
        from mellum2_megatron import cpu
        cpu.activate()
        import torch
        function = lambda x: x
        assert torch.compile(function) is not function
        scope = {"__name__": "megatron.core.somewhere", "torch": torch, "function": function}
        exec("plain = torch.compile(function)", scope)
        exec("decorated = torch.compile(fullgraph=True)(function)", scope)
        assert scope["plain"] is function and scope["decorated"] is function
    """)
