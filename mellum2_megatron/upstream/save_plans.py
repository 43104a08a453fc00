"""Plans of saves that are kept between saves (`checkpoint.reuse_plans`), and when they are dropped.

megatron-core 0.19.2 keeps them without looking at what it saves later. From the second save on it
takes the first one's list of tensors (core/dist_checkpointing/strategies/state_dict_saver.py:110).
A tensor that is new since then would be missing in the file, and no message would say so.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelSaveStrategyWrapper,
    )

logger = logging.getLogger(__name__)

_STRUCTURE = "mellum2_structure"
"""Attribute of a strategy: tensors and objects of this rank's last save, without their values."""


def replan_on_change(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `apply_saving_parallelization`, the first step of every save: compare with the last one.

    If on any rank a tensor or object has come, gone, or another shape, type or place, all ranks
    drop their plans. It costs one number of each rank a save.
    """

    @functools.wraps(original)
    def apply_saving_parallelization(
        self: FullyParallelSaveStrategyWrapper, sharded_state_dict: Any
    ) -> None:
        if self.do_cache_distribution:
            from megatron.core.dist_checkpointing.dict_utils import nested_values

            structure = [entry.without_data() for entry in nested_values(sharded_state_dict)]
            last = getattr(self, _STRUCTURE, None)
            setattr(self, _STRUCTURE, structure)
            if last is not None and _on_any_rank(structure != last):
                logger.info("this checkpoint holds other tensors than the last; planned anew")
                _drop_plans(self)
        original(self, sharded_state_dict)

    return apply_saving_parallelization


def _drop_plans(strategy: FullyParallelSaveStrategyWrapper) -> None:
    strategy.cached_distribution = None
    base = strategy.base_strategy
    base.cached_central_plan = base.cached_local_plan = base.cached_global_metadata = None
    base.validated_cache_reuse = False


def _on_any_rank(condition: bool) -> bool:
    """Return whether the condition holds on a rank. A collective."""
    import torch

    flag = torch.tensor([condition], dtype=torch.int, device=torch.cuda.current_device())
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())
