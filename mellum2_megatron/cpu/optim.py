"""Adam and tensor type names in the form that Megatron's optimizers expect on a GPU.

Without Transformer Engine and apex, ``core/optimizer/__init__.py:33`` (0.19.2) falls back to
``torch.optim.AdamW``, which keeps a ``step`` tensor for each parameter. `DistributedOptimizer`
handles that badly:

* loading makes all parameters share *one* step tensor (distrib_optimizer.py:1028), which then grows
  by the number of parameters each iteration;
* saving asserts that all steps are equal (:838);
* the fully reshardable format raises KeyError('step').

`FusedAdam` has the state layout of the fused optimizers instead, so the code path, and the
checkpoint, are those of a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """Adam with the interface and state of the fused optimizers.

    The state is ``step`` in the group, and two moments for each parameter.

    Args:
        params: parameters or groups, as for any torch optimizer; float32.
        lr: step size.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled (AdamW) with ``adam_w_mode``, else added to the gradient.
        adam_w_mode: see ``weight_decay``.
        capturable: must be False: there is no CUDA graph to capture into.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise NotImplementedError("optimizer_cuda_graph has no counterpart on a CPU")
        self.adam_w_mode = adam_w_mode
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, through torch's fused CPU kernel."""
        if closure is not None:
            raise NotImplementedError("FusedAdam takes no closure")
        for group in self.param_groups:
            if not group["params"]:
                continue  # as the fused optimizers: an empty group counts no steps
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            for param in params:
                state = self.state[param]
                for moment in ("exp_avg", "exp_avg_sq"):
                    if moment not in state:
                        state[moment] = torch.zeros_like(param)
            kernel = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
            # The kernel takes a step tensor for each parameter, and only reads it.
            step = torch.tensor(float(group["step"]))
            kernel(
                params,
                [param.grad for param in params if param.grad is not None],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                [],  # largest second moments, for amsgrad
                [step] * len(params),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


@contextmanager
def cuda_type_names() -> Iterator[None]:
    """Make ``tensor.type()`` return CUDA names inside: ``torch.cuda.BFloat16Tensor``."""
    original = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        # With arguments it converts and returns a tensor. Under a TorchFunctionMode the original
        # arrives here again, by name, and must not be renamed twice.
        if not isinstance(result, str) or result.startswith("torch.cuda."):
            return result
        return result.replace("torch.", "torch.cuda.", 1)

    tensor: Any = torch.Tensor
    tensor.type = type_
    try:
        yield
    finally:
        tensor.type = original


def with_cuda_type_names(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function to run within `cuda_type_names`."""

    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        with cuda_type_names():
            return original(*args, **kwargs)

    return run
