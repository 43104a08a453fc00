"""The stand-in for Transformer Engine's FusedAdam, against the formula in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from mellum2_megatron.cpu.optim import FusedAdam, cuda_type_names


def reference(
    start: torch.Tensor, gradients: list[torch.Tensor], lr: float, decay: float, decoupled: bool
) -> torch.Tensor:
    """Adam(W) with betas (0.9, 0.95) and eps 1e-8, as its papers write it."""
    value, first, second = (
        start.double(),
        torch.zeros_like(start).double(),
        torch.zeros_like(start).double(),
    )
    for step, gradient in enumerate(gradients, start=1):
        gradient = gradient.double()
        if decoupled:
            value = value * (1 - lr * decay)
        else:
            gradient = gradient + decay * value
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        value = value - lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
    return value


@pytest.mark.parametrize("decoupled", [True, False])
def test_updates_equal_adams(decoupled: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    starts = [torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator)]
    gradients = [
        [torch.randn(start.shape, generator=generator) for _ in range(6)] for start in starts
    ]
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = FusedAdam(
        params, lr=0.1, betas=(0.9, 0.95), weight_decay=0.2, adam_w_mode=decoupled
    )
    for step in range(6):
        for param, mine in zip(params, gradients, strict=True):
            param.grad = mine[step].clone()
        optimizer.step()
    for param, start, mine in zip(params, starts, gradients, strict=True):
        torch.testing.assert_close(
            param.double(), reference(start, mine, 0.1, 0.2, decoupled), rtol=1e-5, atol=1e-6
        )


def test_state_is_that_of_the_fused_optimizers_and_resumes_exactly() -> None:
    def fresh() -> tuple[torch.nn.Parameter, FusedAdam]:
        param = torch.nn.Parameter(torch.arange(4.0))
        return param, FusedAdam([{"params": [param]}, {"params": []}], lr=0.1)

    def step(param: torch.nn.Parameter, optimizer: FusedAdam, gradient: float) -> None:
        param.grad = torch.full((4,), gradient)
        optimizer.step()

    whole, optimizer = fresh()
    step(whole, optimizer, 1.0)
    saved, value = copy.deepcopy(optimizer.state_dict()), whole.detach().clone()
    assert set(saved["state"][0]) == {"exp_avg", "exp_avg_sq"}
    assert [group.get("step") for group in saved["param_groups"]] == [1, None]
    step(whole, optimizer, -3.0)

    resumed, other = fresh()
    other.load_state_dict(saved)
    with torch.no_grad():
        resumed.copy_(value)
    step(resumed, other, -3.0)
    assert torch.equal(resumed, whole)
    assert other.param_groups[0]["step"] == 2


def test_parameters_without_gradient_stay() -> None:
    moved, still = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = FusedAdam([moved, still], lr=0.1, weight_decay=1.0)
    moved.grad = torch.ones(2)
    optimizer.step()
    assert still.tolist() == [1, 1]
    assert moved.tolist() != [1, 1]


def test_cuda_graph_capture_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="optimizer_cuda_graph"):
        FusedAdam([torch.nn.Parameter(torch.ones(1))], capturable=True)


def test_type_names_change_only_inside_the_context() -> None:
    value = torch.ones(1, dtype=torch.bfloat16)
    with cuda_type_names():
        assert value.type() == "torch.cuda.BFloat16Tensor"
        assert value.type(torch.float32).dtype == torch.float32
        with torch.device("cpu"):  # a TorchFunctionMode: the call arrives twice
            assert value.type() == "torch.cuda.BFloat16Tensor"
    assert value.type() == "torch.BFloat16Tensor"
