"""Loads Muon state across expert groupings: ep=1 <-> ep>1, etp=tp <-> etp!=tp.

With `ep > 1`, or `etp` other than `tp`, experts are a parameter group of their own
(`is_expert_parallel`); otherwise they share the group of the dense matrices. Each matrix's state is
stored under its own key and fits any grouping. The list of groups does not: megatron-core 0.19.2
merges it with the checkpoint's by position (core/dist_checkpointing/dict_utils.py:227). So the
groups are left out of the request to the checkpoint. Once all of it is read, the run's own groups
take the checkpoint's values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

Group = dict[str, Any]
"""A parameter group of a torch optimizer: its settings and, under "params", its parameters."""

_EXPERT_FLAG = "is_expert_parallel"


def omit_param_groups_from_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `LayerWiseDistributedOptimizer.sharded_state_dict`, which makes the request."""

    @functools.wraps(original)
    def sharded_state_dict(
        self: LayerWiseDistributedOptimizer, model: Any, is_loading: bool = False, **kwargs: Any
    ) -> Any:
        state = original(self, model, is_loading, **kwargs)
        if is_loading:
            for _, part in _parts(self, state):
                part["optimizer"].pop("param_groups")
        return state

    return sharded_state_dict


def restore_param_groups(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `LayerWiseDistributedOptimizer.load_state_dict`, which takes what was read."""

    @functools.wraps(original)
    def load_state_dict(self: LayerWiseDistributedOptimizer, state: Any) -> Any:
        for optimizer, part in _parts(self, state):
            stored = part["optimizer"]["param_groups"]
            # Groups in a checkpoint have no "params". Where all have them, the state is a copy in
            # memory and fits as it is.
            if not all("params" in group for group in stored):
                own = optimizer.optimizer.state_dict()["param_groups"]
                part["optimizer"]["param_groups"] = [
                    _with_stored_values(group, stored) for group in own
                ]
        return original(self, state)

    return load_state_dict


def _parts(
    optimizer: LayerWiseDistributedOptimizer, state: Any
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield each chained optimizer with its part of the state."""
    chained = optimizer.chained_optimizers
    if len(chained) == 1:
        # Megatron gives the state of a single optimizer no level of its own.
        yield chained[0], state
        return
    parts = [part for _, part in sorted(state.items())] if isinstance(state, Mapping) else state
    yield from zip(chained, parts, strict=True)


def _with_stored_values(own: Group, stored: list[Group]) -> Group:
    """Return this run's group with the values of the checkpoint's group of the same kind.

    If that checkpoint has none of the kind, the group that held experts and dense matrices is
    taken. If neither exists Megatron raises: it looks groups up by the same keys.
    """
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    keys = [key for key in param_group_identifier_keys if key != _EXPERT_FLAG]
    alike = [
        group for group in stored if all(group.get(key) == own.get(key) for key in keys)
    ] or stored
    same = next(
        (group for group in alike if group.get(_EXPERT_FLAG) == own.get(_EXPERT_FLAG)), alike[0]
    )
    return same | {"params": own["params"], _EXPERT_FLAG: own.get(_EXPERT_FLAG, False)}
