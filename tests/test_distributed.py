"""`tests.distributed`, the base of all multi-process tests: results, failures, timeouts, kills."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.distributed import (
    DistributedError,
    hide_gpus,
    run_distributed,
    show_gpus,
    start_distributed,
)

pytestmark = pytest.mark.distributed


def ranks_and_sum(offset: int) -> tuple[int, float]:
    value = torch.tensor([float(torch.distributed.get_rank() + offset)])
    torch.distributed.all_reduce(value)
    return int(os.environ["RANK"]), value.item()


def fail_on_one() -> None:
    if torch.distributed.get_rank() == 1:
        raise RuntimeError("deliberate")
    torch.distributed.barrier()


@pytest.mark.parametrize("visible", [{}, {"CUDA_VISIBLE_DEVICES": "7,9"}], ids=["all", "some"])
def test_ranks_on_nccl_see_the_gpus_that_the_tests_do_not(visible: dict[str, str]) -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()
    environment = dict(visible)
    for _ in range(2):  # pytest in a process that a test started
        hide_gpus(environment)
        assert environment["CUDA_VISIBLE_DEVICES"] == ""
    show_gpus(environment)
    assert environment == visible


def hang() -> None:
    sys.stdout.write("going to sleep\n")
    time.sleep(600)


def collectives() -> dict[str, object]:
    """Return results of the collectives used by Megatron's layouts; BF16 holds them exactly."""
    rank, peer = torch.distributed.get_rank(), 1 - torch.distributed.get_rank()
    result: dict[str, object] = {}
    for dtype in (torch.float32, torch.bfloat16):
        ramp = torch.arange(4).to(dtype) + rank
        half, double = torch.empty(2, dtype=dtype), torch.empty(8, dtype=dtype)
        torch.distributed.reduce_scatter_tensor(half, ramp, async_op=True).wait()
        result[f"reduce_scatter {dtype}"] = half.tolist()
        torch.distributed.reduce_scatter_tensor(half, ramp, op=torch.distributed.ReduceOp.AVG)
        result[f"reduce_scatter avg {dtype}"] = half.tolist()
        torch.distributed.all_gather_into_tensor(double, ramp, async_op=True).wait()
        result[f"all_gather {dtype}"] = double.tolist()
        greatest = ramp.clone()
        torch.distributed.all_reduce(greatest, op=torch.distributed.ReduceOp.MAX)
        result[f"max {dtype}"] = greatest.tolist()
        received = torch.empty_like(ramp)
        pair = [
            torch.distributed.P2POp(torch.distributed.isend, ramp, peer),
            torch.distributed.P2POp(torch.distributed.irecv, received, peer),
        ]
        for work in torch.distributed.batch_isend_irecv(pair):
            work.wait()
        result[f"p2p {dtype}"] = received.tolist()
        # Each rank sends 1 element to rank 0 and 3 elements to rank 1.
        uneven = torch.empty(2 + 4 * rank, dtype=dtype)
        torch.distributed.all_to_all_single(uneven, ramp, [1 + 2 * rank] * 2, [1, 3])
        result[f"all_to_all {dtype}"] = uneven.tolist()
    both = [torch.ones(2), torch.ones(3)]
    with torch.distributed._coalescing_manager(async_ops=True) as manager:
        for tensor in both:
            torch.distributed.all_reduce(tensor)
    manager.wait()
    result["coalesced"] = [tensor.tolist() for tensor in both]
    flag = torch.tensor([rank == 1])
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    result["max bool"] = flag.tolist()
    return result


def test_results_come_back_by_rank() -> None:
    assert run_distributed("tests.test_distributed:ranks_and_sum", 3, 10) == [
        (0, 33.0),
        (1, 33.0),
        (2, 33.0),
    ]


def test_a_failing_rank_ends_the_run_and_is_shown() -> None:
    start = time.monotonic()
    with pytest.raises(DistributedError) as failure:
        run_distributed("tests.test_distributed:fail_on_one", 2, timeout=60)
    assert "RuntimeError: deliberate" in str(failure.value)
    assert "--- rank 0 ---" in str(failure.value)
    assert time.monotonic() - start < 60


def test_a_rank_that_hangs_is_named_and_killed(tmp_path: Path) -> None:
    world = start_distributed("tests.test_distributed:hang", 2, folder=tmp_path)
    with pytest.raises(DistributedError, match=r"still running: \[0, 1\](.|\n)*going to sleep"):
        world.results(timeout=5)
    assert not any(process.is_alive() for process in world.processes)


def test_a_killed_rank_is_a_failure(tmp_path: Path) -> None:
    world = start_distributed("tests.test_distributed:hang", 2, folder=tmp_path)
    world.processes[1].kill()
    with pytest.raises(DistributedError, match=r"exit codes \[-9, -9\]"):
        world.results(timeout=60)


def test_gloo_does_what_megatron_asks_of_it() -> None:
    """torch 2.15 needs no emulated collective; a failure names the one that an older gloo lacks."""
    zero, one = run_distributed("tests.test_distributed:collectives", 2)
    for dtype in (torch.float32, torch.bfloat16):
        for name, at_zero, at_one in (
            ("reduce_scatter", [1, 3], [5, 7]),
            ("reduce_scatter avg", [0.5, 1.5], [2.5, 3.5]),
            ("all_gather", [0, 1, 2, 3, 1, 2, 3, 4], [0, 1, 2, 3, 1, 2, 3, 4]),
            ("max", [1, 2, 3, 4], [1, 2, 3, 4]),
            ("p2p", [1, 2, 3, 4], [0, 1, 2, 3]),
            ("all_to_all", [0, 1], [1, 2, 3, 2, 3, 4]),
        ):
            assert zero[f"{name} {dtype}"] == at_zero, name
            assert one[f"{name} {dtype}"] == at_one, name
    assert zero["coalesced"] == [[2, 2], [2, 2, 2]]
    assert zero["max bool"] == [True]
