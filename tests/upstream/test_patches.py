"""The work-arounds for megatron-core 0.19.2: each is still needed, and works."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.upstream import PATCHES, patches, replacements
from mellum2_megatron.upstream.patching import Patch
from tests import REPOSITORY
from tests.cpu import patch_probes, upstream_probes

# Start of each probe's error without the patch. Where a line no longer holds, upstream has changed
# and the patch must be reconsidered.
WITHOUT = {
    "compile-helpers": "SystemExit: 1",
    "document-index": "AssertionError: memory of others",
    "layer-wise-layout": "AssertionError: Muon was set up without the layer-wise layout",
    "batch-ramp": "AssertionError: the ramp is ignored: the first batch has 4 sequences",
    "fusion-without-apex": "RuntimeError: ColumnParallelLinear was called with "
    "gradient_accumulation_fusion set",
    "chunked-mtp": "AssertionError: the logits of all tokens at once",
    "chunked-acceptance": "AssertionError: 1.0 of 3.0 accepted",
    "context-mtp": "AssertionError: rank 0 of 2 weighs [0.3333",
    "kept-plans": "AssertionError: saved without b",
    "muon-experts": "AssertionError: every rank owns all experts",
    "gloo-group-timeout": "AssertionError: another limit than 61 minutes: "
    "{'EXPERT_DATA_PARALLEL_GROUP_GLOO': 30.0}",
    "muon-gloo-group": "AssertionError",
    "muon-groups-asked": "ValueError: Cannot merge two lists with different lengths (1 and 2",
    "muon-groups-loaded": "KeyError: 'params'",
    "save-checksums": "AssertionError: a CRC-32 in the file: [",
    "writer-loop": "AssertionError: runs upstream's loop alone",
    "writer-handed-over": "AssertionError: waits for a process that was killed",
    "writer-awaited": "AssertionError: waits for a process that was killed",
    "writer-closed": "AssertionError: waits for a process that was killed",
    "padded-counts": "AssertionError: a rank's own tokens: 3.0",
    "metadata-pickle": "AssertionError: .metadata was executed",
    "object-pickle": "AssertionError: a stored object was executed",
    "planned-documents": "AssertionError: multi token prediction + sequence packing",
    "packed-mtp": "AssertionError: [[12, 13, 0, 21, 0, 22, 9, 9]] after",
}


def test_every_patch_has_a_probe() -> None:
    assert {patch.name for patch in PATCHES} == set(WITHOUT)
    assert set(WITHOUT) <= set(upstream_probes.PROBES)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_patch_is_needed_and_works(patch: Patch) -> None:
    patch_probes.check_still_needed(patch, WITHOUT)


@pytest.mark.parametrize(
    ("sharded", "layer_wise", "refused"),
    [(False, True, True), (True, True, False), (False, False, False)],
)
def test_layer_wise_muon_needs_its_layout(sharded: bool, layer_wise: bool, refused: bool) -> None:
    config = SimpleNamespace(optimizer="muon", use_layer_wise_distributed_optimizer=layer_wise)
    chunk = SimpleNamespace(ddp_config=SimpleNamespace(use_distributed_optimizer=sharded))
    if not refused:
        replacements.require_layer_wise_layout(config, [chunk])
        return
    with pytest.raises(InputError, match=r"pass model_provider= to megatron\.training\.pretrain"):
        replacements.require_layer_wise_layout(config, [chunk])


def test_missing_psutil_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "psutil" else find_spec(name)
    )
    with pytest.raises(WorkError, match="pip install psutil"):
        patches.activate()


def test_broken_dataset_helpers_are_an_error_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
    with pytest.raises(WorkError, match=r"use Python 3\.12"):
        replacements.import_helpers(lambda: None)()


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter, where `megatron.noisy` stands for upstream's modules."""
    prelude = """
        import logging, sys, types, warnings
        noisy = types.ModuleType("megatron.noisy")
        source = '''
        import logging, sys, warnings
        def speak():
            print("printed")
            print("printed to stderr", file=sys.stderr)
            warnings.warn("warned")
            logging.getLogger("megatron.noisy").warning("logged a warning")
            logging.getLogger("megatron.noisy").error("logged an error")
        '''
        import textwrap
        exec(compile(textwrap.dedent(source), "megatron/noisy.py", "exec"), noisy.__dict__)
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(code)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_upstreams_noise_is_visible_by_default() -> None:
    done = run("noisy.speak()")
    assert "printed\n" in done.stdout
    assert "warned" in done.stderr
    assert "logged a warning" in done.stderr


def test_quiet_upstream_hides_noise_and_no_error() -> None:
    done = run("""
        from mellum2_megatron.upstream import quiet_upstream
        quiet_upstream()
        quiet_upstream()
        noisy.speak()
        print("our own line")
        warnings.warn("our own warning")
        raise RuntimeError("an exception")
    """)
    assert done.stdout == "our own line\n"
    assert "logged an error" in done.stderr
    assert "printed to stderr" in done.stderr
    assert "our own warning" in done.stderr
    assert "RuntimeError: an exception" in done.stderr
    assert "warned" not in done.stderr.replace("our own warning", "")
    assert "logged a warning" not in done.stderr


def test_hidden_prints_are_logged_at_debug() -> None:
    done = run("""
        from mellum2_megatron.upstream import quiet_upstream
        logging.basicConfig(level=logging.DEBUG)
        quiet_upstream()
        noisy.speak()
    """)
    assert "DEBUG:mellum2_megatron.upstream.quiet:megatron.noisy: printed\n" in done.stderr
    assert done.stdout == ""
