"""The table of CPU patches: each entry is needed by the installed Megatron, and works."""

from __future__ import annotations

import pytest

from mellum2_megatron.cpu.patches import PATCHES
from mellum2_megatron.upstream.patching import Patch
from tests.cpu import patch_probes

# Start of each probe's error without the patch. Where a line no longer holds, upstream has changed
# and the patch must be reconsidered.
WITHOUT = {
    "rng-state": "AssertionError: setting the state changed nothing",
    "loader-seed": "AssertionError: making the iterators drew random numbers",
    "warmup-seed": "AssertionError: the warm-up drew random numbers",
    "allow-no-cuda": "AssertionError: Megatron requires CUDA.",
    "expert-splits": "TypeError: all_to_all_single(): incompatible function arguments",
    "expert-rows": "AssertionError: rows of the experts in torch.bfloat16: [3, 0, 40]",
    "fused-adam": "TypeError: AdamW.__init__() got an unexpected keyword argument 'adam_w_mode'",
    "fused-adam-arguments": "KeyError: 'step'",
    "fused-adam-state": "KeyError: 'step'",
    "fused-adam-step": "KeyError: 'step'",
    "type-names-float16": "TypeError: Wrapped parameters must be one of torch.cuda.FloatTensor",
    "type-names-distributed": "TypeError: Wrapped parameters must be one of torch.cuda.FloatTensor",
    "type-names-clip": "AssertionError",
    "write-results": "AssertionError: AutoProxy[Queue]: another process holds the results",
    "thd-partition": "AttributeError: 'NoneType' object has no attribute "
    "'thd_get_partitioned_indices'",
}


def test_every_patch_has_a_probe_and_every_name_is_unique() -> None:
    names = [patch.name for patch in PATCHES]
    assert sorted(names) == sorted(set(names))
    assert set(names) == set(WITHOUT)
    assert set(names) <= set(patch_probes.PROBES)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_patch_is_needed_and_works(patch: Patch) -> None:
    patch_probes.check_still_needed(patch, WITHOUT)


def test_torch_adam_still_loses_count_in_the_distributed_optimizer() -> None:
    """The reason for all `fused-adam` patches: after a load two parameters share a step tensor."""
    assert (
        patch_probes.outcomes(*WITHOUT)["all of Adam's"]["without"]
        == "AssertionError: steps after two updates: {3.0}"
    )
