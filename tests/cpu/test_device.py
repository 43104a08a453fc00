"""``torch.cuda`` answered by the CPU (conftest has activated the backend)."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from mellum2_megatron import cpu
from mellum2_megatron.cpu import device

DEVICES = {
    "text": "cuda",
    "text_with_index": "cuda:0",
    "device": torch.device("cuda"),
    "device_with_index": torch.device("cuda", 0),
    "index": 0,
}
CALLS: dict[str, Callable[[object], torch.Tensor]] = {
    "arange": lambda d: torch.arange(3, device=d),
    "as_tensor": lambda d: torch.as_tensor([1, 2], device=d),
    "empty": lambda d: torch.empty(2, device=d),
    "empty_like": lambda d: torch.empty_like(torch.ones(2), device=d),
    "empty_strided": lambda d: torch.empty_strided((2,), (1,), device=d),
    "eye": lambda d: torch.eye(2, device=d),
    "full": lambda d: torch.full((2,), 3, device=d),
    "full_like": lambda d: torch.full_like(torch.ones(2), 3, device=d),
    "linspace": lambda d: torch.linspace(0, 1, 3, device=d),
    "ones": lambda d: torch.ones(2, device=d),
    "ones_like": lambda d: torch.ones_like(torch.ones(2), device=d),
    "rand": lambda d: torch.rand(2, device=d),
    "rand_like": lambda d: torch.rand_like(torch.ones(2), device=d),
    "randint": lambda d: torch.randint(3, (2,), device=d),
    "randint_like": lambda d: torch.randint_like(torch.ones(2), 3, device=d),
    "randn": lambda d: torch.randn(2, device=d),
    "randn_like": lambda d: torch.randn_like(torch.ones(2), device=d),
    "randperm": lambda d: torch.randperm(3, device=d),
    "tensor": lambda d: torch.tensor([1.0], device=d),
    "zeros": lambda d: torch.zeros(2, device=d),
    "zeros_like": lambda d: torch.zeros_like(torch.ones(2), device=d),
    "new_empty": lambda d: torch.ones(2).new_empty(2, device=d),
    "new_full": lambda d: torch.ones(2).new_full((2,), 3, device=d),
    "new_ones": lambda d: torch.ones(2).new_ones(2, device=d),
    "new_tensor": lambda d: torch.ones(2).new_tensor([1.0], device=d),
    "new_zeros": lambda d: torch.ones(2).new_zeros(2, device=d),
    "to": lambda d: torch.ones(2).to(d),
    "to(device=)": lambda d: torch.ones(2).to(device=d, dtype=torch.bfloat16),
    "cuda": lambda d: torch.ones(2).cuda(d, non_blocking=True),
    "Module.cuda": lambda d: torch.nn.Linear(1, 1).cuda(d).weight,
    "Module.to": lambda d: torch.nn.Linear(1, 1).to(d).weight,
    "Module.to_empty": lambda d: torch.nn.Linear(1, 1, device="meta").to_empty(device=d).weight,
}


def test_backend_is_active_and_cuda_is_reported_absent() -> None:
    assert cpu.is_active()
    assert not torch.cuda.is_available()


def test_every_wrapped_factory_is_called_below() -> None:
    assert set(device.FACTORIES) | set(device.NEW_METHODS) <= set(CALLS)


@pytest.mark.parametrize("where", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("name", CALLS)
def test_cuda_means_the_cpu(name: str, where: object) -> None:
    if isinstance(where, int) and name == "Module.to":
        # torch's own parser takes a bare index for an accelerator's.
        where = torch.device("cuda", where)
    assert CALLS[name](where).device == torch.device("cpu")


def test_other_devices_and_calls_without_one_are_unchanged() -> None:
    assert torch.ones(2, device="meta").is_meta
    assert torch.ones(2).to("meta").is_meta
    assert torch.ones(2).to(torch.bfloat16).dtype == torch.bfloat16
    assert torch.ones(2).to(torch.ones(1, dtype=torch.int64)).dtype == torch.int64
    with torch.device("meta"):
        assert torch.empty(2).is_meta
        assert torch.nn.Linear(2, 2).weight.is_meta


def test_page_locked_memory_is_plain_memory() -> None:
    assert torch.zeros(2, pin_memory=True).pin_memory().tolist() == [0, 0]
    assert not torch.zeros(2).is_pinned()


def test_streams_and_events_have_nothing_to_wait_for() -> None:
    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    assert stream == torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        event.record()
    stream.wait_stream(torch.cuda.current_stream())
    stream.record_event().synchronize()
    assert event.query()
    torch.ones(1).record_stream(stream)
    with pytest.raises(NotImplementedError, match=r"torch\.cuda\.graph"):
        torch.cuda.graph(None)


def test_the_devices_generator_is_the_cpus() -> None:
    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(4)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(4), drawn)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), drawn)


def test_rng_tracker_keeps_separate_sequences(caplog: pytest.LogCaptureFixture) -> None:
    """Dropout needs it: a fork continues its own sequence, and leaves the outer one, silently."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.reset()
    tracker.add("inner", 5)
    expected = torch.rand(4, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(3)
    outer = torch.rand(2)
    torch.manual_seed(3)
    with caplog.at_level(logging.WARNING):
        with tracker.fork("inner"):
            first = torch.rand(2)
        assert torch.equal(torch.rand(2), outer)
        with tracker.fork("inner"):
            second = torch.rand(2)
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=0, atol=0)
    assert "RNG state" not in caplog.text
