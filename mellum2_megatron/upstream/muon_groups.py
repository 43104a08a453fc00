"""Muon's state moves between experts with ranks of their own and others (a work-around for
megatron-core 0.19.2).

With `ep > 1`, or `etp` other than `tp`, the experts are a parameter group of their own
(`is_expert_parallel`), without they share the dense matrices' group. The state of each matrix is
stored under its own key and would fit any grouping; what does not fit is the list of groups, which
is merged position by position with that of the checkpoint
(core/dist_checkpointing/dict_utils.py:227). So the groups are left out of what is asked of the
checkpoint, and the run's own take the checkpoint's values when all of it has been read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_FLAG = "is_expert_parallel"


def omit_param_groups_from_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `LayerWiseDistributedOptimizer.sharded_state_dict`."""

    @functools.wraps(original)
    def sharded_state_dict(self: Any, model: Any, is_loading: bool = False, **kwargs: Any) -> Any:
        state = original(self, model, is_loading, **kwargs)
        if is_loading:
            for _, part in _parts(self, state):
                part["optimizer"].pop("param_groups")
        return state

    return sharded_state_dict


def restore_param_groups(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `LayerWiseDistributedOptimizer.load_state_dict`."""

    @functools.wraps(original)
    def load_state_dict(self: Any, state: Any) -> Any:
        for optimizer, part in _parts(self, state):
            found = part["optimizer"]["param_groups"]
            if not all(
                "params" in group for group in found
            ):  # else it was never stored: a copy in memory
                own = optimizer.optimizer.state_dict()["param_groups"]
                part["optimizer"]["param_groups"] = [_filled(group, found) for group in own]
        return original(self, state)

    return load_state_dict


def _parts(optimizer: Any, state: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the chained optimizers, each with its part of the state; one alone has no level of its
    own."""
    chained = optimizer.chained_optimizers
    if len(chained) == 1:
        yield chained[0], state
        return
    parts = [part for _, part in sorted(state.items())] if isinstance(state, Mapping) else state
    yield from zip(chained, parts, strict=True)


def _filled(own: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a group of this run with the values of the checkpoint's: of its kind, or of the kind
    that held both.

    Without any Megatron will say so: it looks them up by the same keys.
    """
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    keys = [key for key in param_group_identifier_keys if key != _FLAG]
    alike = [
        group for group in found if all(group.get(key) == own.get(key) for key in keys)
    ] or found
    same = next((group for group in alike if group.get(_FLAG) == own.get(_FLAG)), alike[0])
    return same | {"params": own["params"], _FLAG: own.get(_FLAG, False)}
